"""Sorted arrays of sample ids: integers, strings, or DataComp's uid pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

UID = np.dtype("<u8,<u8")  # a uid's first and last 16 hexadecimal digits


def checked(ids: Any, name: str) -> np.ndarray:
  """Ids [n] in one of the three kinds, in the order they came.

  Args:
    ids: integers >= 0, strings, or pairs `u8,u8`.
    name: what errors call them.

  Returns:
    int64, a NumPy string array or `u8,u8`; an empty list is int64.

  Raises:
    TypeError: ids of another kind.
    ValueError: ids that aren't [n], or negative.
  """
  array = np.asarray(ids)
  if array.ndim != 1:
    raise ValueError(f"{name} has shape {array.shape}; expected [n].")
  if not len(array):
    return array if array.dtype in (UID,) else np.empty(0, np.int64)
  if array.dtype.kind in "OT":  # as data frames hold strings
    array = np.asarray(array.tolist())
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
  """Integers or strings as a NumPy array; TypeError if they are neither."""
  array = np.asarray(values)
  if array.dtype.kind in "OT":  # as data frames hold strings
    array = np.asarray(array.tolist())
  if array.dtype.kind not in "iuU":
    raise TypeError(
      f"{name} has dtype {array.dtype}; expected integers >= 0 or strings."
    )
  return array


def order(ids: np.ndarray) -> np.ndarray:
  """What sorts them. Pairs are compared as numbers, not field by field."""
  if ids.dtype == UID:
    return np.lexsort((ids["f1"], ids["f0"]))
  return np.argsort(ids, kind="stable")


def unique(ids: np.ndarray) -> np.ndarray:
  """The distinct ids, ascending."""
  if is_ascending(ids, strictly=True):
    return ids
  if ids.dtype != UID:
    return np.unique(ids)
  ids = ids[order(ids)]
  return ids[np.r_[True, ids[1:] != ids[:-1]]]


def is_ascending(ids: np.ndarray, *, strictly: bool) -> bool:
  """Whether each id is above (or at least not below) the one before."""
  if ids.dtype != UID:
    steps = ids[1:] > ids[:-1] if strictly else ids[1:] >= ids[:-1]
    return bool(steps.all())
  f0, f1 = ids["f0"], ids["f1"]
  above = f1[1:] > f1[:-1] if strictly else f1[1:] >= f1[:-1]
  above &= f0[1:] == f0[:-1]
  above |= f0[1:] > f0[:-1]
  return bool(above.all())


def contains(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """Which of the ids are among others that are ascending and distinct."""
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


def same_kind(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether ids can be compared; no ids at all go with any."""
  return not len(a) or not len(b) or a.dtype.kind == b.dtype.kind
