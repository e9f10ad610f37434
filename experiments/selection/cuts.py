"""Filters of what a run has scored: cuts, and expressions of them.

Each percentage is one of the whole pool, taken before anything is combined.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

import gradmimic_jax as gm
from experiments.data import filters
from experiments.data.pairs import datacomp
from experiments.runtime import tables, workdir as workdir_lib
from experiments.selection import runs

OVERLAP_FILE = "overlap.csv"
MANIFEST_FILE = filters.MANIFEST_FILE
_ATOM = re.compile(
  r"(?P<score>mimic|clip)_(?P<end>top|bottom)(?P<percent>\d+)"
  r"|random(?P<random>\d+)|basic"
)
_NAME = re.compile(r"[\w.]+")


class Scores(NamedTuple):
  """Scores by id, high = good."""

  ids: np.ndarray  # [M]: integers, text, or uids as `u8,u8`
  values: np.ndarray  # [M]


class Pool(NamedTuple):
  """The samples that filters choose from, and the scores they go by."""

  ids: np.ndarray  # [N], of the same kind
  mimic: Scores | None = None
  clip: Scores | None = None
  basic: gm.filters.Filter | None = None


def pool_of(run: pathlib.Path, metadata: str | None, clip_column: str) -> Pool:
  """Reads what filters of a run's ledger choose from.

  Without DataComp's metadata (a Parquet file or a folder of them, whose
  `clip_column` has CLIP scores) that is what the run has scored.

  Raises:
    ValueError: metadata that are damaged or lack a column.
    FileNotFoundError: there is no ledger, or no metadata.
  """
  mimic = mean_scores(run)
  if metadata is None:
    return Pool(mimic.ids, mimic)
  found = datacomp.read_metadata(
    metadata, (clip_column, *datacomp.BASIC_COLUMNS)
  )
  clip = Scores(found.uids, found.column(clip_column))
  return Pool(found.uids, mimic, clip, datacomp.basic(found))


def mean_scores(run: pathlib.Path) -> Scores:
  """The mean of every sample's scores over a run, those of all its processes.

  Ids are ascending; samples whose scores are all NaN are left out.

  Raises:
    FileNotFoundError: there is no ledger in the run's folder.
  """
  rows = runs.load_ledger(run).table().select(["id", "score"])
  rows = rows.filter(pc.is_finite(rows["score"]))
  means = rows.group_by("id").aggregate([("score", "mean")]).sort_by("id")
  return Scores(datacomp.as_ids(means["id"]), means["score_mean"].to_numpy())


def make(
  expressions: Sequence[str], pool: Pool, *, seed: int
) -> dict[str, gm.filters.Filter]:
  """Filters of expressions such as "clip_top30 - mimic_bottom15".

  | name           | keeps                                            |
  |----------------|--------------------------------------------------|
  | mimic_top30    | the highest 30 % by mean mimic score             |
  | mimic_bottom15 | the lowest 15 %, for others to be without        |
  | clip_top30     | the highest 30 % by CLIP score                   |
  | basic          | DataComp's basic filtering                       |
  | random30       | 30 % by chance, as many as a top30 without ties  |

  Raises:
    ValueError: an expression that doesn't read, or scores that are not there.
  """
  check(expressions)
  names = {name for text in expressions for name in _NAME.findall(text)}
  atoms = {
    name: _atom(_ATOM.fullmatch(name), pool, seed) for name in sorted(names)
  }
  return {text: gm.filters.combine(text, atoms) for text in expressions}


def check(expressions: Sequence[str]) -> None:
  """Raises ValueError for names without a meaning, or two with one file."""
  files: dict[str, str] = {}
  for text in expressions:
    other = files.setdefault(file_of(text), text)
    if other != text:
      raise ValueError(
        f"the filters {other!r} and {text!r} would both be written to"
        f" {file_of(text)}. Make them in two workdirs."
      )
  for text in expressions:
    for name in _NAME.findall(text):
      match = _ATOM.fullmatch(name)
      percent = match and (match["percent"] or match["random"] or "1")
      if not 0 < int(percent or 0) <= 100:
        raise ValueError(
          f"the filter {text!r} has {name!r}; expected names such as"
          " mimic_top30, mimic_bottom15, clip_top30, random30 or basic, with"
          " percents from 1 to 100."
        )


def _atom(match, pool, seed):
  name = match[0]
  if match["random"]:
    size = int(len(pool.ids) * int(match["random"]) / 100) + 1
    rng = np.random.default_rng((seed, int(match["random"])))
    size = min(size, len(pool.ids))
    chosen = rng.choice(len(pool.ids), size, replace=False)
    return gm.filters.Filter(pool.ids[chosen], name)
  found = getattr(pool, match["score"] or name)
  if found is None:
    raise ValueError(
      f"the filter {name!r} needs DataComp's metadata: give --config.metadata,"
      " or leave it out of --config.filters."
    )
  if match["score"] is None:
    return found
  cut = datacomp.top if match["end"] == "top" else datacomp.bottom
  return cut(found.ids, found.values, int(match["percent"]) / 100, name)


def file_of(expression: str) -> str:
  """The name of an expression's file of ids."""
  words = expression.replace("-", "less").replace("&", "and")
  words = words.replace("|", "or").replace("~", "not")
  return re.sub(r"\W+", "_", words).strip("_") + ".npy"


def write(
  folder: pathlib.Path,
  made: Mapping[str, gm.filters.Filter],
  pool: Pool,
  fingerprints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Writes a file of ids for each filter, and their overlaps.

  Returns:
    The manifest: sizes, files and overlaps.
  """
  for name, one in made.items():
    datacomp.write_ids(
      folder / file_of(name), one.ids, fingerprints=fingerprints
    )
  overlaps = gm.filters.overlap(made).to_pylist()
  workdir_lib.write_bytes(
    folder / OVERLAP_FILE, tables.csv_text(overlaps).encode()
  )
  manifest = {
    "pool": len(pool.ids),
    "scored": 0 if pool.mimic is None else len(pool.mimic.ids),
    "filters": {
      name: {"kept": len(one), "file": file_of(name)}
      for name, one in made.items()
    },
    "overlaps": overlaps,
    "sha256": {
      file_of(name): filters.file_sha256(folder / file_of(name))
      for name in made
    },
  }
  workdir_lib.write_json(folder / MANIFEST_FILE, manifest)
  return manifest
