"""Results of a grid of heads: detection, tables and figures."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import config_dict

from experiments.reporting import figures
from experiments.runtime import tables, workdir as workdir_lib
from experiments.studies import detection, tables as study_tables
from experiments.studies.probing import shares
from experiments.studies.records import MARKDOWN_FILE, SUMMARY_FILE, TABLE_FILE
from experiments.studies.summary import write_tables
from gradmimic_jax import _files


def detections(
  config: config_dict.ConfigDict, folder: pathlib.Path, result: dict[str, Any]
) -> list[dict[str, Any]]:
  """Measures how a cell's scores find mislabelled samples, run by run.

  What `detection.measure` found is kept beside the runs' `.npz` files in the
  folder; it is {} where there are no scores.
  """
  wanted = workdir_lib.fingerprint(
    config.select.to_dict(), list(config.study.binarizers)
  )
  files = [run["samples"] for run in result["runs"]]
  name = f"{files[0].removesuffix('.npz')}_selected_{wanted}.json"
  if (folder / name).exists():
    return workdir_lib.read_json(folder / name)
  found = [_detection(config, folder / file) for file in files]
  workdir_lib.write_json(folder / name, found)
  return found


@contextlib.contextmanager
def samples(file: pathlib.Path) -> Iterator[Any]:
  """The arrays that a run left, each read where it is asked for.

  Raises:
    OSError: there is no such file.
    ValueError: it is damaged.
  """
  remedy = "Delete its cell's file in the folder cells, to train it again."
  with (
    _files.named(file, "archive of arrays", remedy),
    np.load(file, allow_pickle=False) as arrays,
  ):
    yield arrays


def _detection(config, file):
  with samples(file) as arrays:
    if "score" not in arrays:
      return {}
    wrong = arrays["labels"] != arrays["clean_labels"]
    return detection.measure(config, arrays["score"], arrays["weight"], wrong)


def write(
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  results: list[dict[str, Any]],
) -> dict[str, Any]:
  """Writes `summary.json`, which is returned, the tables and the figures."""
  rows = _rows(config, folder, results)
  summary = {
    "dataset": config.data.name,
    "noise": config.noise.column or config.noise.kind,
    "seeds": list(config.study.seeds),
    "num_epochs": config.num_epochs,
    "seconds": round(sum(result["seconds"] for result in results), 1),
    "machine": results[0]["machine"],
    "rows": rows,
    "differences": shares.compare(results),
  }
  paths = [folder / name for name in (SUMMARY_FILE, TABLE_FILE, MARKDOWN_FILE)]
  paths += _draw(config, folder, results, rows)
  summary["files"] = [str(path) for path in paths]
  write_tables(folder, summary, markdown(summary))
  return summary


def _rows(config, folder, results):
  """A row for each method, value and rate: means over the seeds."""
  plain = [r["seconds_per_step"] for r in results if r["method"] == "sgd"]
  groups: dict[Any, list[Any]] = {}
  for result in results:
    found = detections(config, folder / "samples", result)
    for run, entry in zip(result["runs"], found, strict=True):
      key = result["method"], result["share"], run["value"], run["rate"]
      groups.setdefault(key, []).append((result, run, entry))
  rows = []
  for (method, share, value, rate), members in groups.items():
    runs = [run for _, run, _ in members]
    row = {"method": method, "value": value, "rate": rate, "runs": len(runs)}
    row["share"] = share
    row["noise_rate"] = float(np.mean([run["noise_rate"] for run in runs]))
    for field in ("test_accuracy", "test_loss"):
      last = [run["curves"][field][-1] for run in runs]
      row[field], row[f"{field}_error"] = tables.mean_and_error(last)
    row["nonfinite"] = sum(
      sum(run["curves"]["train_nonfinite"]) for run in runs
    )
    times = [result["seconds_per_step"] for result, _, _ in members]
    row["seconds_per_step"] = float(np.mean(times))
    row["time_over_sgd"] = None
    if plain:
      row["time_over_sgd"] = float(np.mean(times) / np.mean(plain))
    row |= detection.mean(config, [entry for _, _, entry in members])
    rows.append(row)
  return rows


def markdown(summary: dict[str, Any]) -> str:
  """The tables of accuracy and of detection, as Markdown."""
  rows, about = summary["rows"], summary["machine"]
  of_rates = [
    {**row, "rate": rate}
    for rate, row in study_tables.beside_references(rows, "rate")
  ]
  rates = list(dict.fromkeys(row["rate"] for row in of_rates))

  def time(found):
    yield tables.number(next(iter(found.values()))["time_over_sgd"], 2)

  lines = [
    f"# {summary['dataset']}, {summary['noise']} noise: linear probing",
    "",
    f"{summary['num_epochs']} epochs, seeds"
    f" {', '.join(map(str, summary['seeds']))}; {about['device']},"
    f" {about['cpu_cores']} CPU cores, {about['date']}.",
  ]
  several = shares.several(rows)
  if several:
    lines += shares.markdown(of_rates)
  else:
    lines += [
      "",
      "Test accuracy by noise rate, mean ± standard error over the seeds, and"
      " the time of a step relative to sgd's:",
      "",
      *study_tables.pivot(
        ["method", *(f"{rate:g}" for rate in rates), "time"],
        of_rates,
        lambda row: (study_tables.label(row),),
        "rate",
        rates,
        time,
      ),
    ]
  lines += shares.markdown_of_differences(summary["differences"])
  scored = [row for row in rows if row["auroc"] is not None]
  if scored:
    names = [key.removeprefix("f1_") for key in scored[0] if key[:3] == "f1_"]
    reference = ["reference's labels"] if several else []
    lines += [
      "",
      "Mislabelled samples found: AUROC of the mean score, and F1 and share of"
      " samples kept by binariser:",
      "",
      *tables.markdown(
        ["method", *reference, "rate", "clean", "AUROC", *names],
        [
          [
            study_tables.label(row),
            *(shares.label(row["share"]) for _ in reference),
            f"{row['rate']:g}",
            tables.number(row["clean_fraction"]),
            tables.number(row["auroc"]),
            *(_found(row, name) for name in names),
          ]
          for row in scored
        ],
      ),
    ]
  return "\n".join(lines) + "\n"


def _found(row, name):
  kept = tables.number(row[f"kept_{name}"])
  return f"{tables.number(row[f'f1_{name}'])} ({kept})"


def _draw(config, folder, results, rows):
  """Draws curves, a file for each rate and field; histograms of scores."""
  if shares.several(rows):
    return shares.draw(config, folder, rows)
  curves: dict[Any, dict[str, list[Any]]] = {}
  for result in results:
    for run in result["runs"]:
      name = study_tables.label({**run, "method": result["method"]})
      rates = config.probe.rates if name == "reference" else [run["rate"]]
      for rate in rates:
        curves.setdefault(rate, {}).setdefault(name, []).append(run["curves"])
  paths = []
  for rate, by_name in curves.items():
    for field in ("test_accuracy", "test_loss"):
      paths.append(
        figures.learning_curves(
          {
            name: [(range(len(run[field])), run[field]) for run in runs]
            for name, runs in by_name.items()
          },
          folder / f"{field}_{rate:g}.png",
          title=f"{config.data.name}, {config.noise.kind} noise {rate:g}",
          xlabel="epoch",
          ylabel=field.replace("_", " "),
        )
      )
  return paths + _draw_scores(config, folder, results)


def _draw_scores(config, folder, results):
  """Draws scores of the first seed's first mimic method, a file a rate."""
  first = config.study.seeds[0]
  drawn: dict[float, pathlib.Path] = {}
  for result in results:
    for run in result["runs"]:
      if not result["method"].startswith("grad_mimic") or run["seed"] != first:
        continue
      if run["rate"] in drawn:
        continue
      with samples(folder / "samples" / run["samples"]) as arrays:
        scores = arrays["score"]
        wrong = arrays["labels"] != arrays["clean_labels"]
      seen = ~np.isnan(scores).all(axis=1)
      if not seen.any():  # the run has diverged at once
        continue
      name = study_tables.label({**run, "method": result["method"]})
      drawn[run["rate"]] = figures.score_histograms(
        scores[seen],
        wrong[seen],
        folder / f"scores_{run['rate']:g}.png",
        title=f"{config.data.name}, {config.noise.kind} noise {run['rate']:g}:"
        f" scores of {name}, seed {first}",
      )
  return list(drawn.values())
