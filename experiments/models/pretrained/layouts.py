"""The names that libraries give to weights; those of vision transformers."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.models.pretrained.preprocessing import Preprocessing


class Layout(NamedTuple):
  """A library's names of a model's weights, and its customs."""

  prefix: str  # may stand before every name
  sign: str  # a name by which the layout is known
  modules: dict[str, str]  # its modules and ours; {} is a block's number
  unused: tuple[str, ...]  # modules that this project's model leaves out
  # Its way to resize a grid of position embeddings, always bicubically.
  antialias: bool
  align_corners: bool
  preprocessing: Preprocessing  # where nothing beside the file says otherwise
  norm_epsilon: float  # likewise


# A block's number: "layers.3.", "encoder_layer_3.", but not "conv1.".
_NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")

LAYOUTS = {
  "huggingface": Layout(
    prefix="vit.",
    sign="embeddings.patch_embeddings.projection.weight",
    modules={
      "embeddings.cls_token": "class_token",
      "embeddings.position_embeddings": "position_embed",
      "embeddings.patch_embeddings.projection": "patch_embed",
      "encoder.layer.{}.layernorm_before": "blocks/{}/norm1",
      "encoder.layer.{}.attention.attention.query": "blocks/{}/attention/query",
      "encoder.layer.{}.attention.attention.key": "blocks/{}/attention/key",
      "encoder.layer.{}.attention.attention.value": "blocks/{}/attention/value",
      "encoder.layer.{}.attention.output.dense": "blocks/{}/attention/out",
      "encoder.layer.{}.layernorm_after": "blocks/{}/norm2",
      "encoder.layer.{}.intermediate.dense": "blocks/{}/mlp/fc1",
      "encoder.layer.{}.output.dense": "blocks/{}/mlp/fc2",
      "layernorm": "final_norm",
      "classifier": "head",
    },
    unused=("pooler.dense", "embeddings.mask_token"),
    antialias=False,
    align_corners=False,
    preprocessing=Preprocessing(
      (0.5,) * 3, (0.5,) * 3, (224, 224), "bilinear", 1.0
    ),
    norm_epsilon=1e-12,
  ),
  "timm": Layout(
    prefix="",
    sign="patch_embed.proj.weight",
    modules={
      "cls_token": "class_token",
      "pos_embed": "position_embed",
      "patch_embed.proj": "patch_embed",
      "blocks.{}.norm1": "blocks/{}/norm1",
      "blocks.{}.attn.qkv": "blocks/{}/attention/query,key,value",
      "blocks.{}.attn.proj": "blocks/{}/attention/out",
      "blocks.{}.norm2": "blocks/{}/norm2",
      "blocks.{}.mlp.fc1": "blocks/{}/mlp/fc1",
      "blocks.{}.mlp.fc2": "blocks/{}/mlp/fc2",
      "norm": "final_norm",
      "head": "head",
    },
    unused=(),
    antialias=True,
    align_corners=False,
    preprocessing=Preprocessing(
      (0.5,) * 3, (0.5,) * 3, (224, 224), "bicubic", 0.9
    ),
    norm_epsilon=1e-6,
  ),
  "torchvision": Layout(
    prefix="",
    sign="conv_proj.weight",
    modules={
      "class_token": "class_token",
      "encoder.pos_embedding": "position_embed",
      "conv_proj": "patch_embed",
      "encoder.layers.encoder_layer_{}.ln_1": "blocks/{}/norm1",
      "encoder.layers.encoder_layer_{}.self_attention.in_proj": (
        "blocks/{}/attention/query,key,value"
      ),
      "encoder.layers.encoder_layer_{}.self_attention.out_proj": (
        "blocks/{}/attention/out"
      ),
      "encoder.layers.encoder_layer_{}.ln_2": "blocks/{}/norm2",
      "encoder.layers.encoder_layer_{}.mlp.0": "blocks/{}/mlp/fc1",
      "encoder.layers.encoder_layer_{}.mlp.3": "blocks/{}/mlp/fc2",
      # Files that are older than torchvision 0.12.
      "encoder.layers.encoder_layer_{}.mlp.linear_1": "blocks/{}/mlp/fc1",
      "encoder.layers.encoder_layer_{}.mlp.linear_2": "blocks/{}/mlp/fc2",
      "encoder.ln": "final_norm",
      "heads.head": "head",
    },
    unused=(),
    antialias=False,
    align_corners=True,
    preprocessing=Preprocessing(
      (0.485, 0.456, 0.406),
      (0.229, 0.224, 0.225),
      (224, 224),
      "bilinear",
      224 / 256,
    ),
    norm_epsilon=1e-6,
  ),
}


def find_layout(
  stored: Mapping[str, np.ndarray], layouts: Mapping[str, Layout]
) -> str | None:
  """Finds the library that named these weights, or None."""
  for name, layout in layouts.items():
    if layout.sign in stored or layout.prefix + layout.sign in stored:
      return name
  return None


def rename(
  stored: Mapping[str, np.ndarray], layout: Layout
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Puts weights under the leaf paths of this project's model.

  torch's linear layers hold `[outputs, inputs]`, ours `[inputs, outputs]`; its
  convolutions `[outputs, C, P, P]`, our patch embedding `[P * P * C, outputs]`.

  Returns:
    The weights by our path, and those names that have no place here.
  """
  arrays, unknown = {}, []
  for name, array in stored.items():
    plain = name.removeprefix(layout.prefix).replace("in_proj_", "in_proj.")
    number = _NUMBER.search(plain)
    plain = _NUMBER.sub("{}", plain, count=1)
    module, _, kind = plain.rpartition(".")
    if plain in layout.modules:  # an array of its own, not a layer's
      arrays[layout.modules[plain]] = array
    elif module in layout.modules and kind in ("weight", "bias"):
      path = layout.modules[module].format(number and number.group())
      parent, _, leaves = path.rpartition("/")
      names = leaves.split(",")
      if len(array) % len(names):
        unknown.append(name)
        continue
      for leaf, part in zip(names, np.split(array, len(names)), strict=True):
        owner = f"{parent}/{leaf}" if parent else leaf
        arrays[f"{owner}/{_kind(kind, part)}"] = _ours(part)
    elif plain not in layout.unused and module not in layout.unused:
      unknown.append(name)
  return arrays, unknown


def _kind(kind, array):
  """Returns Flax's name of a layer's weight or bias."""
  if kind == "bias":
    return kind
  return "scale" if array.ndim == 1 else "kernel"


def _ours(array):
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
  return array.T
