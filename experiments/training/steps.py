"""The jitted train and eval steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.methods import OUTPUT_AGREEMENT, RANDOM, Method
from experiments.runtime import sharding
from experiments.tasks.base import Outputs
from experiments.tasks.classification import losses as classification
from gradmimic_jax import layers
from gradmimic_jax.weighting import guarded


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


def make_shardings(state: TrainState, mesh: jax.sharding.Mesh | None) -> Any:
  """The shardings of what a train step puts out, for `make_train_step`.

  Args:
    state: the step's.
    mesh: with the axes "data" and "fsdp"; None for a single device.

  Returns:
    The beginning of a tree of shardings: the state by the rule, metrics whole
    everywhere, and what there is of each sample divided like the samples. None
    for a single device.
  """
  if mesh is None:
    return None
  return sharding.of_tree(state, mesh), StepOutput(
    jax.sharding.NamedSharding(mesh, sharding.WHOLE),
    jax.sharding.NamedSharding(mesh, sharding.ROWS),
  )


def make_train_step(
  losses_fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  method: Method | None,
  config: Any,
  outputs_fn: Callable[..., jax.Array] | None = None,
  *,
  outputs: Outputs | None = None,
  out_shardings: Any = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepOutput]]:
  """A jitted step of one method.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    tx: the optimizer, over averaged gradients.
    method: what weights the samples; None is the plain mean.
    config: `config.mimic`: `layers`, `scope`, `engine`, and `microbatch_size`
      and `check_independence` if there are such fields.
    outputs_fn: `(params, batch) -> logits [B, C]`, for methods that go by the
      reference's outputs; losses_fn's are then the cross-entropies of these.
    outputs: of tasks other than classification, in place of outputs_fn: for
      methods with the direction or the score that they give.
    out_shardings: of `(TrainState, StepOutput)`, or what a tree of them begins
      with; None leaves it to the compiler.

  Returns:
    `train_step(state, reference, batch) -> (state, StepOutput)`. The state is
    donated. `reference` is what the method's direction asks for: a parameter
    tree, the outputs `[B, C]` or norms `[B]` for this batch, or another batch;
    steps without a direction ignore it. Samples whose loss (or score, or
    divergence, by the method) is not finite get no weight and are counted in
    `metrics["nonfinite"]`; what they reach of the gradient is 0. Where no
    sample is left, or the gradient is not finite all the same, parameters and
    optimizer stay as they are: `metrics["skipped"]` is 1, and `step` counts on.
  """
  if outputs is None and outputs_fn is not None:
    outputs = classification.outputs_of(outputs_fn)
  if outputs_fn is None and outputs is not None:
    outputs_fn = outputs.of
  if method is None:
    gradient = _plain_gradient(losses_fn)
  elif method.score is None:
    gradient = _distillation_gradient(outputs_fn)
  elif method.score == OUTPUT_AGREEMENT:
    gradient = _agreement_gradient(outputs, method, config)
  elif not method.detached:
    gradient = _attached_gradient(losses_fn, method)
  else:
    gradient = _mimic_gradient(losses_fn, method, config, outputs)

  def train_step(state, reference, batch):
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

  return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def make_score_step(
  losses_fn: Callable[..., Any],
  method: Method | None,
  config: Any,
  outputs_fn: Callable[..., jax.Array] | None = None,
  *,
  outputs: Outputs | None = None,
  out_shardings: Any = None,
) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
  """A jitted step that scores a batch and changes nothing.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    method: whose scores.
    config: `config.mimic`: `layers`, `engine`.
    outputs_fn: `(params, batch) -> logits [B, C]`.
    outputs: of tasks other than classification, in place of outputs_fn.
    out_shardings: of all scores and losses; None leaves it to the compiler.

  Returns:
    `score_step(params, reference, batch) -> {"score", "loss"}`, each `[B]`; NaN
    where a sample is not finite. `reference` is as in `make_train_step`.

  Raises:
    ValueError: a method without scores of single samples.
  """
  if method is None or method.score in (None, RANDOM):
    raise ValueError(
      "config.method gives no scores that say anything about the samples;"
      " expected one that has, such as grad_mimic."
    )
  if outputs_fn is not None:
    outputs = classification.outputs_of(outputs_fn)
  if method.score == OUTPUT_AGREEMENT:
    return jax.jit(_agreement_scores(outputs), out_shardings=out_shardings)
  scores_fn = gm.mimic_scores(
    lambda params, batch: losses_fn(params, batch)[0],
    direction=direction_of(method.direction, losses_fn, outputs),
    layers=config.layers,
    score=method.score,
    engine=config.engine,
  )

  def score_step(params, reference, batch):
    if method.score == "excess_loss":
      reference, _ = outputs.losses_and_hits(reference, batch)
    found = scores_fn(params, reference, batch, mask=batch["mask"])
    return {"score": found.scores, "loss": found.losses}

  return jax.jit(score_step, out_shardings=out_shardings)


def direction_of(
  name: str,
  losses_fn: Callable[..., Any],
  outputs: Outputs | None,
) -> gm.Direction:
  """The library's direction of that name; see `methods.DIRECTIONS`.

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
  if name in ("clean_gradient", "noisy_gradient", "test_gradient"):
    return gm.toward_clean_gradient(
      lambda params, batch: losses_fn(params, batch)[0]
    )
  return gm.toward_weights()


