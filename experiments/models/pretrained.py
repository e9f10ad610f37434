"""Published weights of vision transformers, from safetensors files."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from experiments.models import (
  layouts,
  positions,
  preprocessing as preparing,
  weight_files,
)
from experiments.models.weight_files import CONFIG, PREPROCESSOR


def load(
  source: str | pathlib.Path,
  like: Any,
  *,
  input_shape: tuple[int, ...],
  vit: Mapping[str, Any] | None = None,
) -> Any:
  """Published weights as the parameters of this project's vision transformer.

  The names may be those of Hugging Face (`ViTModel` and
  `ViTForImageClassification`), timm or torchvision. Position embeddings of
  another grid are interpolated as the library that wrote the file does it. A
  head for another number of classes, or none, leaves the head of `like` as it
  is; a log line says so.

  Args:
    source: a safetensors file, a folder with `model.safetensors`, or
      `"hf://owner/name"` (`"hf://owner/name@revision"`), which alone is
      fetched, or taken from the cache, with huggingface_hub.
    like: the parameters that `models.create` gives.
    input_shape: of one image, `(H, W, C)`.
    vit: `config.model.vit`. Shapes don't tell the number of heads nor what is
      added in the norms: where a `config.json` beside the file does, they are
      compared.

  Returns:
    A tree like `like`, with its dtypes and shardings.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is of another layout or model, or not finite.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.

  References:
    Dosovitskiy et al., An Image is Worth 16x16 Words, `arXiv:2010.11929
    <https://arxiv.org/abs/2010.11929>`_ (3.2: interpolating positions).
  """
  file = weight_files.find(source)
  stored = weight_files.read(file)
  layout = layouts.LAYOUTS[_layout_of(stored, file)]
  arrays, unknown = layouts.rename(stored, layout)
  _check_config(file, vit)
  expected = weight_files.leaves_of(like)
  note = _keep_head(arrays, expected)
  advice = _advice(arrays)
  weight_files.check_names(arrays, unknown, expected, file, advice)
  weight_files.check_shapes(
    arrays, expected, file, advice, but_tokens=["position_embed"]
  )
  arrays["position_embed"] = _positions(
    arrays, expected, input_shape, layout, file
  )
  if note:
    logging.warning("%s %s", file, note)
  return weight_files.fill(like, arrays, file)


def preprocessing(source: str | pathlib.Path) -> preparing.Preprocessing:
  """How images must be prepared for the weights in `source`.

  Taken from a `preprocessor_config.json` (Hugging Face) or a `config.json` with
  `pretrained_cfg` (timm) beside the file; without them it is the custom of the
  library that wrote the file, and a log line says so.

  Args:
    source: as `load` takes it.

  Returns:
    Mean, standard deviation, size, interpolation and crop.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: what is beside the file can't be read.
  """
  file = weight_files.find(source)
  theirs = weight_files.beside(file, PREPROCESSOR)
  timms = (weight_files.beside(file, CONFIG) or {}).get("pretrained_cfg")
  with weight_files.about_images(file):
    if theirs is not None:
      return preparing.from_huggingface(theirs)
    if timms is not None:
      return preparing.from_timm(timms)
  name = _layout_of(weight_files.read(file), file)
  logging.warning(
    "There is no %s beside %s: images are prepared as %s does by default.",
    PREPROCESSOR,
    file,
    name,
  )
  return layouts.LAYOUTS[name].preprocessing


def _layout_of(stored, file):
  name = layouts.name_of(stored)
  if name is None:
    raise ValueError(
      f"{file} holds {weight_files.some(sorted(stored))}; expected a vision"
      f" transformer with the names of {', '.join(layouts.LAYOUTS)}."
    )
  return name


def _keep_head(arrays, expected):
  """Puts the model's own head in place of one that doesn't fit; says so."""
  head = {
    name: leaf for name, leaf in expected.items() if name.startswith("head/")
  }
  if all(np.shape(arrays.get(name)) == x.shape for name, x in head.items()):
    return None
  theirs = "no head"
  if "head/bias" in arrays:
    theirs = f"a head for {len(arrays['head/bias'])} classes"
  arrays.update(head)
  return (
    f"has {theirs}: the head for {len(head['head/bias'])} classes stays at its"
    " initialisation."
  )


def _advice(arrays):
  """What to set, as far as the file tells."""
  blocks = {name.split("/")[1] for name in arrays if name.startswith("blocks/")}
  fields = {"depth": len(blocks)}
  if "patch_embed/bias" in arrays:
    fields["width"] = len(arrays["patch_embed/bias"])
  if "blocks/0/mlp/fc1/bias" in arrays:
    fields["mlp_width"] = len(arrays["blocks/0/mlp/fc1/bias"])
  fields["pooling"] = "class_token" if "class_token" in arrays else "mean"
  text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
  side = ""
  if "patch_embed/kernel" in arrays:
    side = (
      " and a patch_size whose square times the images' channels is"
      f" {len(arrays['patch_embed/kernel'])}"
    )
  return f"The file asks for config.model.vit with {text}{side}."


def _check_config(file, vit):
  """The fields that shapes don't show, where a file beside tells them."""
  config = weight_files.beside(file, CONFIG) or {}
  if config.get("hidden_act", "gelu") != "gelu":
    raise ValueError(
      f"the model in {file} has hidden_act {config['hidden_act']!r}; this"
      " project's vision transformer has 'gelu' only."
    )
  for field, theirs in (
    ("heads", config.get("num_attention_heads")),
    ("norm_epsilon", config.get("layer_norm_eps")),
  ):
    ours = (vit or {}).get(field)
    if theirs is not None and ours is not None and ours != theirs:
      raise ValueError(
        f"config.model.vit.{field} is {ours} and the model in {file} was made"
        f" with {theirs}: set config.model.vit.{field}={theirs}."
      )


def _positions(arrays, expected, input_shape, layout, file):
  """The file's position embeddings on the model's grid."""
  rows, columns, channels = input_shape
  size = math.isqrt(len(expected["patch_embed/kernel"]) // channels)
  grid = (rows // size, columns // size)
  others = 1 if "class_token" in expected else 0  # they stand before the grid
  if math.prod(grid) + others != expected["position_embed"].shape[1]:
    raise ValueError(
      f"input_shape is {tuple(input_shape)}, in patches {grid[0]}x{grid[1]},"
      f" and the model has {expected['position_embed'].shape[1]} position"
      " embeddings; expected the shape that the model was created with."
    )
  stored = arrays["position_embed"]
  fitted = positions.fit(
    stored[0],
    grid,
    others=others,
    antialias=layout.antialias,
    align_corners=layout.align_corners,
    name=file,
  )
  return fitted[None]
