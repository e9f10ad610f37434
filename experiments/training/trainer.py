"""Trains one model with one method."""

import contextlib
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
from absl import logging

import gradmimic_jax as gm
from experiments import methods
from experiments.data import filters, noise, pipeline, sources
from experiments.models import initial
from experiments.runtime import (
  checkpoint,
  distributed,
  locks,
  prefetch,
  sharding,
  workdir as workdir_lib,
)
from experiments.tasks.classification import losses as classification
from experiments.training import (
  loop,
  optimizer,
  reference as reference_lib,
  reference_check,
  steps,
)

RESULT_FILE = workdir_lib.RESULT_FILE
LEDGER_FOLDER = "ledger"
LABELS_FILE = "labels.npz"


# What a run doesn't depend on: these fields may change when it is continued.
FREE = ("select.", "study.", "checkpoint.", "mimic.force")
# Fields of `config.noise` that some kinds need.
NOISE_OPTIONS = ("mapping", "matrix", "path", "column", "id_column")


class Data(NamedTuple):
  """What a run trains and is tested on."""

  train: sources.Dataset
  test: sources.Dataset
  labels: noise.NoisyLabels
  indices: np.ndarray | None  # positions to train on; None is all of them
  clean: np.ndarray | None  # positions of the clean samples, if there are any
  mean: list[float]  # per channel, of pixels scaled to [0, 1]
  std: list[float]


def train_and_evaluate(config: Any, workdir: Any) -> dict[str, Any]:
  """Trains and evaluates; goes on where an interrupted run stopped.

  Called by all processes of a job at once; they share every batch.

  Args:
    config: as `configs/base.py` describes it.
    workdir: the run's folder, which all processes see. Gets `config.json`,
      `input.json`, `labels.npz`, checkpoints, `metrics.jsonl` with TensorBoard
      events beside it, the ledger of a method with scores, and at the end
      `result.json`.

  Returns:
    What is in `result.json`: test accuracy and loss, counts, and the seconds
    since the run was last started.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, a batch
      that the devices don't divide, or a file of the run that is damaged.
    FileNotFoundError: a data set or a reference that is not there.
    locks.InUseError: another run works in the workdir.
  """
  folder = workdir_lib.check(workdir, config, free=FREE)
  loop.check_counts(
    config,
    "batch_size",
    "eval_batch_size",
    "num_epochs",
    "checkpoint.every_epochs",
    "checkpoint.keep",
  )
  started = time.monotonic()
  result_file = folder / RESULT_FILE
  with contextlib.ExitStack() as stack:
    finished = distributed.agree(result_file.exists())
    if not finished:
      stack.enter_context(locks.hold(folder))
    data = load_data(config)
    run = Run(config, folder, data)
    checked = run.check_reference()
    if finished:
      result = workdir_lib.read_result(result_file, run.fingerprint)
      loop.check_finished(folder, run.ledger())
      return result
    if distributed.is_first():
      workdir_lib.claim(workdir, config, free=FREE)
      reference_check.save(folder, checked)
      reference_lib.write_input(folder, data)
      noise.save(folder / LABELS_FILE, data.labels, data.train.ids)
    distributed.meet()
    result = run.to_the_end()
    result["seconds"] = round(time.monotonic() - started, 2)
    if distributed.is_first():
      workdir_lib.write_json(result_file, result, sealed=True)
    return result


def load_data(config: Any) -> Data:
  """Train and test sets, noise and normalisation as the config has them."""
  train = sources.of_config(config.data, config.data.train_split)
  test = sources.of_config(config.data, config.data.test_split)
  labels = noise.apply_noise(
    train.labels,
    kind=config.noise.kind,
    rate=_noise_rate(config.noise),
    num_classes=train.num_classes,
    seed=config.noise.seed,
    class_names=train.class_names,
    ids=train.ids,
    partial=config.noise.partial,
    **{name: config.noise[name] for name in NOISE_OPTIONS},
  )
  if labels.missing:
    logging.warning(
      "%d of %d samples have no label in %s; theirs stay as they are.",
      labels.missing,
      len(labels.labels),
      config.noise.path,
    )
  indices = None
  if config.data.filter is not None:
    indices = filters.read(config.data.filter, config, train, labels)
  clean = None
  method = methods.create(config.method, config.mimic)
  if method is not None and method.direction == "clean_gradient":
    clean = reference_lib.clean_positions(
      labels.clean_labels,
      per_class=config.mimic.clean_per_class,
      num_classes=train.num_classes,
      seed=config.seed,
    )
    if indices is None:
      indices = np.arange(len(labels.labels))
    indices = indices[~np.isin(indices, clean)]
  if config.model.pretrained is not None:
    mean, std = initial.scaling(config.model.pretrained)
    if len(mean) not in (1, train.images.shape[-1]):
      raise ValueError(
        f"config.model.pretrained is {config.model.pretrained!r}, which was"
        f" trained on images of {len(mean)} channels; those of"
        f" {config.data.name} have {train.images.shape[-1]}. Take weights for"
        " such images."
      )
  else:
    pixels = train.images.reshape(-1, train.images.shape[-1])
    # Standard deviations of a constant channel would divide by zero.
    mean = (pixels.mean(axis=0) / 255).tolist()
    std = np.maximum(pixels.std(axis=0) / 255, 1e-3).tolist()
  return Data(train, test, labels, indices, clean, mean, std)


def _noise_rate(config):
  """The rate, or None where it is for the matrix or the table to say."""
  kind = noise.KINDS.get(config.kind)
  if config.rate == 0 and kind is not None and kind.rate != "needed":
    return None
  return config.rate


