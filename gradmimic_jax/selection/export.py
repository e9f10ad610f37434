"""Selections and filters as files that other tools read, and back.

| file            | holds                                      | for           |
|-----------------|--------------------------------------------|---------------|
| `.npy`          | ids to keep, ascending                     | any loader    |
| Parquet, CSV    | id, keep, keep_probability, quality, votes | data frames   |
| DataComp `.npy` | uids to keep as sorted `u8,u8`             | its resharder |

Every file is written beside its place and moved there, whole or not at all;
none is a pickle. Ids are integers or text, and come back as what they were.

Every file has a checksum, and reading compares it: a Parquet file in itself,
the others in a manifest beside them, `<file>.json`. Move the two together; one
without the other's match is refused. Files without a manifest are somebody
else's, and are read as they are. Fingerprints, where given, are kept in the
same place; reading compares them, too.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from gradmimic_jax.selection._csv import harmless
from gradmimic_jax.selection.selection import Selection
from gradmimic_jax.selection.uids import format_uids, parse_uids

__all__ = [
  "Coverage",
  "coverage",
  "format_uids",
  "harmless",
  "parse_uids",
  "read_csv",
  "read_datacomp_subset",
  "read_npy",
  "read_parquet",
  "write_csv",
  "write_datacomp_subset",
  "write_npy",
  "write_parquet",
]

_METADATA = b"gradmimic_selection"
_VERSION = 2  # of a Parquet file; 1 had no checksum
_TEXT = bytes(range(32, 127)) + b"\t\r\n"  # bytes of ASCII text
_MAX_ROWS = 100  # that a byte of Parquet may claim; the tightest have some 40
_ROWS = 1 << 20  # of a Parquet row group, and of what is converted at a time


class Coverage(NamedTuple):
  """Counts of a subset's samples in a pool."""

  subset: int  # distinct uids of the subset
  pool: int  # distinct uids of the pool
  found: int  # of the subset in the pool
  missing: int  # of the subset not in the pool

  @property
  def fraction(self) -> float:
    """The share that is found; nan for an empty subset."""
    return self.found / self.subset if self.subset else float("nan")


