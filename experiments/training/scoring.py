"""Scores a data set in one pass for each checkpoint of a run."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np
from absl import logging
from ml_collections import config_dict

import gradmimic_jax as gm
from configs import base, score as score_config
from experiments import methods, models
from experiments.data import filters, noise, pipeline
from experiments.runtime import (
  checkpoint,
  distributed,
  locks,
  metrics as writers,
  workdir as workdir_lib,
)
from experiments.tasks.classification import losses as classification
from experiments.training import (
  reference as reference_lib,
  steps,
  trainer as train,
)

RESULT_FILE = workdir_lib.RESULT_FILE
LEDGER_FOLDER = train.LEDGER_FOLDER
RUN_FILE = "run.json"  # the learner's config, as it was scored
PROGRESS_FILE = "progress.json"
# May change: they name the same inputs, or don't matter to the scores.
FREE = ("learner", "data_dir", "flush_every", "mimic.force")


def score_dataset(config: Any, workdir: Any) -> dict[str, Any]:
  """Scores every sample once for each checkpoint; goes on where it stopped.

  Called by all processes of a job at once; they share every batch.

  Args:
    config: as `configs/score.py` describes it.
    workdir: gets `config.json`, `run.json`, `labels.npz`, the ledger (an epoch
      is a checkpoint), and at the end `result.json`.

  Returns:
    What is in `result.json`: the checkpoints' steps, counts, fingerprints.

  Raises:
    ValueError: an unknown field or name, a method without scores, a workdir of
      another config or of other data.
    FileNotFoundError: a learner, data set or reference that is not there.
    locks.InUseError: another job works in the workdir.
  """
  workdir_lib.check(workdir, config, score_config, free=FREE)
  for field in ("batch_size", "flush_every"):
    if config[field] < 1:
      raise ValueError(
        f"config.{field} is {config[field]}; expected at least 1."
      )
  folder = pathlib.Path(workdir)
  with locks.hold(folder):
    run_config = learners_config(config)
    scoring = _Pass(config, run_config, folder)
    if distributed.is_first():
      workdir_lib.claim(workdir, config, score_config, free=FREE)
      workdir_lib.write_json(
        folder / RUN_FILE, workdir_lib.as_dict(run_config), sealed=True
      )
      noise.save(
        folder / train.LABELS_FILE, scoring.data.labels, scoring.data.train.ids
      )
    distributed.meet()
    scoring.to_the_end(folder)
    result = {
      "checkpoints": scoring.checkpoints,
      "samples": len(scoring.data.train.labels),
      "fingerprints": scoring.fingerprints,
      "run": workdir_lib.fingerprint(workdir_lib.as_dict(run_config)),
    }
    if distributed.is_first():
      workdir_lib.write_json(folder / RESULT_FILE, result, sealed=True)
    return result


def check_run(folder: pathlib.Path, section: dict[str, Any]) -> None:
  """Raises ValueError where `run.json` is not that of the finished job."""
  file = folder / RESULT_FILE
  own = workdir_lib.read_json(file, {}).get("run") if file.exists() else None
  found = workdir_lib.fingerprint(section)
  if own not in (None, found):
    raise ValueError(
      f"{folder / RUN_FILE} is of another job: its fingerprint is {found!r},"
      f" and that in {RESULT_FILE} is {own!r}. Give the job's command again."
    )


def learners_config(config: Any) -> Any:
  """The learner's own config, with what is scored otherwise.

  Args:
    config: as `configs/score.py` describes it.

  Returns:
    A config with every field of `configs/base.py`.

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
    file.parent, train.FREE, workdir_lib.of_result(file.parent)
  )
  run = complete(workdir_lib.read_json(file, {}), file)
  run.method, run.batch_size = config.method, config.batch_size
  run.mimic = config_dict.ConfigDict(workdir_lib.as_dict(config.mimic))
  run.data.filter = None  # all are scored, also those that it left out
  if config.method != "grand_offline":  # which starts where the learner did
    run.model.pretrained = None  # what came of it is in the checkpoints
  if config.split is not None:
    run.data.train_split = config.split
  if config.data_dir is not None:
    run.data.data_dir = config.data_dir
  return run


