"""Published weights of CLIP models, from safetensors files."""

import inspect
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from ml_collections import config_dict

from experiments.models import clip
from experiments.models.pretrained import (
  architectures,
  files as weight_files,
  layouts,
  positions,
  preprocessing as preparing,
)
from experiments.runtime import hub
from experiments.runtime.hub import CONFIG, PREPROCESSOR, WEIGHTS

OPENCLIP_CONFIG = "open_clip_config.json"
NAMES = (WEIGHTS, "open_clip_model.safetensors")
BESIDE = (CONFIG, PREPROCESSOR, OPENCLIP_CONFIG)

# Fields that shapes don't show.
_NOT_SHOWN = ("image_heads", "text_heads", "activation")
_IMAGE, _TEXT = "image/position_embed", "text/position_embed"
_PREPROCESSING = preparing.Preprocessing(
  preparing.OPENAI_MEAN, preparing.OPENAI_STD, (224, 224), "bicubic", 1.0
)


def _block(theirs, ours, modules):
  return {
    f"{theirs}.{{}}.{name}": f"{ours}/blocks/{{}}/{path}"
    for name, path in modules.items()
  }


_HUGGINGFACE_BLOCK = {
  "layer_norm1": "norm1",
  "self_attn.q_proj": "attention/query",
  "self_attn.k_proj": "attention/key",
  "self_attn.v_proj": "attention/value",
  "self_attn.out_proj": "attention/out",
  "layer_norm2": "norm2",
  "mlp.fc1": "mlp/fc1",
  "mlp.fc2": "mlp/fc2",
}
_OPENCLIP_BLOCK = {
  "ln_1": "norm1",
  "attn.in_proj": "attention/query,key,value",
  "attn.out_proj": "attention/out",
  "ln_2": "norm2",
  "mlp.c_fc": "mlp/fc1",
  "mlp.c_proj": "mlp/fc2",
}

LAYOUTS = {
  "huggingface": layouts.Layout(
    prefix="",
    sign="vision_model.embeddings.class_embedding",
    modules={
      "vision_model.embeddings.class_embedding": "image/class_token",
      "vision_model.embeddings.patch_embedding": "image/patch_embed",
      "vision_model.embeddings.position_embedding.weight": (
        "image/position_embed"
      ),
      "vision_model.pre_layrnorm": "image/pre_norm",  # its own spelling
      **_block("vision_model.encoder.layers", "image", _HUGGINGFACE_BLOCK),
      "vision_model.post_layernorm": "image/final_norm",
      "visual_projection": "image/projection",
      "text_model.embeddings.token_embedding.weight": (
        "text/token_embed/embedding"
      ),
      "text_model.embeddings.position_embedding.weight": "text/position_embed",
      **_block("text_model.encoder.layers", "text", _HUGGINGFACE_BLOCK),
      "text_model.final_layer_norm": "text/final_norm",
      "text_projection": "text/projection",
      "logit_scale": "logit_scale",
    },
    # Older versions keep the numbers 0, 1, 2, ... as a weight.
    unused=(
      "vision_model.embeddings.position_ids",
      "text_model.embeddings.position_ids",
    ),
    antialias=False,
    align_corners=False,
    preprocessing=_PREPROCESSING,
    norm_epsilon=1e-5,
  ),
  # OpenAI's own files have these names too.
  "openclip": layouts.Layout(
    prefix="module.",
    sign="visual.class_embedding",
    modules={
      "visual.class_embedding": "image/class_token",
      "visual.conv1": "image/patch_embed",
      "visual.positional_embedding": "image/position_embed",
      "visual.ln_pre": "image/pre_norm",
      **_block("visual.transformer.resblocks", "image", _OPENCLIP_BLOCK),
      "visual.ln_post": "image/final_norm",
      "visual.proj": "image/projection/kernel",
      "token_embedding.weight": "text/token_embed/embedding",
      "positional_embedding": "text/position_embed",
      **_block("transformer.resblocks", "text", _OPENCLIP_BLOCK),
      "ln_final": "text/final_norm",
      "text_projection": "text/projection/kernel",
      "logit_scale": "logit_scale",
      "logit_bias": "logit_bias",
    },
    unused=("input_resolution", "context_length", "vocab_size", "attn_mask"),
    antialias=True,
    align_corners=False,
    preprocessing=_PREPROCESSING,
    norm_epsilon=1e-5,
  ),
}


def create(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  seed: int,
  place: Callable[[Any], Any] = lambda params: params,
) -> tuple[Callable[..., clip.Features], dict[str, Any]]:
  """Creates a CLIP as `clip.create`, with weights from `config.pretrained`.

  Args:
    config: `config.model`; `pretrained` is None, or a source as `load` takes
      it. With `size="pretrained"` the weights fill in unset `clip` fields.
    input_shape: of one image, `(H, W, C)`.
    seed: of new parameters.
    place: puts parameters on their devices; weights are loaded straight to
      there.

  Returns:
    `apply(params, images or None, tokens or None) -> Features`, and params.

  Raises:
    ValueError: as `clip.create` and `load`.
    FileNotFoundError: as `load`.
    ImportError: as `load`.
    OSError: as `load`.
  """
  config = sized(config, channels=input_shape[-1])
  apply, params = clip.create(config, input_shape=input_shape, seed=seed)
  params = place(params)
  source = config.get("pretrained")
  if source is not None:
    options = clip.options(config)
    params = load(source, params, input_shape=input_shape, options=options)
  return apply, params


