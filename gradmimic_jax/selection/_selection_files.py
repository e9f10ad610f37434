"""Selections as Parquet and CSV files, a row a sample."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from gradmimic_jax import _files
from gradmimic_jax.selection import (
  _checksums,
  _columns,
  _csv,
  _ids,
  filters,
)
from gradmimic_jax.selection.selection import Selection

_METADATA = b"gradmimic_selection"
_VERSION = 2  # of a Parquet file; 1 had no checksum
_MAX_ROWS = 100  # that a byte of Parquet may claim; the tightest have some 40
ROWS = 1 << 20  # of a Parquet row group, and of what is converted at a time


def write_parquet(
  path: str | os.PathLike[str],
  selection: Selection,
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Path:
  """Writes a selection as a Parquet file, a row a sample.

  Columns: id, keep (boolean), keep_probability and quality (doubles, null where
  undefined), votes (T of int8: 1 keep, 0 drop, -1 abstain). The diagnostics and
  fingerprints are in the file's metadata.

  Args:
    path: the file's path.
    selection: as `select` gave it.
    fingerprints: what it belongs to; those of its ledger if not given.

  Returns:
    The path.

  Example:
    >>> import tempfile
    >>> from gradmimic_jax.selection import select
    >>> selection = select([[1.0], [-1.0]], binarize="threshold")
    >>> path = write_parquet(tempfile.mkdtemp() + "/s.parquet", selection)
    >>> read_parquet(path).keep
    array([ True, False])
  """
  path = checked_path(path, ".parquet")
  about = {
    "version": _VERSION,
    "diagnostics": selection.diagnostics,
    "fingerprints": _choose_fingerprints(selection, fingerprints),
    _checksums.IN_FILE: _checksums.ZEROS,  # the last: what is looked for
  }
  metadata = {_METADATA: json.dumps(about, allow_nan=False).encode()}
  path.parent.mkdir(parents=True, exist_ok=True)
  with _files.replacing(path) as file:
    schema = to_table(selection, 0, 0).schema.with_metadata(metadata)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
      for table in _tables(selection):
        writer.write_table(table.cast(schema))
    _checksums.seal_parquet(file)
  return path


def read_parquet(
  path: str | os.PathLike[str],
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Selection:
  """Reads a selection that `write_parquet` wrote.

  A table with the same columns that another tool wrote is a selection, too,
  without diagnostics; its `keep` may be 0 and 1.

  Args:
    path: the file's path.
    fingerprints: what it should belong to.

  Returns:
    The Selection.

  Raises:
    ValueError: a file of another kind, one that was changed after it was
      written, or of other inputs.
  """
  path = Path(path)
  content = _files.read_bytes(path)
  sealed = _checksums.check_parquet(content, path)
  with _files.named(path, "Parquet file of a selection"):
    file = pq.ParquetFile(pa.BufferReader(content))
    names, metadata = file.schema_arrow.names, file.schema_arrow.metadata or {}
    wanted = [*_columns.NAMES, "votes"]
    if set(wanted) - set(names):
      raise ValueError(
        f"{path} is a Parquet file, but no selection: its columns are {names};"
        f" expected {wanted}. Give a file that write_parquet wrote."
      )
    _check_rows(file.metadata, len(content))
    about = _about(metadata.get(_METADATA), path, sealed)
    _check_fingerprints(path, about["fingerprints"], fingerprints)
    table = file.read(columns=wanted)
    columns = {name: table[name] for name in _columns.NAMES}
    votes = _columns.parse_vote_lists(table["votes"])
    return _columns.selection(columns, votes, about["diagnostics"])


def _check_rows(footer: pq.FileMetaData, size: int) -> None:
  """Refuses rows that aren't there: memory for all of them is taken at once."""
  groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
  if not all(0 <= rows <= size * _MAX_ROWS for rows in (*groups, sum(groups))):
    raise ValueError(f"it claims {sum(groups):,} rows in {size:,} bytes")
  if sum(groups) != footer.num_rows:
    raise ValueError(f"it has {sum(groups):,} of {footer.num_rows:,} rows")


def _about(text: bytes | None, path: Path, sealed: bool) -> dict[str, Any]:
  """Parses the metadata in a Parquet file."""
  if text is None:
    return {"fingerprints": {}, "diagnostics": {}}
  about = _files.parse_json(text, path)
  if about.get("version") not in (1, _VERSION):
    raise ValueError(
      f"{path} is of version {about.get('version')!r}; this gradmimic_jax reads"
      f" 1 and {_VERSION}. Read it with the release that wrote it."
    )
  # A tool that keeps metadata takes them from where the checksum isn't yet.
  blank = about.get(_checksums.IN_FILE) == _checksums.ZEROS
  if about["version"] == _VERSION and not (sealed or blank):
    raise ValueError("its checksum is gone")
  for name in ("fingerprints", "diagnostics"):
    if not isinstance(about.get(name), dict):
      raise ValueError(f"it has no {name}")
  return about


