"""Benchmark: time and memory of each method's step, against a plain one.

The steps are those of training, optimizer included, on the first batch. They
are timed in turn, round by round: a time is the median over the rounds of its
ratio to sgd's in the same round. Memory is the compiler's own count of what a
step holds besides its arguments and results, and so are FLOPs. The reference's
outputs are found once, before training, and don't count.

Where `config.mimic.refresh_epochs` is above 1, there is also
`<method>_between`: a step of the epochs that measure no scores.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from configs import base
from experiments import tasks
from experiments.benchmarks import timing
from experiments.runtime import tables, workdir as workdir_lib
from experiments.studies import comparison, plan
from experiments.training import trainer

RESULT_FILE = comparison.COSTS_FILE
_PLAIN = "sgd"
_RATIOS = ("time", "flops", "memory")
_ROUNDS = 15
_SHORTEST = 0.1  # seconds that a method's part of a round should take


def measure(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Measures a step of every run of a study, at each batch size.

  Args:
    config: any task's, with `benchmark`. `study` names the methods and, in
      `cost_batch_sizes`, the batches.
    workdir: gets `methods.json`, and what methods keep in a run's folder.

  Returns:
    What is in `methods.json`: `batches`, for each batch size and run `time`,
    `flops` and `memory` relative to the plain step's (the last two None where
    the compiler doesn't tell), and `milliseconds`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set or a reference that is not there.
  """
  config = config.copy_and_resolve_references().unlock()
  del config.benchmark
  names = dict.fromkeys((_PLAIN, *config.study.methods))
  config.study.methods = tuple(names)
  config.lock()
  task = tasks.get(config)
  folder = workdir_lib.claim(workdir, config, task.configs, job="methods")
  settings = plan.plan_settings(config)
  found: dict[str, Any] = {"machine": workdir_lib.machine(), "batches": {}}
  for size in config.study.cost_batch_sizes or (config.batch_size,):
    sized = _sized(config, size)
    found["batches"][str(size)] = _compare(_make_steps(sized, folder, settings))
    # After each size: the next may be too large for the machine.
    workdir_lib.write_json(folder / RESULT_FILE, found)
  return found


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """Batches and methods, as Markdown."""
  del config
  rows = [
    [size, name, *(tables.number(entry[field], 2) for field in _RATIOS)]
    for size, entries in results["batches"].items()
    for name, entry in entries.items()
  ]
  return "\n".join(tables.markdown(["batch", "step", *_RATIOS], rows))


def _sized(config, size):
  """The config at a batch size of `study.cost_batch_sizes`."""
  copy = config.copy_and_resolve_references().unlock()
  if config.study.cost_batch_sizes:
    copy.batch_size = size
    # The step alone is looked at: any length will do that has such a batch.
    base.add_durations(
      copy, num_steps=100, eval_every_steps=100, save_every_steps=100
    )
    if "train_size" in copy.data:
      copy.data.train_size = max(copy.data.train_size, size)
  return copy.lock()


def _make_steps(config, folder, settings):
  """Makes the steps of all runs, by name."""
  made = {}
  for name, overrides in settings.items():
    copy = config.copy_and_resolve_references().unlock()
    copy.update_from_flattened_dict(overrides)
    run = trainer.Run(copy.lock(), folder)
    with contextlib.closing(run.task):
      if run.step_between is not None:  # before its state is donated
        again = jax.tree.map(jnp.copy, run.state)
        step = timing.first_step(run, again, run.step_between)
        made[f"{name}_between"] = _Step(step)
      made[name] = _Step(timing.first_step(run, run.state))
  return made


class _Step:
  """A method's compiled step on the first batch, and what it holds."""

  def __init__(self, step):
    self.step = step
    compiled = self.step.compile()
    self.memory, self.flops = (
      timing.temporaries(compiled),
      timing.flops(compiled),
    )
    timing.seconds(self.step, 1)  # warm


def _compare(steps):
  """For each step its entry in `methods.json`."""
  timed = {name: each.step for name, each in steps.items()}
  calls = {
    name: max(1, round(_SHORTEST / timing.seconds(step, 3)))
    for name, step in timed.items()
  }
  rounds = timing.rounds(timed, calls, least=_ROUNDS)
  return {
    name: {
      "time": float(np.median([r[name] / r[_PLAIN] for r in rounds])),
      "milliseconds": 1000 * float(np.median([r[name] for r in rounds])),
      "memory": timing.ratio(each.memory, steps[_PLAIN].memory),
      "flops": timing.ratio(each.flops, steps[_PLAIN].flops),
    }
    for name, each in steps.items()
  }
