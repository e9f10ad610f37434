"""DataComp's metadata, and its published filters as sets of uids.

Every filter cuts over the whole pool by itself and is then combined with
others as a set, by `gm.filters`; `gm.export.write_datacomp_subset` writes what
is left as the file that DataComp's tools read:

  pool = read_metadata("metadata/")
  clip = top(pool.uids, pool.column("clip_l14_similarity_score"), 0.3)
  both = clip - bottom(ledger_uids, mimic_scores, 0.15)
  gm.export.write_datacomp_subset("subset.npy", both.ids)
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import gradmimic_jax as gm
from experiments.runtime import limits as limits_lib
from gradmimic_jax.selection.uids import parse_uids

CLIP_SCORES = ("clip_b32_similarity_score", "clip_l14_similarity_score")
BASIC_COLUMNS = ("text", "original_width", "original_height")
# Basic filtering, as published.
_MIN_WORDS, _MIN_CHARACTERS = 3, 6
_MIN_SIDE, _MAX_ASPECT = 200, 3.0
# More bytes than characters, by this share, and a text counts as not English.
_MAX_EXTRA_BYTES = 0.05
_ROWS = 1 << 18
_MOST_UID = 64  # Bytes; one has 32, and what is longer is none.


class Metadata(NamedTuple):
  """The metadata of a pool, a row a sample."""

  uids: np.ndarray  # `u8,u8` [N], in the order of the files, repeats included.
  table: pa.Table  # The columns that were asked for, [N].

  def column(self, name: str) -> np.ndarray:
    """A column of numbers as float64 [N], NaN where there is none."""
    if name not in self.table.column_names:
      raise ValueError(
        f"no column {name!r} was read; there are {self.table.column_names}"
      )
    return self.table[name].cast(pa.float64()).to_numpy()


def read_metadata(
  path: str | os.PathLike,
  columns: Sequence[str] = CLIP_SCORES,
  *,
  limits: limits_lib.Limits = limits_lib.DEFAULT,
) -> Metadata:
  """Reads some columns of a pool's Parquet files.

  Args:
    path: A Parquet file, or a folder of them, which are read by name.
    columns: Those to read beside "uid". Texts take the most memory by far.
    limits: `table_row_group`.

  Returns:
    Uids and columns, rows aligned.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If a file is damaged, lacks a column, has another kind of uid or
      of column than the first, or claims more than it can hold.
  """
  path = pathlib.Path(path)
  paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
  if not paths:
    raise FileNotFoundError(f"no Parquet file in {path}")
  uids: list[np.ndarray] = []
  tables: list[pa.Table] = []
  wanted = list(dict.fromkeys(columns))
  for part in paths:
    try:
      for pairs, table in _read(part, wanted, limits):
        if tables and table.schema != tables[0].schema:
          raise ValueError(
            f"its columns are {_types(table)}, those of {paths[0]}"
            f" {_types(tables[0])}"
          )
        uids.append(pairs)
        tables.append(table)
    except FileNotFoundError:
      raise
    # Arrow takes an unlucky size for a want of memory.
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
      raise ValueError(f"{part}: {str(error).splitlines()[0]}") from error
  return Metadata(np.concatenate(uids), pa.concat_tables(tables))


def _types(table):
  return ", ".join(f"{x.name} {x.type}" for x in table.schema) or "none"


def _read(part, wanted, limits):
  """Reads a file's uids and columns, a piece at a time; first an empty one."""
  with pq.ParquetFile(part) as file:
    schema, metadata = file.schema_arrow, file.metadata
  missing = {"uid", *wanted} - set(schema.names)
  if missing:
    raise ValueError(
      f"it has no column {', '.join(sorted(missing))}; it has"
      f" {', '.join(schema.names)}"
    )
  read = list(dict.fromkeys(["uid", *wanted]))
  _check_claims(metadata, read, os.path.getsize(part), limits)
  kinds = {name: _plain(schema.field(name).type) for name in read}
  wanted_schema = pa.schema([(name, kinds[name]) for name in wanted])
  yield parse_uids([]), wanted_schema.empty_table()
  # Rows that share a text share it in memory as long as its dictionary is kept:
  # a few bytes say that a million rows have a megabyte each.
  texts = [name for name, kind in kinds.items() if _is_text(kind)]
  with pq.ParquetFile(part, read_dictionary=texts) as file:
    # A piece at a time: a hundred million uids are 3 GB as text.
    for batch in file.iter_batches(_ROWS, columns=read):
      whole = {}
      for name in read:
        most = limits.table_row_group
        if name == "uid":
          most = _MOST_UID * len(batch)
        whole[name] = _unpacked(batch.column(name), kinds[name], most, name)
      table = pa.table([whole[name] for name in wanted], schema=wanted_schema)
      yield parse_uids(whole["uid"]), table


