"""Sorted arrays of sample ids: integers, strings, or DataComp's uid pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

UID = np.dtype("<u8,<u8")  # a uid's first and last 16 hexadecimal digits


def checked(ids: Any, name: str) -> np.ndarray:
  """Converts ids [n] to one of the three kinds, in the order they came.

  Args:
    ids: integers >= 0, strings, or pairs `u8,u8`.
    name: what errors call them.

  Returns:
    int64, a NumPy string array or `u8,u8`; an empty list is int64.

  Raises:
    TypeError: ids of another kind.
    ValueError: ids that aren't [n], or negative.
  """
  array = _as_array(ids, name)
  if array.ndim != 1:
    raise ValueError(f"{name} has shape {array.shape}; expected [n].")
  if not len(array):
    return array if array.dtype in (UID,) else np.empty(0, np.int64)
  if array.dtype == UID or array.dtype.kind == "U":
    return array
  if array.dtype.kind not in "iu":
    raise TypeError(
      f"{name} has dtype {array.dtype}; expected integers >= 0, strings or"
      " pairs of uint64 ('u8,u8'). A mask picks ids: ids[mask]."
    )
  if array.dtype.kind == "i" and array.min() < 0:
    raise ValueError(f"{name} holds {array.min()}; expected ids >= 0.")
  if array.max() > np.iinfo(np.int64).max:
    raise ValueError(f"{name} holds {array.max()}; it doesn't fit in int64.")
  return array.astype(np.int64, copy=False)


def plain(values: Any, name: str) -> np.ndarray:
  """Converts integers or strings to a NumPy array; TypeError for others."""
  array = _as_array(values, name)
  if array.dtype.kind not in "iuU":
    raise TypeError(
      f"{name} has dtype {array.dtype}; expected integers >= 0 or strings."
    )
  return array


def strings(values: Sequence[str] | np.ndarray, name: str) -> np.ndarray:
  """Converts strings to a NumPy array; ValueError if it would change them."""
  array = np.asarray(values, np.str_)
  if int(np.strings.str_len(array).sum()) != sum(map(len, values)):
    raise ValueError(
      f"{name} has strings that end with NUL characters, which NumPy drops."
      " Take them off first."
    )
  return array


def to_arrow(ids: np.ndarray, name: str) -> pa.Array:
  """Converts ids to Arrow's; those of NumPy itself would end at a NUL."""
  if ids.dtype.kind != "U":
    return pa.array(ids)
  try:
    return pa.array(ids.tolist(), pa.string())
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{name} has text that is no Unicode, such as {error.object!r:.80}; files"
      " hold UTF-8."
    ) from error


def refuse_mask(ids: np.ndarray, name: str) -> None:
  """Raises ValueError for ids [n] that are 0 and 1 over and over: a mask."""
  if ids.dtype.kind not in "iu" or is_ascending(ids, strictly=True):
    return
  if ids.max() <= 1 and len(ids) > len(np.unique(ids)):
    raise ValueError(
      f"{name} holds {len(ids)} values, all of them 0 or 1: a mask, not ids."
      " A mask picks ids: ids[mask.astype(bool)]."
    )


def mask(values: Any, n: int, name: str) -> np.ndarray:
  """Converts decisions [n] to booleans; 1 and 0 are no positions.

  Args:
    values: booleans, numbers 0 and 1, or words such as "yes" and "FALSE".
    n: their expected number.
    name: what errors call them.

  Returns:
    Booleans [n].

  Raises:
    ValueError: another shape, or a value that says neither.
  """
  array = np.asarray(values)
  if array.shape != (n,):
    raise ValueError(f"{name} has shape {array.shape}; expected [{n}].")
  if array.dtype.kind == "b":
    return array
  if array.dtype.kind in "iuf":
    if not ((array == 0) | (array == 1)).all():
      wrong = array[(array != 0) & (array != 1)][0]
      raise ValueError(_no_truth(name, wrong))
    return array == 1
  return np.array([truth(value, name) for value in array.tolist()], bool)


_WORDS = {
  **dict.fromkeys(("true", "t", "yes", "y"), True),
  **dict.fromkeys(("false", "f", "no", "n"), False),
}


