"""Scores a data set in one pass for each checkpoint of a run.

A checkpoint's own parameters are scored, those that its steps went on from, not
the average that a run may be evaluated by; and in evaluation mode: without
dropout, by the statistics of batches that the checkpoint has.
"""

import contextlib
import json
import pathlib
from typing import Any

from absl import logging
from ml_collections import config_dict

import gradmimic_jax as gm
from configs import score as score_config
from experiments import tasks
from experiments.runtime import (
  checkpoint,
  distributed,
  locks,
  prefetch,
  terminal,
  workdir as workdir_lib,
)
from experiments.training import (
  opening,
  reference as reference_lib,
  steps,
  trainer as train,
)

RESULT_FILE = workdir_lib.RESULT_FILE
LEDGER_FOLDER = train.LEDGER_FOLDER
RUN_FILE = "run.json"  # the learner's config, as it was scored
PROGRESS_FILE = "progress.json"
JOB = "score"


def score_dataset(
  config: config_dict.ConfigDict,
  workdir: Any,
  *,
  note: terminal.Note | None = None,
) -> dict[str, Any]:
  """Scores every sample once for each checkpoint; goes on where it stopped.

  All processes of a job call this at once; they share every batch.

  Args:
    config: as `configs/score.py` describes it.
    workdir: gets `config.json`, `run.json`, `labels.npz`, the ledger (an epoch
      is a checkpoint), and at the end `result.json`.
    note: prints what will be done, and how far it is; None: nothing does.

  Returns:
    The content of `result.json`: the checkpoints' steps, counts, fingerprints.

  Raises:
    ValueError: an unknown field or name, a method without scores, a workdir of
      another config or of other data.
    FileNotFoundError: a learner, data set or reference that is not there.
    locks.InUseError: another job works in the workdir.
  """
  workdir_lib.check(workdir, config, score_config, job=JOB)
  for field in ("batch_size", "flush_every"):
    if config[field] < 1:
      raise ValueError(
        f"config.{field} is {config[field]}; expected at least 1."
      )
  folder = pathlib.Path(workdir)
  with locks.hold(folder):
    run_config = learners_config(config)
    scoring = _Scoring(config, run_config, folder)
    if distributed.is_first():
      workdir_lib.claim(workdir, config, score_config, job=JOB)
      workdir_lib.write_json(
        folder / RUN_FILE, workdir_lib.as_dict(run_config), sealed=True
      )
      scoring.task.save(folder)
    distributed.meet()
    if note is not None:
      note(
        opening.scoring(
          scoring.task,
          scoring.method,
          len(scoring.checkpoints),
          config.learner,
        )
      )
    samples = scoring.to_the_end(folder, note)
    result = {
      "checkpoints": scoring.checkpoints,
      "samples": samples,
      "fingerprints": scoring.fingerprints,
      "run": workdir_lib.fingerprint(workdir_lib.as_dict(run_config)),
    }
    if distributed.is_first():
      workdir_lib.write_json(folder / RESULT_FILE, result, sealed=True)
    return result


def check_run(folder: pathlib.Path, section: dict[str, Any]) -> None:
  """Raises ValueError if `run.json` is not that of the finished job."""
  file = folder / RESULT_FILE
  own = workdir_lib.read_json(file, {}).get("run") if file.exists() else None
  found = workdir_lib.fingerprint(section)
  if own not in (None, found):
    raise ValueError(
      f"{folder / RUN_FILE} is of another job: its fingerprint is {found!r},"
      f" and that in {RESULT_FILE} is {own!r}. Give the job's command again."
    )


