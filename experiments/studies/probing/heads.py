"""Many heads on the same features, trained in one program.

An epoch is one `lax.scan` over its batches, vmapped over seeds (which have
their own initialisation, batches and reference) and, within each, over runs
that share all of these: those of different noise rates and weighting values. A
step is the one of the general loop; where that would need every sample's
gradient, scores come in closed form instead.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import methods, models
from experiments.data import stream
from experiments.methods import Method
from experiments.studies import settings
from experiments.tasks.classification import (
  losses as classification,
  reference as reference_lib,
)
from experiments.training import gradients, memory as memory_lib, steps
from gradmimic_jax import layers as layers_lib, weighting as weighting_lib


class Batches(NamedTuple):
  """An epoch's T batches of B, as positions; leading axes may be added."""

  sample: np.ndarray  # int32 [T, B], of a sample; padding has a real one
  row: np.ndarray  # int32 [T, B], of its features, mirrored or not
  mask: np.ndarray  # bool [T, B], False for padding
  # Of the independent batches that come with them, if the method wants any.
  other_sample: np.ndarray | None
  other_row: np.ndarray | None


class Given(NamedTuple):
  """Inputs that runs don't share; axes [S, ...], [S, K, ...], S seeds x K."""

  labels: Any  # int32 [S, K, N]
  values: Any  # [S, K], of the weighting; None: as the config has it
  reference: Any  # a head [S, ...], or a batch [S, M, ...]; None
  kept: Any = None  # bool [S, K, N], who takes part; None: all


class Head(NamedTuple):
  """A linear head as the general loop has it, and its first parameters."""

  apply: Callable[[Any, jax.Array], jax.Array]
  params: Any  # [S, ...]


def create(width: int, num_classes: int, seeds: list[int]) -> Head:
  """A head for features `[B, width]`, initialised once for each seed."""
  section = config_dict.ConfigDict({"name": "mlp", "widths": ()})
  made = [
    models.create(
      section, input_shape=(1, 1, width), num_classes=num_classes, seed=seed
    )
    for seed in seeds
  ]
  params = jax.device_get([p for _, p in made])
  return Head(made[0][0], jax.tree.map(lambda *xs: np.stack(xs), *params))


def batches(
  config: config_dict.ConfigDict,
  method: Method | None,
  *,
  num_samples: int,
  indices: np.ndarray | None = None,
) -> Iterator[Batches]:
  """Yields the general loop's batches, an epoch at a time, as positions.

  Only samples at `indices` are trained on, if they are given. The features of
  mirrored images are those `num_samples` rows on.
  """
  rows = np.arange(num_samples) if indices is None else indices
  flip = bool(config.data.flip)
  paired = method is not None and method.direction == "noisy_gradient"
  plan = stream.Plan(
    num_samples,
    batch_size=config.batch_size,
    seed=config.seed,
    indices=indices,
    augmentation=stream.Augmentation(flip),
  )
  size = min(config.batch_size, len(rows))
  for epoch in range(config.num_epochs):
    parts = []
    for step in range(plan.steps_per_epoch):
      planned = plan.batch(epoch * plan.steps_per_epoch + step)
      other = (None, None)
      if paired:
        index = np.where(planned.mask, planned.rows, -1)
        drawn = reference_lib.draw_other(config.seed, rows, size, index, flip)
        other = _positions(*drawn, num_samples)
      sample, row = _positions(planned.rows, planned.flipped, num_samples)
      parts.append(Batches(sample, row, planned.mask, *other))
    yield jax.tree.map(lambda *xs: np.stack(xs), *parts)


def cut(epochs: list[Batches], count: int, steps: int) -> list[Batches]:
  """Cuts batches anew: as many epochs as `count`, of so many steps each."""
  joined = jax.tree.map(lambda *xs: np.concatenate(xs), *epochs)
  return [
    jax.tree.map(lambda x, i=i: x[i * steps : (i + 1) * steps], joined)
    for i in range(count)
  ]


