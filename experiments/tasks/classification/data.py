"""Data of classification: images with labels."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments.data import filters, noise, pipeline, sources, streams
from experiments.models import initial
from experiments.runtime import workdir as workdir_lib

INPUT_FILE = workdir_lib.INPUT_FILE
LABELS_FILE = "labels.npz"
# Fields of `config.noise` that some kinds need.
NOISE_OPTIONS = ("mapping", "matrix", "path", "column", "id_column")


class Data(NamedTuple):
  """Training and test data of a run."""

  train: sources.Dataset
  test: sources.Dataset
  labels: noise.NoisyLabels
  indices: np.ndarray | None  # positions to train on; None is all of them
  clean: np.ndarray | None  # positions of the clean samples, if there are any
  mean: list[float]  # per channel, of pixels scaled to [0, 1]
  std: list[float]


def load_data(
  config: config_dict.ConfigDict, *, needs_clean: bool = False
) -> Data:
  """Loads train and test sets, noise and normalisation by the config.

  Args:
    config: as `configs/classification.py` describes it.
    needs_clean: whether to set samples with true labels aside, as many of each
      class as `config.mimic.clean_per_class` says; they are not trained on.

  Returns:
    The Data.

  Raises:
    ValueError: an unknown name, a filter of other data, or weights for images
      with other channels.
    FileNotFoundError: a data set, filter or table that is not there.
  """
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
  if needs_clean:
    clean = clean_positions(
      labels.clean_labels,
      per_class=config.mimic.clean_per_class,
      num_classes=train.num_classes,
      seed=config.seed,
    )
    if indices is None:
      indices = np.arange(len(labels.labels))
    indices = indices[~np.isin(indices, clean)]
  if config.model.pretrained is not None:
    mean, std = initial.scaling(config.model.pretrained, config.model.name)
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
  """Returns the rate, or None where the matrix or the table has it."""
  kind = noise.KINDS.get(config.kind)
  if config.rate == 0 and kind is not None and kind.rate != "needed":
    return None
  return config.rate


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
  rng = np.random.default_rng((seed, streams.CLEAN))
  chosen = [
    rng.choice(np.flatnonzero(labels == c), per_class, replace=False)
    for c in range(num_classes)
  ]
  return np.sort(np.concatenate(chosen))


def describe_input(data: Any) -> dict[str, Any]:
  """Describes the input of a run's model."""
  return {
    "shape": list(data.train.images.shape[1:]),
    "num_classes": data.train.num_classes,
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
    A batch as the pipeline makes it.

  Raises:
    ValueError: no samples were asked for.
  """
  if samples < 1:
    raise ValueError(
      f"config.mimic.check_samples is {samples}; expected at least 1."
    )
  rows = data.indices
  if rows is None:
    rows = np.arange(len(data.labels.labels))
  rng = np.random.default_rng((seed, streams.CHECK))
  chosen = rng.permutation(rows)[:samples]
  (batch,) = pipeline.eval_batches(
    data.train.images,
    data.labels.labels,
    batch_size=len(chosen),
    indices=chosen,
    mean=data.mean,
    std=data.std,
  )
  return batch
