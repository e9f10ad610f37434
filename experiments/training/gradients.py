"""Gradients of training methods, of averaged or weighted losses.

Each is a `gradient(state, reference, batch) -> (gradient, StepOutput)`, of a
`steps.TrainState`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import gradmimic_jax as gm
from experiments.methods import Method
from experiments.tasks.base import Aux, Outputs
from gradmimic_jax import _streaming
from gradmimic_jax.scores import Score

Gradient = Callable[[Any, Any, Any], tuple[Any, "StepOutput"]]


# Directions whose reference is another batch.
BATCHES = ("clean_gradient", "noisy_gradient", "test_gradient")


class StepOutput(NamedTuple):
  """Outputs of one train step; they stay on the device until they are read."""

  metrics: dict[str, jax.Array]  # each [], means over the valid samples
  samples: dict[str, jax.Array]  # score, weight, loss: each [B]; {} if plain
  statistics: Any = ()  # within a step: the model's new ones
  memory: Any = ()  # within a step: the scores to remember


def get_statistics(state: Any) -> Any:
  """Picks the statistics of a state's model; `()` if there are none."""
  return () if state.model_state == () else state.model_state.statistics


def as_variables(statistics: Any) -> dict[str, Any]:
  """Makes keyword arguments of a model's functions; {} if there are none."""
  return {} if statistics == () else {"statistics": statistics}


def make_direction(
  name: str | None,
  losses_fn: Callable[..., Any],
  outputs: Outputs | None,
) -> gm.Direction:
  """Returns the library's direction of that name; see `methods.DIRECTIONS`.

  Args:
    name: a method's `direction`; None: it has none.
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    outputs: the task's, for the direction "outputs".

  Returns:
    The direction; some valid one for methods that don't look at it.
  """
  if name == "outputs":
    assert outputs is not None
    return outputs.direction
  if name in BATCHES:
    return gm.toward_clean_gradient(
      lambda params, batch, **variables: losses_fn(params, batch, **variables)[
        0
      ]
    )
  return gm.toward_weights()


def _compute(losses_fn, outputs, needs_outputs):
  """Makes `(params, batch) -> (losses [B], Aux)`, in one forward pass."""

  def compute(params, batch, **variables):
    if needs_outputs or "key" in batch:  # which makes it training
      return outputs.losses_fn(params, batch, **variables)
    losses, hits = losses_fn(params, batch, **variables)
    return losses, Aux(hits, None)

  return compute


def make_plain(
  losses_fn: Callable[..., Any],
  method: Method | None,
  config: Any,
  outputs: Outputs | None,
) -> Gradient:
  """Makes the gradient of the plain mean of the losses.

  With a method it is that of the divergences from the reference's outputs, or
  of their mixture with the losses: `mix * divergence + (1 - mix) * loss`. In
  microbatches the sum of gradients is carried over them, and divided once by
  the number of valid samples in the batch.

  Args:
    losses_fn: as in `steps.make_train_step`, and so are the others.
    method: one without scores; None: there is none.
    config: `config.mimic`: `microbatch_size`.
    outputs: the task's.

  Returns:
    The gradient.
  """
  distils = method is not None
  share: Any = 1.0 if method is None else method.mix
  is_mixed = not (isinstance(share, float) and share == 1)  # as if it is traced
  task: Any = outputs
  compute = _compute(losses_fn, outputs, distils)

  def pull(params, reference, batch, variables, scale):
    """Computes the scaled sum of gradients, and what was measured."""

    def compute_values(params):
      losses, aux = compute(params, batch, **variables)
      if not distils:
        return losses, (losses, aux)
      found = task.divergences(reference, aux.outputs, batch)
      if is_mixed:
        found = share * found + (1 - share) * losses
      return found, (losses, aux)

    values, pullback, (losses, aux) = jax.vjp(
      compute_values, params, has_aux=True
    )
    valid, weights = _valid(values, batch["mask"])
    weights = weights if scale else valid.astype(values.dtype)
    (grads,) = pullback(weights)
    return grads, (values, losses, aux.hits), aux.statistics

  def pull_parts(params, reference, batch, variables):
    split, restore = _streaming.microbatches(
      batch["mask"], config.microbatch_size
    )
    parts = {"batch": jax.tree.map(split, batch)}
    parts["batch"]["mask"] = split(batch["mask"], fill=False)
    parts["reference"] = jax.tree.map(split, reference) if distils else ()

    def add(total, part):
      grads, measured, _ = pull(
        params, part["reference"], part["batch"], variables, scale=False
      )
      return jax.tree.map(jnp.add, total, grads), measured

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, measured = jax.lax.scan(add, zeros, parts)
    values, losses, hits = restore(measured)
    valid, _ = _valid(values, batch["mask"])
    count = jnp.maximum(jnp.sum(valid), 1)
    grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    return grads, (values, losses, hits), ()

  def gradient(state, reference, batch):
    variables = as_variables(get_statistics(state))
    if config.microbatch_size is None:
      found = pull(state.params, reference, batch, variables, scale=True)
    else:
      found = pull_parts(state.params, reference, batch, variables)
    grads, (values, losses, hits), statistics = found
    grads = _without_poison(grads, values)
    loss = _valid_mean(losses, batch["mask"])
    metrics = _metrics(batch, loss, hits, values)
    if distils:
      metrics["objective" if is_mixed else "divergence"] = _valid_mean(
        values, batch["mask"]
      )
    return grads, StepOutput(metrics, {}, statistics)

  return gradient


