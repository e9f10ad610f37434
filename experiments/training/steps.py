"""The jitted train and eval steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments import methods
from experiments.methods import Method
from experiments.runtime import sharding
from experiments.tasks.base import Aux, Outputs
from gradmimic_jax.scores import Score

# Directions whose reference is another batch.
_BATCHES = ("clean_gradient", "noisy_gradient", "test_gradient")


class TrainState(NamedTuple):
  """The state that a run carries from step to step."""

  step: jax.Array  # [], updates done so far
  params: Any  # the learner's parameters
  opt_state: Any  # the optimizer's state


class StepOutput(NamedTuple):
  """Outputs of one train step; they stay on the device until they are read."""

  metrics: dict[str, jax.Array]  # each [], means over the valid samples
  samples: dict[str, jax.Array]  # score, weight, loss: each [B]; {} if plain


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
  """Makes the state before the first step."""
  return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_shardings(state: TrainState, mesh: jax.sharding.Mesh | None) -> Any:
  """Makes the shardings of a train step's results, for `make_train_step`.

  Args:
    state: the step's.
    mesh: with the axes "data" and "fsdp"; None for a single device.

  Returns:
    The beginning of a tree of shardings: the state by the rule, metrics whole
    everywhere, and values of samples divided like the samples. None for a
    single device.
  """
  if mesh is None:
    return None
  # One sharding stands for a whole dict.
  whole: Any = jax.sharding.NamedSharding(mesh, sharding.WHOLE)
  rows: Any = jax.sharding.NamedSharding(mesh, sharding.ROWS)
  return sharding.make_param_shardings(state, mesh), StepOutput(whole, rows)


def make_train_step(
  losses_fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  method: Method | None,
  config: Any,
  outputs: Outputs | None = None,
  *,
  expand: Callable[[Any, Any], Any] | None = None,
  out_shardings: Any = None,
) -> jax.stages.Wrapped:
  """Makes a jitted step of one method.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    tx: the optimizer, over averaged gradients.
    method: weights the samples; None is the plain mean.
    config: `config.mimic`: `layers`, `scope`, `engine`, `microbatch_size` and
      `check_independence`.
    outputs: the task's, for methods that go by outputs; they then replace
      losses_fn.
    expand: `(batch, resident) -> batch`, the task's, which comes before any
      loss; None: batches come as losses_fn takes them.
    out_shardings: of `(TrainState, StepOutput)`, or of the beginning of such a
      tree; None leaves them to the compiler.

  Returns:
    `train_step(state, reference, batch, resident=None) -> (state, StepOutput)`.
    The state is donated. `resident` is what `expand` takes from beside the
    batch. `reference` is the input of the method's direction: a parameter
    tree, the outputs `[B, C]` or norms `[B]` for this batch, or another batch;
    steps without a direction ignore it. Samples whose loss (or score, or
    divergence, by the method) is not finite get no weight and are counted in
    `metrics["nonfinite"]`; entries of the gradient that they reach are 0. Where
    no sample is left, or the gradient is not finite all the same, parameters
    and optimizer stay as they are: `metrics["skipped"]` is 1, and `step` counts
    on.

  Raises:
    ValueError: microbatches of losses that depend on batch mates.
  """
  _check_coupled(config, outputs)
  if method is None or method.score is None:
    gradient = _plain_gradient(losses_fn, method and outputs)
  elif not method.detached:
    gradient = _attached_gradient(losses_fn, method, outputs)
  else:
    gradient = _mimic_gradient(losses_fn, method, config, outputs)
  is_batch = method is not None and method.direction in _BATCHES
  return jax.jit(
    make_step(gradient, tx, expand=expand, reference_is_batch=is_batch),
    donate_argnums=0,
    out_shardings=out_shardings,
  )


def make_step(
  gradient: Callable[[TrainState, Any, Any], tuple[Any, StepOutput]],
  tx: optax.GradientTransformation,
  *,
  expand: Callable[[Any, Any], Any] | None = None,
  reference_is_batch: bool = False,
) -> Callable[..., tuple[TrainState, StepOutput]]:
  """Makes a step as `make_train_step` does, by any gradient, and not jitted.

  Args:
    gradient: `(state, reference, batch) -> (gradient, StepOutput)`.
    tx: the optimizer, over averaged gradients.
    expand: as in `make_train_step`.
    reference_is_batch: whether the reference is a batch, to be expanded too.

  Returns:
    `train_step(state, reference, batch, resident=None) -> (state, StepOutput)`.
  """

  def train_step(state, reference, batch, resident=None):
    batch = _expanded(expand, batch, resident)
    if reference_is_batch:
      reference = _expanded(expand, reference, resident)
    grads, output = gradient(state, reference, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sound = _is_sound(grads, output.metrics["nonfinite"], batch["mask"])
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(sound, new, old),
      (params, opt_state),
      (state.params, state.opt_state),
    )
    output.metrics["grad_norm"] = optax.tree.norm(grads)
    output.metrics["skipped"] = (~sound).astype(jnp.int32)
    return TrainState(state.step + 1, params, opt_state), output

  return train_step


def _expanded(expand, batch, resident):
  return batch if expand is None else expand(batch, resident)


def make_score_step(
  losses_fn: Callable[..., Any],
  method: Method | None,
  config: Any,
  outputs: Outputs | None = None,
  *,
  expand: Callable[[Any, Any], Any] | None = None,
  out_shardings: Any = None,
) -> Callable[..., dict[str, jax.Array]]:
  """Makes a jitted step that scores a batch and changes nothing.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    method: the method of the scores.
    config: `config.mimic`: `layers`, `engine`, `microbatch_size`,
      `check_independence`.
    outputs: as in `make_train_step`.
    expand: as in `make_train_step`.
    out_shardings: of all scores and losses; None leaves it to the compiler.

  Returns:
    `score_step(params, reference, batch, resident=None) -> {"score", "loss"}`,
    each `[B]`; NaN where a sample is not finite. `reference` and `resident` are
    as in `make_train_step`.

  Raises:
    ValueError: a method without scores of single samples, or microbatches of
      losses that depend on batch mates.
  """
  if method is None or not methods.tells_samples_apart(method):
    raise ValueError(
      "config.method gives no scores that say anything about the samples;"
      " expected one that has, such as grad_mimic."
    )
  _check_coupled(config, outputs)
  scores_fn = gm.mimic_scores(
    **_engine_options(losses_fn, method, config, outputs)
  )

  def score_step(params, reference, batch, resident=None):
    batch = _expanded(expand, batch, resident)
    if method.direction in _BATCHES:
      reference = _expanded(expand, reference, resident)
    found = scores_fn(params, reference, batch, mask=batch["mask"])
    return {"score": found.scores, "loss": found.losses}

  return jax.jit(score_step, out_shardings=out_shardings)


def make_direction(
  name: str,
  losses_fn: Callable[..., Any],
  outputs: Outputs | None,
) -> gm.Direction:
  """Returns the library's direction of that name; see `methods.DIRECTIONS`.

  Args:
    name: a method's `direction`.
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    outputs: the task's, for the direction "outputs".

  Returns:
    The direction; some valid one for methods that don't look at it.
  """
  if name == "outputs":
    assert outputs is not None
    return outputs.direction
  if name in _BATCHES:
    return gm.toward_clean_gradient(
      lambda params, batch: losses_fn(params, batch)[0]
    )
  return gm.toward_weights()


def _is_sound(grads, nonfinite, mask):
  """True if a sample is finite, and so is the gradient of all that are."""
  finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]
  return jnp.all(jnp.stack(finite)) & (nonfinite < jnp.sum(mask))


def _plain_gradient(losses_fn, outputs):
  """Makes the gradient of the plain mean of the losses.

  With outputs, it is that of the divergences from the reference's outputs:
  labels are then only measured.
  """

  def gradient(state, reference, batch):
    def compute_values(params):
      if outputs is None:
        losses, hits = losses_fn(params, batch)
        return losses, (losses, hits)
      found = outputs.of(params, batch)
      measured = outputs.losses_and_hits(found, batch)
      return outputs.divergences(reference, found, batch), measured

    values, pullback, (losses, hits) = jax.vjp(
      compute_values, state.params, has_aux=True
    )
    _, weights = _valid(values, batch["mask"])
    grads = _pulled(pullback, weights, values)
    loss = _valid_mean(losses, batch["mask"])
    metrics = _metrics(batch, loss, hits, values)
    if outputs is not None:
      metrics["divergence"] = _valid_mean(values, batch["mask"])
    return grads, StepOutput(metrics, {})

  return gradient


def _attached_gradient(losses_fn, method, outputs):
  """Makes excess-loss weights that are not constants, as published.

  The gradient of `sum_i w_i(l) l_i` is not `sum_i w_i g_i`: with softmax
  weights of `l - baseline` at temperature T it is `sum_i w_i (1 + (l_i - sum_j
  w_j l_j) / T) g_i`. Samples whose loss lies more than T below the weighted
  mean are unlearned. The weights that are logged are these effective ones.
  """

  def gradient(state, reference, batch):
    losses, pullback, hits = jax.vjp(
      lambda params: losses_fn(params, batch), state.params, has_aux=True
    )
    scores = losses - outputs.losses_and_hits(reference, batch)[0]
    valid = batch["mask"] & jnp.isfinite(losses) & jnp.isfinite(scores)
    baseline = jnp.where(valid, losses - scores, 0)

    def total(losses):
      weights = method.weighting(losses - baseline, valid, state.step)
      return jnp.sum(weights * losses)

    effective = jax.grad(total)(jnp.where(valid, losses, 0))
    effective = jnp.where(valid, effective, 0)
    grads = _pulled(pullback, effective, losses)
    loss = _valid_mean(losses, batch["mask"])
    unknown = jnp.where(batch["mask"], jnp.nan, 0)
    samples = {
      "score": jnp.where(valid, scores, unknown),
      "weight": effective,
      "loss": jnp.where(valid, losses, unknown),
    }
    return grads, StepOutput(_metrics(batch, loss, hits, scores), samples)

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


def _pulled(pullback, weights, values):
  """Computes the gradient of the values' weighted sum, for constant weights."""
  (grads,) = pullback(weights)
  # Zero times NaN is NaN: a broken sample reaches the gradient all the same.
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


