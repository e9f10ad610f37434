"""Splits by name, slices and sums of them, and the files of a split."""

import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALL = "all"  # The name of the one split of a set that has no others.
_SPLIT = re.compile(r"([\w.-]+)(?:\[([^\[\]:]*):([^\[\]:]*)\])?")
_EDGE = re.compile(r"(-?\d+)(%?)")
_PLACEHOLDER = "{split}"


class Slice(NamedTuple):
  """A split, or the samples of it from one edge to the other."""

  name: str
  start: str  # Empty, a number, or a percentage.
  stop: str

  @property
  def is_whole(self) -> bool:
    """True if it is all of the split."""
    return not (self.start or self.stop)

  def rows(self, count: int) -> np.ndarray:
    """Returns the positions that it takes of so many samples."""
    edges = [_find_edge(edge, count) for edge in (self.start, self.stop)]
    return np.arange(count)[slice(*edges)]


def parse(text: str) -> list[Slice]:
  """Parses a split as TFDS writes them.

  Args:
    text: Such as "train", "train[:10%]", "all[80%:]" or "train+test[:100]".
      A percentage is rounded to the closest sample.

  Returns:
    Its summands.

  Raises:
    ValueError: If it is something else.

  Example:
    >>> [each.rows(10).tolist() for each in parse("train[:20%]+test[8:]")]
    [[0, 1], [8, 9]]
  """
  if not isinstance(text, str):
    raise TypeError(f"split must be a str, got {text!r}")
  found = []
  for part in text.split("+"):
    match = _SPLIT.fullmatch(part.strip())
    edges = (match[2] or "", match[3] or "") if match else ("",)
    units = {edge[-1:] == "%" for edge in edges if edge}  # TFDS has one, too.
    known = all(not edge or _EDGE.fullmatch(edge) for edge in edges)
    if not match or not known or len(units) > 1:
      raise ValueError(
        f"split {text!r} can't be read; expected a name, a slice such as"
        " 'train[:10%]' or a sum such as 'train+test'"
      )
    found.append(Slice(match[1], *edges))
  return found


def _find_edge(edge: str, count: int) -> int | None:
  match = _EDGE.fullmatch(edge)
  if not match:
    return None
  number = int(match[1])
  return round(number * count / 100) if match[2] else number


def find_files(pattern: str, split: str, suffixes: Sequence[str]) -> list[str]:
  """Finds the files that a split consists of.

  Args:
    pattern: A file, a folder, or a pattern with `*`. `{split}` in it stands for
      the split. In a folder, files belong to the split that their name has in
      it (`train-00000-of-00002.parquet`, `data.test.tar`) or that is the name
      of the folder below which they lie.
    split: The split; "all" takes every file.
    suffixes: Endings of the files, as in ".parquet".

  Returns:
    Their paths, sorted.

  Raises:
    FileNotFoundError: If there is none.
  """
  pattern = os.path.expanduser(pattern)
  named = _PLACEHOLDER in pattern
  path = pattern.replace(_PLACEHOLDER, split)
  if os.path.isdir(path):
    found = [
      os.path.join(folder, name)
      for folder, _, names in os.walk(path)
      for name in names
      if name.endswith(tuple(suffixes))
      and not _is_hidden(os.path.relpath(os.path.join(folder, name), path))
    ]
    root = path
  else:
    found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    found = [name for name in found if os.path.isfile(name)]
    root = os.path.dirname(path)
  found = sorted(map(os.path.abspath, found))
  root = os.path.abspath(root)
  if not found:
    raise FileNotFoundError(
      f"{path!r} has no file that ends in {' or '.join(suffixes)}; expected a"
      " file, a folder of them or a pattern with *, and {split} in it where a"
      " split's name belongs"
    )
  if named or split == ALL:
    return found
  taken = [
    name for name in found if has_split(os.path.relpath(name, root), split)
  ]
  # As the Hub has them; "train_more-00000-of-00001" is another split then.
  numbered = re.compile(rf"(.*/)?{re.escape(split)}-\d+-of-\d+[^/]*")
  exact = [x for x in taken if numbered.fullmatch(os.path.relpath(x, root))]
  taken = exact or taken
  if not taken:
    names = [os.path.relpath(name, root) for name in found]
    raise ValueError(
      f"split {split!r} of {pattern} can't be found: none of its {len(found)}"
      f" files has it in its name ({', '.join(map(repr, names[:5]))}). Set"
      " config.data.train_split and config.data.test_split to names that they"
      " have, to slices such as 'all[:80%]' and 'all[80%:]', or put {split} in"
      " the path"
    )
  return taken


def has_split(name: str, split: str) -> bool:
  """True if a file's name, or a folder in it, has the split as a word.

  Example:
    >>> has_split("data/train-00000-of-00001.parquet", "train")
    True
  """
  return bool(re.search(rf"(^|[^a-zA-Z0-9]){re.escape(split)}[-_./\d]", name))


def _is_hidden(path: str) -> bool:
  return any(part.startswith(".") for part in path.split(os.sep))


def make_ids(split: str, count: int) -> np.ndarray:
  """Makes ids [N] of a split's name and positions, as in "train_00042"."""
  return np.array([f"{split}_{row:05d}" for row in range(count)], np.str_)
