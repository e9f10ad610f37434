"""The scores that a run remembers of its samples from epoch to epoch.

With s_e(i) the score of sample i in epoch e, its weight may go by

  s_k(i),                       k = e - e mod K: measured every K-th epoch only,
  (s_0(i) + ... + s_e(i)) / (e + 1):       an average over the epochs so far.

An epoch that measures nothing costs what plain training costs, but for the
second pass of microbatches. A sample that was never measured, as a batch that
is not full was left out, counts like the mean of its batch mates' scores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.methods import Method
from experiments.training.gradients import Gradient

# The position of a batch's samples among all, int32 [B].
POSITION = "position"


class Memory(NamedTuple):
  """What a state remembers of the scores of N samples."""

  score: jax.Array  # float32 [N], the last one or the average
  epochs: jax.Array  # int32 [N], that measured it


class Plan(NamedTuple):
  """What a run remembers, and when it measures."""

  samples: int  # N
  steps_per_epoch: int
  refresh_epochs: int  # scores are measured every so many epochs

  def measures(self, step: int) -> bool:
    """True if a step measures scores, False if it goes by those remembered."""
    return step // self.steps_per_epoch % self.refresh_epochs == 0


def make_plan(
  config: Any,
  method: Method | None,
  *,
  samples: int | None,
  steps_per_epoch: int | None,
) -> Plan | None:
  """Plans what a run remembers.

  Args:
    config: `config.mimic`: `refresh_epochs`.
    method: the run's.
    samples: number N of samples of the data; None: it isn't known.
    steps_per_epoch: batches in a pass over them; None: there is no end.

  Returns:
    The Plan; None: each step has scores of its own, or none.

  Raises:
    ValueError: fewer epochs than one, a method whose weights can't go by scores
      that are given, or samples that are not known.
  """
  epochs = config.refresh_epochs
  if epochs < 1:
    raise ValueError(
      f"config.mimic.refresh_epochs is {epochs}; expected at least 1."
    )
  if method is None or method.score is None or method.by_chance:
    return None
  if epochs == 1 and not method.averaged:
    return None
  if not method.detached:
    raise ValueError(
      f"config.mimic.refresh_epochs is {epochs}, and the gradient of"
      " config.method takes that of its weights along; expected 1."
    )
  if samples is None or steps_per_epoch is None:
    raise ValueError(
      "config.method averages scores over epochs, or"
      f" config.mimic.refresh_epochs (it is {epochs}) is above 1, and this data"
      " has no epochs; expected data that has some, or neither."
    )
  return Plan(samples, steps_per_epoch, epochs)


def init(samples: int) -> Memory:
  """Makes the memory of N samples before the first step."""
  return Memory(jnp.zeros([samples]), jnp.zeros([samples], jnp.int32))


def remembering(
  make_gradient: Callable[[Method | None], Gradient],
  method: Method | None,
  plan: Plan | None,
  *,
  measures: bool = True,
) -> Gradient:
  """Makes a method's gradient, which weighs by what is remembered, too.

  Args:
    make_gradient: makes the gradient of a method.
    method: the run's.
    plan: the run's; None: nothing is remembered.
    measures: False: weights go by the scores remembered. Not a matter of the
      state, as XLA's CPU backend makes convolutions in a branch 26 times as
      slow as outside.

  Returns:
    The gradient. With a plan it is of a state with a Memory, and of batches
    with POSITION, and its output has the memory that the step leaves. Where
    nothing is measured, the samples' scores are those remembered.
  """
  if method is None or plan is None:
    return make_gradient(method)
  if measures:
    return _make_measuring(make_gradient, method, plan)
  return _make_between(make_gradient, method)


def _make_measuring(make_gradient, method, plan):
  """Makes the gradient of epochs that measure scores, and remember them."""
  measuring = make_gradient(method)

  def gradient(state, reference, batch):
    known = jax.tree.map(lambda x: x[batch[POSITION]], state.memory)

    def average(scores):
      if not method.averaged:
        return scores
      return known.score + (scores - known.score) / (known.epochs + 1)

    def weigh(scores, mask, step):
      return method.weighting(average(scores), mask, step)

    measure = measuring
    if method.averaged:
      measure = make_gradient(method._replace(weighting=weigh))
    grads, output = measure(state, reference, batch)
    scores = output.samples["score"]
    # A padded row is no sample, and a broken one says nothing.
    sound = batch["mask"] & jnp.isfinite(scores)
    rows = jnp.where(sound, batch[POSITION], plan.samples)
    memory = Memory(
      state.memory.score.at[rows].set(average(scores), mode="drop"),
      state.memory.epochs.at[rows].add(1, mode="drop"),
    )
    return grads, output._replace(memory=memory)

  return gradient


def _make_between(make_gradient, method):
  """Makes the gradient of epochs that go by the scores remembered."""
  given = make_gradient(Method("offline_norms", "given", method.weighting))

  def gradient(state, reference, batch):
    del reference
    known = jax.tree.map(lambda x: x[batch[POSITION]], state.memory)
    return given(state, _fill(known, batch["mask"]), batch)

  return gradient


def _fill(known, mask):
  """Returns the scores; those never measured are the mean of the batch's."""
  measured = mask & (known.epochs > 0)
  total = jnp.sum(jnp.where(measured, known.score, 0))
  mean = total / jnp.maximum(jnp.sum(measured), 1)
  return jnp.where(known.epochs > 0, known.score, mean)
