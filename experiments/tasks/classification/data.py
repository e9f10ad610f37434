"""Data of classification: images with labels."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments.data import (
  decoding,
  filters,
  noise,
  purposes,
  sources,
  statistics,
  store,
  stream,
)
from experiments.models import initial
from experiments.runtime import distributed, workdir as workdir_lib
from experiments.tasks.classification import inputs

INPUT_FILE = workdir_lib.INPUT_FILE
LABELS_FILE = "labels.npz"
# Fields of `config.noise` that some kinds need.
NOISE_OPTIONS = ("mapping", "matrix", "path", "column", "id_column")


class Data(NamedTuple):
  """Training and test data of a run; images are decoded when they are read."""

  train: store.Images
  test: store.Images
  labels: noise.NoisyLabels
  indices: np.ndarray | None  # positions to train on; None is all of them
  clean: np.ndarray | None  # positions of the clean samples, if there are any
  mean: list[float]  # per channel, of pixels scaled to [0, 1]
  std: list[float]
  augmentation: stream.Augmentation


def load_data(
  config: config_dict.ConfigDict,
  *,
  needs_clean: bool = False,
  devices: distributed.Devices | None = None,
  scaling: tuple[list[float], list[float]] | None = None,
) -> Data:
  """Opens train and test sets; adds noise and normalisation by the config.

  All processes call this at once. No image is decoded but those that are looked
  at for their mean and deviation.

  Args:
    config: as `configs/classification.py` describes it.
    needs_clean: whether to set samples with true labels aside, as many of each
      class as `config.mimic.clean_per_class` says; they are not trained on.
    devices: the run's; None: `Devices.alone()`.
    scaling: mean and deviation; None: as the config has it.

  Returns:
    The Data.

  Raises:
    ValueError: an unknown name, a filter of other data, or weights for images
      with other channels.
    FileNotFoundError: a data set, filter or table that is not there.
  """
  devices = devices or distributed.Devices.alone()
  train_set = sources.open(config.data, config.data.train_split)
  test_set = sources.open(config.data, config.data.test_split)
  _check_sets(config, train_set, test_set)
  labels = noise.apply_noise(
    train_set.labels,
    kind=config.noise.kind,
    rate=noise_rate(config.noise),
    num_classes=train_set.num_classes,
    seed=config.noise.seed,
    class_names=train_set.class_names,
    ids=train_set.ids,
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
    indices = filters.read(config.data.filter, config, train_set, labels)
  clean = None
  if needs_clean:
    clean = clean_positions(
      labels.clean_labels,
      per_class=config.mimic.clean_per_class,
      num_classes=train_set.num_classes,
      seed=config.seed,
    )
    if indices is None:
      indices = np.arange(len(labels.labels))
    indices = indices[~np.isin(indices, clean)]
  augmentation = _augmentation(config.data)
  train = open_images(
    config,
    train_set,
    devices=devices,
    random_crop=augmentation.crop_scale is not None,
  )
  test = open_images(config, test_set, devices=devices)
  if train.shape != test.shape:
    raise ValueError(
      f"samples of {train_set} have shape {train.shape}, those of {test_set}"
      f" {test.shape}; expected one shape: set config.data.image_size, such as"
      " 224, to resize them"
    )
  mean, std = scaling or _scaling(config, train, devices)
  inputs.check_scaling(mean, std, train_set.channels)
  return Data(train, test, labels, indices, clean, mean, std, augmentation)


def open_images(
  config: config_dict.ConfigDict,
  source: sources.Source,
  *,
  devices: distributed.Devices | None = None,
  random_crop: bool = False,
) -> store.Images:
  """Opens the images of a source as the config's model sees them.

  Args:
    config: as `configs/classification.py` describes it.
    source: as `sources.open` gives it.
    devices: the run's; None: `Devices.alone()`.
    random_crop: whether random crops of them are asked for.

  Returns:
    The Images.

  Raises:
    ValueError: a field that makes no sense.
  """
  threads = config.data.workers
  return store.Images(
    source,
    decoding.transform_of(config.data, source.channels),
    residence=config.data.residence,
    random_crop=random_crop,
    devices=devices,
    threads=None if threads < 0 else threads,
    bad_share=config.faults.bad_images,
  )


def reading(
  config: config_dict.ConfigDict,
  devices: distributed.Devices,
) -> dict[str, Any]:
  """Returns the options of `stream.Batches` that say who reads them."""
  workers = config.data.workers
  return {
    "process": devices.process,
    "workers": min(store.cores(), 16) if workers < 0 else workers,
    "worker_processes": config.data.worker_processes,
  }


def _augmentation(data):
  crops = ("center", "random_resized")
  if data.crop not in crops:
    raise ValueError(
      f"config.data.crop is {data.crop!r}; expected one of {', '.join(crops)}."
    )
  scale = None
  if data.crop == "random_resized":
    scale = tuple(data.crop_scale)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
      raise ValueError(
        f"config.data.crop_scale is {scale}; expected the least and the largest"
        " share of an image's area, such as (0.08, 1.0)."
      )
    if not data.image_size:
      raise ValueError(
        "config.data.crop is 'random_resized' and config.data.image_size 0;"
        " expected the size of the crops, such as 224."
      )
  return stream.Augmentation(bool(data.flip), scale)


def _check_sets(config, train, test):
  """Refuses two splits that no model fits, and models without images."""
  for name, ours, theirs in (
    ("classes", train.class_names, test.class_names),
    ("channels", train.channels, test.channels),
  ):
    if ours != theirs:
      raise ValueError(
        f"{train} has the {name} {_short(ours)} and {test} {_short(theirs)};"
        " expected the same in both."
      )
  if train.channels is not None:
    return
  if config.model.name in (
    "convnet",
    "resnet",
    "vit",
    "efficientnet_lite0",
  ):
    raise ValueError(
      f"{train} has features, and config.model.name is {config.model.name!r};"
      " expected a model for vectors, such as 'mlp' (a linear one with"
      " config.model.widths=())."
    )
  if config.data.flip or config.data.crop != "center":
    raise ValueError(
      f"{train} has features, which can't be mirrored or cropped; expected"
      " config.data.flip=False and config.data.crop='center'."
    )


def _short(value):
  return str(value) if len(str(value)) <= 80 else f"{str(value)[:80]}..."


def _scaling(config, images, devices):
  """Finds mean and deviation: the config's, the weights' or the images'."""
  channels = images.source.channels
  if channels is None:
    return [0.0], [1.0]
  given = tuple(config.data.mean), tuple(config.data.std)
  if any(given):
    if not all(given):
      raise ValueError(
        f"config.data.mean is {given[0]} and config.data.std {given[1]};"
        " expected both, or neither."
      )
    return [float(x) for x in given[0]], [float(x) for x in given[1]]
  if config.model.pretrained is not None:
    mean, std = initial.scaling(config.model.pretrained, config.model.name)
    if len(mean) not in (1, channels):
      raise ValueError(
        f"config.model.pretrained is {config.model.pretrained!r}, which was"
        f" trained on images of {len(mean)} channels; those of"
        f" {config.data.name} have {channels}. Take weights for such images."
      )
    return mean, std
  return statistics.measure(
    images, samples=config.data.statistics_samples, devices=devices
  )


