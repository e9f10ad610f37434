"""Image classification with integer labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.runtime import programs
from experiments.tasks.base import Outputs

Apply = Callable[[Any, jax.Array], jax.Array]


@programs.once
def make_losses_fn(apply: Apply) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes the cross-entropy per sample, with hits as aux.

  Args:
    apply: `(params, images [B, H, W, C]) -> logits [B, C]`.

  Returns:
    `losses_fn(params, batch) -> (losses [B], hits bool [B])`, for a batch with
    `image` and `label`.
  """

  def losses_fn(params, batch):
    return losses_and_hits(apply(params, batch["image"]), batch)

  return losses_fn


@programs.once
def make_outputs_fn(apply: Apply) -> Callable[..., jax.Array]:
  """Makes `outputs_fn(params, batch) -> logits [B, C]`, from `image`."""

  def outputs_fn(params, batch):
    return apply(params, batch["image"])

  return outputs_fn


@programs.once
def make_outputs(outputs_fn: Callable[..., jax.Array]) -> Outputs:
  """Makes the Outputs of classification from `(params, batch) -> logits`."""
  return Outputs(
    outputs_fn,
    losses_and_hits,
    gm.toward_outputs(outputs_fn),
    scores={
      "output_agreement": gm.output_agreement(
        label_losses, outputs_of=lambda aux: aux.outputs
      ),
      "excess_loss": gm.excess_loss(label_losses),
    },
    divergences=divergences,
  )


def label_losses(logits: jax.Array, batch: Any) -> jax.Array:
  """Computes cross-entropy `[B]` of logits `[B, C]` with the given labels."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def losses_and_hits(
  logits: jax.Array, batch: Any
) -> tuple[jax.Array, jax.Array]:
  """Computes losses and hits, True if the likeliest class is the label."""
  hits = jnp.argmax(logits, axis=-1) == batch["label"]
  return label_losses(logits, batch), hits


def divergences(
  reference: jax.Array, logits: jax.Array, batch: Any = None
) -> jax.Array:
  """Computes `KL(softmax(reference) || softmax(logits))` per sample.

  Args:
    reference: the reference's logits `[B, C]`, constants.
    logits: the learner's `[B, C]`.
    batch: is not looked at.

  Returns:
    Divergences `[B]`; NaN, with gradient 0, where the reference's logits are
    not finite.
  """
  del batch
  known = jnp.all(jnp.isfinite(reference), axis=-1)
  # Zero times NaN is NaN: such a row must not get into the computation.
  targets = jax.nn.log_softmax(jnp.where(known[:, None], reference, 0))
  gaps = targets - jax.nn.log_softmax(logits)
  return jnp.where(known, jnp.sum(jnp.exp(targets) * gaps, axis=-1), jnp.nan)
