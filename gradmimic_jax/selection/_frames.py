"""Data frames: their ids and labels are never read as scores."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

# Columns with these names hold no scores, whatever their type.
_NOT_SCORES = frozenset(
  (
    *("class", "id", "ids", "idx", "index", "key", "keys", "label", "labels"),
    *("level_0", "name", "position", "row", "sample", "target", "uid", "uids"),
    *("uuid", "y"),
  )
)
_BEGINNINGS, _ENDS = ("unnamed:", "__index"), ("_id", "_label", "_index")


def refuse_frames(value: Any, name: str) -> None:
  """Raises TypeError for a data frame that has more in it than scores.

  NumPy makes one array of a frame: of its ids and labels, too, and without its
  index, which may be what says whose scores they are. A frame of floats alone,
  whose rows are numbered 0 to N - 1, is an array, and passes.

  Args:
    value: anything; what isn't a frame (pandas, polars, Arrow or another that
      offers `__dataframe__`) passes.
    name: its name in the error.

  Raises:
    TypeError: a frame with a column that isn't float or has a name such as
      "id", or with an index of its own; of a kind that can't be looked into.

  Example:
    >>> refuse_frames(pa.table({"id": [5, 7], "step_0": [0.1, -0.2]}), "scores")
    Traceback (most recent call last):
    TypeError: scores is a pyarrow.lib.Table whose column 'id' (int64) is none
    of scores. Hand over the columns of scores as an array, and the ids apart:
    frame.select(columns).to_pandas().to_numpy(), ids=frame["id"].
  """
  kind = type(value)
  if kind.__module__ == "numpy" or kind in (list, tuple):
    return
  if not (
    isinstance(value, (pa.Table, pa.RecordBatch))
    or hasattr(kind, "__dataframe__")
    or (hasattr(kind, "columns") and hasattr(kind, "dtypes"))
  ):
    return
  found = _not_scores(value)
  if found:
    takes = "frame[columns].to_numpy()"
    if hasattr(kind, "iter_rows"):  # as polars has it
      takes = "frame.select(columns).to_numpy()"
    if isinstance(value, (pa.Table, pa.RecordBatch)):
      takes = "frame.select(columns).to_pandas().to_numpy()"
    ids = "frame.index" if "index of its own" in found else 'frame["id"]'
    raise TypeError(
      f"{name} is a {kind.__module__}.{kind.__qualname__} {found}. Hand over"
      " the columns of scores as an array, and the ids apart:"
      f" {takes}, ids={ids}."
    )


def _not_scores(frame: Any) -> str:
  """Describes the part of a frame that isn't scores; "" if all is."""
  try:
    if isinstance(frame, (pa.Table, pa.RecordBatch)):
      columns, types = frame.schema.names, frame.schema.types
    else:
      columns, types = list(frame.columns), list(frame.dtypes)
  except Exception:  # an unknown kind of frame
    return "that can't be looked into"
  for column, kind in zip(columns, types, strict=True):
    parts = column if isinstance(column, tuple) else (column,)
    words = [str(part).strip().lower() for part in parts]
    is_float = str(kind).lower().startswith(("float", "double", "halffloat"))
    if not is_float or any(
      word in _NOT_SCORES
      or word.startswith(_BEGINNINGS)
      or word.endswith(_ENDS)
      for word in words
    ):
      return f"whose column {column!r} ({kind}) is none of scores"
  index = getattr(frame, "index", None)
  if index is None or callable(index):  # polars and Arrow have none
    return ""
  bounds = [getattr(index, key, None) for key in ("start", "stop", "step")]
  if bounds != [0, len(frame), 1] or getattr(index, "name", None) is not None:
    return "with an index of its own, which may be what the rows' ids are"
  return ""
