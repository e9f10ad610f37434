"""Puts finished studies together: the paper's tables, and ours beside them."""

import functools
import pathlib
import shutil
from typing import Any

import numpy as np
from ml_collections import config_dict

from configs import compare as results_config
from experiments.reporting import figures
from experiments.runtime import terminal, workdir as workdir_lib
from experiments.runtime.tables import csv_text, markdown, number
from experiments.studies import published, records, tables, tuning

COSTS_FILE = "methods.json"  # of the benchmark of methods
PAGE_FILE = "tables.md"
_PROBING, _FINETUNING = "Linear probing", "Fine-tuning"


def load_costs(file: pathlib.Path) -> dict[str, Any]:
  """Reads `methods.json`: machine, batch size and methods of its first batch.

  Raises:
    ValueError: the file is damaged, or has no batches.
  """
  found = workdir_lib.read_json(file, {"machine": dict, "batches": dict})
  if not found["batches"]:
    raise ValueError(f"{file} has no batches; give its command again.")
  size, entries = next(iter(found["batches"].items()))
  machine = found["machine"]
  return {"machine": machine, "batch_size": int(size), "methods": entries}


def write(config: config_dict.ConfigDict, workdir: Any) -> pathlib.Path:
  """Writes `tables.md`, each table also as CSV, and figures; returns the page.

  Raises:
    FileNotFoundError: a folder that is not there or not finished.
    ValueError: an unknown field, or a file that can't be read.
  """
  workdir_lib.check_fields(config, results_config)
  given = {_PROBING: config.probe, _FINETUNING: config.finetune}
  groups = {
    title: _load(folders) for title, folders in given.items() if folders
  }
  if not groups:
    raise ValueError(
      "config.probe and config.finetune are empty; expected at least one"
      " folder of a finished experiments.study, of heads or of networks."
    )
  ablations = [
    (label, _load([folder]))
    for label, _, folder in (item.partition("=") for item in config.ablations)
  ]
  costs = None
  if config.costs is not None:
    costs = load_costs(_there(pathlib.Path(config.costs) / COSTS_FILE))
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  lines = [f"# {config.title}", "", *_about(groups)]
  for title, summaries in groups.items():
    rows = _rows(summaries)
    slug = title.lower().replace(" ", "_").replace("-", "_")
    _write_csv(folder / f"{slug}.csv", rows)
    theirs = functools.partial(
      published.find,
      "finetuned" if title == _FINETUNING else "heads",
      summaries[0]["dataset"],
    )
    lines += ["", f"## {title}", "", *_accuracies(rows, costs, theirs)]
    lines += _subsets(rows)
    dataset = summaries[0]["dataset"] if title == _PROBING else ""
    lines += _detections(rows, config.method, dataset)
    lines += _quality(
      rows, config.method, folder / f"quality_{slug}.png", title
    )
  if costs is not None:
    lines += ["", *_cost_notes(costs)]
  if ablations:
    lines += ["", "## Ablations", "", *_ablations(ablations, folder)]
  if config.tuning:
    lines += ["", "## Settings found by tuning", "", *_tuned(config, folder)]
  page = folder / PAGE_FILE
  workdir_lib.write_bytes(page, ("\n".join(lines) + "\n").encode())
  return page


def _there(path):
  if not path.is_file():
    raise FileNotFoundError(
      f"there is no {path}; expected the folder of a job that has finished."
    )
  return path


def _load(folders):
  return [
    workdir_lib.read_json(
      _there(pathlib.Path(folder) / records.SUMMARY_FILE), {}
    )
    for folder in folders
  ]


def _about(groups):
  first = next(iter(groups.values()))[0]
  machines = {
    (s["machine"]["device"], s["machine"]["cpu_cores"])
    for summaries in groups.values()
    for s in summaries
  }
  dates = sorted(
    {s["machine"]["date"] for group in groups.values() for s in group}
  )
  where = ", ".join(
    f"{device}, {cores} CPU cores" for device, cores in machines
  )
  return [
    f"{first['dataset']}; mean ± standard error over the seeds"
    f" {', '.join(map(str, first['seeds']))}; {where}; {' to '.join(dates)}.",
  ]


def _rows(summaries):
  """Every summary's rows with the noise in words."""
  rows = []
  for summary in summaries:
    accuracy = summary.get("headline", {}).get("accuracy", "test_accuracy")
    for rate, row in tables.beside_references(summary["rows"], "noise_rate"):
      noise = {"noise": f"{summary['noise']} {rate:.2f}"}
      own = {f"test_accuracy{x}": row[f"{accuracy}{x}"] for x in ("", "_error")}
      rows.append({**noise, **row, **own})
  return rows


def _write_csv(path, rows):
  workdir_lib.write_bytes(path, csv_text(rows).encode())


def _is_whole(row):
  """True for a run on all of the data."""
  return not (row.get("keep") or row.get("chosen_by") or row.get("filter"))


def _noises(rows):
  return list(dict.fromkeys(row["noise"] for row in rows))


def _accuracies(rows, costs, theirs):
  whole = [row for row in rows if _is_whole(row)]
  names = ["method", *_noises(whole)]
  beside = any(
    theirs(row["method"], rate) is not None
    for row in whole
    for rate in published.RATES
  )
  if costs:
    names += ["time", "memory"]
  if beside:
    names += ["published .4 / .5 / .6"]

  def more(found):
    method = next(iter(found.values()))["method"]
    if costs:
      entry = costs["methods"].get(method, {})
      yield from (number(entry.get(k), 2) for k in ("time", "memory"))
    if beside:
      values = [theirs(method, rate) for rate in published.RATES]
      shown = " / ".join(number(value, 4) for value in values)
      yield shown if any(values) else "-"

  return [
    "Test accuracy:",
    "",
    *tables.pivot(
      names,
      whole,
      lambda row: (tables.label(row),),
      "noise",
      _noises(whole),
      more,
    ),
  ]


