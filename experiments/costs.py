"""What a step of each method costs, against a plain one: time and memory.

python -m experiments.costs --workdir=runs/costs \
  --config=configs/label_noise.py:dataset=cifar10,protocol=finetune \
  --config.mimic.reference=<workdir of a finished run>

The steps are those of training, optimizer included, on the first batch. They
are timed in turn, round by round: a time is the median over the rounds of its
ratio to sgd's in the same round. Memory is the compiler's own count of what a
step holds besides its arguments and results. The reference's outputs are found
once, before training, and don't count.
"""

import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments import cli, study, tables, train, workdir as workdir_lib

COSTS_FILE = "costs.json"
_ROUNDS = 15
_SHORTEST = 0.1  # seconds that a method's part of a round should take


def measure(config: Any, workdir: Any) -> dict[str, Any]:
  """Measures a step of every method of `config.study.methods`.

  Args:
    config: as `configs/common.py` describes it.
    workdir: gets `costs.json`, and what methods keep in a run's folder.

  Returns:
    What is in `costs.json`: for each method `time` and `memory` relative to
    sgd's (`memory` None where the compiler doesn't tell), and `milliseconds`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set or a reference that is not there.
  """
  folder = workdir_lib.claim(workdir, config, free=("study.",))
  names = list(dict.fromkeys(("sgd", *config.study.methods)))
  steps = {name: _Step(config, folder, name) for name in names}
  calls = {
    name: max(1, round(_SHORTEST / step.seconds(3)))
    for name, step in steps.items()
  }
  rounds = [
    {name: step.seconds(calls[name]) for name, step in steps.items()}
    for _ in range(_ROUNDS)
  ]
  plain = steps["sgd"].memory
  found = {
    "machine": workdir_lib.machine(),
    "batch_size": config.batch_size,
    "methods": {
      name: {
        "time": float(np.median([r[name] / r["sgd"] for r in rounds])),
        "milliseconds": 1000 * float(np.median([r[name] for r in rounds])),
        "memory": step.memory / plain if step.memory and plain else None,
      }
      for name, step in steps.items()
    },
  }
  workdir_lib.write_json(folder / COSTS_FILE, found)
  return found


class _Step:
  """A method's compiled step on one batch."""

  def __init__(self, config: Any, folder: pathlib.Path, name: str):
    copy = study.derived(config, seed=config.seed, method=name)
    run = train.Run(copy, folder, train.load_data(copy))
    batch = next(run.train_batches)
    index, flipped = batch.pop("index"), batch.pop("flipped", None)
    reference = run.reference and run.reference.for_batch(index, flipped)
    self._others = reference, jax.device_put(batch)
    self._state = run.state
    self._step = run.train_step.lower(self._state, *self._others).compile()
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


def main(config: Any, workdir: str) -> None:
  """Measures, then prints the table."""
  found = measure(config, workdir)
  rows = [
    [name, *(tables.number(entry[key], 2) for key in ("time", "memory"))]
    for name, entry in found["methods"].items()
  ]
  for line in tables.markdown(["method", "time", "memory"], rows):
    print(line)


if __name__ == "__main__":
  cli.run(main)
