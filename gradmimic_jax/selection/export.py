"""Selections and filters as files that other tools read, and back.

| file            | holds                                      | for           |
|-----------------|--------------------------------------------|---------------|
| `.npy`          | ids to keep, ascending                     | any loader    |
| Parquet, CSV    | id, keep, keep_probability, quality, votes | data frames   |
| DataComp `.npy` | uids to keep as sorted `u8,u8`             | its resharder |

Every file is written beside its place and moved there, whole or not at all;
none is a pickle. Fingerprints, where given, go along: into the Parquet file, or
a `.json` file beside the others; reading compares them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from gradmimic_jax.selection import _ids, filters
from gradmimic_jax.selection.selection import Selection
from gradmimic_jax.selection.uids import parse_uids

_METADATA = b"gradmimic_selection"
_ROWS = 1 << 20  # of a Parquet row group, and of what is converted at a time


class Coverage(NamedTuple):
  """How much of a subset a pool of samples holds."""

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
      not given. Written to `<path>.json`.

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
  array = _ids.unique(_ids.checked(ids, "ids"))
  return _write_array(path, array, fingerprints)


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
    TypeError, ValueError: a file that holds no ids [n], or of other inputs.
  """
  path = Path(path)
  _check_fingerprints(path, _read_fingerprints(path), fingerprints)
  return _ids.unique(_ids.checked(_load(path), f"the file {path}"))


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
    selection: what `select` gave.
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
    "version": 1,
    "diagnostics": selection.diagnostics,
    "fingerprints": _fingerprints_of(selection, fingerprints),
  }
  metadata = {_METADATA: json.dumps(about, allow_nan=False).encode()}

  def write(file: BinaryIO) -> None:
    schema = _table(selection, 0, 0).schema.with_metadata(metadata)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
      for table in _tables(selection):
        writer.write_table(table.cast(schema))

  _write(path, write)
  return path


