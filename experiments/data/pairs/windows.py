"""Windows of a stream of pairs: consecutive samples of shards, shuffled.

The next window is read in a thread while the samples of this one are decoded.
What was counted while a window was read is handed over with it, so that counts
are the same whether or not it was read ahead.
"""

import copy
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from experiments.data import purposes
from experiments.data.pairs import shard_samples
from experiments.data.pairs.shard_samples import Sample, Statistics

_END = object()


class Place(NamedTuple):
  """The place in the shards where a window begins."""

  epoch: int
  shard: int  # In the order of the epoch.
  record: int  # Samples before it in that shard, broken ones included.


class Window(NamedTuple):
  """Samples that are shuffled at once."""

  place: Place
  following: Place  # Where the next one begins.
  samples: list[Sample]  # None at the end of an epoch.
  found: Statistics  # Of reading it.


class Windows:
  """Reads the windows of a stream of shards, one ahead."""

  def __init__(self, stream: Any, *, ahead: bool):
    """Starts no thread yet.

    Args:
      stream: The `shards.ShardStream`.
      ahead: Whether to read the next window in a thread.
    """
    self._stream = stream
    self._counts = Statistics()
    self._shard: Iterator[Sample | None] | None = None  # The one that is open.
    self._shard_place: Place | None = None
    self._pool = futures.ThreadPoolExecutor(1) if ahead else None
    self._next: tuple[Place, futures.Future[Window]] | None = None

  def read(self, place: Place) -> Window:
    """Reads the window at a place; its samples are in their final order."""
    if self._pool is None:
      return self._read(place)
    expected, found = self._next or (None, None)
    self._next = None
    if found is not None and expected != place:
      futures.wait([found])  # It has the shards.
      found = None
    window = self._read(place) if found is None else found.result()
    following = window.following
    if following.shard == len(self._stream.order(following.epoch)):
      following = Place(following.epoch + 1, 0, 0)
    last = self._stream.num_epochs
    if window.samples and (last is None or following.epoch < last):
      self._next = following, self._pool.submit(self._read, following)
    return window

  def close(self) -> None:
    """Ends the thread, and closes the shard that is open."""
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
    self._next = self._shard = None

  def _read(self, place: Place) -> Window:
    stream = self._stream
    order = stream.order(place.epoch)
    samples: list[Sample] = []
    uids: set[str] = set()
    size, (epoch, shard, record) = 0, place
    while shard < len(order) and len(samples) < stream.window:
      if size >= stream.limits.window_bytes:
        break
      sample = self._read_sample(order[shard], Place(epoch, shard, record))
      if sample is _END:
        shard, record = shard + 1, 0
        continue
      record += 1
      if sample is None:
        continue
      if sample.uid in uids:
        self._counts.add_noted("uid repeated", sample.shard, sample.key)
      uids.add(sample.uid)
      samples.append(sample)
      size += len(sample.image) + len(sample.caption)
    if stream.seed is not None:
      rng = np.random.default_rng((stream.seed, purposes.WINDOW, *place))
      samples = [samples[row] for row in rng.permutation(len(samples))]
    # In place, for the shard that is open counts there.
    found = copy.deepcopy(self._counts)
    vars(self._counts).update(vars(Statistics()))
    return Window(place, Place(epoch, shard, record), samples, found)

  def _read_sample(self, path: str, place: Place) -> Any:
    """Reads the sample at a place; None if it is broken, _END at the end."""
    if self._shard is None or self._shard_place != place:
      self._shard = shard_samples.read(
        path,
        self._counts,
        skip=place.record,
        keep=self._stream.keep,
        uid_source=self._stream.uid_source,
        parts=self._stream.parts,
        limits=self._stream.limits,
      )
    sample = next(self._shard, _END)
    self._shard_place = place._replace(record=place.record + 1)
    if sample is _END:
      self._shard = None
    return sample
