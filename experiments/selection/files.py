"""From a ledger to a selection, filter files and a manifest."""

import pathlib
from collections.abc import Callable
from typing import Any

import gradmimic_jax as gm
from configs import select as select_config
from experiments.data import filters, sources
from experiments.runtime import workdir as workdir_lib
from experiments.tasks.classification import data as data_lib
from experiments.training import scoring as score, trainer as train

SELECTION_FILE = "selection.parquet"
KEPT_FILE = "kept.npy"
CSV_FILE = "selection.csv"
MANIFEST_FILE = filters.MANIFEST_FILE


def select_run(config: Any, workdir: Any) -> dict[str, Any]:
  """Selects from a run's ledger.

  Args:
    config: as `configs/select.py` describes it.
    workdir: gets the selection as `selection.parquet` and `selection.csv`, the
      ids to keep as `kept.npy`, and `manifest.json`. Each of the first three
      can be `config.data.filter` of a run.

  Returns:
    What is in `manifest.json`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: there is no ledger in the run's folder, or its data set
      is not there.
  """
  workdir_lib.check(workdir, config, select_config, free=("run",))
  run = pathlib.Path(config.run)
  selection = from_ledger(config.select, ledger_of(run))
  folder = workdir_lib.claim(workdir, config, select_config, free=("run",))
  return write(folder, selection, fingerprints_of(run))


def ledger_of(run: pathlib.Path) -> gm.ScoreLedger:
  """The ledger in a run's folder; FileNotFoundError if there is none."""
  if not (run / train.LEDGER_FOLDER).is_dir():
    raise FileNotFoundError(
      f"config.run is {str(run)!r}, and there is no {train.LEDGER_FOLDER} in"
      " it; expected the workdir of experiments.score, or of a run of a method"
      " with scores."
    )
  return gm.ScoreLedger(run / train.LEDGER_FOLDER)


def config_of(run: pathlib.Path) -> Any:
  """The config of the data in a run's folder, whichever job it is of."""
  for name in (score.RUN_FILE, workdir_lib.CONFIG_FILE):
    if (run / name).exists():
      section = workdir_lib.read_json(run / name, {})
      if name == score.RUN_FILE:
        score.check_run(run, section)
      return score.complete(section, run / name)
  raise FileNotFoundError(f"{run} is no run's folder: it has no config.json.")


def fingerprints_of(run: pathlib.Path) -> dict[str, str]:
  """What a filter of a run's ledger belongs to.

  Args:
    run: its folder.

  Returns:
    The ledger's own fingerprints, and those of data set and labels.

  Raises:
    ValueError: the files in the folder are damaged, or not of one run.
    FileNotFoundError: one of them, or the data set, is not there.
  """
  own = ledger_of(run).fingerprints
  config = config_of(run)
  free = score.FREE if (run / score.RUN_FILE).exists() else train.FREE
  workdir_lib.check_config(run, free, own)
  for name, theirs in workdir_lib.of_result(run).items():
    if own.get(name, theirs) != theirs:
      raise ValueError(
        f"{run / workdir_lib.RESULT_FILE} is of another run: its fingerprint"
        f" {name!r} is {theirs!r}, and the ledger's beside it {own[name]!r}."
        " Restore the one that doesn't belong there."
      )
  if not (run / data_lib.LABELS_FILE).exists():
    return own
  labels = filters.own_labels(run / data_lib.LABELS_FILE, own)
  train_set = sources.of_config(config.data, config.data.train_split)
  found = filters.fingerprints(config, train_set, labels)
  for name, value in found.items():
    if own.get(name, value) != value:
      raise ValueError(
        f"{run / workdir_lib.CONFIG_FILE} is of another run, or the data set"
        f" has changed: its {name} is {value!r}, the ledger's {own[name]!r}."
      )
  return {**own, **found}


def from_ledger(section: Any, ledger: gm.ScoreLedger) -> gm.Selection:
  """The selection that `config.select` asks for.

  Args:
    section: `binarize`, `aggregate`, `threshold` and `fraction`.
    ledger: to select from.

  Returns:
    The Selection.

  Raises:
    ValueError: what `gm.select` raises.
  """
  options = {}
  if section.binarize == "threshold":
    options["threshold"] = section.threshold
  if section.binarize == "top_fraction":
    options["fraction"] = section.fraction
  return gm.select(
    ledger, binarize=section.binarize, aggregate=section.aggregate, **options
  )


def write(
  folder: pathlib.Path,
  selection: gm.Selection,
  fingerprints: dict[str, str],
  write_filter: Callable[..., Any] = gm.export.write_npy,
) -> dict[str, Any]:
  """Writes a selection in all formats, and what it is.

  Args:
    folder: to write to.
    selection: what `gm.select` gave.
    fingerprints: what it belongs to.
    write_filter: `(path, ids, fingerprints=...)`, writes the ids to keep.

  Returns:
    What is in `manifest.json`.
  """
  write_filter(
    folder / KEPT_FILE, selection.kept_ids, fingerprints=fingerprints
  )
  gm.export.write_parquet(
    folder / SELECTION_FILE, selection, fingerprints=fingerprints
  )
  gm.export.write_csv(folder / CSV_FILE, selection, fingerprints=fingerprints)
  quality = gm.dataset_quality(selection)
  manifest = {
    "samples": len(selection),
    "kept": int(selection.keep.sum()),
    "quality": {key: _number(v) for key, v in quality._asdict().items()},
    "remove": str(gm.removal_curve(selection)),
    "select": selection.diagnostics["binarize"],
    "aggregate": selection.diagnostics["aggregate"],
    "fingerprints": fingerprints,
    "sha256": {
      name: filters.file_sha256(folder / name)
      for name in (KEPT_FILE, SELECTION_FILE, CSV_FILE)
    },
  }
  workdir_lib.write_json(folder / MANIFEST_FILE, manifest)
  return manifest


def _number(value):
  return None if value != value else value  # JSON has no nan


def main(config: Any, workdir: str) -> None:
  """Selects, then prints what came of it and where it is."""
  manifest = select_run(config, workdir)
  print(f"keeps {manifest['kept']:,} of {manifest['samples']:,} samples;")
  print(manifest["remove"])
  for name in (*manifest["sha256"], MANIFEST_FILE):
    print(f"  {pathlib.Path(workdir) / name}")
