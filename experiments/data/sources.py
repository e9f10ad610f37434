"""Prepared TFDS image-classification sets, decoded into memory."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import os
from typing import Any

import numpy as np
import PIL
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import digits
from experiments.data.pairs import images as images_lib

_FORMATS = images_lib.find_formats(images_lib.OPTIONAL_FORMATS)
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_READ_SIZE = 1024  # Records read at once; one at a time costs twice as much.


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One split of a labelled image data set, in memory and read-only.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N], in 0 .. num_classes - 1.
    ids: str [N], each one different: the feature "id" where the set has one,
      else the sample's split and position, as in "train_00042".
    num_classes: How many classes there are.
    class_names: Their names, in the order of the labels.
    fingerprint: A hash of the set's name, version, split and decoded content.
  """

  images: np.ndarray
  labels: np.ndarray
  ids: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]
  fingerprint: str


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
  if size is not None and size < 1:
    raise ValueError(f"size must be at least 1 pixel, or None; got {size}")
  return _load(name, split, _folder(name, split, data_dir), size)


def of_config(data: Any, split: str) -> Dataset:
  """Loads a split of the set that `config.data` names, resized by its fields.

  Args:
    data: `config.data`: `name`, `data_dir` and `image_size` (0: as they are).
    split: A TFDS split.

  Returns:
    The samples; errors are those of `load`.
  """
  return load(
    data.name, split, data_dir=data.data_dir, size=data.image_size or None
  )


