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

# Steps that may be under way: one runs, and the next one waits for it.
_AHEAD = 2
NONFINITE_FILE = "nonfinite.json"


class NonFiniteError(ValueError):
  """Too many steps in a row had no finite gradient."""


class StepLog:
  """Keeps step outputs on the device until a group of them is written.

  Fetching them step by step would make every step wait for the one before.
  Their copies to the host start as soon as a step is done; done steps are
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
      every: steps in a group.
      nonfinite_stop: skipped steps in a row that end the run; 0: none.
    """
    self._folder, self._metrics, self._ledger = folder, metrics, ledger
    self._every, self._nonfinite_stop = every, nonfinite_stop
    self._pending: list[tuple[int, tuple[Any, ...], Any]] = []
    self._skipped: list[tuple[int, list[Any]]] = []  # in a row: steps and ids
    self._since: float | None = None  # when the first step was compiled
    self._steps, self._waited = 0, 0.0

  def add(self, step: int, taken: Any, output: Any, waited: float) -> None:
    """Takes a step that was started; writes a group that is complete.

    Waits until no more than two steps are under way: more of them would keep
    their batches on the devices.

    Args:
      step: the step's number.
      taken: the `loop.Taken`.
      output: the `gradients.StepOutput`.
      waited: total seconds spent waiting for data.
    """
    for leaf in jax.tree.leaves(output):
      leaf.copy_to_host_async()
    self._pending.append((step, (taken.ids, taken.real, taken.epoch), output))
    self._steps += 1
    if self._since is None:
      self.restart(waited)  # compiling is not measured
    if len(self._pending) > _AHEAD:
      jax.block_until_ready(self._pending[-_AHEAD - 1][-1].metrics)
    if len(self._pending) >= self._every + _AHEAD:
      self._write(len(self._pending) - _AHEAD)
      self._write_speed(step, waited)

  def until_idle(self) -> None:
    """Waits for all steps that were added."""
    if self._pending:
      jax.block_until_ready(self._pending[-1][-1].metrics)

  def flush(self, waited: float) -> None:
    """Puts all steps so far on disk."""
    self.until_idle()
    if self._pending:
      self._write_speed(self._pending[-1][0], waited)
    self._write(len(self._pending))
    self._metrics.flush()
    if self._ledger is not None:
      self._ledger.flush()

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
      self._metrics.write(step, speed)
      self.restart(waited)

  def _write(self, count):
    """Writes the first steps that are pending."""
    group, self._pending = self._pending[:count], self._pending[count:]
    fetched = distributed.own_rows([output for *_, output in group])
    for (step, rows, _), output in zip(group, fetched, strict=True):
      found = {f"train_{k}": float(v) for k, v in output.metrics.items()}
      self._metrics.write(step, found)
      ids, real, epoch = rows
      if self._ledger is not None:
        self._ledger.append(
          ids[real],
          output.samples["score"][real],
          weights=output.samples["weight"][real],
          losses=output.samples["loss"][real],
          step=step,
          epoch=epoch,
        )
      self._count(step, ids[real], found.get("train_skipped", 0))

  def _count(self, step, ids, skipped):
    """Stops the run if nothing but skipped steps is to be expected."""
    if not skipped:
      self._skipped.clear()
      return
    if not self._nonfinite_stop:
      return
    self._skipped.append((step, np.asarray(ids).tolist()))
    if len(self._skipped) < self._nonfinite_stop:
      return
    file = self._folder / NONFINITE_FILE
    if jax.process_count() > 1:  # each has its own samples
      file = file.with_stem(f"{file.stem}_{jax.process_index()}")
    workdir_lib.write_json(
      file, [{"step": at, "ids": ids} for at, ids in self._skipped]
    )
    first, last = self._skipped[0][0], self._skipped[-1][0]
    self._metrics.flush()
    raise NonFiniteError(
      f"steps {first} to {last} had no finite gradient, and were skipped: the"
      f" run has diverged, or its data are broken. The ids of their samples are"
      f" in {file}. Lower config.optimizer.learning_rate, or mend those;"
      " config.faults.nonfinite_stop (0: never) says after how many it stops."
    )
