"""The per-sample engine: one gradient a sample by `vmap(grad)`.

Dense, it holds all B gradients at once: the textbook form, against which all
else is tested. `_streaming` goes over it in microbatches.
"""

import jax
import jax.numpy as jnp

from gradmimic_jax import _tree
from gradmimic_jax._problem import (
  Answer,
  Problem,
  Weigh,
  mean_weights,
  split,
)
from gradmimic_jax.scores import Measured, Score


def answer(problem: Problem) -> Answer:
  """Scores and losses without a gradient."""
  found, _ = dense(problem)
  return found


def reweighted(
  problem: Problem, weigh: Weigh, scope: str
) -> tuple[Answer, jax.Array, list[jax.Array]]:
  """Scores, weights `[B]`, and the gradient's leaves."""
  found, rows = dense(problem)
  weights = weigh(found.scores, found.valid)
  return (
    found,
    weights,
    reweight_rows(rows, weights, found.valid, problem.flags, scope),
  )


def score_rows(
  rows: list[jax.Array],
  unit: list[jax.Array] | None,
  flags: list[bool],
  score: Score,
  losses: jax.Array | None = None,
  baseline: jax.Array | None = None,
) -> jax.Array:
  """Scores `[B]` of per-sample gradients `[B, *p]`."""
  mimic, _ = split(rows, flags)
  descents = norms = None
  if unit is not None:
    descents = -_tree.row_inner_products(mimic, unit)
  if score.needs_norms:
    norms = _tree.row_norms(mimic)
  return score.fn(Measured(losses, descents, norms, baseline))


def sound_rows(rows: list[jax.Array], scores: jax.Array) -> jax.Array:
  """Which samples have a finite gradient and a finite score, bool `[B]`.

  Finite gradients can have an inner product that overflows.
  """
  return _tree.rows_finite(rows) & jnp.isfinite(scores)


def reweight_rows(
  rows: list[jax.Array],
  weights: jax.Array,
  valid: jax.Array,
  flags: list[bool],
  scope: str,
) -> list[jax.Array]:
  """The weighted sum over samples within the scope, the plain mean outside.

  Args:
    rows: per-sample gradients, leaves `[B, *p]`.
    weights: `[B]`, 0 where not valid.
    valid: bool `[B]`, the samples that count.
    flags: which leaves are mimic layers.
    scope: `"all"` or `"layers"`.

  Returns:
    Leaves `[*p]`, in the rows' dtypes.
  """
  plain = mean_weights(valid, weights.dtype)
  return [
    _tree.weighted_sum(
      weights if scope == "all" or flag else plain,
      _tree.where_rows(valid, leaf),
    ).astype(leaf.dtype)
    for leaf, flag in zip(rows, flags, strict=True)
  ]


def dense(problem: Problem) -> tuple[Answer, list[jax.Array]]:
  """The answer, and per-sample gradient leaves `[B, *p]`."""
  losses, aux, rows = _gradients(problem, problem.batch)
  losses = _tree.to_accumulate(losses)
  scores = score_rows(
    rows,
    problem.unit,
    problem.flags,
    problem.score,
    losses,
    problem.baseline,
  )
  valid = problem.candidates & jnp.isfinite(losses) & sound_rows(rows, scores)
  return Answer(scores, losses, valid, aux), rows


def _gradients(problem, batch):
  """Losses `[B]`, aux `[B, ...]` and gradient leaves `[B, *p]`."""

  def loss_of_one(params, sample):
    # losses_fn sees a batch of one: it need not know that it is mapped over.
    losses, aux = problem.losses_fn(
      params, jax.tree.map(lambda x: x[None], sample)
    )
    return losses[0], (losses[0], jax.tree.map(_without_batch_axis, aux))

  grads, (losses, aux) = jax.vmap(
    jax.grad(loss_of_one, has_aux=True), in_axes=(None, 0)
  )(problem.params, batch)
  return losses, aux, jax.tree.leaves(grads)


def _without_batch_axis(leaf):
  return leaf[0] if jnp.ndim(leaf) and jnp.shape(leaf)[0] == 1 else leaf
