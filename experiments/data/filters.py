"""Filters in the training pipeline: the samples of a data set to train on."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from absl import logging
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.data import noise, sources
from gradmimic_jax import _files

# Beside filters: the SHA-256 of each by its name, from the job that wrote it.
MANIFEST_FILE = "manifest.json"
_SUFFIXES = (".npy", ".parquet", ".csv")


def fingerprints(
  config: config_dict.ConfigDict,
  train_set: sources.Source,
  labels: noise.NoisyLabels,
) -> dict[str, str]:
  """Describes the inputs that a filter belongs to, in words and hashes.

  Args:
    config: of the run whose data it is.
    train_set: the data set of the ids.
    labels: the labels that a learner is given; the wrong ones depend on them.

  Returns:
    `dataset` and `labels`.
  """
  # Without its folder or version: its content is in the fingerprint.
  name = f"{train_set.name.split('/')[0]} {config.data.train_split}"
  kind = f"{config.noise.kind} noise {labels.rate:.3g}"
  return {
    "dataset": f"{name} {train_set.fingerprint[:16]}",
    "labels": f"{kind} {_digest(labels)}",
  }


def check_manifest(path: str | os.PathLike[str]) -> None:
  """Refuses a file that isn't the one named in its folder's manifest.

  A whole file of the same kind in its place has a right checksum of its own.

  Args:
    path: of a filter or a selection. Where it has no `manifest.json` beside it,
      or one that doesn't name it, nothing is known about it.

  Raises:
    OSError: the system refuses.
    ValueError: a manifest that is damaged, or another file.
  """
  path = pathlib.Path(path)
  manifest = path.with_name(MANIFEST_FILE)
  if not manifest.exists():
    return
  about = _files.read_json(
    manifest, remedy="Run the job again that wrote it, or move it away."
  )
  sums = about.get("sha256")
  stated = sums.get(path.name) if isinstance(sums, dict) else None
  if stated is None:
    return
  found = file_sha256(path)
  if found != stated:
    raise ValueError(
      f"{path} is not the file that {manifest} speaks of: its SHA-256 begins"
      f" with {found[:12]}, expected {str(stated)[:12]!r}. Run the job again"
      " that wrote them."
    )


def file_sha256(path: pathlib.Path) -> str:
  """Computes the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def own_labels(
  file: pathlib.Path, prints: Mapping[str, str]
) -> noise.NoisyLabels:
  """Reads the labels in a run's folder, if they are those of its ledger.

  Args:
    file: the run's `labels.npz`.
    prints: the ledger's fingerprints; labels without one there are not
      compared.

  Returns:
    The labels.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or of another run.
  """
  labels, _ = noise.load(file)
  theirs = prints.get("labels", "").split()[-1:]
  found = _digest(labels)
  if theirs and theirs[0] != found:
    raise ValueError(
      f"{file} is of another run: its labels have the fingerprint {found!r},"
      f" and the scores beside it were made with labels of {theirs[0]!r}."
      " Restore the one that doesn't belong there."
    )
  return labels


def _digest(labels):
  content = np.asarray(labels.labels, "<i4").tobytes()
  return hashlib.sha256(content).hexdigest()[:16]


def read(
  path: str,
  config: config_dict.ConfigDict,
  train_set: sources.Source,
  labels: noise.NoisyLabels,
) -> np.ndarray:
  """Reads the positions that a filter keeps; counts ids that are missing.

  Args:
    path: as `apply` takes it. Ids are positions, or the data set's own
      (`train_set.ids`).
    config: the run's.
    train_set: the samples to choose from.
    labels: the labels that the learner is given.

  Returns:
    Positions [M], ascending. How many ids the data set lacks is logged.

  Raises:
    FileNotFoundError, ValueError: as `apply`.
  """
  applied = apply(
    path, train_set.ids, fingerprints=fingerprints(config, train_set, labels)
  )
  if applied.missing:
    logging.warning(
      "%d of the %d ids in %s are not in %s %s; the other %d are trained on.",
      applied.missing,
      applied.kept + applied.missing,
      path,
      config.data.name,
      config.data.train_split,
      applied.kept,
    )
  return np.flatnonzero(applied.mask)


def apply(
  path: str,
  pool: np.ndarray,
  *,
  fingerprints: Mapping[str, str] | None = None,
  noun: str = "samples",
) -> "gm.filters.Applied":
  """Applies the filter in a file to the ids of a data set.

  Args:
    path: of a `.npy` file of ids to keep, a selection as `.parquet` or `.csv`,
      or the decisions (`.csv`) made on the page of one. Ids are positions, or
      those in `pool`.
    pool: ids [N] of the samples to choose from.
    fingerprints: of the data, which the file's must not contradict.
    noun: the samples, for the error.

  Returns:
    The mask [N], and how many ids are kept and missing.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a file of another kind or for other data, ids of another kind,
      or nothing is left.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"config.data.filter is {path!r}, and there is no such file; expected a"
      " .npy file of the ids to keep, or a selection as .parquet or .csv."
    )
  suffix = pathlib.Path(path).suffix
  if suffix not in _SUFFIXES:
    raise ValueError(
      f"config.data.filter is {path!r}; expected a file that ends with one of"
      f" {', '.join(_SUFFIXES)}."
    )
  try:
    check_manifest(path)
    chosen, pool = _chosen(path, pool, fingerprints)
    applied = chosen.apply(pool)
  except (ValueError, TypeError) as error:
    raise ValueError(f"config.data.filter {path!r}: {error}") from error
  if not applied.kept:
    raise ValueError(
      f"config.data.filter {path!r} keeps none of the {len(pool)} {noun}; its"
      f" {len(chosen)} ids are of another data set, or it is empty."
    )
  return applied


def _chosen(path, pool, fingerprints):
  """Returns the filter in a file, and the pool in its kind of ids."""
  suffix = pathlib.Path(path).suffix
  if suffix == ".csv" and gm.decisions.holds_decisions(path):
    decisions = gm.read_decisions(path)
    if len(decisions) and decisions.ids.dtype.kind == "i":
      _check_positions(decisions.unsure, pool)
      pool = np.arange(len(pool))
    if left_out := int(decisions.relabelled.sum()):
      logging.warning(
        "%d samples in %s have new labels, which a filter can't give them; they"
        " are left out.",
        left_out,
        path,
      )
    return gm.filters.of_decisions(decisions, pool), pool
  chosen = gm.export.read_filter(path, source=path, fingerprints=fingerprints)
  if chosen.ids.dtype.kind == "i":
    _check_positions(
      suffix == ".csv" and not os.path.exists(path + ".json"), pool
    )
    pool = np.arange(len(pool))
  return chosen, pool


def _check_positions(unsure, ids):
  """Refuses integers that a spreadsheet may have made of the set's own ids."""
  if unsure and np.strings.isdigit(ids).all():
    raise ValueError(
      "its ids are integers without quotes, and so may be positions, or the"
      f" data set's own ids, such as {str(ids[0])!r}, as another tool rewrites"
      " them. Put ids in quotes, or give the file of experiments.select with"
      " the .json beside it."
    )
