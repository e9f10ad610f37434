"""The blocks of a transformer: attention and MLP, each after a norm."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import config_dict

Initializer = Callable[..., jax.Array]


def gelu(x: jax.Array) -> jax.Array:
  """Computes GELU by the error function, not by its approximation."""
  return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
  """Computes `x sigmoid(1.702 x)`; OpenAI trained its CLIP models with it."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class Kernels(NamedTuple):
  """Initialisers of a block's kernels."""

  attention_in: Initializer
  attention_out: Initializer
  fc1: Initializer
  fc2: Initializer


XAVIER = nnx.initializers.xavier_uniform()
ALL_XAVIER = Kernels(XAVIER, XAVIER, XAVIER, XAVIER)


class Block(nnx.Module):
  """Attention and MLP, each after a norm and added to its input."""

  def __init__(
    self,
    width: int,
    heads: int,
    mlp_width: int,
    epsilon: float,
    dtype: str | None,
    rngs: nnx.Rngs,
    *,
    activation: str = "gelu",
    kernels: Kernels = ALL_XAVIER,
  ):
    self.norm1 = norm(width, epsilon, dtype, rngs)
    self.attention = Attention(width, heads, dtype, rngs, kernels)
    self.norm2 = norm(width, epsilon, dtype, rngs)
    self.mlp = FeedForward(width, mlp_width, dtype, rngs, activation, kernels)

  def __call__(
    self,
    hidden: jax.Array,
    mask: jax.Array | None = None,
    keep: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
  ) -> jax.Array:
    """Maps tokens to tokens.

    Args:
      hidden: `[B, T, width]`.
      mask: bool, for attention as `Attention` takes it.
      keep: picks the tokens to return, `[B, T, width]` to `[B, K, width]`. The
        last block of a model that pools one token needs no others.

    Returns:
      `[B, K, width]`.
    """
    normed = self.norm1(hidden)
    hidden = keep(hidden) + self.attention(normed, keep(normed), mask)
    return hidden + self.mlp(self.norm2(hidden))


class Attention(nnx.Module):
  """Multi-head attention; the softmax is float32 or wider."""

  def __init__(
    self,
    width: int,
    heads: int,
    dtype: str | None,
    rngs: nnx.Rngs,
    kernels: Kernels = ALL_XAVIER,
  ):
    self.heads = heads
    self.query = linear(width, width, dtype, rngs, kernels.attention_in)
    self.key = linear(width, width, dtype, rngs, kernels.attention_in)
    self.value = linear(width, width, dtype, rngs, kernels.attention_in)
    self.out = linear(width, width, dtype, rngs, kernels.attention_out)

  def __call__(
    self,
    hidden: jax.Array,
    asking: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Lets every token attend to the others.

    Args:
      hidden: `[B, T, width]`.
      asking: the tokens `[B, K, width]` that attend; None is hidden.
      mask: bool, broadcastable to `[B, heads, K, T]`, True where a token may
        attend to another; None lets all attend to all.

    Returns:
      `[B, K, width]`.
    """
    asking = hidden if asking is None else asking
    mixed = jax.nn.dot_product_attention(
      self._split(self.query(asking)),
      self._split(self.key(hidden)),
      self._split(self.value(hidden)),
      mask=mask,
      implementation="xla",  # cuDNN's has no forward derivative
    )
    return self.out(mixed.reshape(asking.shape))

  def _split(self, tokens):
    return tokens.reshape(*tokens.shape[:-1], self.heads, -1)


class FeedForward(nnx.Module):
  """The MLP of a block: `fc2(activation(fc1(x)))`."""

  def __init__(
    self,
    width: int,
    mlp_width: int,
    dtype: str | None,
    rngs: nnx.Rngs,
    activation: str = "gelu",
    kernels: Kernels = ALL_XAVIER,
  ):
    self.activation = ACTIVATIONS[activation]
    self.fc1 = linear(width, mlp_width, dtype, rngs, kernels.fc1)
    self.fc2 = linear(mlp_width, width, dtype, rngs, kernels.fc2)

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Maps tokens `[B, T, width]` to tokens of the same shape."""
    return self.fc2(self.activation(self.fc1(hidden)))


def linear(
  inputs: int,
  outputs: int,
  dtype: str | None,
  rngs: nnx.Rngs,
  kernel: Initializer = XAVIER,
  *,
  use_bias: bool = True,
) -> nnx.Linear:
  """Makes a linear layer, `[..., inputs]` to `[..., outputs]`."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=kernel,
    rngs=rngs,
  )


def norm(
  width: int, epsilon: float, dtype: str | None, rngs: nnx.Rngs
) -> nnx.LayerNorm:
  """Makes a layer norm over the last axis."""
  return nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


def activations(config: config_dict.ConfigDict) -> str | None:
  """Reads the dtype of a model's activations; None is that of its parameters.

  Args:
    config: `config.model`, with `dtype` or without.

  Returns:
    The dtype's name.

  Raises:
    ValueError: there is no floating dtype of that name.
  """
  name = config.get("dtype")
  try:
    known = name is None or jnp.issubdtype(jnp.dtype(name), np.inexact)
  except TypeError:
    known = False
  if not known:
    raise ValueError(
      f"config.model.dtype is {name!r}; expected 'bfloat16', 'float16',"
      " 'float32', or None for that of the parameters."
    )
  return name


def widen(values: jax.Array) -> jax.Array:
  """Converts to float32; wider values stay."""
  return values.astype(jnp.promote_types(values.dtype, jnp.float32))