def learners_config(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Makes the learner's own config, with the fields that scoring changes.

  Args:
    config: as `configs/score.py` describes it.

  Returns:
    A config with every field of its task.

  Raises:
    FileNotFoundError: the learner is no run's folder.
  """
  file = pathlib.Path(config.learner) / workdir_lib.CONFIG_FILE
  if not config.learner or not file.is_file():
    raise FileNotFoundError(
      f"config.learner is {config.learner!r}, and there is no"
      f" {workdir_lib.CONFIG_FILE} in it; expected the workdir of a run"
      " (python -m experiments.train)."
    )
  workdir_lib.check_config(
    file.parent, train.JOB, workdir_lib.of_result(file.parent)
  )
  run = complete(workdir_lib.read_config(file.parent), file)
  run.method, run.batch_size = config.method, config.batch_size
  run.mimic = config_dict.ConfigDict(workdir_lib.as_dict(config.mimic))
  run.data.filter = None  # all samples are scored, also those that it left out
  if config.method != "grand_offline":  # which starts where the learner did
    run.model.pretrained = None  # the checkpoints have what came of it
  if config.split is not None:
    if "train_split" not in run.data:
      raise ValueError(
        f"config.split is {config.split!r}, and the data of {config.learner}"
        " has no splits; leave it out."
      )
    run.data.train_split = config.split
  if config.data_dir is not None:
    run.data.data_dir = config.data_dir
  return run


def complete(section: dict[str, Any], file: pathlib.Path) -> Any:
  """Adds the defaults of newer fields to a stored config.

  Args:
    section: the config.
    file: the config's file.

  Returns:
    The config.

  Raises:
    ValueError: a field in place of a section, or the other way round.
  """

  def merged(defaults, given, name):
    for key, value in given.items():
      default = defaults.get(key)
      if default is not None and isinstance(default, dict) != isinstance(
        value, dict
      ):
        raise ValueError(
          f"{file} is damaged: its {name}{key} is {str(value)[:80]!r}."
        )
      if isinstance(default, dict):
        value = merged(default, value, f"{name}{key}.")
      defaults[key] = value
    return defaults

  task = tasks.get(section, where=str(file))
  defaults = workdir_lib.as_dict(task.configs.get_config())
  return config_dict.ConfigDict(merged(defaults, section, ""))


class _Scoring:
  """Scores batches of a task with a run's checkpoints."""

  def __init__(
    self,
    config: config_dict.ConfigDict,
    run: config_dict.ConfigDict,
    folder: pathlib.Path,
  ):
    self.config = config
    devices = distributed.Devices(config.mesh, batch_size=config.batch_size)
    self.devices = devices
    self.learner = pathlib.Path(config.learner)
    self.method = method = train.create_method(run)
    self.task = task = tasks.get(run).create_for_scoring(
      run, devices, self.learner, direction=method and method.direction
    )
    if task.samples is None and devices.process[1] > 1:
      raise ValueError(
        "shards are scored by a single process, as each would have another"
        f" number of batches; there are {devices.process[1]}."
      )
    self.score_step = steps.make_score_step(
      task.losses_fn,
      method,
      task.config.mimic,
      task.outputs,
      expand=task.expand,
      out_shardings=devices.rows,
    )
    self.reference = reference_lib.load(task.config, method, task, folder)
    self.checkpoints = list(config.steps or checkpoint.steps(self.learner))
    if not self.checkpoints:
      raise FileNotFoundError(
        f"there is no checkpoint in {self.learner}, which config.learner names."
      )
    learner = workdir_lib.fingerprint(
      [checkpoint.fingerprint(self._load(step)[0]) for step in self.checkpoints]
    )
    self.fingerprints = {
      "config": workdir_lib.config_fingerprint(config, JOB),
      "learner": learner,
      **task.data_fingerprints,
    }
    if self.reference is not None:
      self.fingerprints["reference"] = self.reference.fingerprint

  def _load(self, step):
    """Loads the step's own parameters, not their average; and statistics."""
    params = checkpoint.load_params(
      self.learner, self.task.params, step=step, averaged=False
    )
    if self.task.statistics == ():
      return params, {}
    return params, {
      "statistics": checkpoint.load_statistics(
        self.learner, self.task.statistics, step=step, averaged=False
      )
    }

  def to_the_end(
    self, folder: pathlib.Path, note: terminal.Note | None = None
  ) -> int:
    """Scores the samples that are left; returns the number in a pass."""
    ledger = gm.ScoreLedger(
      folder / LEDGER_FOLDER,
      fingerprints=self.fingerprints,
      writer=self.devices.process[0],
      recover=True,
    )
    progress = folder / PROGRESS_FILE
    own = workdir_lib.fingerprint(self.fingerprints)
    found = [0]
    if distributed.is_first():
      found = self._done(ledger, progress, own)
    done, *starts = json.loads(distributed.gather_texts(json.dumps(found))[0])
    starts = starts or [0]
    pending: list[Any] = []

    def flush(position):
      fetched = distributed.own_rows([output for *_, output in pending])
      for (at, epoch, rows, _), output in zip(pending, fetched, strict=True):
        ledger.append(
          rows.ids[rows.real],
          output["score"][rows.real],
          losses=output["loss"][rows.real],
          step=at,
          epoch=epoch,
        )
      pending.clear()
      ledger.flush()
      distributed.meet()
      if distributed.is_first():
        about = {"batches": position, "starts": starts, "fingerprint": own}
        workdir_lib.write_json(progress, about, sealed=True)

    count = self.task.samples
    if count is not None:
      count = -(-count // self.config.batch_size) * len(self.checkpoints)
    bar = terminal.Progress(count, done, "score", unit="batch", note=note)
    with contextlib.closing(bar):
      bar.begin()
      while len(starts) <= len(self.checkpoints):
        epoch = len(starts) - 1
        params, variables = self._load(self.checkpoints[epoch])
        at = max(done, starts[epoch])
        passes = self.task.passes(at - starts[epoch])
        for rows, output in prefetch.bounded(
          self._score(params, variables, batch) for batch in passes
        ):
          pending.append((at, epoch, rows, output))
          at += 1
          if len(pending) >= self.config.flush_every:
            flush(at)
            bar.update(at - bar.done)  # scored, not only asked for
        starts.append(at)
        flush(at)
        bar.update(at - bar.done)
    return self.task.samples or len(ledger.matrix()[0])

  def _score(self, params, variables, batch):
    rows = self.task.take(batch)
    output = self.score_step(
      params,
      self.reference and self.reference.for_batch(batch),
      self.devices.put(rows.seen),
      self.task.resident,
      **variables,
    )
    return rows._replace(seen={}), output

  def _done(self, ledger, progress, own):
    """Counts batches that are scored and on record; also the passes' starts.

    Rows reach the disk before their count: rows that a kill cuts off in between
    are scored again, and a ledger has one row for each all the same.
    """
    lost = ledger.first_lost_step
    if lost is not None:
      logging.warning(
        "%s: rows of batches from %d on were lost; they are scored again.",
        ledger.path.joinpath(*ledger.lost_files[:1]),
        lost,
      )
      ledger.forget_from(lost)
    if not (progress.exists() and ledger.epochs):
      return [0]
    found = workdir_lib.read_json(progress, {"batches": int, "starts": list})
    if found.get("fingerprint", own) != own:
      raise ValueError(
        f"{progress} is of another job: its fingerprint is"
        f" {found['fingerprint']!r}, expected {own!r}. Delete it to score all"
        " again."
      )
    if lost is None:
      return [found["batches"], *found["starts"]]
    return [
      min(found["batches"], lost),
      *(start for start in found["starts"] if start <= lost),
    ]


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, scores, and prints the result and where it is."""
  result = score_dataset(config, workdir, note=terminal.note)
  print(json.dumps(result, indent=2), flush=True)
  for name in (RESULT_FILE, LEDGER_FOLDER):
    terminal.note(f"  {pathlib.Path(workdir) / name}")
