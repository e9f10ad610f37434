"""Filters of image-text pairs by mimic and CLIP scores, as subset files.

Each percentage is one of the whole pool, taken before anything is combined.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

import gradmimic_jax as gm
from configs import clip_filters as filters_config
from experiments.data import filters
from experiments.data.pairs import datacomp
from experiments.reporting import tables
from experiments.runtime import workdir as workdir_lib
from experiments.selection import files as select_lib
from gradmimic_jax.selection.uids import parse_uids

OVERLAP_FILE = "overlap.csv"
MANIFEST_FILE = filters.MANIFEST_FILE
_ATOM = re.compile(
  r"(?P<score>mimic|clip)_(?P<end>top|bottom)(?P<percent>\d+)"
  r"|random(?P<random>\d+)|basic"
)
_NAME = re.compile(r"[\w.]+")


class Scores(NamedTuple):
  """Scores by uid, high = good."""

  uids: np.ndarray  # `u8,u8` [M], or a ledger's ids
  values: np.ndarray  # [M]


class Pool(NamedTuple):
  """What filters choose from, and go by."""

  uids: np.ndarray  # as those of the scores [N]
  mimic: Scores | None = None
  clip: Scores | None = None
  basic: gm.filters.Filter | None = None


def run_filters(config: Any, workdir: Any) -> dict[str, Any]:
  """Makes filters of a run's ledger.

  Args:
    config: as `configs/clip_filters.py` describes it.
    workdir: gets a DataComp subset file for each filter, the overlaps of all as
      `overlap.csv`, and `manifest.json`.

  Returns:
    What is in `manifest.json`.

  Raises:
    ValueError: an unknown field, a filter that doesn't read, or one of scores
      that are not there.
    FileNotFoundError: there is no ledger in the run's folder, or no metadata.
  """
  workdir_lib.check(workdir, config, filters_config, free=("run", "metadata"))
  mimic = mean_scores(pathlib.Path(config.run))
  pool = Pool(mimic.uids, mimic)
  if config.metadata is not None:
    columns = (config.clip_column, *datacomp.BASIC_COLUMNS)
    metadata = datacomp.read_metadata(config.metadata, columns)
    clip = Scores(metadata.uids, metadata.column(config.clip_column))
    pool = Pool(metadata.uids, mimic, clip, datacomp.basic(metadata))
  made = make(config.filters, pool, seed=config.seed)
  folder = workdir_lib.claim(
    workdir, config, filters_config, free=("run", "metadata")
  )
  return write(folder, made, pool)


def mean_scores(run: pathlib.Path) -> Scores:
  """The mean of every pair's scores over a run, those of all its processes.

  Args:
    run: the workdir of a run of image-text pairs.

  Returns:
    The Scores, uids ascending; pairs whose scores are all NaN are left out.

  Raises:
    FileNotFoundError: there is no ledger in that folder.
  """
  found = ledger_means(run)
  return Scores(parse_uids(found.uids), found.values)


def ledger_means(run: pathlib.Path) -> Scores:
  """As `mean_scores`, with the ids of the ledger, whatever they are."""
  rows = select_lib.ledger_of(run).table().select(["id", "score"])
  rows = rows.filter(pc.is_finite(rows["score"]))
  means = rows.group_by("id").aggregate([("score", "mean")]).sort_by("id")
  return Scores(means["id"].to_numpy(), means["score_mean"].to_numpy())


def make(
  expressions: Sequence[str], pool: Pool, *, seed: int
) -> dict[str, gm.filters.Filter]:
  """The filters that expressions stand for.

  | name           | keeps                                            |
  |----------------|--------------------------------------------------|
  | mimic_top30    | the highest 30 % by mean mimic score             |
  | mimic_bottom15 | the lowest 15 %, for others to be without        |
  | clip_top30     | the highest 30 % by CLIP score                   |
  | basic          | DataComp's basic filtering                       |
  | random30       | 30 % by chance, as many as a top30 without ties  |

  Args:
    expressions: such as "clip_top30 - mimic_bottom15".
    pool: to choose from.
    seed: of chance.

  Returns:
    A filter for each expression.

  Raises:
    ValueError: an expression that doesn't read, or scores that are not there.
  """
  check(expressions)
  names = {name for text in expressions for name in _NAME.findall(text)}
  atoms = {name: _atom(name, pool, seed) for name in sorted(names)}
  return {text: gm.filters.combine(text, atoms) for text in expressions}


def check(expressions: Sequence[str]) -> None:
  """Raises ValueError for expressions that can't be made and written.

  Args:
    expressions: such as "clip_top30 - mimic_bottom15".

  Raises:
    ValueError: a name that means nothing, or two whose file is the same.
  """
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
      if not match or not 0 < int(percent) <= 100:
        raise ValueError(
          f"the filter {text!r} has {name!r}; expected names such as"
          " mimic_top30, mimic_bottom15, clip_top30, random30 or basic, with"
          " percents from 1 to 100."
        )


def _atom(name, pool, seed):
  match = _ATOM.fullmatch(name)
  if match["random"]:
    size = int(len(pool.uids) * int(match["random"]) / 100) + 1
    rng = np.random.default_rng((seed, int(match["random"])))
    size = min(size, len(pool.uids))
    chosen = rng.choice(len(pool.uids), size, replace=False)
    return gm.filters.Filter(pool.uids[chosen], name)
  found = getattr(pool, match["score"] or name)
  if found is None:
    raise ValueError(
      f"the filter {name!r} needs DataComp's metadata: give --config.metadata,"
      " or leave it out of --config.filters."
    )
  if match["score"] is None:
    return found
  cut = datacomp.highest if match["end"] == "top" else datacomp.lowest
  chosen = cut(found.values, int(match["percent"]) / 100)
  return gm.filters.Filter(found.uids[chosen], name)


def file_of(expression: str) -> str:
  """The name of an expression's subset file."""
  words = expression.replace("-", "less").replace("&", "and")
  words = words.replace("|", "or").replace("~", "not")
  return re.sub(r"\W+", "_", words).strip("_") + ".npy"


def write(
  folder: pathlib.Path,
  made: Mapping[str, gm.filters.Filter],
  pool: Pool,
  write_filter: Callable[..., Any] = gm.export.write_datacomp_subset,
) -> dict[str, Any]:
  """Writes a subset file for each filter, and their overlaps.

  Args:
    folder: to write to.
    made: filters by name.
    pool: they were chosen from.
    write_filter: `(path, ids)`, writes one.

  Returns:
    The manifest: sizes, files and overlaps.
  """
  for name, one in made.items():
    write_filter(folder / file_of(name), one.ids)
  overlaps = gm.filters.overlap(made).to_pylist()
  workdir_lib.write_bytes(
    folder / OVERLAP_FILE, tables.csv_text(overlaps).encode()
  )
  manifest = {
    "pool": len(pool.uids),
    "scored": 0 if pool.mimic is None else len(pool.mimic.uids),
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


def main(config: Any, workdir: str) -> None:
  """Makes the filters, then prints their sizes and where they are."""
  manifest = run_filters(config, workdir)
  print(
    f"{manifest['pool']:,} pairs in the pool, {manifest['scored']:,} of them"
    " with mimic scores"
  )
  for name, about in manifest["filters"].items():
    path = pathlib.Path(workdir) / about["file"]
    print(f"  {name:<30} keeps {about['kept']:>12,}  {path}")
  print(f"  {pathlib.Path(workdir) / OVERLAP_FILE}")
