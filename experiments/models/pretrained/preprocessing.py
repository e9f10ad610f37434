"""Preparation of images for published weights, as their libraries state it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# OpenAI trained CLIP with these, and most others followed.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class Preprocessing(NamedTuple):
  """Images as a model was trained on them: `(pixel / 255 - mean) / std`."""

  mean: tuple[float, ...]  # one per channel
  std: tuple[float, ...]
  size: tuple[int, int]  # height and width, in pixels
  interpolation: str  # of resizing: "bilinear", "bicubic", ...
  # Share of the resized image's side that the central crop keeps; 1 is no crop.
  crop_fraction: float


def from_huggingface(fields: Mapping[str, Any]) -> Preprocessing:
  """Reads the fields of a `preprocessor_config.json`."""
  if not fields.get("do_rescale", True):
    raise ValueError("do_rescale is false: pixels of 0 to 255 are not fed here")
  if abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
    raise ValueError(f"rescale_factor is {fields['rescale_factor']}, not 1/255")
  resized = _height_and_width(fields["size"])
  size = resized
  if fields.get("do_center_crop", False):
    size = _height_and_width(fields["crop_size"])
  normal = fields.get("do_normalize", True)
  filters = ("nearest", "lanczos", "bilinear", "bicubic")  # Pillow's numbers
  number = fields.get("resample", 2)
  if number not in range(len(filters)):
    raise ValueError(f"resample is {number!r}, none of {', '.join(filters)}")
  return _checked(
    mean=tuple(fields["image_mean"]) if normal else (0.0,) * 3,
    std=tuple(fields["image_std"]) if normal else (1.0,) * 3,
    size=size,
    interpolation=filters[number],
    crop_fraction=size[0] / resized[0],
  )


def _height_and_width(size):
  """Reads `{"height": 224, "width": 224}`, `{"shortest_edge": 224}` or 224."""
  if isinstance(size, dict):
    if "shortest_edge" in size:
      size = size["shortest_edge"]
    else:
      return int(size["height"]), int(size["width"])
  return int(size), int(size)


def from_timm(config: Mapping[str, Any]) -> Preprocessing | None:
  """Reads the `pretrained_cfg` in timm's `config.json`; None without one."""
  fields = config.get("pretrained_cfg")
  if fields is None:
    return None
  return _checked(
    mean=tuple(fields["mean"]),
    std=tuple(fields["std"]),
    size=tuple(fields["input_size"][-2:]),
    interpolation=fields["interpolation"],
    crop_fraction=float(fields["crop_pct"]),
  )


def from_openclip(fields: Mapping[str, Any]) -> Preprocessing:
  """Reads the fields of an `open_clip_config.json`."""
  said = fields.get("preprocess_cfg") or {}
  size = said.get("size") or fields["model_cfg"]["vision_cfg"]["image_size"]
  return _checked(
    mean=tuple(said.get("mean") or OPENAI_MEAN),
    std=tuple(said.get("std") or OPENAI_STD),
    size=tuple(size) if isinstance(size, list) else (int(size), int(size)),
    interpolation=said.get("interpolation") or "bicubic",
    crop_fraction=1.0,  # the shorter side is resized to the size
  )


def _checked(**fields):
  """Makes a Preprocessing, checked for use in computations."""
  found = Preprocessing(**fields)
  channels = (*found.mean, *found.std)
  if not (
    len(found.mean) == len(found.std) > 0
    and all(math.isfinite(x) for x in channels)
    and min(found.std) > 0
  ):
    raise ValueError(
      f"mean is {found.mean} and std {found.std}; expected as many numbers, and"
      " positive ones to divide by"
    )
  if min(found.size) < 1 or not 0 < found.crop_fraction <= 1:
    raise ValueError(
      f"size is {found.size} and the share that is kept {found.crop_fraction}"
    )
  return found
