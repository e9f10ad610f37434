"""Benchmark: memory and communication of a step on the devices of a pod.

What the compiler says of steps for devices that are not there: what a device
holds and sends, and whether a step sends more than plain data-parallel training
as devices are added. Nothing runs. An interrupted job goes on where it stopped.
"""

import contextlib
import itertools
from typing import Any

import jax
from ml_collections import config_dict

from configs.benchmark import pod as pod_config
from experiments.benchmarks import timing
from experiments.benchmarks.pod import step as pod_step
from experiments.benchmarks.pod.collectives import KINDS
from experiments.benchmarks.pod.step import PLAIN, Case
from experiments.runtime import tables, workdir as workdir_lib

RESULT_FILE = "pod.json"
TABLE_FILE = "pod.md"
_MIB = 2**20


def measure(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Compiles all cases.

  The workdir gets `pod.md`, tables, and `pod.json`, which grows by an entry a
  compiled step and is returned: the machine; `compiled`, by target and case,
  bytes of arguments and temporaries and of each kind of collective.

  Raises:
    ValueError: an unknown field, case or target, or another config's workdir.
    ImportError: a TPU is asked for and libtpu is not there.
  """
  todo = [
    *scaling_cases(config),
    *(case_of(key, config) for key in config.cases),
  ]
  folder = workdir_lib.claim(workdir, config, pod_config, job="pod")
  if config.target == pod_step.HOST:
    _be_many(max((case.devices for case in todo), default=1))
  file = folder / RESULT_FILE
  results = {"machine": workdir_lib.machine(), "compiled": {}}
  if file.exists():
    found = workdir_lib.read_json(file, {"compiled": dict})
    results["compiled"] = found["compiled"]
  for case in todo:
    done = results["compiled"].setdefault(config.target, {})
    if case.key not in done:
      print(f"{config.target}: {case.key}", flush=True)
      done[case.key] = _compile(case, config)
      workdir_lib.write_json(file, results)
  workdir_lib.write_json(file, results)
  text = table(config, results) + "\n"
  workdir_lib.write_bytes(folder / TABLE_FILE, text.encode())
  return results


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """The tables, as `pod.md` has them."""
  compiled = results["compiled"].get(config.target, {})
  return "\n".join(
    [
      f"## More devices, the same share of each ({config.target})\n",
      *_scaling_table(config, compiled),
      f"\n## Memory and collectives of each device ({config.target})\n",
      *_case_table(config, compiled),
    ]
  )


def _scaling_table(config, compiled):
  """Bytes that a step sends more than the plain step, by devices."""
  rows: list[list[str]] = []
  for case in scaling_cases(config):
    entry, plain = (
      compiled[x.key]
      for x in (case, case._replace(step=PLAIN, weighting="softmax"))
    )
    cells = [case.model, str(case.devices), case.step]
    if case.step != PLAIN:
      cells[-1] += f", {case.weighting}"
    for kind in ("all-reduce", "all-gather"):
      sent = entry[kind]["bytes"]
      cells += [f"{sent:,}", f"{sent - plain[kind]['bytes']:,}"]
    loops = [entry[kind]["in_loops"] for kind in ("all-reduce", "all-gather")]
    rows.append([*cells, f"{sum(loops):,}", f"{4 * case.batch_size:,}"])
  header = [
    "model", "devices", "step", "all-reduce", "more than plain", "all-gather",
    "more than plain", "of both in loops", "B scores",
  ]  # fmt: skip
  return tables.markdown(header, rows)


def _case_table(config, compiled):
  """Tabulates what each case holds and sends, in MiB."""
  kinds = ("all-reduce", "all-gather", "reduce-scatter")
  rows = []
  for key in config.cases:
    entry = compiled[key]
    held = [f"{entry[x] / _MIB:,.1f}" for x in ("arguments", "temporaries")]
    sent = [f"{entry[kind]['bytes'] / _MIB:,.2f}" for kind in kinds]
    rows.append([key, *held, *sent])
  names = (f"{x}, MiB" for x in ("arguments", "temporaries", *kinds))
  return tables.markdown(["case", *names], rows)


def _be_many(devices):
  """Makes this host as many devices, unless JAX has started already."""
  with contextlib.suppress(RuntimeError):
    # JAX's type of its config knows few of the flags there are.
    now = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    jax.config.update("jax_num_cpu_devices", max(now, devices))


def scaling_cases(config: config_dict.ConfigDict) -> list[Case]:
  """The same step on more and more devices, the share of each the same.

  The plain step comes first; of the others a contrastive model takes the
  forward one only.
  """
  cases, scaling = [], config.scaling
  for model, count in itertools.product(scaling.models, scaling.devices):
    start = f"{model}/{count * scaling.rows}/{count}/1"
    cases.append(case_of(f"{start}/{PLAIN}/all/softmax", config))
    coupled = config[model].name == "clip"
    cases += [
      case_of(f"{start}/{step}/all/{weighting}", config)
      for step in scaling.steps
      if step == "forward" or not coupled
      for weighting in scaling.weightings
    ]
  return cases


def case_of(key: str, config: config_dict.ConfigDict) -> Case:
  """Reads `model/batch/devices/fsdp/step/layers/weighting`.

  Raises:
    ValueError: an unknown model, a number that can't be read, or a batch that
      the devices can't share.
  """
  parts = key.split("/")
  is_model = "image_size" in (config.get(parts[0]) or ())
  if len(parts) != len(Case._fields) or not is_model:
    raise ValueError(
      f"the case {key!r} can't be read; expected"
      " model/batch/devices/fsdp/step/layers/weighting with a model of"
      " configs/benchmark/pod.py."
    )
  try:
    batch_size, devices, fsdp = (int(x) for x in parts[1:4])
  except ValueError as error:
    raise ValueError(f"the case {key!r} has no numbers: {error}.") from error
  case = Case(parts[0], batch_size, devices, fsdp, *parts[4:])
  if case.batch_size % case.devices or case.devices % case.fsdp:
    raise ValueError(
      f"the case {key!r} can't be shared by {case.devices} devices, {case.fsdp}"
      " to a copy of the parameters; expected multiples."
    )
  return case


def _compile(case, config):
  """A case's entry."""
  watch = timing.Watch()
  compiled = pod_step.compile_step(
    case,
    config[case.model],
    pod_step.devices(config.target, case.devices),
  )
  entry: dict[str, Any] = {
    "arguments": compiled.arguments,
    "temporaries": compiled.temporaries,
    "seconds": round(watch.lap(), 1),
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
