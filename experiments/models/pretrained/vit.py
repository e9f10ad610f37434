"""Published weights of vision transformers, from safetensors files.

Their names may be those of Hugging Face (`ViTModel` and
`ViTForImageClassification`), timm or torchvision. A head for another number of
classes, or none, leaves the model's own head as it is; a log line says so.

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words, `arXiv:2010.11929
  <https://arxiv.org/abs/2010.11929>`_ (3.2: interpolating positions).
"""

from typing import ClassVar

from experiments.models.pretrained import (
  architectures,
  family,
  files as weight_files,
  layouts,
  preprocessing as preparing,
)
from experiments.models.pretrained.family import SIZE
from experiments.models.vit import POOLINGS
from experiments.runtime.hub import CONFIG, PREPROCESSOR

__all__ = ["SIZE", "architecture", "load", "preprocessing", "sized"]


class _ViT(family.Family):
  section = "vit"
  noun = "a vision transformer"
  infer = staticmethod(architectures.infer_vit)
  layouts = layouts.LAYOUTS
  readers: ClassVar = {CONFIG: architectures.read_vit}
  preparations: ClassVar = {
    PREPROCESSOR: preparing.from_huggingface,
    CONFIG: preparing.from_timm,
  }
  tokens = ("position_embed",)
  untold: ClassVar = {"heads": "the number of heads"}
  taken = ("heads", "pooling", "norm_epsilon")
  instead = (
    "config.model.size='' and all fields of config.model.vit as the model has"
    " them"
  )

  def _own(self, arrays, said):
    return {"pooling": said.get("pooling", _pooling(arrays))}

  def _custom(self, file):
    name = self._find_library(weight_files.read(file), file)
    return f"{name} does by default", self.layouts[name].preprocessing

  def _adapt(self, arrays, expected):
    return weight_files.keep_head(arrays, expected)

  def _advice(self, weights):
    arrays, said = weights.arrays, weights.said
    names = ("depth", "width", "mlp_width")
    fields = {x: weights.shown[x] for x in names if x in weights.shown}
    fields["pooling"] = _pooling(arrays)
    heads = "; its heads are not told, most have width / 64"
    if "heads" in said:
      fields["heads"], heads = said["heads"], ""
    text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    side = ""
    if "patch_embed/kernel" in arrays:
      side = (
        " and a patch_size whose square times the images' channels is"
        f" {len(arrays['patch_embed/kernel'])}"
      )
    return f"The file asks for config.model.vit with {text}{side}{heads}."

  def _check_told(self, weights, expected, options, channels):
    model = {**architectures.infer_vit(expected, channels), **options}
    fixed = {
      "activation": "gelu",
      "channels": channels,
      "no_embed_class": False,  # the class token has a position too
    }
    said = weights.said
    pooling = said.get("pooling")
    if pooling is not None and pooling not in POOLINGS:
      fixed["pooling"] = model.get("pooling")
    for name, told in weights.told.items():
      self._check(told, weights, model, fixed, name)
    names = ("heads", "norm_epsilon")
    architectures.say_unknown(said, model, names, weights.file)


def _pooling(arrays):
  return "class_token" if "class_token" in arrays else "mean"


_FAMILY = _ViT()
load, architecture = _FAMILY.load, _FAMILY.architecture
sized, preprocessing = _FAMILY.sized, _FAMILY.preprocessing
