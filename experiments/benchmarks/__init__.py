"""Benchmarks: the cost of steps, loops and selections, and their errors.

`config.benchmark` names one of them: a module with `RESULT_FILE`,
`measure(config, workdir) -> results` and `table(config, results) -> str`.
"""

import importlib
import pathlib
import types

import jax
from ml_collections import config_dict

from experiments.runtime import terminal

_MODULES = {
  "engines": "engines",
  "methods": "methods",
  "loop": "loop",
  "data": "data",
  "selection": "selection",
  "check_reference": "check_reference",
  "pod": "pod.cases",
}
# The first of several processes measures it alone.
_BY_FIRST = ("engines",)
# These choose the number of devices, which can't change once it was asked for.
_BY_VIRTUAL_DEVICES = ("pod",)


def load(config: config_dict.ConfigDict) -> types.ModuleType:
  """The module of the benchmark that `config.benchmark` names.

  Raises:
    ValueError: there is no such benchmark, or the config names none.
  """
  name = config.get("benchmark")
  if name not in _MODULES:
    raise ValueError(
      f"config.benchmark is {name!r}; expected one of {', '.join(_MODULES)}, as"
      " in configs/benchmark/."
    )
  return importlib.import_module(f"{__name__}.{_MODULES[name]}")


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Measures, then prints the table and where the rest is.

  Raises:
    ValueError: no such benchmark, one that several processes can't do, or what
      its `measure` refuses.
  """
  benchmark = load(config)
  several = jax.distributed.is_initialized() and jax.process_count() > 1
  if several and config.benchmark not in _BY_FIRST:
    raise ValueError(
      "this job is one for a single process; expected no --distributed and no"
      " --coordinator"
    )
  outline: dict[str, object] = {
    "look at": pathlib.Path(workdir) / benchmark.RESULT_FILE
  }
  if config.benchmark not in _BY_VIRTUAL_DEVICES:
    outline = {"devices": terminal.describe_devices(), **outline}
  terminal.note(terminal.outline(f"benchmark of {config.benchmark}", outline))
  results = benchmark.measure(config, workdir)
  print(f"\n{benchmark.table(config, results)}\n")
  print(f"all of it: {pathlib.Path(workdir) / benchmark.RESULT_FILE}")
