"""DataComp's uids: 32 hexadecimal digits as pairs of uint64.

Vectorised and a piece at a time: a hundred million of them are text of 3 GB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradmimic_jax.selection import _ids
from gradmimic_jax.selection._ids import UID

_PIECE = 1 << 20
_BAD = 255


def _digit_values() -> np.ndarray:
  values = np.full(256, _BAD, np.uint8)
  for value, digit in enumerate("0123456789abcdef"):
    values[ord(digit)] = value
  return values


_VALUES = _digit_values()
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


def parse_uids(uids: Any) -> np.ndarray:
  """Uids as the pairs of uint64 that subset files hold.

  f0 = int(uid[:16], 16), f1 = int(uid[16:], 16).

  Args:
    uids: strings [n] of 32 lower-case hexadecimal digits (a list, NumPy or
      Arrow strings), or pairs `u8,u8`, which are returned as they are.

  Returns:
    `u8,u8` [n], in the order they came.

  Raises:
    TypeError: uids that are neither.
    ValueError: uids that aren't [n], or not 32 lower-case hexadecimal digits.

  Example:
    >>> parse_uids(["0123456789abcdef" + 15 * "0" + "a"])
    array([(81985529216486895, 10)], dtype=[('f0', '<u8'), ('f1', '<u8')])

  References:
    Gadre et al., DataComp, https://github.com/mlfoundations/datacomp
  """
  if isinstance(uids, (pa.Array, pa.ChunkedArray)):
    chunks = uids.chunks if isinstance(uids, pa.ChunkedArray) else [uids]
    total, start = sum(map(len, chunks)), 0
    parsed = np.empty(total, UID)
    for chunk in chunks:
      for at in range(0, len(chunk), _PIECE):
        piece = chunk.slice(at, _PIECE)
        parsed[start : start + len(piece)] = _parse_arrow(piece, start)
        start += len(piece)
    return parsed
  array = np.asarray(uids)
  if array.ndim != 1:
    raise ValueError(f"uids has shape {array.shape}; expected [n].")
  if array.dtype == UID:
    return array
  if not len(array):
    return np.empty(0, UID)
  if array.dtype.kind not in "UTO":
    raise TypeError(
      f"uids has dtype {array.dtype}; expected strings of 32 hexadecimal"
      " digits, or pairs of uint64 ('u8,u8')."
    )
  parsed = np.empty(len(array), UID)
  for at in range(0, len(array), _PIECE):
    piece = array[at : at + _PIECE]
    if array.dtype.kind == "U":
      parsed[at : at + _PIECE] = _parse_fixed(piece, at)
      continue
    try:
      strings = pa.array(piece.astype(object), pa.string())
    except pa.ArrowException as error:
      raise TypeError(f"uids are not all strings: {error}.") from error
    parsed[at : at + _PIECE] = _parse_arrow(strings, at)
  return parsed


def format_uids(pairs: np.ndarray) -> pa.Array:
  """The uids of pairs: 32 hexadecimal digits each.

  Args:
    pairs: `u8,u8` [n].

  Returns:
    Arrow strings [n].

  Raises:
    TypeError: pairs of another dtype.

  Example:
    >>> format_uids(np.array([(1, 10)], "u8,u8"))[0].as_py()
    '0000000000000001000000000000000a'
  """
  pairs = np.asarray(pairs)
  if pairs.dtype != UID:
    raise TypeError(f"pairs has dtype {pairs.dtype}; expected 'u8,u8'.")
  pieces = []
  for at in range(0, len(pairs), _PIECE):
    piece = pairs[at : at + _PIECE]
    numbers = np.stack([piece["f0"], piece["f1"]], axis=1).astype(">u8")
    octets = numbers.view(np.uint8).reshape(len(piece), 16)
    digits = np.empty((len(piece), 32), np.uint8)
    digits[:, 0::2] = _DIGITS[octets >> 4]
    digits[:, 1::2] = _DIGITS[octets & 15]
    offsets = np.arange(0, 32 * (len(piece) + 1), 32, dtype=np.int32)
    pieces.append(
      pa.StringArray.from_buffers(
        len(piece), pa.py_buffer(offsets), pa.py_buffer(digits)
      )
    )
  return pa.concat_arrays(pieces) if pieces else pa.array([], pa.string())


def to_arrow(ids: np.ndarray, name: str) -> pa.Array:
  """Converts ids of any kind to Arrow's: integers, or text.

  Args:
    ids: integers, strings, or pairs `u8,u8`, which become 32 digits each.
    name: what errors call them.

  Returns:
    The array.
  """
  return format_uids(ids) if ids.dtype == UID else _ids.to_arrow(ids, name)


def _parse_arrow(strings: pa.Array, start: int) -> np.ndarray:
  if not (
    pa.types.is_string(strings.type) or pa.types.is_large_string(strings.type)
  ):
    raise TypeError(f"uids has type {strings.type}; expected strings.")
  if strings.null_count:
    raise ValueError(f"{strings.null_count} uids are null; expected 32 digits.")
  lengths = pc.binary_length(strings).to_numpy(zero_copy_only=False)
  if (lengths != 32).any():
    _refuse(strings[int(np.flatnonzero(lengths != 32)[0])].as_py(), lengths)
  strings = strings.cast(pa.large_string())
  offsets = np.frombuffer(strings.buffers()[1], np.int64)
  first = int(offsets[strings.offset])
  text = np.frombuffer(strings.buffers()[2], np.uint8)
  return _pairs(text[first : first + 32 * len(strings)].reshape(-1, 32))


def _parse_fixed(strings: np.ndarray, start: int) -> np.ndarray:
  lengths = np.char.str_len(strings)
  if (lengths != 32).any():
    _refuse(str(strings[np.flatnonzero(lengths != 32)[0]]), lengths)
  points = np.ascontiguousarray(strings).view(np.uint32)
  points = points.reshape(len(strings), -1)[:, :32]
  return _pairs(np.minimum(points, 255).astype(np.uint8))


def _pairs(digits: np.ndarray) -> np.ndarray:
  """Pairs of ASCII digits [n, 32]."""
  values = _VALUES[digits]
  bad = np.flatnonzero((values == _BAD).any(axis=1))
  if len(bad):
    _refuse(bytes(digits[bad[0]]).decode("latin-1"), None, len(bad))
  octets = (values[:, 0::2] << 4) | values[:, 1::2]
  numbers = np.ascontiguousarray(octets).view(">u8")
  pairs = np.empty(len(digits), UID)
  pairs["f0"], pairs["f1"] = numbers[:, 0], numbers[:, 1]
  return pairs


def _refuse(example: str, lengths: np.ndarray | None, n: int = 0) -> None:
  if lengths is not None:
    n = int((lengths != 32).sum())
  raise ValueError(
    f"{n} uids are not 32 lower-case hexadecimal digits, the first is"
    f" {example!r}. Shorter ones are padded with zeros on the left:"
    " uid.zfill(32)."
  )
