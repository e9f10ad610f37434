"""One run: a task, a method, an optimizer, and the loop over its steps."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import methods, tasks
from experiments.runtime import (
  distributed,
  locks,
  metrics as writers,
  prefetch,
  programs,
  terminal,
  workdir as workdir_lib,
)
from experiments.training import (
  calls,
  loop,
  memory,
  opening,
  optimizer,
  reference as reference_lib,
  reference_check,
  steps,
)

RESULT_FILE = workdir_lib.RESULT_FILE
LEDGER_FOLDER = "ledger"
JOB = "run"
_PATHS = ("reference", "outputs")  # of `config.mimic`


def train_and_evaluate(
  config: config_dict.ConfigDict,
  workdir: Any,
  *,
  sink: writers.Sink | None = None,
  note: terminal.Note | None = None,
) -> dict[str, Any]:
  """Trains and evaluates; goes on where an interrupted run stopped.

  All processes of a job call this at once; they share every batch.

  Args:
    config: any task's.
    workdir: the run's folder, which all processes see. Gets `config.json`,
      what the task saves of its data, checkpoints, `metrics.jsonl` with
      TensorBoard events beside it, the ledger of a method with scores, and at
      the end `result.json`.
    sink: `(step, {name: number}) -> None`, gets the metrics as well, in groups
      of steps; None: what `config.metrics_sink` names.
    note: prints what the run will do, and how far it is; None: nothing does.

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
  sink = sink or writers.find_sink(config.metrics_sink)
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
      if note is not None:
        note(f"{folder} is finished; this is its result")
      return result
    if distributed.is_first():
      workdir_lib.claim(workdir, config, fields, job=JOB)
      reference_check.save(folder, checked)
      run.task.save(folder)
    distributed.meet()
    if note is not None:
      note(opening.training(run.task, run.method, run.state.params, folder))
    result = run.to_the_end(sink, note)
    result["seconds"] = round(time.monotonic() - started, 2)
    if distributed.is_first():
      workdir_lib.write_json(result_file, result, sealed=True)
    return result


