"""Sources made of whole splits: slices, sums, and the classes of all of them.

Each kind of set finds one whole split, as a `Part`. What a user asks for is
put together here, and the classes are checked across splits: numbers mean the
same class in all of them.
"""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.data.sources import base, splits

_LISTED = 5
_NUMBER = re.compile(r"0|[1-9]\d{0,8}")


class Reader(Protocol):
  """What reads samples of one whole split; can be pickled."""

  def read(self, rows: np.ndarray) -> list[Any]:
    """Reads samples, by their rows in the split."""


class Part(NamedTuple):
  """One whole split."""

  labels: np.ndarray  # [N], integers or texts
  ids: np.ndarray  # str [N]
  content: np.ndarray  # uint64 [N, 2], hashes of what is stored
  reader: Reader
  class_names: tuple[str, ...] | None = None  # None: what labels there are
  channels: int | None = 3
  shape: tuple[int, ...] | None = None
  # Ranks [N] by which slices are taken; None: in the order of the samples.
  rank: np.ndarray | None = None


class PartsSource(base.Source):
  """Slices of whole splits, one after the other.

  Args:
    parts: The whole splits.
    rows: Of each, the rows [n] that are taken.
    options: Of `Source`.
  """

  def __init__(
    self,
    parts: Sequence[Part],
    rows: Sequence[np.ndarray],
    **options: Any,
  ):
    self._readers = [part.reader for part in parts]
    self._rows = list(rows)
    self._ends = list(itertools.accumulate(map(len, rows)))
    pairs = list(zip(parts, rows, strict=True))
    super().__init__(
      labels=np.concatenate([part.labels[taken] for part, taken in pairs]),
      ids=np.concatenate([part.ids[taken] for part, taken in pairs]),
      content=b"".join(part.content[taken].tobytes() for part, taken in pairs),
      channels=parts[0].channels,
      shape=parts[0].shape,
      **options,
    )

  def read(self, positions: Sequence[int]) -> list[Any]:
    """See `Source`."""
    asked = self.check_positions(positions)
    found: list[Any] = [None] * len(asked)
    numbers = np.searchsorted(self._ends, asked, side="right")
    for number in np.unique(numbers):
      places = np.flatnonzero(numbers == number)
      start = self._ends[number] - len(self._rows[number])
      rows = self._rows[number][asked[places] - start]
      try:
        samples = self._readers[number].read(rows)
      except OSError as error:
        raise self.damaged(error) from error
      for place, sample in zip(places.tolist(), samples, strict=True):
        found[place] = sample
    return found


def combine(
  find: Callable[[str], Part],
  split: str,
  *,
  others: Sequence[str],
  name: str,
  where: str | os.PathLike,
  peek: Callable[[str], tuple[str, ...] | None] = lambda _: None,
) -> PartsSource:
  """Makes a source of whole splits.

  Args:
    find: Finds a whole split by its name.
    split: What is asked for, with slices and sums.
    others: Splits that have to have the same classes.
    name: The set's name, for messages.
    where: The folder or file that it is in.
    peek: Names the classes of a split where that takes less than to find it.

  Returns:
    The source.

  Raises:
    ValueError: If a split lacks a class that another has, or ids repeat.
  """
  taken = splits.parse(split)
  whole = {own: find(own) for own in dict.fromkeys(x.name for x in taken)}
  for own, part in whole.items():
    if not len(part.labels):
      raise ValueError(
        f"split {own!r} of {name} ({os.fspath(where)}) has no sample; expected"
        " at least one"
      )
  classes = {
    own: _Classes(part.class_names, part.labels) for own, part in whole.items()
  }
  for own in (x.name for text in others for x in splits.parse(text)):
    if own not in classes:
      names = peek(own)
      labels = np.empty(0, np.int64)
      if names is None:
        other = find(own)
        names, labels = other.class_names, other.labels
      classes[own] = _Classes(names, labels)
  class_names = _name_classes(classes, f"{name} ({os.fspath(where)})")
  numbers = {text: number for number, text in enumerate(class_names)}
  parts, rows = [], []
  for each in taken:
    part = whole[each.name]
    if part.labels.dtype.kind == "U":
      labels = np.array([numbers[x] for x in part.labels.tolist()], np.int64)
      part = part._replace(labels=labels)
    order = each.rows(len(part.labels))
    if part.rank is not None and not each.is_whole:
      order = np.sort(np.argsort(part.rank)[order])
    parts.append(part)
    rows.append(order)
  unlike = {(part.channels, part.shape) for part in parts}
  if len(unlike) > 1:
    raise ValueError(
      f"the splits of {name} {split} differ in channels and shape: {unlike};"
      " expected one kind of sample"
    )
  return PartsSource(
    parts,
    rows,
    name=name,
    split=split,
    where=where,
    class_names=class_names,
    remedy="restore them, or start over in another --workdir",
    unlabelled="; number the classes from 0 on, and give every sample one",
  )


