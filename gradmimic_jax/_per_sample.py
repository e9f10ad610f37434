"""The per-sample engine: one gradient a sample by `vmap(grad)`.

Dense, it holds all B gradients at once: the textbook form, against which all
else is tested. `_streaming` goes over it in microbatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _tree
from gradmimic_jax._problem import (
  Answer,
  Problem,
  Weigh,
  mean_weights,
  split,
)
from gradmimic_jax.scores import Measured, Score


def answer(problem: Problem) -> Answer:
  """Computes scores and losses without a gradient."""
  params, _ = _mesh.for_rows(problem.params, problem.candidates)
  found, _ = dense(problem._replace(params=params))
  return found


def reweighted(
  problem: Problem, weigh: Weigh, scope: str
) -> tuple[Answer, jax.Array, list[jax.Array]]:
  """Computes scores, weights `[B]`, and the gradient's leaves."""
  params, back = _mesh.for_rows(problem.params, problem.candidates)
  found, rows = dense(problem._replace(params=params))
  weights = weigh(found.scores, found.valid)
  lost = problem.lost(found.valid)
  leaves = reweight_rows(rows, weights, found.valid, problem.flags, scope, lost)
  return found, weights, back(leaves)


def score_rows(
  rows: list[jax.Array],
  unit: list[jax.Array] | None,
  flags: list[bool],
  score: Score,
  candidates: jax.Array,
  **known: Any,
) -> jax.Array:
  """Computes the scores `[B]` of per-sample gradients `[B, *p]`.

  Args:
    rows: per-sample gradients, leaves `[B, *p]`.
    unit: the unit direction over the mimic layers, if the score asks.
    flags: which leaves are mimic layers.
    score: the function from measurements to scores.
    candidates: bool `[B]`, the samples that may count.
    **known: the other measurements, by `Measured`'s names.

  Returns:
    Scores `[B]`.
  """
  mimic, _ = split(rows, flags)
  descents = norms = None
  if unit is not None:
    descents = -_tree.row_inner_products(mimic, unit)
  if score.needs_norms:
    norms = _tree.row_norms(mimic)
  gram = valid = None
  if score.needs_gram:
    valid = _tree.rows_finite(rows) & candidates
    if known.get("losses") is not None:
      valid &= jnp.isfinite(known["losses"])
    gram, valid = inner_products(mimic, valid)
  measured = Measured(
    descents=descents, norms=norms, gram=gram, valid=valid, **known
  )
  return score.compute(measured, rows[0])


def inner_products(
  rows: list[jax.Array], valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes the samples' inner products with each other.

  Args:
    rows: per-sample gradients over the mimic layers, leaves `[B, *p]`.
    valid: bool `[B]`, the samples that may count.

  Returns:
    The Gram matrix `[B, B]`, zeros in the rows and columns of the others, and
    which samples are in it, bool `[B]`: those whose own norm overflows are not.
  """
  dtype = _tree.common_dtype(rows)
  gram = jnp.zeros([valid.size, valid.size], dtype)
  for row in rows:
    row = _mesh.flat_rows(_tree.where_rows(valid, row)).astype(dtype)
    over = range(1, row.ndim)
    gram += _mesh.whole(
      _mesh.dot(row, row, (over, over), precision=jax.lax.Precision.HIGHEST)
    )
  valid = _mesh.whole(valid) & jnp.isfinite(jnp.diagonal(gram))
  return jnp.where(valid[:, None] & valid[None, :], gram, 0), valid


def sound_rows(rows: list[jax.Array], scores: jax.Array) -> jax.Array:
  """Finds the samples with a finite gradient and a finite score, bool `[B]`.

  Finite gradients can have an inner product that overflows.
  """
  return _tree.rows_finite(rows) & jnp.isfinite(scores)


def reweight_rows(
  rows: list[jax.Array],
  weights: jax.Array,
  valid: jax.Array,
  flags: list[bool],
  scope: str,
  lost: jax.Array,
) -> list[jax.Array]:
  """Sums rows by weight within the scope, and takes their plain mean outside.

  Args:
    rows: per-sample gradients, leaves `[B, *p]`.
    weights: `[B]`, 0 where not valid.
    valid: bool `[B]`, the samples that count.
    flags: which leaves are mimic layers.
    scope: `"all"` or `"layers"`.
    lost: bool `[]`, True if samples came and none is left: all is NaN then.

  Returns:
    Leaves `[*p]`, in the rows' dtypes.
  """
  plain = mean_weights(valid, weights.dtype)
  # All rows are 0 by then; weights of NaN make the sums NaN.
  weights, plain = (jnp.where(lost, jnp.nan, w) for w in (weights, plain))
  return [
    _tree.weighted_sum(
      weights if scope == "all" or flag else plain,
      _tree.where_rows(valid, leaf),
    ).astype(leaf.dtype)
    for leaf, flag in zip(rows, flags, strict=True)
  ]


def dense(problem: Problem) -> tuple[Answer, list[jax.Array]]:
  """Computes the answer, and per-sample gradient leaves `[B, *p]`."""
  losses, aux, rows = _gradients(problem, problem.batch)
  losses = _tree.to_accumulate(losses)
  scores = score_rows(
    rows,
    problem.unit,
    problem.flags,
    problem.score,
    problem.candidates,
    **problem.known(losses, aux),
  )
  valid = problem.candidates & jnp.isfinite(losses) & sound_rows(rows, scores)
  return Answer(scores, losses, valid, aux), rows


def _gradients(problem, batch):
  """Computes losses `[B]`, aux `[B, ...]` and gradient leaves `[B, *p]`."""

  def single_loss(params, sample):
    losses, aux = shown_alone(problem.losses_fn, params, sample)
    aux = jax.tree_util.tree_map_with_path(drop_batch_axis, aux)
    return losses[0], (losses[0], aux)

  grads, (losses, aux) = jax.vmap(
    jax.grad(single_loss, has_aux=True), in_axes=(None, 0)
  )(problem.params, batch)
  return losses, aux, jax.tree.leaves(grads)


def shown_alone(
  losses_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  sample: Any,
) -> tuple[jax.Array, Any]:
  """Calls `losses_fn` with a batch of one; it need not know of the mapping."""
  return losses_fn(params, jax.tree.map(lambda x: x[None], sample))


def refuse_state(path: Any, alone: Any, many: str = "") -> None:
  """Raises ValueError for a leaf of aux that is not of single samples."""
  name = _tree.key_path(path) or "aux"
  raise ValueError(
    f"aux leaf {name!r} of losses_fn has shape {alone} for a batch of"
    f" one{many}; expected a leading axis [B]: the per-sample engine shows"
    " samples one at a time, and state of the whole batch, such as BatchNorm's"
    " new statistics, does not come of that. Use engine='forward', whose aux"
    " is losses_fn's; or return what is per sample only."
  )


def drop_batch_axis(path, leaf):
  shape = jnp.shape(leaf)
  if shape[:1] != (1,):
    refuse_state(path, shape)
  return leaf[0]
