"""Benchmark: memory and communication of a step on the devices of a pod.

Formulas for large models, batches and slices, and what the compiler says of
steps for devices that are not there: whether the formulas hold, and whether a
step sends more than plain data-parallel training as devices are added. Nothing
runs. An interrupted job goes on where it stopped.
"""

import pathlib
import time
from typing import Any

import jax

from configs.benchmark import pod as pod_config
from experiments.benchmarks.pod import (
  formulas as pod_paper,
  step as pod_step,
  tables as pod_tables,
)
from experiments.benchmarks.pod.collectives import KINDS
from experiments.benchmarks.pod.step import Case
from experiments.runtime import workdir as workdir_lib

RESULT_FILE = "pod.json"
TABLE_FILE = "pod.md"


def run_pod(config: Any, workdir: Any) -> dict[str, Any]:
  """Works the formulas out, and compiles what they are checked against.

  Args:
    config: as `configs/benchmark/pod.py` describes it.
    workdir: gets `pod.json`, which grows by an entry a compiled step, and
      `pod.md`, its tables.

  Returns:
    What is in `pod.json`: the machine; `paper`, the parts of each case's memory
    by the formulas; `compiled`, by target and case, bytes of arguments and
    temporaries and of each kind of collective.

  Raises:
    ValueError: an unknown field, case or target, or another config's workdir.
    ImportError: a TPU is asked for and libtpu is not there.
  """
  todo = [*scaling_cases(config), *check_cases(config)]
  folder = workdir_lib.claim(workdir, config, pod_config, job="pod")
  file = folder / RESULT_FILE
  params = {
    name: pod_step.model(config[name])[1]
    for name in {x.model for x in [*paper_cases(config), *todo]}
  }
  results = {"machine": workdir_lib.machine(), "paper": {}, "compiled": {}}
  if file.exists():
    found = workdir_lib.read_json(file, {"compiled": dict})
    results["compiled"] = found["compiled"]
  for case in paper_cases(config):
    memory = pod_paper.memory(case, config[case.model], params[case.model])
    results["paper"][case.key] = memory._asdict()
  for case in todo:
    done = results["compiled"].setdefault(config.target, {})
    if case.key not in done:
      print(f"{config.target}: {case.key}", flush=True)
      done[case.key] = _compile(case, config)
      workdir_lib.write_json(file, results)
  workdir_lib.write_json(file, results)
  text = "\n".join(pod_tables.page(config, results, params)) + "\n"
  workdir_lib.write_bytes(folder / TABLE_FILE, text.encode())
  return results


def paper_cases(config: Any) -> list[Case]:
  """The cases that formulas are worked out for."""
  paper = config.paper
  return [
    case_of(f"{model}/{size}/{count}/{fsdp}/{step}/softmax", config)
    for model in paper.models
    for fsdp in paper.fsdp
    for size in paper.batch_sizes
    for count in paper.devices
    for step in paper.steps
    if pod_tables.can(config[model], step)
  ]


def scaling_cases(config: Any) -> list[Case]:
  """The same step on more and more devices, the share of each the same."""
  scaling = config.scaling
  return [
    case_of(
      f"{model}/{count * scaling.rows}/{count}/1/{step}/{weighting}", config
    )
    for model in scaling.models
    for count in scaling.devices
    for step, weighting in pod_tables.scaled_steps(config, model)
  ]


def check_cases(config: Any) -> list[Case]:
  """The cases that formulas are checked at."""
  return [case_of(key, config) for key in config.checks]


def case_of(key: str, config: Any) -> Case:
  """Reads `model/batch/devices/fsdp/step/layers/weighting`.

  Args:
    key: as it stands in the config, or as `Case.key` gives it.
    config: as `configs/benchmark/pod.py` describes it.

  Returns:
    The case.

  Raises:
    ValueError: an unknown model, a number that can't be read, or a batch that
      the devices can't share.
  """
  parts = key.split("/")
  if len(parts) != len(Case._fields) or parts[0] not in config:
    raise ValueError(
      f"the case {key!r} can't be read; expected"
      " model/batch/devices/fsdp/step/layers/weighting with a model of"
      " configs/benchmark/pod.py."
    )
  try:
    numbers = [int(x) for x in parts[1:4]]
  except ValueError as error:
    raise ValueError(f"the case {key!r} has no numbers: {error}.") from error
  case = Case(parts[0], *numbers, *parts[4:])
  if case.batch_size % case.devices or case.devices % case.fsdp:
    raise ValueError(
      f"the case {key!r} can't be shared by {case.devices} devices, {case.fsdp}"
      " to a copy of the parameters; expected multiples."
    )
  return case


def _compile(case, config):
  """A case's entry."""
  started = time.monotonic()
  compiled = pod_step.compile_step(
    case,
    config[case.model],
    pod_step.devices(config.target, case.devices),
  )
  entry: dict[str, Any] = {
    "arguments": compiled.arguments,
    "temporaries": compiled.temporaries,
    "seconds": round(time.monotonic() - started, 1),
  }
  for kind in KINDS:
    found = [x for x in compiled.collectives if x.kind == kind]
    entry[kind] = {
      "bytes": sum(x.bytes * x.times for x in found),
      "in_loops": sum(x.bytes * x.times for x in found if x.times > 1),
      "sent": round(sum(x.sent for x in found)),
      "runs": sum(x.times for x in found),
    }
  return entry


def main(config: Any, workdir: str) -> None:
  """Runs the job, then prints the tables."""
  if config.target == pod_step.HOST:
    most = max(x.devices for x in scaling_cases(config) + check_cases(config))
    jax.config.update("jax_num_cpu_devices", most)
  run_pod(config, workdir)
  folder = pathlib.Path(workdir)
  print((folder / TABLE_FILE).read_text())
  print(f"{folder / RESULT_FILE}, {folder / TABLE_FILE}")