class _Classes(NamedTuple):
  """What one split says about its classes."""

  class_names: tuple[str, ...] | None
  labels: np.ndarray


def _name_classes(whole: dict[str, _Classes], where: str) -> tuple[str, ...]:
  """Finds the names of classes; raises unless all splits have the same."""
  names = {
    split: part.class_names
    for split, part in whole.items()
    if part.class_names is not None
  }
  if len(names) == len(whole):
    first = next(iter(names.values()))
    _check_same({split: set(x) for split, x in names.items()}, where)
    for split, found in names.items():
      if found != first:
        raise ValueError(
          f"the classes of {where} have another order in split {split!r} than"
          f" in {next(iter(names))!r}; write both with the same class names"
        )
    return first
  labels = [part.labels for part in whole.values()]
  if all(found.dtype.kind in "iu" for found in labels):
    least = min(found.min(initial=0) for found in labels)
    if least < 0:
      raise ValueError(
        f"a label of {where} is {least}; expected numbers from 0 on: leave out"
        " samples without a class"
      )
    most = max(found.max(initial=0) for found in labels)
    if most >= sum(map(len, labels)):
      raise ValueError(
        f"a label of {where} is {most}, and there are only"
        f" {sum(map(len, labels))} samples; expected the numbers of classes"
        " from 0 on, without gaps"
      )
    there = {
      split: {str(x) for x in np.unique(part.labels)}
      for split, part in whole.items()
    }
    _check_same(there, where)
    lacking = {str(x) for x in range(most + 1)} - next(iter(there.values()))
    if lacking:
      raise ValueError(
        f"no sample of {where} is of class {min(lacking, key=int)}, and labels"
        f" go up to {most}; expected the numbers of classes from 0 on, without"
        " gaps"
      )
    return tuple(str(x) for x in range(most + 1))
  if len({found.dtype.kind == "U" for found in labels}) > 1:
    raise ValueError(
      f"labels of {where} are names in one split and numbers in another;"
      " expected the same in all"
    )
  sets = {split: set(part.labels.tolist()) for split, part in whole.items()}
  _check_same(sets, where)
  return sort_names(next(iter(sets.values())))


def _check_same(sets: dict[str, set[str]], where: str) -> None:
  """Raises ValueError if a split lacks a class that another one has."""
  union = set().union(*sets.values())
  for split, found in sets.items():
    lacking = sort_names(union - found)
    if lacking:
      shown = ", ".join(map(repr, lacking[:_LISTED]))
      other = next(x for x in sets if lacking[0] in sets[x])
      raise ValueError(
        f"split {split!r} of {where} lacks {len(lacking)} of {len(union)}"
        f" classes that split {other!r} has: {shown}; add samples of them, or"
        " leave them out of every split"
      )


def sort_names(names: set[str] | Sequence[str]) -> tuple[str, ...]:
  """Sorts classes' names: by number if all are such, else as texts.

  Example:
    >>> sort_names(["10", "9"])
    ('9', '10')
  """
  if all(_NUMBER.fullmatch(name) for name in names):
    return tuple(sorted(names, key=int))
  return tuple(sorted(names))


def to_numbers(labels: np.ndarray) -> np.ndarray:
  """Converts texts to integers if all of them are such, as a CSV has them."""
  if labels.dtype.kind == "U" and all(map(_NUMBER.fullmatch, labels.tolist())):
    return labels.astype(np.int64)
  return labels
