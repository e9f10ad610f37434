"""The loop that all training jobs go through, whatever they train.

restore -> (eval -> save -> next batch -> step -> log), in that order.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import gradmimic_jax as gm
from experiments import checkpoint, distributed, writers


class Schedule(NamedTuple):
  """What happens when, in steps."""

  total_steps: int
  eval_every: int  # the end is evaluated in any case
  save_every: int  # and so is it saved
  keep: int  # checkpoints


class Taken(NamedTuple):
  """A batch as a step takes it, and what the ledger says of its rows."""

  ids: np.ndarray  # [B]
  real: np.ndarray  # bool [B], False for padding
  epoch: int  # the pass over the data that it belongs to
  reference: Any  # what the step's method goes by
  batch: Any  # what the model sees


def run(
  folder: pathlib.Path,
  state: Any,
  batches: Any,
  *,
  schedule: Schedule,
  fingerprint: str,
  train_step: Callable[..., Any],
  take: Callable[[int, Any], Taken],
  evaluate: Callable[[Any], dict[str, float]],
  ledger: gm.ScoreLedger | None = None,
) -> dict[str, float]:
  """Goes on from the newest checkpoint, or the beginning, to the end.

  Killed at any point and started again, it ends with the same parameters, bit
  for bit, and the same ledger.

  Args:
    folder: the run's; gets checkpoints and metrics.
    state: the `steps.TrainState` before the first step.
    batches: a grain iterator over batches; its place is in the checkpoints.
    schedule: how long, and what how often.
    fingerprint: of all that the run depends on.
    train_step: `(state, reference, batch) -> (state, StepOutput)`.
    take: `(step, batch) -> Taken`, called right after a batch was read.
    evaluate: `params -> {name: number}`, to be written as they are named.
    ledger: for the scores; None where the method has none.

  Returns:
    The last evaluation.
  """
  with contextlib.ExitStack() as stack:

    def closing(thing):
      return stack.enter_context(contextlib.closing(thing))

    checkpoints = closing(
      checkpoint.Checkpointer(
        folder, keep=schedule.keep, fingerprint=fingerprint
      )
    )
    state = checkpoints.restore(state, batches)
    step = int(state.step)
    metrics = closing(writers.metrics(folder, first_step=step))
    bar = closing(writers.progress(schedule.total_steps, step, folder.name))
    log = _Log(metrics, ledger)
    while True:
      finished = step == schedule.total_steps
      saving = finished or (step and step % schedule.save_every == 0)
      evaluating = finished or step % schedule.eval_every == 0
      if evaluating or saving:
        # Rows reach the disk before the checkpoint that counts on them.
        log.flush()
      if evaluating:
        evaluation = evaluate(state.params)
        metrics.write(step, evaluation)
        metrics.flush()
      if saving:
        checkpoints.save(step, state, batches)
      if finished:
        return evaluation
      taken = take(step, next(batches))
      state, output = train_step(state, taken.reference, taken.batch)
      log.add(step, taken, output)
      step += 1
      bar.update()


class _Log:
  """Keeps step outputs on the device until they are asked for.

  Fetching them step by step would make every step wait for the one before.
  """

  def __init__(self, metrics, ledger):
    self._metrics, self._ledger = metrics, ledger
    self._pending = []

  def add(self, step, taken, output):
    rows = taken.ids, taken.real, taken.epoch
    self._pending.append((step, rows, output))

  def flush(self):
    fetched = distributed.own_rows([output for *_, output in self._pending])
    for (step, rows, _), output in zip(self._pending, fetched, strict=True):
      self._metrics.write(
        step, {f"train_{k}": float(v) for k, v in output.metrics.items()}
      )
      if self._ledger is not None:
        ids, real, epoch = rows
        self._ledger.append(
          ids[real],
          output.samples["score"][real],
          weights=output.samples["weight"][real],
          losses=output.samples["loss"][real],
          step=step,
          epoch=epoch,
        )
    self._metrics.flush()
    if self._ledger is not None and self._pending:
      self._ledger.flush()
    self._pending.clear()


def nonfinite_samples(folder: pathlib.Path) -> int:
  """How often a sample was left out because it was not finite."""
  rows = writers.read_metrics(folder / writers.METRICS_FILE)
  return int(sum(row.get("train_nonfinite", 0) for row in rows))


def check_counts(config: Any, *fields: str) -> None:
  """Raises ValueError unless these fields are at least 1."""
  for field in fields:
    value = config
    for name in field.split("."):
      value = value[name]
    if value < 1:
      raise ValueError(f"config.{field} is {value}; expected at least 1.")
