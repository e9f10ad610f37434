"""A small convolutional network."""

import itertools

import jax
from flax import nnx

from experiments.models import patches, transformer


class ConvNet(nnx.Module):
  """3x3 convolution, group norm, relu and 2x2 mean-pool a stage; linear head.

  With a patch size of P the first convolution sees patches of P x P pixels as
  one pixel of more channels, which costs a P^2-th.

  Group norm, because batch norm couples the samples of a batch: a sample's
  gradient would then depend on its batch mates. Mean-pool, because the forward
  derivative of max-pool is sixteen times as slow on CPUs as all the rest.
  """

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    widths: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    patch_size: int = 1,
    dtype: str | None = None,
  ):
    patches.check(input_shape, patch_size, "model.patch_size")
    if any(width % 8 for width in widths):
      raise ValueError(
        f"config.model.widths is {widths}; a convnet's widths must be multiples"
        " of 8, the number of its normalisation groups."
      )
    self.patch_size = patch_size
    channels = (input_shape[-1] * patch_size**2, *widths)
    self.stages = nnx.List(
      nnx.Conv(a, b, (3, 3), dtype=dtype, rngs=rngs)
      for a, b in itertools.pairwise(channels)
    )
    self.norms = nnx.List(
      nnx.GroupNorm(width, num_groups=8, dtype=dtype, rngs=rngs)
      for width in widths
    )
    self.head = nnx.Linear(channels[-1], num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, num_classes]`."""
    return transformer.widen(self.head(self.features(images)))

  def features(self, images: jax.Array) -> jax.Array:
    """Maps images to the head's input, `[B, widths[-1]]`."""
    hidden = patches.cut(images, self.patch_size)
    for conv, norm in zip(self.stages, self.norms, strict=True):
      hidden = jax.nn.relu(norm(conv(hidden)))
      hidden = nnx.avg_pool(hidden, (2, 2), strides=(2, 2), padding="SAME")
    return transformer.widen(hidden).mean(axis=(1, 2))
