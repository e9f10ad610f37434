"""The automatic binariser: two groups where there are two, else one."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import NamedTuple

import numpy as np

from gradmimic_jax.selection import binarize as binarize_lib
from gradmimic_jax.selection.binarize import Cut

MIN_SCORES = 20  # of fewer, no distribution is fitted
MIN_SEPARATION = 2.0  # Ashman's D of two groups that can be told apart
MIN_BIC_GAIN = 10.0  # "very strong evidence", in units of BIC
ABOVE = 0.7  # share above the mark from which a lone group is kept
BELOW = 0.95  # share below it from which a lone group is dropped
_NEAR_MARK = 0.25  # how far the upper group may lie below the mark, relative
_VALLEY = 0.9  # density between the groups, relative to the lower peak


def auto(mark: float | None = 0.0) -> Auto:
  """Cuts between two groups if there are two, and says why if there aren't.

  Mimic scores spread over orders of magnitude: a clean sample that is learned
  scores a thousandth of a mislabelled one. So the mixture is fitted to

    z = asinh((s - mark) / median |s - mark|),

  linear near the mark and logarithmic far from it, where either group is
  close to a Gaussian. The column is two groups if all of this holds:

  - two Gaussians explain z better than one group does, which may be Gaussian,
    Laplace or uniform in z or s: BIC_1 - BIC_2 > 10;
  - they lie apart: Ashman's D = sqrt(2) |m_h - m_l| / sqrt(v_h + v_l) > 2;
  - the mark parts them: m_l < mark, and m_h above it or nearly so (a sample
    that is learned scores just about zero).

  It is then cut where the upper group becomes the likelier source. Otherwise it
  is one population, as far as can be seen:

  | found                        | votes             | why                     |
  |------------------------------|-------------------|-------------------------|
  | 70 % or more above the mark  | all keep          | no noise to be seen     |
  | 95 % or more below the mark  | all drop          | nothing clean in sight  |
  | otherwise                    | abstain           | the step says nothing   |
  | fewer than 20 scores         | keep where > mark | too few to fit          |
  | all scores are equal         | abstain           |                         |

  What it can't see: groups that overlap a lot (a model that has hardly learned,
  a poor reference) look like one. 20 % noise at D = 2 may still be "all kept",
  and the clean fraction is an upper bound then. Where the clean group is the
  smaller one, most scores lie below the mark, and so do those of clean
  data where a reference is useless; that is why dropping everything takes more
  than keeping everything does. If it comes to that all the same, look at the
  reference (`check_reference`) before the data.

  Without a mark only the shape speaks: z = s, shifted and scaled, and instead
  of the third condition the density must dip between the groups. One population
  is kept then.

  The note says which of these it was; the fit holds the numbers, in the units
  of the scores, but for `groups` (1 or 2), `separation` (D), `bic_gain` and
  `above_mark` (share). `select` asks this binariser first about the scores
  pooled over the steps: where those are one population on one side, so is every
  step; where only those are two, they vote in place of the steps.
  As in `gmm`, no more than `FIT_SIZE` scores, drawn by the seed, are fitted.

  Args:
    mark: the score that parts good from bad by nature; 0 for mimic scores, None
      for scores that have no such mark.

  Returns:
    A binariser.

  Raises:
    ValueError: a mark that isn't finite.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> clean = rng.lognormal(-3, 1, 800)
    >>> auto()(clean, 0).note
    'one population above 0: all kept'
    >>> cut = auto()(np.r_[clean, rng.normal(-0.8, 0.3, 200)], 0)
    >>> cut.note, bool(-0.4 < cut.value < 0)
    ('', True)

  References:
    Ashman, Bird and Zepf, Detecting Bimodality in Astronomical Datasets, 1994.
    Kass and Raftery, Bayes Factors, 1995.
  """
  if mark is not None and not math.isfinite(mark):
    raise ValueError(f"mark is {mark}; expected a finite number, or None.")
  return Auto(None if mark is None else float(mark))


@dataclasses.dataclass(frozen=True)
class Auto:
  """The binariser that `auto` returns."""

  mark: float | None

  def __call__(self, scores: np.ndarray, seed: int) -> Cut:
    """Cuts a column of finite scores [n]; see `auto`."""
    mark = self.mark
    low, high = float(scores.min()), float(scores.max())
    if low == high:
      return Cut(math.nan, "all scores are equal")
    if len(scores) < MIN_SCORES:
      few = f"{len(scores)} scores are too few to fit"
      if mark is None:
        return Cut(math.nan, few)
      return Cut(float(mark), f"{few}: cut at {mark:g}")
    sample = binarize_lib.subsample(scores, seed)
    if mark is None:
      shift = float(np.median(sample))
      scale = binarize_lib.spread(sample, shift)
      z = x = _clipped((sample - shift) / scale)
    else:
      shift, scale = float(mark), binarize_lib.spread(sample, float(mark))
      x = _clipped((sample - shift) / scale)
      z = np.arcsinh(x)
    groups = _two_gaussians(z, seed, split=mark is not None)
    # Densities of x, whichever of the two they were fitted to.
    slope = 0.0 if mark is None else float(np.log(np.cosh(z)).sum())
    one = min(_bic_of_one(z) + 2 * slope, _bic_of_one(x))
    groups = groups._replace(bic_gain=one - groups.bic_gain - 2 * slope)

    def unscaled(value: float) -> float:
      value = value if mark is None else math.sinh(min(max(value, -700), 700))
      return float(value * scale + shift)

    above = float((sample > shift).mean()) if mark is not None else math.nan
    fit = {
      "groups": 1.0,
      "low_share": float(groups.share[0]),
      "low_mean": unscaled(groups.mean[0]),
      "high_mean": unscaled(groups.mean[1]),
      "separation": groups.separation,
      "bic_gain": groups.bic_gain,
    }
    if mark is not None:
      fit["above_mark"] = above
    value = binarize_lib.upward_crossing(*groups[:3])
    if not math.isnan(value) and _are_two(groups, mark is not None):
      value = unscaled(value)
      if low <= value < high:
        note = "" if groups.converged else "EM did not converge"
        return Cut(value, note, fit | {"groups": 2.0})
    return _one_population(mark, above, low, high, fit)


class _Groups(NamedTuple):
  """Two Gaussians, the lower first."""

  share: np.ndarray  # [2]
  mean: np.ndarray  # [2]
  variance: np.ndarray  # [2]
  bic_gain: float  # BIC of the best single group - BIC of these two
  converged: bool

  @property
  def separation(self) -> float:
    """Ashman's D."""
    between = self.mean[1] - self.mean[0]
    return float(math.sqrt(2) * between / math.sqrt(self.variance.sum()))


