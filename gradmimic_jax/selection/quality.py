"""The quality of a data set by a selection, and how much of it to drop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from gradmimic_jax import _tables
from gradmimic_jax.selection import _ids
from gradmimic_jax.selection.label_model import LABEL_MODELS, majority
from gradmimic_jax.selection.selection import Selection

if TYPE_CHECKING:
  import pandas as pd

# Bootstrap samples are drawn from at most so many samples. Their own spread is
# below .4 points then; more of them only take longer.
BOOTSTRAP_SIZE = 20_000


class DatasetQuality(NamedTuple):
  """An estimate of how much of a data set is clean."""

  clean_fraction: (
    float  # mean keep probability of the samples that were voted on
  )
  low: float  # the interval's ends
  high: float
  level: float  # of the interval
  kept_fraction: float  # of all samples, as the selection decides
  n_samples: int
  unvoted: int  # samples without a vote, left out of the estimate

  def to_arrow(self) -> pa.Table:
    """One row, a column a field."""
    return pa.table({name: [value] for name, value in self._asdict().items()})

  def to_pandas(self) -> pd.DataFrame:
    """One row, as a pandas DataFrame."""
    return _tables.to_pandas(self.to_arrow())

  def _repr_html_(self) -> str:
    return _tables.html(self, self.to_arrow())

  def __str__(self) -> str:
    if np.isnan(self.clean_fraction):
      return (
        f"How many of {self.n_samples:,} samples are clean is unknown: nothing"
        f" was said of any; {self.kept_fraction:.1%} are kept."
      )
    return (
      f"{self.clean_fraction:.1%} of {self.n_samples:,} samples look clean"
      f" ({self.level:.0%} interval {self.low:.1%} to {self.high:.1%});"
      f" {self.kept_fraction:.1%} are kept."
    )


class RemovalCurve(NamedTuple):
  """The estimated success of removing the worst samples, by their number."""

  removed: np.ndarray  # int64 [K], ascending, the worst first
  precision: np.ndarray  # [K], estimated share of mislabelled among them
  recall: np.ndarray  # [K], their estimated share among all mislabelled
  recommended: int  # samples that are likelier mislabelled than clean
  uncertain: tuple[int, int]  # surely mislabelled, and perhaps: remove between

  def to_arrow(self) -> pa.Table:
    """A row a point: columns removed, precision and recall (null if nan)."""
    return pa.table(
      {
        "removed": self.removed,
        "precision": _tables.numbers(self.precision),
        "recall": _tables.numbers(self.recall),
      }
    )

  def to_pandas(self) -> pd.DataFrame:
    """A row a point, as a pandas DataFrame; its index is `removed`."""
    return _tables.to_pandas(self.to_arrow(), index="removed")

  def _repr_html_(self) -> str:
    return _tables.html(self, self.to_arrow())

  def __repr__(self) -> str:
    return f"<RemovalCurve of {len(self.removed)} points: {self}>"

  def __str__(self) -> str:
    sure, perhaps = self.uncertain
    return (
      f"remove {self.recommended:,} samples; {sure:,} are almost certainly"
      f" mislabelled, and more than {perhaps:,} would cost clean ones."
    )


def dataset_quality(
  selection: Selection,
  *,
  level: float = 0.95,
  n_bootstrap: int = 100,
  seed: int = 0,
) -> DatasetQuality:
  """Estimates the clean fraction of a data set, with an interval.

  The estimate is the mean keep probability. With the joint model ("auto") the
  interval is that of a bootstrap over samples, made by `select`: the upper
  population's share in fits to resampled scores, and 1 with the probability
  that there is one population only. With votes it is a bootstrap over steps
  and samples: each time, as many steps and samples are drawn with replacement
  and the label model is fitted anew. It covers the chance in which steps and
  samples there are; it can't see an error that all steps share. It is widened
  where needed to hold the estimate and the share of samples kept, which is
  another one: where all votes agree, no draw differs, but the keep probability
  still isn't 1. Of one population it holds what as many samples can't exclude,
  and the share of samples that score above the mark, if there is one.

  Args:
    selection: as `select` gave it. Where a function aggregated the votes, the
      bootstrap takes the majority.
    level: of the interval.
    n_bootstrap: number of draws with votes, of up to `BOOTSTRAP_SIZE` samples.
    seed: for those draws.

  Returns:
    DatasetQuality; nan where no sample has a vote.

  Raises:
    ValueError: a level outside (0, 1), or fewer than two draws.

  Example:
    >>> from gradmimic_jax.selection import select
    >>> rng = np.random.default_rng(0)
    >>> clean = np.arange(500)[:, None] < 350
    >>> scores = np.where(clean, 1.0, -1.0) + rng.normal(0, 0.3, (500, 4))
    >>> quality = dataset_quality(select(scores))
    >>> print(f"{quality.clean_fraction:.2f}", quality.low < 0.7 < quality.high)
    0.70 True
  """
  if not 0 < level < 1:
    raise ValueError(f"level is {level}; expected 0 < level < 1.")
  if n_bootstrap < 2:
    raise ValueError(f"n_bootstrap is {n_bootstrap}; expected at least 2.")
  voted = np.flatnonzero(~np.isnan(selection.keep_probability))
  n_samples = len(selection)
  unvoted = n_samples - len(voted)
  if not len(voted):
    nan = float("nan")
    return DatasetQuality(
      nan, nan, nan, level, selection.kept_fraction, n_samples, unvoted
    )
  estimate = float(selection.keep_probability[voted].mean())
  kept = float(selection.keep[voted].mean())
  about = selection.diagnostics.get("label_model", {})
  held = [estimate, kept]
  if "clean_fraction_draws" in about:
    low, high = _joint_interval(about, level)
    if about["probability_of_two"] <= 0.5:
      # Nobody in n samples is what a share of 1 - p shows with chance p^n.
      held.append(estimate * (1 - level) ** (1 / len(voted)))
      held += [share for share in (about["above_mark"],) if share is not None]
  else:
    low, high = _vote_interval(selection, voted, level, n_bootstrap, seed)
  return DatasetQuality(
    estimate,
    min(low, *held),
    max(high, *held),
    level,
    selection.kept_fraction,
    n_samples,
    unvoted,
  )


def _joint_interval(about: dict[str, Any], level: float) -> tuple[float, float]:
  """Quantiles of the joint model's draws, and of 1 for one population."""
  draws = np.asarray(about["clean_fraction_draws"], np.float64)
  two = about["probability_of_two"]
  share = np.r_[np.sort(draws), 1.0]
  mass = np.r_[np.full(len(draws), two / len(draws)), 1 - two]
  place = np.cumsum(mass) - 0.5 * mass
  tail = (1 - level) / 2
  low, high = np.interp([tail, 1 - tail], place, share)
  return float(low), float(high)


