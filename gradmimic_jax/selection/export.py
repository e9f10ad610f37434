"""Selections and filters as files that other tools read, and back.

`write_filter` and `read_filter` take what the file's name and the ids ask for:

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
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from gradmimic_jax import _files, _frames
from gradmimic_jax.selection import (
  _checksums,
  _columns,
  _csv,
  _ids,
  filters,
)
from gradmimic_jax.selection._csv import harmless
from gradmimic_jax.selection._selection_files import (
  ROWS,
  checked_path,
  read_checked,
  read_csv,
  read_parquet,
  write_csv,
  write_parquet,
)
from gradmimic_jax.selection.selection import Selection
from gradmimic_jax.selection.uids import format_uids, parse_uids, to_arrow

__all__ = [
  "Coverage",
  "coverage",
  "format_uids",
  "harmless",
  "parse_uids",
  "read_csv",
  "read_datacomp_subset",
  "read_filter",
  "read_npy",
  "read_parquet",
  "write_csv",
  "write_datacomp_subset",
  "write_filter",
  "write_npy",
  "write_parquet",
]

_TEXT = bytes(range(32, 127)) + b"\t\r\n"  # bytes of ASCII text


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
  path = checked_path(path, ".npy")
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
  content = read_checked(path, fingerprints).content
  name = f"the file {path}"
  with _files.named(path):
    ids = _ids.checked(_files.parse_npy(content, path), name)
    _ids.refuse_mask(ids, name)
  return _ids.unique(ids)


def write_filter(
  path: str | os.PathLike[str],
  ids: Any,
  *,
  fingerprints: Mapping[str, str] | None = None,
) -> Path:
  """Writes ids to keep as the file's name asks for.

  Args:
    path: the file's path, ending with `.npy` or `.csv` (a column `id`). Ids
      that are DataComp's uids, all 32 lower-case hexadecimal digits, go to
      `.npy` as the subset file that its resharder takes.
    ids: ids [n], a Filter, or a Selection, whose kept ids they are.
    fingerprints: what the ids belong to; those of a Filter or a Selection if
      not given. Written to `<path>.json`, with the checksum.

  Returns:
    The path.

  Raises:
    TypeError, ValueError: ids of another kind, a path with another ending.

  Example:
    >>> import tempfile
    >>> path = write_filter(tempfile.mkdtemp() + "/kept.csv", ["b", "007"])
    >>> print(path.read_text(), read_filter(path).ids)
    id
    "007"
    "b"
     ['007' 'b']
  """
  path = Path(path)
  if path.suffix not in (".npy", ".csv"):
    raise ValueError(
      f"path is {str(path)!r}; expected it to end with .npy or .csv."
    )
  ids, fingerprints = _opened(ids, fingerprints)
  array = as_uids(_ids.checked(ids, "ids"))
  if path.suffix == ".npy":
    write = write_datacomp_subset if array.dtype == _ids.UID else write_npy
    return write(path, _ids.unique(array), fingerprints=fingerprints)
  _ids.refuse_mask(array, "ids")
  column = _columns.whole(to_arrow(_ids.unique(array), "ids"))
  if _columns.is_text(column):
    column = _csv.harmless_column(column)

  def write_rows(file: io.BufferedRandom) -> None:
    file.write(b"id\n")
    options = pa_csv.WriteOptions(include_header=False)
    pa_csv.write_csv(pa.table({"id": column}), file, options)

  _checksums.write(path, write_rows, fingerprints)
  return path


def read_filter(
  path: str | os.PathLike[str],
  *,
  source: str | None = None,
  fingerprints: Mapping[str, str] | None = None,
) -> filters.Filter:
  """Reads the ids to keep in any file that says which.

  | file                               | keeps                               |
  |------------------------------------|-------------------------------------|
  | a selection, `.parquet` or `.csv`  | its kept ids; its pool is all of    |
  |                                    | them                                |
  | another table with a column `id`,  | the ids of the rows whose `keep` is |
  | or another name of the kind, or    | true; without such a column, of all |
  | with no other column               | rows                                |
  | `.npy` of ids, also of uids        | them                                |
  | `.npy` of booleans [N]             | the positions that are True, of N   |
  | decisions of a page                | refused: `gm.read_decisions`        |

  Args:
    path: the file's path.
    source: what the filter is called; the file's name if not given.
    fingerprints: what the ids should belong to.

  Returns:
    The Filter.

  Raises:
    OSError: there is no such file.
    ValueError: a file of another kind, one that was changed after it was
      written, or of other inputs.
  """
  path = Path(path)
  source = source or path.stem
  if path.suffix == ".npy":
    return _read_array_filter(path, source, fingerprints)
  if path.suffix == ".csv":
    with _files.named(path, "table"):
      names, first = _csv.first_records(_files.read_bytes(path))
  elif path.suffix == ".parquet":
    with _files.named(path, "Parquet file"):
      names, first = pq.read_schema(path).names, []
  else:
    raise ValueError(
      f"{path} is none of .npy, .parquet and .csv, which filters are kept in."
    )
  if {"keep_probability", "vote_0"} <= {*names} or "votes" in names:
    read = read_csv if path.suffix == ".csv" else read_parquet
    selection = read(path, fingerprints=fingerprints)
    return filters.of_selection(selection, source)
  if names[:2] == ["id", "decision"]:
    raise ValueError(
      f"{path} holds decisions, which say what to leave out of a pool:"
      " gm.filters.of_decisions(gm.read_decisions(path), pool)."
    )
  with _files.named(path, "list of ids"):
    return _read_list(path, names, first, source, fingerprints)


def _read_list(
  path: Path,
  names: list[str],
  first: list[bytes],
  source: str,
  fingerprints: Mapping[str, str] | None,
) -> filters.Filter:
  id_name = _id_column(names)
  wanted = [id_name, *(["keep"] if "keep" in names else [])]
  prints: Mapping[str, str] = {}
  if path.suffix == ".csv":
    opened = read_checked(path, fingerprints)
    prints = opened.fingerprints
    table = _csv.read_text(opened.content, wanted)
    quoted = (
      bool(first)
      and _csv.quotes_tell(opened.content, first)
      and first[names.index(id_name)].startswith(b'"')
    )
    text = _columns.whole(table[id_name])
    ids = _csv.restored_ids(text, quoted, None) if len(text) else text
    table = table.set_column(0, id_name, ids)
  else:
    table = pq.read_table(path, columns=wanted)
  ids = _columns.checked_ids(table[id_name]) if len(table) else np.empty(0, int)
  if len(wanted) == 1:
    return filters.Filter(ids, source, None, prints)
  says = _columns.whole(table["keep"]).to_pylist()
  mask = np.array([_ids.truth(word, "keep") for word in says], bool)
  return filters.Filter(ids[mask], source, ids, prints)


def _read_array_filter(
  path: Path, source: str, fingerprints: Mapping[str, str] | None
) -> filters.Filter:
  opened = read_checked(path, fingerprints)
  prints = opened.fingerprints
  if _is_raw(opened.content):
    return filters.Filter(
      read_datacomp_subset(path, multiplicity=True), source, None, prints
    )
  array = _files.parse_npy(opened.content, path)
  if array.dtype == bool and array.ndim == 1:
    pool = np.arange(len(array))
    return filters.Filter(np.flatnonzero(array), source, pool, prints)
  with _files.named(path):
    ids = _ids.checked(array, f"the file {path}")
    return filters.Filter(ids, source, None, prints)


def _id_column(names: list[str]) -> str:
  """Finds the column of ids among the names of a table."""
  found = [name for name in names if name in ("id", "uid")][:1]
  found = found or [name for name in names if _frames.is_id_name(name)]
  if len(names) == 1 or names[1:3] == ["keep_probability", "quality"]:
    found = names[:1]  # a list by this package's command
  if len(found) != 1:
    raise ValueError(
      f"its columns are {names[:10]}; expected one of ids, named id"
    )
  return found[0]


def as_uids(ids: np.ndarray) -> np.ndarray:
  """Converts strings to uid pairs if all are uids; other ids stay as they are.

  Args:
    ids: integers, strings or pairs `u8,u8` [n].

  Returns:
    `u8,u8` [n], or the ids.

  Example:
    >>> as_uids(np.array(["0" * 32])).dtype.names, as_uids(np.array(["a"]))
    (('f0', 'f1'), array(['a'], dtype='<U1'))
  """
  if ids.dtype.kind != "U" or not len(ids):
    return ids
  try:
    return parse_uids(ids)
  except ValueError:  # some are no uids, so none is
    return ids


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
  path = checked_path(path, ".npy")
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
  content = read_checked(path, fingerprints).content
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
      for batch in file.iter_batches(ROWS, columns=[column]):
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


def _opened(
  ids: Any, fingerprints: Mapping[str, str] | None
) -> tuple[Any, Mapping[str, str] | None]:
  """Returns the ids, of a Filter or a Selection too, and their fingerprints."""
  if isinstance(ids, Selection):
    ids = filters.of_selection(ids)
  if not isinstance(ids, filters.Filter):
    return ids, fingerprints
  return ids.ids, ids.fingerprints if fingerprints is None else fingerprints


def _write_array(
  path: Path, array: np.ndarray, fingerprints: Mapping[str, str] | None
) -> Path:
  _checksums.write(
    path,
    lambda file: np.save(file, array, allow_pickle=False),
    fingerprints,
  )
  return path
