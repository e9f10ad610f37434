"""The selection: a keep probability and a decision for every sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gradmimic_jax import _frames, _tables
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import (
  _ids,
  binarize as binarize_lib,
  joint,
  label_model as label_model_lib,
  pooling,
  uids,
)
from gradmimic_jax.selection.binarize import KEEP, Cut

if TYPE_CHECKING:
  import pandas as pd

# `mark` when none is given: 0 for a ledger, none for an array.
_OF_LEDGERS = "0 for a ledger, None for an array"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
  """The samples to keep, with the votes behind the decision.

  `str(selection)` sums it up in a few lines.

  Attributes:
    ids: the samples' ids [N].
    keep: the decision, booleans [N]. A sample is dropped where its keep
      probability is below 1/2, and only there: ties and samples without a vote
      are kept, because dropping needs evidence.
    keep_probability: floats [N] in [0, 1]; nan where nothing is known of a
      sample: no finite score, or no step has a vote.
    votes: int8 [N, T]; 1 keep, 0 drop, -1 abstain.
    diagnostics: how it came about, in plain numbers and strings (it can be
      written as JSON); `select` lists the names.
    quality: floats [N] in [0, 1], high = good: the keep probability, but for
      a thousandth that ranks by the scores pooled over the steps, so that
      better scores have a higher quality also where the probability makes no
      difference. nan without a finite score; None in a selection made without.
  """

  ids: np.ndarray
  keep: np.ndarray
  keep_probability: np.ndarray
  votes: np.ndarray
  diagnostics: dict[str, Any]
  quality: np.ndarray | None = None

  def __post_init__(self) -> None:
    # Zeros and ones would be taken for places.
    keep = _ids.mask(self.keep, len(self.ids), "keep")
    object.__setattr__(self, "keep", keep)

  @property
  def kept_ids(self) -> np.ndarray:
    """The ids to keep, in the order of `ids`."""
    return self.ids[self.keep]

  @property
  def dropped_ids(self) -> np.ndarray:
    """The ids to drop, in the order of `ids`."""
    return self.ids[~self.keep]

  @property
  def kept_fraction(self) -> float:
    """The share of samples kept, the paper's estimate of data quality."""
    return float(self.keep.mean())

  def to_arrow(self) -> pa.Table:
    """A row a sample, as an Arrow table.

    Returns:
      Columns id, keep, keep_probability, quality (null where undefined) and
      vote_0 ... vote_{T-1} (1 keep, 0 drop, -1 abstain).
    """
    return self._table(len(self))

  def to_pandas(self) -> pd.DataFrame:
    """A row a sample, as a pandas DataFrame; its index holds the ids."""
    return _tables.to_pandas(self.to_arrow(), index="id")

  def _repr_html_(self) -> str:
    return _tables.html(self, self._table(_tables.ROWS), n_rows=len(self))

  def _table(self, n_rows: int) -> pa.Table:
    quality = self.quality
    if quality is None:
      quality = np.full(len(self), np.nan)
    columns = {
      "id": uids.to_arrow(self.ids[:n_rows], "ids"),
      "keep": pa.array(self.keep[:n_rows]),
      "keep_probability": _tables.numbers(self.keep_probability[:n_rows]),
      "quality": _tables.numbers(quality[:n_rows]),
    }
    for step, votes in enumerate(self.votes[:n_rows].T):
      columns[f"vote_{step}"] = pa.array(np.ascontiguousarray(votes))
    return pa.table(columns)

  def __len__(self) -> int:
    return len(self.ids)

  def __str__(self) -> str:
    about = self.diagnostics
    how = "."
    if "aggregate" in about:  # a file need not say
      how = (
        f", by {about['aggregate']} over {self.votes.shape[1]} steps of"
        f" {about['binarize']} votes."
      )
    lines = [
      f"Selection: keeps {int(self.keep.sum()):,} of {len(self):,} samples"
      f" ({self.kept_fraction:.1%}){how}"
    ]
    if about.get("population"):
      lines.append(f"  all steps: {about['population']}")
    if ties := int((self.keep_probability == 0.5).sum()):
      lines.append(f"  {ties:,} ties, kept")
    if unvoted := int(np.isnan(self.keep_probability).sum()):
      lines.append(f"  {unvoted:,} samples without a vote, kept")
    if note := about.get("label_model", {}).get("note"):
      lines.append(f"  {about['aggregate']}: {note}")
    steps, notes = about.get("steps", []), about.get("notes", [])
    for step, note in zip(steps, notes, strict=True):
      if note and note != about.get("population"):
        lines.append(f"  step {step}: {note}")
    return "\n".join(lines)

  def __repr__(self) -> str:
    return (
      f"<Selection of {int(self.keep.sum())} of {len(self)} samples,"
      f" {self.votes.shape[1]} steps>"
    )


