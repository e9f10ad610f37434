"""From a ledger to a selection or to filters, as files with a manifest."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

import gradmimic_jax as gm
from configs import select as select_config
from experiments.data import filters as filters_lib
from experiments.runtime import terminal, workdir as workdir_lib
from experiments.selection import cuts, runs

SELECTION_FILE = "selection.parquet"
KEPT_FILE = "kept.npy"
CSV_FILE = "selection.csv"
MANIFEST_FILE = filters_lib.MANIFEST_FILE
_JOB = "selection"


def select_run(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Selects from a run's ledger, whatever it has learned.

  Args:
    config: as `configs/select.py` describes it.
    workdir: gets `manifest.json`, and where `config.filters` is empty the
      selection as `selection.parquet` and `selection.csv` and the ids to keep
      as `kept.npy`; otherwise a file of ids for each filter, and how they
      overlap as `overlap.csv`. Ids that are uids are kept as a DataComp subset
      file. Each file but the last can be `config.data.filter` of a run.

  Returns:
    What is in `manifest.json`.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, a filter
      that doesn't read, or one of scores that are not there.
    FileNotFoundError: there is no ledger in the run's folder, or its data set
      or metadata are not there.
  """
  workdir_lib.check(workdir, config, select_config, job=_JOB)
  run = pathlib.Path(config.run)
  if config.metadata is not None and not config.filters:
    raise ValueError(
      f"config.metadata is {config.metadata!r}, and config.filters, which would"
      " look at it, is empty. Name filters, such as"
      " --config.filters=\"('mimic_top30 & basic',)\", or leave it out."
    )
  ledger = runs.load_ledger(run)
  if config.filters:
    pool = cuts.pool_of(run, config.metadata, config.clip_column)
    made = cuts.make(config.filters, pool, seed=config.seed)
  else:
    selection = select(config.select, ledger)
  prints = runs.load_fingerprints(run)
  folder = workdir_lib.claim(workdir, config, select_config, job=_JOB)
  if config.filters:
    return cuts.write(folder, made, pool, prints)
  return write(folder, selection, prints)


def select(
  section: Mapping[str, Any], scores: Any, binarize: str | None = None
) -> gm.Selection:
  """Selects from scores `[N, T]` or a ledger as `config.select` asks for.

  `binarize` stands in place of the section's.

  Raises:
    ValueError: what `gm.select` raises.
  """
  name = binarize or section["binarize"]
  options = {
    "threshold": {"threshold": section["threshold"]},
    "top_fraction": {"fraction": section["fraction"]},
    # Of every method's score: no step either way. A ledger's is known.
    "auto": {} if isinstance(scores, gm.ScoreLedger) else {"mark": 0.0},
  }.get(name, {})
  aggregate = section["aggregate"]
  return gm.select(scores, binarize=name, aggregate=aggregate, **options)


def write(
  folder: pathlib.Path, selection: gm.Selection, fingerprints: dict[str, str]
) -> dict[str, Any]:
  """Writes a selection in all formats; returns its `manifest.json`."""
  gm.export.write_filter(
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
      name: filters_lib.file_sha256(folder / name)
      for name in (KEPT_FILE, SELECTION_FILE, CSV_FILE)
    },
  }
  workdir_lib.write_json(folder / MANIFEST_FILE, manifest)
  return manifest


def _number(value):
  return None if value != value else value  # JSON has no nan


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, selects, and prints what came of it, and where."""
  workdir_lib.check_fields(config, select_config)
  made = f"{len(config.filters)} filters" if config.filters else "a selection"
  terminal.note(
    terminal.outline(
      f"select: {made}",
      {
        "scores": runs.describe(pathlib.Path(config.run)),
        "metadata": config.metadata,
        "by": None if config.filters else config.select.binarize,
        "look at": workdir,
      },
    )
  )
  manifest = select_run(config, workdir)
  if config.filters:
    print(
      f"{manifest['pool']:,} samples in the pool, {manifest['scored']:,} of"
      " them with mimic scores"
    )
    for name, about in manifest["filters"].items():
      path = pathlib.Path(workdir) / about["file"]
      print(f"  {name:<30} keeps {about['kept']:>12,}  {path}")
    print(f"  {pathlib.Path(workdir) / cuts.OVERLAP_FILE}")
    return
  print(f"keeps {manifest['kept']:,} of {manifest['samples']:,} samples;")
  print(manifest["remove"])
  for name in (*manifest["sha256"], MANIFEST_FILE):
    print(f"  {pathlib.Path(workdir) / name}")
