"""Data frames: which of their columns are scores, and whose they are.

pandas, polars, Arrow and whatever else has Arrow's C stream interface, none of
which but Arrow is imported. Ids and labels are never read as scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

# Columns with these names hold no scores, whatever their type.
_IDS = frozenset(
  (
    *("id", "ids", "idx", "index", "key", "keys", "level_0", "name"),
    *("position", "row", "sample", "uid", "uids", "uuid"),
  )
)
_LABELS = frozenset(("class", "label", "labels", "target", "y"))
_BEGINNINGS, _ID_ENDS, _LABEL_ENDS = (
  ("unnamed:", "__index"),
  ("_id", "_index"),
  ("_label",),
)
# What a frame may have about samples, and what its columns may be called.
_FACTS = {
  "ids": ("ids", "id"),
  "labels": ("labels", "label"),
  "suggested": ("suggested", "suggested_label"),
  "true_labels": ("true_labels", "true_label"),
  "captions": ("captions", "caption"),
}
_MANY = 20  # rows from which numbers that count up are no chance


class Scores(NamedTuple):
  """The scores in a frame."""

  values: np.ndarray  # floats [N, T]; nan where null
  ids: Any  # [N], of a column or the index; None: it has none of its own
  columns: list[str]  # [T], the names


def is_frame(value: Any) -> bool:
  """True for a table with named columns, by pandas, polars, Arrow or others."""
  kind = type(value)
  if kind.__module__ == "numpy" or kind in (list, tuple, dict):
    return False
  return (
    isinstance(value, (pa.Table, pa.RecordBatch))
    or hasattr(kind, "__dataframe__")
    or (
      hasattr(kind, "columns")
      and (hasattr(kind, "dtypes") or hasattr(kind, "__arrow_c_stream__"))
    )
  )


def to_table(frame: Any, name: str) -> pa.Table:
  """Converts a frame's columns to Arrow, without an index that it may have.

  Args:
    frame: anything that `is_frame`.
    name: its name in errors.

  Returns:
    The table; columns are views of the frame's where they can be.

  Raises:
    TypeError: a frame of a kind that can't be looked into.

  Example:
    >>> to_table(pa.RecordBatch.from_pydict({"a": [1]}), "scores").column_names
    ['a']
  """
  try:
    if isinstance(frame, pa.Table):
      return frame
    if isinstance(frame, pa.RecordBatch):
      return pa.Table.from_batches([frame])
    if hasattr(frame, "iloc"):  # pandas, also of before the interface
      return pa.Table.from_pandas(frame, preserve_index=False)
    return pa.table(frame)
  except Exception as error:  # of whatever library
    reason = " ".join(str(error).split())
    raise TypeError(
      f"{name} is a {_kind(frame)} that can't be looked into ({reason:.200});"
      " expected pandas, polars, Arrow or another frame with Arrow's"
      " __arrow_c_stream__."
    ) from error


def read_scores(
  frame: Any,
  name: str,
  *,
  ids: Any = None,
  columns: Sequence[str] | None = None,
  without: Sequence[str] = (),
) -> Scores:
  """Reads the scores in a frame: a row a sample, a column a step.

  Every column has to be scores, but for the one that `ids` names. NumPy alone
  would make one array of a frame, of its ids and labels, too.

  Args:
    frame: anything that `is_frame`.
    name: its name in errors.
    ids: the name of the column with the samples' ids; or the ids; None: those
      of an index that isn't just 0 to N - 1, if the frame has one.
    columns: the names of those with scores; None: all others.
    without: names of columns that are no scores.

  Returns:
    Scores(values [N, T], ids, columns [T]).

  Raises:
    TypeError: a column that isn't float, has a name such as "id", or counts up;
      an index whose values are neither integers nor strings; a frame of a kind
      that can't be looked into.
    ValueError: no such column, or none is left.

  Example:
    >>> table = pa.table({"id": ["a", "b"], "step_0": [0.1, -0.2]})
    >>> read_scores(table, "scores", ids="id").values
    array([[ 0.1],
           [-0.2]])
    >>> read_scores(table, "scores")
    Traceback (most recent call last):
    TypeError: scores is a pyarrow.lib.Table whose column 'id' (string) is none
    of scores. If it holds the samples' ids, say so: ids='id'; else leave it
    out.
  """
  table = to_table(frame, name)
  if isinstance(ids, str):
    without, ids = [ids, *without], column(table, ids, name)
  elif ids is None:
    ids = _index(frame, name)
  for one in without:
    column(table, one, name)
  if columns is None:
    columns = [one for one in table.column_names if one not in without]
  if not columns:
    raise ValueError(
      f"{name} is a {_kind(frame)} with the columns {table.column_names};"
      " expected columns of scores besides, one a step."
    )
  for one in columns:
    column(table, one, name)
    if what := _other_than_scores(one, table[one]):
      raise TypeError(
        f"{name} is a {_kind(frame)} whose column {one!r}"
        f" ({table[one].type}) {what}"
      )
  values = np.stack(
    [table[one].to_numpy(zero_copy_only=False) for one in columns], axis=1
  )
  return Scores(values, ids, list(columns))


def read_rows(frame: Any) -> dict[str, Any]:
  """Reads the rows of one step for a ledger.

  Args:
    frame: anything that `is_frame`, with the columns id (or an index of ids),
      score and, where there are any, weight and loss.

  Returns:
    The columns by name: id and score, weight and loss or None.

  Raises:
    TypeError: a frame of a kind that can't be looked into.
    ValueError: a column is missing, or there are others.

  Example:
    >>> read_rows(pa.table({"id": [7], "score": [0.5]}))
    {'id': array([7]), 'score': array([0.5]), 'weight': None, 'loss': None}
  """
  table = to_table(frame, "ids")
  names = ("id", "score", "weight", "loss")
  index = None if "id" in table.column_names else _index(frame, "ids")
  others = [one for one in table.column_names if one not in names]
  if others or "score" not in table.column_names:
    raise ValueError(
      f"ids is a {_kind(frame)} with the columns {table.column_names[:20]};"
      " expected id, score and, where there are any, weight and loss."
    )
  found: dict[str, Any] = {
    name: column(table, name, "ids") if name in table.column_names else None
    for name in names
  }
  if found["id"] is None:
    if index is None:
      raise ValueError(
        f"ids is a {_kind(frame)} with neither a column id nor an index of"
        " ids; expected the ids of its rows."
      )
    found["id"] = index
  return found


def read_facts(
  frame: Any, name: str, columns: Mapping[str, str]
) -> dict[str, Any]:
  """Reads what a frame has about samples besides their scores.

  Args:
    frame: anything that `is_frame`.
    name: its name in errors.
    columns: the names of columns, by the keys of the result; where a key has
      none, the column is called as the key, or nearly so ("label").

  Returns:
    Columns by some of "ids" (or the index), "labels", "suggested",
    "true_labels" and "captions"; other columns are left out.

  Raises:
    TypeError: a frame of a kind that can't be looked into.
    ValueError: a named column that is not there, or there is none to read.

  Example:
    >>> frame = pa.table({"id": ["a"], "label": [3], "step_0": [0.5]})
    >>> read_facts(frame, "dataset", {})
    {'ids': array(['a'], dtype=object), 'labels': array([3])}
  """
  if hasattr(frame, "iloc"):  # what else is in it, such as images, may be odd
    wanted = {*columns.values(), *itertools.chain(*_FACTS.values())}
    there = [one for one in frame.columns if one in wanted]
    table, known = to_table(frame[there], name), list(frame.columns)
  else:
    table = to_table(frame, name)
    known = table.column_names
  found: dict[str, Any] = {}
  for key, names in _FACTS.items():
    there = [one for one in names if one in table.column_names]
    if key in columns or there:
      found[key] = column(table, columns.get(key) or there[0], name)
  if "ids" not in found and (index := _index(frame, name)) is not None:
    found["ids"] = index
  if not found.keys() - {"ids"}:
    raise ValueError(
      f"{name} is a {_kind(frame)} with the columns {known[:20]}; expected some"
      f" of {', '.join(list(_FACTS)[1:])}, or their names, such"
      " as columns={'labels': 'given'}."
    )
  return found


def column(table: pa.Table, wanted: str, name: str) -> np.ndarray:
  """Returns a column's values; ValueError if the table has none, or two."""
  count = table.column_names.count(wanted)
  if count != 1:
    raise ValueError(
      f"{name} has {count or 'no'} column{'s' * (count > 1)} {wanted!r}; its"
      f" columns are {table.column_names[:20]}."
    )
  found = table[wanted]
  if pa.types.is_dictionary(found.type):
    found = found.cast(found.type.value_type)
  return found.to_numpy(zero_copy_only=False)


