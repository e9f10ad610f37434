"""One reference, several methods on the same noisy labels, then selection.

  python -m experiments.study --config=configs/digits.py --workdir=runs/digits

For each seed: a reference trained on clean labels, from the learner's own
initialisation unless `config.study.reference` has it otherwise; every method on
the same noisy labels; and from the scores of those that have any, a selection
and a model retrained on what it keeps. Each part is skipped when an earlier run
of the same config has finished it.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

import gradmimic_jax as gm
from experiments import (
  cli,
  methods,
  report as report_lib,
  select as select_lib,
  train,
  workdir as workdir_lib,
  writers,
)
from experiments.data import noise, sources
from gradmimic_jax.reporting import figures

SUMMARY_FILE = "summary.json"
# May change in a study's workdir: what is there already is still true.
_FREE = (
  "select.",
  "study.seeds",
  "study.methods",
  "study.retrain",
  "checkpoint.",
  "mimic.force",
)
_SHEET = 48  # images on the sheet of the lowest-scored samples


class Detection(NamedTuple):
  """How well one method's scores find the mislabelled samples."""

  auroc: float  # of the mean score over epochs
  f1: float  # of the selection's dropped samples
  kept_fraction: float  # of the selection
  clean_fraction: float  # the truth


def run_study(config: Any, workdir: Any) -> dict[str, Any]:
  """Runs the study; goes on where an interrupted one stopped.

  Args:
    config: as `configs/common.py` describes it; `config.study` names the seeds,
      the methods and how the reference differs from the learner.
    workdir: the study's folder. Gets a folder for each seed with a folder for
      each run in it, `summary.json`, figures and the report of the first method
      with scores.

  Returns:
    What is in `summary.json`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set that is not there.
  """
  if not config.study.seeds or not config.study.methods:
    raise ValueError(
      f"config.study has seeds {config.study.seeds} and methods"
      f" {config.study.methods}; expected at least one of each."
    )
  for method in config.study.methods:
    _check_method(method, config)  # before hours go into the others
  folder = workdir_lib.claim(workdir, config, free=_FREE)
  results: dict[str, list[dict[str, Any]]] = {}
  detections: dict[str, list[Detection]] = {}
  for seed in config.study.seeds:
    run_seed(config, folder / f"seed{seed}", seed, results, detections)
  summary = {
    "noise_rate": _noise_rate(config, results),
    "seeds": list(config.study.seeds),
    "runs": results,
    "detection": {
      name: [entry._asdict() for entry in entries]
      for name, entries in detections.items()
    },
    "seconds": round(
      sum(run["seconds"] for runs in results.values() for run in runs), 1
    ),
    "figures": [str(path) for path in draw(config, folder, results)],
    "report": write_report(config, folder, results),
  }
  workdir_lib.write_json(folder / SUMMARY_FILE, summary)
  return summary


def run_seed(config, folder, seed, results, detections):
  """All runs of one seed; appends to `results` and `detections`."""
  folder.mkdir(exist_ok=True)

  def one(name, **overrides):
    there = (folder / name / train.RESULT_FILE).exists()
    print(
      f"seed {seed}: {name}{' (already there)' if there else ''}", flush=True
    )
    run_config = derived(config, **{"seed": seed, **overrides})
    result = train.train_and_evaluate(run_config, folder / name)
    results.setdefault(name, []).append(result)

  reference = {}
  if _needs_reference_run(config):
    one("reference", **reference_overrides(config, seed))
    reference = {"mimic.reference": str(folder / "reference")}
  for method in config.study.methods:
    one(method, method=method, **reference)
    if not (folder / method / train.LEDGER_FOLDER).exists():
      continue
    print(f"seed {seed}: selection by {method}", flush=True)
    detection = select(config, folder, method)
    detections.setdefault(method, []).append(detection)
    if config.study.retrain:
      one(
        f"retrained_{method}",
        method="sgd",
        **{"data.filter": str(folder / method / select_lib.KEPT_FILE)},
      )


def _check_method(name, config):
  method = methods.create(name, config.mimic)
  other = reference_overrides(config, 0)
  if method is None or method.direction != "weights":
    return
  for field, value in config.model.items():
    theirs = other.get(f"model.{field}", value)
    if theirs != value:
      raise ValueError(
        f"config.study.methods has {name!r}, which goes toward the reference's"
        " weights, and config.study.reference gives the reference"
        f" model.{field} {theirs!r}, the learner's is {value!r}; expected the"
        " same architecture, or methods that look at outputs only."
      )


def _needs_reference_run(config):
  """Not where outputs were logged and no method looks at weights."""
  return config.mimic.outputs is None or any(
    method is not None and method.direction == "weights"
    for method in (
      methods.create(name, config.mimic) for name in config.study.methods
    )
  )


def reference_overrides(config: Any, seed: int) -> dict[str, Any]:
  """What the reference's config has otherwise than the learner's."""
  wanted = config.study.reference
  # Another architecture has no use for the learner's weights.
  own = {"model.pretrained": None} if wanted.model or wanted.widths else {}
  fields = {
    "model.name": wanted.model,
    "model.widths": tuple(wanted.widths),
    "num_epochs": wanted.num_epochs,
    "data.train_split": wanted.train_split,
  }
  return {
    "seed": seed + wanted.seed_offset,
    "method": "sgd",
    "noise.kind": "symmetric",
    "noise.rate": 0.0,
    **{f"noise.{name}": None for name in train.NOISE_OPTIONS},
    **{field: value for field, value in fields.items() if value},
    **own,
  }