def truth(value: Any, name: str) -> bool:
  """Reads a value such as True, 0, "1.0", "yes" or "F".

  Args:
    value: as pandas, R or a spreadsheet write it.
    name: what errors call it.

  Returns:
    True or False.

  Raises:
    ValueError: it says neither.
  """
  if isinstance(value, str):
    word = value.strip().lower()
    if word in _WORDS:
      return _WORDS[word]
    with contextlib.suppress(ValueError):
      value = float(word)
  if value not in (0, 1):  # 1.0 and True are equal to 1
    raise ValueError(_no_truth(name, value))
  return bool(value)


def _no_truth(name: str, value: Any) -> str:
  shown = value.item() if isinstance(value, np.generic) else value
  return (
    f"{name} holds {shown!r:.80}; expected true or false, yes or no, t or f, 1"
    " or 0."
  )


def _as_array(values: Any, name: str) -> np.ndarray:
  """Converts as np.asarray, but 5 among strings is no "5", and True no 1."""
  array = np.asarray(values)
  if array.ndim != 1 or not len(array):
    return array
  if array.dtype.kind in "OT":  # as data frames hold strings
    values = array.tolist()
  elif hasattr(values, "dtype") or array.dtype.kind not in "iuU":
    return array
  kinds = set(map(type, values))
  if all(issubclass(kind, str) for kind in kinds):
    return strings(values, name)
  text = any(issubclass(kind, str) for kind in kinds)
  if len(kinds) > 1 and (text or not kinds.isdisjoint((bool, np.bool_))):
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(
      f"{name} mixes values of {found}; expected all strings or all integers."
      " None may be missing."
    )
  return np.asarray(values)


def order(ids: np.ndarray) -> np.ndarray:
  """Sorts positions by id. Pairs are compared as numbers, not by field."""
  if ids.dtype == UID:
    return np.lexsort((ids["f1"], ids["f0"]))
  return np.argsort(ids, kind="stable")


def unique(ids: np.ndarray) -> np.ndarray:
  """Returns the distinct ids, ascending."""
  if is_ascending(ids, strictly=True):
    return ids
  if ids.dtype != UID:
    return np.unique(ids)
  ids = ids[order(ids)]
  return ids[np.r_[True, ids[1:] != ids[:-1]]]


def is_ascending(ids: np.ndarray, *, strictly: bool) -> bool:
  """True if each id is above (or at least not below) the one before."""
  if ids.dtype != UID:
    steps = ids[1:] > ids[:-1] if strictly else ids[1:] >= ids[:-1]
    return bool(steps.all())
  f0, f1 = ids["f0"], ids["f1"]
  above = f1[1:] > f1[:-1] if strictly else f1[1:] >= f1[:-1]
  above &= f0[1:] == f0[:-1]
  above |= f0[1:] > f0[:-1]
  return bool(above.all())


def contains(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """True for each id that is in `sorted_ids`: ascending ones, none twice."""
  if not len(sorted_ids) or not len(ids):
    return np.zeros(len(ids), bool)
  if ids.dtype != UID:
    place = np.searchsorted(sorted_ids, ids)
    return sorted_ids[np.minimum(place, len(sorted_ids) - 1)] == ids
  # Stable: of equal pairs the one of `sorted_ids` comes first.
  both = np.concatenate([sorted_ids, ids])
  by = order(both)
  both = both[by]
  starts = np.r_[True, both[1:] != both[:-1]]
  first = by[np.flatnonzero(starts)][np.cumsum(starts) - 1]
  found = np.empty(len(by), bool)
  found[by] = first < len(sorted_ids)
  return found[len(sorted_ids) :]


def find(
  ids: np.ndarray, wanted: np.ndarray, by: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Finds where the wanted ids are, and which of them are not there.

  Args:
    ids: [n], of the kind of `wanted`; of one that repeats, the first is found.
    wanted: [m].
    by: `order(ids)`, where it is known.

  Returns:
    Positions among ids [m], of no meaning where an id is missing; and the
    missing ids.
  """
  if not len(ids):
    return np.zeros(len(wanted), np.int64), wanted
  if by is None:
    by = order(ids)
  place = np.searchsorted(ids[by], wanted)
  rows = by[np.minimum(place, len(ids) - 1)]
  return rows, wanted[ids[rows] != wanted]


def same_kind(a: np.ndarray, b: np.ndarray) -> bool:
  """True if ids can be compared; no ids at all go with any."""
  return not len(a) or not len(b) or a.dtype.kind == b.dtype.kind
