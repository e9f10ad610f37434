"""Flax models by name, as plain trees and pure functions."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from ml_collections import config_dict

from experiments.models import apply as apply_lib, outside, transformer
from experiments.models.apply import Apply
from experiments.models.convnet import ConvNet
from experiments.models.efficientnet import EfficientNetLite0
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
  "efficientnet_lite0": (EfficientNetLite0, lambda config: {}),
}
# Made by one program: it has fewer operations than there are programs for one
# each. The layers of others are alike, and share such programs.
_AT_ONCE = ("mlp", "convnet")


def create(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  seed: int,
) -> tuple[Apply, dict[str, Any]]:
  """Makes a model as a pure function and a plain parameter tree.

  Args:
    config: `config.model`: `name`, and the model's options among `widths`,
      `blocks_per_stage` and `patch_size` (1 if there is no such field) and
      `vit`; `dtype` of the activations, float32 if there is no such field;
      `options` of a user's own model, as `outside` describes it.
    input_shape: of one image, `(H, W, C)`.
    num_classes: width of the output.
    seed: of the initialisation.

  Returns:
    `apply(params, images [B, H, W, C]) -> logits [B, num_classes]`, and params
    as nested dicts of arrays.

  Raises:
    ValueError: there is no model of that name or size, or a user's own one
      fails.
    ImportError, TypeError: as `outside.create`.
  """
  return _create(config, input_shape, num_classes, seed, "__call__")


def create_features(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  seed: int,
) -> tuple[Apply, dict[str, Any]]:
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
    ValueError, ImportError, TypeError: as `create`.
  """
  return _create(config, input_shape, num_classes, seed, "features")


def sizes(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns what tells architectures apart: the model's name and options."""
  if outside.is_outside(config.name):
    options = outside.parse_options(config.get("options", ""))
  else:
    options = MODELS[config.name][1](config)
  return {"name": config.name, **options}


def fingerprints(config: config_dict.ConfigDict) -> dict[str, str]:
  """Describes the source of a user's own model; {} for the models here."""
  if not outside.is_outside(config.name):
    return {}
  return {"model": outside.fingerprint(config.name)}


def _create(config, input_shape, num_classes, seed, method):
  if outside.is_outside(config.name):
    return outside.create(
      config,
      input_shape=input_shape,
      num_classes=num_classes,
      seed=seed,
      method=method,
    )
  if config.name not in MODELS:
    raise ValueError(
      f"config.model.name is {config.name!r}; expected one of"
      f" {', '.join(MODELS)}, or a Flax module of your own as"
      " 'package.module:Class'."
    )
  if getattr(config, "size", "") not in ("", "pretrained"):
    raise ValueError(
      f"config.model.size is {config.size!r}; expected '' (as config.model.vit"
      " has it) or 'pretrained' (as the weights have it)."
    )
  if config.get("options"):
    raise ValueError(
      f"config.model.options is {config.options!r}, of models of one's own;"
      f" expected '' with config.model.name={config.name!r}."
    )
  module, options = MODELS[config.name]
  make = _make_new(
    module,
    config.name in _AT_ONCE,
    **options(config),
    input_shape=tuple(input_shape),
    num_classes=num_classes,
    dtype=transformer.activations(config),
  )
  with programs.run_once():
    model = make(jax.random.key(seed))
  return apply_lib.from_nnx(model, config.name, method)


@programs.once
def _make_new(module, at_once, **options):
  """Makes `make(key)`, which makes a new model."""

  def make(key):
    return module(rngs=nnx.Rngs(key), **options)

  return nnx.jit(make) if at_once else make
