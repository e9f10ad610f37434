"""What a step should hold and send, by formulas: bytes on each device.

P parameters of 4 bytes, of which P_m are in the mimic layers; a batch of B on n
devices, b = B / n; f devices share one copy of the parameters; e bytes an
activation. Of a block of width d with m hidden units, h heads and T tokens
JAX keeps for the backward pass

  T (28 d + e (6 d + 4 m) + h T (4 + e))

bytes a sample: seven arrays [T, d] in float32, of norms and the residual
stream; what is multiplied, and query, key and value; four arrays [T, m] of the
activation function; the attention's probabilities, in float32 and as they are
multiplied. A compiler may hold less. With remat a block keeps its input, and
one block at a time has all of this. Parameters are kept as they are multiplied
too, where that is not as they are: in half precision, or gathered.
"""

import math
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.pod import step as pod_step
from experiments.benchmarks.pod.step import PLAIN, Case
from experiments.models import clip
from experiments.runtime import sharding
from gradmimic_jax import layers as layers_lib

_WORD = 4  # bytes of a parameter, a score, a logit
_ITEM = {"float32": 4, "bfloat16": 2}


class Memory(NamedTuple):
  """Bytes on each device."""

  parameters: int
  optimizer: int  # two moments of each parameter
  reference: int  # its mimic layers; jit drops the others
  batch: int
  gradients: int  # of a step; of streaming, the running sums
  sample_gradients: int  # those that exist at a time
  direction: int  # over the mimic layers, scaled to length one
  multiplied: int  # parameters and direction gathered, or in half precision
  activations: int  # kept for the backward pass
  tangents: int  # of the widest block that one goes through
  logits: int  # of a contrastive batch, with what comes back to them

  @property
  def arguments(self) -> int:
    """What the step is given."""
    return sum(self[:4])

  @property
  def temporaries(self) -> int:
    """What it holds besides."""
    return sum(self[4:])

  @property
  def total(self) -> int:
    """All."""
    return sum(self)


class Traffic(NamedTuple):
  """Bytes that are reduced or gathered, the whole of each; scalars left out."""

  all_reduce: int
  all_gather: int


class Tower(NamedTuple):
  """A stack of transformer blocks."""

  width: int
  mlp: int
  heads: int
  depth: int
  tokens: int
  inputs: int  # numbers that a token is made of: a patch's, or none
  pools: bool  # whether the last block computes one token


def memory(case: Case, section: Any, params: Any) -> Memory:
  """What a step holds on each device.

  Args:
    case: the step.
    section: its model.
    params: the model's parameters, as anything that has shapes.

  Returns:
    The formulas' numbers; activations of different towers are kept together.
  """
  sizes = _Sizes(case, section, params)
  item, remat = _precision(section)
  rows = case.batch_size // case.devices
  plain = case.step == PLAIN
  seen = 1 if case.step.startswith("streaming") else rows  # samples at a time
  in_rows = case.step in ("per_sample", "streaming", "streaming_mesh")
  towers = towers_of(section)
  activations = seen * sum(kept(tower, item, remat) for tower in towers)
  reached = towers if case.layers == "all" else [towers[0]]
  tangents = rows * max(_widest(tower, item) for tower in reached)
  if case.layers == "head":
    tangents = 0
  multiplied = 0
  if not remat:
    multiplied = sizes.multiplied(item)
    if case.step == "forward":
      multiplied += sizes.multiplied(item, mimic=True)
  return Memory(
    parameters=sizes.local,
    optimizer=2 * sizes.local,
    reference=0 if plain else sizes.local_mimic,
    batch=rows * sample_bytes(section),
    # Sums of its own need all parameters on each device.
    gradients=sizes.whole if case.step == "streaming_mesh" else sizes.local,
    sample_gradients=seen * sizes.whole if in_rows else 0,
    direction=0 if plain else sizes.local_mimic,
    multiplied=multiplied,
    activations=activations,
    tangents=tangents if case.step == "forward" else 0,
    logits=_logits(case, section, rows),
  )


def traffic(case: Case, section: Any, params: Any) -> Traffic:
  """What devices have to tell each other in a step.

  Args:
    case: the step.
    section: its model.
    params: the model's parameters, as anything that has shapes.

  Returns:
    The formulas' numbers. Gradients are reduced whole; a compiler that lets
    each device have its part only does with half as much.
  """
  sizes = _Sizes(case, section, params)
  scores = _WORD * case.batch_size
  # In streaming without a mesh they are reduced once a microbatch.
  often = case.batch_size // case.devices if case.step == "streaming" else 1
  reduce, gather = often * sizes.whole, sizes.divided
  if case.fsdp < case.devices:  # the parts, between copies
    reduce += often * sizes.divided // case.fsdp
  if case.step != PLAIN:
    gather += sizes.divided_mimic  # the direction
  if section.name == "clip":
    features = scores * clip.options(section)["embed_width"]
    # Columns' maxima and sums; texts come to all, and their gradient back.
    reduce += features + 2 * scores
    gather += features + 2 * scores + case.batch_size
    if case.step != PLAIN:
      reduce += scores  # the columns' tangents
      gather += features  # the texts' tangents
  elif case.step != PLAIN:
    # A sound sample, which stands in for those with features that aren't; and
    # another one, in a second pass, for those with scores that aren't.
    passes = 1
    if case.step.startswith("streaming") and case.weighting != "softmax":
      passes = 2
    reduce += passes * 3 * _WORD * section.image_size**2
  if case.step != PLAIN and case.weighting == "ess_softmax":
    gather += scores
  return Traffic(reduce, gather)


