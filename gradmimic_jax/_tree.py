"""Leaf paths and the few reductions over trees that the engines share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradmimic_jax import _mesh

Tree = Any


def key_path(path: Sequence[Any]) -> str:
  """The "/"-joined name of a leaf, such as `head/kernel`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def leaf_paths(tree: Tree) -> list[str]:
  """The path of every leaf, in flattening order."""
  return [
    key_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def leaves_like(tree: Tree, other: Tree) -> list[Any] | None:
  """The leaves of `tree` in the order of those of `other`, matched by path.

  Containers don't matter, only what is in them: a list is as good as a tuple,
  and a dict as an OrderedDict, whose order is another. Nor does it matter if a
  leaf is wrapped, as in Flax's variables, whose path ends with "value".

  Args:
    tree: a tree.
    other: a tree, such as params.

  Returns:
    The leaves; None if the paths differ, or if two are alike.
  """

  def bare(path):
    last = path[-1:]
    wrapped = isinstance(last[0], jax.tree_util.GetAttrKey) if last else False
    return path[:-1] if wrapped and last[0].name == "value" else path

  items = [jax.tree_util.tree_leaves_with_path(each) for each in (tree, other)]
  leaves = [leaf for _, leaf in items[0]]
  if [path for path, _ in items[0]] == [path for path, _ in items[1]]:
    return leaves
  for seen in (tuple, bare):
    theirs, ours = ([key_path(seen(path)) for path, _ in x] for x in items)
    by_path = dict(zip(theirs, leaves, strict=True))
    if len(by_path) == len(leaves) and sorted(ours) == sorted(theirs):
      return [by_path[path] for path in ours]
  return None


def accumulation_dtype(dtype: Any) -> Any:
  """float32, or wider when the data already is: sums never run in bfloat16."""
  # Not jnp.promote_types: under strict promotion it refuses these very pairs.
  return dtype if jnp.finfo(dtype).bits >= 32 else np.dtype("float32")


def to_accumulate(x: jax.Array) -> jax.Array:
  """Converts `x` to the dtype that sums over it use."""
  return jnp.asarray(x).astype(accumulation_dtype(jnp.asarray(x).dtype))


def common_dtype(leaves: Sequence[jax.Array]) -> Any:
  """The accumulation dtype that holds every leaf."""
  wide = [np.dtype("float32"), *(accumulation_dtype(x.dtype) for x in leaves)]
  return max(wide, key=lambda dtype: np.dtype(dtype).itemsize)


def norm(leaves: Sequence[jax.Array]) -> jax.Array:
  """Euclidean norm over all leaves together, `[]`."""
  _, distance = unit(leaves)
  return distance


def unit(
  leaves: Sequence[jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
  """The leaves over their joint norm, and the norm `[]`; zeros if it is 0.

  Squares, and the norm itself, may be out of range: the leaves are first scaled
  by about the inverse of their largest entry.
  """
  dtype = common_dtype(leaves)
  zero = jnp.zeros([], dtype)
  largest = zero
  for leaf in leaves:
    peak = jnp.max(jnp.abs(leaf), initial=0).astype(dtype)
    largest = jnp.maximum(largest, peak)
  limits = jnp.finfo(dtype)
  factor = 1 / jnp.where(largest > 0, largest, 1)
  factor = jnp.clip(factor, 4 * limits.tiny, limits.max / 4)
  scaled = [x.astype(dtype) * factor for x in leaves]
  root = jnp.sqrt(sum([jnp.sum(jnp.square(x)) for x in scaled], start=zero))
  divisor = jnp.where(root == 0, 1, root)
  return [x / divisor for x in scaled], root / factor


def expand_rows(rows: jax.Array, ndim: int) -> jax.Array:
  """Reshapes `rows [B]` to `[B, 1, ...]` so that it broadcasts on axis 0."""
  return rows.reshape(rows.shape + (1,) * (ndim - rows.ndim))


def rows_finite(leaves: Sequence[jax.Array]) -> jax.Array:
  """Finds the B rows that are finite in every floating leaf, bool `[B]`."""
  finite = jnp.ones(leaves[0].shape[:1], bool)
  for leaf in leaves:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      rows = jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
      finite &= _mesh.rows_like(rows, leaves[0])
  return finite


def replace_rows(
  keep: jax.Array, leaf: jax.Array, candidates: jax.Array
) -> jax.Array:
  """Puts the first candidate row where a row of `leaf [B, ...]` is not kept.

  The row is picked by a masked sum: indexing with a traced position would send
  the whole of a sharded batch to every device.
  """
  if not jnp.issubdtype(leaf.dtype, jnp.number):
    return leaf
  first = jnp.arange(candidates.size) == jnp.argmax(candidates)
  row = jnp.sum(where_rows(first, leaf), axis=0, keepdims=True)
  return jnp.where(expand_rows(keep, leaf.ndim), leaf, row.astype(leaf.dtype))


def where_rows(rows: jax.Array, leaf: jax.Array) -> jax.Array:
  """Puts zeros in the rows of `leaf [B, *p]` that are not chosen.

  Multiplying by zero would not do: zero times NaN is NaN.
  """
  rows = expand_rows(_mesh.rows_like(rows, leaf), leaf.ndim)
  return jnp.where(rows, leaf, jnp.zeros([], leaf.dtype))


def zero_nonfinite(tree: Tree, unless: Any = False, lost: Any = False) -> Tree:
  """Puts zeros for entries of `tree` that are not finite.

  One sample without a derivative, padding even, may reach every entry of a
  gradient although its weight is 0: zero times NaN is NaN. Finite entries are
  those that it did not reach.

  Args:
    tree: floating-point arrays.
    unless: bool `[]`, True to leave everything as it is.
    lost: bool `[]`, True to make everything NaN.

  Returns:
    A tree like it.
  """

  def mend(x):
    if unless is False and lost is False:
      return jnp.where(jnp.isfinite(x), x, jnp.zeros([], x.dtype))
    # One comparison for all three: NaN is within no limit.
    largest = jnp.where(unless, jnp.inf, jnp.finfo(x.dtype).max)
    limit = jnp.where(lost, -1, largest).astype(x.dtype)
    fill = jnp.where(unless | lost, jnp.nan, 0).astype(x.dtype)
    return jnp.where(jnp.abs(x) <= limit, x, fill)

  return jax.tree.map(mend, tree)


def weighted_sum(weights: jax.Array, leaf: jax.Array) -> jax.Array:
  """`sum_i weights_i leaf_i` over the batch axis, in the accumulation dtype."""
  leaf = to_accumulate(leaf)
  return _mesh.dot(
    _mesh.rows_like(weights.astype(leaf.dtype), leaf),
    leaf,
    ((0,), (0,)),
    precision=jax.lax.Precision.HIGHEST,
  )


def row_inner_products(
  rows: Sequence[jax.Array], vectors: Sequence[jax.Array]
) -> jax.Array:
  """`<rows_i, vectors>` summed over leaves, `[B]`."""
  dtype = common_dtype([*rows, *vectors])
  total = jnp.zeros(rows[0].shape[:1], dtype)
  for row, vector in zip(rows, vectors, strict=True):
    total += _mesh.dot(
      row.astype(dtype),
      vector.astype(dtype),
      (range(1, row.ndim), range(vector.ndim)),
      precision=jax.lax.Precision.HIGHEST,
    )
  return total


def inner_product(
  first: Sequence[jax.Array], second: Sequence[jax.Array]
) -> jax.Array:
  """`<first, second>` summed over leaves, `[]`."""
  total = jnp.zeros([], common_dtype([*first, *second]))
  for x, y in zip(first, second, strict=True):
    over = range(x.ndim)
    total += _mesh.dot(x, y, (over, over)).astype(total.dtype)
  return total


def row_norms(rows: Sequence[jax.Array]) -> jax.Array:
  """Euclidean norm of each of the B rows over all leaves, `[B]`."""
  dtype = common_dtype(rows)
  wide = [_mesh.flat_rows(row).astype(dtype) for row in rows]
  # Scaled by the largest entry, as in `norm`.
  scale = jnp.zeros(rows[0].shape[:1], dtype)
  for row in wide:
    over = tuple(range(1, row.ndim))
    scale = jnp.maximum(scale, jnp.max(jnp.abs(row), axis=over, initial=0))
  scale = jnp.where(scale > 0, scale, 1)
  total = jnp.zeros_like(scale)
  for row in wide:
    over = tuple(range(1, row.ndim))
    parts = row / expand_rows(scale, row.ndim)
    total += jnp.sum(jnp.square(parts), axis=over)
  return scale * jnp.sqrt(total)
