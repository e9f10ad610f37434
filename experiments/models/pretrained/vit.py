"""Published weights of vision transformers, from safetensors files."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import config_dict

from experiments.models.pretrained import (
  architectures,
  files as weight_files,
  layouts,
  positions,
  preprocessing as preparing,
)
from experiments.models.vit import POOLINGS
from experiments.runtime import hub
from experiments.runtime.hub import CONFIG, PREPROCESSOR

SIZE = "pretrained"  # `config.model.size` that takes all from the file


def load(
  source: str | pathlib.Path,
  like: Any,
  *,
  input_shape: tuple[int, ...],
  vit: Mapping[str, Any] | None = None,
) -> Any:
  """Loads published weights as this project's vision transformer's parameters.

  The names may be those of Hugging Face (`ViTModel` and
  `ViTForImageClassification`), timm or torchvision. Position embeddings of
  another grid are interpolated as the library that wrote the file does it; the
  file's grid is that of the images that a `config.json` beside it speaks of,
  else a square one, else the model's own if it has as many patches. A
  head for another number of classes, or none, leaves the head of `like` as it
  is; a log line says so.

  Args:
    source: a safetensors file, a folder with `model.safetensors`, or
      `"hf://owner/name"` (`"hf://owner/name@revision"`), which alone is
      fetched, or taken from the cache, with huggingface_hub.
    like: the parameters that `models.create` gives.
    input_shape: of one image, `(H, W, C)`.
    vit: `config.model.vit`. Shapes don't tell the number of heads and the
      norms' epsilon: a `config.json` beside the file decides, and a log line
      says where none does.

  Returns:
    A tree like `like`, with its dtypes and shardings.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is of another layout or model, or not finite; every
      difference between the model and a `config.json` is named.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.

  References:
    Dosovitskiy et al., An Image is Worth 16x16 Words, `arXiv:2010.11929
    <https://arxiv.org/abs/2010.11929>`_ (3.2: interpolating positions).
  """
  file = hub.find(source)
  stored = weight_files.read(file)
  layout = layouts.LAYOUTS[_find_layout(stored, file)]
  arrays, unknown = layouts.rename(stored, layout)
  expected = weight_files.list_leaves(like)
  channels = input_shape[-1]
  told = _told(file)
  shown = architectures.infer_vit(arrays, channels)
  _check_told(told, shown, expected, vit or {}, channels, file)
  note = weight_files.keep_head(arrays, expected)
  advice = _advice(arrays, told)
  weight_files.check_names(arrays, unknown, expected, file, advice)
  weight_files.check_shapes(
    arrays, expected, file, advice, but_tokens=["position_embed"]
  )
  arrays["position_embed"] = _positions(
    arrays, expected, input_shape, layout, told, shown.get("patch_size"), file
  )
  if note:
    logging.warning("%s %s", file, note)
  return weight_files.fill(like, arrays, file)


def architecture(
  source: str | pathlib.Path, *, channels: int = 3
) -> dict[str, Any]:
  """Finds the fields of `config.model.vit` for the weights in `source`.

  Args:
    source: as `load` takes it.
    channels: of the images.

  Returns:
    Patch size, widths, depth, heads, pooling and the norms' epsilon.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no vision transformer's, or there is no `config.json`
      beside it that tells the number of heads.
  """
  file = hub.find(source)
  stored = architectures.placeholders(weight_files.shapes(file))
  layout = layouts.LAYOUTS[_find_layout(stored, file)]
  arrays, _ = layouts.rename(stored, layout)
  told = _told(file)
  if "heads" not in told.fields:
    raise ValueError(
      f"there is no {CONFIG} beside {file} that tells the number of heads;"
      " expected one, or config.model.size='' and all fields of"
      f" config.model.vit as the model has them. {_advice(arrays, told)}"
    )
  shown = architectures.infer_vit(arrays, channels)
  pooling = "class_token" if "class_token" in arrays else "mean"
  own = {"pooling": pooling, "norm_epsilon": layout.norm_epsilon}
  names = (*shown, "heads", *own)
  found = {**own, **shown, **told.fields}
  architectures.check(told, shown, {}, {}, file, section="config.model.vit")
  return {name: found[name] for name in names}


def sized(
  model: config_dict.ConfigDict, *, channels: int = 3
) -> config_dict.ConfigDict:
  """Fills in the fields of `vit` in `config.model` from the file, if asked to.

  Args:
    model: `config.model`; `size` is `SIZE` to take them from the weights that
      `pretrained` names. Without `pretrained` the model stays as it is.
    channels: of the images.

  Returns:
    The same, or a copy with other fields.

  Raises:
    FileNotFoundError: as `architecture`.
    ValueError: as `architecture`.
  """
  if model.get("size") != SIZE or model.get("pretrained") is None:
    return model
  fields = architecture(model.pretrained, channels=channels)
  copy = model.copy_and_resolve_references().unlock()
  with weight_files.about(model.pretrained, "the model"):
    copy.vit.update(fields)
  return copy.lock()


def preprocessing(source: str | pathlib.Path) -> preparing.Preprocessing:
  """Finds the preparation of images that the weights in `source` expect.

  It is taken from a `preprocessor_config.json` (Hugging Face) or a
  `config.json` with `pretrained_cfg` (timm) beside the file; without them it is
  the custom of the library that wrote the file, and a log line says so.

  Args:
    source: as `load` takes it.

  Returns:
    Mean, standard deviation, size, interpolation and crop.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the files beside the weights can't be read.
  """
  file = hub.find(source)
  theirs = weight_files.beside(file, PREPROCESSOR)
  timms = (weight_files.beside(file, CONFIG) or {}).get("pretrained_cfg")
  with weight_files.about(file, "images"):
    if theirs is not None:
      return preparing.from_huggingface(theirs)
    if timms is not None:
      return preparing.from_timm(timms)
  name = _find_layout(weight_files.read(file), file)
  logging.warning(
    "There is no %s beside %s: images are prepared as %s does by default.",
    PREPROCESSOR,
    file,
    name,
  )
  return layouts.LAYOUTS[name].preprocessing


def _find_layout(stored, file):
  name = layouts.find_layout(stored)
  if name is None:
    raise ValueError(
      f"{file} holds {weight_files.some(sorted(stored))}; expected a vision"
      f" transformer with the names of {', '.join(layouts.LAYOUTS)}."
    )
  return name


def _advice(arrays, told):
  """Advises what to set, as far as the file and its neighbours tell."""
  fields: dict[str, Any] = {}
  blocks = {name.split("/")[1] for name in arrays if name.startswith("blocks/")}
  fields["depth"] = len(blocks)
  if "patch_embed/bias" in arrays:
    fields["width"] = len(arrays["patch_embed/bias"])
  if "blocks/0/mlp/fc1/bias" in arrays:
    fields["mlp_width"] = len(arrays["blocks/0/mlp/fc1/bias"])
  fields["pooling"] = "class_token" if "class_token" in arrays else "mean"
  heads = "; its heads are not told, most have width / 64"
  if "heads" in told.fields:
    fields["heads"], heads = told.fields["heads"], ""
  text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
  side = ""
  if "patch_embed/kernel" in arrays:
    side = (
      " and a patch_size whose square times the images' channels is"
      f" {len(arrays['patch_embed/kernel'])}"
    )
  return f"The file asks for config.model.vit with {text}{side}{heads}."


def _told(file):
  """Reads the `config.json` beside the weights."""
  config = weight_files.beside(file, CONFIG) or {}
  with weight_files.about(file, "the model"):
    return architectures.read_vit(config)


def _check_told(told, shown, expected, vit, channels, file):
  """Compares statements with the model, and with the weights themselves."""
  model = {**architectures.infer_vit(expected, channels), **vit}
  fixed = {
    "activation": "gelu",
    "channels": channels,
    "no_embed_class": False,  # the class token has a position too
  }
  pooling = told.fields.get("pooling")
  if pooling is not None and pooling not in POOLINGS:
    fixed["pooling"] = model.get("pooling")
  architectures.check(
    told, shown, model, fixed, file, section="config.model.vit"
  )
  architectures.say_unknown(told, model, ("heads", "norm_epsilon"), file)


def _positions(arrays, expected, input_shape, layout, told, patch_size, file):
  """Fits the file's position embeddings to the model's grid."""
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
  stored = arrays["position_embed"][0]
  tokens = len(stored) - others
  fitted = positions.fit(
    stored,
    grid,
    stored_grid=architectures.grid(told, patch_size, tokens, file),
    others=others,
    antialias=layout.antialias,
    align_corners=layout.align_corners,
    name=file,
  )
  return fitted[None]
