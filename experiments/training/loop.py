"""The loop that all training jobs go through, whatever they train.

restore -> (eval -> save -> next batch -> step -> log), in that order.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import tasks
from experiments.runtime import (
  checkpoint,
  distributed,
  durations,
  metrics as writers,
  preemption,
  prefetch,
  terminal,
  watchdog,
  workdir as workdir_lib,
)
from experiments.training import calls, step_log

PROFILE_FOLDER = "profile"


class Schedule(NamedTuple):
  """The steps at which a run is evaluated, saved and logged."""

  total_steps: int
  eval_every: int  # the last step is evaluated in any case
  save_every: int  # the last step is saved in any case
  keep: int  # number of checkpoints
  keep_every: int = 0  # also keep every keep_every-th checkpoint; 0 keeps none
  log_every: int = 50  # steps between writes of metrics and scores
  profile_steps: tuple[int, ...] = ()  # first and end of the traced steps
  nonfinite_stop: int = 10  # skipped steps in a row that end the run; 0: none
  stall_seconds: float = 1800  # without a step, until the process ends; 0: none
  cut_every: int = 0  # steps at which calls end, too; 0: none


def schedule(config: config_dict.ConfigDict, task: tasks.Task) -> Schedule:
  """Makes the schedule of a run.

  Args:
    config: the run's.
    task: the run's.

  Returns:
    The Schedule.

  Raises:
    ValueError: fields that make no sense.
  """

  def steps(name, needed=True):
    return durations.steps(
      config, name, steps_per_epoch=task.steps_per_epoch, needed=needed
    )

  check_counts(config, "log_every", "checkpoint.keep")
  profile = tuple(config.profile_steps)
  if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1]):
    raise ValueError(
      f"config.profile_steps is {profile}; expected the first step to trace and"
      " the one after the last, such as (100, 105), or ()."
    )
  return Schedule(
    total_steps=task.total_steps,
    eval_every=steps("eval_every"),
    save_every=steps("checkpoint.every"),
    keep=config.checkpoint.keep,
    keep_every=steps("checkpoint.keep_every", needed=False),
    log_every=config.log_every,
    profile_steps=profile,
    nonfinite_stop=config.faults.nonfinite_stop,
    stall_seconds=config.faults.stall_seconds,
  )


class Taken(NamedTuple):
  """The batches of a call, and the ledger's fields of their n <= K steps."""

  ids: np.ndarray  # [n, B]
  real: np.ndarray  # bool [n, B], False for padding
  epochs: np.ndarray  # [n], the passes over the data that they belong to
  reference: Any  # the reference of the steps' method
  batch: Any  # the model's input, [K, B, ...]
  live: np.ndarray  # bool [K], n times True


def run(
  folder: pathlib.Path,
  state: Any,
  batches: Any,
  *,
  schedule: Schedule,
  fingerprint: str,
  plan: Callable[[Any], calls.Call],
  pack: Callable[[int], Callable[[list[Any]], Any]],
  take: Callable[[int, prefetch.Read], Taken],
  resident: Any = None,
  evaluate: Callable[[Any], dict[str, float]],
  ledger: gm.ScoreLedger | None = None,
  about: str = "",
  sink: writers.Sink | None = None,
  note: terminal.Note | None = None,
) -> dict[str, float]:
  """Goes on from the newest checkpoint, or the beginning, to the end.

  Killed at any point and started again, it ends with the same parameters, bit
  for bit, and the same ledger. It goes on from the newest whole checkpoint
  whose steps' metrics and scores are on record. Steps are taken several in a
  call, which ends where there is something else to do. Batches are read in a
  thread; while a call runs, the next one's are put on the devices and earlier
  ones' outputs are written.

  Args:
    folder: the run's; gets checkpoints and metrics.
    state: the `steps.TrainState` before the first step.
    batches: a grain iterator over batches; its place is in the checkpoints.
    schedule: the length, and the steps of evaluation, saving and logging.
    fingerprint: of all that the run depends on.
    plan: gives the Call, by the first batch.
    pack: `pack(length)(batches)` makes a call's batches what `take` takes; it
      runs in the reading thread.
    take: `(step, prefetch.Read) -> Taken`, called while the call before runs:
      puts the batches on the devices.
    resident: goes into every call.
    evaluate: `TrainState -> {name: number}`, to be written as they are named.
    ledger: for the scores; None where the method has none.
    about: the config as a text, for TensorBoard.
    sink: gets the metrics, too.
    note: prints what the loop is at; None: nothing does, but for a bar.

  Returns:
    The last evaluation.

  Raises:
    step_log.NonFiniteError: too many steps in a row were skipped.
    ValueError: saved files are damaged or lost, and nothing before them is
      left.
    preemption.PreemptedError: after a SIGTERM; the run is saved.
    OSError: the folder can't be written to, or the disk is full.
  """
  total = schedule.total_steps
  with contextlib.ExitStack() as stack:

    def closing(thing):
      return stack.enter_context(contextlib.closing(thing))

    stack.enter_context(workdir_lib.full_disk_named(folder))
    stack.enter_context(
      watchdog.watching(schedule.stall_seconds, what=f"the run in {folder}")
    )
    _check_room(folder, state, schedule)
    asked = closing(preemption.Preemption())
    checkpoints = stack.enter_context(
      checkpoint.Checkpointer(
        folder,
        keep=schedule.keep,
        keep_every=schedule.keep_every,
        fingerprint=fingerprint,
      )
    )
    state = checkpoints.restore(
      state, batches, *_recorded(folder, ledger, fingerprint)
    )
    step = int(state.step)
    if distributed.is_first() and ledger is not None:
      _forget_lost(ledger, step)
    distributed.meet()
    bar = closing(terminal.Progress(total, step, folder.name, note=note))
    metrics = closing(
      writers.metrics(
        folder,
        first_step=step,
        fingerprint=fingerprint,
        about=about,
        sinks=[bar.show] if sink is None else [bar.show, sink],
      )
    )
    bar.begin()
    trace = closing(_Trace(folder, *schedule.profile_steps))
    log = step_log.StepLog(
      folder,
      metrics,
      ledger,
      every=schedule.log_every,
      nonfinite_stop=schedule.nonfinite_stop,
    )
    position = batches.get_state()
    reader = closing(prefetch.Reader(batches)) if step < total else None
    call = upcoming = None
    while True:
      finished = step == total
      leaving = asked.reached()
      saving = leaving or finished or (step and step % schedule.save_every == 0)
      evaluating = finished or step % schedule.eval_every == 0
      if evaluating or saving:
        log.drain(reader.waited if reader else 0.0)
      if evaluating and not leaving:
        watchdog.sign()
        evaluation = evaluate(state)
        metrics.write(step, evaluation)
      if saving:
        watchdog.sign()
        # Rows reach the disk before the checkpoint that counts on them.
        log.save()
        checkpoints.save(step, state, prefetch.Position(position))
      if leaving:
        checkpoints.wait()
        asked.leave(step, folder)
      if finished:
        return evaluation
      assert reader is not None
      if call is None:
        call = plan(reader.first())
        cuts = calls.cut(step, call.length, spacing(schedule))
        reader.start(cuts, pack(call.length))
      if evaluating or saving:
        log.restart(reader.waited)
      read, taken = upcoming or _next(step, reader, log, take)
      trace.before(step)
      state, output = call.at(step)(
        state, taken.reference, taken.batch, resident, taken.live
      )
      log.add(step, taken, output, reader.waited)
      position = read.position
      step += len(taken.ids)
      trace.after(step, output)
      upcoming = _next(step, reader, log, take) if step < total else None
      watchdog.sign()
      bar.update(len(taken.ids), taken.epochs[-1])


