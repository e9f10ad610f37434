"""Images cut into square patches."""

import jax


def check(input_shape: tuple[int, ...], patch_size: int, field: str) -> None:
  """Raises ValueError unless the patches of `config.<field>` fit the images."""
  rows, columns, _ = input_shape
  if patch_size < 1 or rows % patch_size or columns % patch_size:
    raise ValueError(
      f"images are {rows}x{columns} and config.{field} is {patch_size};"
      " expected a size that divides both sides."
    )


def cut(images: jax.Array, size: int) -> jax.Array:
  """Cuts images `[B, H, W, C]` to `[B, H / size, W / size, size * size * C]`.

  A patch's pixels come row by row with the channels last.
  """
  batch, rows, columns, channels = images.shape
  grid = (rows // size, columns // size)
  images = images.reshape(batch, grid[0], size, grid[1], size, channels)
  return images.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *grid, -1)