def is_id_name(name: str) -> bool:
  """True for the name of a column of ids, such as "uid" or "image_id"."""
  word = name.strip().lower()
  return word in _IDS or word.startswith(_BEGINNINGS) or word.endswith(_ID_ENDS)


def is_label_name(name: str) -> bool:
  """True for the name of a column of labels, such as "target"."""
  word = name.strip().lower()
  return word in _LABELS or word.endswith(_LABEL_ENDS)


def is_like_ids(name: str, values: pa.ChunkedArray) -> bool:
  """True for a column whose name or whose numbers are those of ids."""
  if is_id_name(name):
    return True
  if pa.types.is_integer(values.type):
    return not values.null_count and len(values.unique()) == len(values)
  return pa.types.is_floating(values.type) and _counts_up(values)


def _other_than_scores(name: str, values: pa.ChunkedArray) -> str:
  """Says what a column holds instead of scores; "" for scores."""
  kind = values.type
  if is_like_ids(name, values) or _is_text(kind):
    return (
      "is none of scores. If it holds the samples' ids, say so:"
      f" ids={name!r}; else leave it out."
    )
  if not pa.types.is_floating(kind) or is_label_name(name):
    return "is none of scores, which are floats. Leave it out, or convert it."
  return ""


def _is_text(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  return (
    pa.types.is_string(kind)
    or pa.types.is_large_string(kind)
    or pa.types.is_string_view(kind)
  )


def _counts_up(values: pa.ChunkedArray) -> bool:
  """True for whole numbers that rise from row to row, as row numbers do."""
  if len(values) < _MANY or values.null_count:
    return False
  numbers = values.to_numpy(zero_copy_only=False)
  rises = numbers[1:] > numbers[:-1]
  return bool(rises.all()) and bool((numbers == np.floor(numbers)).all())


def _index(frame: Any, name: str) -> np.ndarray | None:
  """The values of an index that says more than which row it is."""
  index = getattr(frame, "index", None)
  if not hasattr(frame, "iloc") or index is None:  # polars, Arrow have none
    return None
  bounds = [getattr(index, key, None) for key in ("start", "stop", "step")]
  if bounds == [0, len(frame), 1] and index.name is None:
    return None
  values = np.asarray(index)
  is_other = values.dtype.kind not in "iuOTU"
  if values.dtype.kind in "OT":
    is_other = not all(isinstance(value, str) for value in values)
  if is_other:
    raise TypeError(
      f"{name} is a {_kind(frame)} whose index ({index.dtype}) holds neither"
      " integers nor strings, as ids are. Give ids=, or drop it:"
      " frame.reset_index(drop=True)."
    )
  return values


def _kind(frame: Any) -> str:
  return f"{type(frame).__module__}.{type(frame).__qualname__}"
