"""The jitted train and eval steps."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradmimic_jax as gm
from experiments import methods
from experiments.methods import Method
from experiments.runtime import programs, sharding
from experiments.tasks.base import Outputs
from experiments.training import gradients, memory as memory_lib, path
from experiments.training.gradients import StepOutput

# Alone and among others under vmap, these draw the same numbers.
_KEYS = "threefry2x32"
_MASKS = 0x6D61736B  # keeps masks apart from what else is drawn by the seed


class TrainState(NamedTuple):
  """The state that a run carries from step to step."""

  step: jax.Array  # [], updates done so far
  params: Any  # the learner's parameters
  opt_state: Any  # the optimizer's state
  model_state: Any = ()  # a ModelState; () where training is as evaluation
  # The exponential average to evaluate by: params and statistics; () if none.
  average: Any = ()
  memory: Any = ()  # a Memory; () where every step has scores of its own


class ModelState(NamedTuple):
  """What a model carries from step to step besides its parameters."""

  key: Any  # uint32 [2], from the seed: samples' keys are made of it
  statistics: Any  # such as BatchNorm's; () if there are none


@functools.partial(jax.jit, static_argnames=("tx", "average", "samples"))
def init_state(
  params: Any,
  tx: optax.GradientTransformation,
  model_state: Any = (),
  *,
  average: bool = False,
  samples: int = 0,
) -> TrainState:
  """Makes the state before the first step, as one program.

  Args:
    params: the learner's.
    tx: the optimizer, one object for runs that share the program.
    model_state: as in `TrainState`.
    average: whether to keep an average, for a train step that has one.
    samples: number of samples whose scores are remembered, for one that does.

  Returns:
    The state.
  """
  state = TrainState(
    jnp.zeros([], jnp.int32),
    params,
    tx.init(params),
    jax.tree.map(jnp.asarray, model_state),
    memory=memory_lib.init(samples) if samples else (),
  )
  if not average:
    return state
  # Copies, as no buffer can be donated twice.
  return state._replace(average=jax.tree.map(jnp.copy, _averaged_of(state)))


def make_model_state(outputs: Outputs, statistics: Any, seed: int) -> Any:
  """Makes a model's state before the first step, for `init_state`.

  Args:
    outputs: the task's.
    statistics: the model's; `()` if it has none.
    seed: of the random masks in training.

  Returns:
    A ModelState; `()` for a model whose training is as evaluation.
  """
  if outputs.train is None:
    return ()
  key = jax.random.fold_in(jax.random.key(seed, impl=_KEYS), _MASKS)
  # On the host, from where every process can give it to its devices.
  return ModelState(np.asarray(jax.random.key_data(key)), statistics)


def _averaged_of(state):
  return {"params": state.params, "statistics": gradients.get_statistics(state)}


def evaluated(state: TrainState) -> tuple[Any, dict[str, Any]]:
  """Picks what a run is evaluated by: the average, if it keeps one.

  Args:
    state: the run's.

  Returns:
    Parameters, and `{"statistics": ...}` if the model has some.
  """
  found = state.average or _averaged_of(state)
  return found["params"], gradients.as_variables(found["statistics"])


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
  average: float = 0.0,
  memory: memory_lib.Plan | None = None,
  measures: bool = True,
  out_shardings: Any = None,
) -> jax.stages.Wrapped:
  """Makes a jitted step of one method.

  Args:
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    tx: the optimizer, over averaged gradients.
    method: weights the samples; None is the plain mean.
    config: `config.mimic`: `layers`, `scope`, `engine`, `microbatch_size` and
      `check_independence`.
    outputs: the task's, for methods that go by outputs and for models whose
      training isn't as evaluation; they then replace losses_fn.
    expand: `(batch, resident) -> batch`, the task's, which comes before any
      loss; None: batches come as losses_fn takes them.
    average: decay of the exponential average, as in `make_step`.
    memory: what is remembered of scores; None: nothing.
    measures: with a memory, whether the step measures scores, or goes by those
      remembered.
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
    and optimizer stay as they are, and so do the model's statistics:
    `metrics["skipped"]` is 1, and `step` counts on. A model that is random in
    training gets a key for each sample, by the seed, the step and the sample's
    place in the batch of all processes.

  Raises:
    ValueError: losses that depend on batch mates, in microbatches or in an
      engine that shows one sample at a time.
  """
  gradients.check_coupled(config, outputs)
  if config.microbatch_size is not None:
    gradients.check_couples(outputs, "config.mimic.microbatch_size")
  gradient = memory_lib.remembering(
    lambda method: make_gradient(losses_fn, method, config, outputs),
    method,
    memory,
    measures=measures,
  )
  is_batch = method is not None and method.direction in gradients.BATCHES
  step = make_step(
    _with_keys(gradient),
    tx,
    average=average,
    expand=expand,
    reference_is_batch=is_batch,
  )
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=out_shardings,
  )


def make_gradient(
  losses_fn: Callable[..., Any],
  method: Method | None,
  config: Any,
  outputs: Outputs | None = None,
) -> gradients.Gradient:
  """Makes the gradient by which a method's steps go.

  Args:
    losses_fn: as in `make_train_step`, and so are the others.
    method: weights the samples; None is the plain mean.
    config: `config.mimic`.
    outputs: the task's.

  Returns:
    The gradient.
  """
  if method is None or method.score is None:
    return gradients.make_plain(losses_fn, method, config, outputs)
  if not method.detached:
    return gradients.make_attached(losses_fn, method, outputs)
  make = path.make_path if method.is_measured_apart else gradients.make_mimic
  return make(losses_fn, method, config, outputs)


def _with_keys(gradient):
  """Gives the batch a key for each sample, where the model is told."""

  def with_keys(state, reference, batch):
    if state.model_state != ():
      key = jax.random.wrap_key_data(state.model_state.key, impl=_KEYS)
      key = jax.random.fold_in(key, state.step)
      places = jnp.arange(batch["mask"].size, dtype=jnp.uint32)
      keys = jax.vmap(functools.partial(jax.random.fold_in, key))(places)
      batch = {**batch, "key": keys}
    return gradient(state, reference, batch)

  return with_keys


def make_step(
  gradient: Callable[[TrainState, Any, Any], tuple[Any, StepOutput]],
  tx: optax.GradientTransformation,
  *,
  average: float = 0.0,
  expand: Callable[[Any, Any], Any] | None = None,
  reference_is_batch: bool = False,
) -> Callable[..., tuple[TrainState, StepOutput]]:
  """Makes a step as `make_train_step` does, by any gradient, and not jitted.

  Args:
    gradient: `(state, reference, batch) -> (gradient, StepOutput)`.
    tx: the optimizer, over averaged gradients.
    average: decay d of the exponential average. After step t it is `sum_i
      d^(t-i) x_i / sum_i d^(t-i)` over the parameters and statistics x_i that
      steps 1 to t left behind; those before the first step are not in it. 0:
      there is none.
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
    new = state._replace(params=params, opt_state=opt_state)
    if output.statistics != ():
      new = new._replace(
        model_state=state.model_state._replace(statistics=output.statistics)
      )
      output = output._replace(statistics=())
    if output.memory != ():
      new = new._replace(memory=output.memory)
      output = output._replace(memory=())
    sound = _is_sound(
      (grads, gradients.get_statistics(new)),
      output.metrics["nonfinite"],
      batch["mask"],
    )
    new = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, state)
    new = new._replace(step=state.step + 1)
    if average:
      new = new._replace(average=_average(new, average))
    output.metrics["grad_norm"] = optax.tree.norm(grads)
    output.metrics["skipped"] = (~sound).astype(jnp.int32)
    return new, output

  return train_step


