"""The tables of the benchmark `pod`."""

from collections.abc import Iterator
from typing import Any

from ml_collections import config_dict

from experiments.benchmarks.pod.step import PLAIN
from experiments.runtime import tables

_MIB = 2**20


def is_model(config: config_dict.ConfigDict, name: str) -> bool:
  """True if the config has a model of that name."""
  return "image_size" in (config.get(name) or ())


def scaled_steps(
  config: config_dict.ConfigDict, model: str
) -> list[tuple[str, str]]:
  """The `(step/layers, weighting)` that are compiled on more and more devices.

  The plain step comes first; the others are compared with it. Of those a
  contrastive model takes the forward one only.
  """
  coupled = is_model(config, model) and config[model].name == "clip"
  return [(f"{PLAIN}/all", "softmax")] + [
    (f"{step}/all", weighting)
    for step in config.scaling.steps
    if step == "forward" or not coupled
    for weighting in config.scaling.weightings
  ]


def page(
  config: config_dict.ConfigDict, results: dict[str, Any]
) -> Iterator[str]:
  """Yields the lines of `pod.md`."""
  compiled = results["compiled"].get(config.target, {})
  yield f"## More devices, the same share of each ({config.target})"
  yield ""
  yield from scaling_table(config, compiled)
  yield ""
  yield f"## Memory and collectives of each device ({config.target})"
  yield ""
  yield from case_table(config, compiled)


def scaling_table(
  config: config_dict.ConfigDict, compiled: dict[str, Any]
) -> Iterator[str]:
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


def case_table(
  config: config_dict.ConfigDict, compiled: dict[str, Any]
) -> Iterator[str]:
  """Tabulates what each case holds and sends, in MiB."""
  kinds = ("all-reduce", "all-gather", "reduce-scatter")
  rows = []
  for key in config.cases:
    entry = compiled[key]
    held = [f"{entry[x] / _MIB:,.1f}" for x in ("arguments", "temporaries")]
    sent = [f"{entry[kind]['bytes'] / _MIB:,.2f}" for kind in kinds]
    rows.append([key, *held, *sent])
  header = ("case", "arguments", "temporaries", *kinds)
  yield from tables.markdown(
    [header[0], *(f"{x}, MiB" for x in header[1:])], rows
  )
