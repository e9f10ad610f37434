"""Arrays that are kept on disk: whole or not there, checked when read back."""

import hashlib
import io
import pathlib

import numpy as np
from absl import logging

from experiments import workdir as workdir_lib


def read(file: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
  """The array that `write` left, or None.

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
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.shape == shape and array.dtype == np.float32:
      return array
  logging.warning("%s is damaged; it is computed again.", file)
  return None


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
  """The array as the content of a `.npy` file."""
  content = io.BytesIO()
  np.save(content, array, allow_pickle=False)
  return content.getvalue()


def _sum_file(file):
  return file.with_suffix(".sha256")
