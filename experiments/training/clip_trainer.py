"""Trains one CLIP with one method."""

import contextlib
import functools
import json
import pathlib
import time
from typing import Any

import numpy as np

import gradmimic_jax as gm
from configs import clip as clip_config
from experiments import methods
from experiments.models import clip
from experiments.models.pretrained import clip as clip_pretrained
from experiments.runtime import (
  checkpoint,
  distributed,
  locks,
  sharding,
  workdir as workdir_lib,
)
from experiments.tasks.contrastive import (
  data as clip_data,
  evaluation as clip_features,
  losses as contrastive,
  reference as clip_reference,
)
from experiments.training import loop, optimizer, reference_check, steps

RESULT_FILE = workdir_lib.RESULT_FILE
LEDGER_FOLDER = "ledger"
METHODS = (
  "sgd",
  "grad_mimic",
  "grad_mimic_weights",
  "grad_mimic_outputs",
  "output_agreement",
  "rho",
  "rho_topk",
  "random",
)

# What a run doesn't depend on, or depends on by its contents, which its
# fingerprint has: these fields may change when it is continued.
FREE = (
  "select.",
  "study.",
  "checkpoint.",
  "mimic.force",
  "data.shards",
  "data.held_out_shards",
  "data.data_dir",
  "data.num_threads",
  "data.max_broken_share",
)


def train_and_evaluate(config: Any, workdir: Any) -> dict[str, Any]:
  """Trains and evaluates; goes on where an interrupted run stopped.

  Called by all processes of a job at once; they share every batch.

  Args:
    config: as `configs/clip.py` describes it.
    workdir: the run's folder, which all processes see. Gets `config.json`,
      checkpoints, `metrics.jsonl` with TensorBoard events beside it, the ledger
      of a method with scores, by uid, and at the end `result.json`.

  Returns:
    What is in `result.json`: the last evaluation, counts, and the seconds since
    the run was last started.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, a
      tokenizer that doesn't fit the model, a batch that the devices don't
      divide, or shards that are broken.
    FileNotFoundError: shards or a reference that are not there.
    locks.InUseError: another run works in the workdir.
  """
  folder = workdir_lib.check(workdir, config, clip_config, free=FREE)
  loop.check_counts(
    config,
    "batch_size",
    "samples_seen",
    "eval_every",
    "eval_batch_size",
    "checkpoint.every_steps",
    "checkpoint.keep",
  )
  started = time.monotonic()
  result_file = folder / RESULT_FILE
  with contextlib.ExitStack() as stack:
    finished = distributed.agree(result_file.exists())
    if not finished:
      stack.enter_context(locks.hold(folder))
    run = Run(config, folder, clip_data.load(config))
    checked = run.check_reference()
    if finished:
      result = workdir_lib.read_result(result_file, run.fingerprint)
      loop.check_finished(folder, run.ledger())
      return result
    if distributed.is_first():
      workdir_lib.claim(workdir, config, clip_config, free=FREE)
      reference_check.save(folder, checked)
    distributed.meet()
    result = run.to_the_end()
    result["seconds"] = round(time.monotonic() - started, 2)
    if distributed.is_first():
      workdir_lib.write_json(result_file, result, sealed=True)
    return result