def _two_gaussians(z: np.ndarray, seed: int, split: bool) -> _Groups:
  """The likelier of two fits: started from k-means, and split at 0."""
  # See `kmeans` for why the imports are here, and for the one thread.
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.mixture import GaussianMixture
  from threadpoolctl import threadpool_limits

  starts: list[dict[str, np.ndarray]] = [{}]
  sides = z[z < 0], z[z >= 0]
  # k-means overlooks a small group beside a wide one; the mark doesn't.
  if split and min(map(len, sides)) > 1:
    starts.append(
      {
        "weights_init": np.array([len(side) / len(z) for side in sides]),
        "means_init": np.array([[side.mean()] for side in sides]),
        "precisions_init": np.array(
          [[[1 / (side.var() + 1e-6)]] for side in sides]
        ),
      }
    )
  fits = []
  with threadpool_limits(1), warnings.catch_warnings():
    # Said in the note instead, where it stays with the result.
    warnings.simplefilter("ignore", ConvergenceWarning)
    for start in starts:
      model = GaussianMixture(2, max_iter=200, random_state=seed, **start)
      fits.append(model.fit(z[:, None]))
  best = max(fits, key=lambda model: model.lower_bound_)
  order = np.argsort(best.means_[:, 0])
  return _Groups(
    best.weights_[order],
    best.means_[order, 0],
    best.covariances_[order, 0, 0],
    float(best.bic(z[:, None])),  # made a gain by the caller
    bool(best.converged_),
  )


def _bic_of_one(x: np.ndarray) -> float:
  """The least BIC of a Gaussian, a Laplace and a uniform distribution."""
  n = len(x)
  log_scales = (  # of the maximum likelihood fits, in closed form
    0.5 * math.log(2 * math.pi * x.var()) + 0.5,
    math.log(2 * np.abs(x - np.median(x)).mean()) + 1,
    math.log(np.ptp(x)),
  )
  return 2 * n * min(log_scales) + 2 * math.log(n)


def _clipped(x: np.ndarray) -> np.ndarray:
  """Pulls in the outermost 0.2 % on each side, which may be anything."""
  inner = np.clip(x, *np.quantile(x, [0.002, 0.998], method="nearest"))
  return inner if np.ptp(inner) > 0 else x


def _are_two(groups: _Groups, has_mark: bool) -> bool:
  if groups.bic_gain <= MIN_BIC_GAIN or groups.separation <= MIN_SEPARATION:
    return False
  low, high = groups.mean
  if has_mark:
    return low < 0 and high > _NEAR_MARK * low
  between = np.linspace(low, high, 201)
  density = sum(
    share / math.sqrt(variance) * np.exp(-0.5 * (between - m) ** 2 / variance)
    for share, m, variance in zip(*groups[:3], strict=True)
  )
  peak = min(density[0], density[-1])
  return bool(density.min() < _VALLEY * peak)


def _one_population(
  mark: float | None, above: float, low: float, high: float, fit: dict
) -> Cut:
  keep_all, drop_all = float(np.nextafter(low, -math.inf)), high
  if mark is None:
    return Cut(keep_all, "one population: all kept", fit)
  if above >= ABOVE:
    return Cut(keep_all, f"one population above {mark:g}: all kept", fit)
  if above <= 1 - BELOW:
    return Cut(drop_all, f"one population below {mark:g}: all dropped", fit)
  note = f"one population around {mark:g}: it says nothing"
  return Cut(math.nan, note, fit)
