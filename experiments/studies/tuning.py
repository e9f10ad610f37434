"""Tries every method's settings on held-out samples, and writes the best."""

import itertools
import pathlib
from typing import Any

import numpy as np
from ml_collections import config_dict

from configs import label_noise
from experiments import methods, tasks
from experiments.runtime import tables, terminal, workdir as workdir_lib
from experiments.studies import opening, plan, runner
from experiments.studies.probing import grid as probe, heads

TUNED_FILE, TABLE_FILE = "tuned.json", "tuning.csv"


def tune(
  config: config_dict.ConfigDict,
  workdir: Any,
  *,
  note: terminal.Note | None = None,
) -> dict[str, Any]:
  """Tries all settings of all methods; goes on where it was stopped.

  The workdir gets the runs' folders, `tuning.csv` with all that was tried, and
  `tuned.json`, whose content is returned: for each method its best setting
  (`set`), its mean accuracy over seeds and noise rates, and how many settings
  it had. A config with a section `probe` is tuned as grids of heads. `note`
  prints what it will do; None: nothing does.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set that is not there.
  """
  fields = label_noise if "probe" in config else tasks.get(config).configs
  workdir_lib.check(workdir, config, fields, job="tuning")
  if not config.study.tune.learning_rates:
    raise ValueError(
      "config.study.tune.learning_rates is empty; expected at least one."
    )
  if "probe" in config and config.study.tune.layers:
    raise ValueError(
      "config.study.tune.layers is for whole networks; a grid of heads has just"
      " one layer. Leave it empty."
    )
  tried = _heads if "probe" in config else _runs
  folder = workdir_lib.claim(workdir, config, fields, job="tuning")
  rows = tried(config, folder, note)
  accuracy = tasks.get(config).headline.accuracy
  best: dict[str, Any] = {}
  for row in rows:
    entry = best.setdefault(row["method"], {"accuracy": -1.0, "settings": 0})
    entry["settings"] += 1
    if row[accuracy] > entry["accuracy"]:
      entry["accuracy"] = row[accuracy]
      entry["set"] = {
        key: value
        for key, value in row.items()
        if "." in key and value is not None
      }
  workdir_lib.write_bytes(folder / TABLE_FILE, tables.csv_text(rows).encode())
  workdir_lib.write_json(folder / TUNED_FILE, best)
  return best


def _runs(config, folder, note):
  """By the general loop: a run for each setting and seed."""
  task, tried = tasks.get(config), config.study.tune
  needs = (plan.REFERENCE,) if plan.needs_reference(config) else ()
  settings = {}
  for method in config.study.methods:
    values, layers = (None,), (None,)
    field = heads.value_field(method, config.mimic)
    if field is not None:
      values = tuple(tried.weighting_values) or values
    if methods.reads_layers(methods.create(method, config.mimic)):
      layers += tuple(tried.layers)
    for rate, value, chosen in itertools.product(
      tried.learning_rates, values, layers
    ):
      setting = {"method": method, "optimizer.learning_rate": rate}
      name = f"{method}_rate{rate:g}"
      if value is not None:
        setting[f"mimic.{field}"] = value
        name += f"_value{value:g}"
      if chosen is not None:
        setting["mimic.layers"] = chosen
        name += f"_layers{workdir_lib.fingerprint(chosen)[:4]}"
      settings[name] = setting
  runs = [
    plan.Run(seed, name, task.reference_overrides(config, seed))
    for name in needs
    for seed in config.study.seeds
  ]
  runs += [
    plan.Run(seed, name, setting, needs)
    for name, setting in settings.items()
    for seed in config.study.seeds
  ]
  if note is not None:
    note(opening.study("tune", config, folder, runs))
  results = runner.run_all(config, folder, runs)
  return [
    setting | _means(results[name], reversed(task.headline))
    for name, setting in settings.items()
  ]


def _heads(config, folder, note):
  """As grids of heads: one for each learning rate."""
  rows = []
  rates = config.study.tune.learning_rates
  if note is not None:
    note(
      f"tune at {len(rates)} learning rates, each a grid:\n"
      + opening.grid(config, folder, probe.cells_of(config))
    )
  for rate in rates:
    copy = config.copy_and_resolve_references().unlock()
    copy.optimizer.learning_rate = rate
    copy.probe.weighting_values = tuple(config.study.tune.weighting_values)
    copy.study.binarizers = ()
    if copy.probe.features is None:
      copy.probe.features = str(folder / "features")
    grid = probe.run_grid(copy.lock(), folder / f"rate{rate:g}")
    found: dict[Any, list[Any]] = {}
    for row in grid["rows"]:
      if row["method"] != probe.REFERENCE:
        found.setdefault((row["method"], row["value"]), []).append(row)
    rows += [
      {
        "method": method,
        "optimizer.learning_rate": rate,
        **(
          {f"mimic.{heads.value_field(method, config.mimic)}": value}
          if value is not None
          else {}
        ),
        **_means(members, ("test_accuracy", "test_loss")),
      }
      for (method, value), members in found.items()
    ]
  return rows


def _means(entries, fields):
  return {
    field: float(np.mean([entry[field] for entry in entries]))
    for field in fields
  }


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, tunes, and prints the best and where they are."""
  for name, entry in tune(config, workdir, note=terminal.note).items():
    shown = ", ".join(f"{key}={value}" for key, value in entry["set"].items())
    print(
      f"{name:<26} {entry['accuracy']:.4f}  {shown}"
      f"  (best of {entry['settings']})"
    )
  for name in (TUNED_FILE, TABLE_FILE):
    print(f"  {pathlib.Path(workdir) / name}")
