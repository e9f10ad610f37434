"""What came out of a study: selection, tables, figures, a report."""

import pathlib
from typing import Any

import numpy as np

import gradmimic_jax as gm
from experiments.data import filters, sources
from experiments.reporting import figures, page as report_lib, tables
from experiments.runtime import metrics as writers, workdir as workdir_lib
from experiments.selection import files as select_lib, runs as runs_lib
from experiments.studies import detection
from experiments.tasks.classification import data as data_lib
from experiments.training import trainer as train

SUMMARY_FILE = "summary.json"
TABLE_FILE = "results.csv"
_SHEET = 48  # images on the sheet of the lowest-scored samples


def write(
  config: Any,
  folder: pathlib.Path,
  results: dict[str, list[dict[str, Any]]],
  parts: dict[str, tuple[str | None, float | None]],
) -> dict[str, Any]:
  """Selects, and writes what a study found out.

  Args:
    config: the study's.
    folder: the study's.
    results: of each run the results, in the order of `config.study.seeds`.
    parts: of each run on a part of the data who has chosen it (None: chance)
      and the share that is kept (None: what the selection keeps).

  Returns:
    What is in `summary.json`.
  """
  found = {
    name: [
      _detection(config, _run(folder, seed, name)) for seed in _seeds(config)
    ]
    for name in _scored(config, folder)
  }
  rows = _rows(config, results, found, parts)
  workdir_lib.write_bytes(folder / TABLE_FILE, tables.csv_text(rows).encode())
  summary = {
    "dataset": config.data.name,
    "noise": config.noise.column or config.noise.kind,
    "noise_rate": _noise_rate(config, results),
    "seeds": _seeds(config),
    "num_epochs": config.num_epochs,
    "machine": workdir_lib.machine(),
    "runs": results,
    "detection": found,
    "rows": rows,
    "seconds": round(
      sum(run["seconds"] for runs in results.values() for run in runs), 1
    ),
    "figures": [str(path) for path in _draw(config, folder, results)],
    "results": [str(folder / TABLE_FILE), str(folder / SUMMARY_FILE)],
    "report": _write_report(config, folder, results),
  }
  workdir_lib.write_json(folder / SUMMARY_FILE, summary)
  return summary


def select(config: Any, run: pathlib.Path) -> pathlib.Path:
  """Selects from a run's ledger by `config.select`; the file of what is kept.

  The selection's files (`experiments/select.py`) are written to the run's
  folder.
  """
  selection = select_lib.from_ledger(config.select, runs_lib.load_ledger(run))
  select_lib.write(run, selection, runs_lib.load_fingerprints(run))
  return run / select_lib.KEPT_FILE


def text(summary: dict[str, Any]) -> str:
  """The study's results, and where they are, as text."""
  seeds = len(summary["seeds"])
  paths = [*summary["figures"], *summary["results"]]
  lines = [
    f"{summary['dataset']}, {summary['noise']} noise"
    f" {summary['noise_rate']:.3g}, mean ± standard error of {seeds}"
    f" seed{'s' if seeds > 1 else ''}:",
    "",
    table(summary),
    "",
    "figures and results:",
    *(f"  {path}" for path in paths),
  ]
  if summary["report"]:
    lines += ["", "report:", f"  {summary['report']}"]
  return "\n".join(lines)


def table(summary: dict[str, Any]) -> str:
  """The study's results as text."""
  lines = [
    f"{'method':<26} {'test accuracy':>15} {'train samples':>14} {'seconds':>8}"
  ]
  for row in summary["rows"]:
    lines.append(
      f"{row['method']:<26} {tables.accuracy(row, 3):>15}"
      f" {row['train_samples']:>14.0f} {row['seconds']:>8.1f}"
    )
  for name, entries in summary["detection"].items():
    lines += ["", f"mislabelled samples found by {name}:"]
    for key, label in (
      ("auroc", "AUROC of mean score"),
      ("f1", "F1 of selection"),
      ("kept_fraction", "kept fraction"),
      ("clean_fraction", "true clean fraction"),
    ):
      values = [e[key] for e in entries if e[key] is not None]
      shown = "-"
      if values:
        shown = tables.with_error(*tables.mean_and_error(values), 3)
      lines.append(f"  {label:<24} {shown:>15}")
  return "\n".join(lines)


def _seeds(config):
  return list(config.study.seeds)


def _run(folder, seed, name):
  return folder / f"seed{seed}" / name


