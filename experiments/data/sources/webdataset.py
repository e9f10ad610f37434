"""Labelled images in webdataset shards: tar files with runs of one name."""

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data.pairs import shard_files, tar
from experiments.data.sources import (
  base,
  headers,
  index,
  options as options_lib,
  parts,
  ranges,
  splits,
)
from experiments.runtime import limits as limits_lib
from gradmimic_jax import _files

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_LABELS = ("cls", "json")
_MOST_LABEL = 1000  # Bytes of a `cls` member.


def find(options: options_lib.Options, split: str) -> parts.Part:
  """Finds a split of shards.

  A sample is a run of members of one name, up to the first dot: an image, and
  its class as `cls` (a number or a text) or in a field of `json`. Its id is
  that name, after the shard's where names repeat.

  Args:
    options: `path`: a shard, a folder, a pattern with `*` (`splits.find_files`)
      or braces, `{split}` in it stands for the split. `label`: the field of the
      json; `channels`.
    split: A whole split.

  Returns:
    The Part.

  Raises:
    FileNotFoundError: If a shard isn't there.
    ValueError: If one is damaged, or a sample lacks its image or its class.
  """
  path = options.path.replace("{split}", split)
  if "{" in path:
    files = list(map(os.path.abspath, shard_files.expand(path)))
    if split != splits.ALL and "{split}" not in options.path:
      files = [name for name in files if splits.has_split(name, split)]
      if not files:
        raise ValueError(
          f"split {split!r} of {path} can't be found: no shard has it in its"
          " name; put {split} in the path"
        )
  else:
    files = splits.find_files(options.path, split, (".tar",))
  build = functools.partial(_read_shard, field=options.label)
  entries = [index.file_entry(name, options.label) for name in files]
  found = [x for x, _ in index.load(entries, "webdataset", build)]
  labels = [arrays["label"] for arrays in found]
  ids = np.concatenate([arrays["key"] for arrays in found])
  if len(set(ids.tolist())) < len(ids):
    stems = [os.path.basename(name).removesuffix(".tar") for name in files]
    ids = np.concatenate(
      [
        np.array([f"{stem}/{key}" for key in arrays["key"].tolist()], np.str_)
        for stem, arrays in zip(stems, found, strict=True)
      ]
    )
  joined = {
    name: np.concatenate([arrays[name] for arrays in found])
    for name in ("digest", "offset", "size")
  }
  count = len(ids)
  reader = ranges.Ranges(
    files,
    np.array([entry.file_state for entry in entries], np.int64),
    np.repeat(np.arange(len(files)), list(map(len, labels))),
    joined["offset"],
    joined["size"],
  )
  return parts.Part(
    labels=parts.to_numbers(np.concatenate(labels)),
    ids=ids,
    content=joined["digest"],
    reader=reader,
    channels=options.channels or headers.find_channels(reader, count),
  )


def _read_shard(path: str, _, *, field: str) -> index.Arrays:
  """Finds the samples of one shard, and hashes their images."""
  keys, labels, places, digests = [], [], [], []
  remedy = "Fetch or write the shard again."
  with _files.named(path, "webdataset shard", remedy), open(path, "rb") as file:
    try:
      for key, members in _group(tar.members(file)):
        image, label = _pick(key, members)
        labels.append(_read_label(file, key, label, field))
        content = _read(file, image, limits_lib.DEFAULT.image_bytes)
        keys.append(key)
        places.append((image.offset, image.size))
        digests.append(base.content_digest(content))
    except tar.DamagedError as error:
      raise ValueError(str(error)) from error
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  table = np.array(places, np.int64).reshape(-1, 2)
  return {
    "key": np.array(keys, np.str_),
    "label": np.array(labels, np.str_),
    "offset": table[:, 0],
    "size": table[:, 1],
    "digest": base.join_digests(digests),
  }


def _group(
  members: Iterator[tar.Member],
) -> Iterator[tuple[str, dict[str, tar.Member]]]:
  """Groups the members that follow one another and have one name."""
  now: str | None = None
  found: dict[str, tar.Member] = {}
  for member in members:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if member.kind in (tar.DIRECTORY, tar.ARCHIVE) or not stem:
      continue
    if stem.startswith("__") and stem.endswith("__"):
      continue  # Metadata of the shard, by webdataset's convention.
    extension = extension.lower()
    if extension not in (*_IMAGES, *_LABELS):
      continue
    if member.kind != tar.FILE:
      raise ValueError(
        f"{member.name!r} is a {member.kind}; expected files with content"
      )
    key = f"{folder}/{stem}" if folder else stem
    if key != now:
      if now is not None:
        yield now, found
      now, found = key, {}
    if extension in found:
      raise ValueError(f"sample {key!r} has two files {extension!r}")
    found[extension] = member
  if now is not None:
    yield now, found


def _pick(
  key: str, members: dict[str, tar.Member]
) -> tuple[tar.Member, tar.Member]:
  images = [members[name] for name in _IMAGES if name in members]
  label = members.get("cls") or members.get("json")
  if len(images) != 1 or label is None:
    raise ValueError(
      f"sample {key!r} has the files {sorted(members)}; expected one image and"
      " 'cls' or 'json', one after the other"
    )
  return images[0], label


def _read_label(file, key: str, member: tar.Member, field: str) -> str:
  """Reads a sample's class, as a text."""
  label: Any
  if member.name.lower().endswith(".cls"):
    label = _read(file, member, _MOST_LABEL).decode("utf-8").strip()
  else:
    most = limits_lib.DEFAULT.json_bytes
    content = _read(file, member, most)
    try:
      about = limits_lib.parse_json(content, most=most)
    except ValueError as error:
      raise ValueError(
        f"the json of sample {key!r} can't be read ({error})"
      ) from error
    fields = [field] if field else options_lib.LABEL_NAMES
    about = about if isinstance(about, dict) else {}
    name = next((name for name in fields if name in about), None)
    if name is None:
      raise ValueError(
        f"the json of sample {key!r} has {list(about)[:20]}; expected"
        f" {' or '.join(fields)}: set config.data.columns.label"
      )
    label = about[name]
  if isinstance(label, bool) or not isinstance(label, (int, str)):
    raise ValueError(f"the class of sample {key!r} is {str(label)[:40]!r}")
  if not str(label):
    raise ValueError(f"the class of sample {key!r} is empty")
  return str(label)


def _read(file, member: tar.Member, most: int) -> bytes:
  """Reads a member's content, up to what the limits allow."""
  if member.size > most:
    raise ValueError(
      f"{member.name!r} has {member.size} bytes; the limit is {most}"
    )
  file.seek(member.offset)
  return file.read(member.size)
