"""Images as files in a folder: by class, or with a table of labels."""

import functools
import hashlib
import os
import stat
from collections.abc import Iterator

import numpy as np
from absl import logging

from experiments.data.sources import (
  base,
  headers,
  index,
  options as options_lib,
  parts,
  ranges,
  splits,
  tables,
)

SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".gif",
  ".bmp",
  ".tif",
  ".tiff",
)
# A set with more bytes is known by names and sizes: to read millions of small
# files takes longer than an epoch.
HASHED_BYTES = 2 << 30
_MOST_DEPTH = 32


def find(options: options_lib.Options, split: str) -> parts.Part:
  """Finds a split of a folder of images.

  Without a table, classes are folders: `PATH/SPLIT/CLASS/...`, or
  `PATH/CLASS/...` whose split is "all"; images may lie deeper. With a table,
  the samples are its rows, and its column of splits says what they belong to
  (without one, all are of "all").

  Ids are the table's, else the files' paths below PATH. The samples of classes'
  folders are in the order of their files' names, then paths; those of a table
  in its order. A slice takes files by a hash of their paths, so that it is a
  random part with every class in it, always the same.

  Args:
    options: `path`, `labels`, the columns and `channels`.
    split: A whole split.

  Returns:
    The Part. Its hash is of the files' content, up to `HASHED_BYTES` in all,
    else of their sizes; names and labels are part of a fingerprint anyway.

  Raises:
    FileNotFoundError: If the folder, or a file in the table, isn't there.
    ValueError: If there is no image, a link leads out of the folder, a table
      names a file twice or one outside, or there is no such split.
  """
  root = os.path.abspath(os.path.expanduser(options.path))
  if not os.path.isdir(root):
    raise FileNotFoundError(
      f"config.data.name names the folder {root!r}, and there is none; expected"
      " a folder of images"
    )
  class_names, ids = None, None
  if options.labels is None:
    paths, labels, class_names = _find_by_class(root, split)
  else:
    paths, labels, ids = _find_by_table(root, options, split)
  files = [os.path.join(root, path) for path in paths]
  states = _find_states(root, paths)
  count = len(files)
  reader = ranges.Ranges(
    files,
    states,
    np.arange(count),
    np.zeros(count, np.int64),
    states[:, 0],
  )
  hashes = [hashlib.sha256(os.fsencode(path)).digest()[:8] for path in paths]
  return parts.Part(
    labels=labels,
    ids=np.array(paths, np.str_) if ids is None else ids,
    content=_hash_content(root, split, options, paths, states),
    reader=reader,
    class_names=class_names,
    channels=options.channels or headers.find_channels(reader, count),
    rank=np.array([int.from_bytes(x, "big") for x in hashes], np.uint64),
  )


def _find_split(root: str, split: str) -> str:
  """Returns the folder of a split."""
  folders = _list_folders(root)
  if split in folders:
    return os.path.join(root, split)
  if split == splits.ALL:
    return root
  raise ValueError(
    f"{root} has no folder {split!r} for that split; it has"
    f" {', '.join(map(repr, folders[:10])) or 'none'}. If these are splits, set"
    " config.data.train_split and config.data.test_split to two of them; if"
    " they are classes, to 'all[:80%]' and 'all[80%:]'"
  )


def _find_by_class(root: str, split: str):
  """Lists files, labels and classes of folders by class."""
  base_folder = _find_split(root, split)
  classes = parts.sort_names(_list_folders(base_folder))
  found: list[tuple[str, str, int]] = []
  others = 0
  above = "" if base_folder == root else f"{split}/"
  for label, name in enumerate(classes):
    for path in _walk(root, f"{above}{name}/"):
      if path.lower().endswith(SUFFIXES):
        found.append((path.rpartition("/")[2], path, label))
      else:
        others += 1
  if not found:
    direct = [
      x for x in os.listdir(base_folder) if x.lower().endswith(SUFFIXES)
    ]
    raise ValueError(
      f"{base_folder} has no image in its {len(classes)} folders"
      f" ({len(direct)} lie beside them, {others} files are of other kinds);"
      f" expected files that end in {', '.join(SUFFIXES)}, in a folder for each"
      " class; for a table of files and labels, set config.data.labels"
    )
  if others:
    logging.info("%s has %d files that are no images.", base_folder, others)
  found.sort()
  labels = np.array([label for _, _, label in found], np.int64)
  return [path for _, path, _ in found], labels, classes


def find_classes(
  options: options_lib.Options, split: str
) -> tuple[str, ...] | None:
  """Names the classes of a split, without a look at its images.

  Args:
    options: As in `find`.
    split: A whole split.

  Returns:
    The names; None if a table has them.

  Raises:
    ValueError: If there is no such split.
  """
  if options.labels is not None:
    return None
  root = os.path.abspath(os.path.expanduser(options.path))
  return parts.sort_names(_list_folders(_find_split(root, split)))


def _list_folders(root: str) -> list[str]:
  with os.scandir(root) as entries:
    found = [entry for entry in entries if not entry.name.startswith(".")]
  for entry in found:
    if entry.is_symlink() and entry.is_dir():
      raise _link(entry.path)
  return sorted(entry.name for entry in found if entry.is_dir())