def _positions(samples, mirrored, num_samples):
  """Finds the positions of the samples, and of their features."""
  index = samples.astype(np.int32)
  if mirrored is None:
    return index, index
  return index, index + np.int32(num_samples) * mirrored


def make_epoch(
  head: Head,
  tx: optax.GradientTransformation,
  name: str,
  config: config_dict.ConfigDict,
  memory: memory_lib.Plan | None = None,
  *,
  measures: bool = True,
) -> Callable[..., Any]:
  """One epoch of the method of that name, for S seeds x K runs at once.

  The temperature in `config.mimic` (or, with weights that have none, its
  fraction) gives way to the values that are given. With a memory, states have
  one, too; `measures` is as in `steps.make_train_step`.

  Returns:
    `epoch(states, given, features [V * N, D], batches [S, T, B]) -> (states,
    metrics {name: [S, K]}, samples {name: [T, S, K, B]})`; metrics are means
    over the steps, but for `nonfinite` and `skipped`, which are sums.
  """
  losses_fn = classification.make_losses_fn(head.apply)
  outputs = classification.make_outputs(
    classification.make_outputs_fn(head.apply)
  )

  def run_step(state, labels, value, kept, reference, images, batch):
    mimic = mimic_view(name, config, value)
    method = methods.create(name, mimic)
    direction = method and method.direction
    if direction == "outputs":
      reference = head.apply(reference, images[0])
    elif direction == "noisy_gradient":
      reference = {"image": images[1], "label": labels[batch.other_sample]}
    mask = batch.mask if kept is None else batch.mask & kept[batch.sample]
    step = _make_step(losses_fn, tx, method, mimic, outputs, memory, measures)
    seen = {"image": images[0], "label": labels[batch.sample], "mask": mask}
    if memory is not None:
      seen[memory_lib.POSITION] = batch.sample
    return step(state, reference, seen)

  by_run = (0, 0, 0, 0)
  over_runs = jax.vmap(run_step, in_axes=(*by_run, None, None, None))

  def seed_step(state, labels, value, kept, reference, features, batch):
    images = [features[batch.row]]
    if batch.other_row is not None:
      images.append(features[batch.other_row])
    given = labels, value, kept, reference
    return over_runs(state, *given, images, batch)

  over_seeds = jax.vmap(seed_step, in_axes=(*by_run, 0, None, 0))

  def epoch(states, given, features, batches):
    def body(states, batch):
      states, output = over_seeds(
        states,
        given.labels,
        given.values,
        given.kept,
        given.reference,
        features,
        batch,
      )
      return states, (output.metrics, output.samples)

    by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
    states, (metrics, samples) = jax.lax.scan(body, states, by_step)
    sums = {key: jnp.sum(value, axis=0) for key, value in metrics.items()}
    count = by_step.mask.shape[0]
    means = {
      key: value if key in ("nonfinite", "skipped") else value / count
      for key, value in sums.items()
    }
    return states, means, samples

  return epoch


def init_states(
  head: Head,
  tx: optax.GradientTransformation,
  runs: int,
  memory: memory_lib.Plan | None = None,
) -> steps.TrainState:
  """States `[S, K, ...]` before the first step; a seed's runs start alike."""
  samples = memory.samples if memory else 0
  states = []
  for i in range(len(jax.tree.leaves(head.params)[0])):
    params = jax.tree.map(lambda x, i=i: x[i], head.params)
    state = steps.init_state(params, tx, samples=samples)
    states.append(jax.device_get(state))
  # By NumPy, which has nothing to compile.
  return jax.tree.map(
    lambda *xs: jnp.asarray(
      np.stack([np.broadcast_to(x, (runs, *np.shape(x))) for x in xs])
    ),
    *states,
  )


def make_evaluate(head: Head) -> Callable[..., dict[str, jax.Array]]:
  """`evaluate(params [S, K, ...], features, labels) -> loss, accuracy [S, K]`.

  One run after the other: their logits together may be large.
  """
  losses_fn = classification.make_losses_fn(head.apply)

  def evaluate(params, features, labels):
    def of_run(params):
      losses, hits = losses_fn(params, {"image": features, "label": labels})
      return {
        "loss": jnp.mean(losses),
        "accuracy": jnp.mean(hits.astype(losses.dtype)),
      }

    return jax.lax.map(lambda p: jax.lax.map(of_run, p), params)

  return evaluate


