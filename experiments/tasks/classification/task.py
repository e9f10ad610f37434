"""Images with class labels, some of which may be wrong."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import config_dict

from configs import classification as classification_config
from experiments import models
from experiments.data import decoding, filters, noise, sources, stream
from experiments.data.pairs import images as images_lib
from experiments.models import initial
from experiments.runtime import (
  checkpoint,
  distributed,
  workdir as workdir_lib,
)
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
  inputs,
  losses,
  reference as reference_lib,
)

BAD_IMAGES_FILE = "bad_images.json"  # reasons by id, of each split


class _Shown:
  """Images of a page: each is decoded when it is shown, black if it is bad."""

  def __init__(self, source: sources.Source, transform: decoding.Transform):
    self._source, self._transform = source, transform

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, position: int) -> np.ndarray:
    return self._decode(position, self._transform)

  def at_most(self, position: int, side: int) -> np.ndarray:
    """Decodes an image no larger than needed; JPEG files cost less then."""
    transform = self._transform
    if transform.size is not None and side < transform.size:
      transform = dataclasses.replace(transform, size=side)
    return self._decode(position, transform)

  def _decode(self, position, transform):
    (stored,) = self._source.read([position])
    try:
      return transform.decode(stored)
    except images_lib.BadImageError:
      return np.zeros((1, 1, 1), np.uint8)


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
        config, needs_clean=direction == "clean_gradient", devices=devices
      )
    self.data = data
    shuffled = {
      "batch_size": config.batch_size,
      "seed": config.seed,
      "indices": data.indices,
      "augmentation": data.augmentation,
    }
    self.steps_per_epoch = stream.steps_per_epoch(
      self._samples, config.batch_size
    )
    self._reading = data_lib.reading(config, devices)
    self.batches = stream.train_batches(
      data.train, data.labels.labels, **shuffled, **self._reading
    )
    self.expand = inputs.make_expand(tuple(data.mean), tuple(data.std))
    self._listing: pathlib.Path | None = None
    apply, self.params = initial.for_data(
      config.model, data, seed=config.seed, place=devices.place
    )
    self.fingerprints = {
      "data": stream.fingerprint(
        data.train.source.fingerprint,
        data.labels.labels,
        transform=data.train.reader.transform,
        mean=data.mean,
        std=data.std,
        **shuffled,
      )
    }
    self.fingerprints |= models.fingerprints(config.model)
    if config.model.pretrained is not None:
      self.fingerprints["initial"] = checkpoint.fingerprint(self.params)
    self.data_fingerprints = filters.fingerprints(
      config, data.train.source, data.labels
    )
    self._apply, self.statistics = apply, apply.statistics
    self.losses_fn = losses.make_losses_fn(apply)
    self.outputs = losses.make_outputs(losses.make_outputs_fn(apply), apply)
    self._eval_step = evaluation.make_eval_step(self.losses_fn, self.expand)

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
    scaling = None
    if (folder / data_lib.INPUT_FILE).exists():
      shown = workdir_lib.read_input(folder)
      scaling = shown["mean"], shown["std"]
    data = data_lib.load_data(
      config,
      needs_clean=direction == "clean_gradient",
      devices=devices,
      scaling=scaling,
    )
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
    train = sources.open(config.data, config.data.train_split)
    return filters.fingerprints(config, train, labels)

  @classmethod
  def load_samples(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> Samples:
    """See `Task`. No image is decoded but those that are asked for."""
    source = sources.open(config.data, config.data.train_split)
    transform = decoding.transform_of(config.data, source.channels)
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
      "suggested": reference_lib.suggest_labels(config, source),
      "class_names": source.class_names,
      "captions": source.ids,
      "images": None if source.channels is None else _Shown(source, transform),
    }
    return Samples(title, facts, dataset)

  @property
  def samples(self) -> int:
    """See `Task`."""
    return len(self.data.train.source)

  @property
  def _samples(self):
    rows = self.data.indices
    return len(self.data.train.source.labels if rows is None else rows)

  def take(self, batch: dict[str, np.ndarray]) -> Rows:
    """See `Task`."""
    return Rows(
      batch["index"],
      batch["index"] >= 0,
      {key: batch[key] for key in inputs.SEEN if key in batch},
    )

  @property
  def resident(self) -> Any:
    """See `Task`."""
    return self.data.train.resident

  def passes(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """See `Task`."""
    batches = stream.eval_batches(
      self.data.train,
      self.data.labels.labels,
      batch_size=self.config.batch_size,
      **self._reading,
    )
    batches.set_state({"step": first})
    return batches

  def evaluate(self, params: Any, **variables: Any) -> dict[str, float]:
    """See `Task`."""
    test = self.data.test
    batches = stream.eval_batches(
      test,
      test.source.labels,
      batch_size=self.devices.divided(self.config.eval_batch_size),
      **self._reading | {"worker_processes": False},
    )
    with contextlib.closing(batches):
      found = evaluation.evaluate(
        self._eval_step,
        params,
        (self.devices.put(self.take(batch).seen) for batch in batches),
        test.resident,
        **variables,
      )
    self._list_bad()
    return {f"test_{name}": value for name, value in found.items()}

  def check_losses_fn(self) -> Callable[..., Any]:
    """See `Task`."""
    return losses.make_training_losses_fn(self._apply)

  def check_batch(self) -> Any:
    """See `Task`."""
    batch = data_lib.draw_batch(
      self.data,
      samples=self.config.mimic.check_samples,
      seed=self.config.seed,
    )
    return self.devices.place_rows(batch)

  def load_reference(self, direction: str) -> Reference:
    """See `Task`."""
    return reference_lib.load(
      self.config, direction, self.params, self.data, self.devices
    )

  def _list_bad(self):
    """Tells all processes which images can't be used; lists them in a file."""
    for images in (self.data.train, self.data.test):
      images.bad.share(self.devices)
    found = {
      str(images.source): images.bad.listed()
      for images in (self.data.train, self.data.test)
      if images.bad.found
    }
    if found and self._listing is not None:
      workdir_lib.write_json(self._listing, found)

  def facts(self) -> dict[str, Any]:
    """See `Task`."""
    bad = len(self.data.train.bad.found)
    return {
      **({"bad_images": bad} if bad else {}),
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
      folder / data_lib.LABELS_FILE,
      self.data.labels,
      self.data.train.source.ids,
    )
    self._listing = folder / BAD_IMAGES_FILE

  def close(self) -> None:
    """See `Task`."""
    self.batches.close()

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
