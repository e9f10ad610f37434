"""Features of a frozen backbone: computed once an image, kept on disk.

With random flips there are two rows an image, as it is and mirrored, so that a
head on stored features sees exactly what it would see on top of the backbone.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments import models
from experiments.data import filters, sources, statistics, store, stream
from experiments.models import initial
from experiments.models.pretrained import vit as pretrained
from experiments.runtime import (
  checkpoint,
  claims,
  distributed,
  hub,
  workdir as workdir_lib,
)
from experiments.tasks.classification import data as data_lib, inputs
from gradmimic_jax import _files

# Changes with the way in which features are computed.
_VERSION = 1
# Of the preprocessing that was published: "normalise to mean .5 std .5".
_PUBLISHED = (0.5, 0.5)


class Features(NamedTuple):
  """One split's features, and all of the split that a head's training needs."""

  values: np.ndarray  # float32 [V, N, D] on disk; V 2: as they are, mirrored
  labels: np.ndarray  # int32 [N]
  ids: np.ndarray  # str [N]
  num_classes: int
  class_names: tuple[str, ...]
  fingerprint: str  # of backbone, preprocessing and images


class Backbone(NamedTuple):
  """A model up to its head, and what it must be shown."""

  # Makes `(params, images) -> [B, D]` and params: where features are read back
  # there is no need for either.
  make: Callable[[], tuple[Callable[[Any, jax.Array], jax.Array], Any]]
  shape: tuple[int, ...] | None  # of an image; None takes any
  mean: Any  # per channel; None: of the training images
  std: Any
  fingerprint: str  # of the files that it comes from


def load(
  config: config_dict.ConfigDict, cache: pathlib.Path
) -> tuple[Features, Features]:
  """Features of the training and the test split, from disk where they are.

  Images are not decoded if their features are there. Of several processes that
  ask for the same features, one computes them and the others wait; any number
  of studies may share the cache. A part of a split, such as "train[:40000]", is
  taken from the features of the whole where those are there. Test images are
  never mirrored.

  Raises:
    ValueError: a backbone that doesn't fit the images, or an unknown option.
    FileNotFoundError: a data set or a backbone that is not there.
  """
  backbone = _backbone(config)

  @functools.cache
  def fingerprint_of(split):
    return sources.open(config.data, split).fingerprint

  cache.mkdir(parents=True, exist_ok=True)

  def file_of(split, flip):
    fingerprint = workdir_lib.fingerprint(
      _VERSION,
      backbone.fingerprint,
      # Without scaling of its own, the training images' holds for both splits.
      fingerprint_of(config.data.train_split) if backbone.mean is None else "",
      fingerprint_of(split),
      config.data.image_size,
      config.data.resize,
      flip,
    )
    return cache / f"{fingerprint}.npy"

  def of_split(split, flip):
    file, whole = file_of(split, flip), split.partition("[")[0]
    is_part = split.count("[") == 1 and "+" not in split
    if is_part and backbone.mean is not None and not file.exists():
      # Mirrored or not: the first view is the same.
      for mirrored in dict.fromkeys((flip, True)):
        found = _read(file_of(whole, mirrored))
        if found is not None:
          found = found._replace(values=found.values[: 1 + flip])
          return _part(found, sources.open(config.data, split), file.stem)
    return _cached(
      file, lambda file: _compute(file, config, split, flip, backbone)
    )

  return (
    of_split(config.data.train_split, bool(config.data.flip)),
    of_split(config.data.test_split, False),
  )


def _cached(file, compute) -> Features:
  """Reads a file and its description; makes them where they aren't sound."""
  found = _read(file)
  if found is not None:
    return found
  with claims.hold(file.with_suffix(".claim")):
    found = _read(file)  # someone may have been faster
    if found is None:
      compute(file)
      found = _read(file)
  if found is None:
    raise OSError(f"{file} can't be read back; is the disk full?")
  return found


def _part(whole, source, fingerprint) -> Features:
  """Takes the rows of a part of a split out of the features of the whole."""
  order = np.argsort(whole.ids)
  rows = order[np.searchsorted(whole.ids, source.ids, sorter=order)]
  first, last = rows[0], rows[-1] + 1
  if np.array_equal(rows, np.arange(first, last)):
    values = whole.values[:, first:last]  # stays on disk
  else:
    values = whole.values[:, rows]
  return whole._replace(
    values=values,
    labels=whole.labels[rows],
    ids=whole.ids[rows],
    fingerprint=fingerprint,
  )


def _read(file) -> Features | None:
  """The features, or None unless they are there, whole and as described."""
  described = file.with_suffix(".json")
  if not (file.exists() and described.exists()):
    return None
  try:
    about = workdir_lib.read_json(described, {"sha256": str})
    if filters.file_sha256(file) != about["sha256"]:
      raise ValueError("its content is not what was written")
    return Features(
      values=np.load(file, mmap_mode="r", allow_pickle=False),
      labels=np.asarray(about["labels"], np.int32),
      ids=np.asarray(about["ids"]),
      num_classes=about["num_classes"],
      class_names=tuple(about["class_names"]),
      fingerprint=file.stem,
    )
  except (ValueError, KeyError, TypeError) as error:
    logging.warning("%s is damaged (%s); it is computed again.", file, error)
    return None