def _check_coupled(config, outputs):
  if config.microbatch_size is None or outputs is None or not outputs.coupled:
    return
  raise ValueError(
    f"config.mimic.microbatch_size is {config.microbatch_size}, and the task's"
    " losses depend on batch mates, whom microbatches don't have; expected None"
    " and config.mimic.engine='forward'."
  )


def _engine_options(losses_fn, method, config, outputs):
  """Returns the options that both of the library's functions take."""
  score = find_score(method, outputs)

  def with_aux(params, batch):
    if score.needs_aux:
      return outputs.losses_fn(params, batch)
    losses, hits = losses_fn(params, batch)
    return losses, Aux(hits, None)

  return {
    "losses_fn": with_aux,
    "direction": make_direction(method.direction, losses_fn, outputs),
    "layers": config.layers,
    "score": score,
    "engine": config.engine,
    "microbatch_size": config.microbatch_size,
    "has_aux": True,
    "check_independence": config.check_independence,
  }


def _mimic_gradient(losses_fn, method, config, outputs):
  value_and_grad = gm.mimic_value_and_grad(
    **_engine_options(losses_fn, method, config, outputs),
    weighting=method.weighting,
    scope=config.scope,
  )

  def gradient(state, reference, batch):
    (loss, info), grads = value_and_grad(
      state.params, reference, batch, mask=batch["mask"], step=state.step
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
    return grads, StepOutput(metrics, samples)

  return gradient


def _metrics(batch, loss, hits, per_sample):
  mask = batch["mask"]
  count = jnp.maximum(jnp.sum(mask), 1)
  return {
    "loss": loss,
    "accuracy": jnp.sum(jnp.where(mask, hits, 0)) / count,
    "nonfinite": jnp.sum(mask & ~jnp.isfinite(per_sample)),
  }
