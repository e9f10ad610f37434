"""Pairs that other processes read: each its own shards, batches in turn."""

import json
from typing import Any

import grain
import numpy as np

from experiments.data import workers
from experiments.data.pairs.shard_samples import Statistics
from experiments.data.rows import check_state

_STATE = "state"  # of the reader after a batch, among the batch's arrays
_AHEAD = 1  # batches of each reader that wait, beside the one in the making


class ReadersIterator(grain.DatasetIterator):
  """Takes batches of a stream's parts in turn; each has a process.

  Its state has the parts' states: the last batch that was taken counts, not
  those that the processes have ready. Arrays come through shared memory.

  Attributes:
    statistics: Counts so far, of all parts.
    epoch: The pass over the part's shards in which the last batch began.
  """

  def __init__(self, stream: Any):
    """Starts no process yet.

    Args:
      stream: The `shards.ShardStream`; has at least one reader.
    """
    super().__init__()
    self._stream, self._parts = stream, stream.split()
    self._readers: list[Any] = []  # none until a batch is asked for
    self._states: list[str] = ["" for _ in self._parts]  # "": the beginning
    self._ended = [False for _ in self._parts]
    self._turn = 0
    self.epoch = 0

  @property
  def statistics(self) -> Statistics:
    """Counts so far; those of the parts, added up."""
    found = Statistics()
    for state in filter(None, self._states):
      found.add(Statistics(**json.loads(state)["statistics"]))
    return found

  def get_state(self) -> dict[str, Any]:
    """Returns the place, for `set_state`."""
    return {
      "fingerprint": self._stream.fingerprint,
      "parts": list(self._states),
      "ended": list(self._ended),
      "turn": self._turn,
      "epoch": self.epoch,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a place; ValueError if it is one of other data or settings."""
    check_state(state, self._stream.fingerprint)
    self._end()
    self._states, self._ended = list(state["parts"]), list(state["ended"])
    self._turn, self.epoch = state["turn"], state["epoch"]

  def close(self) -> None:
    """Ends the processes."""
    super().close()
    self._end()

  def _end(self):
    for reader in self._readers:
      reader.close()
    self._readers = []

  def _start(self):
    workers.prepare_flags()
    options = grain.MultiprocessingOptions(
      num_workers=1, per_worker_buffer_size=_AHEAD
    )
    self._readers = [
      iter(_Part(part, state).mp_prefetch(options, workers.begin))
      for part, state in zip(self._parts, self._states, strict=True)
    ]
    for reader in self._readers:
      reader.start_prefetch()  # all at once

  def __next__(self) -> dict[str, np.ndarray]:
    self._assert_not_closed()
    if not self._readers:
      self._start()
    count = len(self._ended)
    while not all(self._ended):
      mine, self._turn = self._turn, (self._turn + 1) % count
      if self._ended[mine]:
        continue
      try:
        batch = next(self._readers[mine])
      except StopIteration:
        self._ended[mine] = True
        continue
      except RuntimeError as error:
        if workers.is_end(error):
          what = f"the {count} processes that read shards (config.data.readers)"
          raise workers.WorkerError(what, error) from error
        raise
      self._states[mine] = str(batch.pop(_STATE))
      self.epoch = int(batch.pop("epoch"))
      # Of all parts, each has numbers of its own.
      index = batch["index"]
      batch["index"] = np.where(index < 0, index, index * count + mine)
      return batch
    raise StopIteration


class _Part(grain.IterDataset):
  """A part of a stream, from a state on; its batches have the state after."""

  def __init__(self, stream, state):
    super().__init__()
    self._stream, self._state = stream, state

  def __iter__(self):
    return _PartIterator(self._stream, self._state)


class _PartIterator(grain.DatasetIterator):
  """Goes through a `_Part`, in the process that reads."""

  def __init__(self, stream, state):
    super().__init__()
    self._own, self._from = stream, state
    self._iterator = None  # where grain looks at this one only, none is made

  def __next__(self):
    if self._iterator is None:
      self._iterator = iter(self._own)
      if self._from:
        self._iterator.set_state(json.loads(self._from))
    batch = next(self._iterator)
    return {
      **batch,
      _STATE: json.dumps(self._iterator.get_state()),
      "epoch": self._iterator.epoch,
    }

  def get_state(self):
    """Returns nothing: batches have it."""
    return {}

  def set_state(self, state):
    """Does nothing."""
