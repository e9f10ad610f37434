"""Mean loss and accuracy over held-out batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.runtime import prefetch, programs


@programs.once
def make_eval_step(
  losses_fn: Callable[..., Any],
  expand: Callable[[Any, Any], Any] | None = None,
) -> Callable[..., dict[str, jax.Array]]:
  """Makes a jitted step that sums up a batch's losses and hits.

  Args:
    losses_fn: `(params, batch, **variables) -> (losses [B], hits [B])`.
    expand: as `Task.expand`; None: batches come as losses_fn takes them.

  Returns:
    `eval_step(params, batch, resident, **variables) -> {"loss", "hits",
    "count"}`.
  """

  def eval_step(params, batch, resident=None, **variables):
    if expand is not None:
      batch = expand(batch, resident)
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
  batches: Iterable[Any],
  resident: Any = None,
  **variables: Any,
) -> dict[str, float]:
  """Computes mean loss and accuracy over all batches.

  Args:
    eval_step: as `make_eval_step` gives it.
    params: the model's.
    batches: on the devices when they are asked for; at most two exist at once.
    resident: for `expand`.
    **variables: for the losses.

  Returns:
    `loss` and `accuracy`.
  """
  sums = jax.device_get(
    [
      *prefetch.bounded(
        eval_step(params, batch, resident, **variables) for batch in batches
      )
    ]
  )
  # On the host, where adding a few numbers takes no programs.
  total = jax.tree.map(lambda *xs: float(sum(xs)), *sums)
  return {
    "loss": total["loss"] / total["count"],
    "accuracy": total["hits"] / total["count"],
  }
