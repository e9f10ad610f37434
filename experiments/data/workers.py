"""Processes that read for this one: their start, and their end."""

import os
import signal
import threading
from multiprocessing import connection, parent_process

from absl import flags


class WorkerError(RuntimeError):
  """A process that reads for this one has ended."""

  def __init__(self, what: str, cause: BaseException):
    """Says what to do.

    Args:
      what: Which processes, and by what field of the config.
      cause: The error that told of it.
    """
    super().__init__(
      f"one of {what} has ended: {cause} Start the run again: it goes on from"
      " its last checkpoint."
    )


def is_end(error: RuntimeError) -> bool:
  """True for the error by which grain tells that a process has ended."""
  return "terminated" in str(error)


def prepare_flags() -> None:
  """Lets grain look at its own flags outside of jobs."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def begin(number: int, count: int) -> None:
  """Goes first in each process, as grain's `worker_init_fn`.

  Ctrl-C reaches all processes of a terminal: this one's owner saves, and ends
  it. If that one is killed, this one would wait for it for ever.

  Args:
    number: Of this process.
    count: Of them all.
  """
  del number, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner():
  owner = parent_process()
  if owner is not None:
    connection.wait([owner.sentinel])
    os._exit(1)
