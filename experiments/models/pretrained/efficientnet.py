"""Published weights of EfficientNet-Lite0, under timm's names."""

import pathlib
import re
from typing import Any

import numpy as np
from absl import logging

from experiments.models.pretrained import (
  files as weight_files,
  preprocessing as preparing,
)
from experiments.runtime import hub

ARCHITECTURE = "tf_efficientnet_lite0"
# timm's statement about that model, where no file beside the weights has one.
PREPROCESSING = preparing.Preprocessing(
  (0.5,) * 3, (0.5,) * 3, (224, 224), "bicubic", 0.875
)
_EPSILON = 1e-3  # of the batch norms of models that come from TensorFlow
_PLAIN = {
  "conv_stem": "stem",
  "bn1": "stem_norm",
  "conv_head": "top",
  "bn2": "top_norm",
  "classifier": "head",
}
_IN_BLOCK = {
  "conv_pw": "expand",
  "bn1": "expand_norm",
  "conv_dw": "depthwise",
  "bn2": "depthwise_norm",
  "conv_pwl": "project",
  "bn3": "project_norm",
}
# The blocks of the first stage don't expand, and timm counts on from there.
_IN_FIRST_STAGE = {
  "conv_dw": "depthwise",
  "bn1": "depthwise_norm",
  "conv_pw": "project",
  "bn2": "project_norm",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)")
_NORM = ("weight", "bias", "running_mean", "running_var")
_ADVICE = (
  "Expected the weights of timm's tf_efficientnet_lite0, such as"
  " hf://timm/tf_efficientnet_lite0.in1k."
)


def load(source: str | pathlib.Path, like: Any) -> Any:
  """Loads published weights as `EfficientNetLite0`'s parameters.

  Batch norms become `scale x + bias` by their running statistics. A head for
  another number of classes, or none, leaves the head of `like` as it is; a log
  line says so.

  Args:
    source: a safetensors file, a folder with `model.safetensors`, or
      `"hf://owner/name"` (`"hf://owner/name@revision"`), which alone is
      fetched, or taken from the cache, with huggingface_hub.
    like: the parameters that `models.create` gives.

  Returns:
    A tree like `like`, with its dtypes and shardings.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is of another model, or not finite; or the config.json
      beside it names another architecture.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.
  """
  file = hub.find(source)
  _check_architecture(file)
  arrays, unknown = _rename(weight_files.read(file), file)
  expected = weight_files.list_leaves(like)
  note = weight_files.keep_head(arrays, expected)
  weight_files.check_names(arrays, unknown, expected, file, _ADVICE)
  weight_files.check_shapes(arrays, expected, file, _ADVICE)
  if note:
    logging.warning("%s %s", file, note)
  return weight_files.fill(like, arrays, file)


def preprocessing(source: str | pathlib.Path) -> preparing.Preprocessing:
  """Finds the preparation of images that the weights in `source` expect.

  Args:
    source: as `load` takes it.

  Returns:
    That of the `config.json` beside the weights; without one timm's for this
    model, and a log line says so.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file beside the weights can't be read.
  """
  file = hub.find(source)
  with weight_files.about(file, "images"):
    told = preparing.from_timm(weight_files.beside(file, hub.CONFIG) or {})
  if told is not None:
    return told
  logging.warning(
    "There is no %s beside %s: images are prepared as timm does for %s.",
    hub.CONFIG,
    file,
    ARCHITECTURE,
  )
  return PREPROCESSING


def _check_architecture(file):
  """Refuses relatives, whose weights would fit and whose padding differs."""
  config = weight_files.beside(file, hub.CONFIG) or {}
  named = config.get("architecture")
  if named is not None and named != ARCHITECTURE:
    raise ValueError(
      f"{file.with_name(hub.CONFIG)} says that the architecture is"
      f" {str(named)[:80]!r}. {_ADVICE}"
    )


def _rename(stored, file):
  """Puts weights under our paths; also the names that have no place here."""
  arrays, unknown = {}, []
  norms: dict[str, dict[str, np.ndarray]] = {}
  for name, array in stored.items():
    module, _, kind = name.rpartition(".")
    path = _path(module)
    is_norm = path is not None and path.endswith("norm")
    if is_norm and kind in _NORM:
      norms.setdefault(path, {})[kind] = np.asarray(array, np.float64)
    elif path is not None and not is_norm and kind in ("weight", "bias"):
      leaf = "kernel" if kind == "weight" else kind
      arrays[f"{path}/{leaf}"] = _ours(path, array)
    elif not (is_norm and kind == "num_batches_tracked"):
      unknown.append(name)
  for path, norm in norms.items():
    missing = [kind for kind in _NORM if kind not in norm]
    if missing:
      raise ValueError(
        f"{file} lacks {', '.join(missing)} of {path}. {_ADVICE}"
      )
    scale = norm["weight"] / np.sqrt(norm["running_var"] + _EPSILON)
    bias = norm["bias"] - norm["running_mean"] * scale
    arrays[f"{path}/scale"] = scale.astype(np.float32)
    arrays[f"{path}/bias"] = bias.astype(np.float32)
  return arrays, unknown


def _path(module):
  """Finds our path of one of timm's modules; None if there is none."""
  found = _BLOCK.fullmatch(module)
  if not found:
    return _PLAIN.get(module)
  stage, block, layer = found.groups()
  own = (_IN_BLOCK if int(stage) else _IN_FIRST_STAGE).get(layer)
  return own and f"blocks/{stage}/{block}/{own}"


def _ours(path, array):
  """Turns `[outputs, inputs, k, k]` into the kernel that the layer has."""
  if array.ndim != 4:
    return array.T
  array = array.transpose(2, 3, 1, 0)
  if path == "stem":
    return array
  if path.endswith("depthwise"):
    return array.reshape(*array.shape[:2], -1)
  return array.reshape(-1, array.shape[-1])