def select(
  scores: Any,
  *,
  binarize: str | binarize_lib.Binarizer = "auto",
  aggregate: str | label_model_lib.LabelModel = "label_model",
  threshold: float | None = None,
  fraction: float | None = None,
  mark: float | str | None = _OF_LEDGERS,
  ids: Any = None,
  seed: int = 0,
) -> Selection:
  """Decides from every sample's scores over the steps which to keep.

  By default one model explains all scores: a sample is clean or not, each step
  sees that in its own way, and whether there are two kinds at all is decided
  once, on the scores of all steps together (`joint.fit` has the mathematics).
  Its posterior is the keep probability; a sample is dropped where that is
  below 1/2. The votes show how each step by itself would have it.

  With another `binarize`, the paper's second stage: every step (column) is
  binarised by itself into keep and drop votes, and `aggregate` turns each
  sample's votes into the keep probability.

  Guarantees of the default: the order of samples and of steps makes no
  difference, nor a step's unit, nor, without a mark, a step's zero; of two
  samples that were seen in the same steps, one with higher scores never has
  the lower probability or quality; copies of a step are worth one; a few
  samples with absurd scores change nothing for the others.

  | edge case                            | behaviour                          |
  |--------------------------------------|------------------------------------|
  | a score that is NaN or infinite      | abstains; in `abstentions`         |
  | "auto": the pooled scores are one    | all kept (with a mark: by the side |
  | population                           | they lie on); in `population`      |
  | "auto" with a mark: fewer than 20    | each by its own side; likewise     |
  | samples that aren't clearly two      |                                    |
  | "auto": a step tells the two         | it abstains; in `notes`            |
  | populations no better than chance    |                                    |
  | "gmm", "kmeans", "auto": all equal   | the step abstains; in `notes`      |
  | "gmm": nothing separates the two     | the step abstains; in `notes`      |
  | as many keep as drop, by majority    | kept, probability 1/2; in `ties`   |
  | no vote at all                       | kept, probability nan; in `unvoted`|
  | one step                             | its votes are the decision         |

  The names in `diagnostics`: `binarize`, `aggregate`, `threshold`, `fraction`,
  `mark`, `seed`, `fit_size` (the most scores of a step that are fitted),
  `columns` (a frame's, else none), `n_samples`, `n_steps`, `n_kept`, `ties`,
  `unvoted`, `abstentions` (votes not cast), `population` ("" unless the pooled
  scores are one), `fingerprints` (a ledger's); lists over the steps: `steps` (a
  ledger's epochs, else 0 ... T-1), `cuts` (None where there is none),
  `keep_shares` (keep votes among the votes; None where there are none),
  `coverages` (votes among the samples), `notes`, `fits`; and `label_model`, the
  label model's own.

  Args:
    scores: raw scores [N, T], high = good, the ledger that holds them, or a
      data frame (pandas, polars, Arrow) of nothing but scores and ids.
    binarize: "auto" (the joint model; the recommended one), "gmm" (two
      Gaussians), "kmeans" (two clusters), "threshold" (score > threshold),
      "top_fraction" (the highest scores), or a function (finite scores [n],
      seed) -> Cut.
    aggregate: "label_model" (the recommended one: the joint model's posterior
      with "auto", "two_coin" otherwise), "two_coin", "one_coin", "triplet"
      (learn how good each step's votes are), "majority", or a function votes
      [N, T] -> KeepProbability.
    threshold: for "threshold", an absolute score; 0 when not given.
    fraction: for "top_fraction", the share to keep, in (0, 1].
    mark: for "auto", the score that parts good from bad by nature, or None if
      there is none. Zero is one for mimic scores: a step on a clean sample
      moves the weights toward the reference. When not given: 0 for a ledger,
      None for an array.
    ids: the samples' ids [N], none twice; a frame's may be named, by their
      column. When not given: the frame's index, else 0 ... N-1. A ledger brings
      its own.
    seed: for the fits.

  Returns:
    Selection(ids [N], keep [N], keep_probability [N], votes [N, T],
    diagnostics, quality [N]).

  Raises:
    TypeError: scores or ids of the wrong kind; a frame with a column that
      isn't floats, or looks like ids.
    ValueError: no samples, scores that aren't [N, T], ids that aren't N or
      repeat, an unknown name, a threshold, fraction or mark out of range or
      without use.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> wrong = np.arange(200) < 60
    >>> scores = rng.normal(np.where(wrong, -2, 2), 1.0, (3, 200)).T
    >>> selection = select(scores)
    >>> bool((selection.keep == ~wrong).all())
    True
    >>> print(selection)
    Selection: keeps 140 of 200 samples (70.0%), by label_model over 3 steps of
    auto votes.

  References:
    Huang et al., arXiv 2501.06708, the offline stage.
  """
  binarizer = binarize_lib.make_binarizer(
    binarize, threshold=threshold, fraction=fraction
  )
  label_model = label_model_lib.make_label_model(aggregate)
  mark = _checked_mark(mark, binarize, isinstance(scores, ScoreLedger))
  steps: Sequence[int]
  columns: list[str] = []
  fingerprints: dict[str, str] = {}
  if isinstance(scores, ScoreLedger):
    if ids is not None:
      raise ValueError("ids is given, but a ledger brings its own; leave it.")
    steps, fingerprints = scores.epochs, scores.fingerprints
    ids, scores = scores.matrix("score")
  else:
    if _frames.is_frame(scores):
      scores, ids, columns = _frames.read_scores(scores, "scores", ids=ids)
    scores = _checked_scores(scores)
    steps = range(scores.shape[1])
    ids = _checked_ids(ids, len(scores))

  population = ""
  if binarizer is None:
    found = joint.fit(scores, mark=mark, seed=seed)
    cuts = [
      Cut(float(cut), note, fit)
      for cut, note, fit in zip(
        found.cuts, found.notes, found.fits, strict=True
      )
    ]
    votes = binarize_lib.cast(scores, cuts)
    population = found.population
    fit_size = joint.FIT_SIZE
  else:
    votes, cuts = binarize_lib.binarize_columns(scores, binarizer, seed=seed)
    fit_size = binarize_lib.FIT_SIZE
  if binarizer is None and aggregate == "label_model":
    probability = label_model_lib.agreeing(found.probability, votes)
    quality = found.quality
    label_diagnostics = found.about | _agreement(probability, votes)
  else:
    probability, label_diagnostics = label_model(votes)
    quality = pooling.calibrate_quality(_pooled(scores), probability)
  keep = ~(probability < 0.5)  # so that nan, no vote, is kept
  n_votes = [int((column >= 0).sum()) for column in votes.T]
  n_keeps = [int((column == 1).sum()) for column in votes.T]
  diagnostics = {
    "binarize": _name(binarize),
    "aggregate": _name(aggregate),
    "threshold": threshold,
    "fraction": fraction,
    "mark": mark,
    "seed": seed,
    "fit_size": fit_size,
    "columns": columns,
    "n_samples": len(votes),
    "n_steps": votes.shape[1],
    "n_kept": int(keep.sum()),
    "ties": int((probability == 0.5).sum()),
    "unvoted": int(np.isnan(probability).sum()),
    "abstentions": votes.size - sum(n_votes),
    "steps": list(steps),
    "cuts": [None if math.isnan(cut.value) else cut.value for cut in cuts],
    "keep_shares": [
      k / n if n else None for k, n in zip(n_keeps, n_votes, strict=True)
    ],
    "coverages": [n / len(votes) for n in n_votes],
    "population": population,
    "fingerprints": fingerprints,
    "notes": [cut.note for cut in cuts],
    "fits": [dict(cut.fit) for cut in cuts],
    "label_model": label_diagnostics,
  }
  return Selection(ids, keep, probability, votes, diagnostics, quality)


