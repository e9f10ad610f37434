"""One call, one answer: wrong labels, likely members, the best samples.

Every function takes scores [N, T], a data frame of them, a ledger, or a
selection that was made.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from gradmimic_jax import _frames, _tables, metrics
from gradmimic_jax.selection import _ids, uids
from gradmimic_jax.selection.quality import checked_labels, worst_first
from gradmimic_jax.selection.selection import Selection, select

if TYPE_CHECKING:
  import pandas as pd

RANKINGS = ("quality", "keep_probability")


class Membership(NamedTuple):
  """The samples that a reference was likely trained on."""

  ids: np.ndarray  # the likely members', best first
  mask: np.ndarray  # booleans [N], in the order of the scores
  jaccard: float  # with the true members; nan if they aren't known
  auroc: float  # of the quality, likewise

  def to_arrow(self) -> pa.Table:
    """A row a likely member, the best first, with its id."""
    return pa.table({"id": uids.to_arrow(self.ids, "ids")})

  def to_pandas(self) -> pd.DataFrame:
    """A row a likely member, as a pandas DataFrame."""
    return _tables.to_pandas(self.to_arrow())

  def _repr_html_(self) -> str:
    return _tables.html(self, self.to_arrow())

  def __repr__(self) -> str:
    return f"<Membership: {self}>"

  def __str__(self) -> str:
    text = f"{len(self.ids):,} of {len(self.mask):,} samples are likely members"
    if not np.isnan(self.jaccard):
      text += f" (Jaccard {self.jaccard:.3f}, AUROC {self.auroc:.3f})"
    return text


def find_label_issues(
  scores: Any,
  labels: Any = None,
  *,
  return_indices_ranked_by: str | None = None,
  frac_noise: float = 1.0,
  min_examples_per_class: int = 1,
  **options: Any,
) -> np.ndarray:
  """Finds the samples that are likely mislabelled.

  Args:
    scores: raw scores [N, T], high = good, the ledger that holds them, a data
      frame, or a Selection. A ledger's samples are those of `matrix`, in order
      of id.
    labels: the given labels [N], or the name of a frame's column; only for
      `min_examples_per_class`.
    return_indices_ranked_by: None for a mask; "quality" or "keep_probability"
      for the issues' indices, the worst first.
    frac_noise: return only this share of the issues, the worst.
    min_examples_per_class: leave each class so many samples, if it has them:
      the best of its issues are no issues then. Without labels, of no effect.
    **options: for `select`.

  Returns:
    Booleans [N], True where there is an issue; or the issues' indices.

  Raises:
    TypeError, ValueError: another ranking, a share outside (0, 1], a negative
      number of samples, labels that aren't [N]; what `select` raises.

  Example:
    >>> scores = [[0.9, 1.1], [-1.2, -0.8], [1.0, np.nan], [-2.0, -3.0]]
    >>> find_label_issues(scores, mark=0.0)
    array([False,  True, False,  True])
    >>> find_label_issues(scores, mark=0.0, return_indices_ranked_by="quality")
    array([3, 1])
  """
  ranking = return_indices_ranked_by
  if ranking is not None and ranking not in RANKINGS:
    raise ValueError(
      f"return_indices_ranked_by is {ranking!r}; expected None for a mask, or"
      f" one of {RANKINGS}."
    )
  if not 0 < frac_noise <= 1:
    raise ValueError(f"frac_noise is {frac_noise}; expected 0 < share <= 1.")
  least = operator.index(min_examples_per_class)
  if least < 0:
    raise ValueError(f"min_examples_per_class is {least}; expected >= 0.")
  scores, labels, options = _with_labels(scores, labels, options)
  selection = as_selection(scores, options)
  worst = worst_first(selection)
  if ranking == "quality" and selection.quality is not None:
    worst = worst[np.argsort(selection.quality[worst], kind="stable")]
  issues = worst[~selection.keep[worst]]
  if labels is not None:
    labels = checked_labels(labels, len(selection))
    issues = _leave_some(issues, labels, selection.keep, least)
  issues = issues[: int(np.ceil(frac_noise * len(issues)))]
  if ranking is not None:
    return issues
  mask = np.zeros(len(selection), bool)
  mask[issues] = True
  return mask


def label_quality_scores(scores: Any, **options: Any) -> np.ndarray:
  """Every sample's label quality, in [0, 1], high = good.

  It is the keep probability, but for a thousandth that ranks: of the samples
  with a quality about .7 some 70 % should be clean, as far as the scores can
  tell.

  Args:
    scores: raw scores [N, T], high = good, the ledger that holds them, a data
      frame, or a Selection.
    **options: for `select`.

  Returns:
    float64 [N]; nan where a sample has no finite score.

  Example:
    >>> scores = [[0.9, 1.1], [-1.2, -0.8], [1.0, np.nan]]
    >>> label_quality_scores(scores, mark=0.0).round(2)
    array([0.75, 0.25, 0.67])
  """
  quality = as_selection(scores, options).quality
  if quality is None:
    raise ValueError("the selection has no quality; make it with select.")
  return quality


def discover_members(
  scores: Any,
  *,
  members: Any = None,
  count: int | None = None,
  **options: Any,
) -> Membership:
  """Finds the samples that the reference was likely trained on.

  A reference pulls toward the samples it was fitted to; they score high.

  Args:
    scores: raw scores [N, T], high = good, the ledger that holds them, a data
      frame, or a Selection.
    members: ids of the true members, where they are known, to compare with.
    count: the number of members; that of the samples kept if not given.
    **options: for `select`.

  Returns:
    Membership(ids, mask, jaccard, auroc).

  Raises:
    ValueError: members that aren't among the samples, or repeat; a count
      outside 1 ... N; no sample has a quality.

  Example:
    >>> scores = [[3.0], [2.0], [-1.0]]
    >>> found = discover_members(scores, mark=0.0, members=[0])
    >>> found.ids, found.jaccard, found.auroc
    (array([0, 1]), 0.5, 1.0)

  References:
    Huang et al., arXiv 2501.06708, on which samples a model was trained.
  """
  selection = as_selection(scores, options)
  quality = _known_quality(selection)
  if count is None:
    likely = np.flatnonzero(selection.keep & (quality >= 0))
    likely = likely[np.argsort(-quality[likely], kind="stable")]
  else:
    likely = _best(quality)[: _checked_count("count", count, len(selection))]
  mask = np.zeros(len(selection), bool)
  mask[likely] = True
  jaccard = auroc = float("nan")
  if members is not None:
    true = _ids.checked(members, "members")
    ids = selection.ids
    is_member = _ids.contains(_ids.unique(true), ids)
    if int(is_member.sum()) < len(true):
      raise ValueError(
        f"members has {len(true)} ids, of which {int(is_member.sum())} are"
        " among the samples; expected all of them, each once."
      )
    either = int((mask | is_member).sum())
    jaccard = int((mask & is_member).sum()) / either if either else jaccard
    auroc = metrics.auroc(quality, is_member)
  return Membership(selection.ids[likely], mask, jaccard, auroc)


def subset(
  scores: Any,
  budget: float,
  *,
  labels: Any = None,
  class_balanced: bool = False,
  **options: Any,
) -> np.ndarray:
  """The ids of the best samples that a budget allows.

  Class-balanced, every class gets the same number of its best samples; what a
  class is short of goes to the others.

  Args:
    scores: raw scores [N, T], high = good, the ledger that holds them, a data
      frame, or a Selection.
    budget: the number of samples, an integer from 1 to N; or their share, a
      float in (0, 1].
    labels: the given labels [N], or the name of a frame's column, for
      class_balanced.
    class_balanced: whether classes count alike.
    **options: for `select`.

  Returns:
    Ids [budget], the best first (class-balanced: every class's best first).

  Raises:
    TypeError, ValueError: a budget out of range, labels missing or without use.

  Example:
    >>> scores = [[3.0], [2.0], [1.0], [-1.0]]
    >>> subset(scores, 2, mark=0.0)
    array([0, 1])
    >>> balanced = {"labels": [0, 0, 0, 1], "class_balanced": True}
    >>> subset(scores, 0.5, mark=0.0, **balanced)
    array([0, 3])
  """
  if class_balanced and labels is None:
    raise ValueError("class_balanced needs labels [N], one a sample.")
  if labels is not None and not class_balanced:
    raise ValueError("labels have no effect without class_balanced=True.")
  scores, labels, options = _with_labels(scores, labels, options)
  selection = as_selection(scores, options)
  n = len(selection)
  if isinstance(budget, (float, np.floating)):
    if not 0 < budget <= 1:
      raise ValueError(
        f"budget is {budget}; expected a share in (0, 1] or an integer."
      )
    budget = max(1, round(budget * n))
  budget = _checked_count("budget", budget, n)
  best = _best(_known_quality(selection))
  if class_balanced:
    groups = checked_labels(labels, n)[best]
    # The first of every class, then the second of every class, and so on.
    best = best[np.argsort(_place_in_group(groups), kind="stable")]
  return selection.ids[best[:budget]]


def as_selection(scores: Any, options: dict[str, Any]) -> Selection:
  """Returns the selection given, or makes one by `select` with the options."""
  if not isinstance(scores, Selection):
    return select(scores, **options)
  if options:
    raise TypeError(
      f"{sorted(options)} are options of select, but scores is a Selection"
      " already. Leave them out, or give the scores."
    )
  return scores


def _with_labels(
  scores: Any, labels: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
  """Takes the labels that are named out of a frame of scores."""
  if not isinstance(labels, str):
    return scores, labels, options
  if not _frames.is_frame(scores):
    raise TypeError(
      f"labels is {labels!r}, the name of a column, but scores is no data"
      " frame; expected labels [N]."
    )
  found = _frames.read_scores(
    scores, "scores", ids=options.get("ids"), without=[labels]
  )
  column = _frames.column(_frames.to_table(scores, "scores"), labels, "scores")
  return found.values, column, {**options, "ids": found.ids}


def _known_quality(selection: Selection) -> np.ndarray:
  """Returns the quality, with -1, below all others, where there is none."""
  quality = selection.quality
  if quality is None or np.isnan(quality).all():
    raise ValueError(
      "no sample has a quality: no step has a vote. "
      + "; ".join(sorted(set(selection.diagnostics.get("notes", []))))
    )
  return np.nan_to_num(quality, nan=-1.0)


def _best(quality: np.ndarray) -> np.ndarray:
  return np.argsort(-quality, kind="stable")


def _checked_count(name: str, value: Any, n: int) -> int:
  count = operator.index(value)
  if not 1 <= count <= n:
    raise ValueError(f"{name} is {count}; expected 1 to {n}, the samples.")
  return count


def _leave_some(
  issues: np.ndarray, labels: np.ndarray, keep: np.ndarray, least: int
) -> np.ndarray:
  """Takes a class's best issues back until it is left with `least` samples."""
  classes, place = np.unique(labels, return_inverse=True)
  kept = np.bincount(place[keep], minlength=len(classes))
  missing = np.maximum(least - kept, 0)
  groups = place[issues]
  from_best = _place_in_group(groups[::-1])[::-1]
  return issues[from_best >= missing[groups]]


def _place_in_group(groups: np.ndarray) -> np.ndarray:
  """Counts for each item the items of its group that come before it."""
  order = np.argsort(groups, kind="stable")
  ordered = groups[order]
  starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
  sizes = np.diff(np.r_[starts, len(groups)])
  place = np.empty(len(groups), np.int64)
  place[order] = np.arange(len(groups)) - np.repeat(starts, sizes)
  return place
