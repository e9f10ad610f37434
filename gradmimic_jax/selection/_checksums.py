"""Checksums of exported files: a file that was changed is refused.

The checksum of a Parquet file is in it; those of the others, whose bytes are
given by their formats, are in a manifest beside them, `<file>.json`. A file
without one is somebody else's, or of an earlier release, and is read as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gradmimic_jax import _files

FORMAT = "gradmimic_jax.export"
VERSION = 2  # 1 had no checksums
_SELF = "manifest_sha256"  # of the manifest's other entries
_KEYS = {"format", "version", "sha256", "fingerprints", _SELF}
_MAX_MANIFEST = 1 << 20  # bytes
_REMEDY = "Restore it from a copy, or write the filter again."
# A Parquet file's own checksum, of its bytes with zeros in its place. In a JSON
# string the quotes would be escaped, so that this is nobody's text.
IN_FILE = "gradmimic_sha256"
_MARK = f'"{IN_FILE}": "'.encode()
ZEROS = "0" * 64


class Opened(NamedTuple):
  """A file's bytes as they were written, and its manifest's fields."""

  content: bytearray
  fingerprints: dict[str, str]
  version: int  # of the manifest; 0: there is none


def write(
  path: Path,
  write_to: Callable[[io.BufferedRandom], Any],
  fingerprints: Mapping[str, str] | None,
) -> None:
  """Writes a file, whole or not at all, and its manifest.

  Args:
    path: the file; its folder is made if it isn't there.
    write_to: writes the content.
    fingerprints: what the content belongs to.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with _files.replacing(path) as file:
    write_to(file)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  about = {
    "format": FORMAT,
    "version": VERSION,
    "sha256": digest,
    "fingerprints": dict(fingerprints or {}),
  }
  about[_SELF] = _digest(about)
  text = json.dumps(about, indent=2) + "\n"
  _files.write_bytes(_beside(path), text.encode())


def read(path: Path) -> Opened:
  """Reads a file and compares it with its manifest, where it has one.

  Args:
    path: the file.

  Returns:
    Opened(content, fingerprints, version).

  Raises:
    OSError: there is no such file, or the system refuses.
    ValueError: a manifest that is damaged, or of another file.
  """
  content, beside = _files.read_bytes(path), _beside(path)
  if not os.path.lexists(beside):
    return Opened(content, {}, 0)
  about = _files.read_json(beside, max_bytes=_MAX_MANIFEST, remedy=_REMEDY)
  prints = about.get("fingerprints")
  is_right = isinstance(prints, dict) and all(
    isinstance(value, str) for value in prints.values()
  )
  if is_right and about.keys() == {"fingerprints"}:
    return Opened(content, prints, 1)
  if about.get("format") == FORMAT and about.get("version") != VERSION:
    raise ValueError(
      f"{beside} is of version {about.get('version')!r}; this gradmimic_jax"
      f" reads up to {VERSION}. Read it with the release that wrote it."
    )
  stated = about.pop(_SELF, None)
  if not is_right or about.keys() | {_SELF} != _KEYS:
    raise ValueError(
      f"{beside} is damaged, or no manifest of a filter or selection: it has"
      f" {sorted(about)[:8]}. {_REMEDY}"
    )
  if stated != _digest(about):
    raise ValueError(
      f"{beside} is damaged: it doesn't have the checksum that it states."
      f" {_REMEDY}"
    )
  whose = f"{beside}, which is to be deleted if that was on purpose, says"
  _check(hashlib.sha256(content), about["sha256"], path, whose)
  return Opened(content, prints, VERSION)


def seal_parquet(file: io.BufferedRandom) -> None:
  """Puts the checksum of a Parquet file in the place that it has for it.

  Args:
    file: whole, with `IN_FILE` and `ZEROS` as JSON in its metadata.
  """
  file.seek(0)
  digest = hashlib.file_digest(file, "sha256").hexdigest()
  size = file.seek(-8, os.SEEK_END)
  start = size - int.from_bytes(file.read(4), "little")  # of the footer
  file.seek(start)
  place = start + file.read(size - start).rindex(_MARK) + len(_MARK)
  file.seek(place)
  file.write(digest.encode())


def check_parquet(content: bytearray, path: Path) -> bool:
  """Compares a Parquet file's bytes with the checksum in them.

  Args:
    content: of the file.
    path: the file that errors name.

  Returns:
    True if it has a checksum.

  Raises:
    ValueError: the checksum is another one.
  """
  place = content.rfind(_MARK)
  if place < 0:
    return False
  view, place = memoryview(content), place + len(_MARK)
  stated = bytes(view[place : place + len(ZEROS)]).decode("ascii", "replace")
  if stated == ZEROS:  # another tool wrote the table again, metadata and all
    return False
  digest = hashlib.sha256(view[:place])
  digest.update(ZEROS.encode())
  digest.update(view[place + len(ZEROS) :])
  _check(digest, stated, path, "it says")
  return True


def _check(digest: Any, stated: Any, path: Path, whose: str) -> None:
  found = digest.hexdigest()
  if found != stated:
    raise ValueError(
      f"{path} is not what was written, but was cut off, changed or swapped"
      f" afterwards: the SHA-256 of its bytes begins with {found[:12]}, and"
      f" {whose} {str(stated)[:12]!r}. {_REMEDY}"
    )


def _digest(about: Mapping[str, Any]) -> str:
  text = json.dumps(about, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _beside(path: Path) -> Path:
  return path.with_name(path.name + ".json")