def _noise_rate(config, results):
  """The share of wrong labels that the methods saw."""
  runs = results[config.study.methods[0]]
  return float(np.mean([run["noise_rate"] for run in runs]))


def derived(config: Any, **overrides: Any) -> Any:
  """A copy of the config with some fields changed; noise follows the seed."""
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict(
    {"noise.seed": overrides["seed"], **overrides}
  )
  return copy.lock()


def select(config: Any, folder: pathlib.Path, method: str) -> Detection:
  """Selects from a method's ledger and compares with the truth.

  Args:
    config: `config.select`.
    folder: of the seed.
    method: the run whose ledger is used.

  Returns:
    The Detection. The selection's files (`experiments/select.py`) are written
    to the run's folder.
  """
  run = folder / method
  ledger = select_lib.ledger_of(run)
  ids, scores = ledger.matrix("score")
  selection = select_lib.from_ledger(config.select, ledger)
  select_lib.write(run, selection, select_lib.fingerprints_of(run))
  truth, _ = noise.load(run / train.LABELS_FILE)
  wrong = truth.is_noisy[ids]
  mean_scores = np.nanmean(scores, axis=1)
  found = gm.metrics.detection(mean_scores, selection.keep, wrong)
  return Detection(
    auroc=found.auroc,
    f1=found.f1,
    kept_fraction=float(selection.keep.mean()),
    clean_fraction=float(1 - wrong.mean()),
  )


def draw(config, folder, results) -> list[pathlib.Path]:
  """Draws the study's figures; histograms and sheet of the first seed."""
  rate = _noise_rate(config, results)
  title = f"{config.data.name}, {config.noise.kind} noise {rate:.3g}"
  curves = {}
  for name in results:
    curves[name] = []
    for seed in config.study.seeds:
      file = folder / f"seed{seed}" / name / writers.METRICS_FILE
      rows = [r for r in writers.read_metrics(file) if "test_accuracy" in r]
      curves[name].append(
        (range(len(rows)), [row["test_accuracy"] for row in rows])
      )
  paths = [
    figures.learning_curves(
      curves,
      folder / "learning_curves.png",
      title=title,
      xlabel="epoch",
      ylabel="test accuracy",
    )
  ]
  train_set = sources.of_config(config.data, config.data.train_split)
  seed = config.study.seeds[0]
  for method in config.study.methods:
    run = folder / f"seed{seed}" / method
    if not (run / train.LEDGER_FOLDER).exists():
      continue
    ids, scores = gm.ScoreLedger(run / train.LEDGER_FOLDER).matrix("score")
    truth, _ = noise.load(run / train.LABELS_FILE)
    wrong = truth.is_noisy[ids]
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
          f"given {names[truth.labels[i]]}\ntrue {names[truth.clean_labels[i]]}"
          for i in ids[lowest]
        ],
        folder / f"lowest_{method}.png",
        title=f"{title}: lowest mean scores of {method}, seed {seed}"
        " (orange: the label is right)",
        colored=~wrong[lowest],
      )
    )
  return paths


def write_report(config, folder, results) -> str | None:
  """The path of the page about the first method with a ledger, if any.

  It is about the study's first seed.
  """
  seed_folder = folder / f"seed{config.study.seeds[0]}"
  for method in config.study.methods:
    run = seed_folder / method
    if (run / train.LEDGER_FOLDER).exists():
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


def table(summary: dict[str, Any]) -> str:
  """The study's results as text."""
  lines = [
    f"{'method':<24} {'test accuracy':>15} {'train samples':>14} {'seconds':>8}"
  ]
  for name, runs in summary["runs"].items():
    accuracy = _mean_and_error([run["test_accuracy"] for run in runs])
    samples = np.mean([run["train_samples"] for run in runs])
    seconds = np.mean([run["seconds"] for run in runs])
    lines.append(f"{name:<24} {accuracy:>15} {samples:>14.0f} {seconds:>8.1f}")
  for name, entries in summary["detection"].items():
    lines += [
      "",
      f"mislabelled samples found by {name}:",
      *(
        f"  {label:<22} "
        f"{_mean_and_error([entry[key] for entry in entries]):>15}"
        for key, label in (
          ("auroc", "AUROC of mean score"),
          ("f1", "F1 of selection"),
          ("kept_fraction", "kept fraction"),
          ("clean_fraction", "true clean fraction"),
        )
      ),
    ]
  return "\n".join(lines)


def _mean_and_error(values: list[float]) -> str:
  """Mean and standard error, as text."""
  mean = np.mean(values)
  if len(values) < 2:
    return f"{mean:.3f}"
  error = np.std(values, ddof=1) / np.sqrt(len(values))
  return f"{mean:.3f} ± {error:.3f}"


def main(config: Any, workdir: str) -> None:
  """Runs the study, then prints the table and where the figures are."""
  summary = run_study(config, workdir)
  seeds = len(summary["seeds"])
  print(
    f"\n{config.data.name}, {config.noise.kind} noise"
    f" {summary['noise_rate']:.3g},"
    f" mean ± standard error of {seeds} seed{'s' if seeds > 1 else ''}:\n"
  )
  print(table(summary))
  print("\nfigures and results:")
  for path in [*summary["figures"], pathlib.Path(workdir) / SUMMARY_FILE]:
    print(f"  {path}")
  if summary["report"]:
    print(f"\nreport:\n  {summary['report']}")


if __name__ == "__main__":
  cli.run(main)
