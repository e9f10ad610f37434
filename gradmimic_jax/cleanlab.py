"""Mimic scores in cleanlab's Datalab, as an issue type of its own.

This module needs `pip install gradmimic_jax[cleanlab]`; no other imports it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import (
  _ids,
  class_table,
  dataset_quality,
  removal_curve,
)
from gradmimic_jax.selection.issues import as_selection
from gradmimic_jax.selection.selection import Selection

# No other issue type's name may be in it: Datalab finds columns by that.
ISSUE_NAME = "grad_mimic"


def register(*, task: str = "classification") -> type:
  """Makes "grad_mimic" an issue type that a Datalab looks for when asked.

  `lab.get_issues("grad_mimic")` then has, a row a sample of the lab's data,

    is_grad_mimic_issue          the selection drops it
    grad_mimic_score             its label quality, in [0, 1], high = good
    grad_mimic_keep_probability  of the selection

  The issue's score in `lab.get_issue_summary` is the estimated clean fraction
  (nan if no sample has a vote). `lab.get_info("grad_mimic")` has its interval
  (`low`, `high`), how many samples to `remove`, `unvoted` samples, the
  selection's diagnostics (`select`) and, if the lab has labels, what
  `gm.class_table` finds (`classes`).

  A lab is given the `scores` in `issue_types`: raw scores [N, T] in the order
  of its data, high = good; or a ledger or a Selection, whose ids are either the
  lab's rows or among `ids`, the ids of all of its rows in order. Other entries
  are options of `gm.select`. Samples that a ledger lacks are no issues, and
  their score is nan.

  The issue type is registered once, however often this is called.

  Args:
    task: the lab's: "classification", "regression" or "multilabel".

  Returns:
    The IssueManager. Its errors (scores of other samples, say) are printed by
    a Datalab, which goes on to the next issue type.

  Raises:
    ModuleNotFoundError: cleanlab is not installed.
    ValueError: cleanlab knows no such task.

  Example: ::

    gradmimic_jax.cleanlab.register()
    lab = cleanlab.Datalab(data={"label": labels}, label_name="label")
    lab.find_issues(issue_types={"grad_mimic": {"scores": scores}})
    lab.report()

  References:
    https://docs.cleanlab.ai, "Creating your own issues manager".
  """
  try:
    import pandas as pd
    from cleanlab.datalab.internal import issue_manager_factory as factory
    from cleanlab.datalab.internal.issue_manager import IssueManager
    from cleanlab.datalab.internal.task import Task
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"there is no module {error.name!r}; a Datalab needs cleanlab:"
      " pip install 'gradmimic_jax[cleanlab]'"
    ) from error

  class MimicIssueManager(IssueManager):
    """Finds samples that would take a model away from a better one."""

    issue_name = ISSUE_NAME
    description = (
      "A step on these samples would take the model away from a better one:"
      " their labels are probably wrong."
    )
    # A report's entries besides the worst samples, by its verbosity.
    verbosity_levels = {  # noqa: RUF012 - declared so by its class
      0: [],
      1: ["low", "high", "remove"],
      2: ["classes"],
      3: [],
    }

    def find_issues(
      self, *, scores: Any, ids: Any = None, **options: Any
    ) -> None:
      is_array = not isinstance(scores, (ScoreLedger, Selection))
      if is_array and ids is not None:
        options["ids"] = ids
      n = len(self.datalab.data)
      selection = as_selection(scores, options)
      if not is_array:
        selection = _in_rows(selection, ids, n)
      elif len(selection) != n:
        raise ValueError(
          f"scores has {len(selection)} rows, but the lab's data {n}; expected"
          " a row a sample, in the order of the data."
        )
      self.issues = pd.DataFrame(
        {
          f"is_{ISSUE_NAME}_issue": ~selection.keep,
          f"{ISSUE_NAME}_score": selection.quality,
          f"{ISSUE_NAME}_keep_probability": selection.keep_probability,
        }
      )
      found = dataset_quality(selection)
      self.summary = self.make_summary(score=1.0).assign(
        score=found.clean_fraction  # which may be nan
      )
      self.info = {
        "low": found.low,
        "high": found.high,
        "remove": removal_curve(selection).recommended,
        "unvoted": found.unvoted,
        "select": selection.diagnostics,
      }
      if self.datalab.has_labels and task == "classification":
        self.info["classes"] = class_table(
          selection, self.datalab.labels, names=self.datalab.class_names
        ).to_pandas()

  known = factory.REGISTRY[Task.from_str(task)].get(ISSUE_NAME)
  return known or factory.register(MimicIssueManager, task=task)


def _in_rows(selection: Selection, ids: Any, n: int) -> Selection:
  """Spreads the selection over all n samples of a lab, a row each, in order."""
  rows = selection.ids
  if ids is not None:
    rows = _places(rows, ids, n)
  elif rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n:
    raise ValueError(
      f"the ids end with {np.sort(rows)[-1].item()!r}, and the lab's data has"
      f" {n} rows; expected the rows 0 to {n - 1} as ids, or the ids of all"
      " rows as `ids`. An array of scores needs none: a row a sample, in the"
      " order of the data."
    )

  def spread(values: Any, empty: Any) -> np.ndarray:
    whole = np.full((n, *values.shape[1:]), empty, values.dtype)
    whole[rows] = values
    return whole

  quality = selection.quality
  if quality is None:
    quality = np.full(len(rows), np.nan)
  keep = _ids.mask(selection.keep, len(rows), "the selection's keep")
  return Selection(
    np.arange(n),
    spread(keep, True),
    spread(selection.keep_probability, np.nan),
    spread(selection.votes, -1),
    selection.diagnostics,
    spread(quality, np.nan),
  )


def _places(wanted: np.ndarray, ids: Any, n: int) -> np.ndarray:
  """Finds the places of the wanted ids among those of a lab's n rows."""
  ids = _ids.checked(ids, "ids")
  by = _ids.order(ids)
  if ids.shape != (n,) or not _ids.is_ascending(ids[by], strictly=True):
    raise ValueError(
      f"ids has {len(ids)} values, {len(_ids.unique(ids))} of them distinct,"
      f" and the lab's data has {n} rows; expected the id of every row."
    )
  rows, missing = by, wanted
  if _ids.same_kind(ids, wanted):
    rows, missing = _ids.find(ids, wanted, by)
  if len(missing):
    raise ValueError(
      f"{len(missing)} of {len(wanted)} samples are not among ids, the first is"
      f" {missing[0].item()!r}; expected the ids of the lab's rows, integers or"
      " strings as the ledger has them."
    )
  return rows
