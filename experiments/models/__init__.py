"""Flax NNX models, and the step from a module to plain trees and functions."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.models.convnet import ConvNet
from experiments.models.mlp import MLP

MODELS: dict[str, Callable[..., nnx.Module]] = {"mlp": MLP, "convnet": ConvNet}


def create(
  config: Any, *, input_shape: tuple[int, ...], num_classes: int, seed: int
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any]]:
  """A model as a pure function and a plain parameter tree.

  Args:
    config: `config.model`: `name` and `widths`.
    input_shape: of one image, `(H, W, C)`.
    num_classes: width of the output.
    seed: of the initialisation.

  Returns:
    `apply(params, images [B, H, W, C]) -> logits [B, num_classes]`, and params
    as nested dicts of arrays.

  Raises:
    ValueError: there is no model of that name.
  """
  if config.name not in MODELS:
    raise ValueError(
      f"config.model.name is {config.name!r}; expected one of"
      f" {', '.join(MODELS)}."
    )
  model = MODELS[config.name](
    input_shape=input_shape,
    widths=tuple(config.widths),
    num_classes=num_classes,
    rngs=nnx.Rngs(seed),
  )
  graph, state = nnx.split(model)

  def apply(params, images):
    return nnx.merge(graph, params)(images)

  return apply, nnx.to_pure_dict(state)
