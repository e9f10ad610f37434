"""What CLIP's steps cost, against a plain one: time and memory.

Measured as in `experiments.costs`, at each of `study.cost_batch_sizes`, with
the first of `study.weightings`.
"""

import pathlib
from typing import Any

from configs import base, contrastive
from experiments.benchmarks import methods as costs
from experiments.reporting import tables
from experiments.runtime import prefetch, workdir as workdir_lib
from experiments.studies.plan import BASELINE, plan_settings
from experiments.training import trainer as train

COSTS_FILE = costs.COSTS_FILE


def measure(config: Any, workdir: Any) -> dict[str, Any]:
  """Measures a step of each method of the study, at each batch size.

  Args:
    config: as `configs/contrastive.py` describes it, with `mimic.reference`.
    workdir: gets `costs.json`.

  Returns:
    What is in `costs.json`: `batches`, for each batch size and run of the study
    `time` and `memory` relative to the plain step's, and `milliseconds`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a reference that is not there.
  """
  folder = workdir_lib.claim(workdir, config, contrastive, job="methods")
  settings = plan_settings(config)
  found: dict[str, Any] = {"machine": workdir_lib.machine(), "batches": {}}
  for size in config.study.cost_batch_sizes:
    sized = config.copy_and_resolve_references().unlock()
    sized.batch_size = size
    # The step alone is looked at.
    base.add_durations(sized, num_steps=100, eval_every_steps=100)
    sized.checkpoint.every_steps = 100
    sized.data.train_size = max(sized.data.train_size, size)
    steps = {
      name: _step(sized, folder, settings[name])
      for name in dict.fromkeys((BASELINE, *settings))
    }
    found["batches"][str(size)] = costs.compare(steps, BASELINE)
    # After each size: the next may be too large for the machine.
    workdir_lib.write_json(folder / COSTS_FILE, found)
  return found


def _step(config, folder, overrides):
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict(overrides)
  run = train.Run(copy.lock(), folder)
  taken = run.take(0, prefetch.Read(next(run.batches), None, 0))
  return costs.TimedStep(
    run.train_step, run.state, taken.reference, taken.batch
  )


def main(config: Any, workdir: str) -> None:
  """Measures, then prints the tables."""
  found = measure(config, workdir)
  rows = [
    [size, name, *(tables.number(entry[k], 2) for k in ("time", "memory"))]
    for size, entries in found["batches"].items()
    for name, entry in entries.items()
  ]
  for line in tables.markdown(["batch", "step", "time", "memory"], rows):
    print(line)
  print(f"  {pathlib.Path(workdir) / COSTS_FILE}")
