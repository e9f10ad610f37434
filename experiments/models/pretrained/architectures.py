"""Architectures of published weights, as their own files state them.

A `config.json` beside weights tells what their shapes don't: the number of the
attention's heads, the norms' epsilon, the activation. Such a file decides; a
model that it contradicts is refused, with all differences.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.runtime import hub

# By the size in the name of an architecture, in timm's words.
_TIMM_HEADS = {
  "tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16,
  "giant": 16, "gigantic": 16,
}  # fmt: skip
_TIMM_FAMILIES = ("vit", "deit", "deit3", "flexivit")
# Fields that transformers leaves out of a config.json, with their values.
_HUGGINGFACE_VIT = {
  "num_attention_heads": 12,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
}
_HUGGINGFACE_IMAGE = {
  "num_attention_heads": 12,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
_HUGGINGFACE_TEXT = _HUGGINGFACE_IMAGE | {"num_attention_heads": 8}


class Told(NamedTuple):
  """The statements of a file beside weights, under the config's names."""

  fields: dict[str, Any]  # the stated ones
  image_size: tuple[int, int] | None  # height and width in pixels
  # Names of fields in another part of the model: the text tower of a CLIP.
  again: tuple[tuple[str, Any], ...] = ()
  is_sure: bool = True  # whether the image size is that of the positions


def read_vit(config: Mapping[str, Any]) -> Told:
  """Reads a ViT from a `config.json` of transformers or timm."""
  if "architecture" in config or "pretrained_cfg" in config:
    return _read_timm(config)
  if config.get("model_type") in ("vit", "deit"):
    config = {**_HUGGINGFACE_VIT, **config}
  return Told(
    _there(
      patch_size=_side(config.get("patch_size")),
      width=config.get("hidden_size"),
      depth=config.get("num_hidden_layers"),
      heads=config.get("num_attention_heads"),
      mlp_width=config.get("intermediate_size"),
      norm_epsilon=config.get("layer_norm_eps"),
      activation=config.get("hidden_act"),
      channels=config.get("num_channels"),
    ),
    _sides(config.get("image_size")),
  )


def _read_timm(config):
  arguments = dict(config.get("model_args") or {})
  images = config.get("pretrained_cfg") or config
  name = str(config.get("architecture") or images.get("architecture") or "")
  words = name.split("_")
  is_plain = words[0] in _TIMM_FAMILIES and "clip" not in words
  heads = None
  if words[0] in _TIMM_FAMILIES:
    # "vit_small_patch16_224", "deit3_base_patch16_384".
    heads = next((_TIMM_HEADS[x] for x in words if x in _TIMM_HEADS), None)
  width = arguments.get("embed_dim", config.get("num_features"))
  ratio = arguments.get("mlp_ratio")
  pooling = arguments.get("global_pool", config.get("global_pool"))
  activation = arguments.get("act_layer", "gelu" if is_plain else None)
  if "quickgelu" in name:
    activation = "quick_gelu"
  if arguments.get("class_token") is False and pooling is None:
    pooling = "avg"
  shape = images.get("input_size") or (None, None, None)
  return Told(
    _there(
      patch_size=_side(arguments.get("patch_size")),
      width=width,
      depth=arguments.get("depth"),
      heads=arguments.get("num_heads", heads),
      mlp_width=int(width * ratio) if width and ratio else None,
      pooling={"token": "class_token", "avg": "mean", "": None}.get(
        pooling, pooling
      ),
      norm_epsilon=1e-6 if is_plain else None,
      activation=activation,
      channels=arguments.get("in_chans", shape[0]),
      no_embed_class=arguments.get("no_embed_class"),
    ),
    # Without arguments it is only the size to show images in.
    _sides(arguments.get("img_size") or shape[1:]),
    is_sure="img_size" in arguments,
  )


