"""Mean loss and accuracy over held-out batches."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

# Batches on the devices at a time: one is computed, the next one is put there.
_AHEAD = 2


def make_eval_step(
  losses_fn: Callable[..., Any],
  expand: Callable[[Any, Any], Any] = lambda batch, resident: batch,
) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
  """Makes a jitted step that sums up a batch's losses and hits.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    expand: as `Task.expand`.

  Returns:
    `eval_step(params, batch, resident) -> {"loss", "hits", "count"}`.
  """

  def eval_step(params, batch, resident):
    batch = expand(batch, resident)
    losses, hits = losses_fn(params, batch)
    mask = batch["mask"]
    return {
      "loss": jnp.sum(jnp.where(mask, losses, 0)),
      "hits": jnp.sum(jnp.where(mask, hits, 0)),
      "count": jnp.sum(mask),
    }

  return jax.jit(eval_step)


def evaluate(
  eval_step: Callable[[Any, Any, Any], dict[str, jax.Array]],
  params: Any,
  batches: Iterable[Any],
  resident: Any = None,
) -> dict[str, float]:
  """Computes mean loss and accuracy over all batches.

  Args:
    eval_step: as `make_eval_step` gives it.
    params: the model's.
    batches: on the devices when they are asked for; at most two exist at once.
    resident: for `expand`.

  Returns:
    `loss` and `accuracy`.
  """
  sums: list[Any] = []
  waiting: collections.deque[Any] = collections.deque()
  for batch in batches:
    waiting.append(eval_step(params, batch, resident))
    if len(waiting) == _AHEAD:
      sums.append(jax.device_get(waiting.popleft()))
  sums += jax.device_get(list(waiting))
  total = jax.tree.map(lambda *xs: float(sum(xs)), *sums)
  return {
    "loss": total["loss"] / total["count"],
    "accuracy": total["hits"] / total["count"],
  }
