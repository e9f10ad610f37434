"""Measures what the training loop costs beside its jitted steps.

The loop is the one that all training jobs go through, with all it does: it
reads, puts on devices, logs, writes the ledger and saves. In turn with it, the
same steps run one after the other on a batch that stays on the devices.
"""

import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from configs.benchmark import loop as loop_config
from experiments.benchmarks import timing
from experiments.runtime import (
  metrics as writers,
  prefetch,
  workdir as workdir_lib,
)
from experiments.training import loop, trainer

RESULT_FILE = "loop.json"
# In turn: so many steps of the loop, with a checkpoint and files of metrics and
# scores at their end, and so many on their own. The first rounds warm up.
_STEPS = 100
_ROUNDS = 10
_WARM_UP = 2


def measure(
  config: config_dict.ConfigDict, workdir: Any, *, steps_a_round: int = _STEPS
) -> dict[str, Any]:
  """Measures the loop's overhead; goes over the data as often as it takes.

  Args:
    config: as `configs/benchmark/loop.py` describes it.
    workdir: the folder; gets what a run of `experiments.train` leaves there,
      and `loop.json`.
    steps_a_round: how many steps of each kind are timed in turn.

  Returns:
    What is in `loop.json`: `overhead`, everything but the steps as a share
    of their time (the median of the rounds), its quartiles, the seconds a step
    takes by itself and in the loop, and `data_wait`, the share of the loop's
    time in which nothing ran for want of data.

  Raises:
    ValueError: as `trainer.train_and_evaluate`; a workdir that was used before.
  """
  folder = workdir_lib.claim(workdir, config, loop_config, job="loop")
  if (folder / writers.METRICS_FILE).exists():
    raise ValueError(
      f"workdir {folder} was used before; expected a new one to measure in."
    )
  run = trainer.Run(config, folder)
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
    train_step=lambda *given: run.train_step(*given, run.task.resident),
    take=run.take,
    evaluate=alone,
    ledger=run.ledger(),
  )
  pairs = alone.pairs[1 + _WARM_UP :]  # the first has no steps of the loop
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
    pairs: seconds since the call before, of the loop; and of those steps.
  """

  def __init__(self, run: trainer.Run, count: int):
    self._count = count
    batches = run.batches
    start = batches.get_state()
    read = prefetch.Read(next(batches), batches.get_state(), 0)
    batches.set_state(start)
    taken = run.take(0, read)
    self._step = timing.TrainStep(
      run.train_step,
      jax.tree.map(jnp.copy, run.state),
      taken.reference,
      jax.device_put(taken.batch),
      run.task.resident,
    )
    self.pairs: list[tuple[float, float]] = []
    self._watch = timing.Watch()

  def __call__(self, params: Any) -> dict[str, float]:
    """Times a round.

    Args:
      params: the loop's, which are left alone.

    Returns:
      Nothing to write.
    """
    inside = self._watch.lap()
    # A queue is kept full, as in the loop.
    each = timing.seconds(self._step, self._count, ahead=2)
    self.pairs.append((inside, self._count * each))
    self._watch.lap()
    return {}


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """All that was found, as JSON."""
  del config
  return json.dumps(results, indent=2)