def _walk(root: str, below: str, depth: int = 0) -> Iterator[str]:
  """Goes through the files below a folder; links must not lead elsewhere.

  Args:
    root: The folder that all is in.
    below: Path of a folder in it, which ends in "/".
    depth: Of this folder.

  Yields:
    Paths in the root.
  """
  if depth > _MOST_DEPTH:
    raise ValueError(
      f"{root}/{below} lies more than {_MOST_DEPTH} folders deep; expected"
      " images by class"
    )
  with os.scandir(os.path.join(root, below)) as entries:
    found = list(entries)
  for entry in found:
    if entry.name.startswith("."):
      continue
    if entry.is_symlink():
      if entry.is_dir() or not _is_inside(entry.path, root):
        raise _link(entry.path)
      yield below + entry.name
    elif entry.is_dir():
      yield from _walk(root, f"{below}{entry.name}/", depth + 1)
    elif entry.is_file():
      yield below + entry.name


def _is_inside(path: str, root: str) -> bool:
  """True if a path, links followed, is of something below the root."""
  real, top = os.path.realpath(path), os.path.realpath(root)
  return os.path.commonpath([real, top]) == top and real != top


def _link(path: str) -> ValueError:
  return ValueError(
    f"{path} is a link that leads out of the folder, or to another folder;"
    " expected files and folders: copy what it leads to, or remove it"
  )


def _find_by_table(root: str, options: options_lib.Options, split: str):
  """Lists files, labels and ids of a table's rows of a split."""
  assert options.labels is not None
  path = os.path.expanduser(options.labels.replace("{split}", split))
  if not os.path.isabs(path) and not os.path.exists(path):
    path = os.path.join(root, path)
  table = tables.read(path, options, needs_files=True)
  files = table.files
  assert files is not None
  base.check_unique(files, path, "file")
  rows = np.arange(len(files))
  if table.splits is not None and split != splits.ALL:
    rows = np.flatnonzero(table.splits == split)
  elif split != splits.ALL and "{split}" not in options.labels:
    raise ValueError(
      f"{path} has no column of splits, so that there is only the split 'all',"
      f" not {split!r}; set config.data.train_split and config.data.test_split"
      " to 'all[:80%]' and 'all[80%:]', or config.data.columns.split"
    )
  if not len(rows):
    there = [] if table.splits is None else np.unique(table.splits).tolist()
    raise ValueError(
      f"{path} has no row of split {split!r}; there are {there[:10]}"
    )
  names = files[rows].tolist()
  for name in names:
    _check_name(name, path)
  ids = None if table.ids is None else table.ids[rows]
  return names, table.labels[rows], ids


def _check_name(name: str, table: str) -> None:
  """Refuses names that lead out of the folder."""
  plain = name.replace("\\", "/")
  if plain.startswith("/") or ".." in plain.split("/") or plain[1:2] == ":":
    raise ValueError(
      f"{table} names the file {name!r}; expected a path below the folder of"
      " images, without '..'"
    )


def _find_states(root: str, paths: list[str]) -> np.ndarray:
  """Returns sizes and times of change [N, 2]; refuses what is no file."""
  states = np.empty((len(paths), 2), np.int64)
  missing = []
  folders: dict[str, bool] = {}
  for row, path in enumerate(paths):
    whole = f"{root}/{path}"
    try:
      about = os.lstat(whole)
      parent = path.rpartition("/")[0]
      if parent not in folders:
        folders[parent] = not parent or _is_inside(f"{root}/{parent}", root)
      if stat.S_ISLNK(about.st_mode) or not folders[parent]:
        if not _is_inside(whole, root):
          raise _link(whole)
        about = os.stat(whole)
    except (FileNotFoundError, NotADirectoryError):
      missing.append(path)
      continue
    if not stat.S_ISREG(about.st_mode):
      raise ValueError(f"{whole} is no file, but a folder or device")
    states[row] = about.st_size, about.st_mtime_ns
  if missing:
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} files are not in {root}, the first is"
      f" {missing[0]!r}; leave them out of the table, or set config.data.name"
      " to the folder that has them"
    )
  return states


def _hash_content(root, split, options, paths, states) -> np.ndarray:
  """Returns hashes [N, 2] of the files' content, or of their sizes."""
  if states[:, 0].sum() > HASHED_BYTES:
    logging.info(
      "The %d files of %s %s have %.1f GB: their fingerprint is of names, sizes"
      " and labels, not of their content.",
      len(paths),
      root,
      split,
      states[:, 0].sum() / 1e9,
    )
    sizes = states[:, 0].astype("<u8")
    return np.stack([sizes, np.zeros_like(sizes)], axis=1)
  listing = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape"))
  listing.update(np.ascontiguousarray(states).tobytes())
  entry = index.Entry(root, listing.hexdigest())
  source = hashlib.sha256(f"{split} {options.labels}".encode()).hexdigest()[:8]
  build = functools.partial(_read_digests, paths=paths)
  ((found, _),) = index.load([entry], f"folder-{source}", build)
  return found["digest"]


def _read_digests(root: str, _, *, paths: list[str]) -> index.Arrays:
  digests = []
  for path in paths:
    with open(os.path.join(root, path), "rb") as file:
      digests.append(base.content_digest(file.read()))
  return {"digest": base.join_digests(digests)}
