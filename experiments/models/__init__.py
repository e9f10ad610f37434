"""Flax NNX models, and the step from a module to plain trees and functions."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from ml_collections import config_dict

from experiments.models.convnet import ConvNet
from experiments.models.mlp import MLP
from experiments.models.resnet import ResNet
from experiments.models.vit import ViT
from experiments.runtime import programs

# For each name the module, and its options from `config.model`.
MODELS: dict[
  str, tuple[Callable[..., nnx.Module], Callable[[Any], dict[str, Any]]]
] = {
  "mlp": (MLP, lambda config: {"widths": tuple(config.widths)}),
  "convnet": (
    ConvNet,
    lambda config: {
      "widths": tuple(config.widths),
      "patch_size": config.get("patch_size", 1),
    },
  ),
  "resnet": (
    ResNet,
    lambda config: {
      "widths": tuple(config.widths),
      "blocks_per_stage": config.get("blocks_per_stage", 1),
      "patch_size": config.get("patch_size", 1),
    },
  ),
  "vit": (ViT, lambda config: dict(config.vit)),
}


def create(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  seed: int,
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any]]:
  """Makes a model as a pure function and a plain parameter tree.

  Args:
    config: `config.model`: `name`, and the model's options among `widths`,
      `blocks_per_stage` and `patch_size` (1 if there is no such field) and
      `vit`.
    input_shape: of one image, `(H, W, C)`.
    num_classes: width of the output.
    seed: of the initialisation.

  Returns:
    `apply(params, images [B, H, W, C]) -> logits [B, num_classes]`, and params
    as nested dicts of arrays.

  Raises:
    ValueError: there is no model of that name or size.
  """
  graph, state = _split(config, input_shape, num_classes, seed)
  return _make_apply(graph), nnx.to_pure_dict(state)


@programs.once
def _make_apply(graph):
  """Makes one function for one architecture: it is compiled once."""

  def apply(params, images):
    return nnx.merge(graph, params)(images)

  return apply


def create_features(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  seed: int,
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any]]:
  """Makes the model up to its head, for features that are computed once.

  `apply(params, images)` of `create` is the linear layer `params["head"]` on
  top of these features.

  Args:
    config: `config.model`, as `create` takes it.
    input_shape: of one image, `(H, W, C)`.
    num_classes: width of the head.
    seed: of the initialisation.

  Returns:
    `features(params, images [B, H, W, C]) -> [B, D]`, and the params that
    `create` would give, head included.

  Raises:
    ValueError: there is no model of that name.
  """
  graph, state = _split(config, input_shape, num_classes, seed)

  def features(params, images):
    return nnx.merge(graph, params).features(images)

  return features, nnx.to_pure_dict(state)


def sizes(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns the model's name, and its options from `config.model`."""
  return {"name": config.name, **MODELS[config.name][1](config)}


def _split(config, input_shape, num_classes, seed):
  """Splits the model into graph and state."""
  if config.name not in MODELS:
    raise ValueError(
      f"config.model.name is {config.name!r}; expected one of"
      f" {', '.join(MODELS)}."
    )
  if getattr(config, "size", "") not in ("", "pretrained"):
    raise ValueError(
      f"config.model.size is {config.size!r}; expected '' (as config.model.vit"
      " has it) or 'pretrained' (as the weights have it)."
    )
  module, options = MODELS[config.name]
  model = module(
    input_shape=tuple(input_shape),
    num_classes=num_classes,
    rngs=nnx.Rngs(seed),
    **options(config),
  )
  return nnx.split(model)
