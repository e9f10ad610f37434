"""New names of what had others in earlier releases; jobs that are not there.

Jobs read this before they import anything heavy, so it imports nothing itself.
"""

import os
import re
from collections.abc import Sequence

_BENCHMARK = "experiments.benchmark --config=configs/benchmark"
# Commands that are gone, as `python -m experiments.<old>`.
COMMANDS = {
  "basins": f"{_BENCHMARK}/check_reference.py",
  "clip_costs": f"{_BENCHMARK}/methods.py",
  "clip_filters": "experiments.select --config=configs/select.py",
  "clip_study": "experiments.study, with the same --config",
  "clip_train": "experiments.train, with the same --config",
  "costs": f"{_BENCHMARK}/methods.py",
  "overhead": f"{_BENCHMARK}/loop.py",
  "pod": f"{_BENCHMARK}/pod.py",
  "probe": "experiments.study, with the same --config",
  "results": "experiments.compare --config=configs/compare.py",
  "scale": f"{_BENCHMARK}/selection.py",
}
# Files in configs/.
CONFIGS = {
  "basins.py": "benchmark/check_reference.py",
  "benchmark.py": "benchmark/engines.py",
  "clip.py": "contrastive.py",
  "clip_filters.py": "select.py",
  "clip_shapes.py": "shapes.py",
  "common.py": "classification.py",
  "overhead.py": "benchmark/loop.py",
  "pod.py": "benchmark/pod.py",
  "results.py": "compare.py",
  "scale.py": "benchmark/selection.py",
}
# Fields of a config.
FIELDS = {
  "samples_seen": "num_samples",
  "eval_every": "eval_every_steps",
  "model.clip.dtype": "model.dtype",
  "model.decoder.dtype": "model.dtype",
  "model.vit.dtype": "model.dtype",
  "checkpoint.keep_every": (
    "checkpoint.keep_every_epochs (of image-text pairs: keep_every_steps)"
  ),
  "probe.refresh_epochs": "mimic.refresh_epochs",
  "study.reference.samples_seen": "study.reference.num_samples",
}
_FOLDER = os.path.dirname(os.path.dirname(__file__))  # experiments
_MODULE = re.compile(r"(?:-m)?experiments\.(\w+)")
_CONFIG = re.compile(r"(?:--?config=)?(.*\bconfigs[/\\](\w+\.py))(?::.*)?")
_FIELD = re.compile(r"--?config\.([\w.]+)(?:=.*)?", re.DOTALL)


def command(name: str) -> str | None:
  """Finds the new name of a command; None if the name is no old one.

  Args:
    name: such as "clip_train".

  Returns:
    The argument of `python -m`.
  """
  if os.path.exists(os.path.join(_FOLDER, f"{name}.py")):
    return None
  return COMMANDS.get(name)


def _is_there(name):
  path = os.path.join(_FOLDER, name)
  return os.path.exists(f"{path}.py") or os.path.isdir(path)


def find(arguments: Sequence[str]) -> str | None:
  """Looks for a name in a command line that is no longer there, or never was.

  Args:
    arguments: of `python`, such as `["-m", "experiments.train", ...]`.

  Returns:
    One line that says the new name, or where to look; None: all is there.

  Example:
    >>> find(["-m", "experiments.train", "--config.samples_seen=9"])
    'config.samples_seen is now config.num_samples.'
  """
  for place, argument in enumerate(arguments):
    module = _MODULE.fullmatch(argument)
    if module and (new := command(module[1])):
      return f"python -m experiments.{module[1]} is now python -m {new}."
    if module and place < 2 and not _is_there(module[1]):
      return (
        f"there is no job {module[1]!r}; python -m experiments lists those that"
        " there are."
      )
    file = _CONFIG.fullmatch(argument)
    is_config = argument.lstrip("-").startswith("config=") or (
      place > 0 and arguments[place - 1] in ("-config", "--config")
    )
    if (
      is_config and file and file[2] in CONFIGS and not os.path.exists(file[1])
    ):
      return f"configs/{file[2]} is now configs/{CONFIGS[file[2]]}."
    field = _FIELD.fullmatch(argument)
    if field and field[1] in FIELDS:
      return f"config.{field[1]} is now config.{FIELDS[field[1]]}."
  return None
