"""Arrays that are kept on disk: whole or not there, checked when read back."""

import contextlib
import hashlib
import io
import os
import pathlib
import warnings

import numpy as np
from absl import logging

from experiments.runtime import workdir as workdir_lib


def read(file: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
  """Reads the array that `write` left, or None.

  Args:
    file: a `.npy` file.
    shape: that is expected, of float32.

  Returns:
    The array; None unless it is there, whole and of this shape.
  """
  try:
    content = file.read_bytes()
    expected = _sum_file(file).read_text().strip()
  except FileNotFoundError:
    return None
  except UnicodeDecodeError:
    expected = ""
  if hashlib.sha256(content).hexdigest() == expected:
    with contextlib.suppress(ValueError):
      array = load(file)
      if array.shape == shape and array.dtype == np.float32:
        return array
  logging.warning("%s is damaged; it is computed again.", file)
  return None


def load(file: str | os.PathLike) -> np.ndarray:
  """Reads the array in anybody's `.npy` file, in no more memory than its size.

  Args:
    file: its path.

  Returns:
    The array, in memory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no `.npy` file, is damaged, has Python objects in it, or
      its header claims another size than it has.
  """
  with open(file, "rb") as content:
    if content.read(6) != b"\x93NUMPY":
      raise ValueError(f"{file} is no .npy file")
  try:
    # A map can't be longer than its file; reading would ask for the memory
    # that the header claims.
    with warnings.catch_warnings(action="error"):
      array = np.load(file, mmap_mode="r", allow_pickle=False)
      size = array.offset + array.nbytes
  except OSError:
    raise
  except Exception as error:  # numpy reads headers as Python's own syntax
    raise ValueError(
      f"{file} can't be read as a .npy file:"
      f" {(str(error).splitlines() or [type(error).__name__])[0]}"
    ) from error
  if size != os.path.getsize(file):
    raise ValueError(
      f"{file} can't be read as a .npy file: it has {os.path.getsize(file)}"
      f" bytes, and by its header {size}"
    )
  return np.array(array)


def write(file: pathlib.Path, array: np.ndarray) -> None:
  """Keeps an array, with its checksum beside it, where the disk allows it."""
  content = as_npy(array)
  total = hashlib.sha256(content).hexdigest()
  try:
    workdir_lib.write_bytes(file, content)
    workdir_lib.write_bytes(_sum_file(file), f"{total}\n".encode())
  except OSError as error:
    # Someone else's folder, or a full disk: the run itself needs no cache.
    logging.warning("%s can't be kept (%s).", file, error)


def as_npy(array: np.ndarray) -> bytes:
  """Encodes the array as the content of a `.npy` file."""
  content = io.BytesIO()
  np.save(content, array, allow_pickle=False)
  return content.getvalue()


def _sum_file(file):
  return file.with_suffix(".sha256")
