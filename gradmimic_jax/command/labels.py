"""Labels from a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradmimic_jax import _files, _frames
from gradmimic_jax.command import tables
from gradmimic_jax.selection import _ids


def read_labels(
  text: str, ids: np.ndarray, file: tables.File | None
) -> np.ndarray:
  """Reads labels from a file of their own, for the samples in order.

  Args:
    text: the value of `--labels`.
    ids: the samples' [N].
    file: the scores' table, for the error; None: they are a ledger's.

  Returns:
    Labels [N], integers or strings.

  Raises:
    ValueError: neither a column nor a file, another number of labels, samples
      without one.
  """
  path = Path(text)
  if not path.is_file():
    if file is None:
      raise ValueError(f"--labels is {text!r}, and there is no such file.")
    raise ValueError(
      f"--labels is {text!r}, neither a column of {file.path} nor a file. The"
      f" columns are {tables.shown(file.names)}."
    )
  suffix = path.suffix.lower()
  if suffix in (".npy", ".txt"):
    if suffix == ".npy":
      labels = tables.as_labels(_files.read_npy(path))
    else:
      lines = bytes(_files.read_bytes(path)).decode("utf-8").splitlines()
      labels = tables.as_labels(np.array(lines, np.str_))
    return _in_order(labels, ids, path)
  own = tables.File(path)
  id_name = tables.find_id(own)
  others = [name for name in own.names if name not in (id_name, "")]
  named = [n for n in others if _frames.is_label_name(n)] or others
  if len(named) != 1:
    raise ValueError(
      f"--labels: {path} has the columns {tables.shown(own.names)}; expected"
      " one of ids and one named label."
    )
  labels = own.labels(named[0])
  if id_name is None:
    return _in_order(labels, ids, path)
  theirs = own.ids(id_name)
  if not _ids.same_kind(theirs, ids):
    raise ValueError(
      f"--labels: {path} has ids such as {theirs[0].item()!r}, and the scores"
      f" {ids[0].item()!r}; expected the same kind."
    )
  rows, missing = _ids.find(theirs, ids)
  if len(missing):
    raise ValueError(
      f"--labels: {path} has no label for {len(missing):,} of {len(ids):,}"
      f" samples, the first is {missing[0].item()!r}."
    )
  return labels[rows]


def _in_order(labels: np.ndarray, ids: np.ndarray, path: Path) -> np.ndarray:
  if labels.shape != ids.shape:
    raise ValueError(
      f"--labels: {path} has {labels.size:,} labels, and there are"
      f" {len(ids):,} samples; expected one a sample, in the table's order."
    )
  return labels
