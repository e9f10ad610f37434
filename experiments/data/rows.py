"""Rows of arrays in memory, in batches: shuffled, resumable at any step.

The batch of a step depends on seed and step alone, so processes agree on it:
each takes its own rows of one batch of all of them.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from experiments.data import purposes, stream


class Rows(grain.IterDataset):
  """Rows in memory, in epochs that are each a fresh permutation.

  A batch has the rows of all arrays, besides "uid", "index" and "mask".

  Args:
    arrays: By their names in a batch, each [N, ...].
    uids: str [N], each one different.
    batch_size: Rows in a batch of this process, B.
    seed: Not negative; None keeps the order, for evaluation.
    num_epochs: Number of epochs; None goes on for ever.
    indices: Positions [M] of the rows to go over; None takes all. "index" stays
      the position among all N.
    drop_last: Whether to leave out an epoch's last batch if rows don't fill it;
      else that batch is padded and masked.
    process_index: This process's number.
    process_count: Number of processes.
    about: Further inputs of the fingerprint.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """

  noun = "row"  # the word for a row in error messages

  def __init__(
    self,
    arrays: Mapping[str, np.ndarray],
    uids: np.ndarray,
    *,
    batch_size: int,
    seed: int | None,
    num_epochs: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    drop_last: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    about: Mapping[str, Any] | None = None,
  ):
    super().__init__()
    uids = np.asarray(uids)
    count = len(uids)
    for name, array in arrays.items():
      if len(array) != count:
        raise ValueError(
          f"expected as many {name} as uids, {count}, got {array.shape}"
        )
    for name, value, least in (
      ("batch_size", batch_size, 1),
      ("seed", 0 if seed is None else seed, 0),
      ("num_epochs", 1 if num_epochs is None else num_epochs, 1),
      ("process_count", process_count, 1),
    ):
      if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= process_index < process_count:
      raise ValueError(
        f"process_index must lie in 0 .. {process_count - 1}, got"
        f" {process_index}"
      )
    rows = np.arange(count) if indices is None else np.asarray(indices)
    if rows.dtype.kind not in "iu" or rows.ndim != 1 or not len(rows):
      raise ValueError(
        "indices must be positions [M], at least one; got"
        f" {rows.dtype} {rows.shape}"
      )
    stream.check_positions(rows, count, self.noun)
    self.batch_rows = everywhere = batch_size * process_count
    self.steps_per_epoch = stream.steps_per_epoch(len(rows), everywhere)
    if drop_last:
      self.steps_per_epoch = len(rows) // everywhere
    if not self.steps_per_epoch:
      raise ValueError(
        f"{len(rows)} {self.noun}s don't fill one batch of {everywhere};"
        " choose a smaller batch_size, or drop_last=False"
      )
    self.arrays, self.uids, self.rows = dict(arrays), uids, rows
    self.batch_size, self.seed, self.num_epochs = batch_size, seed, num_epochs
    self.process_index, self.process_count = process_index, process_count
    self.fingerprint = self._fingerprint(drop_last, about or {})
    # One epoch's order; several iterators may go over it.
    self._order = functools.lru_cache(maxsize=2)(self._draw_order)

  def __iter__(self) -> "RowsIterator":
    return RowsIterator(self)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Makes the batch of a step, whatever came before."""
    epoch, step = divmod(step, self.steps_per_epoch)
    size = self.batch_size
    start = (step * self.process_count + self.process_index) * size
    order = self._order(epoch)
    rows = order[start : start + size]
    mask = np.arange(size) < len(rows)
    # A real row, so that a model's statistics and finiteness don't suffer: the
    # first one of the batch of all processes.
    padding = order[step * self.batch_rows]
    rows = np.append(rows, np.full(size - len(rows), padding))
    return {
      **{name: array[rows] for name, array in self.arrays.items()},
      "uid": np.where(mask, self.uids[rows], ""),
      "index": np.where(mask, rows, -1).astype(np.int64),
      "mask": mask,
    }

  def _draw_order(self, epoch: int) -> np.ndarray:
    if self.seed is None:
      return self.rows
    rng = np.random.default_rng((self.seed, purposes.ORDER, epoch))
    return rng.permutation(self.rows)

  def _fingerprint(self, drop_last: bool, about: Mapping[str, Any]) -> str:
    settings = {
      "batch_size": self.batch_rows,  # by any number of processes
      "seed": self.seed,
      "num_epochs": self.num_epochs,
      "drop_last": bool(drop_last),
      **about,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(json.dumps(self.uids.tolist()).encode())
    for array in (*self.arrays.values(), self.rows.astype("<i8")):
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


class RowsIterator(grain.DatasetIterator):
  """Goes through `Rows`; its state is the number of the next step."""

  def __init__(self, rows: Rows):
    """Starts at the first step."""
    super().__init__()
    self._rows, self._step = rows, 0

  def __next__(self) -> dict[str, np.ndarray]:
    epochs = self._rows.num_epochs
    if epochs is not None and self._step >= epochs * self._rows.steps_per_epoch:
      raise StopIteration
    batch = self._rows.batch(self._step)
    self._step += 1
    return batch

  @property
  def epoch(self) -> int:
    """The pass over the data that the last batch belongs to."""
    return max(self._step - 1, 0) // self._rows.steps_per_epoch

  def get_state(self) -> dict[str, Any]:
    """Returns the fingerprint and the number of the next step."""
    return {"fingerprint": self._rows.fingerprint, "step": self._step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a step; ValueError if the state is that of other data."""
    check_state(state, self._rows.fingerprint)
    self._step = int(state["step"])


def check_state(state: dict[str, Any], fingerprint: str) -> None:
  """Raises ValueError unless the state belongs to the data."""
  if state.get("fingerprint") != fingerprint:
    raise ValueError(
      "the saved place in the data is one of other data or settings"
      f" (fingerprint {state.get('fingerprint')!r}, expected {fingerprint!r});"
      " restore with those of the run"
    )
