"""Outputs of steps, on their way to the metrics and the ledger."""

import pathlib
import time
from typing import Any

import jax
import numpy as np

import gradmimic_jax as gm
from experiments.runtime import (
  distributed,
  metrics as writers,
  workdir as workdir_lib,
)

# Calls that may be under way: one runs, and the next one waits for it.
_AHEAD = 2
# Rows of the ledger in memory; they are written at checkpoints in any case.
_ROWS = 1 << 20
NONFINITE_FILE = "nonfinite.json"


class NonFiniteError(ValueError):
  """Too many steps in a row had no finite gradient."""


class StepLog:
  """Keeps step outputs on the device until a group of them is written.

  Fetching them call by call would make every call wait for the one before.
  Their copies to the host start as soon as a call is done; done calls are
  written while others run.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    metrics: writers.MetricsWriter | writers.Silence,
    ledger: gm.ScoreLedger | None,
    *,
    every: int,
    nonfinite_stop: int,
  ):
    """Prepares the log.

    Args:
      folder: the run's.
      metrics: for the steps' measurements, and their speed.
      ledger: for scores; None where the method has none.
      every: steps in a group, at least; calls are written whole.
      nonfinite_stop: skipped steps in a row that end the run; 0: none.
    """
    self._folder, self._metrics, self._ledger = folder, metrics, ledger
    self._every, self._nonfinite_stop = every, nonfinite_stop
    self._pending: list[tuple[int, Any, Any]] = []  # step, Taken, StepOutput
    self._skipped: list[tuple[int, list[Any]]] = []  # in a row: steps and ids
    self._since: float | None = None  # when the first call was compiled
    self._steps, self._waited = 0, 0.0
    self._rows = 0  # of the ledger, in memory
    self._last = 0  # the step that was written last
    # Since the last summary: the number of steps, and their scores.
    self._unshown, self._scores = 0, [np.zeros(0, np.float32)]

  def add(self, step: int, taken: Any, output: Any, waited: float) -> None:
    """Takes a call that was started; writes a group that is complete.

    Waits until no more than two calls are under way: more of them would keep
    their batches on the devices.

    Args:
      step: the number of the call's first step.
      taken: the `loop.Taken`; what of it is on the devices is let go.
      output: the call's `gradients.StepOutput`.
      waited: total seconds spent waiting for data.
    """
    for leaf in jax.tree.leaves(output):
      leaf.copy_to_host_async()
    taken = taken._replace(batch=None, reference=None)
    self._pending.append((step, taken, output))
    self._steps += len(taken.ids)
    if self._since is None:
      self.restart(waited)  # compiling is not measured
    if len(self._pending) > _AHEAD:
      jax.block_until_ready(self._pending[-_AHEAD - 1][-1].metrics)
    done = self._pending[:-_AHEAD]
    if sum(len(taken.ids) for _, taken, _ in done) >= self._every:
      self._write(len(done))
      self._write_speed(step + len(taken.ids) - 1, waited)

  def until_idle(self) -> None:
    """Waits for all steps that were added."""
    if self._pending:
      jax.block_until_ready(self._pending[-1][-1].metrics)

  def drain(self, waited: float) -> None:
    """Writes all steps so far."""
    self.until_idle()
    if self._pending:
      step, taken, _ = self._pending[-1]
      self._write_speed(step + len(taken.ids) - 1, waited)
    self._write(len(self._pending))
    self._metrics.flush()

  def save(self) -> None:
    """Puts all that was written on disk."""
    self._summarize()
    self._metrics.sync()
    if self._ledger is not None:
      self._ledger.flush()
    self._rows = 0

  def restart(self, waited: float) -> None:
    """Measures speed from now on, without the time before."""
    self._since, self._steps, self._waited = time.perf_counter(), 0, waited

  def _write_speed(self, step, waited):
    if self._steps and self._since is not None:
      seconds = time.perf_counter() - self._since
      speed = {
        "steps_per_second": self._steps / seconds,
        "data_wait": (waited - self._waited) / seconds,
      }
      self._metrics.write(step, speed, later=True)
      self.restart(waited)

  def _write(self, count):
    """Writes the first calls that are pending."""
    group, self._pending = self._pending[:count], self._pending[count:]
    fetched = distributed.own_rows([output for *_, output in group])
    for (step, taken, _), output in zip(group, fetched, strict=True):
      live = len(taken.ids)
      found = {f"train_{k}": v[:live] for k, v in output.metrics.items()}
      self._metrics.write_steps(step, found)
      if self._ledger is not None:
        samples = {k: v[:live] for k, v in output.samples.items()}
        self._ledger.append(
          taken.ids,
          samples["score"],
          weights=samples["weight"],
          losses=samples["loss"],
          step=step,
          epoch=taken.epochs,
          mask=taken.real,
        )
        self._rows += taken.ids.size
        self._scores.append(samples["score"][taken.real])
      self._unshown += live
      self._last = step + live - 1
      self._count(step, taken, found.get("train_skipped", np.zeros(live)))
    if self._unshown >= self._every:
      self._summarize()
    if self._rows >= _ROWS and self._ledger is not None:
      self._ledger.flush()
      self._rows = 0

  def _summarize(self):
    if self._unshown:
      self._metrics.summarize(self._last, np.concatenate(self._scores))
      self._unshown, self._scores = 0, self._scores[:1]

  def _count(self, first, taken, skipped):
    """Stops the run if nothing but skipped steps is to be expected."""
    if not skipped.any():
      self._skipped.clear()
      return
    for row, is_skipped in enumerate(skipped):
      if not is_skipped:
        self._skipped.clear()
      elif self._nonfinite_stop:
        ids = taken.ids[row][taken.real[row]]
        self._skipped.append((first + row, ids.tolist()))
        if len(self._skipped) == self._nonfinite_stop:
          self._stop()

  def _stop(self):
    file = self._folder / NONFINITE_FILE
    if jax.process_count() > 1:  # each has its own samples
      file = file.with_stem(f"{file.stem}_{jax.process_index()}")
    workdir_lib.write_json(
      file, [{"step": at, "ids": ids} for at, ids in self._skipped]
    )
    first, last = self._skipped[0][0], self._skipped[-1][0]
    self._metrics.sync()
    raise NonFiniteError(
      f"steps {first} to {last} had no finite gradient, and were skipped: the"
      f" run has diverged, or its data are broken. The ids of their samples are"
      f" in {file}. Lower config.optimizer.learning_rate, or mend those;"
      " config.faults.nonfinite_stop (0: never) says after how many it stops."
    )
