"""What is measured of the runs of CLIP's study."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import gradmimic_jax as gm
from experiments.data.noise import captions as caption_noise
from experiments.data.pairs import shapes
from experiments.reporting import tables
from experiments.runtime import metrics as writers
from experiments.selection import filters as clip_filters
from experiments.studies import detection
from experiments.studies.clip_plan import BASELINE
from gradmimic_jax.selection.uids import parse_uids

LOSS, ACCURACY = "held_out_loss", "zero_shot_accuracy@1"
RECALLS = ("image_to_text@1", "text_to_image@1")


def steps_to(
  steps: Sequence[float], values: Sequence[float], target: float
) -> float | None:
  """Where a falling curve is at a value, or below, for the first time.

  Args:
    steps: at which it was measured [K], ascending.
    values: what was measured [K]; NaN reaches nothing.
    target: the value.

  Returns:
    The step, on the line from the measurement before; None if it never is.

  Example:
    >>> steps_to([0, 10, 20], [3.0, 2.0, 1.0], 1.5)
    15.0
  """
  reached = np.flatnonzero(np.asarray(values) <= target)
  if not len(reached):
    return None
  k = int(reached[0])
  if k == 0 or not np.isfinite(values[k - 1]):
    return float(steps[k])
  share = (values[k - 1] - target) / (values[k - 1] - values[k])
  return float(steps[k - 1] + share * (steps[k] - steps[k - 1]))


def auroc_by_kind(
  scores: clip_filters.Scores, truth: shapes.Shapes
) -> dict[str, float | None]:
  """AUROC of all that is wrong against what is right, and of each kind."""
  order = np.argsort(truth.uids)  # as hexadecimal, so as pairs
  uids = parse_uids(truth.uids[order])
  rows = order[np.searchsorted(uids, scores.ids)]
  kind = truth.noise_kind[rows]

  def auroc(wrong):
    chosen = wrong | (kind == "")
    return detection.plain(
      gm.metrics.auroc(-scores.values[chosen], wrong[chosen])
    )

  found = {"auroc": auroc(kind != "")}
  for name in caption_noise.KINDS:
    found[f"auroc_{name}"] = auroc(kind == name)
  return found


def means(
  entries: Sequence[dict[str, float | None]],
) -> dict[str, float | None]:
  """Means over the seeds, with standard errors; None of what isn't there."""
  fields = ("auroc", *(f"auroc_{name}" for name in caption_noise.KINDS))
  found: dict[str, float | None] = {}
  for field in fields:
    values = [e[field] for e in entries if e[field] is not None]
    found[field], found[f"{field}_error"] = (
      tables.mean_and_error(values) if values else (None, None)
    )
  return found


def row_of(
  config: Any,
  folder: pathlib.Path,
  name: str,
  expression: str,
  results: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
  """A run's means over the seeds, beside the baseline's of the same seeds."""
  members, plain = results[name], results[BASELINE]
  row: dict[str, Any] = {"run": name, "runs": len(members)}
  row["filter"] = expression
  row["train_pairs"] = float(np.mean([run["train_pairs"] for run in members]))
  for field in (LOSS, ACCURACY, *RECALLS):
    row[field], row[f"{field}_error"] = tables.mean_and_error(
      [run[field] for run in members]
    )
  gains = [
    run[ACCURACY] - other[ACCURACY]
    for run, other in zip(members, plain, strict=True)
  ]
  row["gain"], row["gain_error"] = tables.mean_and_error(gains)
  for what, field, sign in (("loss", LOSS, 1), ("accuracy", ACCURACY, -1)):
    saved = []
    for seed, other in zip(config.study.seeds, plain, strict=True):
      steps, values = curve(folder, seed, name, field)
      there = steps_to(
        steps, [sign * value for value in values], sign * other[field]
      )
      if there is not None:
        saved.append(1 - there / other["steps"])
    row[f"reached_{what}"] = len(saved)
    row[f"saved_{what}"], row[f"saved_{what}_error"] = (
      tables.mean_and_error(saved) if saved else (None, None)
    )
  row["seconds"] = float(np.mean([run["seconds"] for run in members]))
  row["nonfinite"] = sum(run["nonfinite_samples"] for run in members)
  return row


def curve(
  folder: pathlib.Path, seed: int, name: str, field: str
) -> tuple[list[int], list[float]]:
  """A metric of a run: the steps at which it was measured, and what was."""
  rows = writers.read_metrics(
    folder_of(folder, seed, name) / writers.METRICS_FILE
  )
  rows = [row for row in rows if field in row]
  return [row["step"] for row in rows], [row[field] for row in rows]


def best_of(rows: Sequence[dict[str, Any]]) -> str | None:
  """The run with scores that saves the most steps in all seeds, or None."""
  able = [
    row
    for row in rows
    if row["auroc"] is not None and row["reached_loss"] == row["runs"]
  ]
  return max(able, key=lambda row: row["saved_loss"])["run"] if able else None


def folder_of(folder: pathlib.Path, seed: int, name: str) -> pathlib.Path:
  """Where the run of that name is."""
  return folder / f"seed{seed}" / name