def sample_bytes(section: Any) -> int:
  """A sample's features, label and mask."""
  pixels = 3 * section.image_size**2
  if section.name == "clip":
    return pixels + _WORD * clip.options(section)["context_length"] + 1
  return _WORD * pixels + _WORD + 1


def towers_of(section: Any) -> list[Tower]:
  """The towers of a model, the images' first."""
  if section.name != "clip":
    vit = section.vit
    patch, tokens = vit.patch_size, (section.image_size // vit.patch_size) ** 2
    return [
      Tower(
        vit.width,
        vit.mlp_width,
        vit.heads,
        vit.depth,
        tokens,
        3 * patch**2,
        False,
      )
    ]
  found = clip.options(section)
  patch = found["patch_size"]
  tokens = 1 + (section.image_size // patch) ** 2
  return [
    Tower(
      width := found[f"{name}_width"],
      found.get(f"{name}_mlp_width", 4 * width),
      found[f"{name}_heads"],
      found[f"{name}_depth"],
      tokens if name == "image" else found["context_length"],
      3 * patch**2 if name == "image" else 0,
      True,
    )
    for name in ("image", "text")
  ]


def kept(tower: Tower, item: int, remat: bool) -> int:
  """Bytes a sample that a tower keeps for its backward pass."""
  stream = tower.tokens * tower.width * item
  block = _block(tower, item)
  # Patches, and a norm at either end.
  ends = 2 * _WORD * stream // item + tower.tokens * tower.inputs * item
  if remat:
    return ends + tower.depth * stream + block
  # Of a last block that pools: its first norm; what that gives; key and value.
  last = 2 * _WORD * stream // item + 3 * stream if tower.pools else block
  return ends + (tower.depth - 1) * block + last


def _block(tower, item):
  stream = 7 * _WORD * tower.width
  multiplied = item * (6 * tower.width + 4 * tower.mlp)
  scores = tower.heads * tower.tokens * (_WORD + item)
  return tower.tokens * (stream + multiplied + scores)


def _widest(tower, item):
  """Bytes a sample of the tangents in a block, the wider half of it."""
  mlp = item * (tower.width + 2 * tower.mlp)
  attention = 4 * item * tower.width + 2 * _WORD * tower.heads * tower.tokens
  return tower.tokens * max(mlp, attention)


def _logits(case, section, rows):
  if section.name != "clip":
    return 0
  # Logits and their cotangents; their tangents; images' and texts' features.
  copies = 2 if case.step == PLAIN else 3
  features = 2 * clip.options(section)["embed_width"]
  return _WORD * case.batch_size * (copies * rows + features)


def _precision(section):
  """Bytes of an activation, and whether blocks are computed anew."""
  fields = section.clip if section.name == "clip" else section.vit
  return _ITEM[fields.dtype], bool(fields.get("remat", False))


class _Sizes:
  """Bytes of the parameters, by the rule of `sharding.spec_of`.

  Attributes:
    whole: of all.
    divided: of those that the rule divides, whole.
    local: of all, on each device.
    whole_mimic: as `whole`, in the mimic layers.
    divided_mimic: as `divided`, in the mimic layers.
    local_mimic: as `local`, in the mimic layers.
  """

  def __init__(self, case: Case, section: Any, params: Any):
    pattern = pod_step.layers_pattern(case, section, params)
    leaves = jax.tree.leaves(params)
    sizes = [_WORD * math.prod(x.shape) for x in leaves]
    divided = [
      size if tuple(sharding.spec_of(x.shape, case.fsdp)) else 0
      for size, x in zip(sizes, leaves, strict=True)
    ]
    local = [
      size - part + part // case.fsdp
      for size, part in zip(sizes, divided, strict=True)
    ]
    mimic = layers_lib.choose(pattern, params)
    self.whole, self.divided, self.local = map(sum, (sizes, divided, local))
    self.whole_mimic, self.divided_mimic, self.local_mimic = (
      sum(x for x, flag in zip(of, mimic, strict=True) if flag)
      for of in (sizes, divided, local)
    )

  def multiplied(self, item: int, *, mimic: bool = False) -> int:
    """Bytes of what is gathered, or cast to `item` bytes a number."""
    whole, divided = self.whole, self.divided
    if mimic:
      whole, divided = self.whole_mimic, self.divided_mimic
    return (whole if item < _WORD else divided) * item // _WORD