def _plain(kind):
  return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind):
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _unpacked(array, kind, most, name):
  """Converts a column to its own type, unless it grows beyond the limit."""
  if not (pa.types.is_dictionary(array.type) and _is_text(kind)):
    return array.cast(kind)
  lengths = pc.binary_length(array.dictionary)
  size = pc.sum(pc.cast(pc.take(lengths, array.indices), pa.int64())).as_py()
  if (size or 0) > most:
    raise ValueError(
      f"{len(array)} rows of its column {name!r} are {size} bytes; the limit is"
      f" {most}"
    )
  return array.cast(kind)


def _check_claims(metadata, columns, size, limits):
  """Raises ValueError if a Parquet file claims more than it can hold."""
  rows, found = metadata.num_rows, 0
  # Uids are sixteen bytes that can't be made less.
  if not 0 <= rows <= size:
    raise ValueError(f"it has {size} bytes and claims {rows} rows")
  for number in range(metadata.num_row_groups):
    group = metadata.row_group(number)
    found += group.num_rows
    for place in range(group.num_columns):
      column = group.column(place)
      if column.path_in_schema.partition(".")[0] not in columns:
        continue
      packed = column.total_compressed_size
      unpacked = column.total_uncompressed_size
      start = column.data_page_offset
      if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
      if start < 0 or packed < 0 or start + packed > size:
        raise ValueError(
          f"column {column.path_in_schema!r} claims bytes {start} to"
          f" {start + packed} of a file of {size}"
        )
      if not 0 <= unpacked <= limits.table_row_group:
        raise ValueError(
          f"column {column.path_in_schema!r} claims {unpacked} bytes in one row"
          f" group; the limit is {limits.table_row_group}"
        )
  if found != rows:
    raise ValueError(f"it claims {rows} rows, its row groups {found}")


def top(
  uids: Any, scores: Any, fraction: float, source: str = "top"
) -> gm.filters.Filter:
  """Keeps the samples with the highest scores, by DataComp's rule.

  A sample is kept if its score is at least the one at place `int(fraction * N)`
  of the scores in descending order, counted from 0: one more than that many,
  and those that tie with it.

  Args:
    uids: Strings or pairs `u8,u8` [N], the whole pool; or other ids.
    scores: Their scores [N], high = good. NaN is below all others.
    fraction: In (0, 1].
    source: The filter's name.

  Returns:
    The filter.

  Raises:
    ValueError: If the fraction is out of range or shapes differ.

  Example:
    >>> uids = [f"{n:032x}" for n in range(10)]
    >>> len(top(uids, np.arange(10.0), 0.3))
    4

  References:
    Gadre et al., DataComp, https://github.com/mlfoundations/datacomp
  """
  pairs, scores = _checked(uids, scores, fraction)
  place = int(len(scores) * fraction)
  ranked = np.where(np.isnan(scores), -np.inf, scores)
  keep = ~np.isnan(scores)
  if place < len(scores):
    keep &= ranked >= -np.sort(-ranked)[place]
  return gm.filters.Filter(pairs[keep], source)


