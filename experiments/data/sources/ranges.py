"""Encoded images as ranges of bytes in files."""

import os
import threading
from collections.abc import Sequence

import numpy as np

from experiments.runtime import limits as limits_lib

_MOST_OPEN = 512  # Files that are kept open.


class Ranges:
  """Reads samples that are each a run of bytes in a file.

  Files may be read by several threads at once, and are opened on first use.

  Args:
    files: Paths.
    states: int64 [F, 2], size in bytes and time of change in nanoseconds of
      each, as they were when the ranges were found.
    number: Integers [N], the file of each sample.
    offset: Integers [N], bytes before it.
    size: Integers [N], its bytes.
    limits: `image_bytes`. Of a larger sample no more is read than shows that
      it is too large: an image whose end is missing, as decoding will find.
  """

  def __init__(
    self,
    files: Sequence[str],
    states: np.ndarray,
    number: np.ndarray,
    offset: np.ndarray,
    size: np.ndarray,
    *,
    limits: limits_lib.Limits = limits_lib.DEFAULT,
  ):
    self._files, self._states = list(files), states
    self._number, self._offset = number, offset
    self._size = np.minimum(size, limits.image_bytes + 1)
    self._keeps_open = len(files) <= _MOST_OPEN
    self._opened: dict[int, int] = {}
    self._lock = threading.Lock()

  def __getstate__(self):
    return {**self.__dict__, "_opened": {}, "_lock": None}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def __del__(self, close=os.close):  # Modules may be gone by then.
    for descriptor in getattr(self, "_opened", {}).values():
      close(descriptor)

  def read(self, rows: np.ndarray) -> list[bytes]:
    """Reads samples; OSError if a file isn't what it was."""
    places = zip(
      self._number[rows].tolist(),
      self._offset[rows].tolist(),
      self._size[rows].tolist(),
      strict=True,
    )
    return [self._read(*place) for place in places]

  def _read(self, number: int, offset: int, size: int) -> bytes:
    if not self._keeps_open:
      descriptor = self._open(number)
      try:
        return self._read_from(descriptor, number, offset, size)
      finally:
        os.close(descriptor)
    descriptor = self._opened.get(number, -1)
    if descriptor < 0:
      with self._lock:
        descriptor = self._opened.get(number, -1)
        if descriptor < 0:
          descriptor = self._opened[number] = self._open(number)
    return self._read_from(descriptor, number, offset, size)

  def _open(self, number: int) -> int:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(self._files[number], flags)
    about = os.fstat(descriptor)
    if [about.st_size, about.st_mtime_ns] != self._states[number].tolist():
      os.close(descriptor)
      raise OSError(
        f"{self._files[number]} was changed after the set was opened"
      )
    return descriptor

  def _read_from(
    self, descriptor: int, number: int, offset: int, size: int
  ) -> bytes:
    content = os.pread(descriptor, size, offset)
    while len(content) < size:  # A signal may cut a long read short.
      more = os.pread(descriptor, size - len(content), offset + len(content))
      if not more:
        raise OSError(f"{self._files[number]} became shorter")
      content += more
    return content


def file_state(path: str | os.PathLike) -> tuple[int, int]:
  """Returns a file's size and time of change."""
  about = os.stat(path)
  return about.st_size, about.st_mtime_ns
