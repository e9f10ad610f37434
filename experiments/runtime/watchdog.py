"""Ends a process that hangs, so that nobody waits for it for ever."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

# The exit status of a process that was ended: "temporary failure, try again".
EXIT_STATUS = 75

_last_sign = 0.0


def sign() -> None:
  """Tells that this process moves."""
  global _last_sign
  _last_sign = time.monotonic()


@contextlib.contextmanager
def watching(seconds: float, *, what: str) -> Iterator[None]:
  """Ends the process when it gives no sign of life for so long.

  The end writes a line and all threads' stacks to stderr, without clean-up,
  which would hang as well: `os._exit(75)`. Saved files are whole.

  Args:
    seconds: how long; 0 doesn't watch.
    what: the watched work, for the message.

  Yields:
    Nothing; watching ends with the block.
  """
  if seconds < 0:
    raise ValueError(
      f"config.faults.stall_seconds is {seconds}; expected at least 0."
    )
  if not seconds:
    yield
    return
  sign()
  done = threading.Event()
  thread = threading.Thread(
    target=_watch, args=(seconds, what, done), name="watchdog", daemon=True
  )
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _watch(seconds, what, done):
  while not done.wait(min(1, seconds / 10)):
    silent = time.monotonic() - _last_sign
    if silent > seconds:
      _end(f"error: {what} has not moved for {silent:.0f} seconds")


def _end(message):
  # Straight to the descriptor: a thread that hangs may hold a stream's lock.
  text = (
    f"{message} (config.faults.stall_seconds); another process hangs or is"
    " lost, or this one does. Where it stands:\n"
  )
  os.write(2, text.encode())
  faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
  os.write(2, b"The same command goes on from the last checkpoint.\n")
  os._exit(EXIT_STATUS)
