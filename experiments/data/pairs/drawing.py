"""Small pictures of coloured shapes, drawn by NumPy alone.

Every shape is a signed distance: negative inside, in units of its radius. A
pixel is covered as far as its centre lies within the shape, which smooths the
edge over one pixel.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

CANVAS = 32.0  # The unit of positions and radii: all pictures are this wide.
_CHUNK = 512  # Objects drawn at once: as many as fit in a core's cache.


def draw(
  *,
  shape: np.ndarray,
  x: np.ndarray,
  y: np.ndarray,
  radius: np.ndarray,
  angle: np.ndarray,
  foreground: np.ndarray,
  background: np.ndarray,
  grain: np.ndarray | float = 0.0,
  image_size: int = 32,
) -> np.ndarray:
  """Draws pictures of up to K objects of one shape and colour.

  `pixel = background (1 - a) + foreground a + grain`, with `a` in [0, 1] the
  share of the pixel that an object covers.

  Args:
    shape: Positions [N] in `SHAPES`, one for all objects of a picture.
    x: Centres of the objects [N, K], from the left, on a canvas 32 wide;
      NaN where a picture has fewer than K.
    y: The same from the top [N, K].
    radius: From the centre to the farthest tip [N].
    angle: The turn of each object [N, K], in radians.
    foreground: Colours of the objects [N, 3], in 0 .. 255.
    background: Colours behind them [N, 3].
    grain: Added to all colours of a pixel [N, S, S].
    image_size: Height and width in pixels, S.

  Returns:
    uint8 [N, S, S, 3].
  """
  count, slots = x.shape
  scale = np.float32(image_size / CANVAS)
  centres = (np.arange(image_size, dtype=np.float32) + 0.5) / scale
  covered = np.zeros((count, image_size, image_size), np.float32)
  for number, distance in enumerate(SHAPES.values()):
    for slot in range(slots):
      there = np.flatnonzero((shape == number) & ~np.isnan(x[:, slot]))
      for start in range(0, len(there), _CHUNK):
        rows = there[start : start + _CHUNK]
        # Distances in radii, so that one formula draws every size.
        size = radius[rows].astype(np.float32)[:, None, None]
        dx = (centres - x[rows, slot, None].astype(np.float32))[:, None, :]
        dy = (centres - y[rows, slot, None].astype(np.float32))[:, :, None]
        turn = angle[rows, slot].astype(np.float32)[:, None, None]
        cosine, sine = np.cos(turn) / size, np.sin(turn) / size
        u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
        inside = np.clip(0.5 - distance(u, v) * size * scale, 0, 1)
        covered[rows] = np.maximum(covered[rows], inside)
  pixels = np.empty((*covered.shape, 3), np.uint8)
  grain = np.broadcast_to(np.float32(grain), covered.shape)
  back = background.astype(np.float32)[:, None, None]
  step = foreground.astype(np.float32)[:, None, None] - back
  for start in range(0, count, _CHUNK):
    some = slice(start, start + _CHUNK)
    for channel in range(3):
      value = covered[some] * step[some, ..., channel]
      value += back[some, ..., channel]
      value += grain[some]
      pixels[some, ..., channel] = np.clip(value, 0, 255, out=value)
  return pixels


def _circle(u, v):
  return np.hypot(u, v) - 1


def _square(u, v):
  return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _triangle(u, v):
  # The picture's y points down: the tip is at the top.
  side = math.sqrt(3) / 2
  return np.maximum(v, side * np.abs(u) - v / 2) - 0.5


def _star(u, v):
  """Five tips: the points inside at least four of a pentagon's five edges."""
  first = np.full(np.broadcast_shapes(u.shape, v.shape), -np.inf, np.float32)
  second = first
  for tip in range(5):
    turn = math.pi * (-0.5 + 0.4 * tip)
    edge = math.cos(turn) * u + math.sin(turn) * v
    second = np.maximum(second, np.minimum(first, edge))
    first = np.maximum(first, edge)
  # Between the pentagram's own edge, cos(72 degrees), and a blunter star,
  # which still has five arms when it is nine pixels wide.
  return second - 0.36


def _cross(u, v):
  u, v = np.abs(u), np.abs(v)
  return np.minimum(np.maximum(u - 1, v - 0.32), np.maximum(u - 0.32, v - 1))


def _ring(u, v):
  return np.abs(np.hypot(u, v) - 0.72) - 0.28


def _diamond(u, v):
  return (np.abs(u) / 0.55 + np.abs(v) - 1) / math.hypot(1 / 0.55, 1)


def _moon(u, v):
  return np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.6, v))


SHAPES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
  "circle": _circle,
  "square": _square,
  "triangle": _triangle,
  "star": _star,
  "cross": _cross,
  "ring": _ring,
  "diamond": _diamond,
  "moon": _moon,
}