class Run:
  """One run's parts, put together, and its loop."""

  def __init__(self, config: Any, folder: pathlib.Path, data: clip_data.Data):
    self.folder, self.data = folder, data
    self.config = config = config.copy_and_resolve_references().unlock()
    self.total_steps = config.samples_seen // config.batch_size
    if not self.total_steps:
      raise ValueError(
        f"config.samples_seen is {config.samples_seen}, less than one batch of"
        f" {config.batch_size}; expected that many at least."
      )
    self.method = _method(config)
    self.devices = distributed.Devices(
      config.mesh, batch_size=config.batch_size
    )
    self.fingerprints = {
      "config": workdir_lib.fingerprint(
        workdir_lib.without(config, (*FREE, *workdir_lib.ALWAYS_FREE))
      ),
      "data": data.fingerprint,
    }
    size = config.data.image_size
    apply, params = clip_pretrained.create(
      config.model,
      input_shape=(size, size, 3),
      seed=config.seed,
      place=self.devices.place,
    )
    if config.model.pretrained is not None:
      self.fingerprints["initial"] = checkpoint.fingerprint(params)
    self.apply = apply = clip_features.scaled(
      apply, config.data.mean, config.data.std
    )
    self.reference = clip_reference.load(
      config, self.method, params, data, self.devices
    )
    if self.reference is not None:
      self.fingerprints["reference"] = self.reference.fingerprint
    self.fingerprint = workdir_lib.fingerprint(self.fingerprints)
    config.mimic.layers = clip.mimic_layers(config.mimic.layers, params)
    self.losses_fn = contrastive.make_losses_fn(
      apply, config.loss, sharding=self.devices.rows
    )
    tx = optimizer.for_contrastive(
      config.optimizer, total_steps=self.total_steps
    )
    self.state = self.devices.compute(
      functools.partial(steps.init_state, tx=tx), params
    )
    self.train_step = steps.make_train_step(
      self.losses_fn,
      tx,
      self.method,
      config.mimic,
      outputs=contrastive.outputs_of(
        apply, config.loss, sharding=self.devices.rows
      ),
      out_shardings=sharding.of_step(self.state, self.devices.mesh),
    )
    self.evaluate = clip_features.Evaluation(
      apply,
      data,
      self.devices,
      loss=config.loss,
      batch_size=config.eval_batch_size,
    )

  def check_reference(self) -> dict[str, Any] | None:
    """What the check found out, if any; raises if the reference would harm."""
    return reference_check.check(
      self.config,
      self.folder,
      contrastive.make_losses_fn(self.apply, self.config.loss),
      self.state.params,
      self.reference,
      self._first_pairs,
      instead="output_agreement or grad_mimic_outputs",
    )

  def _first_pairs(self):
    """Pairs of the first batch, the same in all processes."""
    iterator = iter(self.data.batches)
    batch = next(iterator)
    iterator.close()
    rows = batch["mask"].nonzero()[0][: self.config.mimic.check_samples]
    return self.devices.place_whole(
      distributed.from_first(
        {key: batch[key][rows] for key in ("image", "text")}
      )
    )

  def to_the_end(self) -> dict[str, Any]:
    """Restores, goes through the steps that are left, and sums up."""
    batches = iter(self.data.batches)
    evaluation = loop.run(
      self.folder,
      self.state,
      batches,
      schedule=loop.schedule(
        self.config,
        total_steps=self.total_steps,
        eval_every=self.config.eval_every,
        save_every=self.config.checkpoint.every_steps,
        keep_every=self.config.checkpoint.keep_every,
      ),
      fingerprint=self.fingerprint,
      train_step=self.train_step,
      take=lambda _, read: self.take(read.batch, read.epoch),
      evaluate=self.evaluate,
      ledger=self.ledger(),
    )
    batches.close()
    statistics = getattr(batches, "statistics", None)
    return {
      "fingerprint": self.fingerprint,
      **evaluation,
      "steps": self.total_steps,
      "samples_seen": self.total_steps * self.config.batch_size,
      "train_pairs": self.data.train_pairs,
      "nonfinite_samples": loop.nonfinite_samples(self.folder),
      # What was found in the shards, broken samples and all.
      "shards": None if statistics is None else statistics.as_dict(),
    }

  def take(self, batch: dict[str, np.ndarray], epoch: int = 0) -> loop.Taken:
    """A batch as the train step takes it."""
    seen = {key: batch[key] for key in ("image", "text", "mask")}
    return loop.Taken(
      ids=batch["uid"],
      real=batch["mask"],
      epoch=epoch,
      reference=self.reference and self.reference.for_batch(batch),
      batch=self.devices.put(seen),
    )

  def ledger(self) -> gm.ScoreLedger | None:
    """The run's ledger; None for a method without scores."""
    if self.method is None or self.method.score is None:
      return None
    return gm.ScoreLedger(
      self.folder / LEDGER_FOLDER,
      fingerprints=self.fingerprints,
      writer=self.devices.process[0],
      recover=True,
    )


def _method(config):
  if config.method not in METHODS:
    raise ValueError(
      f"config.method is {config.method!r}; expected one of"
      f" {', '.join(METHODS)} (losses that depend on batch mates leave no"
      " others)."
    )
  method = methods.create(config.method, config.mimic)
  if method is not None and method.direction not in (
    None,
    "weights",
    "outputs",
  ):
    raise ValueError(
      f"config.mimic.direction is {config.mimic.direction!r}; expected"
      " 'weights' or 'outputs'."
    )
  return method


def main(config: Any, workdir: str) -> None:
  """Trains, then prints the result."""
  print(json.dumps(train_and_evaluate(config, workdir), indent=2))
