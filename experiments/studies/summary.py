"""Results of a study: a row for each run, and `summary.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import gradmimic_jax as gm
from experiments.reporting import page
from experiments.runtime import tables as tables_lib, workdir as workdir_lib
from experiments.selection import cuts, files, runs
from experiments.studies import detection, figures, plan, tables
from experiments.studies.plan import BASELINE, REFERENCE
from experiments.studies.records import (
  MARKDOWN_FILE,
  SUMMARY_FILE,
  TABLE_FILE,
  Records,
)


def write(records: Records) -> dict[str, Any]:
  """Measures what a study found out, writes it, and returns `summary.json`."""
  config, task, results = records.config, records.task, records.results
  found = _detect(records)
  rows = [make_row(records, name, found.get(name, [])) for name in results]
  best = find_best(rows)
  learner = next(row for row in rows if row["method"] != REFERENCE)
  one = results[learner["method"]][0]
  folder = records.folder
  summary = {
    "task": config.task,
    "dataset": config.data.get("name", config.task),
    "noise": ", ".join(task.noise_kinds(config)),
    "noise_rate": learner["noise_rate"],
    "seeds": records.seeds,
    "num_epochs": config.num_epochs,
    "batch_size": config.batch_size,
    "samples_seen": one["steps"] * config.batch_size,
    task.size: one.get(task.size),
    "size": task.size,
    "headline": task.headline._asdict(),
    "kinds": list(records.kinds),
    "machine": workdir_lib.machine(),
    "runs": results,
    "rows": rows,
    "detection": found,
    "reference_checks": records.load_verdicts(),
    "overlaps": records.load_overlaps(),
    "best": best,
    "against": config.study.against,
    "seconds": round(
      sum(run["seconds"] for members in results.values() for run in members), 1
    ),
    "results": [
      str(folder / name) for name in (TABLE_FILE, MARKDOWN_FILE, SUMMARY_FILE)
    ],
  }
  summary["figures"] = [str(path) for path in figures.draw(records, summary)]
  summary["report"] = _write_page(records, summary)
  write_tables(folder, summary, tables.markdown(summary))
  return summary


def write_tables(folder: Any, summary: dict[str, Any], text: str) -> None:
  """Writes a summary, its rows as CSV, and its tables as Markdown."""
  rows = tables_lib.csv_text(summary["rows"])
  workdir_lib.write_bytes(folder / TABLE_FILE, rows.encode())
  workdir_lib.write_bytes(folder / MARKDOWN_FILE, text.encode())
  workdir_lib.write_json(folder / SUMMARY_FILE, summary)


def select(records: Records, seed: int, name: str) -> gm.Selection:
  """Selects from a finished run's ledger, and writes that to its folder."""
  folder = records.path(seed, name)
  ledger = records.load_ledger(seed, name)
  selection = files.select(records.config.select, ledger)
  files.write(folder, selection, runs.load_fingerprints(folder))
  return selection


def make_row(
  records: Records, name: str, found: Sequence[dict[str, Any]]
) -> dict[str, Any]:
  """A run's means over the seeds, beside the baseline's of the same seeds.

  `saved_loss` (`saved_accuracy`) is the share of the baseline's steps that are
  left when its final loss (accuracy) is first reached, over the seeds that
  reach it, `reached_loss` of them; absent without a baseline. `found` is what
  the run's scores detect, for each seed.
  """
  task, members = records.task, records.results[name]
  run = next(run for run in records.runs if run.name == name)
  row: dict[str, Any] = {"method": name, "runs": len(members)}
  row |= {"chosen_by": run.chosen_by, "keep": run.keep, "filter": run.filter}
  asked = plan.make_config(records.config, run).noise.rate
  rates = [member.get("noise_rate", asked) for member in members]
  row["noise_rate"] = float(np.mean(rates))
  for field in (task.size, "seconds"):
    if members[0].get(field) is not None:
      row[field] = float(np.mean([member[field] for member in members]))
  for field in (*task.headline, *task.more_metrics):
    row[field], row[f"{field}_error"] = tables_lib.mean_and_error(
      [member[field] for member in members]
    )
  row |= _compare(records, name)
  against = records.results.get(records.config.study.against)
  if against is not None:
    field = task.headline.accuracy
    gaps = [
      {"ahead": run[field] - other[field]}
      for run, other in zip(members, against, strict=True)
    ]
    row |= _mean_of(gaps, "ahead")
  row["nonfinite"] = sum(member["nonfinite_samples"] for member in members)
  row |= detection.mean(records.config, list(found))
  for field in ("auroc", *(f"auroc_{kind}" for kind in records.kinds)):
    row |= _mean_of(found, field)
  row["clean_share"] = None
  if run.is_on_a_part or name == BASELINE:
    shares = [
      records.clean_share(other) for other in records.runs if other.name == name
    ]
    known = [share for share in shares if share is not None]
    if len(known) == len(shares):
      row["clean_share"] = float(np.mean(known))
  return row


