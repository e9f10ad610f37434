"""The selection: a keep probability and a decision for every sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import (
  _ids,
  binarize as binarize_lib,
  binarizers,
  label_model as label_model_lib,
  pooling,
)
from gradmimic_jax.selection.auto import MIN_SCORES, Auto
from gradmimic_jax.selection.binarize import ABSTAIN, DROP, KEEP, Cut

_OVERRULED = (
  "it went against the pooled scores of most samples; taken by majority"
)

_POOLED = "no step by itself tells two groups apart: the pooled scores vote"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
  """Which samples to keep, with the votes behind it.

  `str(selection)` sums it up in a few lines.

  Attributes:
    ids: the samples' ids [N].
    keep: the decision, booleans [N]. A sample is dropped where its keep
      probability is below 1/2, and only there: ties and samples without a vote
      are kept, because dropping needs evidence.
    keep_probability: floats [N] in [0, 1]; nan where a sample has no vote.
    votes: int8 [N, T]; 1 keep, 0 drop, -1 abstain.
    diagnostics: how it came about, in plain numbers and strings (it can be
      written as JSON); `select` lists the names.
    quality: floats [N] in [0, 1], high = good: the scores pooled over the
      steps, mapped so that a quality is about a keep probability and a higher
      pooled score has a higher quality. nan without a finite score, or if
      nothing has a vote; None in a selection made without.
  """

  ids: np.ndarray
  keep: np.ndarray
  keep_probability: np.ndarray
  votes: np.ndarray
  diagnostics: dict[str, Any]
  quality: np.ndarray | None = None

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

  def __len__(self) -> int:
    return len(self.ids)

  def __str__(self) -> str:
    about = self.diagnostics
    lines = [
      f"Selection: keeps {int(self.keep.sum()):,} of {len(self):,} samples"
      f" ({self.kept_fraction:.1%}), by {about['aggregate']} over"
      f" {self.votes.shape[1]} steps of {about['binarize']} votes."
    ]
    if about.get("population"):
      lines.append(f"  all steps: {about['population']}")
    if about["ties"]:
      lines.append(f"  {about['ties']:,} ties, kept")
    if about["unvoted"]:
      lines.append(f"  {about['unvoted']:,} samples without a vote, kept")
    if note := about["label_model"].get("note"):
      lines.append(f"  {about['aggregate']}: {note}")
    for step, note in zip(about["steps"], about["notes"], strict=True):
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
  ids: Any = None,
  seed: int = 0,
) -> Selection:
  """Decides from every sample's scores over the steps which to keep.

  Every step (column) is binarised by itself into keep and drop votes; a label
  model turns each sample's votes into a keep probability; a sample is dropped
  where that is below 1/2.

  | edge case                            | behaviour                          |
  |--------------------------------------|------------------------------------|
  | a score that is NaN or infinite      | abstains; in `abstentions`         |
  | "auto": scores pooled over the steps | every step votes the same for all; |
  | are one population                   | in `population`                    |
  | "auto": the label model goes against | the majority decides; in           |
  | most samples' pooled scores          | `label_model`'s `note`             |
  | "auto": a step is one population     | all keep, all drop or abstain;     |
  |                                      | in `notes`                         |
  | "auto": every step is one, and the   | the pooled scores vote in place of |
  | pooled scores are two                | each; in `notes`                   |
  | "gmm", "kmeans", "auto": all equal   | the step abstains; in `notes`      |
  | "gmm": nothing separates the two     | the step abstains; in `notes`      |
  | as many keep as drop, by majority    | kept, probability 1/2; in `ties`   |
  | no vote at all                       | kept, probability nan; in `unvoted`|
  | one step                             | its votes are the decision         |

  The names in `diagnostics`: `binarize`, `aggregate`, `threshold`, `fraction`,
  `seed`, `fit_size` (the most scores of a step that are fitted), `n_samples`,
  `n_steps`, `n_kept`, `ties`, `unvoted`, `abstentions` (votes not cast),
  `population` ("" unless the pooled scores are one), `fingerprints` (a
  ledger's);
  lists over the steps: `steps` (a ledger's epochs, else 0 ... T-1), `cuts`
  (None where there is none), `keep_shares` (keep votes among the votes; None
  where there are none), `coverages` (votes among the samples), `notes`,
  `fits`; and `label_model`, the label model's own.

  Args:
    scores: raw scores [N, T], high = good, or the ledger that holds them.
    binarize: "auto" (two groups where there are two; the recommended one),
      "gmm" (two Gaussians), "kmeans" (two clusters), "threshold" (score >
      threshold), "top_fraction" (the highest scores), or a function (finite
      scores [n], seed) -> Cut, such as `auto(mark=None)` for scores of which
      zero is no mark.
    aggregate: "label_model" (learns how good each step's votes are; the
      recommended one, which is "two_coin"), "majority", "one_coin", "triplet",
      or a function votes [N, T] -> KeepProbability.
    threshold: for "threshold", an absolute score; 0 when not given.
    fraction: for "top_fraction", the share to keep, in (0, 1].
    ids: the samples' ids [N], none twice; 0 ... N-1 when not given. A ledger
      brings its own.
    seed: for the fits.

  Returns:
    Selection(ids [N], keep [N], keep_probability [N], votes [N, T],
    diagnostics, quality [N]).

  Raises:
    TypeError: scores or ids of the wrong kind.
    ValueError: no samples, scores that aren't [N, T], ids that aren't N or
      repeat, an unknown name, a threshold or fraction out of range or without
      use.

  Example:
    >>> scores = [[0.9, 1.1], [-1.2, -0.8], [1.0, np.nan], [-0.7, 0.4]]
    >>> selection = select(scores, binarize="threshold")
    >>> selection.keep
    array([ True, False,  True,  True])
    >>> selection.keep_probability
    array([1. , 0. , 1. , 0.5])
    >>> print(selection)
    Selection: keeps 3 of 4 samples (75.0%), by label_model over 2 steps of
    threshold votes.
      1 ties, kept
      label_model: 2 voters: it takes three to tell how good each is; taken by
      majority

  References:
    Huang et al., arXiv 2501.06708, the offline stage.
  """
  binarizer = binarizers.make_binarizer(
    binarize, threshold=threshold, fraction=fraction
  )
  label_model = label_model_lib.make_label_model(aggregate)
  steps: Sequence[int]
  fingerprints: dict[str, str] = {}
  if isinstance(scores, ScoreLedger):
    if ids is not None:
      raise ValueError("ids is given, but a ledger brings its own; leave it.")
    steps, fingerprints = scores.epochs, scores.fingerprints
    ids, scores = scores.matrix("score")
  else:
    scores = _checked_scores(scores)
    steps = range(scores.shape[1])
    ids = _checked_ids(ids, len(scores))

  center = binarizer.mark if isinstance(binarizer, Auto) else 0.0
  pooled = pooling.pool(scores, center=center, seed=seed)
  overall = _cut_of_pooled(pooled, binarizer, seed)
  lone = overall.note if overall.fit.get("groups") == 1 else ""
  if lone:
    all_keep = bool(np.nanmin(pooled) > overall.value)
    binarizer = _alike(all_keep, overall)
  votes, cuts = binarize_lib.votes_of(scores, binarizer, seed=seed)
  if overall.fit.get("groups") == 2 and not _any_splits(votes):
    above = (pooled > overall.value)[:, None]
    votes = np.where(np.isfinite(scores), above, ABSTAIN).astype(np.int8)
    cuts = [Cut(math.nan, _POOLED, cut.fit) for cut in cuts]
    if isinstance(aggregate, str):
      label_model = _one_voter
  probability, label_diagnostics = label_model(votes)
  if isinstance(aggregate, str) and not lone and not math.isnan(overall.value):
    above = pooled > overall.value
    # A model of votes alone can't tell good from bad if most steps can't.
    if ((probability < 0.5) == above)[~np.isnan(pooled)].mean() > 0.5:
      probability, _ = label_model_lib.majority(votes)
      label_diagnostics = dict(label_diagnostics, note=_OVERRULED)
  keep = ~(probability < 0.5)  # so that nan, no vote, is kept
  n_votes = [int((column >= 0).sum()) for column in votes.T]
  n_keeps = [int((column == 1).sum()) for column in votes.T]
  diagnostics = {
    "binarize": _name(binarize),
    "aggregate": _name(aggregate),
    "threshold": threshold,
    "fraction": fraction,
    "seed": seed,
    "fit_size": binarize_lib.FIT_SIZE,
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
    "population": lone,
    "fingerprints": fingerprints,
    "notes": [cut.note for cut in cuts],
    "fits": [dict(cut.fit) for cut in cuts],
    "label_model": label_diagnostics,
  }
  quality = pooling.quality_of(pooled, probability)
  return Selection(ids, keep, probability, votes, diagnostics, quality)


def _cut_of_pooled(
  pooled: np.ndarray, binarizer: binarize_lib.Binarizer, seed: int
) -> Cut:
  """Where "auto" cuts the pooled scores; a cut at nan if it has no say.

  Steps on their own may take what is one population for two, the first ones
  above all, when the learner knows nothing; and label models only see votes.
  """
  seen = pooled[~np.isnan(pooled)]
  if not isinstance(binarizer, Auto) or len(seen) < MIN_SCORES:
    return Cut(math.nan)
  # Pooled scores are relative to the mark.
  cut = Auto(None if binarizer.mark is None else 0.0)(seen, seed)
  return Cut(math.nan) if math.isnan(cut.value) else cut


def _any_splits(votes: np.ndarray) -> bool:
  """Whether a step keeps some samples and drops others."""
  return any((c == KEEP).any() and (c == DROP).any() for c in votes.T)


def _one_voter(votes: np.ndarray) -> label_model_lib.KeepProbability:
  """The majority, with the reason why."""
  probability, _ = label_model_lib.majority(votes)
  note = "the pooled scores are one voter; taken by majority"
  return label_model_lib.KeepProbability(probability, {"note": note})


def _alike(keep: bool, overall: Cut) -> binarize_lib.Binarizer:
  """The binariser that votes the same for all."""

  def cut(scores: np.ndarray, seed: int) -> Cut:
    low, high = float(scores.min()), float(scores.max())
    value = float(np.nextafter(low, -math.inf)) if keep else high
    return Cut(value, overall.note, overall.fit)

  return cut


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
      f"ids repeat: {values[worst]!r} came {counts[worst]} times. Give one row"
      " of scores a sample."
    )
  return array
