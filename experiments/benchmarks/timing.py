"""The one stopwatch: steps in turn, round by round, and what they hold."""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.training import trainer


class Watch:
  """Seconds from one mark to the next."""

  def __init__(self):
    self._since = time.perf_counter()

  def lap(self) -> float:
    """Seconds since the last call, or since the watch was made."""
    now = time.perf_counter()
    found, self._since = now - self._since, now
    return found


class TrainStep:
  """A train step that is called again and again on one batch.

  The step takes its state's memory, so each state goes into the next call.
  """

  def __init__(self, step: Any, state: Any, *given: Any):
    """Keeps `(state, *given) -> (state, output)` and what it is given."""
    self._step, self._state, self._given = step, state, given

  def compile(self) -> Any:
    """Compiles a jitted step for what it is called with; the program."""
    self._step = self._step.lower(self._state, *self._given).compile()
    return self._step

  def __call__(self) -> Any:
    """Takes a step; its output."""
    self._state, output = self._step(self._state, *self._given)
    return output


def first_step(run: trainer.Run, state: Any, step: Any = None) -> TrainStep:
  """A step of a run on its first batch, which the run still has before it.

  It is the run's `train_step`, or the one that is given.
  """
  start = run.batches.get_state()
  batch = next(run.batches)
  run.batches.set_state(start)
  _, *given = run.example(batch)
  return TrainStep(step or run.train_step, state, *given)


def seconds(
  step: Callable[[], Any], calls: int, *, ahead: int | None = None
) -> float:
  """Mean seconds a call, of several in a row.

  The step gives arrays, which may still be computed when it returns; `ahead` of
  them may be under way when the next one starts (None: all).
  """
  watch = Watch()
  # An output that nobody waits for is let go.
  waiting = collections.deque[Any](maxlen=1 if ahead is None else None)
  for _ in range(calls):
    waiting.append(step())
    if ahead is not None and len(waiting) > ahead:
      jax.block_until_ready(waiting.popleft())
  jax.block_until_ready(list(waiting))
  return watch.lap() / calls


def rounds(
  steps: Mapping[str, Callable[[], Any]],
  calls: Mapping[str, int],
  *,
  least: int,
  at_least_seconds: float = 0.0,
  ahead: int | None = None,
) -> list[dict[str, float]]:
  """Times warm steps in turn, so that other work of the machine hits all.

  A round calls each so often in a row. There are at least so many rounds, and
  more until `at_least_seconds` are over.

  Returns:
    For each round the seconds of one call of each step.
  """
  found: list[dict[str, float]] = []
  until = time.perf_counter() + at_least_seconds
  while len(found) < least or time.perf_counter() < until:
    found.append(
      {
        name: seconds(step, calls[name], ahead=ahead)
        for name, step in steps.items()
      }
    )
  return found


def temporaries(compiled: Any) -> int | None:
  """Bytes besides arguments and results; None: the compiler doesn't tell."""
  analysis = compiled.memory_analysis()
  return None if analysis is None else analysis.temp_size_in_bytes


def ratio(ours: float | None, plain: float | None) -> float | None:
  """Divides two counts; None where one is 0 or not known."""
  return ours / plain if ours and plain else None


def flops(program: Any) -> float | None:
  """The compiler's count of a program's; None where a backend doesn't tell."""
  counts = program.cost_analysis()
  return counts and counts.get("flops")