def make_attached(
  losses_fn: Callable[..., Any], method: Method, outputs: Outputs | None
) -> Gradient:
  """Makes excess-loss weights that are not constants, as published.

  The gradient of `sum_i w_i(l) l_i` is not `sum_i w_i g_i`: with softmax
  weights of `l - baseline` at temperature T it is `sum_i w_i (1 + (l_i - sum_j
  w_j l_j) / T) g_i`. Samples whose loss lies more than T below the weighted
  mean are unlearned. The weights that are logged are these effective ones.

  Args:
    losses_fn: as in `steps.make_train_step`.
    method: excess loss.
    outputs: the task's.

  Returns:
    The gradient.
  """
  assert outputs is not None
  assert method.weighting is not None
  weighting = method.weighting

  compute = _compute(losses_fn, outputs, needs_outputs=False)

  def gradient(state, reference, batch):
    variables = as_variables(get_statistics(state))
    losses, pullback, aux = jax.vjp(
      lambda params: compute(params, batch, **variables),
      state.params,
      has_aux=True,
    )
    scores = losses - outputs.losses_and_hits(reference, batch)[0]
    valid = batch["mask"] & jnp.isfinite(losses) & jnp.isfinite(scores)
    baseline = jnp.where(valid, losses - scores, 0)

    def total(losses):
      weights = weighting(losses - baseline, valid, state.step)
      return jnp.sum(weights * losses)

    effective = jax.grad(total)(jnp.where(valid, losses, 0))
    effective = jnp.where(valid, effective, 0)
    grads = _without_poison(pullback(effective)[0], losses)
    loss = _valid_mean(losses, batch["mask"])
    unknown = jnp.where(batch["mask"], jnp.nan, 0)
    samples = {
      "score": jnp.where(valid, scores, unknown),
      "weight": effective,
      "loss": jnp.where(valid, losses, unknown),
    }
    metrics = _metrics(batch, loss, aux.hits, scores)
    return grads, StepOutput(metrics, samples, aux.statistics)

  return gradient


def _valid(values, mask):
  valid = mask & jnp.isfinite(values)
  return valid, valid / jnp.maximum(jnp.sum(valid), 1).astype(values.dtype)


def _valid_mean(values, mask):
  """Averages finite values; NaN if none of those that came is finite."""
  valid, weights = _valid(values, mask)
  lost = jnp.any(mask) & ~jnp.any(valid)
  mean = jnp.sum(jnp.where(valid, values, 0) * weights)
  return jnp.where(lost, jnp.asarray(jnp.nan, mean.dtype), mean)


def _without_poison(grads, values):
  """Puts zeros where a sample that is not finite has left NaN.

  Zero times NaN is NaN: it reaches the gradient although its weight is 0.
  """
  sound = jnp.all(jnp.isfinite(values))
  return jax.tree.map(lambda g: jnp.where(sound | jnp.isfinite(g), g, 0), grads)


