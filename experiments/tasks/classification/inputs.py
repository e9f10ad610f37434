"""What a model sees of a batch, made of it inside the jitted step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime import programs

# The fields of a batch that a step is given.
SEEN = ("image", "row", "flipped", "label", "mask")
Expand = Callable[[Any, Any], dict[str, jax.Array]]


def check_scaling(
  mean: Sequence[float], std: Sequence[float], channels: int | None
) -> None:
  """Raises ValueError unless there is one number each, or one per channel."""
  for name, values in (("mean", mean), ("std", std)):
    if len(values) not in (1, channels):
      raise ValueError(
        f"{name} must be one number or one per channel, {channels}, got shape"
        f" {np.shape(values)}"
      )
  if not (np.asarray(std) > 0).all():
    raise ValueError(f"std must be positive, got {list(std)}")


@programs.once
def make_expand(mean: Sequence[float], std: Sequence[float]) -> Expand:
  """Makes the function that gathers, mirrors and normalises images.

  Args:
    mean: subtracted from pixels scaled to [0, 1]; one number or one a channel.
    std: then divides them.

  Returns:
    `expand(batch, resident) -> batch`: `row` becomes `image`, from `resident`;
    images that `flipped` is true of are mirrored; uint8 becomes float32,
    normalised. A batch that was expanded stays as it is, and so do features.
  """
  # (x / 255 - mean) / std in one multiplication and one addition.
  scale = np.float32(1 / (255 * np.asarray(std)))
  shift = np.float32(-np.asarray(mean) / np.asarray(std))

  def expand(batch, resident):
    batch = dict(batch)
    row, flipped = batch.pop("row", None), batch.pop("flipped", None)
    image = batch.get("image")
    if row is not None:
      # As positions are checked where batches are made.
      image = resident.at[row].get(
        mode="promise_in_bounds", wrap_negative_indices=False
      )
    if image is None:
      return batch
    if flipped is not None:
      mirrored = image[:, :, ::-1]
      image = jnp.where(flipped[:, None, None, None], mirrored, image)
    if image.dtype == jnp.uint8:
      image = image.astype(jnp.float32) * scale + shift
    return batch | {"image": image}

  return expand
