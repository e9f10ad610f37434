"""Images in Parquet files, as the Hugging Face Hub has them, and Arrow files.

A column of images is a struct of `bytes` and `path`, or bytes. What is stored
without compression (as `datasets` writes images) is found in the file itself
and read from there. A compressed column can only be unpacked in pages of up to
some hundred images, so its images are copied once, to a file beside the index.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from absl import logging
from pyarrow import parquet

from experiments.data.sources import (
  base,
  columns as columns_lib,
  headers,
  index,
  options as options_lib,
  parts,
  ranges,
  splits,
  tables,
)
from gradmimic_jax import _files

_COPY = ".images"  # Ending of the file of unpacked images, beside the index.
_ROWS = 64  # Images in memory at once.
_BUFFER = 1 << 20  # Bytes.


def find(options: options_lib.Options, split: str) -> parts.Part:
  """Finds a split of Parquet or Arrow files.

  Args:
    options: `path`: a file, a folder, or a pattern (`splits.find_files`); or a
      folder that `datasets` wrote with `save_to_disk`. The columns, `channels`.
    split: A whole split.

  Returns:
    The Part. Ids are those of a column, else the split and the position.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If a file is damaged or lacks a column, or a row has no image
      or no label.
  """
  files = _find_files(options.path, split)
  build = functools.partial(_read_file, options=options)
  settings = [options.image, options.label, options.id]
  entries = [index.file_entry(path, *settings) for path in files]
  kind = "parquet"
  if any(settings):  # So that two readers of two columns don't take turns.
    kind += f"-{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"
  kept = index.load(entries, kind, build, holds=_has_copy)
  found = [arrays for arrays, _ in kept]
  sources: list[str] = []
  states: list[tuple[int, int]] = []
  numbers: list[np.ndarray] = []
  for entry, (arrays, place) in zip(entries, kept, strict=True):
    # Of each file, what is in itself and what is in its copy.
    copy = "" if place is None else os.fspath(_copy_path(place))
    numbers.append(arrays["copied"].astype(np.int64) + len(sources))
    sources += [entry.path, copy]
    states += [entry.file_state, tuple(arrays["copy_state"].tolist())]
  names = {_stated_names(arrays) for arrays in found}
  if len(names) > 1:
    raise ValueError(
      f"the files of split {split!r} in {options.path} name different classes;"
      " write all of them with the same features"
    )
  labels = [arrays["label"] for arrays in found]
  if len({each.dtype.kind == "U" for each in labels}) > 1:
    raise ValueError(
      f"labels of {options.path} are texts in one file and numbers in another;"
      " expected one kind"
    )
  joined = {
    name: np.concatenate([arrays[name] for arrays in found])
    for name in ("digest", "offset", "size")
  }
  count = len(joined["size"])
  reader = ranges.Ranges(
    sources,
    np.array(states, np.int64),
    np.concatenate(numbers),
    joined["offset"],
    joined["size"],
  )
  has_ids = all("id" in arrays for arrays in found)
  return parts.Part(
    labels=parts.to_numbers(np.concatenate(labels)),
    ids=np.concatenate([arrays["id"] for arrays in found])
    if has_ids
    else splits.make_ids(split, count),
    content=joined["digest"],
    reader=reader,
    class_names=names.pop(),
    channels=options.channels or headers.find_channels(reader, count),
  )


def _find_files(path: str, split: str) -> list[str]:
  """Finds a split's files, of `save_to_disk` too."""
  root = os.path.abspath(os.path.expanduser(path)).replace("{split}", split)
  for folder in (os.path.join(root, split), root):
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
      continue
    if folder == root and split != splits.ALL and "{split}" not in path:
      break
    about = _files.read_json(state, remedy="Save the data set again.")
    with _files.named(state, remedy="Save the data set again."):
      if about.get("_indices_data_files"):
        raise ValueError("it has a file of indices; call flatten_indices()")
      names = [each["filename"] for each in about["_data_files"]]
      if not names or any(os.path.basename(name) != name for name in names):
        raise ValueError(f"its files are {names}")
    return [os.path.join(folder, name) for name in names]
  if os.path.isfile(os.path.join(root, "state.json")):
    raise ValueError(
      f"{path} is one data set without splits; set config.data.train_split and"
      " config.data.test_split to slices such as 'all[:80%]' and 'all[80%:]'"
    )
  if os.path.isfile(os.path.join(root, "dataset_dict.json")):
    there = sorted(x.name for x in os.scandir(root) if x.is_dir())
    raise ValueError(f"split {split!r} is not in {path}, which has {there}")
  return splits.find_files(path, split, (".parquet",))


