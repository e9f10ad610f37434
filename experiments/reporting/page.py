"""From a run to one page to look at."""

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

import gradmimic_jax as gm
from configs import report as report_config
from experiments import tasks
from experiments.data import filters
from experiments.runtime import terminal, workdir as workdir_lib
from experiments.selection import files, runs

REPORT_FILE = "report.html"
_JOB = "report"
# What of any config a page says; a task adds its data and its model.
_FACTS = {
  "method": "method",
  "direction": "mimic.direction",
  "score": "mimic.score",
  "weighting": "mimic.weighting",
  "layers": "mimic.layers",
  "reference": "mimic.reference",
  "reference's outputs": "mimic.outputs",
  "epochs": "num_epochs",
  "samples": "num_samples",
  "steps": "num_steps",
  "batch size": "batch_size",
  "optimizer": "optimizer.name",
  "learning rate": "optimizer.learning_rate",
}


def report_run(config: config_dict.ConfigDict, workdir: Any) -> pathlib.Path:
  """Writes `report.html` about a run, and `report.json`; returns its path.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, or a
      selection of other samples.
    FileNotFoundError: there is no ledger in the run's folder, no such
      selection, or the data set is not there.
  """
  workdir_lib.check(workdir, config, report_config, job=_JOB)
  run = pathlib.Path(config.run)
  ledger = runs.load_ledger(run)
  fingerprints = runs.load_fingerprints(run)
  file = pathlib.Path(config.selection or run / files.SELECTION_FILE)
  if config.selection is not None or file.exists():
    if not file.is_file():
      raise FileNotFoundError(
        f"config.selection is {str(file)!r}, and there is no such file;"
        " expected the selection.parquet of experiments.select."
      )
    filters.check_manifest(file)
    selection = gm.export.read_parquet(file, fingerprints=fingerprints)
  else:
    selection = files.select(config.select, ledger)
  folder = workdir_lib.claim(workdir, config, report_config, job=_JOB)
  return write(
    folder / REPORT_FILE,
    run,
    selection,
    title=config.title,
    gallery=config.gallery,
    max_bytes=config.max_bytes,
  )


def write(
  path: pathlib.Path,
  run: pathlib.Path,
  selection: gm.Selection,
  *,
  title: str | None = None,
  results: Mapping[str, Mapping[str, Any]] | None = None,
  **options: Any,
) -> pathlib.Path:
  """Writes a page about a selection of a run's ledger; returns its path.

  The run is one of `train` or `score`; without a title the task calls its data
  something. Results and other options are as `gm.report` takes them.
  """
  config = runs.load_config(run)
  prints = runs.load_fingerprints(run)
  samples = tasks.get(config).load_samples(config, run, prints)
  diagnostics = selection.diagnostics | {"fingerprints": prints}
  return gm.report(
    runs.load_ledger(run),
    dataclasses.replace(selection, diagnostics=diagnostics),
    path,
    title=title or samples.title,
    run=samples.facts | _facts(config, run),
    results=results,
    dataset=samples.dataset,
    **options,
  )


def _facts(config, run):
  flat = workdir_lib.flatten(config)
  facts: dict[str, Any] = {"seed": config.seed}
  for name, field in _FACTS.items():
    if flat.get(field) not in (None, "", 0):
      facts[name] = flat[field]
  result = run / workdir_lib.RESULT_FILE
  if result.exists():
    found = workdir_lib.read_json(result, {})
    if found.get("noise_rate"):
      facts["noise rate"] = f"{found['noise_rate']:.4g}"
    if "checkpoints" in found:
      facts["checkpoints of steps"] = found["checkpoints"]
  if runs.is_scored(run):
    facts["scored by"] = "python -m experiments.score"
  return facts | {"folder": run, "page written": datetime.date.today()}


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, writes the page, and prints where it is."""
  workdir_lib.check_fields(config, report_config)
  terminal.note(
    terminal.outline(
      "report: a page",
      {
        "scores": runs.describe(pathlib.Path(config.run)),
        "selection": config.selection,
        "look at": pathlib.Path(workdir) / REPORT_FILE,
      },
    )
  )
  print(report_run(config, workdir))
