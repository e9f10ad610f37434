"""CLIP: an image tower and a text tower into one space."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import config_dict

from experiments.models import patches, transformer
from experiments.runtime import programs

# The sizes that have names: letter by the towers' widths and depths, then the
# patch size. "tiny" is for CPUs, and for captions of few words.
SIZES: dict[str, dict[str, int]] = {
  f"{letter}/{patch_size}": {
    "embed_width": text_width,
    "patch_size": patch_size,
    "image_width": width,
    "image_depth": depth,
    "image_heads": width // 64,
    "context_length": 77,
    "vocab_size": 49_408,
    "text_width": text_width,
    "text_depth": 12,
    "text_heads": text_width // 64,
  }
  for letter, width, depth, text_width, patch_size in (
    ("B", 768, 12, 512, 32),
    ("B", 768, 12, 512, 16),
    ("L", 1024, 24, 768, 14),
  )
} | {
  "tiny": {
    "embed_width": 64,
    "patch_size": 8,
    "image_width": 64,
    "image_depth": 3,
    "image_heads": 4,
    "context_length": 16,
    "vocab_size": 128,
    "text_width": 64,
    "text_depth": 2,
    "text_heads": 4,
  }
}
PRETRAINED = "pretrained"  # A size too: that of the published weights.
MIMIC_LAYERS = ("image_last_mlp", "text_last_mlp", "both_last_mlp", "all")


Array = jax.Array | np.ndarray


class Features(NamedTuple):
  """CLIP's features of pairs; float32 or wider."""

  image: Array | None  # [B, D], of length one; None: there were no images
  text: Array | None  # [B, D], of length one; None: there were no tokens
  logit_scale: Array  # [], the logarithm of the similarities' factor
  logit_bias: Array | None  # [], is added to them; None adds nothing

  @property
  def pair(self) -> tuple[Array, Array]:
    """Features of images and of texts; raises ValueError if one is missing."""
    if self.image is None or self.text is None:
      raise ValueError(
        f"there are no {'image' if self.image is None else 'text'} features;"
        " expected those of images and of texts: give the model both."
      )
    return self.image, self.text


class CLIP(nnx.Module):
  """Two pre-norm transformers, and the scale of their features' similarities.

  Leaf paths read `image/patch_embed/kernel`, `image/blocks/5/mlp/fc1/kernel`,
  `text/token_embed/embedding`, `text/projection/kernel`, `logit_scale`. In the
  last block of a tower nothing is computed for tokens that are not pooled.

  References:
    Radford et al., Learning Transferable Visual Models From Natural Language
    Supervision, `arXiv:2103.00020 <https://arxiv.org/abs/2103.00020>`_.
  """

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    rngs: nnx.Rngs,
    embed_width: int,
    patch_size: int,
    image_width: int,
    image_depth: int,
    image_heads: int,
    context_length: int,
    vocab_size: int,
    text_width: int,
    text_depth: int,
    text_heads: int,
    image_mlp_width: int | None = None,
    text_mlp_width: int | None = None,
    activation: str = "gelu",
    norm_epsilon: float = 1e-5,
    dtype: str | None = None,
    remat: bool = False,
    logit_scale: float = math.log(1 / 0.07),
    logit_bias: float | None = None,
  ):
    """Initialises the parameters, float32, as the paper does the text tower's.

    Args:
      input_shape: of one image, `(H, W, C)`.
      rngs: of the initialisation.
      embed_width: of the space that both towers end in.
      patch_size: height and width of a patch, in pixels.
      image_width: of a token in the image tower.
      image_depth: number of its blocks.
      image_heads: of its attention.
      context_length: the most tokens a caption has.
      vocab_size: number of different tokens. The end token has the highest id
        in a caption: there it is pooled.
      text_width: of a token in the text tower.
      text_depth: number of its blocks.
      text_heads: of its attention.
      image_mlp_width: of the MLPs' hidden layers; None is 4 times the width.
      text_mlp_width: the same of the text tower.
      activation: `"gelu"`, or `"quick_gelu"` for OpenAI's weights.
      norm_epsilon: added to the variance in every norm.
      dtype: of the activations; None is that of the parameters.
      remat: whether the backward pass computes each block anew instead of
        holding its activations.
      logit_scale: start value of the learned one.
      logit_bias: start value of a learned bias, for the sigmoid loss; None has
        no bias.

    Raises:
      ValueError: sizes that don't divide, or an unknown activation.
    """
    patches.check(input_shape, patch_size, "model.clip.patch_size")
    if activation not in transformer.ACTIVATIONS:
      raise ValueError(
        f"config.model.clip.activation is {activation!r}; expected one of"
        f" {', '.join(transformer.ACTIVATIONS)}."
      )
    for tower, width, heads in (
      ("image", image_width, image_heads),
      ("text", text_width, text_heads),
    ):
      if heads < 1 or width % heads:
        raise ValueError(
          f"config.model.clip.{tower}_width is {width} and {tower}_heads is"
          f" {heads}; expected a width that the heads divide."
        )
    shared = {
      "embed_width": embed_width,
      "activation": activation,
      "epsilon": norm_epsilon,
      "dtype": dtype,
      "remat": remat,
      "rngs": rngs,
    }
    self.image = ImageTower(
      input_shape,
      patch_size,
      width=image_width,
      depth=image_depth,
      heads=image_heads,
      mlp_width=image_mlp_width or 4 * image_width,
      **shared,
    )
    self.text = TextTower(
      context_length,
      vocab_size,
      width=text_width,
      depth=text_depth,
      heads=text_heads,
      mlp_width=text_mlp_width or 4 * text_width,
      **shared,
    )
    self.logit_scale = nnx.Param(jnp.asarray(logit_scale, jnp.float32))
    self.logit_bias = (
      nnx.data(None)
      if logit_bias is None
      else nnx.Param(jnp.asarray(logit_bias, jnp.float32))
    )

  def __call__(
    self, images: jax.Array | None = None, tokens: jax.Array | None = None
  ) -> Features:
    """Maps images `[B, H, W, C]` and tokens `[B, T]` to their features."""
    bias = self.logit_bias
    return Features(
      None if images is None else _normalised(self.image(images)),
      None if tokens is None else _normalised(self.text(tokens)),
      self.logit_scale[...],
      None if bias is None else bias[...],
    )