def _is_sound(grads, nonfinite, mask):
  """Whether there is a finite sample, and a finite gradient of those."""
  finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]
  return jnp.all(jnp.stack(finite)) & (nonfinite < jnp.sum(mask))


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


def _distillation_gradient(outputs_fn):
  """Straight toward the reference's outputs; labels are only measured."""

  def gradient(state, reference, batch):
    def divergences_of(params):
      logits = outputs_fn(params, batch)
      measured = classification.losses_and_hits(logits, batch)
      return classification.divergences(reference, logits), measured

    divergences, pullback, (losses, hits) = jax.vjp(
      divergences_of, state.params, has_aux=True
    )
    grads = _mean(pullback, divergences, batch["mask"])
    loss = _valid_mean(losses, batch["mask"])
    metrics = _metrics(batch, loss, hits, divergences) | {
      "divergence": _valid_mean(divergences, batch["mask"])
    }
    return grads, StepOutput(metrics, {})

  return gradient


def _presentable(values, valid, mask):
  """NaN for samples that are not finite and 0 for padding."""
  return jnp.where(valid, values, jnp.where(mask, jnp.nan, 0))


def _agreement_scores(outputs):
  def score_step(params, reference, batch):
    found = outputs.of(params, batch)
    losses, _ = outputs.losses_and_hits(found, batch)
    scores = outputs.agreement(found, reference, batch)
    valid = batch["mask"] & jnp.isfinite(losses) & jnp.isfinite(scores)
    return {
      "score": _presentable(scores, valid, batch["mask"]),
      "loss": _presentable(losses, valid, batch["mask"]),
    }

  return score_step


def _agreement_gradient(outputs, method, config):
  """Scores and gradient from one forward pass, which gives the outputs too."""

  def gradient(state, reference, batch):
    def losses_of(params):
      found = outputs.of(params, batch)
      losses, hits = outputs.losses_and_hits(found, batch)
      return losses, (found, hits)

    losses, pullback, (found, hits) = jax.vjp(
      losses_of, state.params, has_aux=True
    )
    mask = batch["mask"]
    scores = outputs.agreement(found, reference, batch)
    valid = mask & jnp.isfinite(losses) & jnp.isfinite(scores)
    weights = guarded(method.weighting, scores, valid, state.step)
    grads = _pulled(pullback, weights.astype(losses.dtype), losses)
    plain = valid / jnp.maximum(jnp.sum(valid), 1).astype(losses.dtype)
    if config.scope == "layers":
      chosen = layers.choose(config.layers, state.params)
      others = _pulled(pullback, plain, losses)
      flags = jax.tree.unflatten(jax.tree.structure(grads), chosen)
      grads = jax.tree.map(
        lambda flag, a, b: a if flag else b, flags, grads, others
      )
    samples = {
      "score": _presentable(scores, valid, mask),
      "weight": weights,
      "loss": _presentable(losses, valid, mask),
    }
    loss = jnp.sum(plain * jnp.where(valid, losses, 0))
    metrics = _metrics(batch, loss, hits, samples["score"]) | {
      "distance": jnp.zeros([]),
      "effective_sample_size": gm.effective_sample_size(weights),
    }
    return grads, StepOutput(metrics, samples)

  return gradient