def _copy_path(place: pathlib.Path) -> pathlib.Path:
  return place.with_suffix(_COPY)


def _has_copy(place: pathlib.Path, arrays: index.Arrays) -> bool:
  """True if there is the copy that an index was made with, if any."""
  state = tuple(arrays["copy_state"].tolist())
  if not arrays["copied"].any():
    return True
  with contextlib.suppress(OSError):
    return ranges.file_state(_copy_path(place)) == state
  return False


def _stated_names(arrays: index.Arrays) -> tuple[str, ...] | None:
  names = arrays["class_names"]
  return tuple(names.tolist()) if names.ndim else None


def _read_file(
  path: str, place: pathlib.Path | None, *, options: options_lib.Options
) -> index.Arrays:
  """Finds the labels, ids and images of one file, and hashes the images."""
  labels: list[Any] = []
  ids: list[np.ndarray] = []
  digests: list[bytes] = []
  where: list[tuple[int, int, int]] = []
  with (
    _files.named(path, "Parquet or Arrow file", "Fetch or write it again."),
    open(path, "rb") as file,
    contextlib.ExitStack() as stack,
  ):
    opened = _read_arrow if path.endswith(".arrow") else _read_parquet
    schema, batches = opened(path, stack)
    columns = columns_lib.pick_columns(schema, options, path)
    finder = _Finder(file, place, path, stack)
    for within, batch in batches(columns):
      finder.narrow(within)
      row = len(where)
      for image in columns_lib.read_images(batch, columns, row, path):
        digest = base.content_digest(image)
        digests.append(digest)
        where.append(finder.find(image, digest))
      labels.append(columns_lib.read_labels(batch, columns, row, path))
      if columns.id is not None:
        ids.append(
          tables.to_texts(
            pa.chunked_array([batch.column(columns.id)]), columns.id, path
          )
        )
  copied = any(found[0] for found in where)
  state = (0, 0)
  if copied and place is not None:
    state = ranges.file_state(_copy_path(place))
  table = np.array(where, np.int64).reshape(-1, 3)
  arrays = {
    "copied": table[:, 0].astype(bool),
    "offset": table[:, 1],
    "size": table[:, 2],
    "digest": base.join_digests(digests),
    "label": np.concatenate([np.empty(0, np.int64), *labels])
    if not labels or labels[0].dtype.kind != "U"
    else np.concatenate(labels),
    "class_names": np.array(0)
    if columns.class_names is None
    else np.array(columns.class_names, np.str_),
    "copy_state": np.array(state, np.int64),
  }
  if columns.id is not None:
    arrays["id"] = np.concatenate([np.empty(0, "U1"), *ids])
  return arrays