def _agreement(
  probability: np.ndarray, votes: np.ndarray
) -> dict[str, list[float | None]]:
  """Measures how often each step's votes are the decision, and are right."""
  agreements: list[float | None] = []
  accuracies: list[float | None] = []
  known = ~np.isnan(probability)
  for column in votes.T:
    cast = known & (column >= 0)
    p, keeps = probability[cast], column[cast] == KEEP
    right = np.where(keeps, p, 1 - p)
    agreements.append(float((right >= 0.5).mean()) if len(p) else None)
    accuracies.append(float(right.mean()) if len(p) else None)
  return {"agreements": agreements, "accuracies": accuracies}


def _pooled(scores: np.ndarray) -> np.ndarray:
  """Pools all steps alike, each in its own unit."""
  units = tuple(pooling.fit_unit(column, None) for column in scores.T)
  pooled, _ = pooling.even_pool(units, curved=False)(scores)
  # Scores that are all the same are known, though they tell nothing.
  known = np.isfinite(scores).any(axis=1)
  return np.where(np.isnan(pooled) & known, 0.0, pooled)


def _checked_mark(
  mark: float | str | None, binarize: Any, is_ledger: bool
) -> float | None:
  if mark is None or mark == _OF_LEDGERS:
    zero = mark is not None and is_ledger and binarize == "auto"
    return 0.0 if zero else None
  if isinstance(mark, str) or not math.isfinite(mark):
    raise ValueError(f"mark is {mark!r}; expected a finite number, or None.")
  if binarize != "auto":
    raise ValueError(
      f"mark={mark} has no effect with binarize={_name(binarize)!r}; leave it"
      " out, or use binarize='auto'."
    )
  return float(mark)


