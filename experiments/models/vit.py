"""A vision transformer."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import patches, transformer

POOLINGS = ("mean", "class_token")

# The sizes that have names: letter by width and depth, then the patch size.
SIZES: dict[str, dict[str, int]] = {
  f"{letter}/{patch_size}": {
    "patch_size": patch_size,
    "width": width,
    "depth": depth,
    "heads": heads,
    "mlp_width": 4 * width,
  }
  for letter, width, depth, heads in (
    ("Ti", 192, 12, 3),
    ("S", 384, 12, 6),
    ("B", 768, 12, 12),
    ("L", 1024, 24, 16),
  )
  for patch_size in (16, 32)
}


class ViT(nnx.Module):
  """Patches, position embeddings, pre-norm blocks, final norm, linear head.

  Leaf paths read `patch_embed/kernel`, `blocks/5/attention/query/kernel`,
  `blocks/5/mlp/fc1/kernel`, `final_norm/scale`, `head/kernel`. A patch's pixels
  come row by row with the channels last, so that the patch embedding's kernel
  is a convolution's `[P, P, C, width]`, flattened.

  References:
    Dosovitskiy et al., An Image is Worth 16x16 Words, `arXiv:2010.11929
    <https://arxiv.org/abs/2010.11929>`_.
  """

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    rngs: nnx.Rngs,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    mlp_width: int,
    pooling: str = "mean",
    norm_epsilon: float = 1e-6,
    dtype: str | None = None,
  ):
    """Initialises the parameters, float32.

    Args:
      input_shape: of one image, `(H, W, C)`.
      num_classes: width of the output.
      rngs: of the initialisation.
      patch_size: height and width of a patch, in pixels.
      width: of a token.
      depth: number of blocks.
      heads: of the attention; each sees `width / heads` features.
      mlp_width: of the hidden layer in each block's MLP.
      pooling: the head's input: `"mean"` of the tokens, or `"class_token"`.
      norm_epsilon: added to the variance in every norm; published weights come
        with 1e-6 or, those of Hugging Face, 1e-12.
      dtype: of the activations; None is that of the parameters.

    Raises:
      ValueError: sizes that don't divide, or an unknown pooling.
    """
    rows, columns, channels = input_shape
    patches.check(input_shape, patch_size, "model.vit.patch_size")
    if width % heads:
      raise ValueError(
        f"config.model.vit.width is {width} and heads is {heads}; expected a"
        " width that the heads divide."
      )
    if pooling not in POOLINGS:
      raise ValueError(
        f"config.model.vit.pooling is {pooling!r}; expected one of"
        f" {', '.join(POOLINGS)}."
      )
    self.patch_size = patch_size
    self.pooling = pooling
    self.patch_embed = transformer.linear(
      patch_size * patch_size * channels, width, dtype, rngs
    )
    tokens = (rows // patch_size) * (columns // patch_size)
    normal = nnx.initializers.normal(stddev=0.02)
    if pooling == "class_token":
      tokens += 1
      self.class_token = nnx.Param(
        nnx.initializers.zeros(rngs.params(), (1, 1, width))
      )
    self.position_embed = nnx.Param(normal(rngs.params(), (1, tokens, width)))
    self.blocks = nnx.List(
      transformer.Block(width, heads, mlp_width, norm_epsilon, dtype, rngs)
      for _ in range(depth)
    )
    self.final_norm = transformer.norm(width, norm_epsilon, dtype, rngs)
    self.head = transformer.linear(width, num_classes, dtype, rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, C]`, float32 or wider."""
    return transformer.widen(self.head(self.features(images)))

  def features(self, images: jax.Array) -> jax.Array:
    """Maps images to the head's input, `[B, width]`, float32 or wider."""
    grid = patches.cut(images, self.patch_size)
    hidden = self.patch_embed(grid.reshape(len(grid), -1, grid.shape[-1]))
    if self.pooling == "class_token":
      token = self.class_token[...].astype(hidden.dtype)
      hidden = jnp.concatenate(
        [jnp.broadcast_to(token, (len(hidden), *token.shape[1:])), hidden],
        axis=1,
      )
    hidden = hidden + self.position_embed[...].astype(hidden.dtype)
    for block in self.blocks:
      hidden = block(hidden)
    hidden = self.final_norm(hidden)
    if self.pooling == "class_token":
      return transformer.widen(hidden[:, 0])
    return transformer.widen(hidden.mean(axis=1))
