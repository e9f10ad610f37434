"""A multilayer perceptron over flattened images."""

import itertools
import math

import jax
from flax import nnx

from experiments.models import transformer


class MLP(nnx.Module):
  """Linear and relu for each width, then a linear head."""

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    widths: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    dtype: str | None = None,
  ):
    sizes = (math.prod(input_shape), *widths)
    self.body = nnx.List(
      nnx.Linear(a, b, dtype=dtype, rngs=rngs)
      for a, b in itertools.pairwise(sizes)
    )
    self.head = nnx.Linear(sizes[-1], num_classes, dtype=dtype, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, num_classes]`."""
    return transformer.widen(self.head(self.features(images)))

  def features(self, images: jax.Array) -> jax.Array:
    """Maps images to the head's input: pixels `[B, H * W * C]` or a layer."""
    hidden = images.reshape(images.shape[0], -1)
    for layer in self.body:
      hidden = jax.nn.relu(layer(hidden))
    return transformer.widen(hidden)
