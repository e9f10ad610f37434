"""A study's figures: learning curves, histograms of scores, lowest samples."""

import pathlib
from typing import Any

import numpy as np

from experiments.reporting import figures
from experiments.studies import tables
from experiments.studies.plan import BASELINE
from experiments.studies.records import Records

_CURVES = 6  # beside the baseline's: more can't be told apart
_SHEET = 48  # images on the sheet of the lowest-scored samples


def draw(records: Records, summary: dict[str, Any]) -> list[pathlib.Path]:
  """Draws a study's figures; scores and samples are of the first seed.

  Of the summary `rows` and `headline` must be there. Returns the paths.
  """
  parts = {run.name for run in records.runs if run.is_on_a_part}
  names = [row["method"] for row in _sorted(summary)]
  paths = []
  for ending, group in (
    ("", [name for name in names if name not in parts]),
    ("_of_parts", [name for name in names if name in parts]),
  ):
    group = [name for name in group if name != BASELINE][:_CURVES]
    if BASELINE in names:
      group.insert(0, BASELINE)
    if set(group) - {BASELINE} or not ending:
      paths += _draw_curves(records, summary, group, ending)
  scored = [name for name in names if name in records.scored][:_CURVES]
  for name in scored:
    paths += _draw_scores(records, summary, name)
  return paths


def _sorted(summary):
  """The rows, those with scores first, and the best of them before others."""
  loss = summary["headline"]["loss"]

  def place(row):
    value = row[loss] if np.isfinite(row[loss]) else np.inf
    return row["auroc"] is None, value

  return sorted(summary["rows"], key=place)


def _draw_curves(records, summary, names, ending):
  """Draws loss and accuracy of some runs."""
  config = records.config
  for what, field in summary["headline"].items():
    curves: dict[str, list[Any]] = {}
    for name in names:
      for seed in records.seeds:
        steps, values = records.load_curve(seed, name, field)
        x = np.multiply(steps, config.batch_size)
        if config.eval_every_epochs:  # which differ in their steps
          x = config.eval_every_epochs * np.arange(len(values))
        curves.setdefault(name, []).append((x, values))
    yield figures.learning_curves(
      curves,
      records.folder / f"{what}{ending}.png",
      title=tables.title(summary),
      xlabel="epoch" if config.eval_every_epochs else "samples seen",
      ylabel=field.replace("_", " "),
    )


def _draw_scores(records, summary, name):
  """Draws histograms of right and wrong samples' scores, and the lowest."""
  seed = records.seeds[0]
  truth = records.load_truth(seed)
  if truth is None:
    return
  ids, scores = records.load_ledger(seed, name).matrix("score")
  wrong = truth.kinds_of(ids) != ""
  title = f"{tables.title(summary)}: %s of {name}, seed {seed}"
  yield figures.score_histograms(
    scores,
    wrong,
    records.folder / f"scores_{name}.png",
    title=title % "scores",
  )
  shown = records.load_samples(seed).dataset or {}
  if "class_names" in shown:
    lowest = np.argsort(np.nanmean(scores, axis=1))[:_SHEET]
    rows, names = ids[lowest], shown["class_names"]
    given, true = shown["labels"], shown["true_labels"]
    true = given if true is None else true
    yield figures.contact_sheet(
      [shown["images"][int(i)] for i in rows],
      [f"given {names[given[i]]}\ntrue {names[true[i]]}" for i in rows],
      records.folder / f"lowest_{name}.png",
      title=title % "lowest mean scores" + " (orange: the label is right)",
      colored=~wrong[lowest],
    )
