"""Checksums of a checkpoint's files, in the checkpoint.

They are CRC-32, which notices changed bytes, though no forger, and is several
times faster than a sum that notices him. Each process writes those of the files
that it has written, before the checkpoint gets its name.
"""

import pathlib
import re
import zlib

from gradmimic_jax import _files

_NAME = "checksums_{}.txt"
_LINE = re.compile(r"([0-9a-f]{8}) (\d+) (\S.*)")
_CHUNK = 1 << 22  # bytes read at a time
# Files that are written after everything else, and that no run depends on.
_LEFT_OUT = ("_CHECKPOINT_METADATA", "commit_success.txt")
_SAVING = ".orbax-checkpoint-tmp"
_BEING_SAVED = f"*{_SAVING}*"
_OWN = "ocdbt.process_{}"  # the folders that a process writes


def write_own(folder: pathlib.Path, process: int) -> None:
  """Writes checksums of the files that a process, not the first, has written.

  Args:
    folder: with the checkpoint that is being saved.
    process: its number.
  """
  for saving in folder.glob(_BEING_SAVED):
    own = saving.glob(f"*/{_OWN.format(process)}")
    _write(saving, process, [path for top in own for path in _files_in(top)])


def write_rest(folder: pathlib.Path) -> None:
  """Writes checksums of all files of a checkpoint that have none yet.

  Args:
    folder: with the checkpoint that is being saved.
  """
  for saving in folder.glob(_BEING_SAVED):
    known = _read(saving)
    rest = [
      path for path in _files_in(saving) if _name(saving, path) not in known
    ]
    _write(saving, 0, rest)


def check(folder: pathlib.Path, part: int = 0, parts: int = 1) -> bool:
  """Compares a checkpoint's files with their checksums.

  Args:
    folder: the checkpoint's.
    part: number of the part of the files to read.
    parts: number of parts.

  Returns:
    True if there are checksums: earlier releases wrote none.

  Raises:
    ValueError: a file is missing, is not as it was, or has no checksum.
    OSError: a file can't be read.
  """
  known = _read(folder)
  if not known:
    return False
  there = {_name(folder, path) for path in _files_in(folder)}
  for name in sorted(known.keys() ^ there):
    what = "is missing" if name in known else "has no checksum"
    raise ValueError(f"{folder / name} {what}")
  for name in sorted(known)[part::parts]:
    found = _file_checksum(folder / name)
    if found != known[name]:
      raise ValueError(
        f"{folder / name} is damaged: its checksum and size are {found}, and"
        f" were {known[name]}"
      )
  return True


def _files_in(folder):
  return [
    path
    for path in sorted(folder.rglob("*"))
    if path.is_file()
    and path.name not in _LEFT_OUT
    and not path.match(_NAME.format("*"))
    and not path.name.startswith(".")
  ]


def _name(folder, path):
  """Returns a file's name in the checkpoint, whose folders are renamed last."""
  parts = path.relative_to(folder).parts
  return "/".join(part.partition(_SAVING)[0] for part in parts)


def _file_checksum(path):
  total = size = 0
  with open(path, "rb") as file:
    while chunk := file.read(_CHUNK):
      total = zlib.crc32(chunk, total)
      size += len(chunk)
  return f"{total:08x}", size


def _step(folder):
  return folder.name.partition(".")[0]


def _write(folder, number, paths):
  lines = [f"checkpoint {_step(folder)}"]
  for path in paths:
    total, size = _file_checksum(path)
    lines.append(f"{total} {size} {_name(folder, path)}")
  body = "".join(line + "\n" for line in lines).encode()
  end = f"{zlib.crc32(body):08x}\n".encode()
  _files.write_bytes(folder / _NAME.format(number), body + end)


def _read(folder):
  """Reads `{name: (checksum, size)}` of all lists."""
  known = {}
  for path in sorted(folder.glob(_NAME.format("*"))):
    content = bytes(_files.read_bytes(path))
    body, end = content[:-9], content[-9:]
    if end != f"{zlib.crc32(body):08x}\n".encode():
      raise ValueError(f"{path} is damaged")
    head, *lines = body.decode().splitlines()
    if head != f"checkpoint {_step(folder)}":
      raise ValueError(f"{path} is of another one ({head})")
    for line in lines:
      match = _LINE.fullmatch(line)
      if match is None:
        raise ValueError(f"{path} is damaged")
      total, size, name = match.groups()
      known[name] = total, int(size)
  return known