def read_parquet(
  path: str | os.PathLike[str],
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Selection:
  """Reads a selection that `write_parquet` wrote.

  Args:
    path: the file's path.
    fingerprints: what it should belong to.

  Returns:
    The Selection.

  Raises:
    ValueError: a file of another kind, or of other inputs.
  """
  path = Path(path)
  file = pq.ParquetFile(path)
  metadata = file.schema_arrow.metadata or {}
  if _METADATA not in metadata:
    raise ValueError(
      f"{path} is a Parquet file, but no selection: its columns are"
      f" {file.schema_arrow.names}. Give a file that write_parquet wrote."
    )
  about = json.loads(metadata[_METADATA])
  _check_fingerprints(path, about["fingerprints"], fingerprints)
  table = file.read()
  votes = table["votes"].combine_chunks()
  votes = votes.flatten().to_numpy().reshape(len(table), votes.type.list_size)
  return _selection(table, votes, about["diagnostics"])


def write_csv(
  path: str | os.PathLike[str],
  selection: Selection,
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Path:
  """Writes a selection as CSV, a row a sample.

  Columns: id, keep (true or false), keep_probability, quality (empty where
  undefined), vote_0 ... vote_{T-1} (1 keep, 0 drop, -1 abstain). Strings are
  quoted.

  Args:
    path: the file's path.
    selection: what `select` gave.
    fingerprints: what it belongs to; those of its ledger if not given. Written
      to `<path>.json`.

  Returns:
    The path.
  """
  path = _path(path, ".csv")

  def write(file: BinaryIO) -> None:
    schema = _flat(_table(selection, 0, 0)).schema
    with pa_csv.CSVWriter(file, schema) as writer:
      for table in _tables(selection):
        writer.write_table(_flat(table))

  _write(path, write)
  _write_fingerprints(path, _fingerprints_of(selection, fingerprints))
  return path


def read_csv(
  path: str | os.PathLike[str],
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Selection:
  """Reads a selection that `write_csv` wrote; there are no diagnostics.

  Args:
    path: the file's path.
    fingerprints: what it should belong to.

  Returns:
    The Selection. Ids that look like numbers are integers.

  Raises:
    ValueError: a file without these columns, or of other inputs.
  """
  path = Path(path)
  _check_fingerprints(path, _read_fingerprints(path), fingerprints)
  table = pa_csv.read_csv(path)
  wanted = ["id", "keep", "keep_probability", "quality"]
  steps = [n for n in table.column_names if n.startswith("vote_")]
  if table.column_names[:4] != wanted or not steps:
    raise ValueError(
      f"{path} has columns {table.column_names}; expected {wanted} and vote_0,"
      " vote_1, ..."
    )
  votes = np.stack([table[name].to_numpy() for name in steps], axis=1)
  return _selection(table, votes.astype(np.int8), {})


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
    fingerprints: what the uids belong to. Written to `<path>.json`.

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
  """Reads a DataComp subset file.

  Args:
    path: the file's path.
    multiplicity: whether uids may repeat.
    fingerprints: what the uids should belong to.

  Returns:
    `u8,u8` [n], ascending; `format_uids` makes strings of them.

  Raises:
    ValueError: another dtype or shape, uids that aren't sorted, that repeat
      without `multiplicity`, or that belong to other inputs.
  """
  path = Path(path)
  _check_fingerprints(path, _read_fingerprints(path), fingerprints)
  pairs = _load(path)
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
  """How much of a subset the pool's metadata files hold.

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
    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
      raise ValueError(
        f"{path} has no column {column!r}; it has {file.schema_arrow.names}."
      )
    for batch in file.iter_batches(_ROWS, columns=[column]):
      yield parse_uids(batch.column(0))


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
  """The selection as tables of so many rows that each fits in memory."""
  for start in range(0, len(selection), _ROWS):
    yield _table(selection, start, start + _ROWS)


def _table(selection: Selection, start: int, stop: int) -> pa.Table:
  rows = slice(start, stop)
  votes = np.ascontiguousarray(selection.votes[rows])
  quality = selection.quality
  if quality is None:
    quality = np.full(len(selection), np.nan)
  ids = selection.ids[rows]
  if ids.dtype == _ids.UID:
    raise TypeError(
      "the selection's ids are uid pairs; give format_uids(ids) as ids, or"
      " write its kept_ids with write_datacomp_subset."
    )
  return pa.table(
    {
      "id": pa.array(ids),
      "keep": pa.array(selection.keep[rows]),
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
  """With a column a vote: CSV has no lists."""
  votes = table["votes"].combine_chunks()
  n_steps = votes.type.list_size
  columns = votes.flatten().to_numpy().reshape(-1, n_steps)
  table = table.drop_columns("votes")
  for step in range(n_steps):
    values = np.ascontiguousarray(columns[:, step])
    table = table.append_column(f"vote_{step}", pa.array(values))
  return table


def _selection(
  table: pa.Table, votes: np.ndarray, diagnostics: dict[str, Any]
) -> Selection:
  """The selection whose columns, but for the votes, are the table's."""
  return Selection(
    _numpy_ids(table["id"]),
    table["keep"].to_numpy(),
    _floats(table["keep_probability"]),
    votes,
    diagnostics,
    _floats(table["quality"]),
  )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
  return column.cast(pa.float64()).to_numpy()  # null becomes nan


def _numpy_ids(column: pa.ChunkedArray) -> np.ndarray:
  array = column.to_numpy()
  return array.astype(np.str_) if array.dtype == object else array


def _load(path: Path) -> np.ndarray:
  try:
    return np.load(path, allow_pickle=False)
  except ValueError as error:
    raise ValueError(
      f"{path} is no NumPy file of plain values: {error}"
    ) from error


def _opened(
  ids: Any, fingerprints: Mapping[str, str] | None
) -> tuple[Any, Mapping[str, str] | None]:
  """The ids, of a Filter or a Selection too, and what they belong to."""
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


def _write(path: Path, write: Callable[[Any], Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _write_array(
  path: Path, array: np.ndarray, fingerprints: Mapping[str, str] | None
) -> Path:
  _write(path, lambda file: np.save(file, array, allow_pickle=False))
  _write_fingerprints(path, fingerprints)
  return path


def _fingerprints_of(
  selection: Selection, given: Mapping[str, str] | None
) -> dict[str, str]:
  if given is not None:
    return dict(given)
  return dict(selection.diagnostics.get("fingerprints", {}))


def _beside(path: Path) -> Path:
  return path.with_name(path.name + ".json")


def _write_fingerprints(
  path: Path, fingerprints: Mapping[str, str] | None
) -> None:
  if not fingerprints:
    _beside(path).unlink(missing_ok=True)  # of a file that was here before
    return
  text = json.dumps({"fingerprints": dict(fingerprints)}, indent=2) + "\n"
  _write(_beside(path), lambda file: file.write(text.encode()))


def _read_fingerprints(path: Path) -> dict[str, str]:
  if not _beside(path).exists():
    return {}
  return json.loads(_beside(path).read_text())["fingerprints"]


def _check_fingerprints(
  path: Path, found: Mapping[str, str], asked: Mapping[str, str] | None
) -> None:
  filters.check_fingerprints(str(path), found, "this run", asked or {})