def _name(method: Any) -> str:
  if isinstance(method, str):
    return method
  return getattr(method, "__name__", type(method).__name__)


def _checked_scores(scores: Any) -> np.ndarray:
  array = np.asarray(scores)
  if not np.can_cast(array.dtype, np.float64, "same_kind"):
    raise TypeError(
      f"scores has dtype {array.dtype}; expected real numbers [N, T], or a"
      " ScoreLedger."
    )
  if array.ndim != 2:
    hint = " One step's scores are scores[:, None]." if array.ndim == 1 else ""
    raise ValueError(
      f"scores has shape {array.shape}; expected [N, T], samples by"
      f" steps.{hint}"
    )
  if not array.size:
    raise ValueError(
      f"scores has shape {array.shape}; expected at least one sample and one"
      " step."
    )
  return array


def _checked_ids(ids: Any, n: int) -> np.ndarray:
  if ids is None:
    return np.arange(n)
  if isinstance(ids, str):
    raise TypeError(
      f"ids is {ids!r}, the name of a column, but scores is no data frame;"
      " expected ids [N]."
    )
  array = _ids.plain(ids, "ids")
  if array.shape != (n,):
    raise ValueError(
      f"ids has shape {array.shape}, but scores has {n} rows; expected [{n}]."
    )
  if array.dtype.kind == "i" and array.min() < 0:
    raise ValueError(
      f"ids holds {array.min()}; expected ids >= 0. Leave padding out."
    )
  values, counts = np.unique(array, return_counts=True)
  if len(values) < n:
    worst = counts.argmax()
    raise ValueError(
      f"ids repeat: {values[worst].item()!r} came {counts[worst]} times. Give"
      " one row of scores a sample."
    )
  return array
