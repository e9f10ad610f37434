"""EfficientNet-Lite0: an ImageNet backbone that two CPU cores can afford."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import transformer


class Stage(NamedTuple):
  """A stage of blocks; the first block has the stride."""

  blocks: int
  kernel: int  # side of the depthwise kernels, in pixels
  stride: int
  expansion: int  # hidden channels for each input channel; 1 leaves that out
  width: int  # output channels


STEM, TOP = 32, 1280  # channels before the first stage and after the last
STAGES = (
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)


class EfficientNetLite0(nnx.Module):
  """A 3x3 stem, inverted residual blocks, 1x1 convolution, mean, linear head.

  Leaf paths read `stem/kernel`, `blocks/3/1/depthwise/kernel`,
  `blocks/3/1/project_norm/scale`, `top/kernel`, `head/kernel`. Padding is
  TensorFlow's "same".

  The batch norms have no statistics of their own. A norm with frozen mean m and
  variance v is `scale x + bias`, and published weights are loaded so: `scale =
  weight / sqrt(v + epsilon)`, `bias = bias - m scale`. A sample's output then
  depends on that sample alone, which per-sample gradients need; all weights can
  be trained, with the statistics of the pretraining.

  References:
    Tan and Le, EfficientNet, `arXiv:1905.11946
    <https://arxiv.org/abs/1905.11946>`_; the Lite variants have no
    squeeze-and-excitation, and ReLU6 in place of swish.
  """

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    dtype: str | None = None,
  ):
    """Initialises the parameters, float32.

    Args:
      input_shape: of one image, `(H, W, C)`.
      num_classes: width of the output.
      rngs: of the initialisation.
      dtype: of the activations; None is that of the parameters.
    """
    self.stem = nnx.Conv(
      input_shape[-1],
      STEM,
      (3, 3),
      strides=2,
      use_bias=False,
      kernel_init=nnx.initializers.he_normal(),
      dtype=dtype,
      rngs=rngs,
    )
    self.stem_norm = FrozenNorm(STEM, dtype)
    widths = itertools.pairwise((STEM, *(stage.width for stage in STAGES)))
    self.blocks = nnx.List(
      nnx.List(
        Block(width if number else inputs, stage, number, dtype, rngs)
        for number in range(stage.blocks)
      )
      for stage, (inputs, width) in zip(STAGES, widths, strict=True)
    )
    self.top = _pointwise(STAGES[-1].width, TOP, dtype, rngs)
    self.top_norm = FrozenNorm(TOP, dtype)
    self.head = transformer.linear(TOP, num_classes, dtype, rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, num_classes]`, float32."""
    return transformer.widen(self.head(self.features(images)))

  def features(self, images: jax.Array) -> jax.Array:
    """Maps images to the head's input, `[B, 1280]`, float32 or wider."""
    hidden = jax.nn.relu6(self.stem_norm(self.stem(images)))
    for stage in self.blocks:
      for block in stage:
        hidden = block(hidden)
    hidden = jax.nn.relu6(self.top_norm(self.top(hidden)))
    return transformer.widen(hidden).mean(axis=(1, 2))


class Block(nnx.Module):
  """Expansion, depthwise convolution and projection, each with a norm."""

  def __init__(
    self,
    inputs: int,
    stage: Stage,
    number: int,
    dtype: str | None,
    rngs: nnx.Rngs,
  ):
    hidden = inputs * stage.expansion
    stride = 1 if number else stage.stride
    self.expands = stage.expansion > 1
    if self.expands:
      self.expand = _pointwise(inputs, hidden, dtype, rngs)
      self.expand_norm = FrozenNorm(hidden, dtype)
    self.depthwise = Depthwise(hidden, stage.kernel, stride, dtype, rngs)
    self.depthwise_norm = FrozenNorm(hidden, dtype)
    self.project = _pointwise(hidden, stage.width, dtype, rngs)
    self.project_norm = FrozenNorm(stage.width, dtype)
    self.keeps_shape = stride == 1 and inputs == stage.width

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps `[B, H, W, inputs]` to `[B, H / stride, W / stride, width]`."""
    hidden = inputs
    if self.expands:
      hidden = jax.nn.relu6(self.expand_norm(self.expand(hidden)))
    hidden = jax.nn.relu6(self.depthwise_norm(self.depthwise(hidden)))
    hidden = self.project_norm(self.project(hidden))
    return hidden + inputs if self.keeps_shape else hidden


class Depthwise(nnx.Module):
  """A convolution of each channel by itself; its kernel is `[k, k, C]`."""

  def __init__(
    self,
    channels: int,
    size: int,
    stride: int,
    dtype: str | None,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.variance_scaling(
      2.0, "fan_in", "normal", in_axis=(0, 1), out_axis=(), batch_axis=2
    )
    self.kernel = nnx.Param(init(rngs.params(), (size, size, channels)))
    self.stride, self.dtype = stride, dtype

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, C]`."""
    kernel = self.kernel[...].astype(self.dtype or inputs.dtype)
    convolve = (
      convolve_by_shifts
      if jax.default_backend() == "cpu"
      else convolve_in_groups
    )
    return convolve(inputs, kernel, self.stride)


def convolve_in_groups(
  inputs: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """Convolves each channel by itself, with padding "same".

  Args:
    inputs: `[B, H, W, C]`.
    kernel: `[k, k, C]`.
    stride: in both directions, in pixels.

  Returns:
    `[B, H / stride, W / stride, C]`, rounded up.
  """
  return jax.lax.conv_general_dilated(
    inputs,
    kernel[:, :, None],
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=inputs.shape[-1],
  )


def convolve_by_shifts(
  inputs: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """Computes `convolve_in_groups` as a sum of k * k shifted products.

  XLA's CPU backend has no fast convolution in groups; this is several times
  faster there, forward and backward.
  """
  size = len(kernel)
  sides = [-(-side // stride) for side in inputs.shape[1:3]]
  padding = [
    max((out - 1) * stride + size - side, 0)
    for out, side in zip(sides, inputs.shape[1:3], strict=True)
  ]
  padded = jnp.pad(
    inputs,
    [(0, 0), *((total // 2, total - total // 2) for total in padding), (0, 0)],
  )
  spans = [(out - 1) * stride + 1 for out in sides]
  total = jnp.zeros((), inputs.dtype)
  for row, column in itertools.product(range(size), repeat=2):
    part = padded[
      :,
      row : row + spans[0] : stride,
      column : column + spans[1] : stride,
    ]
    total = total + part * kernel[row, column]
  return total


class FrozenNorm(nnx.Module):
  """`scale x + bias` by channel: a batch norm whose statistics are frozen."""

  def __init__(self, channels: int, dtype: str | None):
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))
    self.dtype = dtype

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Maps `[..., C]` to `[..., C]`."""
    scale, bias = (
      x[...].astype(self.dtype or inputs.dtype) for x in (self.scale, self.bias)
    )
    return inputs * scale + bias


def _pointwise(inputs, outputs, dtype, rngs):
  """A 1x1 convolution, as the matrix product that it is."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=False,
    kernel_init=nnx.initializers.he_normal(),
    dtype=dtype,
    rngs=rngs,
  )
