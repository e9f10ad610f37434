"""Columns of a table by any tool, converted to those of a selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradmimic_jax.selection import _ids
from gradmimic_jax.selection.selection import Selection

NAMES = ("id", "keep", "keep_probability", "quality")
# Words for a missing number, in lower case.
_MISSING = ["", "na", "nan", "null", "none", "n/a", "#n/a", "<na>"]
_NUMBERS = pa.types.is_integer, pa.types.is_floating, pa.types.is_null


def selection(
  columns: dict[str, pa.ChunkedArray],
  votes: np.ndarray,
  diagnostics: dict[str, Any],
) -> Selection:
  """Makes a selection of columns and votes.

  Args:
    columns: by name, one of each of `NAMES`, as numbers or as text.
    votes: numbers [N, T].
    diagnostics: of the selection.

  Returns:
    The Selection.

  Raises:
    ValueError: a value that can't be one of a selection.
  """
  n = len(columns["id"])
  if not n or not votes.shape[1]:
    raise ValueError(f"it has {n} rows and {votes.shape[1]} columns of votes")
  return Selection(
    checked_ids(columns["id"]),
    _keep(columns["keep"]),
    _shares(columns["keep_probability"], "keep_probability"),
    _checked_votes(votes),
    diagnostics,
    _shares(columns["quality"], "quality"),
  )


def numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
  """Reads a column of numbers, or of their text, as float64; nan if missing."""
  array = whole(column)
  if is_text(array):
    array = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
    try:
      return array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:  # other blanks, other words for a missing one
      text = pc.utf8_lower(pc.utf8_trim_whitespace(array))
      missing = pc.is_in(text, value_set=pa.array(_MISSING, pa.large_string()))
      array = pc.if_else(missing, pa.scalar(None, text.type), text)
  elif not any(is_one(array.type) for is_one in _NUMBERS):
    raise ValueError(f"{name} is of {array.type}; expected numbers")
  try:
    return array.cast(pa.float64()).to_numpy(zero_copy_only=False)
  except pa.ArrowInvalid as error:
    raise ValueError(f"{name}: {error}") from error


def whole(column: Any) -> pa.Array:
  """Joins a column into one piece; text gets offsets for any length."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
    column = column.cast(pa.large_string())
  if isinstance(column, pa.ChunkedArray):
    column = column.combine_chunks()
  return column


def is_text(array: pa.Array) -> bool:
  """True if a column, in one piece, is text."""
  return pa.types.is_large_string(array.type)


def strings(array: pa.Array, name: str) -> np.ndarray:
  """Converts text in one piece to NumPy strings."""
  return _ids.strings(array.to_numpy(zero_copy_only=False), name)


def checked_ids(column: Any) -> np.ndarray:
  """Converts a column of ids, integers or text, none twice."""
  array = whole(column)
  if array.null_count:
    row = pc.index(array.is_null(), True).as_py() + 1
    raise ValueError(f"row {row} has no id")
  if is_text(array):
    ids = strings(array, "id")
  elif pa.types.is_integer(array.type):
    ids = array.to_numpy()
    if ids.min() < 0:
      raise ValueError(f"an id is {ids.min()}; expected ids >= 0")
  else:
    raise ValueError(f"id is of {array.type}; expected integers or strings")
  values, counts = np.unique(ids, return_counts=True)
  if len(values) < len(ids):
    worst = counts.argmax()
    raise ValueError(
      f"the id {values[worst].item()!r} comes {counts[worst]} times"
    )
  return ids


def _keep(column: pa.ChunkedArray) -> np.ndarray:
  array = whole(column)
  if array.null_count:
    row = pc.index(array.is_null(), True).as_py() + 1
    raise ValueError(f"row {row} has no keep")
  coded = array.dictionary_encode()
  said = [_ids.truth(value, "keep") for value in coded.dictionary.to_pylist()]
  return np.array(said, bool)[coded.indices.to_numpy()]


def _shares(column: pa.ChunkedArray, name: str) -> np.ndarray:
  values = numbers(column, name)
  wrong = (values < 0) | (values > 1)
  if wrong.any():
    raise ValueError(f"{name} holds {values[wrong][0]:g}; expected 0 to 1")
  return values


def _checked_votes(votes: np.ndarray) -> np.ndarray:
  wrong = ~np.isin(votes, (-1, 0, 1))
  if wrong.any():
    value = votes[wrong][0].item()
    raise ValueError(f"a vote is {value}; expected 1, 0 or -1")
  return votes.astype(np.int8, copy=False)


def stack_votes(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
  """Stacks columns, one a step, as votes [N, T]."""
  return np.stack([numbers(c, f"vote_{t}") for t, c in enumerate(columns)], 1)


def parse_vote_lists(column: pa.ChunkedArray) -> np.ndarray:
  """Reads a column of lists, all of one length, as votes [N, T]."""
  lists = whole(column)
  of_lists = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
  )
  if not any(is_one(lists.type) for is_one in of_lists):
    raise ValueError(f"votes is of {lists.type}; expected lists of integers")
  lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
  if len(lengths) > 1 or lists.null_count:
    raise ValueError(f"votes has lists of the lengths {lengths[:5]}")
  flat = numbers(lists.flatten(), "votes")
  return flat.reshape(len(lists), lengths[0] if lengths else 0)
