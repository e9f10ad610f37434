"""Sources: labelled samples of any kind of data set, by position."""

import os
from typing import Any

from experiments.data.sources import decoded
from experiments.data.sources.base import Source
from experiments.data.sources.decoded import Dataset

__all__ = [
  "Dataset",
  "Source",
  "load",
  "of_config",
  "open",
  "stored_fingerprint",
]


def open(data: Any, split: str) -> Source:
  """Opens a split of the set that `config.data` names.

  Args:
    data: `config.data`: `source`, `name` and `data_dir`.
    split: The part of the set, as its kind of source names it.

  Returns:
    The samples, by position.

  Raises:
    FileNotFoundError: If the set is not there.
    ValueError: If it is damaged, or not of this kind.
  """
  return _open_tfds(data.name, split, data.data_dir)


def _open_tfds(name, split, data_dir) -> Source:
  # Only those who read such a set wait for its library.
  from experiments.data.sources import tfds

  return tfds.TfdsSource(name, split, data_dir)


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  size: int | None = None,
) -> Dataset:
  """Reads one split of a prepared TFDS data set, with no TensorFlow.

  The split is decoded once and kept for the rest of the process, so a study
  of many runs pays for it once. `"digits"` is prepared on first use; every
  other set must have been prepared before.

  Args:
    name: A TFDS name with the features "image" and "label", as in "cifar10",
      "cifar10:3.0.2" or "name/config".
    split: A TFDS split, as in "train", "train[:10%]" or "train+test".
    data_dir: The folder that holds TFDS data sets; by default `TFDS_DATA_DIR`
      or, where that isn't set, `~/tensorflow_datasets`.
    size: Height and width in pixels to which every image is resized, by
      Pillow's bilinear filter, whatever its proportions; None leaves images as
      they are. All are held in memory: N * size * size * C bytes.

  Returns:
    The samples, in the order in which they are stored.

  Raises:
    FileNotFoundError: If the set is not prepared under `data_dir`.
    ValueError: If there is no such set or split, it isn't a set of uint8
      images, each with one class label, or its images differ in size and
      `size` is None.
  """
  return decoded.decode(_open_tfds(name, split, data_dir), size)


def of_config(data: Any, split: str) -> Dataset:
  """Loads a split of the set that `config.data` names, resized by its fields.

  Args:
    data: `config.data`: `name`, `data_dir` and `image_size` (0: as they are).
    split: A TFDS split.

  Returns:
    The samples; errors are those of `load`.
  """
  return decoded.decode(open(data, split), data.image_size or None)


def stored_fingerprint(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> str:
  """Hashes the files that `load` would read; see `tfds.stored_fingerprint`."""
  from experiments.data.sources import tfds

  return tfds.stored_fingerprint(name, split, data_dir=data_dir)
