"""What came out of CLIP's study: steps saved, detection, filters, a page."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import gradmimic_jax as gm
from experiments.data.noise import captions as caption_noise
from experiments.reporting import figures, tables
from experiments.runtime import workdir as workdir_lib
from experiments.selection import (
  files as select_lib,
  filters as clip_filters,
  runs as runs_lib,
)
from experiments.studies.clip_plan import BASELINE, FILTERS, REFERENCE, derived
from experiments.studies.clip_records import (
  ACCURACY,
  LOSS,
  RECALLS,
  auroc_by_kind,
  best_of,
  curve,
  folder_of,
  means,
  row_of,
)
from experiments.tasks.contrastive import data as clip_data
from experiments.training import reference_check, trainer as clip_train
from gradmimic_jax.selection.uids import parse_uids

SUMMARY_FILE = "summary.json"
TABLE_FILE = "results.csv"
MARKDOWN_FILE = "results.md"
KEPT_FILE = "kept.npy"  # the page's selection as a DataComp subset file
_CURVES = 6  # more can't be told apart


def write(
  config: Any,
  folder: pathlib.Path,
  runs: Sequence[Any],
  results: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
  """Measures what a study found out, and writes it.

  Args:
    config: the study's.
    folder: the study's.
    runs: all of it, `clip_study_runs.Run`s.
    results: of each run's name the results, in the order of the seeds.

  Returns:
    What is in `summary.json`.
  """
  found: dict[str, list[dict[str, Any]]] = {}
  for seed in config.study.seeds:
    truth = _truth(config, seed)
    for name in results:
      there = folder_of(folder, seed, name)
      if (there / clip_train.LEDGER_FOLDER).is_dir():
        scores = clip_filters.mean_scores(there)
        found.setdefault(name, []).append(auroc_by_kind(scores, truth))
    if REFERENCE in results:
      found.setdefault("CLIP score of the reference", []).append(
        auroc_by_kind(_clip_scores(config, folder, seed), truth)
      )
  expressions = {run.name: run.filter for run in runs}
  rows = [
    row_of(config, folder, name, expressions[name], results) for name in results
  ]
  for row in rows:
    row |= means(found.get(row["run"], []))
    row["clean_share"] = None
    if row["filter"] or row["run"] == BASELINE:
      row["clean_share"] = _clean_share(config, folder, row["filter"])
  verdicts = _verdicts(config, folder, results)
  overlaps = _overlaps(config, folder)
  best = best_of(rows)
  summary = {
    "seeds": list(config.study.seeds),
    "samples_seen": results[BASELINE][0]["samples_seen"],
    "batch_size": config.batch_size,
    "train_pairs": config.data.train_size,
    "noise_rate": config.noise.rate,
    "machine": workdir_lib.machine(),
    "rows": rows,
    "detection": {name: means(entries) for name, entries in found.items()},
    "reference_checks": verdicts,
    "overlaps": overlaps,
    "best": best,
    "runs": results,
    "seconds": round(
      sum(run["seconds"] for members in results.values() for run in members), 1
    ),
    "figures": [str(path) for path in _draw(config, folder, rows, best)],
    "results": [
      str(folder / name) for name in (TABLE_FILE, MARKDOWN_FILE, SUMMARY_FILE)
    ],
    "report": _page(config, folder, results, best),
  }
  workdir_lib.write_bytes(folder / TABLE_FILE, tables.csv_text(rows).encode())
  workdir_lib.write_bytes(
    folder / MARKDOWN_FILE, (table(summary) + "\n").encode()
  )
  workdir_lib.write_json(folder / SUMMARY_FILE, summary)
  return summary


def text(summary: dict[str, Any]) -> str:
  """The study's results, and where they are, as text."""
  seeds = len(summary["seeds"])
  lines = [
    f"{summary['train_pairs']:,} pairs of shapes,"
    f" {summary['noise_rate']:.0%} of them mis-captioned;"
    f" {summary['samples_seen']:,} samples seen in batches of"
    f" {summary['batch_size']}; mean ± standard error of {seeds}"
    f" seed{'s' if seeds > 1 else ''}:",
    "",
    table(summary),
    "",
    *_headline(summary),
    "",
    "figures and results:",
    *(f"  {path}" for path in (*summary["figures"], *summary["results"])),
  ]
  if summary["report"]:
    lines += ["", "report:", f"  {summary['report']}"]
  return "\n".join(lines)


