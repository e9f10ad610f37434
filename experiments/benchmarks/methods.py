"""What a step of each method costs, against a plain one: time and memory.

The steps are those of training, optimizer included, on the first batch. They
are timed in turn, round by round: a time is the median over the rounds of its
ratio to sgd's in the same round. Memory is the compiler's own count of what a
step holds besides its arguments and results. The reference's outputs are found
once, before training, and don't count.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from configs import classification
from experiments.reporting import tables
from experiments.runtime import prefetch, workdir as workdir_lib
from experiments.studies import plan, settings as tuning
from experiments.training import trainer as train

COSTS_FILE = "costs.json"
_ROUNDS = 15
_SHORTEST = 0.1  # seconds that a method's part of a round should take


def measure(config: Any, workdir: Any) -> dict[str, Any]:
  """Measures a step of every method of `config.study.methods`.

  Args:
    config: as `configs/classification.py` describes it.
    workdir: gets `costs.json`, and what methods keep in a run's folder.

  Returns:
    What is in `costs.json`: for each method `time` and `memory` relative to
    sgd's (`memory` None where the compiler doesn't tell), and `milliseconds`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set or a reference that is not there.
  """
  folder = workdir_lib.claim(workdir, config, classification, job="methods")
  names = list(dict.fromkeys(("sgd", *config.study.methods)))
  found = {
    "machine": workdir_lib.machine(),
    "batch_size": config.batch_size,
    "methods": compare({name: _step(config, folder, name) for name in names}),
  }
  workdir_lib.write_json(folder / COSTS_FILE, found)
  return found


def _step(config, folder, name):
  tuned = tuning.read(config.study.tuned).get(name, {})
  copy = plan.derived(config, seed=config.seed, method=name, **tuned)
  run = train.Run(copy, folder)
  taken = run.take(0, prefetch.Read(next(run.batches), None, None))
  return TimedStep(run.train_step, run.state, taken.reference, taken.batch)


class TimedStep:
  """A method's compiled step on one batch."""

  def __init__(self, train_step: Any, state: Any, reference: Any, batch: Any):
    """Compiles it.

    Args:
      train_step: what `steps.make_train_step` gives.
      state: a state of the run, which is used up.
      reference: what the step goes by.
      batch: to take the step on, again and again.
    """
    self._others = reference, jax.device_put(batch)
    self._state = state
    self._step = train_step.lower(state, *self._others).compile()
    analysis = self._step.memory_analysis()
    self.memory = analysis and analysis.temp_size_in_bytes
    self.seconds(1)  # warm

  def seconds(self, calls: int) -> float:
    """Seconds a step, of several in a row."""
    start = time.perf_counter()
    for _ in range(calls):
      self._state, output = self._step(self._state, *self._others)
    jax.block_until_ready((self._state, output))
    return (time.perf_counter() - start) / calls


def compare(
  steps: Mapping[str, TimedStep], plain: str = "sgd"
) -> dict[str, dict[str, float | None]]:
  """Times steps in turn, round by round.

  Args:
    steps: by name.
    plain: the one that the others are relative to.

  Returns:
    For each `time` and `memory` relative to the plain one's (`memory` None
    where the compiler doesn't tell), and `milliseconds`.
  """
  calls = {
    name: max(1, round(_SHORTEST / step.seconds(3)))
    for name, step in steps.items()
  }
  rounds = [
    {name: step.seconds(calls[name]) for name, step in steps.items()}
    for _ in range(_ROUNDS)
  ]
  memory = steps[plain].memory
  return {
    name: {
      "time": float(np.median([r[name] / r[plain] for r in rounds])),
      "milliseconds": 1000 * float(np.median([r[name] for r in rounds])),
      "memory": step.memory / memory if step.memory and memory else None,
    }
    for name, step in steps.items()
  }


def main(config: Any, workdir: str) -> None:
  """Measures, then prints the table."""
  found = measure(config, workdir)
  rows = [
    [name, *(tables.number(entry[key], 2) for key in ("time", "memory"))]
    for name, entry in found["methods"].items()
  ]
  for line in tables.markdown(["method", "time", "memory"], rows):
    print(line)