def _attached_gradient(losses_fn, method):
  """Excess-loss weights that are not constants of the step, as published.

  The gradient of `sum_i w_i(l) l_i` is not `sum_i w_i g_i`: with softmax
  weights of `l - baseline` at temperature T it is `sum_i w_i (1 + (l_i - sum_j
  w_j l_j) / T) g_i`. Samples whose loss lies more than T below the weighted
  mean are unlearned. The weights that are logged are these effective ones.
  """

  def gradient(state, reference, batch):
    losses, pullback, hits = jax.vjp(
      lambda params: losses_fn(params, batch), state.params, has_aux=True
    )
    scores = losses - classification.losses_of(reference, batch)
    valid = batch["mask"] & jnp.isfinite(losses) & jnp.isfinite(scores)
    baseline = jnp.where(valid, losses - scores, 0)

    def total(losses):
      weights = method.weighting(losses - baseline, valid, state.step)
      return jnp.sum(weights * losses)

    effective = jax.grad(total)(jnp.where(valid, losses, 0))
    effective = jnp.where(valid, effective, 0)
    grads = _pulled(pullback, effective, losses)
    loss = _valid_mean(losses, batch["mask"])
    samples = {
      "score": _presentable(scores, valid, batch["mask"]),
      "weight": effective,
      "loss": _presentable(losses, valid, batch["mask"]),
    }
    return grads, StepOutput(_metrics(batch, loss, hits, scores), samples)

  return gradient


def _valid(values, mask):
  valid = mask & jnp.isfinite(values)
  return valid, valid / jnp.maximum(jnp.sum(valid), 1).astype(values.dtype)


def _valid_mean(values, mask):
  """The mean of what is finite; NaN if nothing of what came is."""
  valid, weights = _valid(values, mask)
  lost = jnp.any(mask) & ~jnp.any(valid)
  mean = jnp.sum(jnp.where(valid, values, 0) * weights)
  return jnp.where(lost, jnp.asarray(jnp.nan, mean.dtype), mean)


def _mean(pullback, values, mask):
  """The gradient of the mean over the valid samples."""
  _, weights = _valid(values, mask)
  return _pulled(pullback, weights, values)


def _pulled(pullback, weights, values):
  """The gradient of the values' weighted sum, the weights being constants."""
  (grads,) = pullback(weights)
  # Zero times NaN is NaN: a broken sample reaches the gradient all the same.
  sound = jnp.all(jnp.isfinite(values))
  return jax.tree.map(lambda g: jnp.where(sound | jnp.isfinite(g), g, 0), grads)


def _random_score(step):
  """A score that knows the step only: the same in every run of the job."""

  def fn(measured):
    key = jax.random.fold_in(jax.random.key(0), step)
    return jax.random.uniform(key, measured.losses.shape, measured.losses.dtype)

  return gm.scores.Score(RANDOM, fn)


def _mimic_gradient(losses_fn, method, config, outputs):
  direction = direction_of(method.direction, losses_fn, outputs)

  def value_and_grad_by(score):
    return gm.mimic_value_and_grad(
      losses_fn,
      direction=direction,
      layers=config.layers,
      score=score,
      weighting=method.weighting,
      scope=config.scope,
      engine=config.engine,
      microbatch_size=getattr(config, "microbatch_size", None),
      has_aux=True,
      check_independence=getattr(config, "check_independence", True),
    )

  value_and_grad = None
  if method.score != RANDOM:
    value_and_grad = value_and_grad_by(method.score)

  def gradient(state, reference, batch):
    if method.score == "excess_loss":
      reference, _ = outputs.losses_and_hits(reference, batch)
    by = value_and_grad or value_and_grad_by(_random_score(state.step))
    (loss, info), grads = by(
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
