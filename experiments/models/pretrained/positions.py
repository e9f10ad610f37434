"""Resizing a grid of position embeddings."""

import math
from typing import Any

import numpy as np
from absl import logging


def fit(
  stored: np.ndarray,
  grid: tuple[int, int],
  *,
  stored_grid: tuple[int, int] | None = None,
  others: int,
  antialias: bool,
  align_corners: bool,
  name: Any,
) -> np.ndarray:
  """Fits stored position embeddings to a model's grid of patches.

  Args:
    stored: `[others + T, D]`.
    grid: the model's number of rows and columns.
    stored_grid: that of the stored ones, where it is known. Else it is a
      square, or, where T is no square, the model's own if that has T patches.
    others: number of embeddings in front of those of the patches.
    antialias: as `resize` takes it.
    align_corners: as `resize` takes it.
    name: their file, for the log and for errors.

  Returns:
    `[others + rows * columns, D]`: stored, or float64 where it was resized.

  Raises:
    ValueError: nothing tells their grid.
  """
  tokens = len(stored) - others
  side = math.isqrt(tokens)
  if stored_grid is None:
    if side * side == tokens:
      stored_grid = side, side
    elif tokens == math.prod(grid):
      stored_grid = grid
    else:
      raise ValueError(
        f"{name} has {tokens} position embeddings for patches, which don't make"
        f" a square, and the model has {grid[0]}x{grid[1]} patches; those of"
        " other grids are interpolated if the file's config.json tells the"
        " size of its images."
      )
    if tokens == math.prod(grid) and grid[0] != grid[1]:
      logging.warning(
        "%s: nothing says of which grid its %d position embeddings are; they"
        " are taken for %dx%d.",
        name,
        tokens,
        *stored_grid,
      )
  if stored_grid == grid:
    return stored
  logging.warning(
    "%s: position embeddings are resized from %dx%d to %dx%d.",
    name,
    *stored_grid,
    *grid,
  )
  resized = resize(
    stored[others:].reshape(*stored_grid, -1).astype(np.float64),
    grid,
    antialias=antialias,
    align_corners=align_corners,
  )
  return np.concatenate(
    [stored[:others], resized.reshape(math.prod(grid), -1)], axis=0
  )


def resize(
  embeddings: np.ndarray,
  grid: tuple[int, int],
  *,
  antialias: bool,
  align_corners: bool,
) -> np.ndarray:
  """Interpolates a grid of embeddings bicubically.

  Args:
    embeddings: `[rows, columns, D]`.
    grid: the new number of rows and columns.
    antialias: wider filters where the grid shrinks, and the kernel with
      a = -1/2 instead of -3/4, as torch has it.
    align_corners: corners come to lie on corners, not borders on borders.

  Returns:
    `[*grid, D]`, float64.
  """
  rows, columns = (
    _interpolation(old, new, antialias, align_corners)
    for old, new in zip(embeddings.shape, grid, strict=False)
  )
  return np.einsum("ai,bj,ijd->abd", rows, columns, embeddings)


def _interpolation(old, new, antialias, align_corners):
  """Makes the matrix `[new, old]` that resizes one side."""
  target = np.arange(new)
  if antialias:
    scale = old / new
    distances = np.arange(old) + 0.5 - (target[:, None] + 0.5) * scale
    matrix = _cubic(distances / max(scale, 1), -0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)
  if align_corners:
    centers = target * ((old - 1) / max(new - 1, 1))
  else:
    centers = (target + 0.5) * (old / new) - 0.5
  taps = np.floor(centers).astype(int)[:, None] + np.arange(-1, 3)
  matrix = np.zeros((new, old))
  np.add.at(
    matrix,
    (target[:, None], taps.clip(0, old - 1)),  # borders are repeated
    _cubic(centers[:, None] - taps, -0.75),
  )
  return matrix


def _cubic(x, a):
  """Keys' kernel: (a + 2)|x|^3 - (a + 3)|x|^2 + 1, then a(|x| - 1)(|x| - 2)^2.

  Keys, Cubic convolution interpolation, 1981.
  """
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (x - 1) * (x - 2) ** 2
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
