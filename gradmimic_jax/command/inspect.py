"""`gradmimic inspect`: what a file holds, and whether it is whole."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradmimic_jax import _files, _ledger_files
from gradmimic_jax.command import curate, tables
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import _checksums, _columns, _csv, _ids, export
from gradmimic_jax.selection.decisions import read_decisions
from gradmimic_jax.selection.selection import Selection
from gradmimic_jax.selection.uids import format_uids

_WHOLE = "whole: its checksum is right"
_UNKNOWN = "no checksum: whether it is whole can't be told"


def run(arguments: argparse.Namespace) -> int:
  """Prints what is found; 1 if something is damaged."""
  path = Path(arguments.path)
  if not path.exists():
    raise ValueError(f"{path}: there is no such file or folder.")
  look = _look(path)
  try:
    for line in look:
      print(line)
  except (ValueError, OSError) as error:
    print(f"  damaged: {' '.join(str(error).split())}")
    return 1
  return 0


def _look(path: Path) -> Iterator[str]:
  if path.is_dir():
    if _ledger_files.is_ledger(path):
      return _ledger(path)
    if (path / curate.MANIFEST).exists():
      return _json_file(path / curate.MANIFEST)
    raise ValueError(
      f"{path} is a folder, and neither a ledger's nor one with a"
      f" {curate.MANIFEST}. Give a file in it."
    )
  kinds = {
    ".npy": _array,
    ".parquet": _parquet,
    ".csv": _csv_file,
    ".json": _json_file,
  }
  if path.suffix not in kinds:
    raise ValueError(
      f"{path} is none of {', '.join(kinds)}, nor the folder of a ledger."
    )
  return kinds[path.suffix](path)


def _ledger(path: Path) -> Iterator[str]:
  yield f"{path}: a ledger of scores"
  ledger = ScoreLedger(path)
  yield from _fingerprints(ledger.fingerprints)
  files = _ledger_files.find_rows(path)
  if not files:
    yield "  no rows yet"
    return
  table = ledger.table()  # reads every file, and compares its checksum
  steps = pc.min_max(table["step"]).as_py()
  epochs = ledger.epochs
  n_samples = pc.count_distinct(table["id"]).as_py()
  yield (
    f"  {len(table):,} rows: {n_samples:,} samples with {ledger.id_kind} ids,"
    f" {len(epochs):,} epochs ({epochs[0]} to {epochs[-1]}), steps"
    f" {steps['min']:,} to {steps['max']:,}"
  )
  scores = table["score"]
  n_bad = len(scores) - pc.sum(pc.is_finite(scores)).as_py()
  ends = pc.min_max(scores).as_py()
  yield (
    f"  scores {ends['min']:.4g} to {ends['max']:.4g}"
    + f", {n_bad:,} not finite" * (n_bad > 0)
  )
  of = "file" if len(files) == 1 else "files"
  yield f"  whole: the checksum of each of {len(files):,} {of} is right"


def _array(path: Path) -> Iterator[str]:
  opened = _checksums.read(path)
  content = opened.content
  if content[:6] != _files.NPY_MAGIC:
    pairs = export.read_datacomp_subset(path, multiplicity=True)
    yield from _subset(path, pairs, "without a header")
  else:
    array = _files.parse_npy(content, path)
    if array.dtype == _ids.UID:
      pairs = export.read_datacomp_subset(path, multiplicity=True)
      yield from _subset(path, pairs, "")
    elif array.dtype == bool and array.ndim == 1:
      yield (
        f"{path}: a mask of {len(array):,} samples, {int(array.sum()):,} of"
        " them True"
      )
    else:
      ids = export.read_npy(path)
      kind = "strings" if ids.dtype.kind == "U" else "integers"
      yield f"{path}: a filter of {len(ids):,} ids, {kind}{_ends(ids)}"
      if len(ids) < len(array):
        yield f"  {len(array) - len(ids):,} of {len(array):,} values repeat"
  yield from _fingerprints(opened.fingerprints)
  yield f"  {_WHOLE if opened.version > 1 else _UNKNOWN}"


def _subset(path: Path, pairs: np.ndarray, how: str) -> Iterator[str]:
  n = len(_ids.unique(pairs))
  yield f"{path}: a DataComp subset of {n:,} uids {how}".rstrip()
  if len(pairs):
    first, last = format_uids(pairs[[0, -1]]).to_pylist()
    yield f"  sorted, {first} to {last}"
  if n < len(pairs):
    yield f"  {len(pairs):,} entries: some uids come more than once"


def _parquet(path: Path) -> Iterator[str]:
  content = _files.read_bytes(path)
  with _files.named(path, "Parquet file"):
    schema = pq.read_schema(pa.BufferReader(content))
    rows = pq.read_metadata(pa.BufferReader(content)).num_rows
  metadata = schema.metadata or {}
  if _ledger_files.FORMAT.encode() in metadata:
    yield f"{path}: {rows:,} rows of a ledger; inspect its folder"
    return
  if {*_columns.NAMES, "votes"} <= set(schema.names):
    selection = export.read_parquet(path)
    yield from _selection(path, selection)
    about = json.loads(metadata.get(b"gradmimic_selection", b"{}"))
    yield from _fingerprints(about.get("fingerprints", {}))
    sealed = _checksums.check_parquet(content, path)
    yield f"  {_WHOLE if sealed else _UNKNOWN}"
    return
  yield (
    f"{path}: a table of {rows:,} rows with the columns"
    f" {tables.shown(schema.names)}"
  )
  yield f"  {_UNKNOWN}"


def _csv_file(path: Path) -> Iterator[str]:
  content = _files.read_bytes(path)
  with _files.named(path, "table"):
    names, _ = _csv.first_records(content)
  opened = _checksums.read(path)
  if names[: len(_columns.NAMES)] == list(_columns.NAMES):
    yield from _selection(path, export.read_csv(path))
  elif names[:2] == ["id", "decision"]:
    yield f"{path}: {read_decisions(path)!r}"[:-1].replace("<", "", 1)
  elif names == ["id"]:
    found = export.read_filter(path)
    yield f"{path}: a filter of {len(found):,} ids{_ends(found.ids)}"
  else:
    lines = bytes(content).count(b"\n") - content.endswith(b"\n")
    yield (
      f"{path}: a table of some {lines:,} rows with the columns"
      f" {tables.shown(names)}"
    )
  yield from _fingerprints(opened.fingerprints)
  manifest = path.with_name(curate.MANIFEST)
  if opened.version > 1:
    yield f"  {_WHOLE}"
  elif path.name in _sums(manifest):
    _compare(path, _sums(manifest)[path.name])
    yield f"  whole: its checksum is that in {manifest}"
  else:
    yield f"  {_UNKNOWN}"


def _selection(path: Path, selection: Selection) -> Iterator[str]:
  kind = "strings" if selection.ids.dtype.kind == "U" else "integers"
  yield f"{path}: a selection, ids {kind}{_ends(selection.ids)}"
  for line in str(selection).splitlines():
    yield f"  {line}"


def _json_file(path: Path) -> Iterator[str]:
  about = _files.read_json(path)
  base = path.with_suffix("")
  if about.get("format") == _checksums.FORMAT or about.keys() == {
    "fingerprints"
  }:
    yield f"{path}: the manifest of {base}"
    if not base.exists():
      raise ValueError(f"{base} is not there.")
    yield from list(_look(base))[1:]
    return
  if about.get("format") == _ledger_files.FORMAT:
    yield f"{path}: the manifest of a ledger; inspect its folder"
    return
  sums = _sums(path)
  if about.get("format") == curate.FORMAT:
    scores = about.get("input", {}).get("scores")
    yield (
      f"{path}: `gradmimic curate` of {scores!s:.200}:"
      f" {about.get('samples', 0):,} samples, {about.get('removed', 0):,} to"
      " remove"
    )
  elif sums:
    yield f"{path}: the manifest of {len(sums):,} files"
  elif {"title", "galleries"} <= about.keys():
    yield f"{path}: the numbers of the page {base.with_suffix('.html')}"
    yield f"  {_UNKNOWN}"
    return
  else:
    yield f"{path}: JSON with {tables.shown(list(about))}"
    yield f"  {_UNKNOWN}"
    return
  prints = about.get("fingerprints")
  yield from _fingerprints(prints if isinstance(prints, dict) else {})
  wrong = []
  for name, stated in sums.items():
    try:
      _compare(path.with_name(os.path.basename(name)), stated)
      yield f"  {name}: whole"
    except (ValueError, OSError) as error:
      wrong.append(f"{name}: {error}")
  if wrong:
    raise ValueError("; ".join(wrong))


def _sums(manifest: Path) -> dict[str, str]:
  """The SHA-256 that a manifest states, by file."""
  if not manifest.is_file():
    return {}
  sums = _files.read_json(manifest).get("sha256")
  return sums if isinstance(sums, dict) else {}


def _compare(path: Path, stated: Any) -> None:
  if not path.is_file():
    raise ValueError("it is not there")
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != stated:
    raise ValueError(
      f"changed since it was written: its SHA-256 begins with {found[:12]},"
      f" expected {str(stated)[:12]!r}"
    )


def _ends(ids: np.ndarray) -> str:
  if not len(ids):
    return ""
  first, last = ids[:1].tolist()[0], ids[-1:].tolist()[0]
  return f", {first!r:.40} to {last!r:.40}"


def _fingerprints(prints: Mapping[str, Any]) -> Iterator[str]:
  for name, value in prints.items():
    yield f"  {name!s:.40}: {value!s:.200}"