def value_field(name: str, config: config_dict.ConfigDict) -> str | None:
  """The field of `config.mimic` that the grid's values are of, in a method.

  It is the strength of the method's weights, or of its mixture; None if it has
  no such thing.
  """
  field = "temperature" if config.weighting == "softmax" else "fraction"
  read = settings.fields_read(name, config)
  return next((known for known in ("mix", field) if known in read), None)


def mimic_view(
  name: str, config: config_dict.ConfigDict, value: Any
) -> types.SimpleNamespace:
  """`config.mimic` with the method's other value, which may be traced."""
  fields = {field: config[field] for field in config}
  if value is not None:
    fields[value_field(name, config)] = value
  return types.SimpleNamespace(**fields)


def _make_step(losses_fn, tx, method, config, outputs, memory, measures):
  """The general loop's step, or the same numbers by closed forms."""

  def make_gradient(method):
    if method is not None and method.score is not None and method.detached:
      score = gradients.find_score(method, outputs)
      if score.needs_norms or score.needs_gram:
        return _closed_gradient(losses_fn, method, score, config, outputs)
    return steps.make_gradient(losses_fn, method, config, outputs)

  gradient = memory_lib.remembering(
    make_gradient, method, memory, measures=measures
  )
  return steps.make_step(gradient, tx)


def _closed_gradient(losses_fn, method, score, config, outputs):
  """For scores that look at all samples' gradients, which are never made."""
  direction_fn = gradients.make_direction(method.direction, losses_fn, outputs)

  def gradient(state, reference, batch):
    params, mask = state.params, batch["mask"]
    features, logits = batch["image"], outputs.of(params, batch)
    losses, hits = outputs.losses_and_hits(logits, batch)
    errors = gm.linear_head.errors(logits, batch["label"])
    # In flattening order: bias, then kernel.
    has_bias, has_kernel = layers_lib.choose(config.layers, params)
    if not has_kernel:
      raise ValueError(
        f"config.mimic.layers is {config.layers!r}; expected layers with"
        " head/kernel among them for a method that looks at gradient norms."
      )
    direction, distance = None, jnp.zeros([])
    if score.needs_descents:
      toward = direction_fn(params, reference, batch)["head"]
      pair = (toward["kernel"], toward["bias"] if has_bias else None)
      direction, distance = pair, optax.tree.norm(pair)
    scores = gm.linear_head.scores(
      features,
      errors,
      score=score,
      direction=direction,
      has_bias=has_bias,
      mask=mask,
    )
    valid = mask & jnp.isfinite(losses) & jnp.isfinite(scores)
    weights = weighting_lib.guarded(method.weighting, scores, valid, state.step)
    kernel, bias = gm.linear_head.gradient(features, errors, weights)
    equal = valid / jnp.maximum(jnp.sum(valid), 1).astype(losses.dtype)
    if config.scope == "layers" and not has_bias:
      bias = gm.linear_head.gradient(features, errors, equal)[1]
    grads = {"head": {"bias": bias, "kernel": kernel}}
    count = jnp.maximum(jnp.sum(mask), 1)
    metrics = {
      "loss": jnp.sum(jnp.where(valid, losses, 0) * equal),
      "accuracy": jnp.sum(mask & hits) / count,
      "nonfinite": jnp.sum(mask & ~valid),
      "distance": distance,
      "effective_sample_size": gm.effective_sample_size(weights),
    }
    unknown = jnp.where(mask, jnp.nan, 0)
    samples = {
      "score": jnp.where(valid, scores, unknown),
      "weight": weights,
      "loss": jnp.where(valid, losses, unknown),
    }
    return grads, gradients.StepOutput(metrics, samples)

  return gradient
