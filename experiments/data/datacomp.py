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
from gradmimic_jax.selection.uids import parse_uids

CLIP_SCORES = ("clip_b32_similarity_score", "clip_l14_similarity_score")
BASIC_COLUMNS = ("text", "original_width", "original_height")
# Basic filtering, as published.
_MIN_WORDS, _MIN_CHARACTERS = 3, 6
_MIN_SIDE, _MAX_ASPECT = 200, 3.0
# More bytes than characters, by this share, and a text counts as not English.
_MAX_EXTRA_BYTES = 0.05
_ROWS = 1 << 18


class Metadata(NamedTuple):
  """What the metadata files say of a pool, a row a sample."""

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
  path: str | os.PathLike, columns: Sequence[str] = CLIP_SCORES
) -> Metadata:
  """Reads some columns of a pool's Parquet files.

  Args:
    path: A Parquet file, or a folder of them, which are read by name.
    columns: Which to read beside "uid". Texts take the most memory by far.

  Returns:
    Uids and columns, rows aligned.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If a file lacks a column or has another kind of uid.
  """
  path = pathlib.Path(path)
  paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
  if not paths:
    raise FileNotFoundError(f"no Parquet file in {path}")
  uids: list[np.ndarray] = []
  tables: list[pa.Table] = []
  wanted = list(dict.fromkeys(columns))
  for part in paths:
    with pq.ParquetFile(part) as file:
      missing = {"uid", *wanted} - set(file.schema_arrow.names)
      if missing:
        raise ValueError(
          f"{part} has no column {', '.join(sorted(missing))}; it has"
          f" {', '.join(file.schema_arrow.names)}"
        )
      # A piece at a time: a hundred million uids are 3 GB as text.
      for batch in file.iter_batches(_ROWS, columns=["uid", *wanted]):
        try:
          uids.append(parse_uids(batch.column("uid")))
        except (TypeError, ValueError) as error:
          raise ValueError(f"{part}: {error}") from error
        tables.append(pa.Table.from_batches([batch]).select(wanted))
  return Metadata(
    np.concatenate(uids) if uids else parse_uids([]), pa.concat_tables(tables)
  )


def top(
  uids: Any, scores: Any, fraction: float, source: str = "top"
) -> gm.filters.Filter:
  """The samples with the highest scores, by DataComp's rule.

  A sample is kept if its score is at least the one at place `int(fraction * N)`
  of the scores in descending order, counted from 0: one more than that many,
  and those that tie with it.

  Args:
    uids: Strings or pairs `u8,u8` [N], the whole pool.
    scores: Their scores [N], high = good. NaN is below all others.
    fraction: In (0, 1].
    source: What the filter is called.

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
  """The samples with the lowest scores, which others are to be without.

  Args:
    uids: Strings or pairs `u8,u8` [N], the whole pool.
    scores: Their scores [N], such as mean mimic scores, high = good. Samples
      whose score is NaN, as those never scored, are not among the lowest and
      don't count for the fraction.
    fraction: In (0, 1]; `int(fraction * M)` of the M scored samples, and of
      those that tie for the last place the ones that come first.
    source: What the filter is called.

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
  """DataComp's basic filtering.

  English, more than 2 words, more than 5 characters, the smaller side of the
  image at least 200 pixels, and the larger at most 3 times the smaller.

  DataComp asks fastText's model of languages (lid.176) what is English. It is
  not here, as nothing is fetched: give what it says as `is_english`. Without
  it, a text counts as English if almost all of it is ASCII, which drops Chinese
  or Russian and lets German pass.

  Args:
    metadata: With `BASIC_COLUMNS`.
    is_english: Booleans [N]; None goes by ASCII.
    source: What the filter is called.

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
  pairs, scores = parse_uids(uids), np.asarray(scores, np.float64)
  if scores.shape != pairs.shape:
    raise ValueError(
      f"scores must have one entry per uid, {pairs.shape}, got {scores.shape}"
    )
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
  return pairs, scores