def _subsets(rows):
  """Accuracy after training on a part of the data, chosen or by chance."""
  parts = [row for row in rows if row.get("keep") is not None]
  if not parts:
    return []
  keeps = sorted({row["keep"] for row in parts}, reverse=True)
  return [
    "",
    "Test accuracy of plain training on a share of the data:",
    "",
    *tables.pivot(
      ["noise", "chosen by", *(f"{100 * keep:g} %" for keep in keeps)],
      parts,
      lambda row: (row["noise"], row["chosen_by"] or "random"),
      "keep",
      keeps,
    ),
  ]


def _found(rows, method):
  """The method's rows with scores, and the names of binarisers."""
  keys = dict.fromkeys(key for row in rows for key in row)
  names = [key.removeprefix("f1_") for key in keys if key.startswith("f1_")]
  own = [row for row in rows if row["method"] == method]
  return [row for row in own if row.get("auroc") is not None], names


def _detections(rows, method, dataset):
  scored, names = _found(rows, method)
  if not scored or not names:
    return []

  def cell(row, name):
    theirs = None
    if row["noise"].startswith("symmetric"):
      rate = round(row["noise_rate"], 2)
      theirs = published.find("f1", dataset, name, rate)
    text = number(row[f"f1_{name}"])
    return text if theirs is None else f"{text} ({theirs:.2f})"

  return [
    "",
    f"Mislabelled samples found by the scores of {method}: AUROC of the mean"
    " score, F1 by binariser (published, where there is one):",
    "",
    *markdown(
      ["noise", "AUROC", *names],
      [
        [row["noise"], number(row["auroc"]), *(cell(row, x) for x in names)]
        for row in scored
      ],
    ),
  ]


def _quality(rows, method, path, title):
  scored, names = _found(rows, method)
  if len(scored) < 2 or not names:
    return []
  noise = [1 - row["clean_fraction"] for row in scored]
  kept = {name: [row[f"kept_{name}"] for row in scored] for name in names}

  def estimate(row, name):
    return f"{number(row[f'estimate_{name}'])} ({number(row[f'kept_{name}'])})"

  lines = [
    [row["noise"], number(row["clean_fraction"])]
    + [estimate(row, name) for name in names]
    for row in scored
  ]
  correlations = [number(_pearson(noise, kept[name])) for name in names]
  lines.append(["r with the noise", "", *correlations])
  order = np.argsort(noise)
  shares = kept | {"truth": [1 - rate for rate in noise]}
  figures.learning_curves(
    {
      name: [(np.take(noise, order).tolist(), np.take(share, order).tolist())]
      for name, share in shares.items()
    },
    path,
    title=f"{title}: share kept by the scores of {method}",
    xlabel="share of labels that are wrong",
    ylabel="share of samples kept",
  )
  return [
    "",
    "Quality of the data: estimated clean fraction (and share kept), and"
    " Pearson's r of the share kept with the noise rate"
    f" (published: {published.load().get('quality_correlation')}):",
    "",
    *markdown(["noise", "truth", *names], lines),
    "",
    f"![share kept against noise]({path.name})",
  ]


def _pearson(a, b):
  if np.std(a) == 0 or np.std(b) == 0:
    return None
  return float(np.corrcoef(a, b)[0, 1])


def _cost_notes(costs):
  about = costs["machine"]
  return [
    "Time and memory are those of a fine-tuning step, optimizer included, of"
    f" batch {costs['batch_size']}, relative to sgd's"
    f" ({costs['methods']['sgd']['milliseconds']:.1f} ms; {about['device']},"
    f" {about['cpu_cores']} CPU cores, {about['date']}): medians of rounds that"
    " time all methods in turn, and the compiler's count of temporary memory."
    " The reference's outputs are found before training and not counted.",
  ]


def _ablations(ablations, folder):
  rows = [
    {"setting": label, **row}
    for label, summaries in ablations
    for row in _rows(summaries)
    if _is_whole(row)
  ]
  _write_csv(folder / "ablations.csv", rows)
  noises = _noises(rows)

  def aurocs(found):
    values = (found.get(noise, {}).get("auroc") for noise in noises)
    yield " / ".join(map(number, values))

  return tables.pivot(
    ["setting", "method", *noises, "AUROC"],
    rows,
    lambda row: (row["setting"], tables.label(row)),
    "noise",
    noises,
    aurocs,
  )


def _tuned(config, folder):
  lines = []
  for path in map(pathlib.Path, config.tuning):
    settings = workdir_lib.read_json(_there(path / tuning.TUNED_FILE), {})
    tried = _there(path / tuning.TABLE_FILE)
    shutil.copy(tried, folder / f"{path.name}_{tuning.TABLE_FILE}")
    for method, entry in settings.items():
      best = ", ".join(f"{k} {v}" for k, v in entry["set"].items())
      cells = best, number(entry["accuracy"], 4), str(entry["settings"])
      lines.append([path.name, method, *cells])
  return markdown(
    ["tuning", "method", "best", "held-out accuracy", "settings tried"], lines
  )


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, writes the tables, and prints where they are."""
  workdir_lib.check_fields(config, results_config)
  given = {"heads": config.probe, "networks": config.finetune}
  terminal.note(
    terminal.outline(
      "compare finished studies",
      {
        **{name: ", ".join(folders) for name, folders in given.items()},
        "look at": pathlib.Path(workdir) / PAGE_FILE,
      },
    )
  )
  print(write(config, workdir))
