"""Measures what a mimic step costs, relative to a plain step.

A table of models, batch sizes, mimic layers and engines; a sweep over the sizes
of a small vision transformer; and how FLOPs fall with the number of tokens. An
interrupted run goes on where it stopped.
"""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import config_dict

from configs.benchmark import engines as engines_config
from experiments.benchmarks import engine_steps
from experiments.benchmarks.engine_steps import ERRORS, RATIOS, Case
from experiments.reporting import figures
from experiments.runtime import workdir as workdir_lib

RESULT_FILE = "engines.json"
SWEPT = ("batch_size", "depth", "width")
# What a part of the results shows, and what its rows begin with.
PARTS = {
  "cases": ((*RATIOS, *ERRORS), ("model", "batch", "layers", "engine")),
  "sweep": (RATIOS, ("size", "value", "layers", "engine")),
  "tokens": (("flops",), ("size", "value", "layers", "engine")),
}


def measure(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Measures all cases; goes on where an interrupted run stopped.

  The workdir gets figures and `engines.json`, which grows by an entry a case
  and is returned: the machine, and for each case of the table and point of the
  sweep its ratios and errors. A ratio is None where it has no meaning or the
  case did not fit into memory.

  Raises:
    ValueError: an unknown field, name or device, or a workdir of another config
      or machine.
  """
  folder = workdir_lib.claim(workdir, config, engines_config, job="engines")
  with _settings(config) as device:
    results = _start(folder / RESULT_FILE, device)
    for part in PARTS:
      groups = itertools.groupby(
        cases_of(part, config), lambda case: case.key.split("/")[:2]
      )
      for _, group in groups:
        _measure(part, list(group), config, results, folder / RESULT_FILE)
  draw(config, folder, results)
  return results


def _measure(part, cases, config, results, file):
  """Measures what is left of the cases of one model and batch size."""
  done = results[part]

  def keep(case, entry):
    print(f"{part}: {case.key}", flush=True)
    done[case.key] = entry
    workdir_lib.write_json(file, results)

  left = []
  for case in cases:
    if case.key in done:
      continue
    # The sizes of a sweep meet in its base.
    twins = (x.key for x in cases_of(part, config) if x[1:] == case[1:])
    twin = next((key for key in twins if key in done), None)
    if twin is None:
      left.append(case)
    else:
      keep(case, done[twin])
  if not left:
    return
  size = left[0].batch_size
  model, number, *_ = left[0].key.split("/")
  folder = file.parent / "profiles" / model / number
  setup = engine_steps.Setup(left[0].section, size, config, folder)
  if part == "tokens":
    for case in left:
      keep(case, setup.count(case))
  else:
    compare = part == "cases" and size <= config.largest_compared
    setup.measure(left, keep, compare=compare)


def cases_of(part: str, config: config_dict.ConfigDict) -> list[Case]:
  """The cases of a part, those of one model and batch size side by side."""
  made = {"cases": table_cases, "sweep": sweep_cases, "tokens": token_cases}
  return made[part](config)


def table_cases(config: config_dict.ConfigDict) -> list[Case]:
  """The rows of the table, those of one model and batch size side by side."""
  return [
    Case(f"{name}/{size}/{layers}/{engine}", config[name], size, layers, engine)
    for name in config.models
    for size in config[name].batch_sizes
    for layers in config.layers
    if layers in engine_steps.patterns(config[name])
    for engine in config.engines
  ]


def sweep_cases(config: config_dict.ConfigDict) -> list[Case]:
  """The points of the sweep, those of one size side by side."""
  base, cases = config.sweep.model, []
  for axis, value in ((x, v) for x in SWEPT for v in config.sweep[x]):
    section = base.copy_and_resolve_references().unlock()
    size = value if axis == "batch_size" else base.batch_sizes[0]
    if axis != "batch_size":
      section.vit[axis] = value
    if axis == "width":
      section.vit.mlp_width = base.vit.mlp_width * value // base.vit.width
    cases += _lines(axis, value, section, size, config.sweep.lines)
  return cases


def token_cases(config: config_dict.ConfigDict) -> list[Case]:
  """The numbers of tokens at which FLOPs are counted."""
  base, cases = config.tokens.model, []
  for side in config.tokens.image_sizes:
    section = base.copy_and_resolve_references().unlock()
    section.input_shape = (side, side, base.input_shape[-1])
    tokens, size = (side // base.vit.patch_size) ** 2, base.batch_sizes[0]
    cases += _lines("tokens", tokens, section, size, config.tokens.lines)
  return cases


def _lines(axis, value, section, size, lines):
  """The cases of a point: engines and layers, such as "auto/all"."""
  for engine, layers in (line.split("/") for line in lines):
    key = f"{axis}/{value}/{layers}/{engine}"
    yield Case(key, section, size, layers, engine)


@contextlib.contextmanager
def _settings(config) -> Iterator[jax.Device]:
  """The device and precision that the config asks for."""
  try:
    device = jax.devices(config.device or None)[0]
  except RuntimeError as error:
    raise ValueError(
      f"config.device is {config.device!r}, and JAX finds no such device here;"
      f" expected one of {jax.default_backend()}, cpu, or '' for the default."
    ) from error
  with (
    jax.default_device(device),
    jax.default_matmul_precision(config.matmul_precision),
  ):
    yield device


def _start(file: pathlib.Path, device: jax.Device) -> dict[str, Any]:
  """Reads what an earlier run on this kind of machine measured, if any."""
  machine = workdir_lib.machine(device)
  if not file.exists():
    return {"machine": machine} | {part: {} for part in PARTS}
  sections = dict.fromkeys(("machine", *PARTS), dict)
  results = workdir_lib.read_json(file, sections)
  for field, value in machine.items():
    theirs = results["machine"].get(field)
    if theirs != value and field != "date":
      raise ValueError(
        f"{file} was measured with {field} {theirs!r} and this machine has"
        f" {value!r}; ratios of two machines don't mix: choose another"
        " --workdir."
      )
  return results


def draw(
  config: config_dict.ConfigDict, folder: pathlib.Path, results: dict[str, Any]
) -> list[pathlib.Path]:
  """Draws the time ratios of the table, and the sweep if there is one."""
  paths = []
  for name in config.models:
    bars: dict[str, dict[str, float]] = {}
    for case in table_cases(config):
      model, size, layers, engine = case.key.split("/")
      ratio = results["cases"][case.key]["time"]
      if model == name and ratio is not None:
        bars.setdefault(f"{layers}\n{size}", {})[engine] = ratio
    if bars:
      paths.append(
        figures.ratio_bars(
          bars,
          folder / f"time_{name}.png",
          title=f"{name}: mimic layers and batch size",
          ylabel="time / plain step",
        )
      )
  curves: dict[str, Any] = {
    ratio: {axis: {} for axis in SWEPT if config.sweep[axis]}
    for ratio in RATIOS
  }
  for case in sweep_cases(config):
    axis, value, layers, engine = case.key.split("/")
    for ratio in RATIOS:
      y = results["sweep"][case.key][ratio]
      if y is not None:
        line = curves[ratio][axis].setdefault(f"{engine}, {layers}", ([], []))
        line[0].append(int(value))
        line[1].append(y)
  if results["sweep"]:
    paths.append(
      figures.ratio_curves(
        curves, folder / "sweep.png", title="ratio to a plain step"
      )
    )
  return paths


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """The parts as text, one below the other."""
  machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
  lines = [f"ratios to a plain step ({machine}):"]
  for part, (columns, start) in PARTS.items():
    cases = cases_of(part, config)
    if not cases:
      continue
    head = "{:<10} {:>5}  {:<8} {:<18}".format(*start)
    lines += ["", head + "".join(f"{name:>15}" for name in columns)]
    for case in cases:
      entry = results[part][case.key]
      *first, engine = case.key.split("/")
      if engine == "auto":
        engine = f"auto ({entry['engine']})"
      row = "{:<10} {:>5}  {:<8} {:<18}".format(*first, engine)
      for name in columns:
        value, form = entry[name], ".1e" if name in ERRORS else ".3f"
        row += f"{'-' if value is None else format(value, form):>15}"
      lines.append(row + f"  {entry.get('failed', '')}".rstrip())
  return "\n".join(lines)
