"""Sources: labelled samples of any kind of data set, by position."""

import functools
import os
from collections.abc import Callable
from typing import Any

from experiments.data.sources import (
  options as options_lib,
  parts,
  whole_splits,
)
from experiments.data.sources.base import Source
from experiments.data.sources.whole_splits import Dataset

__all__ = [
  "Dataset",
  "Source",
  "from_dataset",
  "load",
  "open",
]


TFDS = "tfds"
KINDS = (TFDS, "folder", "parquet", "npz", "features", "webdataset")


def open(data: Any, split: str) -> Source:
  """Opens a split of the set that `config.data` names.

  Labels, ids, class names and the fingerprint are found without decoding an
  image, and kept beside the data (see `index`).

  Args:
    data: `config.data`. `source` is the kind of set, or "" where `name` begins
      with it, as in "folder:photos"; without either it is a set of TFDS's:

        tfds        `tfds.TfdsSource`
        folder      images by class, or with a table: `folder.find`
        parquet     Parquet files, or a folder of `save_to_disk`: `parquet.find`
        npz         images in memory: `arrays.find_images`
        features    vectors in an `.npy` file: `arrays.find_features`
        webdataset  labelled shards: `webdataset.find`

      `name` is the set's name or path, `data_dir` is TFDS's; `labels`,
      `columns` and `channels` are those of `options.Options`. `train_split` and
      `test_split` have to have the same classes.
    split: A split, a slice or a sum, as in `splits.parse`.

  Returns:
    The samples, by position.

  Raises:
    FileNotFoundError: If the set is not there.
    ValueError: If there is no such kind of set, it is damaged or of another
      kind, or its splits have different classes.
  """
  kind, name = _pick_kind(data)
  if kind == TFDS:
    return _open_tfds(name, split, data.data_dir)
  if not isinstance(split, str):
    raise TypeError(f"split must be a str, got {split!r}")
  options = options_lib.read_options(data, name)
  others = [data.get("train_split") or split, data.get("test_split") or split]
  return parts.combine(
    functools.partial(_find(kind), options),
    split,
    others=others,
    name=f"{kind}:{os.path.basename(name.rstrip('/')) or name}",
    where=name,
    peek=functools.partial(_peek(kind), options),
  )


def _pick_kind(data: Any) -> tuple[str, str]:
  """Returns the kind of a set, and its name or path."""
  kind, name = data.get("source") or "", data.name
  if not isinstance(name, str):
    raise TypeError(f"name must be a str, got {name!r}")
  prefix, colon, rest = name.partition(":")
  if not kind:
    # What is no prefix is a version, as in "cifar10:3.0.2".
    kind, name = (prefix, rest) if colon and prefix in KINDS else (TFDS, name)
  elif prefix == kind and colon:
    name = rest
  if kind not in KINDS:
    raise ValueError(
      f"config.data.source is {kind!r}; expected one of {', '.join(KINDS)}, or"
      " '' for a prefix of config.data.name, such as 'folder:photos'"
    )
  if not name:
    raise ValueError(
      f"config.data.name is {data.name!r}; expected a name or path after the"
      " kind of set"
    )
  return kind, name


def _find(kind: str) -> Callable[[options_lib.Options, str], parts.Part]:
  # Only those who read such a set wait for its libraries.
  if kind == "folder":
    from experiments.data.sources import folder

    return folder.find
  if kind == "parquet":
    from experiments.data.sources import parquet

    return parquet.find
  if kind == "webdataset":
    from experiments.data.sources import webdataset

    return webdataset.find
  from experiments.data.sources import arrays

  return arrays.find_images if kind == "npz" else arrays.find_features


def _open_tfds(name, split, data_dir) -> Source:
  # Only those who read such a set wait for its library.
  from experiments.data.sources import tfds

  return tfds.TfdsSource(name, split, data_dir)


def _peek(
  kind: str,
) -> Callable[[options_lib.Options, str], tuple[str, ...] | None]:
  if kind == "folder":
    from experiments.data.sources import folder

    return folder.find_classes
  return lambda options, split: None


def from_dataset(dataset: Any, **options: Any) -> Source:
  """Makes a source of a `datasets.Dataset`; see `hub.from_dataset`."""
  from experiments.data.sources import hub

  return hub.from_dataset(dataset, **options)


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
  return whole_splits.decode_split(_open_tfds(name, split, data_dir), size)