def _scored(config, folder):
  """The methods that have left scores."""
  first = config.study.seeds[0]
  return [
    name
    for name in config.study.methods
    if (_run(folder, first, name) / train.LEDGER_FOLDER).exists()
  ]


def _truth(run):
  """The labels that a run was given, and whose of its ledger are wrong."""
  ledger = gm.ScoreLedger(run / train.LEDGER_FOLDER)
  ids, scores = ledger.matrix("score")
  labels = filters.own_labels(run / data_lib.LABELS_FILE, ledger.fingerprints)
  return ids, scores, labels, labels.is_noisy[ids]


def _detection(config, run):
  """How well a run's selection, and others, find the mislabelled."""
  select(config, run)
  selection = gm.export.read_parquet(run / select_lib.SELECTION_FILE)
  ids, scores, _, wrong = _truth(run)
  _, weights = gm.ScoreLedger(run / train.LEDGER_FOLDER).matrix("weight")
  found = detection.measure(config, scores, weights, wrong)
  seen = np.isin(ids, selection.ids)
  chosen = gm.metrics.detection(
    np.nanmean(scores[seen], axis=1), selection.keep, wrong[seen]
  )
  found["f1"] = detection.plain(chosen.f1)
  found["kept_fraction"] = float(selection.keep.mean())
  return found


def _rows(config, results, found, parts):
  """A row for each run's name: means over the seeds."""
  rows = []
  for name, runs in results.items():
    row: dict[str, Any] = {"method": name, "runs": len(runs)}
    row["chosen_by"], row["keep"] = parts.get(name, (None, None))
    for field in ("noise_rate", "train_samples", "seconds"):
      row[field] = float(np.mean([run[field] for run in runs]))
    for field in ("test_accuracy", "test_loss"):
      row[field], row[f"{field}_error"] = tables.mean_and_error(
        [run[field] for run in runs]
      )
    row["nonfinite"] = sum(run["nonfinite_samples"] for run in runs)
    rows.append(row | detection.mean(config, found.get(name, [])))
  return rows


def _noise_rate(config, results):
  """The share of wrong labels that the methods saw."""
  runs = results[config.study.methods[0]]
  return float(np.mean([run["noise_rate"] for run in runs]))


def _draw(config, folder, results):
  """Draws the study's figures; histograms and sheet of the first seed."""
  rate = _noise_rate(config, results)
  kind = config.noise.column or config.noise.kind
  title = f"{config.data.name}, {kind} noise {rate:.3g}"
  paths = []
  for field, file in (
    ("test_accuracy", "learning_curves.png"),
    ("test_loss", "test_loss.png"),
  ):
    curves: dict[str, list[Any]] = {}
    for name in results:
      for seed in config.study.seeds:
        metrics = _run(folder, seed, name) / writers.METRICS_FILE
        values = [r[field] for r in writers.read_metrics(metrics) if field in r]
        curves.setdefault(name, []).append((range(len(values)), values))
    paths.append(
      figures.learning_curves(
        curves,
        folder / file,
        title=title,
        xlabel="epoch",
        ylabel=field.replace("_", " "),
      )
    )
  train_set = sources.of_config(config.data, config.data.train_split)
  seed = config.study.seeds[0]
  for method in _scored(config, folder):
    ids, scores, labels, wrong = _truth(_run(folder, seed, method))
    paths.append(
      figures.score_histograms(
        scores,
        wrong,
        folder / f"scores_{method}.png",
        title=f"{title}: scores of {method}, seed {seed}",
      )
    )
    lowest = np.argsort(np.nanmean(scores, axis=1))[:_SHEET]
    names = train_set.class_names
    paths.append(
      figures.contact_sheet(
        train_set.images[ids[lowest]],
        [
          f"given {names[labels.labels[i]]}\n"
          f"true {names[labels.clean_labels[i]]}"
          for i in ids[lowest]
        ],
        folder / f"lowest_{method}.png",
        title=f"{title}: lowest mean scores of {method}, seed {seed}"
        " (orange: the label is right)",
        colored=~wrong[lowest],
      )
    )
  return paths


def _write_report(config, folder, results):
  """The path of the page about the first method with a ledger, if any.

  It is about the study's first seed.
  """
  for method in _scored(config, folder):
    run = _run(folder, config.study.seeds[0], method)
    columns = ("test_accuracy", "train_samples", "seconds")
    path = report_lib.write(
      folder / f"report_{method}.html",
      run,
      gm.export.read_parquet(run / select_lib.SELECTION_FILE),
      results={
        name: {key: runs[0][key] for key in columns}
        for name, runs in results.items()
      },
    )
    return str(path)
  return None
