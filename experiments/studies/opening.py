"""What a job says before it makes the runs of a study."""

import pathlib
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from experiments.runtime import durations, terminal
from experiments.studies import plan
from experiments.training import opening, trainer


def study(
  title: str,
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  runs: Iterable[plan.Run],
) -> str:
  """Describes a study, or a tuning.

  Args:
    title: of the job.
    config: the study's.
    folder: its workdir.
    runs: that it needs.

  Returns:
    Lines.
  """
  runs = list(runs)
  finished = sum(
    (folder / f"seed{run.seed}" / run.name / trainer.RESULT_FILE).exists()
    for run in runs
  )
  names = list(dict.fromkeys(run.name for run in runs))
  seeds = dict.fromkeys(run.seed for run in runs)
  count = str(len(runs))
  if finished:
    count += f", {finished} of them finished"
  return terminal.outline(
    title,
    {
      "runs": f"{count}; seeds {', '.join(map(str, seeds))}",
      "of": _shortened(names),
      **_about(config),
      "look at": f"{folder}; or: tensorboard --logdir {folder}",
    },
  )


def grid(
  config: config_dict.ConfigDict, folder: str, cells: Iterable[Any]
) -> str:
  """Describes a grid of heads.

  Args:
    config: the grid's.
    folder: its workdir.
    cells: of the grid.

  Returns:
    Lines.
  """
  cells = list(cells)
  runs = sum(len(cell.seeds) * len(cell.points) for cell in cells)
  return terminal.outline(
    "a grid of heads on stored features",
    {
      "runs": f"{runs} in {len(cells)} programs; seeds"
      f" {', '.join(map(str, config.study.seeds))}; noise rates"
      f" {', '.join(f'{rate:g}' for rate in config.probe.rates)}",
      "of": _shortened(list(config.study.methods)),
      **_about(config),
      "look at": folder,
    },
  )


def _about(config):
  length = [
    f"{value:,} {name.removeprefix('num_')}"
    for name, value in durations.overrides(config).items()
    if value
  ]
  return {
    "data": opening.describe_data(config),
    "model": opening.describe_model(config, None),
    "devices": terminal.describe_devices(),
    "length": f"{', '.join(length)} each, in batches of {config.batch_size:,}",
  }


def _shortened(names, most=8):
  more = len(names) - most
  text = ", ".join(names[:most])
  return f"{text} and {more} more" if more > 0 else text