def noise_rate(config: config_dict.ConfigDict) -> float | None:
  """Returns the rate, or None where the matrix or the table has it."""
  kind = noise.KINDS.get(config.kind)
  if config.rate == 0 and kind is not None and kind.rate != "needed":
    return None
  return config.rate


def draw_share(labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
  """Draws a share of the samples, class by class.

  Args:
    labels: integers `[N]`.
    share: of each class's samples, above 0 and up to 1; at least one is drawn.
    seed: of the draw. A larger share has the samples of a smaller one, too.

  Returns:
    Their positions, rising.
  """
  order = np.random.default_rng((seed, purposes.PARTS)).permutation(len(labels))
  drawn = []
  for label in np.unique(labels):
    own = order[labels[order] == label]
    drawn.append(own[: max(1, round(share * len(own)))])
  return np.sort(np.concatenate(drawn))


def clean_positions(
  labels: np.ndarray,
  *,
  per_class: int,
  num_classes: int,
  seed: int,
  split: str = "train",
) -> np.ndarray:
  """Draws the samples whose labels are taken for granted.

  Args:
    labels: the true labels, integers `[N]`.
    per_class: number of samples of each class, k.
    num_classes: number of classes, C.
    seed: of the draw.
    split: the split to draw from, for error messages.

  Returns:
    Their positions `[k * C]`, rising.

  Raises:
    ValueError: k is less than 1, or a class has not more than k samples.
  """
  if per_class < 1:
    raise ValueError(
      f"config.mimic.clean_per_class is {per_class}; expected at least 1."
    )
  counts = np.bincount(labels, minlength=num_classes)
  if counts.min() <= per_class:
    raise ValueError(
      f"config.mimic.clean_per_class is {per_class}, and class"
      f" {counts.argmin()} has {counts.min()} {split} samples; expected fewer"
      " than every class has, as train samples that are clean are not trained"
      " on."
    )
  rng = np.random.default_rng((seed, purposes.CLEAN))
  chosen = [
    rng.choice(np.flatnonzero(labels == c), per_class, replace=False)
    for c in range(num_classes)
  ]
  return np.sort(np.concatenate(chosen))


def describe_input(data: Any) -> dict[str, Any]:
  """Describes the input of a run's model."""
  return {
    "shape": list(data.train.shape),
    "num_classes": data.train.source.num_classes,
    "mean": data.mean,
    "std": data.std,
  }


def write_input(folder: pathlib.Path, data: Any) -> None:
  """Writes the input of a run's model to the run's folder."""
  workdir_lib.write_json(folder / INPUT_FILE, describe_input(data), sealed=True)


def draw_batch(data: Any, *, samples: int, seed: int) -> dict[str, np.ndarray]:
  """Draws random training samples, with the labels that the learner is given.

  Args:
    data: as `load_data` returns it.
    samples: the most to draw.
    seed: of the draw.

  Returns:
    As `gather`; `inputs.make_expand` makes the model's input of it.
  """
  rows = data.indices
  if rows is None:
    rows = np.arange(len(data.labels.labels))
  rng = np.random.default_rng((seed, purposes.CHECK))
  return gather(data.train, data.labels.labels, rng.permutation(rows)[:samples])


def gather(
  images: store.Images, labels: np.ndarray, positions: np.ndarray
) -> dict[str, np.ndarray]:
  """Reads samples, those that can be used: `image`, as decoded, and `label`."""
  found, bad = images.read(positions)
  images.bad.add(bad)
  good = ~np.isin(positions, list(bad))
  label = labels[positions].astype(np.int32)
  return {"image": found[good], "label": label[good]}