def write_csv(
  path: str | os.PathLike[str],
  selection: Selection,
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Path:
  r"""Writes a selection as CSV, a row a sample.

  Columns: id, keep (true or false), keep_probability, quality (empty where
  undefined), vote_0 ... vote_{T-1} (1 keep, 0 drop, -1 abstain). Ids that are
  text are quoted, integers are not. An id that a spreadsheet would take for a
  formula, for it begins with one of = + - @, gets an apostrophe in front, as
  does one that begins with an apostrophe; `read_csv` takes it off again.

  Args:
    path: the file's path.
    selection: as `select` gave it.
    fingerprints: what it belongs to; those of its ledger if not given. Written
      to `<path>.json`, with the checksum.

  Returns:
    The path.

  Example:
    >>> import tempfile
    >>> from gradmimic_jax.selection import select
    >>> found = select([[1.0], [-1.0]], ids=["007", "=1"], binarize="threshold")
    >>> path = write_csv(tempfile.mkdtemp() + "/s.csv", found)
    >>> [line.split(",")[0] for line in path.read_text().splitlines()]
    ['id', '"007"', '"\'=1"']
    >>> read_csv(path).ids.tolist()
    ['007', '=1']
  """
  path = checked_path(path, ".csv")

  def write(file: io.BufferedRandom) -> None:
    schema = to_flat_table(to_table(selection, 0, 0)).schema
    # Names have no quotes here, and had in earlier releases, which left
    # formulas as they are.
    file.write(",".join(schema.names).encode() + b"\n")
    options = pa_csv.WriteOptions(include_header=False)
    with pa_csv.CSVWriter(file, schema, write_options=options) as writer:
      for table in _tables(selection):
        writer.write_table(to_flat_table(table))

  _checksums.write(path, write, _choose_fingerprints(selection, fingerprints))
  return path


def read_csv(
  path: str | os.PathLike[str],
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Selection:
  """Reads a selection that `write_csv` wrote; there are no diagnostics.

  | edge case                              | behaviour                       |
  |----------------------------------------|---------------------------------|
  | ids in quotes                          | text, whatever they look like   |
  | ids without quotes, as pandas writes   | integers if all are written as  |
  | text; or all cells in quotes           | such, without zeros in front;   |
  |                                        | otherwise text                  |
  | ids such as 10.0 or 1.2E+11            | refused: no tool can tell what  |
  |                                        | they were                       |
  | keep as 1/0, yes/no, TRUE/FALSE, T/F   | understood, as pandas, R and    |
  |                                        | spreadsheets write it           |
  | a missing keep, id or vote, two rows   | refused                         |
  | of an id                               |                                 |
  | NA, nan, NULL as a probability         | nan                             |
  | further columns                        | left out                        |

  Args:
    path: the file's path.
    fingerprints: what it should belong to.

  Returns:
    The Selection.

  Raises:
    ValueError: a file without these columns, one that was changed after it was
      written, or of other inputs.
  """
  path = Path(path)
  opened = read_checked(path, fingerprints)
  # The first manifests came with files whose formulas are as they were.
  escaped = {0: None, 1: False}.get(opened.version, True)
  with _files.named(path, "table of a selection"):
    table = _csv.read(opened.content, escaped=escaped)
    columns = {name: table[name] for name in _columns.NAMES}
    steps = [n for n in table.column_names if n.startswith("vote_")]
    votes = _columns.stack_votes([table[name] for name in steps])
    return _columns.selection(columns, votes, {})


def _tables(selection: Selection) -> Iterator[pa.Table]:
  """Yields the selection in tables that each fit in memory."""
  for start in range(0, len(selection), ROWS):
    yield to_table(selection, start, start + ROWS)


def to_table(selection: Selection, start: int, stop: int) -> pa.Table:
  """Makes a table of some rows, as Parquet has it."""
  rows = slice(start, stop)
  keep = _ids.mask(selection.keep, len(selection), "the selection's keep")
  votes = np.ascontiguousarray(selection.votes[rows])
  quality = selection.quality
  if quality is None:
    quality = np.full(len(selection), np.nan)
  ids = selection.ids[rows]
  if ids.dtype == _ids.UID:
    raise TypeError(
      "the selection's ids are uid pairs; give gm.export.format_uids(ids) as"
      " ids, or write its kept_ids with write_datacomp_subset."
    )
  return pa.table(
    {
      "id": _ids.to_arrow(ids, "ids"),
      "keep": pa.array(keep[rows]),
      "keep_probability": pa.array(
        selection.keep_probability[rows], from_pandas=True
      ),
      "quality": pa.array(quality[rows], from_pandas=True),
      "votes": pa.FixedSizeListArray.from_arrays(
        pa.array(votes.reshape(-1)), votes.shape[1]
      ),
    }
  )


def to_flat_table(table: pa.Table) -> pa.Table:
  """Lays a table out as CSV has it: a column a vote, and no formulas."""
  votes = table["votes"].combine_chunks()
  n_steps = votes.type.list_size
  columns = votes.flatten().to_numpy().reshape(-1, n_steps)
  ids = _columns.whole(table["id"])
  if _columns.is_text(ids):
    ids = _csv.harmless_column(ids)
  table = table.drop_columns("votes").set_column(0, "id", ids)
  for step in range(n_steps):
    values = np.ascontiguousarray(columns[:, step])
    table = table.append_column(f"vote_{step}", pa.array(values))
  return table


def checked_path(path: str | os.PathLike[str], suffix: str) -> Path:
  """Checks the ending of a path."""
  path = Path(path)
  if path.suffix != suffix:
    raise ValueError(f"path is {str(path)!r}; expected it to end with {suffix}")
  return path


def _choose_fingerprints(
  selection: Selection, given: Mapping[str, str] | None
) -> dict[str, str]:
  if given is not None:
    return dict(given)
  return dict(selection.diagnostics.get("fingerprints", {}))


def read_checked(
  path: Path, fingerprints: Mapping[str, str] | None
) -> _checksums.Opened:
  """Reads a file whose checksum and fingerprints are right."""
  opened = _checksums.read(path)
  _check_fingerprints(path, opened.fingerprints, fingerprints)
  return opened


def _check_fingerprints(
  path: Path, found: Mapping[str, str], asked: Mapping[str, str] | None
) -> None:
  filters.check_fingerprints(str(path), found, "this run", asked or {})