def write_npy(
  path: str | os.PathLike[str],
  ids: Any,
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Path:
  """Writes ids to keep as a NumPy file, ascending, each once.

  Args:
    path: the file's path, ending with `.npy`.
    ids: ids [n], a Filter, or a Selection, whose kept ids they are.
    fingerprints: what the ids belong to; those of a Filter or a Selection if
      not given. Written to `<path>.json`, with the checksum.

  Returns:
    The path.

  Raises:
    TypeError, ValueError: ids that aren't integers >= 0, strings or uid pairs
      [n]; a path that doesn't end with `.npy`.

  Example:
    >>> import tempfile
    >>> path = write_npy(tempfile.mkdtemp() + "/kept.npy", [5, 2])
    >>> read_npy(path)
    array([2, 5])
  """
  path = _path(path, ".npy")
  ids, fingerprints = _opened(ids, fingerprints)
  array = _ids.checked(ids, "ids")
  _ids.refuse_mask(array, "ids")
  return _write_array(path, _ids.unique(array), fingerprints)


def read_npy(
  path: str | os.PathLike[str],
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> np.ndarray:
  """Reads ids that `write_npy`, or any other tool, wrote.

  Args:
    path: the file's path.
    fingerprints: what the ids should belong to.

  Returns:
    The ids, ascending, each once.

  Raises:
    ValueError: a file that holds no ids [n], one that was changed after it was
      written, or of other inputs.
  """
  path = Path(path)
  content = _read(path, fingerprints).content
  name = f"the file {path}"
  with _files.named(path):
    ids = _ids.checked(_files.parse_npy(content, path), name)
    _ids.refuse_mask(ids, name)
  return _ids.unique(ids)


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
  path = _path(path, ".parquet")
  about = {
    "version": _VERSION,
    "diagnostics": selection.diagnostics,
    "fingerprints": _choose_fingerprints(selection, fingerprints),
    _checksums.IN_FILE: _checksums.ZEROS,  # the last: what is looked for
  }
  metadata = {_METADATA: json.dumps(about, allow_nan=False).encode()}
  path.parent.mkdir(parents=True, exist_ok=True)
  with _files.replacing(path) as file:
    schema = _table(selection, 0, 0).schema.with_metadata(metadata)
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
  path = _path(path, ".csv")

  def write(file: io.BufferedRandom) -> None:
    schema = _flat(_table(selection, 0, 0)).schema
    # Names have no quotes here, and had in earlier releases, which left
    # formulas as they are.
    file.write(",".join(schema.names).encode() + b"\n")
    options = pa_csv.WriteOptions(include_header=False)
    with pa_csv.CSVWriter(file, schema, write_options=options) as writer:
      for table in _tables(selection):
        writer.write_table(_flat(table))

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
  opened = _read(path, fingerprints)
  # The first manifests came with files whose formulas are as they were.
  escaped = {0: None, 1: False}.get(opened.version, True)
  with _files.named(path, "table of a selection"):
    table = _csv.read(opened.content, escaped=escaped)
    columns = {name: table[name] for name in _columns.NAMES}
    steps = [n for n in table.column_names if n.startswith("vote_")]
    votes = _columns.stack_votes([table[name] for name in steps])
    return _columns.selection(columns, votes, {})


def write_datacomp_subset(
  path: str | os.PathLike[str],
  uids: Any,
  *,
  multiplicity: bool = False,
  fingerprints: Mapping[str, str] | None = None,
) -> Path:
  """Writes a DataComp subset file: its uids, sorted, as `u8,u8`.

  DataComp's resharder searches the file by halves: what isn't sorted is lost in
  silence. So it is sorted here, and looked at once more as it will be read.

  Args:
    path: the file's path, ending with `.npy`.
    uids: strings of 32 lower-case hexadecimal digits or pairs `u8,u8` [n]; a
      Filter or a Selection of such ids.
    multiplicity: whether a uid that comes m times should be in the data m
      times. In a contrastive batch, copies are false negatives.
    fingerprints: what the uids belong to. Written to `<path>.json`, with the
      checksum; the file itself is as DataComp has it.

  Returns:
    The path.

  Raises:
    TypeError: uids of another kind.
    ValueError: uids that don't read, or that repeat without `multiplicity`.

  Example:
    >>> import tempfile
    >>> path = write_datacomp_subset(
    ...   tempfile.mkdtemp() + "/subset.npy", ["f" * 32, 31 * "0" + "1"]
    ... )
    >>> read_datacomp_subset(path)["f1"]
    array([                   1, 18446744073709551615], dtype=uint64)

  References:
    Gadre et al., DataComp, https://github.com/mlfoundations/datacomp
  """
  path = _path(path, ".npy")
  uids, fingerprints = _opened(uids, fingerprints)
  pairs = parse_uids(uids)
  if not _ids.is_ascending(pairs, strictly=False):
    pairs = pairs[_ids.order(pairs)]
  _check_subset(pairs, "uids", multiplicity)
  return _write_array(path, pairs, fingerprints)


def read_datacomp_subset(
  path: str | os.PathLike[str],
  *,
  multiplicity: bool = False,
  fingerprints: Mapping[str, str] | None = None,
) -> np.ndarray:
  """Reads a DataComp subset file, also one without a NumPy header.

  Args:
    path: the file's path. As for DataComp's resharder, a file that doesn't
      begin as `.npy` files do holds nothing but the uids.
    multiplicity: whether uids may repeat.
    fingerprints: what the uids should belong to.

  Returns:
    `u8,u8` [n], ascending; `format_uids` makes strings of them.

  Raises:
    ValueError: another dtype or shape, uids that aren't sorted, that repeat
      without `multiplicity`, or that belong to other inputs; a file that was
      changed after it was written.
  """
  path = Path(path)
  content = _read(path, fingerprints).content
  if _is_raw(content):
    pairs = np.frombuffer(content, _ids.UID)
  else:
    pairs = _files.parse_npy(content, path)
  if pairs.dtype != _ids.UID or pairs.ndim != 1:
    raise ValueError(
      f"{path} holds {pairs.dtype} of shape {pairs.shape}; a subset file holds"
      " 'u8,u8' [n], the two halves of every uid."
    )
  _check_subset(pairs, str(path), multiplicity)
  return pairs


def coverage(
  uids: Any,
  metadata: Any,
  *,
  column: str = "uid",
) -> Coverage:
  """Counts the samples of a subset that the pool's metadata files hold.

  Links rot: a pool as it was downloaded lacks some of the samples.

  Args:
    uids: the subset's uids, strings or pairs [n].
    metadata: path of a Parquet file with a column of uids, or of a folder of
      such files, or a list of paths.
    column: that column's name.

  Returns:
    Coverage(subset, pool, found, missing).

  Raises:
    ValueError: a file without the column, no file, uids that don't read.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/0.parquet"
    >>> pq.write_table(pa.table({"uid": ["0" * 32, "1" * 32]}), path)
    >>> coverage(["1" * 32, "2" * 32], path)
    Coverage(subset=2, pool=2, found=1, missing=1)
  """
  subset = _ids.unique(parse_uids(uids))
  pool = _ids.unique(
    np.concatenate([np.empty(0, _ids.UID), *_metadata_uids(metadata, column)])
  )
  found = int(_ids.contains(pool, subset).sum())
  return Coverage(len(subset), len(pool), found, len(subset) - found)


def _metadata_uids(metadata: Any, column: str) -> Iterator[np.ndarray]:
  if isinstance(metadata, (str, os.PathLike)):
    folder = Path(metadata)
    paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
  else:
    paths = [Path(path) for path in metadata]
  if not paths:
    raise ValueError(f"{metadata} has no Parquet files.")
  for path in paths:
    found = 0
    with _files.named(path, "Parquet file"):
      file = pq.ParquetFile(path)
      if column not in file.schema_arrow.names:
        raise ValueError(
          f"{path} has no column {column!r}; it has {file.schema_arrow.names}."
        )
      for batch in file.iter_batches(_ROWS, columns=[column]):
        found += len(batch)
        try:
          uids = parse_uids(batch.column(0))
        except (ValueError, TypeError) as error:
          raise ValueError(f"{path}, column {column!r}: {error}") from error
        yield uids
      if found != file.metadata.num_rows:
        raise ValueError(f"it has {found:,} of {file.metadata.num_rows:,} rows")


def _is_raw(content: bytearray) -> bool:
  """True if a file may be nothing but uids: 16 bytes each, and any bytes."""
  # A header with a flipped bit is no uid, and neither is a text or an archive.
  alike = sum(a == b for a, b in zip(content, _files.NPY_MAGIC, strict=False))
  is_text = not content[:4096].translate(None, _TEXT)
  known = content[:4] in (b"PK\x03\x04", b"PAR1")
  return not (len(content) % 16 or alike > 2 or is_text or known)


def _check_subset(pairs: np.ndarray, name: str, multiplicity: bool) -> None:
  if not _ids.is_ascending(pairs, strictly=False):
    raise ValueError(
      f"{name} is not sorted; DataComp's resharder would lose samples without a"
      " word. Write it with write_datacomp_subset, which sorts."
    )
  if not multiplicity and not _ids.is_ascending(pairs, strictly=True):
    n = int((pairs[1:] == pairs[:-1]).sum())
    raise ValueError(
      f"{name}: {n} uids repeat one before them. Pass np.unique(uids) to have"
      " every sample once, or multiplicity=True if copies are meant."
    )


def _tables(selection: Selection) -> Iterator[pa.Table]:
  """Yields the selection in tables that each fit in memory."""
  for start in range(0, len(selection), _ROWS):
    yield _table(selection, start, start + _ROWS)


def _table(selection: Selection, start: int, stop: int) -> pa.Table:
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


def _flat(table: pa.Table) -> pa.Table:
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


def _opened(
  ids: Any, fingerprints: Mapping[str, str] | None
) -> tuple[Any, Mapping[str, str] | None]:
  """Returns the ids, of a Filter or a Selection too, and their fingerprints."""
  if isinstance(ids, Selection):
    ids = filters.of_selection(ids)
  if not isinstance(ids, filters.Filter):
    return ids, fingerprints
  return ids.ids, ids.fingerprints if fingerprints is None else fingerprints


def _path(path: str | os.PathLike[str], suffix: str) -> Path:
  path = Path(path)
  if path.suffix != suffix:
    raise ValueError(f"path is {str(path)!r}; expected it to end with {suffix}")
  return path


def _write_array(
  path: Path, array: np.ndarray, fingerprints: Mapping[str, str] | None
) -> Path:
  _checksums.write(
    path,
    lambda file: np.save(file, array, allow_pickle=False),
    fingerprints,
  )
  return path


def _choose_fingerprints(
  selection: Selection, given: Mapping[str, str] | None
) -> dict[str, str]:
  if given is not None:
    return dict(given)
  return dict(selection.diagnostics.get("fingerprints", {}))


def _read(
  path: Path, fingerprints: Mapping[str, str] | None
) -> _checksums.Opened:
  opened = _checksums.read(path)
  _check_fingerprints(path, opened.fingerprints, fingerprints)
  return opened


def _check_fingerprints(
  path: Path, found: Mapping[str, str], asked: Mapping[str, str] | None
) -> None:
  filters.check_fingerprints(str(path), found, "this run", asked or {})
