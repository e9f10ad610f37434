"""Published weights of vision transformers, from safetensors files."""

import contextlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging

from experiments.models import layouts, positions, preprocessing as preparing

HUB = "hf://"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"


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
    A tree like `like`, with its dtypes.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is of another layout or model, or not finite.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.

  References:
    Dosovitskiy et al., An Image is Worth 16x16 Words, `arXiv:2010.11929
    <https://arxiv.org/abs/2010.11929>`_ (3.2: interpolating positions).
  """
  file = find(source)
  stored = _read(file)
  layout = layouts.LAYOUTS[_layout_of(stored, file)]
  arrays, unknown = layouts.rename(stored, layout)
  _check_config(file, vit)
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  expected = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in paths
  }
  note = _keep_head(arrays, expected)
  _check_names(arrays, unknown, expected, file)
  _check_shapes(arrays, expected, file)
  arrays["position_embed"] = _positions(
    arrays, expected, input_shape, layout, file
  )
  if note:
    logging.warning("%s %s", file, note)
  for name, array in arrays.items():
    if not np.isfinite(array.astype(np.float32)).all():
      raise ValueError(f"{name} in {file} is not finite: the file is damaged.")
  return structure.unflatten(
    [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in expected.items()]
  )


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
  file = find(source)
  theirs = _beside(file, PREPROCESSOR)
  timms = (_beside(file, CONFIG) or {}).get("pretrained_cfg")
  try:
    if theirs is not None:
      return preparing.from_huggingface(theirs)
    if timms is not None:
      return preparing.from_timm(timms)
  except (KeyError, TypeError, ValueError, IndexError) as error:
    raise ValueError(
      f"what is said beside {file} about images can't be read:"
      f" {type(error).__name__}: {error}."
    ) from error
  name = _layout_of(_read(file), file)
  logging.warning(
    "There is no %s beside %s: images are prepared as %s does by default.",
    PREPROCESSOR,
    file,
    name,
  )
  return layouts.LAYOUTS[name].preprocessing


def find(source: str | pathlib.Path) -> pathlib.Path:
  """The file that `source` means.

  Args:
    source: as `load` takes it.

  Returns:
    The path of the `.safetensors` file; one of the hub's is fetched first.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.
  """
  if str(source).startswith(HUB):
    return _fetch(str(source).removeprefix(HUB))
  path = pathlib.Path(source)
  file = path / WEIGHTS if path.is_dir() else path
  if file.is_file():
    return file
  if path.is_dir():
    there = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
      f"no {WEIGHTS} in {path} (there is {there}); name a .safetensors file,"
      " or a folder with a file of that name."
    )
  raise FileNotFoundError(
    f"no file or folder {path}; to fetch weights from the Hugging Face Hub,"
    f' write "{HUB}owner/name".'
  )


def _fetch(name):
  """`model.safetensors` in the hub's cache, with the small files beside it."""
  try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
  except ImportError as error:
    raise ImportError(
      f"{HUB}{name} needs huggingface_hub: `pip install huggingface_hub`, or"
      f" download {WEIGHTS} yourself and name the file."
    ) from error
  name, _, revision = name.partition("@")
  options = {"repo_id": name, "revision": revision or None}
  try:
    file = hf_hub_download(filename=WEIGHTS, **options)
    for optional in (CONFIG, PREPROCESSOR):
      with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(filename=optional, **options)
  except Exception as error:  # whatever its versions and their clients raise
    raise OSError(
      f"{WEIGHTS} of {HUB}{name} can't be fetched: {error} Check the name and"
      " the connection, or download the file yourself and name it."
    ) from error
  return pathlib.Path(file)


def _read(file):
  """Name to array."""
  try:
    with safetensors.safe_open(file, framework="numpy") as content:
      return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{file} can't be read as safetensors ({error}); pickled weights (.bin,"
      " .pth) are never read: convert them with safetensors.torch.save_file."
    ) from error


def _layout_of(stored, file):
  name = layouts.name_of(stored)
  if name is None:
    raise ValueError(
      f"{file} holds {_some(sorted(stored))}; expected a vision transformer"
      f" with the names of {', '.join(layouts.LAYOUTS)}."
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
  arrays.update({name: np.asarray(leaf) for name, leaf in head.items()})
  return (
    f"has {theirs}: the head for {len(head['head/bias'])} classes stays at its"
    " initialisation."
  )


def _check_names(arrays, unknown, expected, file):
  missing = sorted(expected.keys() - arrays.keys())
  surplus = sorted([*(arrays.keys() - expected.keys()), *unknown])
  if missing or surplus:
    raise ValueError(
      f"{file} is of another architecture than the model:"
      f" it lacks {_some(missing)}, and has {_some(surplus)}, which the model"
      f" has no place for. {_advice(arrays)}"
    )


def _check_shapes(arrays, expected, file):
  wrong = [
    f"{name} has shape {arrays[name].shape}, expected {leaf.shape}"
    for name, leaf in expected.items()
    if arrays[name].shape != leaf.shape
    and not (name == "position_embed" and _same_but_tokens(arrays[name], leaf))
  ]
  if wrong:
    raise ValueError(
      f"{file} is of another architecture than the model: {_some(wrong, '; ')}."
      f" {_advice(arrays)}"
    )


def _same_but_tokens(theirs, ours):
  return theirs.ndim == 3 and theirs.shape[::2] == ours.shape[::2]


def _some(names, separator=", "):
  shown = separator.join(names[:6]) or "nothing"
  return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


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
  config = _beside(file, CONFIG) or {}
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
  tokens = stored.shape[1] - others
  side = math.isqrt(tokens)
  if tokens == math.prod(grid) and (side, side) == grid:
    return stored
  if side * side != tokens:
    raise ValueError(
      f"{file} has {tokens} position embeddings for patches, which don't make a"
      " square; only those of square images can be interpolated."
    )
  logging.info(
    "%s: position embeddings from %dx%d to %dx%d.", file, side, side, *grid
  )
  resized = positions.resize(
    stored[0, others:].reshape(side, side, -1).astype(np.float64),
    grid,
    antialias=layout.antialias,
    align_corners=layout.align_corners,
  )
  return np.concatenate(
    [stored[:, :others], resized.reshape(1, math.prod(grid), -1)], axis=1
  )


def _beside(file, name):
  """What a JSON file beside the weights says; None if there is none."""
  path = file.with_name(name)
  if not path.is_file():
    return None
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds no fields but {type(content).__name__}.")
  return content
