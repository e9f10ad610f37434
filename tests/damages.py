"""What happens to files on their way, and what a reader may make of them.

A reader of a damaged file gives what was in it (the damage is one of words that
say nothing, or there is a copy), or raises one line that names the file.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
  """One damage of one file."""

  what: str
  content: bytes | None  # None: the file is removed


def damages(
  content: bytes,
  *,
  sibling: bytes | None = None,
  others: Mapping[str, bytes] | None = None,
  cuts: int = 6,
  flips: int = 24,
  removed: bool = False,
  seed: int = 0,
) -> Iterator[Case]:
  """Everything that happens to a file.

  Args:
    content: the file's bytes.
    sibling: bytes of a whole file of the same kind, with other content.
    others: bytes of files of other kinds, by kind.
    cuts: at how many places it is cut off.
    flips: how many bits are flipped, one in each copy: of the first eight
      bytes, and at as many places as are left, spread over the file.
    removed: whether a file that is gone is a damage, too.
    seed: of the bits and the garbage.

  Yields:
    Cases, none with the whole content.
  """
  rng = np.random.default_rng(seed)
  size = len(content)
  yield Case("emptied", b"")
  places = {1, size - 1, *np.linspace(0, size, cuts + 2).astype(int)[1:-1]}
  for place in sorted(int(p) for p in places if 0 < p < size):
    yield Case(f"cut off at {place} of {size}", content[:place])
  spread = np.linspace(8, size - 1, max(0, flips - 8)).astype(int)
  for place in sorted({*range(min(8, size)), *spread[spread < size].tolist()}):
    bit = int(rng.integers(8))
    flipped = bytearray(content)
    flipped[place] ^= 1 << bit
    yield Case(f"bit {bit} of byte {place} of {size} flipped", bytes(flipped))
  yield Case("garbage appended", content + rng.bytes(64))
  yield Case("zeros appended", content + bytes(16))
  yield Case("appended to itself", content + content)
  half = size // 2
  hole = content[:half] + bytes(min(64, size - half)) + content[half + 64 :]
  yield Case("a hole of zeros", hole)
  yield Case("all zeros", bytes(size))
  if sibling is not None:
    yield Case("swapped with a sibling", sibling)
  for kind, other in (others or {}).items():
    yield Case(f"a file of {kind} under its name", other)
  if removed:
    yield Case("removed", None)


def outcome(
  path: pathlib.Path,
  case: Case,
  read: Callable[[], Any],
  is_right: Callable[[Any], bool],
  *,
  names: tuple[str, ...] = (),
) -> str:
  """What is wrong with how a reader takes a damage; "" if nothing is.

  Args:
    path: the file, whole; it is damaged, read and made whole again.
    case: the damage.
    read: reads it.
    is_right: whether what came is what had been written.
    names: other files that an error may name in its place, such as the one
      with its checksum.

  Returns:
    A line, or "".
  """
  whole = path.read_bytes()
  if case.content is None:
    path.unlink()
  else:
    path.write_bytes(case.content)
  try:
    found = read()
  except (ValueError, OSError) as error:
    text = str(error)
    if not any(name in text for name in (path.name, *names)):
      return (
        f"{case.what}: {type(error).__name__} without a file's name: {text}"
      )
    if "\n" in text.strip():
      return f"{case.what}: {type(error).__name__} of several lines: {text!r}"
    if "pickle" in text.lower():
      return f"{case.what}: an error that speaks of pickle: {text}"
  except Exception as error:
    return f"{case.what}: {type(error).__name__}: {str(error)[:100]}"
  else:
    if not is_right(found):
      return f"{case.what}: read as {str(found)[:100]}"
  finally:
    path.write_bytes(whole)
  return ""