def bottom(
  uids: Any, scores: Any, fraction: float, source: str = "bottom"
) -> gm.filters.Filter:
  """Finds the samples with the lowest scores, to take away from others.

  Args:
    uids: Strings or pairs `u8,u8` [N], the whole pool; or other ids.
    scores: Their scores [N], such as mean mimic scores, high = good. Samples
      whose score is NaN, as those never scored, are not among the lowest and
      don't count for the fraction.
    fraction: In (0, 1]; `int(fraction * M)` of the M scored samples, and of
      those that tie for the last place the ones that come first.
    source: The filter's name.

  Returns:
    The filter.

  Raises:
    ValueError: If the fraction is out of range or shapes differ.
  """
  pairs, scores = _checked(uids, scores, fraction)
  scored = np.flatnonzero(~np.isnan(scores))
  lowest = scored[np.argsort(scores[scored], kind="stable")]
  lowest = lowest[: int(len(scored) * fraction)]
  return gm.filters.Filter(pairs[lowest], source)


def basic(
  metadata: Metadata, *, is_english: Any = None, source: str = "basic"
) -> gm.filters.Filter:
  """Keeps the samples that pass DataComp's basic filtering.

  English, more than 2 words, more than 5 characters, the smaller side of the
  image at least 200 pixels, and the larger at most 3 times the smaller.

  DataComp asks fastText's model of languages (lid.176) for English. That model
  is not here, as nothing is fetched: give its answers as `is_english`. Without
  it, a text counts as English if almost all of it is ASCII, which drops Chinese
  or Russian and lets German pass.

  Args:
    metadata: With `BASIC_COLUMNS`.
    is_english: Booleans [N]; None goes by ASCII.
    source: The filter's name.

  Returns:
    The filter.

  Raises:
    ValueError: If a column is missing or shapes differ.
  """
  width, height = (metadata.column(name) for name in BASIC_COLUMNS[1:])
  if "text" not in metadata.table.column_names:
    raise ValueError(
      f"no column 'text' was read; there are {metadata.table.column_names}"
    )
  text = pc.fill_null(metadata.table["text"], "")
  characters = pc.utf8_length(text).to_numpy()
  trimmed = pc.utf8_trim_whitespace(text)
  words = pc.list_value_length(pc.utf8_split_whitespace(trimmed)).to_numpy()
  if is_english is None:
    # In UTF-8, each character beyond ASCII takes one to three bytes more.
    extra = pc.binary_length(text).to_numpy() - characters
    english = extra <= _MAX_EXTRA_BYTES * characters
  else:
    english = np.asarray(is_english)
    if english.dtype != bool or english.shape != metadata.uids.shape:
      raise ValueError(
        f"is_english must be booleans {metadata.uids.shape}, got"
        f" {english.dtype} {english.shape}"
      )
  short, long = np.minimum(width, height), np.maximum(width, height)
  keep = (
    english
    & (words >= _MIN_WORDS)
    & (characters >= _MIN_CHARACTERS)
    & (short >= _MIN_SIDE)
    & (long <= _MAX_ASPECT * short)
  )
  return gm.filters.Filter(metadata.uids[keep], source)


def _checked(
  uids: Any, scores: Any, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
  ids, scores = as_ids(uids), np.asarray(scores, np.float64)
  if scores.shape != ids.shape:
    raise ValueError(
      f"scores must have one entry per uid, {ids.shape}, got {scores.shape}"
    )
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
  return ids, scores


def as_ids(ids: Any) -> np.ndarray:
  """Converts uids to pairs `u8,u8`; ids of other data stay as they are.

  Args:
    ids: [N]: integers, text, pairs, or Arrow's array of one of these.

  Returns:
    A NumPy array [N].
  """
  if isinstance(ids, (pa.Array, pa.ChunkedArray)) and not _is_text(ids.type):
    return ids.to_numpy()
  if getattr(ids, "dtype", None) is not None and ids.dtype.kind in "iu":
    return ids
  try:
    return parse_uids(ids)
  except (TypeError, ValueError):  # some are no uids, so none is
    return np.asarray(ids)