def _compute(file, config, split, flip, backbone):
  """Writes a split's features and their description."""
  images = _images(config, split)
  if backbone.shape not in (None, images.shape):
    raise ValueError(
      f"the backbone {config.model.pretrained} is for images"
      f" {backbone.shape} and those of {config.data.name} are"
      f" {images.shape}; set config.data.image_size, or take another backbone."
    )
  scaling = (backbone.mean, backbone.std)
  if backbone.mean is None:
    scaling = _scaling_of(config, config.data.train_split)
  apply, params = backbone.make()
  apply, source = jax.jit(apply), images.source
  views = [
    # The last batch is padded.
    np.concatenate(
      [*_in_batches(apply, params, images, config, scaling, mirrored)]
    )[: len(source)]
    for mirrored in range(1 + flip)
  ]
  values = np.stack(views)
  if not np.isfinite(values).all():
    raise ValueError(
      f"features of {config.data.name} by {config.model.pretrained} are not"
      " finite; expected a backbone that suits the images' scaling."
    )
  with _files.replacing(file) as content:
    np.save(content, values, allow_pickle=False)
  about = {
    "sha256": filters.file_sha256(file),
    "labels": source.labels.tolist(),
    "ids": source.ids.tolist(),
    "num_classes": source.num_classes,
    "class_names": list(source.class_names),
    "backbone": backbone.fingerprint,
    "images": source.fingerprint,
  }
  workdir_lib.write_json(file.with_suffix(".json"), about, sealed=True)


def _in_batches(apply, params, images, config, scaling, mirrored):
  """Features of padded batches, each fetched while the next is computed."""
  expand = jax.jit(inputs.make_expand(*scaling))
  ahead = None
  for batch in stream.eval_batches(
    images,
    np.zeros(len(images.source), np.int32),
    batch_size=config.eval_batch_size,
    workers=images.threads,
  ):
    shown = {"flipped": np.full(config.eval_batch_size, bool(mirrored))}
    shown |= {key: batch[key] for key in ("image", "row") if key in batch}
    part = apply(params, expand(shown, images.resident)["image"])
    if ahead is not None:
      yield np.asarray(ahead, np.float32)
    ahead = part
  yield np.asarray(ahead, np.float32)


def _images(config, split) -> store.Images:
  return data_lib.open_images(config, sources.open(config.data, split))


def _scaling_of(config, split):
  """Mean and standard deviation per channel, as the general loop has them."""
  return statistics.measure(
    _images(config, split),
    samples=config.data.statistics_samples,
    devices=distributed.Devices.alone(),
  )


def _backbone(config) -> Backbone:
  """The backbone that `config.model.pretrained` names."""
  source = config.model.pretrained
  scales = ("model", "published")
  if config.probe.scaling not in scales:
    raise ValueError(
      f"config.probe.scaling is {config.probe.scaling!r}; expected one of"
      f" {', '.join(scales)}."
    )
  if source is None:
    backbone = _pixels(config)
  elif initial.is_run(source):
    backbone = _of_run(pathlib.Path(source))
  else:
    backbone = _published(config, source)
  if config.probe.scaling == "published":
    mean, std = _PUBLISHED
    backbone = backbone._replace(mean=mean, std=std)
  return backbone._replace(
    fingerprint=workdir_lib.fingerprint(
      backbone.fingerprint, backbone.shape, backbone.mean, backbone.std
    )
  )


def _pixels(config) -> Backbone:
  if config.model.name != "mlp" or config.model.widths:
    raise ValueError(
      "config.model.pretrained is None, and a frozen backbone of random weights"
      " is of no use; expected the workdir of a finished run, a .safetensors"
      ' file or "hf://owner/name" (or, to train a head on the pixels,'
      " config.model.name='mlp' with config.model.widths=())."
    )

  def flatten(params, images):
    del params
    return images.reshape(images.shape[0], -1)

  return Backbone(lambda: (flatten, {}), None, None, None, "pixels")


def _of_run(folder) -> Backbone:
  shown = initial.shown_to(folder)
  section = workdir_lib.read_model(folder)
  section.pop("pretrained", None)  # where that run's own weights came from
  shape = tuple(shown["shape"])

  def make():
    apply, like = models.create_features(
      config_dict.ConfigDict(section),
      input_shape=shape,
      num_classes=shown["num_classes"],
      seed=0,
    )
    known = (
      checkpoint.load_params(folder, like),
      checkpoint.load_statistics(folder, apply.statistics),
    )
    return lambda known, images: apply(known[0], images, known[1]), known

  stored = folder / checkpoint.FOLDER
  files = sorted(path for path in stored.rglob("*") if path.is_file())
  named = [
    (str(path.relative_to(stored)), filters.file_sha256(path)) for path in files
  ]
  return Backbone(
    make,
    shape,
    shown["mean"],
    shown["std"],
    workdir_lib.fingerprint(
      named, section | models.fingerprints(config_dict.ConfigDict(section))
    ),
  )


def _published(config, source) -> Backbone:
  size, name = config.data.image_size, config.model.name
  if name not in initial.PUBLISHED or not size:
    raise ValueError(
      f"config.model.pretrained is {source!r}, config.model.name"
      f" {name!r} and config.data.image_size {size}; expected the workdir of a"
      " finished run, or the weights of a"
      f" {' or '.join(map(repr, initial.PUBLISHED))} and the side of its images"
      " in pixels, such as 224."
    )
  shape = (size, size, 3)
  model = config.model
  if name == "vit":
    model = pretrained.sized(model)

  def make():
    apply, like = models.create_features(
      model, input_shape=shape, num_classes=1, seed=0
    )
    loaded = initial.load_published(source, like, model, input_shape=shape)
    return apply, loaded

  scaling: tuple[Any, Any] = _PUBLISHED
  if config.probe.scaling == "model":
    scaling = initial.scaling(source, name)
  return Backbone(
    make,
    shape,
    *scaling,
    workdir_lib.fingerprint(
      filters.file_sha256(hub.find(source)), models.sizes(model)
    ),
  )
