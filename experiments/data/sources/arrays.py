"""Arrays: images in an `.npz` file, and features in an `.npy` file."""

import functools
import hashlib
import os
import pathlib

import numpy as np

from experiments.data.sources import (
  index,
  options as options_lib,
  parts,
  ranges,
  splits,
  tables,
)
from gradmimic_jax import _files

_MOST_BYTES = 64 << 30  # Of the arrays of an `.npz` file, in memory.
_CHUNK = 1 << 26  # Bytes of features that are looked at in one go.
_IMAGES = ("images", "image", "x", "data")
_LABELS = ("labels", "label", "y", "targets")
_IDS = ("ids", "id")
_CLASSES = "class_names"


class Images:
  """Reads images that are in memory; a copy elsewhere loads them again."""

  def __init__(self, path: str, state: tuple[int, int], name: str):
    self._about = (path, state, name)
    self._images = _load(path, state)[name]

  def __reduce__(self):
    return Images, self._about

  def read(self, rows: np.ndarray) -> list[np.ndarray]:
    """Returns images [H, W, C]."""
    picked = self._images[rows]
    return list(picked[..., None] if picked.ndim == 3 else picked)


def find_images(options: options_lib.Options, split: str) -> parts.Part:
  """Finds a split of an `.npz` file, whose arrays are loaded into memory.

  For a split such as "train" the file has `train_images` and `train_labels`, or
  `x_train` and `y_train`; `images` and `labels` are those of "all". With
  `{split}` in the path, a file has one split. There may be `ids` and
  `class_names`. Labels are numbers or texts, [N] or [N, 1].

  Args:
    options: `path`.
    split: A whole split.

  Returns:
    The Part; images are uint8 [N, H, W, C] or [N, H, W].

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If it is damaged, holds objects, or lacks these arrays.
  """
  path = os.path.abspath(os.path.expanduser(options.path))
  path = path.replace("{split}", split)
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"config.data.name names the file {path!r}, and there is none; expected"
      " an .npz file with images and labels"
    )
  state = ranges.file_state(path)
  arrays = _load(path, state)
  bare = split == splits.ALL or "{split}" in options.path
  image = _pick(arrays, options.image, _IMAGES, split, bare)
  label = _pick(arrays, options.label, _LABELS, split, bare)
  if image is None or label is None:
    raise _lacking(arrays, path, split, "labels" if image else "images")
  images, labels = arrays[image], arrays[label]
  channels = images.shape[-1] if images.ndim == 4 else 1
  if (
    images.dtype != np.uint8
    or images.ndim not in (3, 4)
    or channels not in (1, 3, 4)
    or 0 in images.shape[1:]
  ):
    raise ValueError(
      f"{image} of {path} is {images.dtype} {images.shape}; expected images,"
      " uint8 [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels"
    )
  labels = _flat_labels(labels, f"{label} of {path}", len(images))
  own = _pick(arrays, options.id, _IDS, split, bare)
  ids = splits.make_ids(split, len(images))
  if own is not None:
    ids = arrays[own].astype(np.str_)
    if ids.shape != (len(images),):
      raise ValueError(
        f"{own} of {path} is {ids.shape}; expected {(len(images),)}"
      )
  names = arrays.get(_CLASSES)
  return parts.Part(
    labels=labels,
    ids=ids,
    content=_same_for_all(arrays[f"{image}.sha256"].tobytes(), len(images)),
    reader=Images(path, state, image),
    class_names=None if names is None else tuple(map(str, names.tolist())),
    channels=channels,
    shape=(*images.shape[1:3], channels),
  )


def _pick(arrays, wanted, usual, split, bare) -> str | None:
  """Picks the name of an array, by a split's usual names."""
  names = [wanted] if wanted else []
  for name in () if wanted else usual:
    names += [f"{split}_{name}", f"{name}_{split}"]
  if bare and not wanted:
    names += usual
  return next((name for name in names if name in arrays), None)


def _lacking(arrays, path: str, split: str, what: str) -> ValueError:
  there = ", ".join(
    f"{name} {array.dtype} {array.shape}"
    for name, array in arrays.items()
    if not name.endswith(".sha256")
  )
  return ValueError(
    f"{path} has the arrays {there or '(none)'}, none of which are the {what}"
    f" of split {split!r}; expected names such as {split}_{what} (or {what},"
    " for the split 'all'): rename them, set config.data.columns and the"
    " splits, or put {split} in the path"
  )


@functools.lru_cache(maxsize=2)
def _load(path: str, state: tuple[int, int]) -> index.Arrays:
  """Loads an archive, and adds the hash of each array."""
  if ranges.file_state(path) != state:
    raise OSError(f"{path} was changed after the set was opened")
  arrays = index.read_npz(path, most=_MOST_BYTES)
  for name, array in list(arrays.items()):
    array.setflags(write=False)
    digest = hashlib.sha256(np.ascontiguousarray(array).data).digest()
    arrays[f"{name}.sha256"] = np.frombuffer(digest, np.uint8)
  return arrays


