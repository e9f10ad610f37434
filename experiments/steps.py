"""The jitted train and eval steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.methods import Method


class TrainState(NamedTuple):
  """What a run carries from step to step."""

  step: jax.Array  # [], updates done so far
  params: Any  # the learner's parameters
  opt_state: Any  # the optimizer's state


class StepOutput(NamedTuple):
  """What one train step has to tell; stays on the device until it is asked."""

  metrics: dict[str, jax.Array]  # each [], means over the valid samples
  samples: dict[str, jax.Array]  # score, weight, loss: each [B]; {} if plain


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_train_step(
  losses_fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  method: Method | None,
  config: Any,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepOutput]]:
  """A jitted step of one method.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    tx: the optimizer, over averaged gradients.
    method: what weights the samples; None is the plain mean.
    config: `config.mimic`: `layers`, `scope`, `engine`.

  Returns:
    `train_step(state, reference, batch) -> (state, StepOutput)`. The state is
    donated. Plain steps ignore `reference`. Samples whose loss (or, with a
    method, score) is not finite get no weight and are counted in
    `metrics["nonfinite"]`; what they reach of the gradient is 0.
  """
  gradient = (
    _plain_gradient(losses_fn)
    if method is None
    else _mimic_gradient(losses_fn, method, config)
  )

  def train_step(state, reference, batch):
    grads, output = gradient(state, reference, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    output.metrics["grad_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, params, opt_state), output

  return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
  losses_fn: Callable[..., Any],
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """A jitted `eval_step(params, batch) -> {"loss", "hits", "count"}`, sums."""

  def eval_step(params, batch):
    losses, hits = losses_fn(params, batch)
    mask = batch["mask"]
    return {
      "loss": jnp.sum(jnp.where(mask, losses, 0)),
      "hits": jnp.sum(mask & hits),
      "count": jnp.sum(mask),
    }

  return jax.jit(eval_step)


def evaluate(
  eval_step: Callable[[Any, Any], dict[str, jax.Array]],
  params: Any,
  batches: Any,
) -> dict[str, float]:
  """Mean loss and accuracy over all batches."""
  sums = [eval_step(params, batch) for batch in batches]
  total = jax.tree.map(lambda *xs: float(sum(xs)), *sums)
  return {
    "loss": total["loss"] / total["count"],
    "accuracy": total["hits"] / total["count"],
  }


def _plain_gradient(losses_fn):
  def gradient(state, reference, batch):
    del reference
    losses, pullback, hits = jax.vjp(
      lambda params: losses_fn(params, batch), state.params, has_aux=True
    )
    valid = batch["mask"] & jnp.isfinite(losses)
    weights = valid / jnp.maximum(jnp.sum(valid), 1).astype(losses.dtype)
    (grads,) = pullback(weights)
    # Zero times NaN is NaN: a broken sample reaches the gradient all the same.
    sound = jnp.all(jnp.isfinite(losses))
    grads = jax.tree.map(
      lambda g: jnp.where(sound | jnp.isfinite(g), g, 0), grads
    )
    loss = jnp.sum(jnp.where(valid, losses, 0) * weights)
    return grads, StepOutput(_metrics(batch, loss, hits, losses), {})

  return gradient


def _mimic_gradient(losses_fn, method, config):
  value_and_grad = gm.mimic_value_and_grad(
    losses_fn,
    direction=method.direction,
    layers=config.layers,
    score=method.score,
    weighting=method.weighting,
    scope=config.scope,
    engine=config.engine,
    has_aux=True,
  )

  def gradient(state, reference, batch):
    (loss, info), grads = value_and_grad(
      state.params, reference, batch, mask=batch["mask"], step=state.step
    )
    metrics = _metrics(batch, loss, info.aux, info.scores) | {
      "distance": info.distance,
      "effective_sample_size": info.effective_sample_size,
    }
    samples = {
      "score": info.scores,
      "weight": info.weights,
      "loss": info.losses,
    }
    return grads, StepOutput(metrics, samples)

  return gradient


def _metrics(batch, loss, hits, per_sample):
  mask = batch["mask"]
  count = jnp.maximum(jnp.sum(mask), 1)
  return {
    "loss": loss,
    "accuracy": jnp.sum(mask & hits) / count,
    "nonfinite": jnp.sum(mask & ~jnp.isfinite(per_sample)),
  }
