"""Batches that are read while the steps before them run."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Batches in memory beside the one that is being read.
_DEPTH = 2


class Read(NamedTuple):
  """A batch, and its iterator's state right after it."""

  batch: Any
  position: Any  # the iterator's state, to go on after this batch
  epoch: int | None  # the iterator's `epoch`, if it has one


class Position:
  """An iterator's state, in place of an iterator whose state is saved."""

  def __init__(self, state: Any):
    self._state = state

  def get_state(self) -> Any:
    """Returns the state."""
    return self._state


class Reader:
  """Reads an iterator in a thread, a few batches ahead.

  Nothing but the iterator is called there: programs of several processes must
  start in the same order everywhere, so the main thread starts them all.

  Attributes:
    waited: total seconds spent in `next` with no step running.
  """

  def __init__(self, batches: Any, *, count: int):
    """Starts to read.

    Args:
      batches: an iterator with `get_state`.
      count: number of batches to read, so that an iterator that counts its
        samples stops with the steps.
    """
    self.waited = 0.0
    self._queue: queue.Queue[Any] = queue.Queue(_DEPTH)
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._read, args=(batches, count), name="reader", daemon=True
    )
    self._thread.start()

  def next(self, until_idle: Callable[[], Any]) -> Read:
    """Returns the next batch; raises the error of its reading.

    Args:
      until_idle: returns when all steps so far are done. Until then, waiting
        for a batch costs nothing.

    Returns:
      The Read.
    """
    try:
      item = self._queue.get_nowait()
    except queue.Empty:
      until_idle()
      since = time.perf_counter()
      item = self._queue.get()
      self.waited += time.perf_counter() - since
    if isinstance(item, BaseException):
      raise item
    return item

  def close(self) -> None:
    """Stops reading; waits for the batch that is being read."""
    self._stop.set()
    self._thread.join()

  def _read(self, batches, count):
    try:
      for _ in range(count):
        batch = next(batches)
        epoch = getattr(batches, "epoch", None)
        if not self._put(Read(batch, batches.get_state(), epoch)):
          return
    except BaseException as error:  # of any kind: the main thread raises it
      self._put(error)

  def _put(self, item):
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        pass
    return False
