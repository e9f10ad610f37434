"""Results by how many true labels the reference has, and paired differences."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

from experiments.reporting import figures
from experiments.runtime import tables
from experiments.studies import tables as study_tables
from experiments.studies.plan import REFERENCE

# What the others are subtracted from.
_OURS = "grad_mimic"


def several(rows: Iterable[dict[str, Any]]) -> list[float]:
  """The shares of the rows' references, rising; [] unless they differ."""
  found = {row["share"] for row in rows} - {None}
  return sorted(found) if len(found) > 1 else []


def label(share: float | None) -> str:
  """A share in percent; a dash for methods without a reference."""
  return "-" if share is None else f"{100 * share:g} %"


def beside_shares(
  rows: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
  """The rows; those without a reference stand beside every share."""
  return [
    {**row, "share": share}
    for row in rows
    for share in (several(rows) if row["share"] is None else [row["share"]])
  ]


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
  """A table for each rate of noise: methods by shares.

  Args:
    rows: of the summary; references stand beside every rate.
  """
  lines = []
  for rate in dict.fromkeys(row["rate"] for row in rows):
    own = [row for row in rows if row["rate"] == rate]
    noise = [row["noise_rate"] for row in own if row["method"] != REFERENCE]
    lines += [
      "",
      f"Test accuracy at a noise rate of {np.mean(noise):.3g} by the share of"
      " the training samples whose true labels the reference has, mean ±"
      " standard error over the seeds:",
      "",
      *study_tables.pivot(
        ["method", *map(label, several(own))],
        beside_shares(own),
        lambda row: (study_tables.label(row),),
        "share",
        several(own),
      ),
    ]
  return lines


def compare(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Grad-Mimic's test accuracy less another's, seed by seed.

  Args:
    results: of the cells.

  Returns:
    Rows of `rate`, `share`, `method`, `value`, the mean `difference`, and its
    standard `error` over the seeds. [] if Grad-Mimic isn't there, or has more
    than one value of its weighting.
  """
  runs: dict[tuple[Any, ...], dict[int, float]] = {}
  for result in results:
    for run in result["runs"]:
      key = result["method"], result["share"], run["value"], run["rate"]
      accuracy = run["curves"]["test_accuracy"][-1]
      runs.setdefault(key, {})[run["seed"]] = accuracy
  ours = [key for key in runs if key[0] == _OURS]
  if len({key[2] for key in ours}) != 1:
    return []
  rows = []
  for _, share, value, rate in ours:
    mine = runs[_OURS, share, value, rate]
    for (method, other, setting, at), theirs in runs.items():
      if method == REFERENCE:
        at = rate  # which has no noise of its own
      if method == _OURS or at != rate or other not in (None, share):
        continue
      seeds = sorted(set(mine) & set(theirs))
      mean, error = tables.mean_and_error(
        [mine[seed] - theirs[seed] for seed in seeds]
      )
      rows.append(
        {
          "rate": rate,
          "share": share,
          "method": method,
          "value": setting,
          "difference": mean,
          "error": error,
        }
      )
  return rows


def markdown_of_differences(rows: Sequence[dict[str, Any]]) -> list[str]:
  """A table of Grad-Mimic less each other method, in points of accuracy."""
  if not rows:
    return []
  columns = list(dict.fromkeys((row["rate"], row["share"]) for row in rows))
  lines: dict[str, dict[Any, str]] = {}
  for row in rows:
    # In hundredths: the differences are small.
    points, error = 100 * row["difference"], row["error"]
    text = tables.with_error(points, error and 100 * error, 2)
    place = row["rate"], row["share"]
    lines.setdefault(study_tables.label(row), {})[place] = text
  return [
    "",
    f"Test accuracy of {_OURS} less that of the others, in points, mean ±"
    " standard error of the differences of the seeds:",
    "",
    *tables.markdown(
      ["method", *(f"{rate:g}, {label(share)}" for rate, share in columns)],
      [
        [name, *(found.get(place, "-") for place in columns)]
        for name, found in lines.items()
      ],
    ),
  ]


def draw(
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  rows: Sequence[dict[str, Any]],
) -> list[pathlib.Path]:
  """Draws accuracy against the reference's share, a file for each rate."""
  paths = []
  of_rates = [
    {**row, "rate": rate}
    for rate, row in study_tables.beside_references(rows, "rate")
  ]
  for rate in dict.fromkeys(row["rate"] for row in of_rates):
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    own = [row for row in of_rates if row["rate"] == rate]
    noise = [row["noise_rate"] for row in own if row["method"] != REFERENCE]
    for row in beside_shares(own):
      point = row["share"], row["test_accuracy"], row["test_accuracy_error"]
      lines.setdefault(study_tables.label(row), []).append(point)
    words = config.noise.column or config.noise.kind
    paths.append(
      figures.accuracy_by_share(
        lines,
        folder / f"accuracy_by_share_{rate:g}.png",
        title=f"{config.data.name}, {words} noise {np.mean(noise):.2f}",
        reference=REFERENCE,
      )
    )
  return paths
