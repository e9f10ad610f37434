"""Reading of files within bounds, and replacement of files as a whole.

`named` turns whatever a parser raises about a damaged file into one line with
the file's name. Files are read into memory first, so that they can be checked
before anything parses them; a header's claims are compared with the file.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import math
import os
import stat
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NPY_MAGIC = b"\x93NUMPY"
_MAX_JSON = 1 << 26  # bytes
_MAX_DEPTH = 64  # of JSON, list in list
_LEFTOVER = 3600  # seconds since a temporary file was last written to


@contextlib.contextmanager
def named(
  path: str | os.PathLike[str], kind: str = "", remedy: str = ""
) -> Iterator[None]:
  """Gives every error of the block the name of the file that it is about.

  Parsers of damaged files raise anything: KeyError, RecursionError,
  MemoryError, an error of Arrow. Errors that name the file already, and
  ImportError, pass as they are.

  Args:
    path: the file that is being read.
    kind: the expected kind, such as "Parquet file".
    remedy: what to do about it; a sentence.

  Yields:
    Nothing.

  Raises:
    OSError: the system refused; its errno is kept.
    ValueError: anything else, in one line.

  Example:
    >>> with named("a.json", "JSON file", "Restore it."):
    ...   {}["format"]
    Traceback (most recent call last):
    ValueError: a.json is damaged or no JSON file (KeyError: 'format'). Restore
    it.
  """
  try:
    yield
  except ImportError:
    raise
  except Exception as error:
    text = " ".join(str(error).split())
    if os.fspath(path) in text:
      if isinstance(error, TypeError):
        raise ValueError(text) from error  # a file's content is a value
      if isinstance(error, (ValueError, OSError)) and "\n" not in str(error):
        raise
    if isinstance(error, OSError) and error.errno:
      reason = error.strerror or text
      raise OSError(error.errno, reason, os.fspath(path)) from error
    if not isinstance(error, ValueError):
      text = f"{type(error).__name__}: {text}".rstrip(": ")
    what = f"damaged or no {kind}" if kind else "damaged"
    shown = text if len(text) <= 200 else text[:199] + "…"
    message = f"{os.fspath(path)} is {what} ({shown.rstrip('.')}). {remedy}"
    raise ValueError(message.rstrip()) from error


def read_bytes(
  path: str | os.PathLike[str], *, max_bytes: int | None = None
) -> bytearray:
  """Reads a file's bytes into memory that can be written to.

  Args:
    path: of a regular file.
    max_bytes: the most bytes that it may have.

  Returns:
    The bytes.

  Raises:
    OSError: there is none, or the system refuses.
    ValueError: a folder, a device, a file with more bytes.
  """
  with named(path):
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait
      raise ValueError(f"{path} is no file, but a folder, pipe or device.")
  with named(path), open(path, "rb") as file:
    about = os.fstat(file.fileno())
    if max_bytes is not None and about.st_size > max_bytes:
      raise ValueError(
        f"{path} has {about.st_size:,} bytes; expected at most {max_bytes:,}."
      )
    content = bytearray(about.st_size)
    if file.readinto(content) != len(content):
      raise ValueError(f"{path} became shorter while it was read.")
  return content


def read_json(
  path: str | os.PathLike[str],
  *,
  kind: type | tuple[type, ...] = dict,
  max_bytes: int = _MAX_JSON,
  remedy: str = "",
) -> Any:
  """Reads a JSON file that is neither huge nor nested without end.

  Args:
    path: the file.
    kind: the type that its outermost value has to have.
    max_bytes: how long it may be.
    remedy: what to do about a damaged one; a sentence for the error.

  Returns:
    The value.

  Raises:
    OSError: there is no such file, or the system refuses.
    ValueError: no JSON, too long or too deep, or another kind of value; in one
      line that names the file.
  """
  content = read_bytes(path, max_bytes=max_bytes)
  return parse_json(bytes(content), path, kind=kind, remedy=remedy)


def parse_json(
  content: bytes | str,
  path: str | os.PathLike[str],
  *,
  kind: type | tuple[type, ...] = dict,
  remedy: str = "",
) -> Any:
  """Parses JSON text of a file, a line or metadata, as `read_json` does.

  Args:
    content: the text, as UTF-8.
    path: the file that errors name.
    kind: the type that its outermost value has to have.
    remedy: what to do about a damaged one.

  Returns:
    The value.

  Raises:
    ValueError: as `read_json`.
  """
  with named(path, "JSON", remedy):
    if isinstance(content, bytes):
      content = content.decode("utf-8")
    value = json.loads(content)
    if not isinstance(value, kind):
      kinds = kind if isinstance(kind, tuple) else (kind,)
      wanted = " or ".join(one.__name__ for one in kinds)
      raise ValueError(f"a {type(value).__name__} where a {wanted} belongs")
    level, depth = [value], 0
    while level:
      depth += 1
      if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
      level = [
        child
        for each in level
        if isinstance(each, (dict, list))
        for child in (each.values() if isinstance(each, dict) else each)
      ]
  return value


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads an `.npy` file of numbers, strings or records of them.

  Args:
    path: the file.

  Returns:
    The array, which can be written to.

  Raises:
    OSError: there is no such file, or the system refuses.
    ValueError: another kind of file, or one whose header claims more or less
      than there is; in one line that names it.
  """
  return parse_npy(read_bytes(path), path)


