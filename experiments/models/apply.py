"""The step from a Flax module to plain trees and pure functions.

A model computes in one of two modes. In evaluation nothing is random, and norms
of batches go by the statistics that were kept. In training, which a key for
each sample turns on, dropout has its masks, and norms of batches go by the
batch, whose statistics the model then hands back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import transformer
from experiments.runtime import programs


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
  """A model's function: `apply(params, images [B, ...]) -> logits [B, C]`.

  That is evaluation; logits are float32 or wider. Models that have statistics
  take them, too: `apply(params, images, statistics)`.

  Attributes:
    forward: `(params, statistics, images, key) -> (logits, statistics)`; a key
      of None is evaluation.
    name: of the model, for messages.
    trains: whether training differs from evaluation.
    statistics: a tree of what is carried and is no parameter, such as the means
      of BatchNorm, before the first step. `()`: there is none.
  """

  forward: Callable[..., tuple[jax.Array, Any]]
  name: str
  trains: bool = False
  statistics: Any = ()

  def __call__(
    self, params: Any, images: jax.Array, statistics: Any = ()
  ) -> jax.Array:
    """Evaluates; raises ValueError if statistics are missing."""
    if self.statistics != () and statistics == ():
      raise ValueError(
        f"the model {self.name} has {self.about}, and this job carries none;"
        " expected a model without, such as one with GroupNorm or LayerNorm in"
        " place of BatchNorm."
      )
    return self.forward(params, statistics, images, None)[0]

  @property
  def about(self) -> str:
    """The statistics that there are, for messages; "" if there are none."""
    leaves = jax.tree_util.tree_leaves_with_path(self.statistics)
    if not leaves:
      return ""
    names = [
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, _ in leaves
    ]
    more = ", ..." if len(names) > 2 else ""
    return f"statistics of batches ({', '.join(names[:2])}{more})"

  def train(
    self,
    params: Any,
    images: jax.Array,
    keys: jax.Array,
    statistics: Any = (),
  ) -> tuple[jax.Array, Any]:
    """Computes logits as training does, and the new statistics.

    Without statistics each sample is computed by itself, by its own key: its
    mask doesn't depend on its batch mates, nor on their number. With statistics
    all samples are one computation, by the key of the first; their masks differ
    all the same.

    Args:
      params: the parameters.
      images: `[B, ...]`.
      keys: random keys `[B]`.
      statistics: the ones so far.

    Returns:
      Logits `[B, C]`, and statistics like those that came.
    """
    if self.statistics != ():
      return self.forward(params, statistics, images, keys[0])

    def apply_one(image, key):
      return self.forward(params, (), image[None], key)[0][0]

    return jax.vmap(apply_one)(images, keys), ()


def from_nnx(
  model: nnx.Module, name: str, method: str = "__call__"
) -> tuple[Apply, dict[str, Any]]:
  """Makes an NNX module a function of plain trees.

  What is an `nnx.Param` is a parameter. What is neither that nor the state of a
  random stream is a statistic, such as `nnx.BatchStat`; intermediate values are
  left out, and what is no `nnx.Variable` at all stays as it is.

  Args:
    model: the module, which maps images to logits.
    name: for messages.
    method: that maps images to the function's output.

  Returns:
    The function, and its parameters as nested dicts.
  """
  model.eval()
  evaluated, *states = nnx.split(
    model, nnx.Param, nnx.RngState, _is_statistic, ...
  )
  params, streams, statistics, constants = states
  if not jax.tree.leaves((streams, statistics, constants)):
    return _make_plain(evaluated, name, method), nnx.to_pure_dict(params)
  model.train()
  trained = nnx.graphdef(model)
  kept = nnx.to_pure_dict(statistics) or ()

  def forward(params, statistics, images, key):
    graph = evaluated if key is None else trained
    started = streams if key is None else _restarted(streams, key)
    merged = nnx.merge(graph, params, started, statistics or {}, constants)
    logits = transformer.widen(getattr(merged, method)(images))
    if statistics == () or key is None:
      return logits, statistics
    return logits, nnx.to_pure_dict(nnx.state(merged, _is_statistic))

  trains = bool(kept) or bool(jax.tree.leaves(streams))
  return Apply(forward, name, trains, kept), nnx.to_pure_dict(params)


@programs.once
def _make_plain(graph, name, method):
  """Makes one function for one architecture: it is compiled once."""

  def forward(params, statistics, images, key):
    del key
    model = nnx.merge(graph, params)
    return transformer.widen(getattr(model, method)(images)), statistics

  return Apply(forward, name)


def from_linen(
  module: Any,
  variables: Any,
  name: str,
  method: str = "__call__",
  *,
  has_mode: bool,
) -> tuple[Apply, dict[str, Any]]:
  """Makes a Linen module a function of plain trees.

  The collection `params` has the parameters; all others but `intermediates` are
  statistics, such as `batch_stats`.

  Args:
    module: the `flax.linen.Module`, which maps images to logits.
    variables: the collections that its `init` gave.
    name: for messages.
    method: that maps images to the function's output.
    has_mode: whether that method has a parameter `train`.

  Returns:
    The function, and its parameters as nested dicts.
  """
  kept = {
    key: collection
    for key, collection in variables.items()
    if key not in ("params", "intermediates")
  }

  def forward(params, statistics, images, key):
    mode: dict[str, Any] = {"method": method}
    if has_mode:
      mode["train"] = key is not None
    if key is not None:
      # Streams of all names are taken from this one.
      mode |= {"rngs": {"params": key}, "mutable": list(kept)}
    found = module.apply(
      {"params": params, **(statistics or {})}, images, **mode
    )
    if key is None:
      return transformer.widen(found), statistics
    logits, new = found
    return transformer.widen(logits), new if kept else ()

  return Apply(forward, name, has_mode, kept or ()), variables["params"]


def _is_statistic(path, value):
  """A filter of NNX: what is carried and is no parameter."""
  del path
  others = nnx.Param | nnx.RngState | nnx.Intermediate | nnx.Perturbation
  kind = getattr(value, "type", type(value))
  return issubclass(kind, nnx.Variable) and not issubclass(kind, others)


def _restarted(streams, key):
  """Starts every random stream of a model from a key of its own."""
  leaves, structure = jax.tree.flatten(streams)

  def restart(number, leaf):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jnp.zeros_like(leaf)  # the number of draws so far
    own = jax.random.fold_in(key, number)
    return jax.random.split(own, leaf.shape) if leaf.shape else own

  return jax.tree.unflatten(
    structure, [restart(*item) for item in enumerate(leaves)]
  )
