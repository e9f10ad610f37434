"""Images with class labels, some of which may be wrong."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import config_dict

from configs import classification as classification_config
from experiments import models
from experiments.data import filters, noise, pipeline, sources
from experiments.models import initial
from experiments.runtime import checkpoint, distributed, workdir as workdir_lib
from experiments.tasks import evaluation
from experiments.tasks.base import (
  Headline,
  Reference,
  Rows,
  Samples,
  Task,
  Truth,
)
from experiments.tasks.classification import (
  data as data_lib,
  losses,
  reference as reference_lib,
)


class Classification(Task):
  """Image classification; every sample's loss is its own."""

  configs = classification_config
  headline = Headline("test_loss", "test_accuracy")

  def __init__(
    self,
    config: config_dict.ConfigDict,
    devices: distributed.Devices,
    *,
    direction: str | None = None,
    data: data_lib.Data | None = None,
  ):
    """Loads data, and makes the model.

    Args:
      config: as `configs/classification.py` describes it.
      devices: the devices to compute on.
      direction: of the run's method.
      data: as `data.load_data` gave it for this config; None loads it.

    Raises:
      ValueError: a name, a filter or weights that don't fit.
      FileNotFoundError: data or weights that are not there.
    """
    self.config, self.devices = config, devices
    if data is None:
      data = data_lib.load_data(
        config, needs_clean=direction == "clean_gradient"
      )
    self.data = data
    self._scaling: dict[str, Any] = {"mean": data.mean, "std": data.std}
    shuffled = {
      "batch_size": config.batch_size,
      "seed": config.seed,
      "indices": data.indices,
      "flip": config.data.flip,
      **self._scaling,
    }
    self.steps_per_epoch = pipeline.steps_per_epoch(
      self._samples, config.batch_size
    )
    self.batches = pipeline.train_batches(
      data.train.images,
      data.labels.labels,
      process=devices.process,
      **shuffled,
    )
    self._test_batches = pipeline.eval_batches(
      data.test.images,
      data.test.labels,
      batch_size=devices.divided(config.eval_batch_size),
      process=devices.process,
      **self._scaling,
    )
    self._test_start = self._test_batches.get_state()
    apply, self.params = initial.for_data(
      config.model, data, seed=config.seed, place=devices.place
    )
    self.fingerprints = {
      "data": pipeline.fingerprint(
        data.train.fingerprint, data.labels.labels, **shuffled
      )
    }
    self.fingerprints |= models.fingerprints(config.model)
    if config.model.pretrained is not None:
      self.fingerprints["initial"] = checkpoint.fingerprint(self.params)
    self.data_fingerprints = filters.fingerprints(
      config, data.train, data.labels
    )
    self._apply, self.statistics = apply, apply.statistics
    self.losses_fn = losses.make_losses_fn(apply)
    self.outputs = losses.make_outputs(losses.make_outputs_fn(apply), apply)
    self._eval_step = evaluation.make_eval_step(self.losses_fn)

  @classmethod
  def create_for_scoring(
    cls,
    config: config_dict.ConfigDict,
    devices: distributed.Devices,
    folder: pathlib.Path,
    *,
    direction: str | None = None,
  ) -> Task:
    """See `Task`. Images are scaled as the learner saw them."""
    data = data_lib.load_data(config, needs_clean=direction == "clean_gradient")
    if (folder / data_lib.INPUT_FILE).exists():
      scaling = workdir_lib.read_input(folder)
      data = data._replace(mean=scaling["mean"], std=scaling["std"])
    return cls(config, devices, direction=direction, data=data)

  @classmethod
  def load_fingerprints(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> dict[str, str]:
    """See `Task`."""
    labels = filters.own_labels(folder / data_lib.LABELS_FILE, ledger)
    train = sources.of_config(config.data, config.data.train_split)
    return filters.fingerprints(config, train, labels)

  @classmethod
  def load_samples(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> Samples:
    """See `Task`. Images are shown as they are, whatever the model sees."""
    config = config.copy_and_resolve_references().unlock()
    config.model.pretrained = None
    data = data_lib.load_data(config)
    truth = filters.own_labels(folder / data_lib.LABELS_FILE, ledger)
    title = f"{config.data.name} {config.data.train_split}"
    if truth.rate:
      title += f", {config.noise.kind} noise {truth.rate:.3g}"
    facts = {
      "data set": config.data.name,
      "split": config.data.train_split,
      "label noise": config.noise.kind,
      "noise rate asked for": config.noise.rate,
      "model": config.model.name,
    }
    dataset = {
      "labels": truth.labels,
      # Where no noise was added, nobody knows which labels are true.
      "true_labels": truth.clean_labels if truth.rate else None,
      "suggested": reference_lib.suggest_labels(config, data),
      "class_names": data.train.class_names,
      "captions": data.train.ids,
      "images": data.train.images,
    }
    return Samples(title, facts, dataset)

  @property
  def samples(self) -> int:
    """See `Task`."""
    return len(self.data.train.labels)

  @property
  def _samples(self):
    rows = self.data.indices
    return len(self.data.train.labels if rows is None else rows)

  def take(self, batch: dict[str, np.ndarray]) -> Rows:
    """See `Task`."""
    return Rows(
      batch["index"],
      batch["index"] >= 0,
      {key: batch[key] for key in ("image", "label", "mask")},
    )

  def passes(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """See `Task`."""
    labels = self.data.labels.labels
    return pipeline.eval_batches(
      self.data.train.images,
      labels,
      batch_size=self.config.batch_size,
      indices=np.arange(first * self.config.batch_size, len(labels)),
      process=self.devices.process,
      **self._scaling,
    )

  def evaluate(self, params: Any, **variables: Any) -> dict[str, float]:
    """See `Task`."""
    self._test_batches.set_state(self._test_start)
    batches = (
      self.devices.put(self.take(batch).seen) for batch in self._test_batches
    )
    found = evaluation.evaluate(self._eval_step, params, batches, **variables)
    return {f"test_{name}": value for name, value in found.items()}

  def check_losses_fn(self) -> Callable[..., Any]:
    """See `Task`."""
    return losses.make_training_losses_fn(self._apply)

  def check_batch(self) -> Any:
    """See `Task`."""
    return self.devices.place_rows(
      data_lib.draw_batch(
        self.data,
        samples=self.config.mimic.check_samples,
        seed=self.config.seed,
      )
    )

  def load_reference(self, direction: str) -> Reference:
    """See `Task`."""
    return reference_lib.load(
      self.config, direction, self.params, self.data, self.devices
    )

  def facts(self) -> dict[str, Any]:
    """See `Task`."""
    return {
      "train_samples": self._samples,
      "noise_rate": self.data.labels.rate,
    }

  def result_fingerprints(self) -> dict[str, str]:
    """See `Task`."""
    return {
      "input": workdir_lib.fingerprint(data_lib.describe_input(self.data))
    }

  def save(self, folder: pathlib.Path) -> None:
    """See `Task`."""
    data_lib.write_input(folder, self.data)
    noise.save(
      folder / data_lib.LABELS_FILE, self.data.labels, self.data.train.ids
    )

  @classmethod
  def noise_kinds(cls, config: config_dict.ConfigDict) -> tuple[str, ...]:
    """See `Task`."""
    return (config.noise.column or config.noise.kind,)

  @classmethod
  def reference_overrides(
    cls, config: config_dict.ConfigDict, seed: int
  ) -> dict[str, Any]:
    """See `Task`."""
    wanted = config.study.reference
    # Another architecture has no use for the learner's weights.
    own = {"model.pretrained": None, "model.options": wanted.options}
    own = own if wanted.model or wanted.widths or wanted.options else {}
    fields = {
      "model.name": wanted.model,
      "model.widths": tuple(wanted.widths),
      "data.train_split": config.data.test_split
      if wanted.test_leak
      else wanted.train_split,
    }
    return {
      **super().reference_overrides(config, seed),
      "noise.seed": seed + wanted.seed_offset,
      "noise.kind": "symmetric",
      **{f"noise.{name}": None for name in data_lib.NOISE_OPTIONS},
      **{field: value for field, value in fields.items() if value},
      **own,
    }

  @classmethod
  def load_truth(
    cls, config: config_dict.ConfigDict, folder: pathlib.Path
  ) -> Truth:
    """See `Task`."""
    labels = filters.own_labels(
      folder / data_lib.LABELS_FILE, workdir_lib.of_result(folder)
    )
    (kind,) = cls.noise_kinds(config)
    return Truth(
      np.arange(len(labels.labels)), np.where(labels.is_noisy, kind, "")
    )