def load(
  source: str | pathlib.Path,
  like: Any,
  *,
  input_shape: tuple[int, ...],
  options: Mapping[str, Any] | None = None,
) -> Any:
  """Loads published weights as the parameters of this project's CLIP.

  The names may be those of Hugging Face (`CLIPModel`), of OpenAI or OpenCLIP.
  Position embeddings of another image size are interpolated as the library that
  wrote the file does it; a model with a shorter context takes the first ones.

  Args:
    source: a safetensors file, a folder with `model.safetensors` or
      `open_clip_model.safetensors`, or `"hf://owner/name"`
      (`"hf://owner/name@revision"`), which alone is fetched, or taken from the
      cache, with huggingface_hub.
    like: the parameters that `clip.create` gives.
    input_shape: of one image, `(H, W, C)`.
    options: as `clip.options` gives them. Shapes don't tell the number of
      heads, the activation and the norms' epsilon: a `config.json` or
      `open_clip_config.json` beside the file decides, and a log line says where
      none does.

  Returns:
    A tree like `like`, with its dtypes.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is of another layout or model, or not finite; every
      difference between the model and the files beside it is named.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.

  References:
    Radford et al., `arXiv:2103.00020 <https://arxiv.org/abs/2103.00020>`_;
    Cherti et al., Reproducible scaling laws for contrastive language-image
    learning, `arXiv:2212.07143 <https://arxiv.org/abs/2212.07143>`_.
  """
  file = hub.find(source, NAMES, BESIDE)
  stored = weight_files.read(file)
  layout = LAYOUTS[_find_layout(stored, file)]
  arrays, unknown = layouts.rename(stored, layout)
  expected = weight_files.list_leaves(like)
  channels = input_shape[-1]
  told = _told(file)
  shown = architectures.infer_clip(arrays, channels)
  _check_told(told, shown, expected, options or {}, channels, file)
  for name in {"logit_scale", "logit_bias"} & arrays.keys():
    arrays[name] = arrays[name].reshape(())  # some files have them as [1]
  advice = _advice(arrays, shown, told)
  weight_files.check_names(arrays, unknown, expected, file, advice)
  weight_files.check_shapes(
    arrays, expected, file, advice, but_tokens=[_IMAGE, _TEXT]
  )
  arrays[_IMAGE] = positions.fit(
    arrays[_IMAGE],
    _grid(expected, input_shape),
    stored_grid=_find_grid(told, shown, len(arrays[_IMAGE]) - 1, file),
    others=1,
    antialias=layout.antialias,
    align_corners=layout.align_corners,
    name=file,
  )
  arrays[_TEXT] = _keep_first_tokens(arrays[_TEXT], len(expected[_TEXT]), file)
  return weight_files.fill(like, arrays, file)


def architecture(
  source: str | pathlib.Path, *, channels: int = 3
) -> dict[str, Any]:
  """Finds the fields of `config.model.clip` for the weights in `source`.

  Args:
    source: as `load` takes it.
    channels: of the images.

  Returns:
    Keyword arguments of `clip.CLIP`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no CLIP's, or nothing beside it tells its heads and
      activation.
  """
  file = hub.find(source, NAMES, BESIDE)
  stored = architectures.placeholders(weight_files.shapes(file))
  layout = LAYOUTS[_find_layout(stored, file)]
  arrays, _ = layouts.rename(stored, layout)
  shown = architectures.infer_clip(arrays, channels)
  told = _told(file)
  fields: dict[str, Any] = {"norm_epsilon": layout.norm_epsilon}
  for name, said in told.items():
    architectures.check(
      said, shown, {}, {}, file, section="config.model.clip", beside=name
    )
    fields |= {**dict(said.again), **said.fields}
  if _untold(told):
    raise ValueError(
      f"there is no {CONFIG} beside {file} that tells"
      f" {', '.join(_untold(told))};"
      " expected one, or another config.model.size and what differs from it in"
      f" config.model.clip. {_advice(arrays, shown, told)}"
    )
  if "logit_bias" in arrays:
    fields["logit_bias"] = 0.0  # where it starts; it is loaded
  own = ("norm_epsilon", "logit_bias", *_NOT_SHOWN)
  return {**shown, **{name: fields[name] for name in own if name in fields}}


def sized(
  model: config_dict.ConfigDict, *, channels: int = 3
) -> config_dict.ConfigDict:
  """Fills in the fields of `clip` in `config.model` from the file, if asked to.

  Args:
    model: `config.model`; with `size="pretrained"` and `pretrained` all fields
      of `clip` that are None are as that file has them.
    channels: of the images.

  Returns:
    The same, or a copy with other fields.

  Raises:
    ValueError: as `architecture`.
  """
  if model.size != clip.PRETRAINED or model.get("pretrained") is None:
    return model
  fields = architecture(model.pretrained, channels=channels)
  copy = model.copy_and_resolve_references().unlock()
  with weight_files.about(model.pretrained, "the model"):
    for name, value in fields.items():
      if copy.clip.get(name) is None:
        copy.clip[name] = value
  return copy.lock()


