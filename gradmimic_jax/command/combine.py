"""`gradmimic filter`: an expression over filters, and the file it gives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradmimic_jax.selection import _ids, decisions, export, filters


def run(arguments: argparse.Namespace) -> int:
  """Combines the filters and writes the ids that are left."""
  named: dict[str, filters.Filter] = {}
  decided: dict[str, decisions.Decisions] = {}
  for text in arguments.sets:
    name, sign, file = text.partition("=")
    if not sign or not name or not file:
      raise ValueError(
        f"--set is {text!r}; expected a name and a file: --set short=short.csv"
      )
    if name in named or name in decided:
      raise ValueError(f"--set gives {name!r} twice; expected each name once.")
    if not Path(file).is_file():
      raise ValueError(f"--set {name}: there is no file {file}.")
    if Path(file).suffix == ".csv" and decisions.holds_decisions(file):
      decided[name] = decisions.read_decisions(file)
    else:
      named[name] = export.read_filter(file, source=name)
  out = Path(arguments.out)
  if out.suffix not in (".npy", ".csv"):
    raise ValueError(f"--out is {out}; expected it to end with .npy or .csv.")
  pool = _pool(arguments.pool, named)
  if pool is not None:
    named = {name: _within(name, one, pool) for name, one in named.items()}
  for name, one in decided.items():
    named[name] = _decided(name, one, named, pool)
  chosen = filters.combine(arguments.expression, named)
  try:
    export.write_filter(out, chosen)
  except OSError as error:
    raise ValueError(f"--out is {out}: {error.strerror}.") from error
  of = "" if pool is None else f" of {len(pool):,}"
  kind = " uids, as a DataComp subset" if _is_subset(out, chosen) else " ids"
  print(f"{chosen.source}: {len(chosen):,}{of}{kind}: {out}")
  return 0


def _decided(
  name: str,
  decided: decisions.Decisions,
  named: Mapping[str, filters.Filter],
  pool: np.ndarray | None,
) -> filters.Filter:
  """The samples that are kept by a person's decisions, with their own label."""
  if pool is None:
    raise ValueError(
      f"--set {name} holds decisions, which say what to leave out; give the"
      " selection that they were made on, or --pool FILE"
    )
  if decided.whole:
    return filters.of_decisions(decided, pool)
  if len(named) != 1:
    raise ValueError(
      f"--set {name} holds changes to a selection; give that one besides, and"
      f" no other filter, but got {sorted(named)}. Combine the others after it."
    )
  (selection,) = named.values()
  left = decided.ids[~decided.keep | decided.relabelled]
  kept = decided.ids[decided.keep & ~decided.relabelled]
  found = (selection | filters.Filter(kept, name)) - filters.Filter(left, name)
  return filters.Filter(found.ids, name, pool, selection.fingerprints)


def _is_subset(out: Path, chosen: filters.Filter) -> bool:
  return out.suffix == ".npy" and export.as_uids(chosen.ids).dtype == _ids.UID


def _pool(
  path: str | None, named: dict[str, filters.Filter]
) -> np.ndarray | None:
  """The ids of all samples: those asked for, or those that a selection has."""
  if path is not None:
    if not Path(path).is_file():
      raise ValueError(f"--pool: there is no file {path}.")
    found = export.read_filter(path)
    return found.ids if found.pool is None else found.pool
  pools = {n: one.pool for n, one in named.items() if one.pool is not None}
  if not pools:
    return None
  (first, pool), *others = pools.items()
  for name, other in others:
    if not np.array_equal(pool, other):
      raise ValueError(
        f"{first!r} and {name!r} choose from other samples, {len(pool):,} and"
        f" {len(other):,}; say which there are: --pool FILE"
      )
  return pool


def _within(name: str, one: filters.Filter, pool: np.ndarray) -> filters.Filter:
  """A filter's ids that are in the pool; the others are told of."""
  if not _ids.same_kind(one.ids, pool):
    raise ValueError(
      f"--set {name} has ids such as {one.ids[0]!r}, and the samples"
      f" {pool[0]!r}; expected the same kind."
    )
  inside = _ids.contains(pool, one.ids)
  left_out = int((~inside).sum())
  if left_out and left_out == len(one):
    raise ValueError(
      f"--set {name}: none of its {len(one):,} ids, such as"
      f" {one.ids[0].item()!r}, is one of the {len(pool):,} samples, such as"
      f" {pool[0].item()!r}. Are they of another data set?"
    )
  if left_out:
    print(
      f"note: {left_out:,} of the {len(one):,} ids of {name!r} are none of the"
      f" {len(pool):,} samples, and are left out",
      file=sys.stderr,
    )
  return filters.Filter(one.ids[inside], name, pool, one.fingerprints)