class _Finder:
  """Finds where in a file images lie as they are, or copies them.

  What is found has the same bytes, however the file is laid out.
  """

  def __init__(
    self,
    file: BinaryIO,
    place: pathlib.Path | None,
    path: str,
    stack: contextlib.ExitStack,
  ):
    self._file, self._place, self._path = file, place, path
    self._stack = stack
    # Between which bytes images may lie, and do as far as is known.
    self._within: tuple[int, int] | None = None
    self._range: tuple[int, int] | None = None
    self._cursor = 0
    self._gap = 0 if path.endswith(".arrow") else 4
    # By hash: equal images may be stored once.
    self._seen: dict[bytes, tuple[int, int, int]] = {}
    self._copy: BinaryIO | None = None
    self._copied = 0

  def narrow(self, within: tuple[int, int] | None) -> None:
    """Says between which bytes to look; None: nothing lies there as it is."""
    if within != self._within:
      self._within = self._range = within
      self._cursor = within[0] if within else 0
      self._seen.clear()

  def find(self, image: bytes, digest: bytes) -> tuple[int, int, int]:
    """Returns whether the image was copied, its offset and its size."""
    found = self._seen.get(digest)
    if found is None:
      found = self._seen[digest] = self._find(image)
    return found

  def _find(self, image: bytes) -> tuple[int, int, int]:
    size = len(image)
    if self._range is not None:
      start, stop = self._range
      offset = self._search(image, self._cursor, stop)
      if offset < 0:
        offset = self._search(image, start, self._cursor + size)
      if offset >= 0:
        self._cursor = max(self._cursor, offset + size)
        return 0, offset, size
      self._range = None  # In an encoding of another kind: don't look again.
    if self._copy is None:
      self._copy = self._open_copy()
    self._copy.write(image)
    self._copied += size
    return 1, self._copied - size, size

  def _search(self, image: bytes, start: int, stop: int) -> int:
    """Finds an image's bytes in a part of the file; -1: they aren't there."""
    # Mostly it is just behind the one before, in Parquet with its length
    # between them, and the first step is enough.
    step = self._gap
    while start + len(image) <= stop:
      wanted = min(step + len(image), stop - start)
      part = os.pread(self._file.fileno(), wanted, start)
      if part.endswith(image):  # Much faster than `find`.
        return start + len(part) - len(image)
      found = part.find(image)
      if found >= 0:
        return start + found
      if len(part) < wanted:
        break
      start += max(wanted - len(image), 0) + 1
      step = _BUFFER
    return -1

  def _open_copy(self) -> BinaryIO:
    stored = os.fstat(self._file.fileno()).st_size
    remedy = (
      "write the file with its images uncompressed, as by"
      " pyarrow.parquet.write_table(table, path, compression='none')"
    )
    if self._place is None:
      raise ValueError(
        f"the images of {self._path} are compressed, and neither its folder nor"
        " the user's cache can be written to for a copy that can be read by"
        f" position; {remedy}"
      )
    path = _copy_path(self._place)
    free = shutil.disk_usage(path.parent).free
    if free < stored:
      raise ValueError(
        f"the images of {self._path} are compressed, and {path.parent} has no"
        f" room for a copy that can be read by position ({free:,} bytes free,"
        f" {stored:,} or more needed); {remedy}"
      )
    logging.info(
      "The images of %s are compressed in it. They are unpacked once, to %s"
      " (about %.1f GB), to be read by position.",
      self._path,
      path,
      stored / 1e9,
    )
    return self._stack.enter_context(_files.replacing(path))


def _read_parquet(path: str, stack: contextlib.ExitStack):
  """Opens a Parquet file: its schema, and a function for its batches."""
  # Page by page: otherwise a whole row group comes into memory, and one may be
  # all of a file.
  file = stack.enter_context(
    parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
  )

  def read(
    columns: columns_lib.Columns,
  ) -> Iterator[tuple[Any, pa.RecordBatch]]:
    footer = file.metadata
    for number in range(footer.num_row_groups):
      group = footer.row_group(number)
      chunks = [group.column(i) for i in range(group.num_columns)]
      chunk = next(x for x in chunks if x.path_in_schema == columns.stored)
      start = chunk.data_page_offset
      if chunk.dictionary_page_offset is not None:
        start = min(start, chunk.dictionary_page_offset)
      within = None
      if chunk.compression == "UNCOMPRESSED":
        within = (start, start + chunk.total_compressed_size)
      for batch in file.iter_batches(
        batch_size=_ROWS, row_groups=[number], columns=columns.read
      ):
        yield within, batch

  return file.schema_arrow, read


def _read_arrow(path: str, stack: contextlib.ExitStack):
  """Opens an Arrow file, of either kind, as `_read_parquet` does."""
  # Not mapped into memory: all of a file that is read would count as used.
  source = stack.enter_context(pa.OSFile(path))
  size = source.size()
  if source.read(6) == b"ARROW1":
    file = pa.ipc.open_file(source)
    whole = (file.get_batch(i) for i in range(file.num_record_batches))
  else:
    source.seek(0)
    file = pa.ipc.open_stream(source)
    whole = iter(file)

  def read(
    columns: columns_lib.Columns,
  ) -> Iterator[tuple[Any, pa.RecordBatch]]:
    del columns
    for batch in whole:
      for start in range(0, batch.num_rows, _ROWS):
        yield (0, size), batch.slice(start, _ROWS)

  return file.schema, read
