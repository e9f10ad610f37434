"""Batches that are read while the steps before them run."""

import collections
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

# Reads in memory beside the one that is being made.
_DEPTH = 2


class Read(NamedTuple):
  """The batches of a call of several steps, and where to go on after them."""

  packed: Any  # what `pack` made of them
  position: Any  # the iterator's state, to go on after these batches
  epochs: tuple[int | None, ...]  # the iterator's `epoch` after each, if any


class Position:
  """An iterator's state, in place of an iterator whose state is saved."""

  def __init__(self, state: Any):
    self._state = state

  def get_state(self) -> Any:
    """Returns the state."""
    return self._state


class Reader:
  """Reads an iterator in a thread, a few calls' batches ahead.

  Nothing but the iterator and `pack` are called there: programs of several
  processes must start in the same order everywhere, so the main thread starts
  them all. The first batch is read at once; how many go together may depend on
  it.

  Attributes:
    waited: total seconds spent in `next` with no step running.
  """

  def __init__(self, batches: Any):
    """Starts to read the first batch.

    Args:
      batches: an iterator with `get_state`.
    """
    self.waited = 0.0
    self._batches = batches
    self._first: queue.Queue[Any] = queue.Queue(1)
    self._plan: queue.Queue[Any] = queue.Queue(1)
    self._queue: queue.Queue[Any] = queue.Queue(_DEPTH)
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._read, name="reader", daemon=True
    )
    self._thread.start()

  def first(self) -> Any:
    """Waits for the first batch, and returns it; raises its error."""
    return _raised(self._first.get())

  def start(
    self, counts: Iterable[int], pack: Callable[[list[Any]], Any]
  ) -> None:
    """Reads on, after `first`.

    Args:
      counts: how many batches go together, time after time; no more than these
        are read, so that an iterator that counts its samples stops with the
        steps.
      pack: is called with each such list, on the host alone.
    """
    self._plan.put((counts, pack))

  def next(self, until_idle: Callable[[], Any]) -> Read:
    """Returns the next batches; raises the error of their reading.

    Args:
      until_idle: returns when all steps so far are done. Until then, waiting
        for batches costs nothing.

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
    return _raised(item)

  def close(self) -> None:
    """Stops reading; waits for the batch that is being read."""
    self._stop.set()
    self._plan.put(None)
    self._thread.join()

  def _read(self):
    try:
      read = [self._next()]
    except BaseException as error:  # of any kind: the main thread raises it
      self._first.put(error)
      return
    self._first.put(read[0][0])
    plan = self._plan.get()
    if plan is None:
      return
    counts, pack = plan
    try:
      for count in counts:
        while len(read) < count:
          read.append(self._next())
        batches, epochs = zip(*read, strict=True)
        position = self._batches.get_state()
        if not self._put(Read(pack(list(batches)), position, epochs)):
          return
        read = []
    except BaseException as error:
      self._put(error)

  def _next(self):
    batch = next(self._batches)
    return batch, getattr(self._batches, "epoch", None)

  def _put(self, item):
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        pass
    return False


def bounded(outputs: Iterable[Any], ahead: int = 2) -> Iterator[Any]:
  """Goes over what is being computed, a few outputs ahead.

  A program that was started holds its inputs on the devices until it is done:
  without a bound, that may be a whole data set.

  Args:
    outputs: each one starts a program, and is the tree of what it computes.
    ahead: how many may be under way.

  Yields:
    The outputs.
  """
  waiting: collections.deque[Any] = collections.deque()
  for output in outputs:
    waiting.append(output)
    if len(waiting) >= ahead:
      jax.block_until_ready(waiting.popleft())
    yield output


def _raised(item):
  if isinstance(item, BaseException):
    raise item
  return item