def table(summary: dict[str, Any]) -> str:
  """All runs, how well scores detect, and overlaps, as Markdown."""
  kinds = caption_noise.KINDS
  lines = [
    "Steps saved: the share of the baseline's steps that are left when its"
    " final loss (accuracy) on clean held-out pairs is first reached. AUROC: of"
    " mis-captioned against clean pairs, by mean score.",
    "",
    *tables.markdown(
      [
        *("run", "held-out loss", "steps saved to loss"),
        *("zero-shot accuracy", "gain", "steps saved to accuracy"),
        *("AUROC", *kinds),
      ],
      [_cells(row, kinds) for row in summary["rows"] if not row["filter"]],
    ),
  ]
  by_clip = summary["detection"].get("CLIP score of the reference")
  if by_clip:
    shown = ", ".join(
      f"{name} {tables.number(by_clip[f'auroc_{name}'])}" for name in kinds
    )
    lines += [
      "",
      "The reference's own similarity as a score: AUROC"
      f" {_number(by_clip, 'auroc')} ({shown}).",
    ]
  if summary["reference_checks"]:
    lines += ["", "What `check_reference` said before the first step:", ""]
    lines += [
      f"- {name}: {', '.join(verdicts)}"
      for name, verdicts in summary["reference_checks"].items()
    ]
  filtered = [row for row in summary["rows"] if row["filter"]]
  if filtered:
    plain = [row for row in summary["rows"] if row["run"] == BASELINE]
    lines += [
      "",
      "The baseline on what filters keep, for as many samples seen:",
      "",
      *tables.markdown(
        ["filter", "pairs", "clean", "held-out loss", "zero-shot accuracy"],
        [
          [
            row["filter"] or "all pairs",
            f"{row['train_pairs']:,.0f}",
            f"{row['clean_share']:.1%}",
            _number(row, LOSS),
            _number(row, ACCURACY),
          ]
          for row in (*plain, *filtered)
        ],
      ),
    ]
  if summary["overlaps"]:
    lines += [
      "",
      *tables.markdown(
        ["filter", "other", "keeps", "keeps", "both", "Jaccard"],
        [
          [
            *(row["first"], row["second"]),
            *(f"{row[n]:,}" for n in ("n_first", "n_second", "n_both")),
            f"{row['jaccard']:.3f}",
          ]
          for row in summary["overlaps"]
        ],
      ),
    ]
  return "\n".join(lines)


def _cells(row, kinds):
  def error(field, digits, share=False):
    return "-" if row[field] is None else _number(row, field, digits, share)

  return [
    row["run"],
    error(LOSS, 3),
    _saved(row, "loss"),
    error(ACCURACY, 3),
    error("gain", 3),
    _saved(row, "accuracy"),
    error("auroc", 3),
    *(tables.number(row.get(f"auroc_{kind}")) for kind in kinds),
  ]


def _number(row, field, digits=3, share=False):
  scale = 100 if share else 1
  mean, error = row[field], row.get(f"{field}_error")
  shown = tables.with_error(
    mean * scale, None if error is None else error * scale, digits
  )
  return f"{shown} %" if share else shown


def _saved(row, what):
  """Percents; how many seeds got there, where it isn't all or none."""
  field, reached = f"saved_{what}", row[f"reached_{what}"]
  if not reached:
    return "never"
  shown = _number(row, field, 1, share=True)
  if reached < row["runs"]:
    shown += f" ({reached} of {row['runs']})"
  return shown


def _headline(summary):
  """The figures that a reader wants first."""
  by_name = {row["run"]: row for row in summary["rows"]}
  best = by_name.get(summary["best"])
  if best is None:
    return ["No run reached the baseline's final loss."]
  lines = [
    f"{best['run']} reaches the baseline's final loss with"
    f" {_saved(best, 'loss')} fewer steps"
    f" and ends {best['gain']:+.3f} in zero-shot accuracy."
  ]
  if best["auroc"] is not None:
    lines.append(
      "Its mean score tells mis-captioned pairs from clean ones with an AUROC"
      f" of {_number(best, 'auroc')}."
    )
  return lines


def _truth(config, seed):
  """The pairs of a seed; the captions are those that learners were given."""
  return clip_data.train_pairs(derived(config, seed, {}))


def _clean_share(config, folder, expression):
  """Of the pairs that a run trained on, the mean over seeds."""
  shares = []
  for seed in config.study.seeds:
    truth = _truth(config, seed)
    clean = ~truth.is_noisy
    if expression:
      there = folder_of(folder, seed, FILTERS)
      kept = gm.export.read_datacomp_subset(
        there / clip_filters.file_of(expression)
      )
      clean = clean[np.isin(parse_uids(truth.uids), kept)]
    shares.append(clean.mean())
  return float(np.mean(shares))


