"""The jitted train and eval steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.methods import Method
from experiments.tasks import classification


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
  outputs_fn: Callable[..., jax.Array] | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepOutput]]:
  """A jitted step of one method.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    tx: the optimizer, over averaged gradients.
    method: what weights the samples; None is the plain mean.
    config: `config.mimic`: `layers`, `scope`, `engine`.
    outputs_fn: `(params, batch) -> logits [B, C]`, for methods that go by the
      reference's outputs.

  Returns:
    `train_step(state, reference, batch) -> (state, StepOutput)`. The state is
    donated. `reference` is what the method's direction asks for: a parameter
    tree, the outputs `[B, C]` for this batch, or a clean batch; plain steps
    ignore it. Samples whose loss (or score, or divergence, by the method) is
    not finite get no weight and are counted in `metrics["nonfinite"]`; what
    they reach of the gradient is 0.
  """
  if method is None:
    gradient = _plain_gradient(losses_fn)
  elif method.score is None:
    gradient = _distillation_gradient(losses_fn, outputs_fn)
  else:
    gradient = _mimic_gradient(losses_fn, method, config, outputs_fn)

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
    grads = _mean(pullback, losses, batch["mask"])
    loss = _valid_mean(losses, batch["mask"])
    return grads, StepOutput(_metrics(batch, loss, hits, losses), {})

  return gradient


def _distillation_gradient(losses_fn, outputs_fn):
  """Straight toward the reference's outputs; labels are only measured."""

  def gradient(state, reference, batch):
    divergences, pullback = jax.vjp(
      lambda params: classification.divergences(
        reference, outputs_fn(params, batch)
      ),
      state.params,
    )
    grads = _mean(pullback, divergences, batch["mask"])
    losses, hits = losses_fn(state.params, batch)
    loss = _valid_mean(losses, batch["mask"])
    metrics = _metrics(batch, loss, hits, divergences) | {
      "divergence": _valid_mean(divergences, batch["mask"])
    }
    return grads, StepOutput(metrics, {})

  return gradient


def _valid(values, mask):
  valid = mask & jnp.isfinite(values)
  return valid, valid / jnp.maximum(jnp.sum(valid), 1).astype(values.dtype)


def _valid_mean(values, mask):
  valid, weights = _valid(values, mask)
  return jnp.sum(jnp.where(valid, values, 0) * weights)


def _mean(pullback, values, mask):
  """The gradient of the mean over the valid samples."""
  _, weights = _valid(values, mask)
  (grads,) = pullback(weights)
  # Zero times NaN is NaN: a broken sample reaches the gradient all the same.
  sound = jnp.all(jnp.isfinite(values))
  return jax.tree.map(lambda g: jnp.where(sound | jnp.isfinite(g), g, 0), grads)


def _direction(name, losses_fn, outputs_fn):
  """The library's direction of that name; see `methods.DIRECTIONS`."""
  if name == "outputs":
    return gm.toward_outputs(outputs_fn)
  if name == "clean_gradient":
    return gm.toward_clean_gradient(
      lambda params, batch: losses_fn(params, batch)[0]
    )
  return gm.toward_weights()  # scores without a direction don't look at it


def _mimic_gradient(losses_fn, method, config, outputs_fn):
  value_and_grad = gm.mimic_value_and_grad(
    losses_fn,
    direction=_direction(method.direction, losses_fn, outputs_fn),
    layers=config.layers,
    score=method.score,
    weighting=method.weighting,
    scope=config.scope,
    engine=config.engine,
    has_aux=True,
  )

  def gradient(state, reference, batch):
    if method.score == "excess_loss":
      reference = classification.losses_of(reference, batch)
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
