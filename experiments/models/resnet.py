"""A residual network for small images and few cores."""

import itertools

import jax
from flax import nnx

from experiments.models import patches, transformer

GROUPS = 8  # of the normalisation


class ResNet(nnx.Module):
  """A 3x3 stem, stages of residual blocks, mean over the positions, head.

  Every stage but the first halves height and width. Three stages with 1, 2 or 3
  blocks each are the ResNet-8, -14 or -20 for 32-pixel images; the paper's
  widths are (16, 32, 64). Leaf paths read `stem/kernel`,
  `stages/2/0/conv1/kernel`, `stages/2/0/norm1/scale`,
  `stages/2/0/shortcut/kernel`, `head/kernel`.

  With a patch size of P the stem sees patches of P x P pixels as one pixel of
  more channels, and all costs a P^2-th.

  Group norm instead of batch norm, which couples the samples of a batch: a
  sample's gradient would then depend on its batch mates. Mean-pool, because the
  forward derivative of max-pool is slow on CPUs.

  References:
    He et al., Deep Residual Learning for Image Recognition, `arXiv:1512.03385
    <https://arxiv.org/abs/1512.03385>`_; Wu and He, Group Normalization,
    `arXiv:1803.08494 <https://arxiv.org/abs/1803.08494>`_.
  """

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    widths: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    blocks_per_stage: int = 1,
    patch_size: int = 1,
    dtype: str | None = None,
  ):
    """Initialises the parameters, float32.

    Args:
      input_shape: of one image, `(H, W, C)`.
      widths: channels of each stage.
      num_classes: width of the output.
      rngs: of the initialisation.
      blocks_per_stage: residual blocks, of two convolutions each.
      patch_size: pixels taken together, in each direction.
      dtype: of the activations; None is that of the parameters.

    Raises:
      ValueError: no widths or no blocks, widths that can't be normalised, or
        patches that don't fit the images.
    """
    if not widths or any(width < 1 or width % GROUPS for width in widths):
      raise ValueError(
        f"config.model.widths is {widths}; a resnet's widths, one a stage, must"
        f" be multiples of {GROUPS}, the number of its normalisation groups."
      )
    if blocks_per_stage < 1:
      raise ValueError(
        f"config.model.blocks_per_stage is {blocks_per_stage}; expected at"
        " least 1."
      )
    patches.check(input_shape, patch_size, "model.patch_size")
    self.patch_size = patch_size
    self.stem = _conv(
      input_shape[-1] * patch_size**2, widths[0], 3, 1, dtype, rngs
    )
    self.stem_norm = _norm(widths[0], dtype, rngs)
    stages = []
    for number, (inputs, width) in enumerate(
      itertools.pairwise((widths[0], *widths))
    ):
      stride = 2 if number else 1
      first = Block(inputs, width, stride=stride, dtype=dtype, rngs=rngs)
      rest = (
        Block(width, width, stride=1, dtype=dtype, rngs=rngs)
        for _ in range(blocks_per_stage - 1)
      )
      stages.append(nnx.List([first, *rest]))
    self.stages = nnx.List(stages)
    self.head = nnx.Linear(widths[-1], num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, num_classes]`."""
    return transformer.widen(self.head(self.features(images)))

  def features(self, images: jax.Array) -> jax.Array:
    """Maps images to the head's input, `[B, widths[-1]]`."""
    hidden = patches.cut(images, self.patch_size)
    hidden = jax.nn.relu(self.stem_norm(self.stem(hidden)))
    for stage in self.stages:
      for block in stage:
        hidden = block(hidden)
    return transformer.widen(hidden).mean(axis=(1, 2))


class Block(nnx.Module):
  """Two 3x3 convolutions, each with a norm, added to the input."""

  def __init__(
    self,
    inputs: int,
    width: int,
    *,
    stride: int,
    dtype: str | None,
    rngs: nnx.Rngs,
  ):
    self.conv1 = _conv(inputs, width, 3, stride, dtype, rngs)
    self.norm1 = _norm(width, dtype, rngs)
    self.conv2 = _conv(width, width, 3, 1, dtype, rngs)
    self.norm2 = _norm(width, dtype, rngs)
    self.changes_shape = stride > 1 or inputs != width
    if self.changes_shape:
      self.shortcut = _conv(inputs, width, 1, stride, dtype, rngs)
      self.shortcut_norm = _norm(width, dtype, rngs)

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Maps `[B, H, W, inputs]` to `[B, H / stride, W / stride, width]`."""
    change = jax.nn.relu(self.norm1(self.conv1(hidden)))
    change = self.norm2(self.conv2(change))
    if self.changes_shape:
      hidden = self.shortcut_norm(self.shortcut(hidden))
    return jax.nn.relu(hidden + change)


def _conv(inputs, outputs, size, stride, dtype, rngs):
  return nnx.Conv(
    inputs,
    outputs,
    (size, size),
    strides=stride,
    use_bias=False,  # the norm that follows has one
    dtype=dtype,
    kernel_init=nnx.initializers.he_normal(),
    rngs=rngs,
  )


def _norm(width, dtype, rngs):
  return nnx.GroupNorm(width, num_groups=GROUPS, dtype=dtype, rngs=rngs)