def _expanded(expand, batch, resident):
  return batch if expand is None else expand(batch, resident)


def _average(state, decay):
  """Moves the average toward a state, by `(1 - decay) / (1 - decay^step)`."""
  step = state.step.astype(jnp.float32)
  rate = (1 - decay) / -jnp.expm1(step * math.log(decay))

  def move(old, new):
    if not jnp.issubdtype(new.dtype, jnp.floating):
      return new  # a counter, say
    return old + rate.astype(old.dtype) * (new - old)

  return jax.tree.map(move, state.average, _averaged_of(state))


@programs.once
def make_score_step(
  losses_fn: Callable[..., Any],
  method: Method | None,
  config: Any,
  outputs: Outputs | None = None,
  *,
  expand: Callable[[Any, Any], Any] | None = None,
  out_shardings: Any = None,
) -> Callable[..., dict[str, jax.Array]]:
  """Makes a jitted step that scores a batch; once for equal arguments.

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
    as in `make_train_step`. Models are evaluated, not trained: without dropout,
    and by the statistics that are given as the keyword argument `statistics`.

  Raises:
    ValueError: a method without scores of single samples, or microbatches of
      losses that depend on batch mates.
  """
  if method is None or not methods.tells_samples_apart(method):
    raise ValueError(
      "config.method gives no scores that say anything about the samples;"
      " expected one that has, such as grad_mimic."
    )
  gradients.check_coupled(config, outputs)
  scores_fn = gm.mimic_scores(
    **gradients.make_options(losses_fn, method, config, outputs)
  )

  def score_step(params, reference, batch, resident=None, **variables):
    batch = _expanded(expand, batch, resident)
    if method.direction in gradients.BATCHES:
      reference = _expanded(expand, reference, resident)
    found = scores_fn(params, reference, batch, mask=batch["mask"], **variables)
    return {"score": found.scores, "loss": found.losses}

  return jax.jit(score_step, out_shardings=out_shardings)


def _is_sound(grads, nonfinite, mask):
  """True if a sample is finite, and so is the gradient of all that are."""
  finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]
  return jnp.all(jnp.stack(finite)) & (nonfinite < jnp.sum(mask))
