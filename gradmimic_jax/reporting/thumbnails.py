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
  content = base64.b64encode(_png(_shrunk(pixels, side))).decode()
  return f"data:image/png;base64,{content}"


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
  """Shrinks to at most side x side, in proportion: a pixel is a box's mean."""
  longer = max(pixels.shape[:2])
  if longer <= side:
    return pixels
  mean = pixels.astype(np.float64)
  for axis in (0, 1):
    size = pixels.shape[axis]
    wanted = max(1, round(size * side / longer))
    starts = np.arange(wanted) * size // wanted
    lengths = np.diff(np.r_[starts, size])
    mean = np.add.reduceat(mean, starts, axis=axis)
    mean /= lengths.reshape([-1 if i == axis else 1 for i in range(3)])
  return mean.round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
  height, width, channels = pixels.shape
  header = struct.pack(
    ">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0
  )
  # Every line begins with the number of its filter, 0 for none.
  lines = np.zeros((height, 1 + width * channels), np.uint8)
  lines[:, 1:] = pixels.reshape(height, -1)
  return b"".join(
    (
      b"\x89PNG\r\n\x1a\n",
      _chunk(b"IHDR", header),
      _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
      _chunk(b"IEND", b""),
    )
  )


def _chunk(name: bytes, content: bytes) -> bytes:
  body = name + content
  return (
    struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
  )
