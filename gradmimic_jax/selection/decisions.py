"""What a person decided on a report's page, read back from its CSV file."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import pyarrow as pa

from gradmimic_jax import _files
from gradmimic_jax.selection import _columns, _csv, _ids
from gradmimic_jax.selection.selection import Selection

_COLUMNS = ("id", "decision")
_WORDS = ("keep", "remove", "relabel")
_BY = ("person", "selection")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Decisions:
  """Decisions on samples, by a person or by the selection that was shown.

  Attributes:
    ids: of the samples decided on [n], none twice.
    decision: "keep", "remove" or "relabel" [n]; a relabelled sample is kept,
      with another label.
    labels: the new labels as text [n], "" where there is none.
    by_person: booleans [n]; the rest are the selection's own removals.
    whole: True if every sample that is not listed is kept, as in the file of a
      page that lists all removals. Otherwise these are changes to a selection,
      and mean nothing without it.
    unsure: True if integer ids may have been text before another program
      saved the file.
    source: the file that they come from.
  """

  ids: np.ndarray
  decision: np.ndarray
  labels: np.ndarray
  by_person: np.ndarray
  whole: bool
  unsure: bool = False
  source: str = "decisions"

  @property
  def keep(self) -> np.ndarray:
    """Booleans [n]: kept, with its own label or a new one."""
    return self.decision != "remove"

  @property
  def relabelled(self) -> np.ndarray:
    """Booleans [n]: kept with a new label."""
    return self.decision == "relabel"

  def __len__(self) -> int:
    return len(self.ids)

  def __repr__(self) -> str:
    counts = ", ".join(
      f"{int((self.decision == word).sum()):,} {word}" for word in _WORDS
    )
    by = int(self.by_person.sum())
    return f"<Decisions {self.source!r}: {counts}; {by:,} by a person>"

  def apply(self, selection: Selection) -> Selection:
    """Changes a selection: a person's word goes before the scores'.

    Args:
      selection: whose page the decisions were made on.

    Returns:
      A Selection with another `keep`; probabilities and votes stay.
      `diagnostics["decisions"]` counts what changed.

    Raises:
      ValueError: ids that the selection doesn't have.
    """
    rows = self._rows(selection.ids, "the selection")
    keep = selection.keep.copy()
    keep[rows] = self.keep
    about = {
      "source": self.source,
      "to_keep": int((keep & ~selection.keep).sum()),
      "to_remove": int((~keep & selection.keep).sum()),
      "relabelled": int(self.relabelled.sum()),
    }
    diagnostics = selection.diagnostics | {
      "n_kept": int(keep.sum()),
      "decisions": about,
    }
    return dataclasses.replace(selection, keep=keep, diagnostics=diagnostics)

  def relabel(
    self, ids: Any, labels: Any, *, class_names: Any = None
  ) -> np.ndarray:
    """Puts the new labels in the place of the given ones.

    Args:
      ids: of the samples [N].
      labels: as given [N], integers or strings.
      class_names: of integer labels, for files that hold names.

    Returns:
      Labels [N], a copy.

    Raises:
      ValueError: ids that aren't there, a label that is no class.
    """
    ids, labels = _ids.checked(ids, "ids"), _ids.plain(labels, "labels")
    if labels.shape != ids.shape:
      raise ValueError(
        f"labels has shape {labels.shape}, ids {ids.shape}; expected [N]."
      )
    rows = self._rows(ids, "ids")[self.relabelled]
    new: Any = self.labels[self.relabelled]
    if labels.dtype.kind in "iu":
      new = [self._integer(text, class_names) for text in new.tolist()]
      new = np.array(new, labels.dtype)
    dtype = np.result_type(labels.dtype, new.dtype) if len(new) else None
    labels = labels.astype(dtype or labels.dtype)  # long names fit in
    labels[rows] = new
    return labels

  def _integer(self, text: str, class_names: Any) -> int:
    names = [] if class_names is None else [str(name) for name in class_names]
    if text.isascii() and text.isdigit():
      label = int(text)
      if class_names is None or label < len(names):
        return label
    if names.count(text) == 1:
      return names.index(text)
    raise ValueError(
      f"{self.source} has the label {text!r}; expected an integer label, or"
      " the name of one class in class_names."
    )

  def mask(self, pool: np.ndarray) -> np.ndarray:
    """Finds what is left of a pool; `filters.of_decisions` makes a filter.

    Args:
      pool: the ids of all samples there are to choose from [N].

    Returns:
      Booleans [N]: False for what is removed, or has another label now.

    Raises:
      ValueError: changes to a selection, which say nothing of other samples;
        ids of another kind, or that the pool lacks.
    """
    if not self.whole:
      raise ValueError(
        f"{self.source} lists changes to a selection, not all that is removed"
        " (it has no column 'by'). Apply it to the selection first:"
        " read_decisions(path).apply(selection)."
      )
    left = np.ones(len(pool), bool)
    left[self._rows(pool, "the pool")] = self.keep & ~self.relabelled
    return left

  def _rows(self, ids: np.ndarray, name: str) -> np.ndarray:
    """Finds where in ids the decisions' samples are."""
    if not len(self):
      return np.zeros(0, np.int64)
    if not _ids.same_kind(ids, self.ids):
      raise ValueError(
        f"{self.source} has ids of dtype {self.ids.dtype} and {name} of"
        f" {ids.dtype}; they name samples in different ways. Use one kind."
      )
    rows, missing = _ids.find(ids, self.ids)
    if len(missing):
      raise ValueError(
        f"{len(missing)} of the {len(self)} ids in {self.source} are not in"
        f" {name}, which has {len(ids)}; the first is {missing[0].item()!r}."
        " Use the decisions that were made on this data's page."
      )
    return rows


