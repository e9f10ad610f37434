"""Image classification with integer labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Apply = Callable[[Any, jax.Array], jax.Array]


def make_losses_fn(apply: Apply) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Cross-entropy per sample, with hits as aux.

  Args:
    apply: `(params, images [B, H, W, C]) -> logits [B, C]`.

  Returns:
    `losses_fn(params, batch) -> (losses [B], hits bool [B])`, for a batch with
    `image` and `label`.
  """

  def losses_fn(params, batch):
    logits = apply(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return losses, jnp.argmax(logits, axis=-1) == batch["label"]

  return losses_fn
