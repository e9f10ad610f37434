"""Image classification with integer labels."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradmimic_jax as gm
from experiments import models
from experiments.runtime import programs
from experiments.tasks.base import Outputs

Apply = models.Apply | Callable[[Any, jax.Array], jax.Array]


@programs.once
def make_losses_fn(apply: Apply) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes the cross-entropy per sample, with hits as aux.

  Args:
    apply: `(params, images [B, H, W, C]) -> logits [B, C]`.

  Returns:
    `losses_fn(params, batch) -> (losses [B], hits bool [B])`, for a batch with
    `image` and `label`. That is evaluation; with `key`, random keys `[B]`, it
    is training. A model's statistics are the keyword argument `statistics`.
  """
  outputs_fn = make_outputs_fn(apply)

  def losses_fn(params, batch, **variables):
    return losses_and_hits(outputs_fn(params, batch, **variables), batch)

  return losses_fn


@programs.once
def make_outputs_fn(apply: Apply) -> Callable[..., jax.Array]:
  """Makes `outputs_fn(params, batch) -> logits [B, C]`, from `image`."""

  def outputs_fn(params, batch, **variables):
    if "key" in batch:
      return _train(apply, params, batch, **variables)[0]
    return apply(params, batch["image"], **variables)

  return outputs_fn


def _train(apply, params, batch, **variables):
  return apply.train(params, batch["image"], batch["key"], **variables)


def make_training_losses_fn(
  apply: models.Apply,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes losses that need no statistics, to compare weights by.

  Those before the first step are of no weights at all: the batch's own take
  their place, as in training. Without statistics it is `make_losses_fn`.

  Args:
    apply: the model.

  Returns:
    `losses_fn(params, batch) -> (losses [B], hits bool [B])`.
  """
  plain = make_losses_fn(apply)
  if not apply.about:
    return plain

  known = jax.tree.map(np.asarray, apply.statistics)

  def losses_fn(params, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["label"]))
    statistics = jax.tree.map(jnp.asarray, known)
    return plain(params, {**batch, "key": keys}, statistics=statistics)

  return losses_fn


@programs.once
def make_outputs(
  outputs_fn: Callable[..., jax.Array], apply: models.Apply | None = None
) -> Outputs:
  """Makes the Outputs of classification.

  Args:
    outputs_fn: `(params, batch) -> logits [B, C]`.
    apply: the model, where training may differ from evaluation.

  Returns:
    The Outputs.
  """
  own: dict[str, Any] = {}
  if apply is not None and apply.trains:
    own["train"] = functools.partial(_train, apply)
    own["couples"] = f"{apply.name} has {apply.about}" if apply.about else ""
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
    **own,
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
