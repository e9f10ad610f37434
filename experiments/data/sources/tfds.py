"""Prepared TFDS image-classification sets in ArrayRecord, by position."""

import contextlib
import difflib
import functools
import json
import logging
import os
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from experiments.data import digits
from experiments.data.sources import base, index

_CHANNELS = (1, 3, 4)
# What array_record raises, protocol buffers, and parts that aren't there.
_DAMAGE = (RuntimeError, OSError, IndexError, ValueError, message.DecodeError)
_READ_SIZE = 1024  # Records read at once; one at a time costs twice as much.


class TfdsSource(base.Source):
  """One split of a set that is prepared under a folder of TFDS's.

  Ids are the feature "id" where the set has one, else the sample's split and
  position, as in "train_00042". `"digits"` is prepared on first use; every
  other set must have been prepared before.

  Args:
    name: A TFDS name with the features "image" and "label", as in "cifar10",
      "cifar10:3.0.2" or "name/config".
    split: A TFDS split, as in "train", "train[:10%]" or "train+test".
    data_dir: The folder that holds TFDS data sets; by default `TFDS_DATA_DIR`
      or, where that isn't set, `~/tensorflow_datasets`.

  Raises:
    FileNotFoundError: If the set is not prepared under `data_dir`.
    ValueError: If there is no such set or split, or it isn't a set of uint8
      images, each with one class label.
  """

  def __init__(
    self, name: str, split: str, data_dir: str | os.PathLike | None = None
  ):
    data_dir = _folder(name, split, data_dir)
    if name == digits.NAME:
      digits.prepare(data_dir)
    builder = _find(name, data_dir)
    full_name = builder.info.full_name
    image, label, has_id = _check_features(builder)
    # Set first for `damaged`.
    self.name, self.split, self.where = full_name, split, data_dir
    self.remedy = f"delete {builder.data_dir} and prepare it again"
    shards = _find_shards(builder, split)
    self._files = [os.fspath(shard.filename) for shard in shards]
    try:
      entries = [_entry(path, has_id) for path in self._files]
      kept = index.load(
        entries, "tfds", functools.partial(_read_shard, has_id=has_id)
      )
    except _DAMAGE as error:
      raise self.damaged(error) from error
    labels: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    digests: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for number, (shard, (found, _)) in enumerate(
      zip(shards, kept, strict=True)
    ):
      taken = slice(shard.skip, shard.skip + shard.take)
      for whole, name in ((labels, "label"), (ids, "id"), (digests, "digest")):
        whole.append(found[name][taken])
      rows = np.arange(len(found["label"]))[taken]
      places.append(np.stack([np.full_like(rows, number), rows], axis=1))
    self._places = np.concatenate([np.empty((0, 2), np.int64), *places])
    super().__init__(
      name=full_name,
      split=split,
      where=data_dir,
      labels=np.concatenate([np.empty(0, np.int64), *labels]),
      ids=_choose_ids(ids, has_id, builder, split),
      class_names=label.names,
      content=b"".join(digest.tobytes() for digest in digests),
      channels=image.shape[-1],
      shape=None if None in image.shape else tuple(image.shape),
      remedy=self.remedy,
      unlabelled=" (TFDS marks unlabelled samples with -1); ask for a labelled"
      " split",
    )
    self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

  def __getstate__(self):
    return {**self.__dict__, "_readers": {}}

  def read(self, positions: Sequence[int]) -> list[bytes]:
    """See `Source`."""
    places = self._places[self.check_positions(positions)]
    images: list[bytes] = [b""] * len(places)
    for number in np.unique(places[:, 0]):
      rows = np.flatnonzero(places[:, 0] == number)
      try:
        reader = self._readers.get(int(number))
        if reader is None:  # Two threads may open it; either one will do.
          reader = _open(self._files[number])
          self._readers[int(number)] = reader
        records = reader.read(places[rows, 1].tolist())
        for row, record in zip(rows.tolist(), records, strict=True):
          images[row] = _feature(record, "image").bytes_list.value[0]
      except _DAMAGE as error:
        raise self.damaged(error) from error
    return images


def _open(path: str) -> array_record_module.ArrayRecordReader:
  # As array_record's own data source does; that one starts as many threads for
  # each call as there are shards.
  return array_record_module.ArrayRecordReader(
    path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
  )


def _feature(record: bytes, name: str):
  # The protocol buffer as it is: going through TFDS's features takes ten times
  # as long for the same bytes.
  return tf_example_pb2.Example.FromString(record).features.feature[name]


def _read_shard(path: str, _, *, has_id: bool) -> index.Arrays:
  """Reads labels, ids and hashes of images of all records of a file."""
  reader = _open(path)
  labels, ids, digests = [], [], []
  for start in range(0, reader.num_records(), _READ_SIZE):
    stop = min(start + _READ_SIZE, reader.num_records())
    for record in reader.read(list(range(start, stop))):
      features = tf_example_pb2.Example.FromString(record).features.feature
      labels.append(features["label"].int64_list.value[0])
      digests.append(base.content_digest(features["image"].bytes_list.value[0]))
      if has_id:
        ids.append(features["id"].bytes_list.value[0].decode())
  return {
    "label": np.array(labels, np.int64),
    "id": np.array(ids, np.str_) if has_id else np.zeros(len(labels), "U1"),
    "digest": base.join_digests(digests),
  }


def _entry(path: str, has_id: bool) -> index.Entry:
  if "://" not in path:
    return index.file_entry(path, has_id)
  about = tfds.core.Path(path).stat()  # It may be in a cloud's bucket.
  return index.Entry(path, json.dumps([about.length, about.mtime, has_id]))


def _find_shards(builder, split: str):
  """Finds what of which file a split takes."""
  full_name = builder.info.full_name
  try:
    source = builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return source.dataset_info.splits[split].file_instructions
  except NotImplementedError as error:
    raise ValueError(
      f"{full_name} is stored as {builder.info.file_format.value} in "
      f"{builder._data_dir_root}, expected array_record, which is read without "
      "TensorFlow; prepare it into another folder: "
      f"{_command(builder.info.full_name, '<folder>')}"
    ) from error
  except (KeyError, ValueError, AssertionError) as error:
    # TFDS raises any, by what is wrong with the text of the split.
    raise _no_split(builder, split, error) from error


def _choose_ids(ids, has_id: bool, builder, split: str) -> np.ndarray:
  """Returns the set's own ids; positions where they are none, or repeat."""
  if has_id:
    own = np.concatenate([np.empty(0, "U1"), *ids])
    if len(set(own.tolist())) == len(own):
      return own
  return _positions(builder, split)


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
    if os.path.isdir(name):
      hint = f"for a folder of images, say 'folder:{name}'"
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


def _check_features(builder):
  """Finds the features image and label, and whether there is an id."""
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
  if image.np_dtype != np.uint8 or image.shape[-1] not in _CHANNELS:
    raise ValueError(
      f"images of {builder.info.full_name} are {np.dtype(image.np_dtype)} "
      f"{image.shape}; expected uint8 with 1, 3 or 4 channels"
    )
  return image, label, isinstance(found.get("id"), tfds.features.Text)


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
