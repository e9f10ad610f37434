"""From a run to one page to look at."""

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

import gradmimic_jax as gm
from configs import report as report_config
from experiments.data import filters
from experiments.runtime import workdir as workdir_lib
from experiments.selection import files as select
from experiments.tasks.classification import (
  data as data_lib,
  reference as reference_lib,
)
from experiments.training import (
  scoring as score,
)

REPORT_FILE = "report.html"
_FREE = ("run", "selection", "title", "gallery", "max_bytes")
# What of a config a page says.
_FACTS = {
  "data set": "data.name",
  "split": "data.train_split",
  "label noise": "noise.kind",
  "noise rate asked for": "noise.rate",
  "model": "model.name",
  "method": "method",
  "direction": "mimic.direction",
  "score": "mimic.score",
  "weighting": "mimic.weighting",
  "layers": "mimic.layers",
  "reference": "mimic.reference",
  "reference's outputs": "mimic.outputs",
  "epochs": "num_epochs",
  "batch size": "batch_size",
  "optimizer": "optimizer.name",
  "learning rate": "optimizer.learning_rate",
  "seed": "seed",
}


def report_run(config: Any, workdir: Any) -> pathlib.Path:
  """Writes the page of a run.

  Args:
    config: as `configs/report.py` describes it.
    workdir: gets `report.html` and `report.json`.

  Returns:
    The page's path.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, or a
      selection of other samples.
    FileNotFoundError: there is no ledger in the run's folder, no such
      selection, or the data set is not there.
  """
  workdir_lib.check(workdir, config, report_config, free=_FREE)
  run = pathlib.Path(config.run)
  ledger = select.ledger_of(run)
  fingerprints = select.fingerprints_of(run)
  file = pathlib.Path(config.selection or run / select.SELECTION_FILE)
  if config.selection is not None or file.exists():
    if not file.is_file():
      raise FileNotFoundError(
        f"config.selection is {str(file)!r}, and there is no such file;"
        " expected the selection.parquet of experiments.select."
      )
    filters.check_manifest(file)
    selection = gm.export.read_parquet(file, fingerprints=fingerprints)
  else:
    selection = select.from_ledger(config.select, ledger)
  folder = workdir_lib.claim(workdir, config, report_config, free=_FREE)
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
  """Writes a page about a selection of a run's ledger.

  Args:
    path: of the page.
    run: the run's folder, of `train` or `score`.
    selection: from its ledger.
    title: None for the data set's name and its label noise.
    results: as `gm.report` takes them.
    **options: for `gm.report`.

  Returns:
    The page's path.
  """
  config = select.config_of(run)
  config.model.pretrained = None  # images are shown as they are
  data = data_lib.load_data(config)
  prints = select.fingerprints_of(run)
  truth = filters.own_labels(run / data_lib.LABELS_FILE, prints)
  if title is None:
    title = f"{config.data.name} {config.data.train_split}"
    if truth.rate:
      title += f", {config.noise.kind} noise {truth.rate:.3g}"
  fingerprints = {"fingerprints": prints}
  return gm.report(
    select.ledger_of(run),
    dataclasses.replace(
      selection, diagnostics=selection.diagnostics | fingerprints
    ),
    path,
    title=title,
    run=_facts(config, run),
    results=results,
    dataset={
      "labels": truth.labels,
      # Where no noise was added, nobody knows which labels are true.
      "true_labels": truth.clean_labels if truth.rate else None,
      "suggested": suggestions(config, data),
      "class_names": data.train.class_names,
      "captions": data.train.ids,
      "images": data.train.images,
    },
    **options,
  )


def suggestions(config: Any, data: data_lib.Data) -> np.ndarray | None:
  """What the reference takes each sample for.

  Args:
    config: of the run.
    data: of the run.

  Returns:
    Classes [N]; None where the run's reference is none that has outputs, or it
    is not there any more.
  """
  if config.mimic.outputs is None and config.mimic.reference is None:
    return None
  try:
    reference = reference_lib.load(config, "outputs", None, data)
  except (FileNotFoundError, ValueError, TypeError) as error:
    logging.warning("the report suggests no labels: %s", error)
    return None
  outputs = reference.for_batch({"index": np.arange(len(data.train.labels))})
  return np.argmax(outputs, axis=-1).astype(np.int32)


def _facts(config, run):
  facts = {}
  for name, field in _FACTS.items():
    value: Any = config
    for key in field.split("."):
      value = value[key]
    if value not in (None, ""):
      facts[name] = value
  result = run / workdir_lib.RESULT_FILE
  if result.exists():
    found = workdir_lib.read_json(result, {})
    if found.get("noise_rate"):
      facts["noise rate"] = f"{found['noise_rate']:.4g}"
    if "checkpoints" in found:
      facts["checkpoints of steps"] = found["checkpoints"]
  if (run / score.RUN_FILE).exists():
    facts["scored by"] = "python -m experiments.score"
  return facts | {"folder": run, "page written": datetime.date.today()}


def main(config: Any, workdir: str) -> None:
  """Writes the page and prints where it is."""
  print(report_run(config, workdir))