class Run:
  """One run's parts, put together, and its loop."""

  def __init__(self, config: Any, folder: pathlib.Path, data: Data):
    self.config, self.folder, self.data = config, folder, data
    self.devices = devices = distributed.Devices(
      config.mesh, batch_size=config.batch_size
    )
    scaling = {"mean": data.mean, "std": data.std}
    shuffled = {
      "batch_size": config.batch_size,
      "seed": config.seed,
      "indices": data.indices,
      "flip": config.data.flip,
      **scaling,
    }
    self.fingerprints = {
      "config": workdir_lib.fingerprint(
        workdir_lib.without(config, (*FREE, *workdir_lib.ALWAYS_FREE))
      ),
      "data": pipeline.fingerprint(
        data.train.fingerprint, data.labels.labels, **shuffled
      ),
    }
    samples = len(data.train.labels if data.indices is None else data.indices)
    self.steps_per_epoch = pipeline.steps_per_epoch(samples, config.batch_size)
    self.total_steps = config.num_epochs * self.steps_per_epoch
    self.train_batches = pipeline.train_batches(
      data.train.images,
      data.labels.labels,
      process=devices.process,
      **shuffled,
    )
    self.test_batches = pipeline.eval_batches(
      data.test.images,
      data.test.labels,
      batch_size=devices.divided(config.eval_batch_size),
      process=devices.process,
      **scaling,
    )
    self.test_start = self.test_batches.get_state()
    apply, params = initial.for_data(
      config.model, data, seed=config.seed, place=devices.place
    )
    if config.model.pretrained is not None:
      self.fingerprints["initial"] = checkpoint.fingerprint(params)
    self.losses_fn = classification.make_losses_fn(apply)
    tx = optimizer.create(config.optimizer, total_steps=self.total_steps)
    self.method = methods.create(config.method, config.mimic)
    self.reference = reference_lib.load(
      config, self.method, params, data, folder, devices
    )
    if self.reference is not None:
      self.fingerprints["reference"] = self.reference.fingerprint
    self.fingerprint = workdir_lib.fingerprint(self.fingerprints)
    self.state = devices.compute(
      functools.partial(steps.init_state, tx=tx), params
    )
    self.train_step = steps.make_train_step(
      self.losses_fn,
      tx,
      self.method,
      config.mimic,
      classification.make_outputs_fn(apply),
      out_shardings=sharding.of_step(self.state, devices.mesh),
    )
    self.eval_step = steps.make_eval_step(self.losses_fn)

  def check_reference(self) -> dict[str, Any] | None:
    """What the check found out, if any; raises if the reference would harm."""
    return reference_check.check(
      self.config,
      self.folder,
      self.losses_fn,
      self.state.params,
      self.reference,
      lambda: self.devices.place_rows(
        reference_check.batch_of(
          self.data,
          samples=self.config.mimic.check_samples,
          seed=self.config.seed,
        )
      ),
    )

  def to_the_end(self) -> dict[str, Any]:
    """Restores, goes through the steps that are left, and sums up."""
    evaluation = loop.run(
      self.folder,
      self.state,
      self.train_batches,
      schedule=loop.schedule(
        self.config,
        total_steps=self.total_steps,
        eval_every=self.steps_per_epoch,
        save_every=self.config.checkpoint.every_epochs * self.steps_per_epoch,
        keep_every=self.config.checkpoint.keep_every * self.steps_per_epoch,
      ),
      fingerprint=self.fingerprint,
      train_step=self.train_step,
      take=self.take,
      evaluate=self._evaluate,
      ledger=self.ledger(),
    )
    indices = self.data.indices
    return {
      "fingerprint": self.fingerprint,
      # Whose the files beside are.
      "fingerprints": {
        **self._ledger_fingerprints(),
        "input": workdir_lib.fingerprint(reference_lib.input_of(self.data)),
      },
      **evaluation,
      "steps": self.total_steps,
      "train_samples": len(
        self.data.train.labels if indices is None else indices
      ),
      "noise_rate": self.data.labels.rate,
      "nonfinite_samples": loop.nonfinite_samples(self.folder),
    }

  def take(self, step: int, read: prefetch.Read) -> loop.Taken:
    """A batch as the train step takes it."""
    batch = dict(read.batch)
    index, flipped = batch.pop("index"), batch.pop("flipped", None)
    whole = batch.pop("batch_index", None)
    return loop.Taken(
      ids=index,
      real=index >= 0,
      epoch=step // self.steps_per_epoch,
      reference=self.reference
      and self.reference.for_batch(index, flipped, whole),
      batch=self.devices.put(batch),
    )

  def ledger(self) -> gm.ScoreLedger | None:
    """The run's ledger; None for a method without scores."""
    if self.method is None or self.method.score is None:
      return None
    return gm.ScoreLedger(
      self.folder / LEDGER_FOLDER,
      fingerprints=self._ledger_fingerprints(),
      writer=self.devices.process[0],
      recover=True,
    )

  def _ledger_fingerprints(self):
    """The run's, and of which data and labels a filter made of it is."""
    return {
      **self.fingerprints,
      **filters.fingerprints(self.config, self.data.train, self.data.labels),
    }

  def _evaluate(self, params):
    self.test_batches.set_state(self.test_start)
    batches = (
      self.devices.put({key: batch[key] for key in ("image", "label", "mask")})
      for batch in self.test_batches
    )
    found = steps.evaluate(self.eval_step, params, batches)
    return {f"test_{name}": value for name, value in found.items()}


def main(config: Any, workdir: str) -> None:
  """Trains, then prints the result."""
  print(json.dumps(train_and_evaluate(config, workdir), indent=2))