def read_clip(config: Mapping[str, Any]) -> Told:
  """Reads a CLIP from a `config.json` or an `open_clip_config.json`."""
  if config.get("model_cfg"):
    return _read_openclip(config["model_cfg"])
  image, text = (
    config.get(name) or {} for name in ("vision_config", "text_config")
  )
  if config.get("model_type") == "clip":
    image, text = _HUGGINGFACE_IMAGE | image, _HUGGINGFACE_TEXT | text
  size, end = text.get("vocab_size"), text.get("eos_token_id")
  fields = _there(
    embed_width=config.get("projection_dim"),
    patch_size=_side(image.get("patch_size")),
    image_width=image.get("hidden_size"),
    image_depth=image.get("num_hidden_layers"),
    image_heads=image.get("num_attention_heads"),
    image_mlp_width=image.get("intermediate_size"),
    context_length=text.get("max_position_embeddings"),
    vocab_size=size,
    text_width=text.get("hidden_size"),
    text_depth=text.get("num_hidden_layers"),
    text_heads=text.get("num_attention_heads"),
    text_mlp_width=text.get("intermediate_size"),
    activation=image.get("hidden_act"),
    norm_epsilon=image.get("layer_norm_eps"),
    channels=image.get("num_channels"),
    # 2 is that of old files, which look for the highest id, as ours do.
    end_token=None if end == 2 or size is None else end,
  )
  again = _there(
    activation=text.get("hidden_act"), norm_epsilon=text.get("layer_norm_eps")
  )
  return Told(fields, _sides(image.get("image_size")), tuple(again.items()))


def _read_openclip(model):
  image, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
  parts = {"image": image, "text": text}
  widths = {name: part.get("width") for name, part in parts.items()}
  epsilons = [(x.get("norm_kwargs") or {}).get("eps") for x in parts.values()]
  return Told(
    _there(
      embed_width=model.get("embed_dim"),
      patch_size=_side(image.get("patch_size")),
      image_width=widths["image"],
      image_depth=image.get("layers"),
      image_heads=widths["image"]
      and widths["image"] // image.get("head_width", 64),
      context_length=text.get("context_length"),
      vocab_size=text.get("vocab_size"),
      text_width=widths["text"],
      text_depth=text.get("layers"),
      text_heads=text.get("heads"),
      activation="quick_gelu" if model.get("quick_gelu") else "gelu",
      norm_epsilon=epsilons[0],
      pooling=image.get("pool_type"),
      causal=None if not text.get("no_causal_mask") else False,
      **{
        f"{tower}_mlp_width": int(width * parts[tower]["mlp_ratio"])
        for tower, width in widths.items()
        if width and parts[tower].get("mlp_ratio")
      },
    ),
    _sides(image.get("image_size")),
    () if epsilons[1] is None else (("norm_epsilon", epsilons[1]),),
  )


def check(
  told: Told,
  arrays: Mapping[str, Any],
  model: Mapping[str, Any],
  fixed: Mapping[str, Any],
  file: pathlib.Path,
  *,
  section: str,
  beside: str = hub.CONFIG,
) -> None:
  """Refuses a model that contradicts a file beside its weights.

  The file's statements are compared with fields that the weights' shapes show
  (`arrays`), that the model has, and that all models of this project have
  (`fixed`).

  Raises:
    ValueError: with every field of the config's section that differs.
  """
  said = [*told.fields.items(), *told.again]
  if others := [
    f"{name}: {beside} says {theirs!r}, the arrays {arrays[name]!r}"
    for name, theirs in said
    if name in arrays and not _same(theirs, arrays[name])
  ]:
    raise ValueError(
      f"the {beside} beside {file} is not that of these weights:"
      f" {_joined(others)}. Expected the two files of one model: fetch both"
      " anew."
    )
  ours = {**model, **fixed}
  odd = [
    f"{name}: the file's {beside} says {theirs!r}, the model has"
    f" {ours[name]!r}{' only' if name in fixed else ''}"
    for name, theirs in said
    if name in ours and not _same(theirs, ours[name])
  ]
  if not odd:
    return
  # All at once: the others' shapes would be refused one error later.
  odd += [
    f"{name}: the file has {theirs!r}, the model has {model[name]!r}"
    for name, theirs in arrays.items()
    if name in model
    and name not in told.fields
    and not _same(theirs, model[name])
  ]
  theirs = {**arrays, **dict(told.again), **told.fields}
  settings = ", ".join(
    f"{section}.{name}={theirs[name]!r}"
    for name in model
    if name in theirs
    and name not in fixed
    and not _same(theirs[name], model[name])
  )
  advice = ""
  if settings:
    advice = (
      f" To take all from the file, set config.model.size='pretrained'; or set"
      f" {settings}."
    )
  raise ValueError(
    f"the model in {file} is another one than the config's: {_joined(odd)}."
    f"{advice}"
  )