def stored_fingerprint(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> str:
  """Hashes the files that `load` would read, without decoding them.

  Decoding takes many times as long. `Dataset.fingerprint` is another one: files
  that are stored otherwise can have the same content.

  Args:
    name: As in `load`, and so are the others.
    split: A TFDS split.
    data_dir: The folder that holds TFDS data sets.

  Returns:
    32 hexadecimal characters.

  Raises:
    FileNotFoundError: If the set, or one of its files, is not there.
    ValueError: If there is no such set or split.
  """
  data_dir = _folder(name, split, data_dir)
  if name == digits.NAME:
    digits.prepare(data_dir)
  builder = _find(name, data_dir)
  try:
    shards = builder.info.splits[split].file_instructions
  except (KeyError, ValueError, AssertionError) as error:
    raise _no_split(builder, split, error) from error
  words = [builder.info.full_name, PIL.__version__]
  for shard in shards:
    with open(shard.filename, "rb") as file:
      content = hashlib.file_digest(file, "sha256").hexdigest()
    words.append([content, shard.skip, shard.take])
  return _fingerprint(words, ())


def _folder(name, split, data_dir) -> str:
  """Returns the data sets' folder; refuses names that are no text."""
  for option, value in (("name", name), ("split", split)):
    if not isinstance(value, str):
      raise TypeError(f"{option} must be a str, got {value!r}")
  if data_dir is None:
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  data_dir = os.path.expanduser(os.fspath(data_dir))
  if "://" not in data_dir:
    data_dir = os.path.abspath(data_dir)
  return data_dir


@functools.lru_cache(maxsize=4)
def _load(name: str, split: str, data_dir: str, size: int | None) -> Dataset:
  """Loads a split; everything that the result depends on is an argument."""
  if name == digits.NAME:
    digits.prepare(data_dir)
  builder = _find(name, data_dir)
  full_name = builder.info.full_name
  features = _label_features(builder)
  try:
    source = builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
  except NotImplementedError as error:
    raise ValueError(
      f"{full_name} is stored as {builder.info.file_format.value} in "
      f"{data_dir}, expected array_record, which is read without TensorFlow; "
      f"prepare it into another folder: {_command(name, '<folder>')}"
    ) from error
  except (ValueError, AssertionError) as error:
    # TFDS raises either, by what is wrong with the text of the split.
    raise _no_split(builder, split, error) from error
  try:
    what = f"{full_name} {split}"
    images, labels, ids = _decode(source, features, what, size)
  except (RuntimeError, OSError) as error:  # What array_record and PIL raise.
    raise ValueError(
      f"the files of {full_name} in {data_dir} are damaged or missing "
      f"({_first_line(error)}); delete {builder.data_dir} and prepare it again"
    ) from error
  label = features["label"]
  outside = (labels < 0) | (labels >= label.num_classes)
  if outside.any():
    raise ValueError(
      f"{outside.sum()} of {len(labels)} labels of {full_name} {split} lie "
      f"outside 0 .. {label.num_classes - 1} (TFDS marks unlabelled samples "
      "with -1); ask for a labelled split"
    )
  if ids is None or len(np.unique(ids)) < len(ids):
    ids = _positions(builder, split)
  for array in (images, labels, ids):
    array.setflags(write=False)  # Shared by all who load this split.
  return Dataset(
    images=images,
    labels=labels,
    ids=ids,
    num_classes=label.num_classes,
    class_names=tuple(label.names),
    fingerprint=_fingerprint((full_name, split), (images, labels, ids)),
  )


def _no_split(builder, split: str, error: Exception) -> ValueError:
  return ValueError(
    f"split {split!r} of {builder.info.full_name} can't be read "
    f"({_first_line(error)}); there are {sorted(builder.info.splits)}, slices "
    "such as 'train[:10%]' and sums such as 'train+test'"
  )


def _find(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  """Finds the builder of a set that is prepared under `data_dir`."""
  try:
    with _without_advice():
      builder = tfds.builder(name, data_dir=data_dir)
      prepared = builder.is_prepared()
  except tfds.core.registered.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    similar = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {similar[0]!r}?" if similar else "check the name"
    raise ValueError(
      f"no data set named {name!r}: TFDS knows none and {data_dir} holds "
      f"{_prepared_names(data_dir)}; {hint}"
    ) from None
  except ImportError:
    # Its code needs TensorFlow, which reading the prepared files would not.
    prepared = False
  except (ValueError, AssertionError) as error:
    raise ValueError(
      f"data set {name!r} can't be opened in {data_dir}: {_first_line(error)}"
    ) from error
  if not prepared:
    raise FileNotFoundError(
      f"data set {name!r} is not prepared in {data_dir}, which holds "
      f"{_prepared_names(data_dir)}; pass the data_dir that holds it or "
      "prepare it (once, on a machine with TensorFlow and a network): "
      f"{_command(name, data_dir)}"
    )
  return builder


def _command(name: str, data_dir: str) -> str:
  return f"tfds build {name} --data_dir={data_dir} --file_format=array_record"


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [repr(error)])[0]


def _prepared_names(data_dir: str) -> str:
  """Lists the data sets prepared in a folder, for an error text."""
  root = tfds.core.Path(data_dir)
  names = sorted(
    str(path.parent.relative_to(root))
    # Some sets have a configuration between their name and their version.
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
    for path in root.glob(pattern)
  )
  return ", ".join(names) or "no prepared data set"


def _label_features(builder) -> tfds.features.FeaturesDict:
  """Finds the features to read of each sample; checks them for `load`."""
  found = builder.info.features
  found = dict(found) if isinstance(found, tfds.features.FeaturesDict) else {}
  image, label = found.get("image"), found.get("label")
  if not (
    isinstance(image, tfds.features.Image)
    and isinstance(label, tfds.features.ClassLabel)
    and label.num_classes
  ):
    there = {key: type(value).__name__ for key, value in found.items()}
    raise ValueError(
      f"{builder.info.full_name} has the features {there}; expected 'image' "
      "(Image) and 'label' (ClassLabel): choose an image-classification set"
    )
  if image.np_dtype != np.uint8 or image.shape[-1] not in _PIL_MODES:
    raise ValueError(
      f"images of {builder.info.full_name} are {np.dtype(image.np_dtype)} "
      f"{image.shape}; expected uint8 with 1, 3 or 4 channels"
    )
  # Only these are parsed: a set may hold masks, boxes and more beside them.
  wanted = {"image": image, "label": label}
  if isinstance(found.get("id"), tfds.features.Text):
    wanted["id"] = found["id"]
  return tfds.features.FeaturesDict(wanted)


def _decode(source, features, what: str, size: int | None):
  """Decodes every record.

  One thread: parsing holds the interpreter's lock, and with small images two
  threads were measured to take longer than one.

  Args:
    source: The encoded records [N].
    features: The features to read of them.
    what: The set and split, for errors.
    size: Height and width to resize to, or None.

  Returns:
    images uint8 [N, H, W, C], labels int32 [N], and ids [N] or None.
  """
  mode = _PIL_MODES[features["image"].shape[-1]]
  encoded = {"image": tfds.decode.SkipDecoding()}
  images, labels, ids = None, np.empty(len(source), np.int32), []
  for start in range(0, len(source), _READ_SIZE):
    rows = range(start, min(start + _READ_SIZE, len(source)))
    for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
      sample = features.deserialize_example_np(record, decoders=encoded)
      try:
        image = _decode_image(sample["image"], mode, size)
      except images_lib.BadImageError as error:
        raise OSError(f"the image of sample {row}: {error}") from error
      if images is None:
        images = np.empty((len(source), *image.shape), np.uint8)
      if image.shape != images.shape[1:]:
        raise ValueError(
          f"images of {what} vary in size: sample 0 is {images.shape[1:]}, "
          f"sample {row} is {image.shape}; expected one size: set "
          "config.data.image_size (size=), such as 224, to resize them"
        )
      images[row] = image
      labels[row] = sample["label"]
      if "id" in sample:
        ids.append(sample["id"].decode())
  return images, labels, np.array(ids) if ids else None


def _decode_image(encoded: bytes, mode: str, size: int | None) -> np.ndarray:
  """Decodes one image as uint8 [H, W, C].

  Always by Pillow: TFDS takes OpenCV where that is installed, whose JPEG
  pixels differ, and with them the fingerprint.
  """
  # Converted first: the colours of a palette can't be averaged.
  decoded = images_lib.load(encoded, mode, formats=_FORMATS)
  if size is not None and decoded.size != (size, size):
    decoded = decoded.resize((size, size), Image.Resampling.BILINEAR)
  pixels = np.asarray(decoded)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _positions(builder, split: str) -> np.ndarray:
  """Makes ids [N] of each sample's split and its position in that whole split.

  A slice of a split gives a sample the same id as the whole split does.
  """
  starts = {}
  for name, info in builder.info.splits.items():
    start = 0
    for shard in info.file_instructions:
      starts[shard.filename] = (name, start)
      start += shard.examples_in_shard
  ids = []
  for shard in builder.info.splits[split].file_instructions:
    name, start = starts[shard.filename]
    first = start + shard.skip
    ids += [f"{name}_{row:05d}" for row in range(first, first + shard.take)]
  return np.array(ids)


def _fingerprint(words, arrays) -> str:
  """Hashes some words and the content of some arrays."""
  digest = hashlib.sha256(json.dumps(words).encode())
  for array in arrays:
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()[:32]


@contextlib.contextmanager
def _without_advice():
  """Drops TFDS's warning about a folder whose absence our error explains."""

  def keep(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Variant folder")

  logger = logging.getLogger("absl")
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)
