"""Published weights of CLIP models, from safetensors files.

Their names may be those of Hugging Face (`CLIPModel`), of OpenAI or OpenCLIP. A
model with a shorter context takes the first positions of text.

References:
  Radford et al., `arXiv:2103.00020 <https://arxiv.org/abs/2103.00020>`_;
  Cherti et al., Reproducible scaling laws for contrastive language-image
  learning, `arXiv:2212.07143 <https://arxiv.org/abs/2212.07143>`_.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from absl import logging
from ml_collections import config_dict

from experiments.models import clip
from experiments.models.pretrained import (
  architectures,
  family,
  layouts,
  preprocessing as preparing,
)
from experiments.runtime.hub import CONFIG, PREPROCESSOR, WEIGHTS

OPENCLIP_CONFIG = "open_clip_config.json"
NAMES = (WEIGHTS, "open_clip_model.safetensors")

# Fields that shapes don't show.
_NOT_SHOWN = ("image_heads", "text_heads", "activation")
_TEXT = "text/position_embed"
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


class _CLIP(family.Family):
  section = "clip"
  noun = "a CLIP model whose image tower is a transformer"
  infer = staticmethod(architectures.infer_clip)
  layouts = LAYOUTS
  names = NAMES
  readers: ClassVar = {
    CONFIG: architectures.read_clip,
    OPENCLIP_CONFIG: architectures.read_clip,
  }
  preparations: ClassVar = {
    PREPROCESSOR: preparing.from_huggingface,
    OPENCLIP_CONFIG: preparing.from_openclip,
  }
  tower = "image/"
  tokens = ("image/position_embed", _TEXT)
  untold: ClassVar = {name: name for name in _NOT_SHOWN}
  taken = ("norm_epsilon", "logit_bias", *_NOT_SHOWN)
  instead = (
    "another config.model.size and what differs from it in config.model.clip"
  )
  keeps_given = True

  def _own(self, arrays, said):
    # Where it starts; it is loaded.
    return {"logit_bias": 0.0} if "logit_bias" in arrays else {}

  def _custom(self, file):
    return "OpenAI does", _PREPROCESSING

  def _adapt(self, arrays, expected):
    for name in {"logit_scale", "logit_bias"} & arrays.keys():
      arrays[name] = arrays[name].reshape(())  # some files have them as [1]

  def _fit_tokens(self, weights, expected, input_shape):
    super()._fit_tokens(weights, expected, input_shape)
    # A caption that fits has the same features in a shorter context.
    stored, length = weights.arrays[_TEXT], len(expected[_TEXT])
    if len(stored) < length:
      raise ValueError(
        f"{weights.file} is for captions of {len(stored)} tokens and the model"
        f" for {length}: set config.model.clip.context_length={len(stored)}, or"
        " less."
      )
    weights.arrays[_TEXT] = stored[:length]

  def _advice(self, weights):
    fields = dict(weights.shown)
    fields.pop("context_length", None)  # which may be shorter
    said = weights.said
    fields |= {name: said[name] for name in _NOT_SHOWN if name in said}
    if "logit_bias" in weights.arrays:
      fields["logit_bias"] = float(weights.arrays["logit_bias"].ravel()[0])
    text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    more = "" if "image_heads" in fields else "; its heads are not told"
    return f"The file asks for config.model.clip with {text}{more}."

  def _check_told(self, weights, expected, options, channels):
    shown = weights.shown
    if any(name not in weights.said for name in _NOT_SHOWN):
      logging.warning(
        "There is no %s beside %s: whether it was made with config.model.clip's"
        " activation and heads can't be seen (OpenAI's with 'quick_gelu').",
        CONFIG,
        weights.file,
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
    # A shorter context is no difference.
    if shown.get("context_length", 0) > model.get("context_length", 0):
      model.pop("context_length", None)
    for name, told in weights.told.items():
      self._check(told, weights, model, fixed, name)


_FAMILY = _CLIP()
load, architecture = _FAMILY.load, _FAMILY.architecture
sized, preprocessing = _FAMILY.sized, _FAMILY.preprocessing


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
    FileNotFoundError, ImportError, OSError: as `load`.
  """
  config = sized(config, channels=input_shape[-1])
  apply, params = clip.create(config, input_shape=input_shape, seed=seed)
  params = place(params)
  source = config.get("pretrained")
  if source is not None:
    options = clip.options(config)
    params = load(source, params, input_shape=input_shape, options=options)
  return apply, params
