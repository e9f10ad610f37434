"""Mean loss and accuracy over held-out batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.runtime import prefetch, programs


@programs.once
def make_eval_step(
  losses_fn: Callable[..., Any],
) -> Callable[..., dict[str, jax.Array]]:
  """Makes a jitted `eval_step(params, batch) -> {"loss", "hits", "count"}`.

  Keyword arguments go to losses_fn.
  """

  def eval_step(params, batch, **variables):
    losses, hits = losses_fn(params, batch, **variables)
    mask = batch["mask"]
    return {
      "loss": jnp.sum(jnp.where(mask, losses, 0)),
      "hits": jnp.sum(jnp.where(mask, hits, 0)),
      "count": jnp.sum(mask),
    }

  return jax.jit(eval_step)


def evaluate(
  eval_step: Callable[..., dict[str, jax.Array]],
  params: Any,
  batches: Any,
  **variables: Any,
) -> dict[str, float]:
  """Computes mean loss and accuracy over all batches."""
  sums = [
    *prefetch.bounded(
      eval_step(params, batch, **variables) for batch in batches
    )
  ]
  total = jax.tree.map(lambda *xs: float(sum(xs)), *sums)
  return {
    "loss": total["loss"] / total["count"],
    "accuracy": total["hits"] / total["count"],
  }