def say_unknown(
  said: Mapping[str, Any],
  model: Mapping[str, Any],
  names: tuple[str, ...],
  file: Any,
) -> None:
  """Logs the fields that neither shapes nor a file tell."""
  unknown = [name for name in names if name not in said]
  if unknown:
    logging.warning(
      "There is no %s beside %s that tells %s, which can't be seen in the"
      " weights themselves: whether the model's (%s) are right can't be"
      " checked.",
      hub.CONFIG,
      file,
      " and ".join(unknown),
      ", ".join(f"{name}={model.get(name)!r}" for name in unknown),
    )


def grid(
  told: Told, patch_size: int | None, tokens: int, file: pathlib.Path
) -> tuple[int, int] | None:
  """Finds rows and columns of the patches that weights have positions of.

  They are those of the image size that is told; None if none is, or if it may
  be that of another model.

  Raises:
    ValueError: the image size that the model was made for makes another number.
  """
  if told.image_size is None or not patch_size:
    return None
  rows, columns = (side // patch_size for side in told.image_size)
  if rows * columns == tokens:
    return rows, columns
  text = (
    f"{file} has {tokens} position embeddings for patches; images of"
    f" {told.image_size[0]}x{told.image_size[1]} pixels, of which the file"
    f" beside it speaks, have {rows}x{columns} patches of {patch_size} pixels"
  )
  if told.is_sure:
    raise ValueError(
      f"{text}. Expected the two files of one model: fetch both anew."
    )
  logging.warning("%s. The weights decide.", text)
  return None


def infer_vit(arrays: Mapping[str, Any], channels: int) -> dict[str, Any]:
  """Infers fields of `config.model.vit` from shapes, by our paths."""
  shapes = {name: np.shape(array) for name, array in arrays.items()}
  blocks = {name.split("/")[1] for name in shapes if name.startswith("blocks/")}
  fields: dict[str, Any] = {}
  if "patch_embed/kernel" in shapes:
    fields["width"] = shapes["patch_embed/kernel"][1]
  fields |= _infer_patches(shapes, "patch_embed/kernel", channels)
  fields["depth"] = len(blocks)
  if "blocks/0/mlp/fc1/bias" in shapes:
    fields["mlp_width"] = shapes["blocks/0/mlp/fc1/bias"][0]
  return fields


def infer_clip(arrays: Mapping[str, Any], channels: int) -> dict[str, Any]:
  """Infers fields of `config.model.clip` from shapes, by our paths."""
  shapes = {name: np.shape(array) for name, array in arrays.items()}
  fields: dict[str, Any] = {}
  for tower in ("image", "text"):
    start = f"{tower}/blocks/"
    blocks = {name.split("/")[2] for name in shapes if name.startswith(start)}
    fields[f"{tower}_depth"] = len(blocks)
    if f"{start}0/mlp/fc1/kernel" in shapes:
      width, mlp_width = shapes[f"{start}0/mlp/fc1/kernel"]
      fields |= {f"{tower}_width": width, f"{tower}_mlp_width": mlp_width}
  for name, path, axis in (
    ("embed_width", "text/projection/kernel", -1),
    ("vocab_size", "text/token_embed/embedding", 0),
    ("context_length", "text/position_embed", 0),
  ):
    if path in shapes:
      fields[name] = shapes[path][axis]
  return fields | _infer_patches(shapes, "image/patch_embed/kernel", channels)


def _infer_patches(shapes, path, channels):
  """The side of square patches, from `[side * side * channels, D]`."""
  pixels = shapes.get(path, (0,))[0]
  side = math.isqrt(pixels // channels)
  is_square = pixels and side * side * channels == pixels
  return {"patch_size": side} if is_square else {}


def _joined(lines):
  return "; ".join(dict.fromkeys(lines))


def placeholders(
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
  """Makes arrays of these shapes that take no memory."""
  return {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in shapes.items()
  }


def _same(theirs, ours):
  """True if two fields are the same; floats may be written differently."""
  if isinstance(theirs, float) and isinstance(ours, (int, float)):
    return math.isclose(theirs, ours, rel_tol=1e-6)
  return theirs == ours


def _there(**fields):
  return {name: value for name, value in fields.items() if value is not None}


def _side(size):
  """Returns one number where both sides are the same."""
  if isinstance(size, (list, tuple)) and len(set(map(str, size))) == 1:
    return size[0]
  return size


def _sides(size):
  """Returns height and width, or None where they aren't told."""
  pair = size if isinstance(size, (list, tuple)) else (size, size)
  is_told = len(pair) == 2 and all(
    isinstance(side, int) and side > 0 for side in pair
  )
  return tuple(pair) if is_told else None
