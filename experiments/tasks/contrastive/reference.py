"""The reference of a CLIP run: a finished run, or published weights."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments.models import clip, initial
from experiments.models.clip import Features
from experiments.models.pretrained import clip as clip_pretrained
from experiments.runtime import (
  cache,
  checkpoint,
  distributed,
  workdir as workdir_lib,
)
from experiments.tasks.base import Reference
from experiments.tasks.contrastive import (
  data as clip_data,
  evaluation as clip_features,
)

_DIRECTIONS = ("weights", "outputs")
# Fields of the data section that must be the learner's too: they decide how
# images and captions become arrays.
_SAME = ("data.image_size", "data.tokenizer")


class Model(NamedTuple):
  """A reference's model."""

  apply: clip_features.Apply  # of stored images
  params: Any
  fingerprint: str
  folder: pathlib.Path | None  # a run's; None: it is no run


def load(
  config: config_dict.ConfigDict,
  direction: str,
  params: Any,
  data: clip_data.Data,
  devices: distributed.Devices,
) -> Reference:
  """Loads the reference that a direction asks for.

  Args:
    config: as `configs/contrastive.py` describes it.
    direction: "weights" or "outputs".
    params: the learner's parameters.
    data: the run's.
    devices: the run's.

  Returns:
    A Reference. Its `for_batch(batch)` gives weights, or Features for the
    batch. Features of pairs in memory are computed once and kept beside the
    reference's checkpoints.

  Raises:
    ValueError: another direction, no reference, or one of another architecture
      (where weights are looked at), of other images or another tokenizer.
    FileNotFoundError: a reference that is not there.
  """
  if direction not in _DIRECTIONS:
    raise ValueError(
      f"config.mimic.direction is {direction!r}; expected 'weights' or"
      " 'outputs'."
    )
  if direction == "weights":
    model = load_model(config, like=params, place=devices.place)
    return Reference(model.fingerprint, model.params, lambda _: model.params)
  model = load_model(config, place=devices.place)
  if data.memory is not None:
    found = compute_pool_features(config, model, data.memory, devices)
    image, text = found.pair
    scales = devices.place_whole((found.logit_scale, found.logit_bias))

    def stored(batch):
      rows = np.maximum(batch["index"], 0)  # padding gets a real row
      return Features(*devices.put((image[rows], text[rows])), *scales)

    return Reference(model.fingerprint, None, stored)
  apply = jax.jit(model.apply)

  def computed(batch):
    seen = devices.put({key: batch[key] for key in ("image", "text")})
    return apply(model.params, seen["image"], seen["text"])

  return Reference(model.fingerprint, None, computed)


def load_model(
  config: config_dict.ConfigDict,
  *,
  like: Any = None,
  place: Callable[[Any], Any] = lambda params: params,
) -> Model:
  """Loads the model that `config.mimic.reference` names.

  Args:
    config: as `configs/contrastive.py` describes it.
    like: parameters whose structure and shapes it must have; None: its own.
    place: puts its own parameters on their devices; weights are loaded straight
      to there.

  Returns:
    The Model.

  Raises:
    ValueError, FileNotFoundError: as `load`.
  """
  source = config.mimic.reference
  if source is None:
    raise ValueError(
      f"method {config.method!r} needs a reference: set"
      " --config.mimic.reference to the workdir of a finished run or to"
      " published weights, or use experiments.study, which trains one."
    )
  if initial.is_run(source) or not _is_published(source):
    return _load_run(pathlib.Path(source), config, like, place)
  return _published(source, config, like, place)


def compute_pool_features(
  config: config_dict.ConfigDict,
  model: Model,
  memory: clip_data.Memory,
  devices: distributed.Devices,
) -> Features:
  """Computes a model's features of all training pairs, once.

  Args:
    config: as `configs/contrastive.py` describes it.
    model: the model.
    memory: the pairs.
    devices: the devices to compute on.

  Returns:
    Features [N, D], in the order of the pairs.
  """
  shape = (2, len(memory.images), _width(model))
  file = stored = None
  if model.folder is not None:
    digest = workdir_lib.fingerprint(
      model.fingerprint, memory.truth.fingerprint, config.data.tokenizer
    )
    file = model.folder / f"features_{digest}.npy"
    stored = cache.read(file, shape)
  agreed = devices.agree(stored is not None)  # all processes compute, or none
  if not agreed or stored is None:
    extract = clip_features.Extractor(
      model.apply, devices, batch_size=config.eval_batch_size
    )
    stored = np.stack(
      [
        extract.images(model.params, memory.images),
        extract.texts(model.params, memory.text),
      ]
    )
    if file is not None and devices.process[0] == 0:
      cache.write(file, stored)
  scales = (model.params["logit_scale"], model.params.get("logit_bias"))
  return Features(stored[0], stored[1], *jax.device_get(scales))


def _is_published(source):
  if source.startswith("hf://"):
    return True
  path = pathlib.Path(source)
  return path.is_file() or any(
    (path / name).exists() for name in clip_pretrained.NAMES
  )


def _load_run(where, config, like, place):
  if not (where / workdir_lib.RESULT_FILE).exists():
    raise FileNotFoundError(
      f"there is no finished run in {where}, which config.mimic.reference"
      " names: give that run's own command (again) first."
    )
  file = where / workdir_lib.CONFIG_FILE
  sections = dict.fromkeys(("model", "data"), dict)
  theirs = config_dict.ConfigDict(workdir_lib.read_json(file, sections))
  for field in _SAME:
    section, name = field.split(".")
    if theirs[section].get(name) != config[section][name]:
      raise ValueError(
        f"the reference in {where} has config.{field}"
        f" {theirs[section].get(name)!r} ({workdir_lib.CONFIG_FILE}) and the"
        f" learner {config[section][name]!r}; expected the same."
      )
  size = config.data.image_size
  apply, own = clip.create(theirs.model, input_shape=(size, size, 3), seed=0)
  params = checkpoint.load_params(where, place(own) if like is None else like)
  return Model(
    clip_features.scaled(apply, theirs.data.mean, theirs.data.std),
    params,
    checkpoint.fingerprint(params),
    where,
  )


def _published(source, config, like, place):
  section = config.model.copy_and_resolve_references().unlock()
  if config.mimic.reference_size is not None:
    section.size = config.mimic.reference_size
  if config.mimic.reference_activation is not None:
    section.clip.activation = config.mimic.reference_activation
  section.pretrained = source
  size = config.data.image_size
  apply, params = clip_pretrained.create(
    section, input_shape=(size, size, 3), seed=0, place=place
  )
  if like is not None and clip.options(section) != clip.options(config.model):
    raise ValueError(
      "config.mimic.reference_size or reference_activation make the reference"
      " another model than the learner's, whose weights can't be a direction;"
      " leave them out, or use the method grad_mimic_outputs."
    )
  wanted = clip_pretrained.preprocessing(source)
  mean, std = tuple(wanted.mean), tuple(wanted.std)
  if like is not None and not np.allclose(
    (mean, std), (config.data.mean, config.data.std), atol=1e-3
  ):
    logging.warning(
      "%s is made for pixels of mean %s and std %s; the learner's are %s, %s.",
      source,
      mean,
      std,
      config.data.mean,
      config.data.std,
    )
  return Model(
    clip_features.scaled(apply, mean, std),
    params,
    checkpoint.fingerprint(params),
    None,
  )


def _width(model):
  return model.params["image"]["projection"]["kernel"].shape[-1]
