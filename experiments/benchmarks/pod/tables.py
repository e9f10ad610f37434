"""The tables of `experiments.pod`."""

from collections.abc import Iterator
from typing import Any

from experiments.benchmarks.pod import formulas as pod_paper
from experiments.benchmarks.pod.step import PLAIN, Case
from experiments.reporting import tables

# Memory of a device, in GB (10^9 bytes).
CHIPS = {"v5e": 16, "v6e": 32, "H100": 80}
_GB = 1e9
_MIB = 2**20


def can(section: Any, step: str) -> bool:
  """Whether a model can take the step: a contrastive one forward only."""
  return section.name != "clip" or step.split("/")[0] in (PLAIN, "forward")


def scaled_steps(config: Any, model: str) -> list[tuple[str, str]]:
  """The `(step/layers, weighting)` that are compiled on more and more devices.

  The plain step comes first; the others are compared with it.
  """
  return [(f"{PLAIN}/all", "softmax")] + [
    (f"{step}/all", weighting)
    for step in config.scaling.steps
    if can(config[model], step)
    for weighting in config.scaling.weightings
  ]


def page(
  config: Any, results: dict[str, Any], params: dict[str, Any]
) -> Iterator[str]:
  """The lines of `pod.md`.

  Args:
    config: as `configs/benchmark/pod.py` describes it.
    results: what is in `pod.json`.
    params: the models' parameters, as shapes.

  Yields:
    Markdown.
  """
  compiled = results["compiled"].get(config.target, {})
  for model in config.paper.models:
    for fsdp in config.paper.fsdp:
      yield f"## {model}, {fsdp} device(s) to a copy of the parameters"
      yield ""
      yield from memory_table(config, results["paper"], model, fsdp)
      yield ""
  yield "## The parts, GB"
  yield ""
  yield from parts_table(config, results["paper"])
  yield ""
  yield f"## More devices, the same share of each ({config.target})"
  yield ""
  yield from scaling_table(config, compiled)
  yield ""
  yield f"## Formulas and the compiler ({config.target})"
  yield ""
  yield from check_table(config, compiled, params)


def memory_table(
  config: Any, paper: dict[str, Any], model: str, fsdp: int
) -> Iterator[str]:
  """A model's memory a device by batch, devices and step, and where it fits."""
  steps = [x for x in config.paper.steps if can(config[model], x)]
  rows = []
  for size in config.paper.batch_sizes:
    for count in config.paper.devices:
      cells = []
      for step in steps:
        key = f"{model}/{size}/{count}/{fsdp}/{step}/softmax"
        cells.append(_with_chips(sum(paper[key].values()) / _GB))
      rows.append([f"{size:,}", str(count), *cells])
  yield from tables.markdown(["batch", "devices", *steps], rows)


def parts_table(config: Any, paper: dict[str, Any]) -> Iterator[str]:
  """What memory is made of, at one batch and number of devices."""
  fields = pod_paper.Memory._fields
  rows = []
  at = f"{config.paper.parts_at[0]}/{config.paper.parts_at[1]}"
  for model in config.paper.models:
    for step in config.paper.steps:
      if can(config[model], step):
        entry = paper[f"{model}/{at}/1/{step}/softmax"]
        cells = [tables.number(entry[x] / _GB, 2) for x in fields]
        rows.append([model, step, *cells])
  yield from tables.markdown(["model", "step", *map(_words, fields)], rows)


def scaling_table(config: Any, compiled: dict[str, Any]) -> Iterator[str]:
  """Bytes that a step sends more than the plain step, by devices."""
  rows = []
  scaling = config.scaling
  for model in scaling.models:
    for count in scaling.devices:
      start = f"{model}/{count * scaling.rows}/{count}/1"
      plain = compiled[f"{start}/{PLAIN}/all/softmax"]
      for step, weighting in scaled_steps(config, model):
        entry = compiled[f"{start}/{step}/{weighting}"]
        name = step.split("/")[0]
        reduce, gather = entry["all-reduce"], entry["all-gather"]
        rows.append(
          [
            model,
            str(count),
            name if name == PLAIN else f"{name}, {weighting}",
            f"{reduce['bytes']:,}",
            f"{reduce['bytes'] - plain['all-reduce']['bytes']:,}",
            f"{gather['bytes']:,}",
            f"{gather['bytes'] - plain['all-gather']['bytes']:,}",
            f"{reduce['in_loops'] + gather['in_loops']:,}",
            f"{4 * count * scaling.rows:,}",
          ]
        )
  header = [
    "model", "devices", "step", "all-reduce", "more than plain", "all-gather",
    "more than plain", "of both in loops", "B scores",
  ]  # fmt: skip
  yield from tables.markdown(header, rows)


def check_table(
  config: Any, compiled: dict[str, Any], params: dict[str, Any]
) -> Iterator[str]:
  """The compiler's numbers over the formulas'."""
  rows = []
  for key in config.checks:
    model, size, count, fsdp, *names = key.split("/")
    case = Case(model, int(size), int(count), int(fsdp), *names)
    section, entry = config[model], compiled[key]
    memory = pod_paper.memory(case, section, params[model])
    cells = [key]
    for name in ("arguments", "temporaries"):
      by_paper = getattr(memory, name)
      cells += [
        f"{entry[name] / _MIB:,.1f}",
        tables.number(entry[name] / by_paper, 2),
      ]
    traffic = pod_paper.traffic(case, section, params[model])
    for kind, by_paper in (
      ("all-reduce", traffic.all_reduce),
      ("all-gather", traffic.all_gather),
    ):
      found = entry[kind]["bytes"]
      ratio = found / by_paper if by_paper else None
      cells += [f"{found / _MIB:,.2f}", tables.number(ratio, 3)]
    cells.append(f"{entry['reduce-scatter']['bytes'] / _MIB:,.2f}")
    rows.append(cells)
  header = [
    "case", "arguments, MiB", "/ paper", "temporaries, MiB", "/ paper",
    "all-reduce, MiB", "/ paper", "all-gather, MiB", "/ paper",
    "reduce-scatter, MiB",
  ]  # fmt: skip
  yield from tables.markdown(header, rows)


def _with_chips(size):
  """A size in GB, and the smallest device that it fits."""
  fits = [name for name, room in CHIPS.items() if size <= room]
  return f"{size:,.1f} {fits[0] if fits else '-'}"


def _words(name):
  return name.replace("_", " ")