def complete(section: dict[str, Any], file: pathlib.Path) -> Any:
  """A stored config, with the defaults of fields that are newer than it.

  Args:
    section: the config.
    file: where it was stored.

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

  defaults = workdir_lib.as_dict(base.get_config())
  return config_dict.ConfigDict(merged(defaults, section, ""))


class _Pass:
  """What scores batches, and which."""

  def __init__(self, config: Any, run: Any, folder: pathlib.Path):
    self.config, self.run = config, run
    self.devices = distributed.Devices(
      config.mesh, batch_size=config.batch_size
    )
    self.learner = pathlib.Path(config.learner)
    data = train.load_data(run)
    shown = self.learner / reference_lib.INPUT_FILE
    if shown.exists():  # images are scaled as the learner saw them
      scaling = workdir_lib.read_input(self.learner)
      data = data._replace(mean=scaling["mean"], std=scaling["std"])
    self.data = data
    apply, params = models.create(
      run.model,
      input_shape=data.train.images.shape[1:],
      num_classes=data.train.num_classes,
      seed=run.seed,
    )
    self.params = self.devices.place(params)
    method = methods.create(config.method, config.mimic)
    self.score_step = steps.make_score_step(
      classification.make_losses_fn(apply),
      method,
      config.mimic,
      classification.make_outputs_fn(apply),
      out_shardings=self.devices.rows,
    )
    self.reference = reference_lib.load(
      run, method, self.params, data, folder, self.devices
    )
    self.checkpoints = list(config.steps or checkpoint.steps(self.learner))
    if not self.checkpoints:
      raise FileNotFoundError(
        f"there is no checkpoint in {self.learner}, which config.learner names."
      )
    learner = workdir_lib.fingerprint(
      [
        checkpoint.fingerprint(self._params_of(step))
        for step in self.checkpoints
      ]
    )
    self.fingerprints = {
      "config": workdir_lib.fingerprint(
        workdir_lib.without(config, (*FREE, *workdir_lib.ALWAYS_FREE))
      ),
      "learner": learner,
      **filters.fingerprints(run, data.train, data.labels),
    }
    if self.reference is not None:
      self.fingerprints["reference"] = self.reference.fingerprint
    self.batches_a_pass = pipeline.steps_per_epoch(
      len(data.train.labels), config.batch_size
    )

  def _params_of(self, step):
    return checkpoint.load_params(self.learner, self.params, step=step)

  def _batches(self, first):
    """The pass from one of its batches on."""
    rows = range(first * self.config.batch_size, len(self.data.train.labels))
    return pipeline.eval_batches(
      self.data.train.images,
      self.data.labels.labels,
      batch_size=self.config.batch_size,
      indices=rows,
      mean=self.data.mean,
      std=self.data.std,
      process=self.devices.process,
    )

  def to_the_end(self, folder: pathlib.Path) -> None:
    """Scores what is left to score."""
    ledger = gm.ScoreLedger(
      folder / LEDGER_FOLDER,
      fingerprints=self.fingerprints,
      writer=self.devices.process[0],
      recover=True,
    )
    progress = folder / PROGRESS_FILE
    own = workdir_lib.fingerprint(self.fingerprints)
    done = self._done(ledger, progress, own) if distributed.is_first() else 0
    done = int(distributed.from_first(np.int32(done)))
    total = self.batches_a_pass * len(self.checkpoints)
    pending: list[Any] = []

    def flush(position):
      fetched = distributed.own_rows([output for *_, output in pending])
      for (at, index, _), output in zip(pending, fetched, strict=True):
        real = index >= 0
        ledger.append(
          index[real],
          output["score"][real],
          losses=output["loss"][real],
          step=at,
          epoch=at // self.batches_a_pass,
        )
      pending.clear()
      ledger.flush()
      distributed.meet()
      if distributed.is_first():
        counts = {"batches": position, "of": total, "fingerprint": own}
        workdir_lib.write_json(progress, counts, sealed=True)

    with contextlib.closing(writers.progress(total, done, "score")) as bar:
      for epoch in range(done // self.batches_a_pass, len(self.checkpoints)):
        params = self._params_of(self.checkpoints[epoch])
        start = epoch * self.batches_a_pass
        first = max(done - start, 0)
        for at, batch in enumerate(self._batches(first), start + first):
          index, whole = batch.pop("index"), batch.pop("batch_index", None)
          reference = self.reference and self.reference.for_batch(
            index, None, whole
          )
          output = self.score_step(params, reference, self.devices.put(batch))
          pending.append((at, index, output))
          if len(pending) >= self.config.flush_every:
            flush(at + 1)
            bar.update(at + 1 - bar.n)  # scored, not only asked for
      if pending:
        flush(total)

  def _done(self, ledger, progress, own):
    """How many batches have been scored, and are on record.

    Rows reach the disk before the count of them: what a kill cuts off in
    between is scored again, and a ledger has one row for it all the same.
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
      return 0
    found = workdir_lib.read_json(progress, {"batches": int})
    if found.get("fingerprint", own) != own:
      raise ValueError(
        f"{progress} is of another job: its fingerprint is"
        f" {found['fingerprint']!r}, expected {own!r}. Delete it to score all"
        " again."
      )
    return found["batches"] if lost is None else min(found["batches"], lost)


def main(config: Any, workdir: str) -> None:
  """Scores, then prints the result."""
  print(json.dumps(score_dataset(config, workdir), indent=2))
