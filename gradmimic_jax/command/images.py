"""Images of a table's samples: found by id, by a column, by number or in order.

They are decoded one at a time, when the page asks for one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gradmimic_jax import _files

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm")
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")
_SIDE = 512  # pixels; what is larger is shrunk at once
_MAX_FILES = 20_000_000  # of a folder
_ENOUGH = 0.5  # of the samples, for a rule to be the right one


class Images:
  """Images by position, as the report takes them.

  Args:
    paths: of each sample's image; None where there is none.
  """

  def __init__(self, paths: Sequence[Path | None]):
    self.paths = paths

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, row: int) -> np.ndarray:
    path = self.paths[row]
    if path is None:
      raise ValueError("no image was found for this sample")
    with _files.named(path, "image"):  # Pillow raises anything for damaged ones
      return decode(path)


def check_pillow() -> None:
  """Raises ImportError if images can't be decoded."""
  try:
    import PIL  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "--images needs Pillow: pip install 'gradmimic_jax[report]'"
    ) from error


def decode(path: Path) -> np.ndarray:
  """Decodes an image, at most 512 pixels on a side, upright.

  Args:
    path: of a regular file, JPEG, PNG, WebP, GIF (its first image), BMP or PPM.

  Returns:
    uint8 [H, W, 3].

  Raises:
    Exception: no image, a damaged one, or one of far too many pixels.
  """
  from PIL import Image, ImageOps

  if not path.is_file():  # to open a pipe would wait
    raise ValueError(f"{path} is no file.")
  with warnings.catch_warnings():
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with Image.open(path, formats=_FORMATS) as image:
      image.draft("RGB", (_SIDE, _SIDE))  # JPEG decodes to a smaller one
      image.thumbnail((_SIDE, _SIDE))
      upright = ImageOps.exif_transpose(image)
      return np.array(upright.convert("RGB"))


def in_column(values: np.ndarray, name: str, base: Path) -> Images:
  """Finds the images that a column has the paths of.

  Args:
    values: strings [N]; absolute paths, or relative to `base` or to the current
      folder.
    name: the column's, for the error.
    base: the folder of the table.

  Returns:
    The Images.

  Raises:
    ValueError: none of them is there.
  """
  bases = [base, Path()]
  for one in bases:
    paths = [_existing(one / value) if value else None for value in values]
    if any(paths):
      return Images(paths)
  raise ValueError(
    f"--images {name}: none of the {len(values):,} files of that column is"
    f" there, such as {values[0]!r} in {base.resolve()}. Expected paths of"
    " images; or give the folder: --images FOLDER"
  )


def in_folder(
  folder: Path,
  ids: np.ndarray,
  columns: Sequence[str],
  read: Callable[[str], np.ndarray],
) -> tuple[Images, str]:
  """Finds the samples' images in a folder and the folders in it.

  Args:
    folder: of images.
    ids: the samples' [N].
    columns: names of columns that may hold the files' names.
    read: reads one of them as strings [N].

  Returns:
    The Images, and how they were found, in words.

  Raises:
    ValueError: no images in the folder, or none of the samples.
  """
  files = _images_in(folder)
  if not files:
    raise ValueError(
      f"--images: {folder} has no images; expected files that end with one of"
      f" {', '.join(SUFFIXES)}."
    )
  by_name = _by_name(files, folder)
  best: tuple[list[Path | None], str] = ([], "")
  most = 0
  for what, names in _candidates(ids, columns, read):
    paths = [by_name.get(name) for name in names]
    found = sum(path is not None for path in paths)
    if found > most:
      best, most = (paths, what), found
    if found >= _ENOUGH * len(ids):
      break
  if not most and len(files) == len(ids) and _are_positions(ids):
    return Images(files), "in the order of their names"
  if not most:
    raise ValueError(
      f"--images: none of the {len(files):,} images in {folder}, such as"
      f" {files[0].name!r}, is one of the {len(ids):,} samples, such as"
      f" {ids[0].item()!r}. Expected files named by id, or a column of names."
    )
  return Images(best[0]), best[1]


def _candidates(ids, columns, read):
  """Yields ways to name each sample's file."""
  yield "by id", [str(value) for value in ids.tolist()]
  if ids.dtype.kind in "iu":
    yield "by number", [f"#{value}" for value in ids.tolist()]
  for column in columns:
    values = read(column).tolist()
    yield f"by column {column!r}", values
    last = [os.path.basename(value.replace("\\", "/")) for value in values]
    yield f"by the names in column {column!r}", last


def _are_positions(ids: np.ndarray) -> bool:
  return ids.dtype.kind in "iu" and bool((ids == np.arange(len(ids))).all())


def _images_in(folder: Path) -> list[Path]:
  found: list[Path] = []
  for root, folders, names in os.walk(folder):  # links to folders aren't taken
    folders.sort()
    found += [
      Path(root, name)
      for name in sorted(names)
      if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if len(found) > _MAX_FILES:
      raise ValueError(
        f"--images: {folder} has more than {_MAX_FILES:,} images"
      )
  return found


def _by_name(files: list[Path], folder: Path) -> dict[str, Path | None]:
  """Files by all that they may be called; None where that's ambiguous."""
  found: dict[str, Path | None] = {}
  for path in files:
    below = path.relative_to(folder)
    names = {
      below.as_posix(),
      below.with_suffix("").as_posix(),
      path.name,
      path.stem,
    }
    if path.stem.isdigit() and len(path.stem) < 19:
      names.add(f"#{int(path.stem)}")
    for name in names:
      found[name] = path if name not in found else None
  return found


def _existing(path: Path) -> Path | None:
  return path if path.is_file() else None
