"""Batches of image-text pairs from memory, alike those from shards.

A training loop sees the same from `Pairs` and from `shards.ShardStream`: a
grain data set with a `fingerprint`, whose iterator gives batches with "image"
(uint8), "text", "uid", "index" and "mask" and has a small JSON state, which one
of other data or settings refuses. Either goes on for as long as the loop asks:
a budget of samples seen is a number of steps, samples over rows in a batch.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from experiments.data import pipeline, streams


class Pairs(grain.IterDataset):
  """Pairs in memory, in epochs that are each a fresh permutation.

  The batch of a step depends on seed and step alone, so processes agree on it:
  each takes its own rows of one batch of `batch_size * process_count`.

  Args:
    images: uint8 [N, S, S, 3].
    text: Tokens, integers [N, L].
    uids: str [N], each one different.
    batch_size: Rows in a batch of this process, B.
    seed: Not negative; None keeps the order, for evaluation.
    num_epochs: When to stop; None goes on for ever.
    indices: Positions [M] of the pairs to go over; None takes all. "index"
      stays the position among all N.
    drop_last: Whether to leave out what doesn't fill the last batch of an
      epoch; else that batch is padded and masked.
    process_index: Which process this is.
    process_count: Of how many.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """

  def __init__(
    self,
    images: np.ndarray,
    text: np.ndarray,
    uids: np.ndarray,
    *,
    batch_size: int,
    seed: int | None,
    num_epochs: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    drop_last: bool = False,
    process_index: int = 0,
    process_count: int = 1,
  ):
    super().__init__()
    uids = np.asarray(uids)
    if images.dtype != np.uint8 or np.asarray(text).dtype.kind not in "iu":
      raise TypeError(
        f"images must be uint8 and text integers, got {images.dtype} and"
        f" {np.asarray(text).dtype}"
      )
    if (
      images.ndim != 4
      or np.ndim(text) != 2
      or not len(images) == len(text) == len(uids)
    ):
      raise ValueError(
        "expected images [N, H, W, C], text [N, L] and uids [N], got"
        f" {images.shape}, {np.shape(text)} and {uids.shape}"
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
    rows = np.arange(len(images)) if indices is None else np.asarray(indices)
    if rows.dtype.kind not in "iu" or rows.ndim != 1 or not len(rows):
      raise ValueError(
        "indices must be positions [M], at least one; got"
        f" {rows.dtype} {rows.shape}"
      )
    if rows.min() < 0 or rows.max() >= len(images):
      raise ValueError(
        f"indices must lie in 0 .. {len(images) - 1}, got"
        f" {rows.min()} .. {rows.max()}"
      )
    if len(np.unique(rows)) < len(rows):
      raise ValueError("indices must differ; an epoch takes each pair once")
    self.batch_rows = everywhere = batch_size * process_count
    self.steps_per_epoch = pipeline.steps_per_epoch(len(rows), everywhere)
    if drop_last:
      self.steps_per_epoch = len(rows) // everywhere
    if not self.steps_per_epoch:
      raise ValueError(
        f"{len(rows)} pairs don't fill one batch of {everywhere}; choose a"
        " smaller batch_size, or drop_last=False"
      )
    self.images, self.uids, self.rows = images, uids, rows
    self.text = np.asarray(text).astype(np.int32)
    self.batch_size, self.seed, self.num_epochs = batch_size, seed, num_epochs
    self.process_index, self.process_count = process_index, process_count
    self.fingerprint = self._fingerprint(drop_last)
    # One epoch's order; several iterators may go over it.
    self._order = functools.lru_cache(maxsize=2)(self._draw_order)

  def __iter__(self) -> "PairsIterator":
    return PairsIterator(self)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a step, whatever came before."""
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
      "image": self.images[rows],
      "text": self.text[rows],
      "uid": np.where(mask, self.uids[rows], ""),
      "index": np.where(mask, rows, -1).astype(np.int64),
      "mask": mask,
    }

  def _draw_order(self, epoch: int) -> np.ndarray:
    if self.seed is None:
      return self.rows
    rng = np.random.default_rng((self.seed, streams.ORDER, epoch))
    return rng.permutation(self.rows)

  def _fingerprint(self, drop_last: bool) -> str:
    settings = {
      "batch_size": self.batch_rows,  # by any number of processes
      "seed": self.seed,
      "num_epochs": self.num_epochs,
      "drop_last": bool(drop_last),
      "images": list(self.images.shape),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(json.dumps(self.uids.tolist()).encode())
    for array in (self.images, self.text, self.rows.astype("<i8")):
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


class PairsIterator(grain.DatasetIterator):
  """Goes through `Pairs`; its state is the number of the next step."""

  def __init__(self, pairs: Pairs):
    """Starts at the first step."""
    super().__init__()
    self._pairs, self._step = pairs, 0

  def __next__(self) -> dict[str, np.ndarray]:
    epochs = self._pairs.num_epochs
    if (
      epochs is not None and self._step >= epochs * self._pairs.steps_per_epoch
    ):
      raise StopIteration
    batch = self._pairs.batch(self._step)
    self._step += 1
    return batch

  @property
  def epoch(self) -> int:
    """The pass over the data that the last batch was of."""
    return max(self._step - 1, 0) // self._pairs.steps_per_epoch

  def get_state(self) -> dict[str, Any]:
    """The fingerprint and the number of the next step."""
    return {"fingerprint": self._pairs.fingerprint, "step": self._step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a step; ValueError if the state is one of other data."""
    check_state(state, self._pairs.fingerprint)
    self._step = int(state["step"])


def check_state(state: dict[str, Any], fingerprint: str) -> None:
  """Raises ValueError unless the state is one of the data it is given to."""
  if state.get("fingerprint") != fingerprint:
    raise ValueError(
      "the saved place in the data is one of other data or settings"
      f" (fingerprint {state.get('fingerprint')!r}, expected {fingerprint!r});"
      " restore with those of the run"
    )