def find_score(method: Method, outputs: Outputs | None) -> Score:
  """Finds the method's score, the task's or else the library's."""
  score = method.score
  if score is None:
    raise ValueError("the method has no score; expected one that has.")
  of_task = {} if outputs is None else outputs.scores
  if isinstance(score, str) and score in of_task:
    return of_task[score]
  return gm.scores.get(score)


def check_couples(outputs: Outputs | None, what: str) -> None:
  """Raises ValueError if training by statistics of batches couples samples."""
  if outputs is not None and outputs.couples:
    raise ValueError(
      f"{outputs.couples}: in training a sample's loss depends on its batch"
      f" mates, and {what} shows samples without them. Expected"
      " config.mimic.engine='forward' and config.mimic.microbatch_size=None; or"
      " a norm of single samples in the model, such as GroupNorm or LayerNorm."
    )


def check_coupled(config: Any, outputs: Outputs | None) -> None:
  """Raises ValueError for microbatches of losses that couple samples."""
  if config.microbatch_size is None or outputs is None or not outputs.coupled:
    return
  raise ValueError(
    f"config.mimic.microbatch_size is {config.microbatch_size}, and the task's"
    " losses depend on batch mates, whom microbatches don't have; expected None"
    " and config.mimic.engine='forward'."
  )


def make_options(
  losses_fn: Callable[..., Any],
  method: Method,
  config: Any,
  outputs: Outputs | None,
) -> dict[str, Any]:
  """Makes the options that both of the library's functions take.

  Args:
    losses_fn: as in `steps.make_train_step`.
    method: with scores.
    config: `config.mimic`.
    outputs: the task's.

  Returns:
    The options.
  """
  score = find_score(method, outputs)
  engine = config.engine
  if score.name == "given" and config.microbatch_size is None:
    engine = "forward"  # which has nothing to do for them, of any loss
  return {
    "losses_fn": _compute(losses_fn, outputs, score.needs_aux),
    "direction": make_direction(method.direction, losses_fn, outputs),
    "layers": config.layers,
    "score": score,
    "engine": engine,
    "microbatch_size": config.microbatch_size,
    "has_aux": True,
    "check_independence": config.check_independence,
  }


def make_mimic(
  losses_fn: Callable[..., Any],
  method: Method,
  config: Any,
  outputs: Outputs | None,
) -> Gradient:
  """Makes the library's reweighted gradient.

  Args:
    losses_fn: as in `steps.make_train_step`.
    method: with scores.
    config: `config.mimic`.
    outputs: the task's.

  Returns:
    The gradient.

  Raises:
    ValueError: an engine that shows one sample at a time, of a model that
      trains by statistics of batches.
  """
  assert method.weighting is not None
  value_and_grad: Any = gm.mimic_value_and_grad(
    **make_options(losses_fn, method, config, outputs),
    weighting=method.weighting,
    scope=config.scope,
  )
  if value_and_grad.engine != "forward":
    check_couples(
      outputs,
      f"the engine {value_and_grad.engine!r}, which config.method or"
      " config.mimic.engine asks for,",
    )

  def gradient(state, reference, batch):
    (loss, info), grads = value_and_grad(
      state.params,
      reference,
      batch,
      mask=batch["mask"],
      step=state.step,
      **as_variables(get_statistics(state)),
    )
    metrics = _metrics(batch, loss, info.aux.hits, info.scores) | {
      "distance": info.distance,
      "effective_sample_size": info.effective_sample_size,
    }
    samples = {
      "score": info.scores,
      "weight": info.weights,
      "loss": info.losses,
    }
    return grads, StepOutput(metrics, samples, info.aux.statistics)

  return gradient


def _metrics(batch, loss, hits, per_sample):
  mask = batch["mask"]
  count = jnp.maximum(jnp.sum(mask), 1)
  return {
    "loss": loss,
    "accuracy": jnp.sum(jnp.where(mask, hits, 0)) / count,
    "nonfinite": jnp.sum(mask & ~jnp.isfinite(per_sample)),
  }
