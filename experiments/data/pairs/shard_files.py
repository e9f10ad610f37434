"""Webdataset shards as files: lists of their names, and writing them."""

import io
import itertools
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from experiments.runtime import workdir as workdir_lib

_MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar(\.\w+)?)$", re.IGNORECASE)
_UID = re.compile(r"[0-9a-f]{32}")


def expand(
  shards: str | os.PathLike | Iterable[str | os.PathLike],
) -> list[str]:
  """Expands a list of shards into paths, in its order.

  Args:
    shards: A path, a folder (all `.tar` files in it, by name), or a list of
      them. In a path, `{00000..00127}` stands for each of those numbers, as
      wide as the first, and `{a,b}` for each of those words.

  Returns:
    Paths, each once.

  Raises:
    FileNotFoundError: If a file is not there, or a folder has no `.tar` file.
    ValueError: If there is no shard, one comes twice, or braces don't match.

  Example:
    >>> names("part-{a,b}/{08..10}.tar")[1:4]
    ['part-a/09.tar', 'part-a/10.tar', 'part-b/08.tar']
  """
  if isinstance(shards, (str, os.PathLike)):
    shards = [shards]
  paths: list[str] = []
  for pattern in shards:
    for path in names(os.fspath(pattern)):
      path = os.path.expanduser(path)
      if not os.path.isdir(path):
        paths.append(path)
        continue
      paths += _list_folder(path)
  if not paths:
    raise ValueError("the list of shards is empty; give at least one path")
  if len(set(paths)) < len(paths):
    twice = next(path for path in paths if paths.count(path) > 1)
    raise ValueError(
      f"the list of shards has {twice!r} more than once; name each shard once"
    )
  missing = [path for path in paths if not os.path.isfile(path)]
  if missing:
    raise FileNotFoundError(
      f"{len(missing)} of {len(paths)} shards are not there, the first is"
      f" {missing[0]!r}; shards are files on this machine, or mounted on it"
    )
  return paths


def _list_folder(path):
  """Lists a folder's shards, by name; tells of files that look like others."""
  # Not ".*": macOS puts "._00000000.tar" beside each.
  names = sorted(x.name for x in os.scandir(path) if x.name[0] != ".")
  found = [os.path.join(path, name) for name in names if name.endswith(".tar")]
  others = [x for x in names if _TAR.search(x) and not x.endswith(".tar")]
  packed = f"{len(others)} like {others[0]!r}" if others else "none packed"
  if not found:
    raise FileNotFoundError(
      f"the folder {path!r} has no .tar file in it ({packed}); expected"
      " uncompressed tar files whose names end in .tar"
    )
  if others:
    logging.warning(
      "%s has %d shards that are read and %s that aren't, as their names don't"
      " end in .tar: unpack what is compressed.",
      path,
      len(found),
      packed,
    )
  return found


def names(pattern: str) -> list[str]:
  """Expands a pattern with braces; the files need not exist.

  Args:
    pattern: As in `expand`.

  Returns:
    The names, the last braces varying fastest.

  Raises:
    ValueError: If braces don't match, or it stands for more than a million.
  """
  pieces = _BRACES.split(pattern)  # Odd ones were in braces.
  if any(brace in piece for piece in pieces[::2] for brace in "{}"):
    raise ValueError(f"the braces in {pattern!r} don't match, or are nested")
  choices: list[Sequence[str]] = []
  total = 1
  for number, piece in enumerate(pieces):
    span = _RANGE.fullmatch(piece) if number % 2 else None
    if span:
      first, last = int(span[1]), int(span[2])
      total *= max(last - first + 1, 0)
      if total > _MOST_SHARDS:
        raise ValueError(f"{pattern!r} stands for more than {_MOST_SHARDS}")
      width = len(span[1])
      choices.append([f"{n:0{width}}" for n in range(first, last + 1)])
    else:
      choices.append(piece.split(",") if number % 2 else [piece])
  return ["".join(chosen) for chosen in itertools.product(*choices)]


def write(
  folder: str | os.PathLike,
  images: Iterable[np.ndarray],
  captions: Sequence[str],
  uids: Sequence[str],
  *,
  samples_per_shard: int = 10_000,
  image_format: str = "jpg",
) -> list[str]:
  """Writes pairs as DataComp's shards: `00000000.tar` and so on.

  Each sample is three members of one name: the image, its caption as `txt`, and
  `json` with its uid. Beside each shard, `00000000_stats.json` says how many
  samples it has. The same pairs give the same bytes.

  Args:
    folder: The shards' folder; made if it isn't there.
    images: uint8 [H, W, 3] each; sizes may differ.
    captions: str [N].
    uids: 32 hexadecimal digits each [N].
    samples_per_shard: Samples in a shard, the last one excepted.
    image_format: "jpg" (quality 95), "png" or "webp" (both lossless).

  Returns:
    The shards' paths.

  Raises:
    ValueError: If a value is out of range, or there are not as many images as
      captions and uids.
    FileExistsError: If the folder has shards already.

  Example:
    >>> import tempfile
    >>> image = np.zeros((8, 8, 3), np.uint8)
    >>> write(tempfile.mkdtemp(), [image], ["black"], ["0" * 32])
    ['...00000000.tar']
  """
  savers: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
  }
  if image_format not in savers:
    raise ValueError(
      f"image_format must be one of {sorted(savers)}, got {image_format!r}"
    )
  if samples_per_shard < 1:
    raise ValueError(
      f"samples_per_shard must be positive, got {samples_per_shard}"
    )
  bad = [uid for uid in uids if not _UID.fullmatch(uid)]
  if bad:
    raise ValueError(
      f"{len(bad)} uids are not 32 lower-case hexadecimal digits, the first is"
      f" {bad[0]!r}"
    )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.glob("*.tar")):
    raise FileExistsError(f"{folder} has shards in it; choose another folder")
  samples = enumerate(zip(images, captions, uids, strict=True))
  written: list[str] = []
  while batch := list(itertools.islice(samples, samples_per_shard)):
    content = io.BytesIO()
    with tarfile.open(
      fileobj=content, mode="w", format=tarfile.USTAR_FORMAT
    ) as tar:
      for number, (image, caption, uid) in batch:
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, **savers[image_format])
        parts = {
          image_format: encoded.getvalue(),
          "json": json.dumps({"uid": str(uid)}).encode(),
          "txt": str(caption).encode(),
        }
        for suffix, part in parts.items():
          member = tarfile.TarInfo(f"{number:09d}.{suffix}")
          member.size = len(part)
          tar.addfile(member, io.BytesIO(part))
    path = folder / f"{len(written):08d}.tar"
    workdir_lib.write_bytes(path, content.getvalue())
    stats = path.with_name(f"{path.stem}_stats.json")
    workdir_lib.write_json(stats, {"successes": len(batch)})
    written.append(str(path))
  return written
