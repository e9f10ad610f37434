"""What was found in a data set's files, kept beside them.

To find labels, ids, places and hashes means to read all of a set once. The
result is kept as one `.npz` file for each file of the set, in a folder
`.gradmimic_jax` beside it, or in the user's cache (`$XDG_CACHE_HOME`, by
default `~/.cache`) where that can't be written. It counts as long as the
files' sizes and times of change (in nanoseconds) are the same. Nothing is
pickled; an index that is damaged, or of other files, is made anew.
"""

import hashlib
import json
import os
import pathlib
import re
import stat
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from experiments.runtime import claims
from gradmimic_jax import _files

FOLDER = ".gradmimic_jax"
_VERSION = 1
_KEY = "about"  # The entry with what the index is for.
_MOST_BYTES = 16 << 30

Arrays = dict[str, np.ndarray]


class Entry(NamedTuple):
  """What an index is about."""

  path: str  # The file or folder; its index lies beside it.
  state: str  # Changes whenever the content may have changed.

  @property
  def file_state(self) -> tuple[int, int]:
    """Size and time of change of a file, as `file_entry` found them."""
    size, changed, _ = json.loads(self.state)
    return size, changed


def file_entry(path: str | os.PathLike, *settings: object) -> Entry:
  """Describes a file by its size and time of change.

  Args:
    path: A regular file.
    settings: Whatever else its index depends on, JSON-like.

  Returns:
    The Entry.

  Raises:
    OSError: If there is no such file.
  """
  about = os.stat(path)
  state = json.dumps([about.st_size, about.st_mtime_ns, settings])
  return Entry(os.path.abspath(path), state)


def load(
  entries: Sequence[Entry],
  kind: str,
  build: Callable[[str, pathlib.Path | None], Arrays],
  *,
  holds: Callable[[pathlib.Path, Arrays], bool] | None = None,
) -> list[tuple[Arrays, pathlib.Path | None]]:
  """Loads indices; makes those that aren't there, or no longer hold.

  Several processes that ask for the same divide the work: each file is read by
  one of them, and the others wait.

  Args:
    entries: What to load the indices of.
    kind: The kind of source, which names the index.
    build: Makes an index of a path: arrays of numbers or texts by name. It is
      also given the file that will have it, or None if none can be written, for
      what it keeps beside that.
    holds: Whether what was kept beside an index still is there.

  Returns:
    The arrays of each entry, and the file that has them.

  Raises:
    Exception: Whatever `build` raises.
  """

  def read(place: pathlib.Path, key: str) -> Arrays | None:
    found = _read(place, key)
    if found is None or (holds is not None and not holds(place, found)):
      return None
    return found

  def attempt(entry: Entry) -> tuple[Arrays, pathlib.Path | None] | None:
    key = json.dumps([_VERSION, kind, entry.state])
    places = _places(entry.path, kind)
    for place in places:
      found = read(place, key)
      if found is not None:
        return found, place
    for place in places:
      if not _is_writable(place.parent):
        continue
      claim = claims.take(place.with_suffix(".claim"))
      if claim is None:
        return None  # Another process is at it.
      try:
        # It may have come to its end between the two looks.
        arrays = read(place, key)
        if arrays is None:
          arrays = build(entry.path, place)
          _write(place, key, arrays)
        return arrays, place
      finally:
        claim.release()
    return build(entry.path, None), None

  # A job that is asked to leave does so between its steps, where its state is
  # saved, and here only if it would wait for others.
  found = {entry: attempt(entry) for entry in entries}
  waiting = [entry for entry, arrays in found.items() if arrays is None]
  found.update(zip(waiting, claims.share(waiting, attempt), strict=True))
  return [arrays for entry in entries if (arrays := found[entry]) is not None]


def _places(path: str, kind: str) -> list[pathlib.Path]:
  """Lists where an index may be, best first."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  own = pathlib.Path(home) / "gradmimic_jax" / "sources"
  places = [own / _file_name(path, kind, path)]
  if "://" not in path:
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    # Named by what is beside it alone: both may be mounted elsewhere.
    name = _file_name(path, kind, os.path.basename(path))
    places.insert(0, pathlib.Path(folder) / FOLDER / name)
  return places


def _file_name(path: str, kind: str, told_by: str) -> str:
  readable = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(path))[:60]
  digest = hashlib.sha256(os.fsencode(told_by)).hexdigest()[:12]
  return f"{readable}.{kind}.{digest}.npz"


def _is_writable(folder: pathlib.Path) -> bool:
  """True if files can be written in a folder, which is made."""
  try:
    folder.mkdir(parents=folder.name != FOLDER, exist_ok=True)
    is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)  # And no link.
  except OSError:
    return False
  return is_folder and os.access(folder, os.W_OK | os.X_OK)


def _read(path: pathlib.Path, key: str) -> Arrays | None:
  """Reads an index; None unless it is there, whole, and of that key."""
  try:
    arrays = read_npz(path, most=_MOST_BYTES)
    if str(arrays.pop(_KEY)) != key:
      return None
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError) as error:
    logging.warning("The index %s is made anew: %s", path, error)
    return None
  return arrays


def _write(path: pathlib.Path, key: str, arrays: Arrays) -> None:
  try:
    with _files.replacing(path) as file:
      np.savez(file, allow_pickle=False, **arrays, **{_KEY: np.array(key)})
  except OSError as error:
    logging.warning("The index %s can't be kept: %s", path, error)


def read_npz(path: str | os.PathLike, *, most: int) -> Arrays:
  """Reads an `.npz` file of numbers and texts into memory.

  Args:
    path: The file. The archive's checksums are compared.
    most: Bytes that its arrays may have in all.

  Returns:
    The arrays by name.

  Raises:
    OSError: If it isn't there, or the system refuses.
    ValueError: If it is damaged, holds objects or claims more than `most`; in
      one line that names it.
  """
  arrays = {}
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise ValueError(f"{os.fspath(path)} is no file, but a folder or device")
  with (
    _files.named(path, "archive of arrays (.npz)"),
    zipfile.ZipFile(path) as archive,
  ):
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > most:
      raise ValueError(f"it claims {total:,} bytes; the limit is {most:,}")
    for member in members:
      content = bytearray(member.file_size)
      with archive.open(member) as file:
        view, place = memoryview(content), 0
        while part := file.read(1 << 24):
          view[place : place + len(part)] = part
          place += len(part)
      if place != len(content):
        raise ValueError(f"{member.filename} is shorter than it claims")
      name = member.filename.removesuffix(".npy")
      where = f"{os.fspath(path)}: {name}"
      arrays[name] = _files.parse_npy(content, where)
  return arrays