def _vote_interval(
  selection: Selection,
  voted: np.ndarray,
  level: float,
  n_bootstrap: int,
  seed: int,
) -> tuple[float, float]:
  """Quantiles of the label model's estimate over drawn steps and samples."""
  model = LABEL_MODELS.get(
    str(selection.diagnostics.get("aggregate")), majority
  )
  n_steps = selection.votes.shape[1]
  rng = np.random.default_rng(seed)
  estimates = []
  for _ in range(n_bootstrap):
    rows = rng.choice(voted, min(len(voted), BOOTSTRAP_SIZE))
    steps = np.sort(rng.integers(0, n_steps, n_steps))
    drawn = selection.votes[rows][:, steps]
    probability = model(drawn).probability
    if not np.isnan(probability).all():
      estimates.append(np.nanmean(probability))
  if not estimates:
    estimates = [float(selection.keep_probability[voted].mean())]
  tail = (1 - level) / 2
  low, high = np.quantile(estimates, [tail, 1 - tail])
  return float(low), float(high)


def removal_curve(
  selection: Selection, *, sure: float = 0.9, max_points: int = 1000
) -> RemovalCurve:
  """Estimates precision and recall of removing the worst samples.

  Samples go in order of keep probability, then quality, the lowest first. With
  p_i the keep probability,

    precision(k) = mean of (1 - p_i) over the first k,
    recall(k) = sum of (1 - p_i) over the first k / over all.

  Args:
    selection: as `select` gave it. Samples without a vote are never removed.
    sure: probability from which a sample is surely of its kind. The uncertain
      band lies between the samples surely mislabelled and those not surely
      clean.
    max_points: the most points of the curve.

  Returns:
    RemovalCurve; empty arrays if no sample has a vote.

  Raises:
    ValueError: sure outside [.5, 1), fewer than two points.

  Example:
    >>> from gradmimic_jax.selection import select
    >>> found = select([[-2.0], [1.0], [-1.0]], binarize="threshold")
    >>> curve = removal_curve(found)
    >>> curve.removed, curve.precision, curve.recommended
    (array([1, 2, 3]), array([1.  , 1. , 0.66666667]), 2)
  """
  if not 0.5 <= sure < 1:
    raise ValueError(f"sure is {sure}; expected 0.5 <= sure < 1.")
  if max_points < 2:
    raise ValueError(f"max_points is {max_points}; expected at least 2.")
  worst = worst_first(selection)
  p = selection.keep_probability[worst]
  n = len(p)
  counts = np.unique(
    np.linspace(1, n, min(n, max_points)).round().astype(np.int64)
  )
  found = np.cumsum(1 - p)[counts - 1]
  total = float((1 - p).sum())
  recall = found / total if total > 0 else np.full(len(counts), np.nan)
  return RemovalCurve(
    counts,
    found / counts,
    recall,
    int((p < 0.5).sum()),
    (int((p <= 1 - sure).sum()), int((p < sure).sum())),
  )


