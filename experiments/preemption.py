"""SIGTERM: a run is asked to save and to leave."""

import itertools
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

# Processes agree on a call to stop at, not on a step: a job may have several
# runs, all of whose steps begin at 0.
_calls = itertools.count(1)
# For the job's next run, where one came to its end before it could stop.
_asked = threading.Event()


class PreemptedError(SystemExit):
  """Ends the job with status 0 once the run is saved."""

  def __init__(self, message: str):
    super().__init__(0)
    self.message = message

  def __str__(self):
    return self.message


class Preemption:
  """Knows of a SIGTERM to this process, or to another one of its job.

  Of several processes, JAX's own notifier has taken the signal when they met.
  """

  def __init__(self) -> None:
    self._previous: object = None
    self._listens = (
      jax.process_count() == 1
      and threading.current_thread() is threading.main_thread()
    )
    if self._listens:
      self._previous = signal.signal(signal.SIGTERM, self._note)

  def _note(self, *_):
    _asked.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it now

  def reached(self) -> bool:
    """Whether to stop now; the same in all processes, which all have to ask."""
    if jax.process_count() > 1:
      asked = multihost_utils.reached_preemption_sync_point(next(_calls))
      if asked and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
      return asked
    return _asked.is_set()

  def leave(self, step: int, folder: object) -> None:
    """Says what happened, and raises PreemptedError."""
    _asked.clear()
    message = (
      f"SIGTERM: saved {folder} at step {step}; the same command goes on there"
    )
    if jax.process_index() == 0:
      print(message, file=sys.stderr, flush=True)
    raise PreemptedError(message)

  def close(self) -> None:
    """Gives the signal back."""
    if self._listens and not _asked.is_set():
      signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