def preprocessing(source: str | pathlib.Path) -> preparing.Preprocessing:
  """Finds the preparation of images that the weights in `source` expect.

  It is taken from a `preprocessor_config.json` (Hugging Face) or an
  `open_clip_config.json` (OpenCLIP) beside the file; without them it is
  OpenAI's, and a log line says so.

  Args:
    source: as `load` takes it.

  Returns:
    Mean, standard deviation, size, interpolation and crop.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the files beside the weights can't be read.
  """
  file = hub.find(source, NAMES, BESIDE)
  theirs = weight_files.beside(file, PREPROCESSOR)
  openclips = weight_files.beside(file, OPENCLIP_CONFIG)
  with weight_files.about(file, "images"):
    if theirs is not None:
      return preparing.from_huggingface(theirs)
    if openclips is not None:
      return preparing.from_openclip(openclips)
  logging.warning(
    "There is no %s beside %s: images are prepared as OpenAI does.",
    PREPROCESSOR,
    file,
  )
  return _PREPROCESSING


def _find_layout(stored, file):
  name = layouts.find_layout(stored, LAYOUTS)
  if name is None:
    raise ValueError(
      f"{file} holds {weight_files.some(sorted(stored))}; expected a CLIP model"
      f" whose image tower is a transformer, with the names of"
      f" {', '.join(LAYOUTS)}."
    )
  return name


def _grid(expected, input_shape):
  """Returns the model's rows and columns of patches."""
  rows, columns, channels = input_shape
  side = math.isqrt(len(expected["image/patch_embed/kernel"]) // channels)
  grid = (rows // side, columns // side)
  if math.prod(grid) + 1 != len(expected[_IMAGE]):
    raise ValueError(
      f"input_shape is {tuple(input_shape)}, in patches {grid[0]}x{grid[1]},"
      f" and the model has {len(expected[_IMAGE])} position embeddings;"
      " expected the shape that the model was created with."
    )
  return grid


def _keep_first_tokens(stored, length, file):
  """Keeps the first positions: a caption that fits has the same features."""
  if len(stored) < length:
    raise ValueError(
      f"{file} is for captions of {len(stored)} tokens and the model for"
      f" {length}: set config.model.clip.context_length={len(stored)}, or less."
    )
  return stored[:length]


def _find_grid(told, shown, tokens, file):
  """Finds the file's rows and columns of patches, if they are told."""
  for said in told.values():
    found = architectures.grid(said, shown.get("patch_size"), tokens, file)
    if found is not None:
      return found
  return None


def _advice(arrays, shown, told):
  """Advises what to set, as far as the file and its neighbours tell."""
  fields = dict(shown)
  fields.pop("context_length", None)  # which may be shorter
  for said in told.values():
    own = {**dict(said.again), **said.fields}
    fields |= {x: own[x] for x in _NOT_SHOWN if x in own}
  if "logit_bias" in arrays:
    fields["logit_bias"] = float(arrays["logit_bias"].ravel()[0])
  text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
  more = "" if "image_heads" in fields else "; its heads are not told"
  return f"The file asks for config.model.clip with {text}{more}."


def _told(file):
  """Reads the files beside the weights, by their names."""
  found = {}
  for name in (CONFIG, OPENCLIP_CONFIG):
    config = weight_files.beside(file, name)
    if config:
      with weight_files.about(file, "the model"):
        found[name] = architectures.read_clip(config)
  return found


def _untold(told):
  """Lists the fields that neither shapes nor the files by the weights tell."""
  names = {name for x in told.values() for name in (*x.fields, *dict(x.again))}
  return [name for name in _NOT_SHOWN if name not in names]


def _check_told(told, shown, expected, options, channels, file):
  """Compares statements with the model, and with the weights themselves."""
  if _untold(told):
    logging.warning(
      "There is no %s beside %s: whether it was made with config.model.clip's"
      " activation and heads can't be seen (OpenAI's with 'quick_gelu').",
      CONFIG,
      file,
    )
  model = {**options, **architectures.infer_clip(expected, channels)}
  if options:  # Fields that aren't among them have the model's defaults.
    own = inspect.signature(clip.CLIP.__init__).parameters
    names = ("activation", "norm_epsilon")
    model = {name: own[name].default for name in names} | model
  fixed = {
    "channels": channels,
    "end_token": shown.get("vocab_size", 0) - 1,  # the highest id
    "pooling": "tok",
    "causal": True,
  }
  # A caption that fits has the same features in a shorter context.
  longer = shown.get("context_length", 0) > model.get("context_length", 0)
  if longer:
    model.pop("context_length", None)
  for name, said in told.items():
    architectures.check(
      said, shown, model, fixed, file, section="config.model.clip", beside=name
    )