def _compare(records, name):
  """A run's gain, and the steps that it saves; {} without a baseline."""
  headline, plain = records.task.headline, records.results.get(BASELINE)
  if plain is None:
    return {}
  gains = [
    {"gain": run[headline.accuracy] - other[headline.accuracy]}
    for run, other in zip(records.results[name], plain, strict=True)
  ]
  fields = _mean_of(gains, "gain")
  for what, field, sign in (
    ("loss", headline.loss, 1),
    ("accuracy", headline.accuracy, -1),
  ):
    saved = []
    for seed, other in zip(records.seeds, plain, strict=True):
      steps, values = records.load_curve(seed, name, field)
      there = gm.metrics.steps_to(
        steps, np.multiply(sign, values), sign * other[field]
      )
      if there is not None:
        saved.append({f"saved_{what}": 1 - there / other["steps"]})
    fields[f"reached_{what}"] = len(saved)
    fields |= _mean_of(saved, f"saved_{what}")
  return fields


def _mean_of(entries, field):
  """The mean of what there is, and its error."""
  values = [e[field] for e in entries if e.get(field) is not None]
  mean = tables_lib.mean_and_error(values) if values else (None, None)
  return dict(zip((field, f"{field}_error"), mean, strict=True))


def find_best(rows: Sequence[dict[str, Any]]) -> str | None:
  """The run with scores that saves the most steps in all seeds, or None.

  Not one of a later round, which takes the steps of those before it, too.
  """
  able = [
    row
    for row in rows
    if row["auroc"] is not None
    and row.get("reached_loss") == row["runs"]
    and not plan.is_later_round(row["method"])
  ]
  return (
    max(able, key=lambda row: row["saved_loss"])["method"] if able else None
  )


def _detect(records):
  """By name, how well scores find what is wrong, for each seed."""
  found: dict[str, list[dict[str, Any]]] = {}
  for seed in records.seeds:
    truth = records.load_truth(seed)
    if truth is None:
      continue

    def of_scores(ids, scores, truth=truth):
      kinds = truth.kinds_of(ids)
      return detection.auroc_by_kind(scores, kinds, records.kinds)

    for name in records.scored:
      selection = select(records, seed, name)
      ledger = records.load_ledger(seed, name)
      ids, scores = ledger.matrix("score")
      _, weights = ledger.matrix("weight")
      wrong = truth.kinds_of(ids) != ""
      entry = detection.measure(records.config, scores, weights, wrong)
      if entry:
        entry |= of_scores(*cuts.mean_scores(records.path(seed, name)))
        seen = np.isin(ids, selection.ids)
        chosen = gm.metrics.f1(~selection.keep, wrong[seen])
        entry["f1"] = detection.plain(chosen)
        entry["kept_fraction"] = float(selection.keep.mean())
      found.setdefault(name, []).append(entry)
    if records.task.reference_score and REFERENCE in records.results:
      entry = of_scores(*records.score_by_reference(seed))
      found.setdefault(records.task.reference_score, []).append(entry)
  return found


def _write_page(records, summary):
  """The path of the page on the best run with scores, or the first, if any.

  It is about the study's first seed.
  """
  if not records.scored:
    return None
  seed, name = records.seeds[0], summary["best"] or records.scored[0]
  folder, task = records.path(seed, name), records.task
  columns = (*task.headline, *task.more_metrics, task.size, "seconds")
  path = page.write(
    records.folder / f"report_{name}.html",
    folder,
    gm.export.read_parquet(folder / files.SELECTION_FILE),
    title=f"{tables.title(summary)}: {name}",
    results={
      other: {key: members[0][key] for key in columns if key in members[0]}
      for other, members in records.results.items()
    },
  )
  return str(path)
