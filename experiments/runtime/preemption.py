"""SIGTERM and Ctrl-C: they ask a run to save and to leave."""

import itertools
import os
import signal
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

# Names the status with which a job leaves: 0, unless its caller has to tell
# this from the job's end.
STATUS = "GRADMIMIC_STATUS_OF_SIGTERM"
STATUS_OF_CELLS = 128 + signal.SIGTERM
STATUS_OF_CTRL_C = 128 + signal.SIGINT

# Processes agree on a call to stop at, not on a step: a job may have several
# runs, whose steps all begin at 0.
_calls = itertools.count(1)
# A call for the job's next run, where one ended before it could stop.
_asked = threading.Event()
_signal = signal.SIGTERM  # the one that asked last
_job = False  # True if this process is a job, which ends once it leaves


class PreemptedError(SystemExit):
  """Ends the job once the run is saved: with status 0, or 130 after Ctrl-C."""

  code: int

  def __init__(self, message: str):
    status = int(os.environ.get(STATUS, 0))
    super().__init__(STATUS_OF_CTRL_C if _signal == signal.SIGINT else status)
    self.message = message

  def __str__(self):
    return self.message


class Preemption:
  """Notices a SIGTERM to this process, or to another one of its job.

  Of several processes, JAX's own notifier has taken the signal when they met.
  A single one notices Ctrl-C as well; the second one interrupts it at once.
  """

  def __init__(self) -> None:
    self._listens = (
      jax.process_count() == 1
      and threading.current_thread() is threading.main_thread()
    )
    self._previous = {
      number: signal.signal(number, _note)
      for number in (signal.SIGTERM, signal.SIGINT)
      if self._listens
    }

  def reached(self) -> bool:
    """True if the run is to stop now; all processes ask, and get one answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(next(_calls))
    return _asked.is_set()

  def leave(self, step: int, folder: object) -> NoReturn:
    """Prints where the run was saved, and raises PreemptedError."""
    leave(f"saved {folder} at step {step}; the same command goes on there")

  def close(self) -> None:
    """Gives the signal back."""
    for number, previous in self._previous.items():
      # `_note` puts Python's own in its place at the first Ctrl-C.
      if signal.getsignal(number) in (_note, signal.default_int_handler):
        signal.signal(number, previous or signal.SIG_DFL)


def listen() -> None:
  """Ends this process, a job, with status 0 at a SIGTERM before any loop."""
  global _job
  _job = True
  signal.signal(signal.SIGTERM, _end)


def leave_if_asked() -> None:
  """Leaves between two runs of a job."""
  if _asked.is_set():
    leave("the same command goes on from what is finished")


def ignore() -> None:
  """Lets no further SIGTERM disturb a job that is on its way out."""
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave(what: str) -> NoReturn:
  """Prints what happened, and raises PreemptedError.

  Args:
    what: the work that was done, and advice.

  Raises:
    PreemptedError: always.
  """
  _asked.clear()
  if _job:
    ignore()
  name = "Ctrl-C" if _signal == signal.SIGINT else "SIGTERM"
  message = f"{name}: {what}"
  # Asking which process this is would start the devices.
  if not jax.distributed.is_initialized() or jax.process_index() == 0:
    # Straight to the descriptor: the interrupted code may hold the stream.
    os.write(2, f"{message}\n".encode())
  raise PreemptedError(message)


def _note(number, _):
  global _signal
  _signal = signal.Signals(number)
  if number == signal.SIGINT:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  _asked.set()


def _end(*_):
  # Should something swallow the error, the loop still leaves.
  signal.signal(signal.SIGTERM, _note)
  try:
    leave("there was nothing to save; the same command goes on")
  finally:
    _asked.set()
    signal.signal(signal.SIGTERM, _note)
