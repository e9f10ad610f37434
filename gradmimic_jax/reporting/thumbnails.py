"""Small PNG images as text, for pages that need no other file."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG's numbers, by channels


def data_uri(image: Any, side: int) -> str:
  """Encodes an image as `data:image/png;base64,...`, at most side by side.

  Args:
    image: uint8 [H, W] or [H, W, C], C from 1 (gray) to 4 (RGB and alpha).
    side: in pixels; larger images are averaged down, smaller ones stay.

  Returns:
    The address, which holds the whole image.

  Raises:
    TypeError: an image that isn't uint8.
    ValueError: another shape, or no pixels.

  Example:
    >>> data_uri(np.zeros((2, 2), np.uint8), 64)[:29]
    'data:image/png;base64,iVBORw0'
  """
  content = base64.b64encode(_png(shrunk(image, side))).decode()
  return f"data:image/png;base64,{content}"


def shrunk(image: Any, side: int) -> np.ndarray:
  """Shrinks to at most side x side, in proportion: a pixel is a box's mean.

  Args:
    image: as `data_uri` takes it.
    side: in pixels.

  Returns:
    uint8 [h, w, C].

  Raises:
    TypeError, ValueError: as `data_uri`.
  """
  pixels = np.asarray(image)
  if pixels.dtype != np.uint8:
    raise TypeError(
      f"an image has dtype {pixels.dtype}; expected uint8, 0 to 255."
    )
  if pixels.ndim == 2:
    pixels = pixels[..., None]
  if pixels.ndim != 3 or not pixels.size or pixels.shape[2] not in _COLOR_TYPES:
    raise ValueError(
      f"an image has shape {np.shape(image)}; expected [H, W] or [H, W, C]"
      " with C from 1 to 4."
    )
  longer = max(pixels.shape[:2])
  if longer <= side:
    return pixels
  mean = pixels
  for axis in (0, 1):
    size = pixels.shape[axis]
    wanted = max(1, round(size * side / longer))
    starts = np.arange(wanted) * size // wanted
    lengths = np.diff(np.r_[starts, size])
    mean = np.add.reduceat(mean, starts, axis=axis, dtype=np.float64)
    mean /= lengths.reshape([-1 if i == axis else 1 for i in range(3)])
  return mean.round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
  height, width, channels = pixels.shape
  header = struct.pack(
    ">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0
  )
  lines = _filtered(pixels)
  return b"".join(
    (
      b"\x89PNG\r\n\x1a\n",
      _chunk(b"IHDR", header),
      _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
      _chunk(b"IEND", b""),
    )
  )


def _filtered(pixels: np.ndarray) -> np.ndarray:
  """Makes lines of differences that deflate well, as PNG's section 9 has it.

  Every line begins with the number of its filter; the one whose differences
  are the smallest is taken.
  """
  height, width, channels = pixels.shape
  padded = np.zeros((height + 1, width + 1, channels), np.int16)
  padded[1:, 1:] = pixels
  x, left = padded[1:, 1:], padded[1:, :-1]
  up, corner = padded[:-1, 1:], padded[:-1, :-1]
  guess = left + up - corner
  near = [np.abs(guess - one) for one in (left, up, corner)]
  paeth = np.where(
    (near[0] <= near[1]) & (near[0] <= near[2]),
    left,
    np.where(near[1] <= near[2], up, corner),
  )
  forms = np.stack([x, x - left, x - up, x - (left + up) // 2, x - paeth])
  forms = forms.astype(np.uint8).reshape(5, height, -1)
  best = np.abs(forms.view(np.int8).astype(np.int16)).sum(axis=2).argmin(axis=0)
  lines = forms[best, np.arange(height)]
  return np.concatenate([best[:, None].astype(np.uint8), lines], axis=1)


def _chunk(name: bytes, content: bytes) -> bytes:
  body = name + content
  return (
    struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
  )