def parse_npy(
  content: bytes | bytearray, path: str | os.PathLike[str]
) -> np.ndarray:
  """Parses an `.npy` file's bytes, without a copy of them.

  Args:
    content: of the file.
    path: the file that errors name.

  Returns:
    The array; it shares memory with `content`.

  Raises:
    ValueError: as `read_npy`.
  """
  with named(path, "NumPy file of plain values"):
    if content[:4] == b"PK\x03\x04":
      raise ValueError("it is an archive of several, .npz")
    if content[:6] != NPY_MAGIC:
      raise ValueError("it doesn't begin as .npy files do")
    file = io.BytesIO(content[: 1 << 16])  # a header is far shorter
    shape, fortran, dtype = _npy_header(file)
    if dtype.hasobject or not dtype.itemsize:
      raise ValueError(
        f"it holds {dtype}; expected numbers, strings or records of them"
      )
    if any(size < 0 for size in shape):
      raise ValueError(f"its header claims shape {shape}")
    count, found = math.prod(shape), len(content) - file.tell()
    if count * dtype.itemsize != found:
      raise ValueError(
        f"its header claims shape {shape} of {dtype}, which takes"
        f" {count * dtype.itemsize:,} bytes; it has {found:,}"
      )
    array = np.frombuffer(content, dtype, count, file.tell())
    _check_text(array)
    return array.reshape(shape, order="F" if fortran else "C")


def _npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
  version = np.lib.format.read_magic(file)
  read = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read is None:
    raise ValueError(f"it is of version {version}; expected 1.0 or 2.0")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of damaged literals
      return read(file)
  except Exception as error:
    # NumPy's own text may advise to trust the file; nobody should.
    raise ValueError("its header doesn't read") from error


def _check_text(array: np.ndarray) -> None:
  """Raises ValueError for text that no string of Python's can hold."""
  if array.dtype.kind != "U" or not len(array):
    return
  points = np.frombuffer(array, array.dtype.byteorder + "u4")
  if points.max() > 0x10FFFF:
    raise ValueError("it holds text that is no Unicode")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[io.BufferedRandom]:
  """Opens a new file that replaces `path` once it is whole and on the disk.

  Its temporary name is unique across hosts and never that of a link. After an
  error the temporary file is removed; so are those that killed writers of the
  same file left.

  Args:
    path: the file to write; its folder is there.

  Yields:
    The file, to write to and to read.

  Raises:
    OSError: the system refuses, or the disk is full.
  """
  path = Path(path)
  beginning = f".{path.name[:50]}."
  temporary = path.with_name(f"{beginning}{uuid.uuid4().hex}.tmp")
  flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
  for name in ("O_NOFOLLOW", "O_BINARY", "O_CLOEXEC"):  # not on all systems
    flags |= getattr(os, name, 0)
  descriptor = os.open(temporary, flags, 0o666)
  try:
    with open(descriptor, "w+b") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync(path.parent)
  _remove_leftovers(path.parent, beginning)


def write_bytes(path: str | os.PathLike[str], content: Any) -> None:
  """Writes a file so that readers see the old one or the new, not a part.

  Args:
    path: the file; its folder is there.
    content: its bytes.

  Raises:
    OSError: as `replacing`.
  """
  with replacing(path) as file:
    file.write(content)


def sync(folder: Path) -> None:
  """Waits until a folder's list of files is on the disk."""
  if os.name == "posix":  # elsewhere a folder can't be opened to be synced
    opened = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(opened)
    finally:
      os.close(opened)


def _remove_leftovers(folder: Path, beginning: str) -> None:
  """Removes temporary files that nobody has written to for an hour."""
  pattern = glob.escape(beginning) + "[0-9a-f]" * 32 + ".tmp"
  for path in folder.glob(pattern):
    with contextlib.suppress(OSError):  # another process removes it, too
      if time.time() - path.lstat().st_mtime > _LEFTOVER:
        path.unlink()
