"""Binarisers: one step's scores become keep and drop votes.

A binariser is a function from a column of finite scores to a `Cut`; a sample
is kept where its score lies above the cut. So a vote is always monotone in the
score, whatever was fitted. `"auto"` is none: the joint model (`joint`) cuts all
steps together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gradmimic_jax.selection.pooling import unit_of

KEEP, DROP, ABSTAIN = 1, 0, -1

# k-means and the mixture are fitted to at most this many scores of a column.
# A 1-D cut is settled long before: its sampling error falls as 1/sqrt(n).
FIT_SIZE = 100_000


class Cut(NamedTuple):
  """Where a binariser cuts a column of scores.

  The votes are keep where score > value. A value of nan is no cut: the whole
  column abstains, and the note says why.
  """

  value: float  # in the scores' own units
  note: str = ""  # why there is no cut, or what to know about it
  fit: dict[str, float] = {}  # noqa: RUF012 - what was fitted, by name


# (finite scores float64 [n], n >= 1; seed) -> Cut
Binarizer = Callable[[np.ndarray, int], Cut]


def threshold(value: float = 0.0) -> Binarizer:
  """Keeps the samples that score above an absolute value.

  keep_i = score_i > value. Zero is the mimic score's natural mark: a step on a
  clean sample moves the weights toward the reference, a step on a mislabelled
  one away from it. For softmax weights over batches of B, the paper uses 1/B.

  Args:
    value: the threshold, finite.

  Returns:
    A binariser.

  Raises:
    ValueError: a value that isn't finite.

  Example:
    >>> threshold(0.5)(np.array([0.2, 0.5, 0.9]), 0)
    Cut(value=0.5, note='', fit={})

  References:
    Huang et al., arXiv 2501.06708, Table 2.
  """
  if not math.isfinite(value):
    raise ValueError(f"threshold is {value}; expected a finite number.")
  return lambda scores, seed: Cut(float(value))


def top_fraction(fraction: float) -> Binarizer:
  """Keeps the top scores: round(fraction n) of n, at least one.

  Samples that tie with the last one kept are kept as well, so the outcome
  doesn't depend on the order of the samples.

  Args:
    fraction: the share to keep, in (0, 1].

  Returns:
    A binariser.

  Raises:
    ValueError: a fraction outside (0, 1].

  Example:
    >>> scores = np.array([4.0, 1.0, 3.0, 2.0])
    >>> scores > top_fraction(0.5)(scores, 0).value
    array([ True, False,  True, False])

  References:
    Huang et al., arXiv 2501.06708, the web-scale study's top 30-40 %.
  """
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction is {fraction}; expected 0 < fraction <= 1.")

  def cut(scores: np.ndarray, seed: int) -> Cut:
    drop = len(scores) - max(1, round(fraction * len(scores)))
    last_kept = np.partition(scores, drop)[drop]
    return Cut(float(np.nextafter(last_kept, -np.inf)))

  return cut


def kmeans() -> Binarizer:
  """Keeps the upper of two clusters.

  1-D k-means with two centres; the cut is the middle between them. No cut
  where the scores are all equal. It expects groups of much the same width: a
  wide low group is cut in two, and its upper part kept, where `gmm` isn't
  misled.

  Like every fit here it looks at scores shifted and scaled by the median and
  the median distance from it, without those that are off the scale and with
  the outermost 1 % on each side pulled in, so that neither the scores' unit
  nor a few extreme ones matter; and at a seeded subsample of `FIT_SIZE` scores
  where there are more.

  Returns:
    A binariser.

  Example:
    >>> round(kmeans()(np.array([-3.0, -2.0, 4.0, 5.0]), 0).value, 6)
    1.0

  References:
    Huang et al., arXiv 2501.06708, Table 2.
  """

  def cut(scores: np.ndarray, seed: int) -> Cut:
    scaled = _fit_scores(scores, seed)
    if scaled is None:
      return Cut(math.nan, "all scores are equal")
    # scikit-learn takes more than a second to import; training needs none.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    values, shift, scale = scaled
    # One column is no work for threads, and beside a training run that holds
    # the cores they wait for each other a hundred times longer than they work.
    with threadpool_limits(1):
      model = KMeans(2, n_init=4, random_state=seed).fit(values[:, None])
    low, high = np.sort(model.cluster_centers_[:, 0])
    fit = {
      "low_mean": _unscaled(low, shift, scale),
      "high_mean": _unscaled(high, shift, scale),
    }
    return Cut(_unscaled((low + high) / 2, shift, scale), "", fit)

  return cut


def gmm() -> Binarizer:
  """Keeps where the upper of two Gaussians is the more likely source.

  A mixture p(s) = q_l N(s; m_l, v_l) + q_h N(s; m_h, v_h), m_l < m_h, is
  fitted by EM. The log ratio of its two terms is a quadratic in s, so the
  posterior of the upper component rises through 1/2 at one score at most: that
  is the cut. Where the lower component is the wider one the posterior falls
  below 1/2 again for very high scores; those are kept all the same, because a
  higher score is never a worse one.

  No cut where the scores are all equal, or where one component is the more
  likely one for every score: the column is one population then. (The reverse
  does not hold: a mixture also splits a single population that isn't Gaussian.)

  The scores are scaled, and subsampled when many, as in `kmeans`.

  Returns:
    A binariser.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> wide, narrow = rng.normal(-5, 2, 500), rng.normal(1, 0.3, 500)
    >>> cut = gmm()(np.concatenate([wide, narrow]), 0)
    >>> bool(-1.5 < cut.value < 0.5)
    True

  References:
    Huang et al., arXiv 2501.06708, Table 2.
  """

  def cut(scores: np.ndarray, seed: int) -> Cut:
    scaled = _fit_scores(scores, seed)
    if scaled is None:
      return Cut(math.nan, "all scores are equal")
    values, shift, scale = scaled
    # See `kmeans` for why the imports are here, and for the one thread.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    model = GaussianMixture(2, max_iter=200, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
      # Said in the note instead, where it stays with the result.
      warnings.simplefilter("ignore", ConvergenceWarning)
      model.fit(values[:, None])
    low, high = np.argsort(model.means_[:, 0])
    share = model.weights_[[low, high]]
    mean = model.means_[[low, high], 0]
    variance = model.covariances_[[low, high], 0, 0]
    fit = {
      "low_share": float(share[0]),
      "low_mean": _unscaled(mean[0], shift, scale),
      "low_std": _unscaled(np.sqrt(variance[0]), 0.0, scale),
      "high_mean": _unscaled(mean[1], shift, scale),
      "high_std": _unscaled(np.sqrt(variance[1]), 0.0, scale),
    }
    value = upward_crossing(share, mean, variance)
    if not math.isnan(value):
      value = _unscaled(value, shift, scale)
    if math.isnan(value) or (scores > value).all() or (scores <= value).all():
      note = "one population: no score separates the two components"
      return Cut(math.nan, note, fit)
    note = "" if model.converged_ else "EM did not converge"
    return Cut(float(value), note, fit)

  return cut


# name -> factory; `select` hands "threshold" and "top_fraction" their value.
# "auto" has none: the joint model of all steps cuts them together.
BINARIZERS: dict[str, Callable[..., Binarizer] | None] = {
  "auto": None,
  "threshold": threshold,
  "kmeans": kmeans,
  "gmm": gmm,
  "top_fraction": top_fraction,
}


def make_binarizer(name: Any, **values: float | None) -> Binarizer | None:
  """The binariser of a name, or the given one.

  Args:
    name: a key of `BINARIZERS`, or a binariser.
    **values: `threshold` and `fraction`, each for the binariser that takes it.

  Returns:
    A binariser; None for "auto", which isn't one of single columns.

  Raises:
    TypeError: neither a name nor a function.
    ValueError: an unknown name, a value missing, or one that the binariser
      doesn't take.

  Example:
    >>> make_binarizer("threshold", threshold=0.5)([1.0], 0)
    Cut(value=0.5, note='', fit={})
  """
  given = {key: value for key, value in values.items() if value is not None}
  takes = {"threshold": "threshold", "top_fraction": "fraction"}
  if not isinstance(name, str) and not callable(name):
    raise TypeError(
      f"binarize is {name!r}; expected one of {sorted(BINARIZERS)}, or a"
      " function (scores [n], seed) -> Cut."
    )
  if isinstance(name, str) and name not in BINARIZERS:
    raise ValueError(
      f"binarize is {name!r}; expected one of {sorted(BINARIZERS)}."
    )
  for key in given:
    if not isinstance(name, str) or takes.get(name) != key:
      user = next(user for user, taken in takes.items() if taken == key)
      raise ValueError(
        f"{key}={given[key]} has no effect with binarize={name!r}; leave it"
        f" out, or use binarize={user!r}."
      )
  if not isinstance(name, str):
    return name
  if name == "top_fraction" and not given:
    raise ValueError(
      "binarize='top_fraction' needs fraction, the share to keep, in (0, 1]."
    )
  factory = BINARIZERS[name]
  return factory(*given.values()) if factory else None


def votes_of(
  scores: np.ndarray, binarizer: Binarizer, *, seed: int = 0
) -> tuple[np.ndarray, list[Cut]]:
  """Binarises every column by itself.

  Args:
    scores: real numbers [N, T]; what isn't finite abstains.
    binarizer: what makes the cut of a column.
    seed: for subsamples and the fits' starts.

  Returns:
    votes int8 [N, T] (1 keep, 0 drop, -1 abstain) and the T cuts.

  Example:
    >>> scores = np.array([[1.0, np.nan], [-1.0, 2.0]])
    >>> votes_of(scores, threshold(0.0))[0]
    array([[ 1, -1],
           [ 0,  1]], dtype=int8)
  """
  cuts = []
  for step in range(scores.shape[1]):
    column = scores[:, step].astype(np.float64)
    seen = np.isfinite(column)
    if seen.any():
      cuts.append(binarizer(column[seen], seed))
    else:
      cuts.append(Cut(math.nan, "no finite score"))
  return cast(scores, cuts), cuts


def cast(scores: np.ndarray, cuts: list[Cut]) -> np.ndarray:
  """The votes [N, T] of scores by the cuts of their steps."""
  votes = np.full(scores.shape, ABSTAIN, np.int8, order="F")
  for step, cut in enumerate(cuts):
    if not math.isnan(cut.value):
      column = scores[:, step].astype(np.float64)
      seen = np.isfinite(column)
      votes[seen, step] = np.where(column[seen] > cut.value, KEEP, DROP)
  return votes


def _fit_scores(
  scores: np.ndarray, seed: int
) -> tuple[np.ndarray, float, float] | None:
  """The scores to fit, with shift and scale; None if they are all equal.

  What is off the scale (`pooling.unit_of`) is left out: a spike in the loss
  would be a group of its own.
  """
  unit = unit_of(scores, None)
  if unit is None or unit.constant:
    return None
  z = unit.z(scores)
  z = z[(z >= unit.low) & (z <= unit.high)]
  if z.min() == z.max():
    z = unit.z(scores)
  if len(z) > FIT_SIZE:
    sample = z[np.random.default_rng(seed).integers(0, len(z), FIT_SIZE)]
    # Rare values may be missing from a sample, but not the only two there are.
    z = sample if np.ptp(sample) > 0 else z
  inner = np.clip(z, *np.quantile(z, [0.01, 0.99]))
  if np.ptp(inner) > 0:
    z = inner
  return z, unit.center, unit.scale


def _unscaled(z: float, shift: float, scale: float) -> float:
  """A score in its own unit, as large as a number can be at most."""
  largest = np.finfo(np.float64).max
  with np.errstate(over="ignore"):
    return float(np.clip(np.float64(z) * scale + shift, -largest, largest))


def upward_crossing(
  share: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> float:
  """Where the second Gaussian overtakes the first, going up; nan if nowhere.

  With f(s) = log(q_h N(s; m_h, v_h)) - log(q_l N(s; m_l, v_l)) = a s^2 + b s
  + c, it is the root at which f rises.
  """
  a = 0.5 / variance[0] - 0.5 / variance[1]
  b = mean[1] / variance[1] - mean[0] / variance[0]
  c = (
    np.log(share[1] / share[0])
    - 0.5 * np.log(variance[1] / variance[0])
    + 0.5 * mean[0] ** 2 / variance[0]
    - 0.5 * mean[1] ** 2 / variance[1]
  )
  discriminant = b * b - 4 * a * c
  if discriminant <= 0:
    return math.nan
  # f' = sqrt(discriminant) at the rising root (-b + sqrt) / (2 a); the second
  # form is the same root without dividing by an `a` near zero.
  root = math.sqrt(discriminant)
  return float(-2 * c / (b + root) if b > 0 else (root - b) / (2 * a))
