"""What a cross-fitting leaves: a ledger, probabilities, lists of the lowest."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.data import decoding, filters, noise, sources
from experiments.data.pairs import images as images_lib
from experiments.reporting import figures
from experiments.runtime import tables, workdir as workdir_lib
from experiments.studies.probing import features as features_lib, rankings
from experiments.studies.records import MARKDOWN_FILE, SUMMARY_FILE, TABLE_FILE
from experiments.studies.summary import write_tables
from experiments.tasks.classification import data as data_lib
from experiments.training import trainer
from gradmimic_jax import _files

PROBABILITIES_FILE = "probabilities.npy"
SAMPLES_FILE = "samples.parquet"
START = "grad_mimic_at_start"  # the ranking of a learner that knows nothing


class Found(NamedTuple):
  """What all cells of a cross-fitting found, of S seeds."""

  probabilities: np.ndarray  # float32 [S, N, C], out of sample
  # Method -> "score", "weight" and "loss" -> float32 [S, N, T] over T epochs.
  samples: dict[str, dict[str, np.ndarray]]
  start_scores: np.ndarray  # float32 [S, N], toward the references' weights
  test_accuracy: np.ndarray  # [S, K], of the folds' references
  fingerprint: str  # of all that it depends on
  seconds: float


def write(
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  train: features_lib.Features,
  labels: noise.NoisyLabels,
  truths: Mapping[str, rankings.Truth],
  found: Found,
) -> dict[str, Any]:
  """Writes what was found; returns the content of `summary.json`.

  The folder gets `probabilities.npy` [N, C], `labels.npz` and the ledger, whose
  scores are means over the seeds; `samples.parquet`, a row a sample with its
  labels and all rankings; of each method and of confident learning the lowest
  samples with their scores (of the latter, the probability of the given label),
  as `lowest_<name>.csv` and, where there are images, `.png`; and `results.csv`,
  `results.md` and `summary.json`.
  """
  given = labels.labels
  probabilities = found.probabilities.mean(axis=0)
  suggested = probabilities.argmax(axis=1)
  scores = {
    name: fields["score"].mean(axis=-1)  # [S, N]
    for name, fields in found.samples.items()
  }
  scores[START] = found.start_scores
  together = rankings.rank(
    probabilities, given, {k: v.mean(axis=0) for k, v in scores.items()}
  )
  by_seed = [
    rankings.rank(p, given, {k: v[s] for k, v in scores.items()})
    for s, p in enumerate(found.probabilities)
  ]
  source = sources.open(config.data, config.data.train_split)
  _write_run(config, folder, source, labels, probabilities, found)
  names = np.asarray(train.class_names)
  count = min(config.cross.lowest, len(given))
  known = {
    "id": train.ids,
    "given": names[given],
    "suggested": names[suggested],
  }
  with _files.replacing(folder / SAMPLES_FILE) as file:
    pq.write_table(pa.table({**known, **together}), file)
  files = [folder / PROBABILITIES_FILE, folder / SAMPLES_FILE]
  shown = [*found.samples, rankings.CONFIDENT_LEARNING]
  chosen = {name: rankings.lowest(together[name], count) for name in together}
  for name in shown:
    values = together[name]
    if name == rankings.CONFIDENT_LEARNING:  # which are mere places
      values = np.exp(together[rankings.LOSS])
    files += _write_list(folder, name, chosen[name], known, values, source)
  issues = rankings.find_issues(probabilities, given)
  accuracy = (found.probabilities.argmax(axis=2) == given).mean(axis=1)
  summary = {
    "dataset": config.data.name,
    "samples": len(given),
    "folds": config.cross.folds,
    "seeds": list(config.study.seeds),
    "num_epochs": config.num_epochs,
    "lowest": count,
    "out_of_sample_accuracy": [*tables.mean_and_error(accuracy)],
    "reference_test_accuracy": [
      *tables.mean_and_error(found.test_accuracy.mean(axis=1))
    ],
    "label_issues": len(issues),
    "truths": {
      name: {
        "known": int(truth.known.sum()),
        "wrong": int(truth.wrong.sum()),
        "wrong_issues": int(truth.wrong[issues].sum()),
      }
      for name, truth in truths.items()
    },
    "shared": {
      name: len(np.intersect1d(chosen[config.method], some))
      for name, some in chosen.items()
    },
    "rows": [
      {"truth": truth, **row}
      for truth, about in truths.items()
      for row in rankings.measure(together, by_seed, about, count)
    ],
    "seconds": found.seconds,
    "machine": workdir_lib.machine(),
  }
  files += [folder / f for f in (TABLE_FILE, MARKDOWN_FILE, SUMMARY_FILE)]
  summary["files"] = [str(path) for path in files]
  write_tables(folder, summary, markdown(summary))
  return summary


def _write_run(config, folder, source, labels, probabilities, found):
  """What makes the folder one of a run: labels, outputs and a ledger."""
  noise.save(folder / data_lib.LABELS_FILE, labels, source.ids)
  with _files.replacing(folder / PROBABILITIES_FILE) as file:
    np.save(file, probabilities, allow_pickle=False)
  fields = found.samples[config.method]
  ledger = gm.ScoreLedger(
    folder / trainer.LEDGER_FOLDER,
    fingerprints={
      "cross_fitting": found.fingerprint,
      **filters.fingerprints(config, source, labels),
    },
    recover=True,
  )
  epochs = fields["score"].shape[-1]
  if ledger.first_lost_step is not None:
    ledger.forget_from(ledger.first_lost_step)
  elif ledger.epochs == tuple(range(epochs)):
    return
  means = {name: values.mean(axis=0) for name, values in fields.items()}
  for epoch in range(epochs):
    ledger.append(
      np.arange(len(source)),
      means["score"][:, epoch],
      weights=means["weight"][:, epoch],
      losses=means["loss"][:, epoch],
      step=epoch,
      epoch=epoch,
    )
  ledger.flush()


def _write_list(folder, name, positions, known, values, source):
  """Writes the samples at some positions as a table and a contact sheet."""
  rows = [
    {
      "rank": rank,
      **{key: str(column[at]) for key, column in known.items()},
      "value": float(values[at]),
    }
    for rank, at in enumerate(positions, start=1)
  ]
  file = folder / f"lowest_{name}.csv"
  workdir_lib.write_bytes(file, tables.csv_text(rows).encode())
  if source.channels is None:
    return [file]
  sheet = figures.contact_sheet(
    _images(source, positions),
    [f"{row['rank']}: {row['given']}\n{row['suggested']}?" for row in rows],
    folder / f"lowest_{name}.png",
    title=f"{source.name.split('/')[0]}: the {len(rows)} lowest by"
    f" {name.replace('_', ' ')}; given label, suggested label",
    columns=10,
  )
  return [file, sheet]


def _images(source, positions):
  """Images as they are stored; black where one can't be used."""
  transform = decoding.Transform(source.channels)
  for stored in source.read(positions):
    try:
      yield transform.decode(stored)
    except images_lib.BadImageError:
      yield np.zeros((1, 1, 1), np.uint8)