def holds_decisions(path: str | os.PathLike[str]) -> bool:
  """True if a CSV file begins as one of decisions does; OSError if none is."""
  content = _files.read_bytes(path)
  try:
    return tuple(_csv.first_records(content)[0][:2]) == _COLUMNS
  except ValueError:
    return False


def read_decisions(path: str | os.PathLike[str]) -> Decisions:
  r"""Reads the decisions that a report's page lets download.

  Columns: id, decision (keep, remove or relabel), label (the new one), by
  (person or selection). A list of one's own needs no more than id and
  decision; without `by` it is a list of changes to a selection.

  Args:
    path: of the CSV file.

  Returns:
    The Decisions.

  Raises:
    OSError: there is no such file, or the system refuses.
    ValueError: another table, an unknown decision, a label that is missing,
      two rows of an id.

  Example:
    >>> import pathlib, tempfile
    >>> from gradmimic_jax.selection import select
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "decisions.csv"
    >>> _ = path.write_text("id,decision\n2,remove\n1,keep\n")
    >>> decisions = read_decisions(path)
    >>> selection = select([[1.0], [-1.0], [2.0]], binarize="threshold")
    >>> decisions.apply(selection).kept_ids
    array([0, 1])
  """
  content = _files.read_bytes(path)
  with _files.named(path, "table of decisions"):
    return parse_decisions(content, source=os.fspath(path))


def parse_decisions(
  content: bytes | bytearray, *, source: str = "decisions"
) -> Decisions:
  """Parses the bytes of a file of decisions; see `read_decisions`."""
  names, first = _csv.first_records(content)
  if tuple(names[:2]) != _COLUMNS or len(set(names)) < len(names):
    raise ValueError(
      f"it has columns {names}; expected id, decision, and perhaps label and by"
    )
  whole = "by" in names
  if not first:
    none = np.zeros(0, np.str_)
    no_ids = np.zeros(0, np.int64)
    return Decisions(no_ids, none, none, no_ids > 0, whole, source=source)
  table = _csv.read_text(content, names)
  # Where all cells have quotes, those of ids say nothing.
  bare = not first[1].startswith(b'"')
  quoted = bare and first[0].startswith(b'"')
  text = _columns.whole(table["id"])
  ids = _columns.checked_ids(_csv.restored_ids(text, quoted, None))
  ids = _ids.checked(ids, "id")
  decision = _words(table["decision"], "decision", _WORDS)
  labels = np.full(len(ids), "")
  if "label" in names:
    column = _columns.whole(table["label"])
    labels = _columns.strings(_csv.restored_column(column), "label")
  without = (decision == "relabel") & (labels == "")
  if without.any():
    raise ValueError(
      f"row {int(without.argmax()) + 1} relabels a sample without a label"
    )
  by = np.full(len(ids), "person")
  if whole:
    by = _words(table["by"], "by", _BY)
  # A page puts the names in quotes, and of the cells only those with text.
  as_written = bare and content.startswith(b'"id"')
  unsure = ids.dtype.kind in "iu" and not as_written
  return Decisions(ids, decision, labels, by == "person", whole, unsure, source)


def _words(column: pa.ChunkedArray, name: str, known: tuple[str, ...]):
  values = np.strings.strip(
    np.strings.lower(_columns.strings(_columns.whole(column), name))
  )
  wrong = ~np.isin(values, known)
  if wrong.any():
    row = int(wrong.argmax())
    raise ValueError(
      f"row {row + 1} has the {name} {values[row].item()!r:.80}; expected"
      f" {', '.join(known)}"
    )
  return values