def class_table(
  selection: Selection, labels: Any, *, names: Any = None
) -> pa.Table:
  """The label issues of every class, the noisiest class first.

  Args:
    selection: as `select` gave it.
    labels: the given labels [N], in the order of `selection.ids`: integers or
      strings.
    names: the classes' names, by integer label.

  Returns:
    A table with columns "Class Name", "Class Index" (the label, or its place
    among the sorted labels where they are strings), "Samples", "Label Issues"
    (samples to drop), "Label Noise" (their share), "Label Quality Score" (the
    mean quality; null if there is none).

  Raises:
    TypeError: labels that are neither integers nor strings.
    ValueError: labels that aren't [N], or without a name.

  Example:
    >>> from gradmimic_jax.selection import select
    >>> selection = select([[2.0], [1.0], [-1.0]], binarize="threshold")
    >>> table = class_table(selection, [0, 0, 1], names=["cat", "dog"])
    >>> table["Class Name"].to_pylist(), table["Label Issues"].to_pylist()
    (['dog', 'cat'], [1, 0])
  """
  labels = checked_labels(labels, len(selection))
  classes, place = np.unique(labels, return_inverse=True)
  is_text = classes.dtype.kind == "U"
  if names is not None and not is_text and classes[-1] >= len(names):
    raise ValueError(
      f"labels holds {classes[-1]}, but there are {len(names)} names; expected"
      " a name for every label."
    )
  size = np.bincount(place)
  issues = np.bincount(place, ~selection.keep)
  quality = selection.quality
  if quality is None:
    quality = np.full(len(selection), np.nan)
  has = ~np.isnan(quality)
  total = np.bincount(place[has], quality[has], minlength=len(size))
  count = np.bincount(place[has], minlength=len(size))
  mean = np.divide(
    total, count, out=np.full(len(size), np.nan), where=count > 0
  )
  noise = issues / size
  order = np.lexsort((np.arange(len(size)), np.nan_to_num(mean, nan=1), -noise))
  named = [
    str(label) if is_text or names is None else str(names[int(label)])
    for label in classes[order]
  ]
  return pa.table(
    {
      "Class Name": pa.array(named, pa.string()),
      "Class Index": order if is_text else classes[order].astype(np.int64),
      "Samples": size[order],
      "Label Issues": issues[order].astype(np.int64),
      "Label Noise": noise[order],
      "Label Quality Score": pa.array(mean[order], from_pandas=True),
    }
  )


def worst_first(selection: Selection) -> np.ndarray:
  """Rows [n] of the samples with a vote, by keep probability, then quality."""
  voted = np.flatnonzero(~np.isnan(selection.keep_probability))
  p = selection.keep_probability[voted]
  if selection.quality is None:
    return voted[np.argsort(p, kind="stable")]
  return voted[np.lexsort((selection.quality[voted], p))]


def checked_labels(labels: Any, n: int) -> np.ndarray:
  """Labels [n], integers >= 0 or strings."""
  array = _ids.plain(labels, "labels")
  if array.shape != (n,):
    raise ValueError(
      f"labels has shape {array.shape}, but there are {n} samples; expected"
      f" [{n}], one label a sample."
    )
  if array.dtype.kind == "i" and array.min() < 0:
    raise ValueError(f"labels holds {array.min()}; expected labels >= 0.")
  return array
