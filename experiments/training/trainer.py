"""One run: a task, a method, an optimizer, and the loop over its steps."""

import contextlib
import functools
import json
import pathlib
import time
from typing import Any

from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import methods, tasks
from experiments.runtime import (
  distributed,
  locks,
  prefetch,
  workdir as workdir_lib,
)
from experiments.training import (
  loop,
  optimizer,
  reference as reference_lib,
  reference_check,
  steps,
)

RESULT_FILE = workdir_lib.RESULT_FILE
LEDGER_FOLDER = "ledger"
JOB = "run"


def train_and_evaluate(
  config: config_dict.ConfigDict, workdir: Any
) -> dict[str, Any]:
  """Trains and evaluates; goes on where an interrupted run stopped.

  All processes of a job call this at once; they share every batch.

  Args:
    config: any task's.
    workdir: the run's folder, which all processes see. Gets `config.json`,
      what the task saves of its data, checkpoints, `metrics.jsonl` with
      TensorBoard events beside it, the ledger of a method with scores, and at
      the end `result.json`.

  Returns:
    The content of `result.json`: the last evaluation, counts, and the seconds
    since the run was last started.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, a batch
      that the devices don't divide, or a file of the run that is damaged.
    FileNotFoundError: data or a reference that are not there.
    locks.InUseError: another run works in the workdir.
  """
  fields = tasks.get(config).configs
  folder = workdir_lib.check(workdir, config, fields, job=JOB)
  started = time.monotonic()
  result_file = folder / RESULT_FILE
  with contextlib.ExitStack() as stack:
    finished = distributed.agree(result_file.exists())
    if not finished:
      stack.enter_context(locks.hold(folder))
    run = Run(config, folder)
    checked = run.check_reference()
    if finished:
      result = workdir_lib.read_result(result_file, run.fingerprint)
      loop.check_finished(folder, run.ledger())
      return result
    if distributed.is_first():
      workdir_lib.claim(workdir, config, fields, job=JOB)
      reference_check.save(folder, checked)
      run.task.save(folder)
    distributed.meet()
    result = run.to_the_end()
    result["seconds"] = round(time.monotonic() - started, 2)
    if distributed.is_first():
      workdir_lib.write_json(result_file, result, sealed=True)
    return result


class Run:
  """One run's parts, put together, and its loop."""

  def __init__(
    self,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    task: tasks.Task | None = None,
  ):
    """Puts the parts together; trains nothing.

    Args:
      config: the run's.
      folder: the run's.
      task: made of the same config; None makes it.
    """
    loop.check_counts(config, "batch_size", "eval_batch_size")
    self.method = create_method(config)
    if task is None:
      devices = distributed.Devices(config.mesh, batch_size=config.batch_size)
      direction = self.method and self.method.direction
      task = tasks.create(config, devices, direction=direction)
    self.folder, self.task = folder, task
    self.config, self.devices = task.config, task.devices
    self.total_steps, self.batches = task.total_steps, task.batches
    self.schedule = loop.schedule(self.config, task)
    self.fingerprints = {
      "config": workdir_lib.config_fingerprint(config, JOB),
      **task.fingerprints,
    }
    self.reference = reference_lib.load(self.config, self.method, task, folder)
    if self.reference is not None:
      self.fingerprints["reference"] = self.reference.fingerprint
    self.fingerprint = workdir_lib.fingerprint(self.fingerprints)
    tx = optimizer.create(
      self.config.optimizer, total_steps=self.total_steps, last=task.last
    )
    self.state = self.devices.compute(
      functools.partial(steps.init_state, tx=tx), task.params
    )
    self.train_step = steps.make_train_step(
      task.losses_fn,
      tx,
      self.method,
      self.config.mimic,
      task.outputs,
      expand=task.expand,
      out_shardings=steps.make_shardings(self.state, self.devices.mesh),
    )

  def check_reference(self) -> dict[str, Any] | None:
    """Checks the reference's weights, if any; raises if they would harm."""
    return reference_check.check(
      self.config,
      self.folder,
      self.task.check_losses_fn(),
      self.state.params,
      self.reference,
      self.task.check_batch,
      instead=self.task.instead,
    )

  def to_the_end(self) -> dict[str, Any]:
    """Restores, runs the steps that are left, and sums up."""
    with contextlib.closing(self.task):
      evaluation = loop.run(
        self.folder,
        self.state,
        self.batches,
        schedule=self.schedule,
        fingerprint=self.fingerprint,
        train_step=lambda *given: self.train_step(*given, self.task.resident),
        take=self.take,
        evaluate=self.task.evaluate,
        ledger=self.ledger(),
      )
    return {
      "fingerprint": self.fingerprint,
      # Fingerprints of the files beside.
      "fingerprints": {
        **self._ledger_fingerprints(),
        **self.task.result_fingerprints(),
      },
      **evaluation,
      "steps": self.total_steps,
      **self.task.facts(),
      "nonfinite_samples": loop.nonfinite_samples(self.folder),
    }

  def take(self, step: int, read: prefetch.Read) -> loop.Taken:
    """Makes a batch as the train step takes it."""
    rows = self.task.take(read.batch)
    epoch = read.epoch
    if self.task.steps_per_epoch is not None:
      epoch = step // self.task.steps_per_epoch
    return loop.Taken(
      ids=rows.ids,
      real=rows.real,
      epoch=epoch or 0,
      reference=self.reference and self.reference.for_batch(read.batch),
      batch=self.devices.put(rows.seen),
    )

  def ledger(self) -> gm.ScoreLedger | None:
    """Opens the run's ledger; None for a method without scores."""
    if self.method is None or self.method.score is None:
      return None
    return gm.ScoreLedger(
      self.folder / LEDGER_FOLDER,
      fingerprints=self._ledger_fingerprints(),
      writer=self.devices.process[0],
      recover=True,
    )

  def _ledger_fingerprints(self):
    """Returns the run's fingerprints, with those of its data and labels."""
    return {**self.fingerprints, **self.task.data_fingerprints}


def create_method(config: config_dict.ConfigDict) -> methods.Method | None:
  """Creates the method that a run's config names.

  Args:
    config: the run's.

  Returns:
    The Method; None: plain training.

  Raises:
    ValueError: there is no such method, or the task can't be trained by it.
  """
  able = tasks.get(config).methods
  if able is not None and config.method not in able:
    raise ValueError(
      f"config.method is {config.method!r}; expected one of"
      f" {', '.join(able)} (losses that depend on batch mates leave no others)."
    )
  return methods.create(config.method, config.mimic)


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Trains, then prints the result."""
  print(json.dumps(train_and_evaluate(config, workdir), indent=2))
