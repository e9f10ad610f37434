"""Several steps in one compiled call: how many, and the call itself.

A step on small data takes less time than the host needs to start it, fetch its
outputs and write them down. One call for several steps does that once for all.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from experiments.methods import Method
from experiments.runtime import programs
from experiments.tasks.base import Outputs
from experiments.training import memory as memory_lib, steps

# What a call should take at least, by a rough count of its arithmetic: the host
# needs some two milliseconds around it.
_SECONDS = 0.05
_SPEED = {"cpu": 5e10}  # floating-point operations a second; of a device:
_ACCELERATOR = 5e13
_LONGEST = 64  # steps: a SIGTERM, and metrics, wait for the end of a call
_BYTES = 24 << 20  # of the batches of a call, several of which are in memory


class Call(NamedTuple):
  """A compiled call of a run's steps.

  Attributes:
    length: the number K of steps that it has room for.
    function: `(state, reference, batches, resident, live) -> (state,
      StepOutput)`. Batches, and the outputs, have `[K, B, ...]` in place of
      `[B, ...]`, and so has a reference that differs by batch. `live` is bool
      `[K]`: where it is False, the state stays as it is and the outputs mean
      nothing. The state is donated.
    between: the same in epochs that measure no scores; None: all do.
    memory: tells which do.
  """

  length: int
  function: Callable[..., Any]
  between: Callable[..., Any] | None = None
  memory: memory_lib.Plan | None = None

  def at(self, step: int) -> Callable[..., Any]:
    """Picks the function of the call that begins at a step."""
    if self.memory is None or self.memory.measures(step):
      return self.function
    assert self.between is not None
    return self.between


class Made(NamedTuple):
  """The jitted steps of a run, and what makes calls of several."""

  step: jax.stages.Wrapped
  between: jax.stages.Wrapped | None  # in epochs that measure no scores
  # `make_call(length, differs) -> Call`, one and the same for equal arguments;
  # `differs` says whether the reference differs by batch.
  make_call: Callable[[int, bool], Call]


class Spacing(NamedTuple):
  """The steps at which a call has to end: multiples of these, and some more."""

  every: tuple[int, ...]  # multiples, such as of evaluations and checkpoints
  at: tuple[int, ...] = ()  # single steps, such as of a profile
  total: int = 0  # the last one


def cut(first: int, length: int, spacing: Spacing) -> Iterator[int]:
  """Cuts the steps that are left into calls.

  Args:
    first: the step to begin at.
    length: steps that a call has room for.
    spacing: where calls have to end.

  Yields:
    The number of steps of each call.

  Example:
    >>> list(cut(3, 4, Spacing((10,), total=15)))
    [4, 3, 4, 1]
  """
  while first < spacing.total:
    ends = [(first // every + 1) * every for every in spacing.every]
    ends += [step for step in spacing.at if step > first]
    count = min(length, spacing.total - first, *(end - first for end in ends))
    yield count
    first += count


def choose_length(
  asked: int,
  spacing: Spacing,
  *,
  step: Any,
  given: Callable[[], tuple[Any, ...]],
  devices: int = 1,
) -> int:
  """Chooses the number of steps in a call.

  Where the config has 0, by a rule that depends on the run and on the kind of
  its devices alone: as many as make a call of 50 ms, by a rough count of its
  multiplications, but at most 64, no more than there are from one evaluation or
  checkpoint to the next (in calls of about equal length), and no more than
  24 MiB of batches. One on CPUs where a step has convolutions, which a loop
  makes 29 times as slow there.

  Args:
    asked: `config.steps_per_call`.
    spacing: where calls have to end.
    step: the jitted step.
    given: gives what one step is called with: state, reference, batch and
      resident. Called where the rule is asked.
    devices: number of devices that share a step.

  Returns:
    The number K.

  Raises:
    ValueError: a negative number.
  """
  if asked < 0:
    raise ValueError(
      f"config.steps_per_call is {asked}; expected a number of steps, or 0 for"
      " as many as it takes."
    )
  room = min(*spacing.every, spacing.total)
  longest = asked
  if not asked:
    state, reference, batch, resident = given()
    jaxpr = step.trace(state, reference, batch, resident).jaxpr
    work, convolves = _count_work(jaxpr.jaxpr)
    platform = jax.default_backend()
    if platform == "cpu" and convolves:
      return 1
    seconds = work / devices / _SPEED.get(platform, _ACCELERATOR)
    size = sum(x.nbytes for x in jax.tree.leaves((batch, reference)))
    longest = min(
      math.ceil(_SECONDS / max(seconds, _SECONDS / _LONGEST)),
      max(1, _BYTES // max(size, 1)),
    )
  # Of about equal length, so that few of them have room for no step.
  return math.ceil(room / math.ceil(room / longest))


def _count_work(jaxpr):
  """Counts multiplications and additions; also whether it has convolutions."""
  work, convolves = 0, False
  for equation in jaxpr.eqns:
    size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if equation.primitive.name == "dot_general":
      contracted = equation.params["dimension_numbers"][0][0]
      shape = equation.invars[0].aval.shape
      work += 2 * size * math.prod(shape[axis] for axis in contracted)
    elif equation.primitive.name == "conv_general_dilated":
      convolves = True
      kernel = equation.invars[1].aval.shape
      features = equation.params["dimension_numbers"].rhs_spec[0]
      work += 2 * size * math.prod(kernel) // kernel[features]
    repeats = equation.params.get("length", 1)
    for inner in core.jaxprs_in_params(equation.params):
      more, also = _count_work(inner)
      work += repeats * more
      convolves |= also
  return work, convolves


@programs.once
def make(
  losses_fn: Callable[..., Any],
  tx: Any,
  method: Method | None,
  config: Any,
  outputs: Outputs | None,
  expand: Callable[[Any, Any], Any] | None,
  *,
  average: float = 0.0,
  memory: memory_lib.Plan | None = None,
  out_shardings: Any = None,
) -> Made:
  """Makes a run's step, and calls of several; once for equal arguments.

  Args:
    losses_fn: as `steps.make_train_step` takes it, like all that follow.
    tx: the optimizer.
    method: weights the samples; None is the plain mean.
    config: `config.mimic`.
    outputs: the task's.
    expand: the task's; None: batches come as the model takes them.
    average: decay of the exponential average.
    memory: what is remembered of scores.
    out_shardings: of one step's results.

  Returns:
    What was made.
  """

  def make_step(measures):
    return steps.make_train_step(
      losses_fn,
      tx,
      method,
      config,
      outputs,
      expand=expand,
      average=average,
      memory=memory,
      measures=measures,
      out_shardings=out_shardings,
    )

  step, between = make_step(True), None
  if memory is not None and memory.refresh_epochs > 1:
    between = make_step(False)

  @programs.once
  def make_of_length(length, differs):
    options = {"differs": differs, "out_shardings": out_shardings}
    call = make_call(step, length, **options)
    if between is None:
      return call
    other = make_call(between, length, **options)
    return call._replace(between=other.function, memory=memory)

  return Made(step, between, make_of_length)


def make_call(
  step: Callable[..., Any],
  length: int,
  *,
  differs: bool,
  out_shardings: Any = None,
) -> Call:
  """Makes a Call of steps.

  Args:
    step: `(state, reference, batch, resident) -> (state, StepOutput)`.
    length: how many it has room for.
    differs: whether the reference differs by batch.
    out_shardings: of one step's results.

  Returns:
    The Call.
  """

  def several(state, reference, batches, resident, live):
    def one(state, given):
      batch, own, is_live = given
      new, output = step(state, own if differs else reference, batch, resident)
      if length > 1:
        new = jax.tree.map(lambda a, b: jnp.where(is_live, a, b), new, state)
      return new, output

    stacked = (batches, reference if differs else None, live)
    if length > 1:
      return jax.lax.scan(one, state, stacked)
    state, output = one(state, jax.tree.map(lambda x: x[0], stacked))
    return state, jax.tree.map(lambda x: x[None], output)

  if out_shardings is not None:
    of_state, output = out_shardings
    out_shardings = of_state, jax.tree.map(stacked_sharding, output)
  return Call(
    length, jax.jit(several, donate_argnums=0, out_shardings=out_shardings)
  )


def stacked_sharding(sharding: NamedSharding) -> NamedSharding:
  """Makes the sharding of arrays `[K, ...]` that are stacked of `[...]`."""
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