def spacing(schedule: Schedule) -> calls.Spacing:
  """Finds where calls have to end: at evaluations, checkpoints and the like."""
  return calls.Spacing(
    tuple(
      filter(
        None, (schedule.eval_every, schedule.save_every, schedule.cut_every)
      )
    ),
    schedule.profile_steps,
    schedule.total_steps,
  )


def _recorded(folder, ledger, fingerprint):
  """Finds the last step up to which the run is on record; also the reason.

  Rows and lines reach the disk before the checkpoint that counts on them: where
  they lack, they were lost since, and their steps are to be made again.
  """
  limit, reason = None, ""
  if distributed.is_first():
    metrics = folder / writers.METRICS_FILE
    limit = writers.recorded_steps(metrics, fingerprint)
    reason = f"{metrics} lacks the lines of steps from {limit} on."
    if ledger is not None:
      lost = ledger.first_lost_step
      if lost is None and not ledger.epochs:
        lost = 0
      if lost is not None and lost < limit:
        where = ledger.path.joinpath(*ledger.lost_files[:1])
        limit = lost
        reason = f"{where}: rows of steps from {lost} on were lost."
  told = distributed.gather_texts(json.dumps([limit, reason]))[0]
  return json.loads(told)


def _forget_lost(ledger, step):
  """Makes way for rows that will be recorded again."""
  if ledger.first_lost_step is not None:
    ledger.forget_from(step)


def check_finished(folder: pathlib.Path, ledger: gm.ScoreLedger | None) -> None:
  """Raises if a finished run lacks rows of its ledger.

  Args:
    folder: the run's.
    ledger: opened so that it may lack files; None: there are no scores.

  Raises:
    ValueError: a file is missing: its name, and advice. In processes other than
      the first, a RuntimeError.
  """
  if ledger is None:
    return

  def look():
    remedy = (
      f"To record them again, delete {folder / workdir_lib.RESULT_FILE} and"
      " give the same command."
    )
    try:
      epochs = ledger.epochs
    except ValueError as error:
      raise ValueError(f"{error} {remedy}") from error
    if not epochs:
      raise ValueError(f"{ledger.path} has lost all of its rows. {remedy}")

  distributed.by_first(look)


def _next(step, reader, log, take):
  read = reader.next(log.until_idle)
  return read, take(step, read)


def _check_room(folder, state, schedule):
  """Raises before training if checkpoints would fill the disk."""
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  # The oldest goes once the newest is there.
  count = schedule.keep + 1
  if schedule.keep_every:
    count += schedule.total_steps // schedule.keep_every
  workdir_lib.check_room(
    folder, size * count, beside=checkpoint.FOLDER, what=f"{count} checkpoints"
  )


class _Trace:
  """A profile of some steps, by the first process."""

  def __init__(self, folder, first=-1, end=-1):
    self._folder = folder / PROFILE_FOLDER
    self._first, self._end = first, end
    self._running = False

  def before(self, step):
    if step == self._first and jax.process_index() == 0:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True

  def after(self, step, output):
    if self._running and step == self._end:
      jax.block_until_ready(output)
      self.close()

  def close(self):
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def nonfinite_samples(folder: pathlib.Path) -> int:
  """Counts the times that a sample was left out because it was not finite."""
  rows = writers.read_metrics(folder / writers.METRICS_FILE)
  return int(sum(row.get("train_nonfinite", 0) for row in rows))


def check_counts(config: config_dict.ConfigDict, *fields: str) -> None:
  """Raises ValueError unless these fields are at least 1."""
  for field in fields:
    value = config
    for name in field.split("."):
      value = value[name]
    if value < 1:
      raise ValueError(f"config.{field} is {value}; expected at least 1.")
