"""`gradmimic curate`: from a table or a ledger to a page and two lists."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from gradmimic_jax import _files, _ledger_files, _tables, _version
from gradmimic_jax.command import (
  images as images_lib,
  labels as labels_lib,
  tables,
)
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import _columns, _csv, export, uids
from gradmimic_jax.selection.quality import (
  dataset_quality,
  removal_curve,
  worst_first,
)
from gradmimic_jax.selection.selection import Selection, select

FORMAT = "gradmimic_jax.curation"
MANIFEST = "manifest.json"
PAGE, REMOVE, KEEP, SELECTION = (
  "report.html",
  "remove.csv",
  "keep.csv",
  "selection.parquet",
)


class _Input(NamedTuple):
  """The scores, and what else is known of the samples."""

  scores: Any  # [N, T], or the ledger
  ids: np.ndarray  # [N]
  id_name: str
  identity: dict[str, Any]  # what tells this input from another one
  columns: list[str]
  dataset: dict[str, Any]
  names: dict[str, Any]  # the user's own, of the columns
  notes: list[str]


def run(arguments: argparse.Namespace) -> int:
  """Curates; prints the answer in three lines, and notes to standard error."""
  path, out = Path(arguments.scores), Path(arguments.out)
  _check_page()
  given = (
    _read_ledger(path, arguments)
    if path.is_dir()
    else _read_table(path, arguments)
  )
  _claim(out, given.identity)
  for note in given.notes:
    print(f"note: {note}", file=sys.stderr)

  options: dict[str, Any] = {}
  if arguments.mark is not None:
    options["mark"] = arguments.mark
  if isinstance(given.scores, ScoreLedger):
    selection = select(given.scores, **options)
  else:
    selection = select(given.scores, ids=given.ids, **options)
    selection.diagnostics["columns"] = given.columns
  export.write_parquet(out / SELECTION, selection)
  _write_lists(out, selection, given)
  from gradmimic_jax.reporting import report

  page = report(
    given.scores,
    selection,
    out / PAGE,
    dataset=given.dataset or None,
    columns=given.names,
    title=arguments.title or path.stem or "Data report",
    run={"scores": path.name, "date": datetime.date.today()},
  )
  _write_manifest(out, given, selection)
  n_removed = int((~selection.keep).sum())
  print(dataset_quality(selection))
  print(
    f"remove {n_removed:,}: {out / REMOVE}; keep"
    f" {len(selection) - n_removed:,}: {out / KEEP}"
  )
  print(f"look at {page}")
  return 0


def _check_page() -> None:
  try:
    import jinja2  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "the page needs jinja2: pip install 'gradmimic_jax[report]'"
    ) from error


def _read_ledger(path: Path, arguments: argparse.Namespace) -> _Input:
  if not _ledger_files.is_ledger(path):
    inside = sorted(x for x in path.iterdir() if x.suffix in tables.SUFFIXES)
    raise ValueError(
      f"{path} is a folder, and no ledger's; expected the folder that a"
      " gm.ScoreLedger was written to (of a run: RUN/ledger), or a table."
      + (f" Give a file in it, such as {inside[0]}" if inside else "")
    )
  for flag in ("id", "columns", "long", "suggested", "captions"):
    if getattr(arguments, flag) is not None:
      name = "scores" if flag == "columns" else flag
      raise ValueError(
        f"--{name} names a column of a table, and {path} is a ledger, which"
        " brings its own ids, steps and scores; leave it out."
      )
  ledger = ScoreLedger(path)
  ids, _ = ledger.matrix("score")
  dataset: dict[str, Any] = {}
  if arguments.labels is not None:
    dataset["labels"] = labels_lib.read_labels(arguments.labels, ids, None)
  notes: list[str] = []
  if arguments.images is not None:
    images_lib.check_pillow()
    folder = Path(arguments.images)
    if not folder.is_dir():
      raise ValueError(
        f"--images is {arguments.images!r}, and there is no such folder."
      )
    found, how = images_lib.in_folder(folder, ids, [], lambda name: ids)
    dataset["images"] = found
    notes.append(_about_images(found, how))
  if dataset:
    dataset["ids"] = ids
  digest = hashlib.sha256()
  for name in sorted(one.name for one in _ledger_files.find_rows(path)):
    digest.update(name.encode())  # which ends with the checksum of its bytes
  identity = {"scores": path.name, "sha256": digest.hexdigest()}
  return _Input(ledger, ids, "id", identity, [], dataset, {}, notes)


def _read_table(path: Path, arguments: argparse.Namespace) -> _Input:
  if not path.exists():
    raise ValueError(
      f"{path}: there is no such file; expected a table of scores"
      f" ({', '.join(tables.SUFFIXES)}) or a ledger's folder."
    )
  file = tables.File(path)
  flags = ("labels", "suggested", "captions", "images")
  given = {
    flag: getattr(arguments, flag)
    for flag in flags
    if getattr(arguments, flag) is not None
  }
  for flag in ("suggested", "captions"):
    if flag in given:
      file.check(given[flag], f"--{flag}")
  named = {f: v for f, v in given.items() if v in file.names}
  if arguments.long is not None:
    if arguments.columns is not None or arguments.id is not None:
      raise ValueError(
        "--long names the columns of ids, steps and scores; leave --id and"
        " --scores out."
      )
    table = tables.read_long(file, arguments.long)
  else:
    table = tables.read_wide(
      file,
      id_name=arguments.id,
      scores=arguments.columns,
      others=list(named.values()),
    )
  ids, notes = table.ids, list(table.notes)

  def in_rows(values: np.ndarray) -> np.ndarray:
    return values if table.rows is None else values[table.rows]

  dataset: dict[str, Any] = {}
  if "labels" in named:
    dataset["labels"] = in_rows(file.labels(named["labels"]))
  elif "labels" in given:
    dataset["labels"] = labels_lib.read_labels(given["labels"], ids, file)
  if "suggested" in given:
    dataset["suggested"] = in_rows(file.labels(given["suggested"]))
  _same_kind(dataset)
  if "captions" in given:
    dataset["captions"] = in_rows(file.texts(given["captions"])).tolist()
  if "images" in given:
    images_lib.check_pillow()
    if "images" in named:
      values = in_rows(file.texts(given["images"]))
      found = images_lib.in_column(values, given["images"], path.parent)
      how = f"by column {given['images']!r}"
    elif Path(given["images"]).is_dir():
      texts = [
        n
        for n in file.names
        if n not in (*table.steps, table.id_name, *named.values())
      ]
      found, how = images_lib.in_folder(
        Path(given["images"]), ids, texts, lambda n: in_rows(file.texts(n))
      )
      notes = [n for n in notes if not n.startswith("left out, as text")]
    else:
      raise ValueError(
        f"--images is {given['images']!r}, neither a folder nor a column of"
        f" {path}, which has {tables.shown(file.names)}."
      )
    dataset["images"] = found
    notes.append(_about_images(found, how))
  if dataset:
    dataset["ids"] = ids
  names: dict[str, Any] = {f: v for f, v in named.items() if f != "images"}
  names["scores"] = table.steps
  if table.id_name and table.id_name.strip():
    names["ids"] = table.id_name
  identity = {
    "scores": path.name,
    "sha256": file.sha256(),
    "columns": table.steps,
    "ids": table.id_name,
  }
  return _Input(
    table.scores,
    ids,
    table.id_name or "id",
    identity,
    table.steps,
    dataset,
    names,
    notes,
  )


def _same_kind(dataset: dict[str, Any]) -> None:
  """Makes suggested labels strings where the given ones are."""
  both = [key for key in ("labels", "suggested") if key in dataset]
  if len({dataset[key].dtype.kind == "U" for key in both}) > 1:
    for key in both:
      dataset[key] = dataset[key].astype(np.str_)


def _about_images(images: images_lib.Images, how: str) -> str:
  found = sum(path is not None for path in images.paths)
  return f"images of {found:,} of {len(images):,} samples, found {how}"


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
  """Makes the folder, unless what another input gave is in it."""
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out is {out}, which is a file; expected a folder.")
  manifest = out / MANIFEST
  if manifest.exists():
    about = _files.read_json(manifest, remedy="Give another --out.")
    theirs = about.get("input")
    if about.get("format") != FORMAT or theirs != dict(identity):
      whose = "another job's"
      if isinstance(theirs, dict):
        whose = f"the answer for {theirs.get('scores')!s:.80}"
        if theirs.get("scores") == identity["scores"]:
          whose += ", with other content or columns"
      raise ValueError(
        f"--out is {out}, where {whose} lies already. Give another folder, or"
        " remove that one."
      )
  else:
    for name in (PAGE, REMOVE, KEEP, SELECTION):
      if (out / name).exists():
        raise ValueError(
          f"--out is {out}, where a {name} lies that isn't this command's. Give"
          " another folder."
        )
  try:
    out.mkdir(parents=True, exist_ok=True)
    probe = out / ".gradmimic"
    probe.touch(exist_ok=True)
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f"--out is {out}, where nothing can be written ({error.strerror}). Give"
      " another folder."
    ) from error


def _write_lists(out: Path, selection: Selection, given: _Input) -> None:
  """Writes what to remove, the worst first, and what to keep, in order."""
  kept = np.flatnonzero(selection.keep)
  worst = worst_first(selection)
  lists = {KEEP: kept, REMOVE: worst[~selection.keep[worst]]}
  for file, rows in lists.items():
    id_name = given.id_name
    if id_name in ("keep_probability", "quality", "suggested", "image"):
      id_name = "id"  # the others are this command's own
    columns = {
      id_name: uids.to_arrow(selection.ids[rows], "ids"),
      "keep_probability": _rounded(selection.keep_probability[rows]),
      "quality": _rounded(selection.quality[rows]),  # type: ignore
    }
    labels = given.dataset.get("labels")
    if labels is not None:
      name = given.names.get("labels", "label")
      columns.setdefault(name, pa.array(labels[rows].tolist()))
    suggested = given.dataset.get("suggested")
    if suggested is not None:
      columns.setdefault("suggested", pa.array(suggested[rows].tolist()))
    images = given.dataset.get("images")
    if images is not None:
      paths = [images.paths[row] for row in rows]
      texts = [None if path is None else os.fspath(path) for path in paths]
      columns.setdefault("image", pa.array(texts, pa.string()))
    _files.write_bytes(out / file, _csv_bytes(pa.table(columns)))


def _rounded(values: np.ndarray) -> pa.Array:
  return _tables.numbers(np.round(values, 6))


def _csv_bytes(table: pa.Table) -> memoryview:
  """Formats a table as CSV; no spreadsheet runs what is in it."""
  for place, name in enumerate(table.column_names):
    column = _columns.whole(table[name])
    if _columns.is_text(column):
      table = table.set_column(place, name, _csv.harmless_column(column))
  names = []
  for name in table.column_names:
    text = _csv.harmless(name)
    plain = text.replace("_", "").replace(" ", "").isalnum()
    names.append(text if plain else '"' + text.replace('"', '""') + '"')
  sink = io.BytesIO()
  sink.write(",".join(names).encode() + b"\n")
  pa_csv.write_csv(table, sink, pa_csv.WriteOptions(include_header=False))
  return sink.getbuffer()


def _write_manifest(out: Path, given: _Input, selection: Selection) -> None:
  curve = removal_curve(selection)
  manifest = {
    "format": FORMAT,
    "version": 1,
    "gradmimic_jax": _version.__version__,
    "input": given.identity,
    "samples": len(selection),
    "removed": int((~selection.keep).sum()),
    "quality": {
      name: None if value != value else value  # JSON has no nan
      for name, value in dataset_quality(selection)._asdict().items()
    },
    "surely_mislabelled": curve.uncertain[0],
    "fingerprints": selection.diagnostics["fingerprints"],
    "sha256": {
      name: _sha256(out / name) for name in (PAGE, REMOVE, KEEP, SELECTION)
    },
  }
  text = json.dumps(manifest, indent=2) + "\n"
  _files.write_bytes(out / MANIFEST, text.encode())


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
