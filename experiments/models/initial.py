"""Initial parameters: new ones, or weights that are there already."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging
from ml_collections import config_dict

from experiments import models
from experiments.models.pretrained import (
  clip as clip_pretrained,
  efficientnet,
  vit as pretrained,
)
from experiments.runtime import checkpoint, hub, workdir as workdir_lib

# The models whose published weights can be read.
PUBLISHED = {"vit": pretrained, "efficientnet_lite0": efficientnet}


def create(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  seed: int,
  place: Callable[[Any], Any] = lambda params: params,
) -> tuple[models.Apply, dict[str, Any]]:
  """Creates a model as `models.create`, with weights from `config.pretrained`.

  Args:
    config: `config.model`. `pretrained` is None, the workdir of a finished run,
      or published weights as `pretrained.load` takes them. The head is always a
      new one.
    input_shape: of one image, `(H, W, C)`.
    num_classes: width of the head.
    seed: of new parameters.
    place: puts parameters on their devices; weights are loaded straight to
      there.

  Returns:
    `apply(params, images [B, H, W, C]) -> logits [B, num_classes]`, and params.
    Statistics are those of the weights, too.

  Raises:
    ValueError: weights of another architecture or of other images, or an
      unfinished run's; or a model whose head has another name.
    FileNotFoundError: weights that are not there.
  """
  source = config.get("pretrained")
  if source is not None and not is_run(source) and config.name == "vit":
    config = pretrained.sized(config, channels=input_shape[-1])
  apply, params = models.create(
    config, input_shape=input_shape, num_classes=num_classes, seed=seed
  )
  params = place(params)
  if apply.statistics != ():  # else the function is one for all runs
    apply = dataclasses.replace(apply, statistics=place(apply.statistics))
  if source is None:
    return apply, params
  if "head" not in params:
    raise ValueError(
      f"config.model.pretrained is {source!r}, and {config.name} has no layer"
      f" head (its top level is {', '.join(params)}); expected the last layer"
      " by that name, which is made anew."
    )
  if is_run(source):
    loaded, statistics = _load_run(
      pathlib.Path(source), config, tuple(input_shape), place
    )
    apply = dataclasses.replace(apply, statistics=statistics)
  else:
    loaded = load_published(source, params, config, input_shape=input_shape)
  return apply, {**loaded, "head": params["head"]}


def load_published(
  source: str,
  like: Any,
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
) -> Any:
  """Loads published weights as a model's parameters.

  Args:
    source: a safetensors file, its folder, or a hub's name.
    like: the parameters that `models.create` gives.
    config: `config.model`.
    input_shape: of one image, `(H, W, C)`.

  Returns:
    A tree like `like`.

  Raises:
    ValueError: weights of another architecture, or a model of which none are
      published.
    FileNotFoundError: weights that are not there.
  """
  if config.name == "efficientnet_lite0":
    return efficientnet.load(source, like)
  if config.name == "vit":
    return pretrained.load(
      source, like, input_shape=input_shape, options=config.vit.to_dict()
    )
  raise ValueError(
    f"config.model.pretrained is {source!r} and config.model.name"
    f" {config.name!r}; expected the workdir of a finished run of that model,"
    " or published weights of a "
    f"{' or '.join(map(repr, PUBLISHED))} and that name."
  )


def sized(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Fills in the sizes of the weights that a job's model starts from.

  Jobs do so before anything else, so that the config they keep stands by
  itself.

  Args:
    config: any job's; with `config.model.size="pretrained"` the model's fields
      are those of the weights that `config.model.pretrained` names.

  Returns:
    The same, or a copy with other fields.

  Raises:
    FileNotFoundError: weights that are not there.
    ValueError: weights beside which nothing tells their sizes.
  """
  model = config.get("model")
  if model is None or model.get("size") != pretrained.SIZE:
    return config
  source = model.get("pretrained")
  if source is None or is_run(source):
    raise ValueError(
      f"config.model.size is {pretrained.SIZE!r} and config.model.pretrained"
      f" {source!r}; expected published weights."
    )
  module = clip_pretrained if "clip" in model else pretrained
  copy = config.copy_and_resolve_references().unlock()
  copy.model = module.sized(model)
  return copy.lock()


def for_data(
  config: config_dict.ConfigDict,
  data: Any,
  *,
  seed: int,
  place: Callable[[Any], Any] = lambda params: params,
) -> tuple[models.Apply, dict[str, Any]]:
  """Creates the model for the images and classes of classification's data."""
  return create(
    config,
    input_shape=data.train.shape,
    num_classes=data.train.source.num_classes,
    seed=seed,
    place=place,
  )


def scaling(source: str, name: str = "vit") -> tuple[list[float], list[float]]:
  """Finds the mean and deviation by which weights expect images to be scaled.

  Args:
    source: as `config.model.pretrained`, but not None.
    name: `config.model.name`, of published weights.

  Returns:
    Mean and standard deviation per channel, of pixels scaled to [0, 1]. Where
    else the weights' own preparation of images differs, a log line says so.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: the weights' statements about images can't be read.
  """
  if is_run(source):
    shown = shown_to(pathlib.Path(source))
    return shown["mean"], shown["std"]
  wanted = PUBLISHED.get(name, pretrained).preprocessing(source)
  if wanted.interpolation != "bilinear" or wanted.crop_fraction != 1:
    logging.warning(
      "%s asks for %s images of which the middle %.3g is kept; they are resized"
      " bilinearly and not cropped.",
      source,
      wanted.interpolation,
      wanted.crop_fraction,
    )
  return list(wanted.mean), list(wanted.std)


def is_run(source: str) -> bool:
  """True for a run's workdir; published folders have a config too."""
  folder = pathlib.Path(source)
  return (folder / workdir_lib.CONFIG_FILE).exists() and not (
    folder / hub.WEIGHTS
  ).exists()


def shown_to(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the input of a finished run's model: shape, classes, mean and std."""
  if not (folder / workdir_lib.RESULT_FILE).exists():
    raise FileNotFoundError(
      f"there is no finished run in {folder}, which config.model.pretrained"
      " names: give that run's own command (again) first."
    )
  return workdir_lib.read_input(folder)


def _load_run(folder, config, input_shape, place):
  shown = shown_to(folder)
  section = workdir_lib.read_model(folder)
  theirs = config_dict.ConfigDict(section)
  if models.sizes(theirs) != models.sizes(config) or (
    tuple(shown["shape"]) != input_shape
  ):
    raise ValueError(
      f"the run in {folder}, which config.model.pretrained names, has the model"
      f" {models.sizes(theirs)} for images {tuple(shown['shape'])}; expected"
      f" {models.sizes(config)} for images {input_shape}."
    )
  apply, like = models.create(
    config,
    input_shape=input_shape,
    num_classes=shown["num_classes"],
    seed=0,
  )
  return (
    checkpoint.load_params(folder, place(like)),
    checkpoint.load_statistics(folder, place(apply.statistics)),
  )