class ImageTower(nnx.Module):
  """Patches, a class token, blocks; the class token's projection."""

  def __init__(
    self, input_shape, patch_size, *, width, dtype, epsilon, rngs, **options
  ):
    rows, columns, channels = input_shape
    self.patch_size = patch_size
    self.patch_embed = transformer.linear(
      patch_size * patch_size * channels,
      width,
      dtype,
      rngs,
      nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
      use_bias=False,
    )
    tokens = 1 + (rows // patch_size) * (columns // patch_size)
    normal = nnx.initializers.normal(width**-0.5)
    self.class_token = nnx.Param(normal(rngs.params(), (width,)))
    self.position_embed = nnx.Param(normal(rngs.params(), (tokens, width)))
    self.pre_norm = transformer.norm(width, epsilon, dtype, rngs)
    _add_body(self, width, dtype, epsilon, rngs, **options)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` to features `[B, D]`."""
    grid = patches.cut(images, self.patch_size)
    hidden = self.patch_embed(grid.reshape(len(grid), -1, grid.shape[-1]))
    token = self.class_token[...].astype(hidden.dtype)
    token = jnp.broadcast_to(token, (len(hidden), 1, token.size))
    hidden = jnp.concatenate([token, hidden], axis=1)
    hidden = hidden + self.position_embed[...][None].astype(hidden.dtype)
    return _through(self, self.pre_norm(hidden), lambda x: x[:, :1])


class TextTower(nnx.Module):
  """Token embeddings, blocks that look back only; the end token's projection.

  Tokens after the end token are not seen, and need no mask.
  """

  def __init__(
    self, context_length, vocab_size, *, width, dtype, epsilon, rngs, **options
  ):
    self.token_embed = nnx.Embed(
      vocab_size,
      width,
      dtype=dtype,
      embedding_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.position_embed = nnx.Param(
      nnx.initializers.normal(0.01)(rngs.params(), (context_length, width))
    )
    _add_body(self, width, dtype, epsilon, rngs, **options)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens `[B, T]` to features `[B, D]`."""
    length = tokens.shape[1]
    if length > len(self.position_embed[...]):
      raise ValueError(
        f"tokens have shape {tokens.shape}; expected at most"
        f" {len(self.position_embed[...])} a caption, the model's"
        " context_length."
      )
    hidden = self.token_embed(tokens)
    hidden = hidden + self.position_embed[:length][None].astype(hidden.dtype)
    ends = jnp.argmax(tokens, axis=1)[:, None, None]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    until_end = jnp.arange(length)[None, None] <= ends
    return _through(
      self,
      hidden,
      lambda x: jnp.take_along_axis(x, ends, axis=1),
      causal[:, None],
      until_end[:, None],
    )


def create(
  config: config_dict.ConfigDict, *, input_shape: tuple[int, ...], seed: int
) -> tuple[Callable[..., Features], dict[str, Any]]:
  """Makes CLIP as a pure function and a plain parameter tree.

  Args:
    config: `config.model`, as `options` takes it; and `dtype`, of the
      activations.
    input_shape: of one image, `(H, W, C)`.
    seed: of the initialisation.

  Returns:
    `apply(params, images [B, H, W, C] or None, tokens [B, T] or None) ->
    Features`, and params as nested dicts of arrays.

  Raises:
    ValueError: an unknown size, field or activation, or sizes that don't fit.
  """
  model = CLIP(
    input_shape=tuple(input_shape),
    rngs=nnx.Rngs(seed),
    dtype=transformer.activations(config),
    **options(config),
  )
  graph, state = nnx.split(model)
  return _make_apply(graph), nnx.to_pure_dict(state)


@programs.once
def _make_apply(graph):
  """Makes one function for one architecture: it is compiled once."""

  def apply(params, images=None, tokens=None):
    return nnx.merge(graph, params)(images, tokens)

  return apply


def options(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Returns the options of `CLIP` in a config.

  Args:
    config: `config.model`: `size`, a name in `SIZES` or `PRETRAINED`, and
      `clip`, the fields of `CLIP` that differ from the size's; None leaves a
      field as the size has it. `clip_pretrained.sized` fills in those of
      `PRETRAINED`.

  Returns:
    Keyword arguments of `CLIP`.

  Raises:
    ValueError: there is no such size or no such field.
  """
  if config.size not in (*SIZES, PRETRAINED):
    raise ValueError(
      f"config.model.size is {config.size!r}; expected one of"
      f" {', '.join((*SIZES, PRETRAINED))}."
    )
  given = {
    name: value
    for name, value in dict(config.get("clip", {})).items()
    if value is not None
  }
  fields = set(inspect.signature(CLIP.__init__).parameters)
  fields -= {"self", "input_shape", "rngs", "dtype"}
  unknown = sorted(given.keys() - fields)
  if unknown:
    raise ValueError(
      f"config.model.clip has the field(s) {', '.join(unknown)}; expected"
      f" {', '.join(sorted(fields))}."
    )
  if config.size == PRETRAINED and "text_heads" not in given:
    raise ValueError(
      f"config.model.size is {PRETRAINED!r} and config.model.pretrained"
      f" {config.get('pretrained')!r}; expected weights, with a config.json"
      " beside them, or another size."
    )
  return {**SIZES.get(config.size, {}), **given}


def mimic_layers(name: str, params: Any) -> str | None:
  """Finds the mimic layers of that name, as a pattern of leaf paths.

  Args:
    name: `"image_last_mlp"` or `"text_last_mlp"`, the MLP of that tower's last
      block; `"both_last_mlp"`; `"all"`; anything else is a pattern already.
    params: CLIP's parameter tree.

  Returns:
    A regular expression, or None for all leaves.
  """
  if name == "all":
    return None
  if name not in MIMIC_LAYERS:
    return name
  tower = name.removesuffix("_last_mlp")
  towers = ("image", "text") if tower == "both" else (tower,)
  blocks = [f"{x}/blocks/{len(params[x]['blocks']) - 1}" for x in towers]
  return f"^({'|'.join(blocks)})/mlp/"


def _add_body(
  tower,
  width,
  dtype,
  epsilon,
  rngs,
  *,
  depth,
  heads,
  mlp_width,
  embed_width,
  activation,
  remat,
):
  """Adds blocks, final norm and projection to a tower."""
  normal = nnx.initializers.normal
  into_residual = normal((2 * depth * width) ** -0.5)
  kernels = transformer.Kernels(
    attention_in=normal(width**-0.5),
    attention_out=into_residual,
    fc1=normal((2 * width) ** -0.5),
    fc2=into_residual,
  )
  tower.remat = remat
  tower.blocks = nnx.List(
    transformer.Block(
      width,
      heads,
      mlp_width,
      epsilon,
      dtype,
      rngs,
      activation=activation,
      kernels=kernels,
    )
    for _ in range(depth)
  )
  tower.final_norm = transformer.norm(width, epsilon, dtype, rngs)
  tower.projection = transformer.linear(
    width, embed_width, dtype, rngs, normal(width**-0.5), use_bias=False
  )


def _through(tower, hidden, pool, mask=None, mask_of_pooled=None):
  """Maps tokens `[B, T, width]` to the pooled one's features `[B, D]`."""

  def ordinary(block, hidden):
    return block(hidden, mask)

  def pooling(block, hidden):
    return block(hidden, mask_of_pooled, pool)

  last = len(tower.blocks) - 1
  for number, block in enumerate(tower.blocks):
    call = pooling if number == last else ordinary
    hidden = (nnx.remat(call) if tower.remat else call)(block, hidden)
  return transformer.widen(tower.projection(tower.final_norm(hidden))[:, 0])


def _normalised(features):
  """Scales to length one; zeros stay zeros, with a gradient of zero."""
  squares = jnp.sum(features * features, axis=-1, keepdims=True)
  return features / jnp.sqrt(jnp.maximum(squares, 1e-24))