def _flat_labels(labels: np.ndarray, where: str, count: int) -> np.ndarray:
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.shape != (count,) or labels.dtype.kind not in "iuU":
    raise ValueError(
      f"{where} is {labels.dtype} {labels.shape}, beside {count} samples;"
      f" expected one integer or text for each, ({count},)"
    )
  if labels.dtype.kind == "U":
    return parts.to_numbers(labels)
  return labels.astype(np.int64)


def _same_for_all(digest: bytes, count: int) -> np.ndarray:
  return np.broadcast_to(np.frombuffer(digest[:16], "<u8"), (count, 2))


class Features:
  """Reads rows of a file that is mapped into memory."""

  def __init__(self, path: str, state: tuple[int, int]):
    self._about = (path, state)
    self._rows = _map(path)
    if ranges.file_state(path) != state:
      raise OSError(f"{path} was changed after the set was opened")

  def __reduce__(self):
    return Features, self._about

  def read(self, rows: np.ndarray) -> list[np.ndarray]:
    """Returns float32 [D] each."""
    return list(np.asarray(self._rows[rows], np.float32))


def find_features(options: options_lib.Options, split: str) -> parts.Part:
  """Finds features in an `.npy` file, which is mapped into memory.

  Args:
    options: `path`, with `{split}` in it, or a file whose only split is "all":
      float16 or float32 [N, D]. `labels`: an `.npy` file [N] of numbers or
      texts, or a table with a row for each; None: `X_labels.npy`, `.csv` or
      `.parquet` beside `X.npy`. In a table, a column of ids is used.
    split: A whole split.

  Returns:
    The Part.

  Raises:
    FileNotFoundError: If a file isn't there.
    ValueError: If a file is damaged, rows don't match labels, or a value isn't
      finite.
  """
  path = os.path.abspath(os.path.expanduser(options.path))
  path = path.replace("{split}", split)
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"config.data.name names the file {path!r}, and there is none; expected"
      " an .npy file of features, float16 or float32 [N, D]"
    )
  if split != splits.ALL and "{split}" not in options.path:
    raise ValueError(
      f"{path} is one set without splits; put {{split}} in its name, or set"
      " config.data.train_split and config.data.test_split to slices such as"
      " 'all[:80%]' and 'all[80%:]'"
    )
  rows = _map(path)
  ((found, _),) = index.load(
    [index.file_entry(path)], "features", _hash_features
  )
  if found["bad"]:
    raise ValueError(
      f"{found['bad']} of {len(rows)} rows of {path} have values that aren't"
      f" finite, the first is row {found['first']}; compute them again"
    )
  beside = _find_labels(path, options, split)
  ids = None
  if beside.endswith(".npy"):
    labels = _files.read_npy(beside)
  else:
    table = tables.read(beside, options, needs_files=False)
    labels, ids = table.labels, table.ids
  labels = _flat_labels(labels, beside, len(rows))
  return parts.Part(
    labels=labels,
    ids=splits.make_ids(split, len(rows)) if ids is None else ids,
    content=np.broadcast_to(found["digest"], (len(rows), 2)),
    reader=Features(path, ranges.file_state(path)),
    channels=None,
    shape=(rows.shape[1],),
  )


def _find_labels(path, options, split) -> str:
  if options.labels is not None:
    beside = os.path.expanduser(options.labels.replace("{split}", split))
    if not os.path.exists(beside):
      beside = os.path.join(os.path.dirname(path), beside)
    if os.path.isfile(beside):
      return beside
    raise FileNotFoundError(
      f"config.data.labels is {options.labels!r}, and there is no such file;"
      f" expected the labels of {path}"
    )
  stem = str(pathlib.Path(path).with_suffix(""))
  names = [f"{stem}_labels{x}" for x in (".npy", ".csv", ".tsv", ".parquet")]
  for name in names:
    if os.path.isfile(name):
      return name
  raise FileNotFoundError(
    f"{path} has no labels beside it, such as {names[0]}; set"
    " config.data.labels to their file"
  )


def _map(path: str) -> np.memmap:
  with _files.named(path, "NumPy file of plain values"):
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(rows, np.memmap):
      raise ValueError("it is an archive of several, .npz")
  if (
    rows.ndim != 2
    or not rows.size
    or rows.dtype
    not in (
      np.float16,
      np.float32,
    )
  ):
    raise ValueError(
      f"{path} holds {rows.dtype} {rows.shape}; expected features, float16 or"
      " float32 [N, D], at least one of each: convert them with"
      " .astype(np.float32)"
    )
  return rows


def _hash_features(path: str, _) -> index.Arrays:
  """Hashes a file, and counts its rows that aren't finite."""
  rows = _map(path)
  digest = hashlib.blake2b(repr((rows.dtype.str, rows.shape)).encode())
  bad, first = 0, -1
  step = max(1, _CHUNK // (rows.shape[1] * rows.itemsize))
  for start in range(0, len(rows), step):
    part = np.ascontiguousarray(rows[start : start + step])
    digest.update(part.data)
    wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
    if len(wrong) and first < 0:
      first = start + int(wrong[0])
    bad += len(wrong)
  return {
    "digest": np.frombuffer(digest.digest()[:16], "<u8"),
    "bad": np.array(bad),
    "first": np.array(first),
  }
