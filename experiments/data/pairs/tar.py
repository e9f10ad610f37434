"""The members of a tar file: where each one lies, and what it is.

Reads headers and nothing else, and never writes. The standard library's
`tarfile` is made to unpack archives, not to distrust them: it takes a damaged
header for the end of the archive and says nothing, reads headers of any size
into memory, gives a sparse file the size it claims, and where Python isn't
patched has loops without end on negative sizes (CVE-2025-8194) and slow ones on
crafted headers (CVE-2024-6232). The format itself is small: blocks of 512
bytes, a header with a checksum before each member (POSIX ustar; GNU long names
and pax headers before it where a name is long).
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from experiments.runtime import limits as limits_lib

BLOCK = 512
FILE = "file"  # The one kind of member whose content is of use.
DIRECTORY = "directory"
ARCHIVE = "archive"  # No member: a name for the whole.
_KINDS = {
  b"0": FILE,
  b"\0": FILE,
  b"7": FILE,
  b"1": "hard link",
  b"2": "symbolic link",
  b"3": "device",
  b"4": "device",
  b"5": DIRECTORY,
  b"6": "named pipe",
  b"S": "sparse file",
  b"V": ARCHIVE,
  b"D": DIRECTORY,
}
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6", b"V")
_PAX_SPARSE = {"GNU.sparse.major", "GNU.sparse.map", "GNU.sparse.size"}
_PAX_KEYS = {"path", "size"} | _PAX_SPARSE
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_PAX_SOLARIS = b"X"


class Member(NamedTuple):
  """One member of a tar file."""

  name: str  # As it stands there: nothing about it is safe.
  kind: str  # FILE, DIRECTORY, ARCHIVE, or another kind.
  offset: int  # Bytes from the start of the tar file to the content.
  size: int  # Bytes of the content.


class DamagedError(Exception):
  """The rest of a tar file can't be read."""


def members(
  file: BinaryIO, *, limits: limits_lib.Limits = limits_lib.DEFAULT
) -> Iterator[Member]:
  """Goes through the members of an uncompressed tar file.

  Args:
    file: A file that can seek. It may be read elsewhere between two members.
    limits: `name_bytes` and `header_bytes`.

  Yields:
    The members, in their order; all of their content is there.

  Raises:
    DamagedError: After the last whole member, if the file is cut off, a header
      is damaged, or this is no tar file. A file that ends between two members,
      without the empty block that closes a tar file, counts as cut off.
  """
  end = file.seek(0, 2)
  place = 0
  about: dict[str, str] = {}  # Fields of extra headers for the next member.
  while True:
    header = _read(file, place, BLOCK, end)
    if not header.strip(b"\0"):
      return
    _check_sum(header, place)
    kind = header[156:157]
    size = _number(header[124:136], place)
    place += BLOCK
    if kind in (_PAX, _PAX_SOLARIS, _LONG_NAME, _PAX_GLOBAL, _LONG_LINK):
      most = limits.name_bytes if kind == _LONG_NAME else limits.header_bytes
      if size > most:
        raise DamagedError(f"an extra header of {size} bytes at byte {place}")
      content = _read(file, place, size, end)
      if kind == _LONG_NAME:
        about["path"] = _text(content)
      elif kind in (_PAX, _PAX_SOLARIS):
        # No others are kept, however many headers there are in a row.
        records = _pax_records(content, place)
        about.update((k, v) for k, v in records if k in _PAX_KEYS)
      # Global pax headers and the targets of links have nothing of use.
      place += _whole_blocks(size)
      continue
    if kind == b"S":
      place = _after_sparse_map(file, header, place, end)
    elif kind in _WITHOUT_CONTENT:
      size = 0
    elif "size" in about:
      size = _decimal(about["size"], place)
    if place + size > end:
      raise DamagedError(
        f"cut off at byte {end}, {place + size - end} bytes before the end of"
        f" member {_shorten(_name(header, about))!r}"
      )
    name = _name(header, about)
    if len(name) > limits.name_bytes:
      raise DamagedError(f"a name of {len(name)} characters at byte {place}")
    word = _KINDS.get(kind, "member of an unknown kind")
    if word == FILE and about.keys() & _PAX_SPARSE:
      word = "sparse file"
    if word == FILE and name.endswith("/"):
      word = DIRECTORY  # As tar wrote them before there were kinds.
    yield Member(name, word, place, size)
    place += _whole_blocks(size)
    about = {}


def _read(file: BinaryIO, place: int, size: int, end: int) -> bytes:
  if place + size > end:
    raise DamagedError(f"cut off at byte {end}")
  file.seek(place)
  content = file.read(size)
  if len(content) < size:
    raise DamagedError(f"cut off at byte {place + len(content)}")
  return content


def _check_sum(header: bytes, place: int) -> None:
  # The checksum's own field counts as spaces.
  total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
  digits = header[148:156].strip(b" \0")
  if not _is_octal(digits) or int(digits, 8) != total:
    raise DamagedError(
      "not an uncompressed tar file"
      if place == 0
      else f"a damaged header at byte {place}"
    )


def _number(field: bytes, place: int) -> int:
  """Parses a size: octal digits, or binary where those are too few."""
  if field[0] == 0x80:
    return int.from_bytes(field[1:], "big")
  digits = field.strip(b" \0")
  if not _is_octal(digits or b"0"):
    raise DamagedError(f"a size that is no number at byte {place}")
  return int(digits or b"0", 8)


def _is_octal(digits: bytes) -> bool:
  return bool(digits) and not digits.strip(b"01234567")


def _decimal(text: str, place: int) -> int:
  if not (text.isascii() and text.isdigit() and len(text) < 20):
    raise DamagedError(f"a size that is no number at byte {place}")
  return int(text)


def _pax_records(content: bytes, place: int) -> Iterator[tuple[str, str]]:
  """Parses the records of a pax header: length, key=value, end of line."""
  content = content.rstrip(b"\0")
  start = 0  # Not cut off piece by piece: there may be thousands.
  while start < len(content):
    digits, _, _ = content[start : start + 20].partition(b" ")
    end = start + _decimal(_text(digits), place)
    record = content[start + len(digits) + 1 : end]
    key, equals, value = record.partition(b"=")
    if not equals or not value.endswith(b"\n") or end > len(content):
      raise DamagedError(f"a damaged pax header at byte {place}")
    yield _text(key), _text(value[:-1])
    start = end


def _after_sparse_map(
  file: BinaryIO, header: bytes, place: int, end: int
) -> int:
  """Finds the start of an old GNU sparse file's content."""
  goes_on = header[482]
  while goes_on:
    goes_on = _read(file, place, BLOCK, end)[504]
    place += BLOCK
  return place


def _name(header: bytes, about: dict[str, str]) -> str:
  if "path" in about:
    return about["path"]
  name = _text(header[:100])
  prefix = _text(header[345:500])
  if header[257:263] == b"ustar\0" and prefix:
    return f"{prefix}/{name}"
  return name


def _text(content: bytes) -> str:
  return content.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _shorten(name: str) -> str:
  return name if len(name) <= 80 else f"{name[:77]}..."


def _whole_blocks(size: int) -> int:
  return -(-size // BLOCK) * BLOCK