class Packed(NamedTuple):
  """The batches of a call, stacked; those of the steps it lacks are copies."""

  ids: np.ndarray  # [K, B]
  real: np.ndarray  # bool [K, B]
  seen: dict[str, np.ndarray]  # [K, B, ...]
  live: np.ndarray  # bool [K]
  batches: list[Any]  # as they were read, where their references differ


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
    tx = _create_optimizer(
      self.config.optimizer, total_steps=self.total_steps, last=task.last
    )
    average = optimizer.read_average(self.config.optimizer)
    self.memory = memory.make_plan(
      self.config.mimic,
      self.method,
      samples=task.samples,
      steps_per_epoch=task.steps_per_epoch,
    )
    with programs.run_once():
      self.state = self.devices.compute(
        lambda params, model_state: steps.init_state(
          params,
          tx,
          model_state,
          average=bool(average),
          samples=self.memory.samples if self.memory else 0,
        ),
        task.params,
        steps.make_model_state(task.outputs, task.statistics, config.seed),
      )
    if self.memory is not None and self.memory.refresh_epochs > 1:
      self.schedule = self.schedule._replace(
        cut_every=self.memory.steps_per_epoch
      )
    self.train_step, self.step_between, self.make_call = calls.make(
      task.losses_fn,
      tx,
      self.method,
      _without_paths(self.config.mimic),
      task.outputs,
      task.expand,
      average=average,
      memory=self.memory,
      out_shardings=steps.make_shardings(self.state, self.devices.mesh),
    )

  def check_reference(self) -> dict[str, Any] | None:
    """Checks the reference's weights, if any; raises if they would harm."""
    with programs.run_once():
      return reference_check.check(
        self.config,
        self.folder,
        self.task.check_losses_fn(),
        self.state.params,
        self.reference,
        self._draw,
        instead=self.task.instead,
      )

  def _draw(self):
    batch, expand = self.task.check_batch(), self.task.expand
    if expand is None:
      return batch
    return jax.jit(expand)(batch, self.task.resident)

  def to_the_end(
    self,
    sink: writers.Sink | None = None,
    note: terminal.Note | None = None,
  ) -> dict[str, Any]:
    """Restores, runs the steps that are left, and sums up."""
    with contextlib.closing(self.task):
      evaluation = loop.run(
        self.folder,
        self.state,
        self.batches,
        schedule=self.schedule,
        fingerprint=self.fingerprint,
        plan=self.plan,
        pack=self.pack,
        take=self.take,
        resident=self.task.resident,
        evaluate=self.evaluate,
        ledger=self.ledger(),
        about=json.dumps(workdir_lib.as_dict(self.config), indent=2),
        sink=sink,
        note=note,
      )
    return {
      "fingerprint": self.fingerprint,
      # Fingerprints of the files beside.
      "fingerprints": {
        **self._ledger_fingerprints(),
        **self.task.result_fingerprints(),
      },
      **evaluation,
      "evaluated": "average" if self.state.average else "parameters",
      "steps": self.total_steps,
      **self.task.facts(),
      "nonfinite_samples": loop.nonfinite_samples(self.folder),
    }

  def evaluate(self, state: steps.TrainState) -> dict[str, float]:
    """Evaluates the state's average, or else its parameters."""
    params, variables = steps.evaluated(state)
    return self.task.evaluate(params, **variables)

  def example(self, batch: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """Makes what one step takes of a batch: state, reference and so on."""
    return (
      self.state,
      self.reference and self.reference.for_batch(batch),
      self.devices.put(self._take(batch).seen),
      self.task.resident,
    )

  def _take(self, batch):
    rows = self.task.take(batch)
    if self.memory is None:
      return rows
    position = np.maximum(batch["index"], 0).astype(np.int32)
    return rows._replace(seen=rows.seen | {memory.POSITION: position})

  def plan(self, batch: dict[str, np.ndarray]) -> calls.Call:
    """Chooses how many steps go into a call, by the first batch."""
    length = calls.choose_length(
      self.config.steps_per_call,
      loop.spacing(self.schedule),
      step=self.train_step,
      given=lambda: self.example(batch),
      devices=self.devices.count,
    )
    return self.make_call(length, self._differs)

  @property
  def _differs(self):
    return self.reference is not None and self.reference.differs

  def pack(self, length: int) -> Callable[[list[Any]], Packed]:
    """Makes the function that stacks batches for a call of that length."""

    def stack(batches):
      rows = [self._take(batch) for batch in batches]
      live = np.arange(length) < len(rows)
      # Steps that aren't live change nothing, whatever they see.
      rows += rows[-1:] * (length - len(rows))
      seen = jax.tree.map(_stack, *(row.seen for row in rows))
      return Packed(
        np.stack([row.ids for row in rows]),
        np.stack([row.real for row in rows]),
        seen,
        live,
        batches if self._differs else [],
      )

    return stack

  def take(self, step: int, read: prefetch.Read) -> loop.Taken:
    """Makes a call's batches as it takes them."""
    packed, count = read.packed, len(read.epochs)
    if self.task.steps_per_epoch is not None:
      epochs = np.arange(step, step + count) // self.task.steps_per_epoch
    else:
      epochs = np.array([epoch or 0 for epoch in read.epochs])
    reference = self.reference
    if reference is not None:
      if self._differs:
        found = [reference.for_batch(batch) for batch in packed.batches]
        found += found[-1:] * (len(packed.live) - count)
        reference = distributed.stack(found)
      else:
        reference = reference.for_batch(None)
    return loop.Taken(
      ids=packed.ids[:count],
      real=packed.real[:count],
      epochs=epochs,
      reference=reference,
      batch=self.devices.put(packed.seen, stacked=True),
      live=packed.live,
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


def _stack(*arrays):
  """Stacks arrays; a single one, which may be large, is not copied."""
  return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


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
  return _create_method(config.method, _without_paths(config.mimic))


def _without_paths(mimic):
  """Returns `config.mimic` without what tells the runs of a study apart."""
  mimic = mimic.copy_and_resolve_references()
  with mimic.unlocked():
    for field in _PATHS:
      mimic[field] = None
  return mimic


_create_method = programs.once(methods.create)
_create_optimizer = programs.once(optimizer.create)


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, trains, and prints the result and where it is."""
  result = train_and_evaluate(config, workdir, note=terminal.note)
  print(json.dumps(result, indent=2), flush=True)
  folder = pathlib.Path(workdir)
  names = (RESULT_FILE, writers.METRICS_FILE, LEDGER_FOLDER)
  for path in map(folder.joinpath, names):
    if path.exists():
      terminal.note(f"  {path}")
