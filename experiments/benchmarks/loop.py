"""Measures what the training loop costs beside its jitted steps.

The loop is the one that all training jobs go through, with all it does: it
reads, puts on devices, logs, writes the ledger and saves. In turn with it, the
same steps run one after the other on a batch that stays on the devices.
"""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from configs import classification
from experiments.runtime import (
  metrics as writers,
  prefetch,
  workdir as workdir_lib,
)
from experiments.training import loop, steps, trainer as train

RESULT_FILE = "overhead.json"
# In turn: so many steps of the loop, with a checkpoint and files of metrics and
# scores at their end, and so many on their own. The first rounds warm up.
_STEPS = 100
_ROUNDS = 10
_WARM_UP = 2


def measure(
  config: Any, workdir: Any, *, steps_a_round: int = _STEPS
) -> dict[str, Any]:
  """Measures the loop's overhead; goes over the data as often as it takes.

  Args:
    config: as `configs/classification.py` describes it.
    workdir: the folder; gets what a run of `experiments.train` leaves there,
      and `overhead.json`.
    steps_a_round: how many steps of each kind are timed in turn.

  Returns:
    What is in `overhead.json`: `overhead`, everything but the steps as a share
    of their time (the median of the rounds), its quartiles, the seconds a step
    takes by itself and in the loop, and `data_wait`, the share of the loop's
    time in which nothing ran for want of data.

  Raises:
    ValueError: as `train.train_and_evaluate`; a workdir that was used before.
  """
  folder = workdir_lib.claim(workdir, config, classification, job="loop")
  if (folder / writers.METRICS_FILE).exists():
    raise ValueError(
      f"workdir {folder} was used before; expected a new one to measure in."
    )
  run = train.Run(config, folder)
  alone = _Alone(run, steps_a_round)
  total = _ROUNDS * steps_a_round
  loop.run(
    folder,
    run.state,
    run.batches,
    schedule=run.schedule._replace(
      total_steps=total,
      eval_every=steps_a_round,
      save_every=steps_a_round,
      keep_every=0,
    ),
    fingerprint=run.fingerprint,
    train_step=run.train_step,
    take=run.take,
    evaluate=alone,
    ledger=run.ledger(),
  )
  pairs = alone.pairs[_WARM_UP:]
  shares = [inside / outside - 1 for inside, outside in pairs]
  rows = writers.read_metrics(folder / writers.METRICS_FILE, timings=True)
  waits = [
    row["data_wait"]
    for row in rows
    if "data_wait" in row and row["step"] >= _WARM_UP * steps_a_round
  ]
  low, middle, high = statistics.quantiles(shares, n=4)
  found = {
    "overhead": middle,
    "overhead_quartiles": [low, high],
    "step_seconds": statistics.median(x for _, x in pairs) / steps_a_round,
    "loop_seconds": statistics.median(x for x, _ in pairs) / steps_a_round,
    "data_wait": statistics.fmean(waits),
    "machine": workdir_lib.machine(),
  }
  workdir_lib.write_json(folder / RESULT_FILE, found)
  return found


class _Alone:
  """Called where the loop evaluates: times the same steps by themselves.

  Attributes:
    pairs: seconds of the loop since the last call, and of those steps.
  """

  def __init__(self, run: train.Run, count: int):
    self._step, self._count = run.train_step, count
    batches = run.batches
    start = batches.get_state()
    read = prefetch.Read(next(batches), batches.get_state(), 0)
    batches.set_state(start)
    taken = run.take(0, read)
    self._given = taken.reference, jax.device_put(taken.batch)
    # The step takes its state's memory, so these steps need one of their own.
    self._state = jax.tree.map(jnp.copy, run.state)
    self.pairs: list[tuple[float, float]] = []
    self._since: float | None = None

  def __call__(self, params: Any) -> dict[str, float]:
    """Times a round.

    Args:
      params: the loop's, which are left alone.

    Returns:
      Nothing to write.
    """
    inside = 0.0 if self._since is None else time.perf_counter() - self._since
    since = time.perf_counter()
    state, output = self._state, None
    waiting: list[steps.StepOutput] = []
    for _ in range(self._count):
      state, output = self._step(state, *self._given)
      waiting.append(output)
      if len(waiting) > 2:  # a queue is kept full, as in the loop
        jax.block_until_ready(waiting.pop(0))
    self._state = jax.block_until_ready(state)
    outside = time.perf_counter() - since
    if self._since is not None:
      self.pairs.append((inside, outside))
    self._since = time.perf_counter()
    return {}


def main(config: Any, workdir: str) -> None:
  """Measures, then prints what was found."""
  print(json.dumps(measure(config, workdir), indent=2))