def _clip_scores(config, folder, seed):
  mine = derived(
    config,
    seed,
    {"mimic.reference": str(folder_of(folder, seed, REFERENCE))},
  )
  return clip_filters.load_pool(mine, None).clip


def _verdicts(config, folder, results):
  """For each run that goes toward weights what the check said, by seed."""
  verdicts: dict[str, list[str]] = {}
  for name in results:
    for seed in config.study.seeds:
      file = folder_of(folder, seed, name) / reference_check.FILE
      if file.exists():
        verdicts.setdefault(name, []).append(
          workdir_lib.read_json(file, {"verdict": str})["verdict"]
        )
  return verdicts


def _overlaps(config, folder):
  """Of the first seed's filters."""
  file = folder_of(folder, config.study.seeds[0], FILTERS)
  file = file / clip_filters.MANIFEST_FILE
  if not file.exists():
    return []
  return workdir_lib.read_json(file, {"overlaps": list})["overlaps"]


def _draw(config, folder, rows, best):
  """Loss and accuracy of the most telling runs, and the best one's scores."""
  with_scores = [row for row in rows if row["auroc"] is not None]
  with_scores.sort(key=lambda row: row[LOSS] if row[LOSS] == row[LOSS] else 1e9)
  filtered = [row for row in rows if row["filter"]]
  groups = {"": with_scores, "_filters": filtered}
  paths = []
  for suffix, members in groups.items():
    names = [row["run"] for row in members][:_CURVES]
    if not names:
      continue
    for field, file in ((LOSS, "loss"), (ACCURACY, "accuracy")):
      curves = {}
      for name in (BASELINE, *names):
        curves[name] = []
        for seed in config.study.seeds:
          steps, values = curve(folder, seed, name, field)
          seen = np.multiply(steps, config.batch_size)
          curves[name].append((seen, values))
      paths.append(
        figures.learning_curves(
          curves,
          folder / f"{file}{suffix}.png",
          title=f"shapes, {config.noise.rate:.0%} mis-captioned",
          xlabel="samples seen",
          ylabel=field.replace("_", " "),
        )
      )
  if best is not None:
    seed = config.study.seeds[0]
    truth = _truth(config, seed)
    uids, scores = runs_lib.load_ledger(folder_of(folder, seed, best)).matrix()
    order = np.argsort(truth.uids)
    at = order[np.searchsorted(truth.uids[order], uids)]
    paths.append(
      figures.score_histograms(
        scores,
        truth.is_noisy[at],
        folder / "scores.png",
        title=f"shapes: scores of {best}, seed {seed}",
      )
    )
  return paths


def _page(config, folder, results, best):
  """A page on the best run with scores, or the first; None without any."""
  seed = config.study.seeds[0]
  names = [
    name
    for name in results
    if (folder_of(folder, seed, name) / clip_train.LEDGER_FOLDER).is_dir()
  ]
  if not names:
    return None
  name = best or names[0]
  run = folder_of(folder, seed, name)
  truth = _truth(config, seed)
  ledger = runs_lib.load_ledger(run)
  selection = select_lib.from_ledger(config.select, ledger)
  if selection.keep.any():
    gm.export.write_datacomp_subset(run / KEPT_FILE, selection)
  columns = (LOSS, ACCURACY, *RECALLS, "train_pairs", "seconds")
  path = gm.report(
    ledger,
    selection,
    folder / "report.html",
    title=f"Shapes, {config.noise.rate:.0%} mis-captioned: {name}",
    run={
      "pairs": config.data.train_size,
      "mis-captioned": f"{truth.is_noisy.mean():.1%}",
      "samples seen": results[BASELINE][0]["samples_seen"],
      "batch size": config.batch_size,
      "model": f"CLIP {config.model.size}",
      "run": name,
      "seed": seed,
      "folder": run,
    },
    results={
      other: {key: members[0][key] for key in columns}
      for other, members in results.items()
    },
    dataset={
      "ids": truth.uids,
      "images": truth.images,
      # What is wrong comes first: long captions are cut off.
      "captions": [
        f"[{kind or 'clean'}] {caption}"
        for kind, caption in zip(truth.noise_kind, truth.captions, strict=True)
      ],
    },
  )
  return str(path)
