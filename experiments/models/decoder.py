"""A decoder-only transformer: it predicts each token from those before it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from experiments.models import transformer
from experiments.runtime import programs


class Decoder(nnx.Module):
  """Embeddings, causal pre-norm blocks, final norm, linear head.

  Leaf paths read `token_embed/embedding`, `position_embed`,
  `blocks/5/attention/query/kernel`, `blocks/5/mlp/fc1/kernel`,
  `final_norm/scale`, `head/kernel`. A tied head has no kernel of its own: it
  multiplies with `token_embed/embedding`.

  References:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019,
    section 2.3 (GPT-2).
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    context_length: int,
    rngs: nnx.Rngs,
    width: int,
    depth: int,
    heads: int,
    mlp_width: int,
    tied: bool = False,
    activation: str = "gelu",
    norm_epsilon: float = 1e-5,
    dtype: str | None = None,
  ):
    """Initialises the parameters, float32.

    Args:
      vocab_size: number of tokens, V.
      context_length: the most tokens that a sequence may have.
      rngs: of the initialisation.
      width: of a token's features.
      depth: number of blocks.
      heads: of the attention; each sees `width / heads` features.
      mlp_width: of the hidden layer in each block's MLP.
      tied: whether the head is the token embedding.
      activation: one of `transformer.ACTIVATIONS`.
      norm_epsilon: added to the variance in every norm.
      dtype: of the activations; None is that of the parameters.

    Raises:
      ValueError: a width that the heads don't divide, or an unknown activation.
    """
    if width % heads:
      raise ValueError(
        f"config.model.decoder.width is {width} and heads is {heads}; expected"
        " a width that the heads divide."
      )
    if activation not in transformer.ACTIVATIONS:
      raise ValueError(
        f"config.model.decoder.activation is {activation!r}; expected one of"
        f" {', '.join(transformer.ACTIVATIONS)}."
      )
    self.context_length = context_length
    normal = nnx.initializers.normal(stddev=0.02)
    # A block's output shrinks with their number, as the sum must not grow.
    out = nnx.initializers.normal(stddev=0.02 / (2 * depth) ** 0.5)
    kernels = transformer.Kernels(normal, out, normal, out)
    self.token_embed = nnx.Embed(
      vocab_size, width, dtype=dtype, embedding_init=normal, rngs=rngs
    )
    self.position_embed = nnx.Param(
      normal(rngs.params(), (context_length, width))
    )
    self.blocks = nnx.List(
      transformer.Block(
        width,
        heads,
        mlp_width,
        norm_epsilon,
        dtype,
        rngs,
        activation=activation,
        kernels=kernels,
      )
      for _ in range(depth)
    )
    self.final_norm = transformer.norm(width, norm_epsilon, dtype, rngs)
    self.tied = tied
    if not tied:
      self.head = transformer.linear(
        width, vocab_size, dtype, rngs, normal, use_bias=False
      )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens `[B, T]` to logits `[B, T, V]`, float32 or wider.

    The logits at a place are for the token after it, and depend only on the
    tokens up to the place.

    Args:
      tokens: integers `[B, T]`, T at most `context_length`.

    Returns:
      Logits of the next tokens.

    Raises:
      ValueError: sequences that are too long.
    """
    length = tokens.shape[-1]
    if length > self.context_length:
      raise ValueError(
        f"sequences are {length} tokens long; expected at most"
        f" {self.context_length}, which is config.data.length."
      )
    hidden = self.token_embed(tokens)
    hidden = hidden + self.position_embed[...][:length].astype(hidden.dtype)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    for block in self.blocks:
      hidden = block(hidden, causal)
    hidden = self.final_norm(hidden)
    head = self.token_embed.attend if self.tied else self.head
    return transformer.widen(head(hidden))


def create(
  config: config_dict.ConfigDict,
  *,
  vocab_size: int,
  context_length: int,
  seed: int,
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any]]:
  """Makes a decoder as a pure function and a plain parameter tree.

  Args:
    config: `config.model`: `decoder`, with the options of `Decoder`, and
      `dtype`, of the activations.
    vocab_size: number of tokens, V.
    context_length: the most tokens that a sequence may have.
    seed: of the initialisation.

  Returns:
    `apply(params, tokens [B, T]) -> logits [B, T, V]`, and params as nested
    dicts of arrays.

  Raises:
    ValueError: sizes that don't fit, or an unknown activation.
  """
  model = Decoder(
    vocab_size=vocab_size,
    context_length=context_length,
    rngs=nnx.Rngs(seed),
    **{**config.decoder, "dtype": transformer.activations(config)},
  )
  graph, state = nnx.split(model)
  return _make_apply(graph), nnx.to_pure_dict(state)


@programs.once
def _make_apply(graph):
  """Makes one function for one architecture: it is compiled once."""

  def apply(params, tokens):
    return nnx.merge(graph, params)(tokens)

  return apply