def markdown(summary: dict[str, Any]) -> str:
  """The tables of all rankings, as Markdown."""
  about = summary["machine"]
  lines = [
    f"# {summary['dataset']}: labels as they were given",
    "",
    f"{summary['samples']:,} samples, {summary['folds']} folds,"
    f" {summary['num_epochs']} epochs, seeds"
    f" {', '.join(map(str, summary['seeds']))}; {about['device']},"
    f" {about['cpu_cores']} CPU cores, {about['date']}.",
    "",
    "Accuracy of the references on the samples that they haven't seen"
    f" {_number(summary['out_of_sample_accuracy'])}, on the test split"
    f" {_number(summary['reference_test_accuracy'])}."
    f" cleanlab finds {summary['label_issues']:,} label issues.",
  ]
  for truth, counts in summary["truths"].items():
    rows = [row for row in summary["rows"] if row["truth"] == truth]
    lines += [
      "",
      f"By {truth}, {counts['wrong']:,} of {counts['known']:,} labels are"
      f" wrong, {counts['wrong_issues']:,} of cleanlab's issues among them. Of"
      " all seeds together, and mean ± standard error over the seeds:",
      "",
      *tables.markdown(
        [
          "ranking",
          "AUROC",
          "one seed",
          "average precision",
          "one seed",
          f"wrong among the {summary['lowest']} lowest",
          "not known",
        ],
        [
          [
            row["ranking"].replace("_", " "),
            *(
              text
              for field in ("auroc", "average_precision")
              for text in (
                tables.number(row[field], 4),
                _number([row[f"{field}_mean"], row[f"{field}_error"]]),
              )
            ),
            str(row["wrong_lowest"]),
            str(row["unknown_lowest"]),
          ]
          for row in rows
        ],
      ),
    ]
  return "\n".join(lines) + "\n"


def _number(found):
  mean, error = found
  return "-" if mean is None else tables.with_error(mean, error, 4)
