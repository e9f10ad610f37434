"""The forward engine: all scores from one jvp, the gradient from one vjp.

All B scores are one directional derivative of the loss vector,
`-d/de losses(params + e v/||v||)`, and the reweighted gradient is one vjp of
the losses with the weights as cotangent. The jvp is taken inside the function
that the vjp differentiates, so that both share one forward pass, and along the
mimic layers only, so that a tangent flows from the first of them upward.
"""

import jax
import jax.numpy as jnp

from gradmimic_jax import _tree
from gradmimic_jax._problem import (
  Answer,
  Problem,
  Weigh,
  mean_weights,
  mend_rows,
  merge,
  split,
)


def answer(problem: Problem) -> Answer:
  """Scores and losses without a gradient."""
  if problem.score.needs_norms:
    losses, pullback, (descents, aux) = _linearize(problem)
    return _answer(problem, losses, descents, aux, pullback)
  losses, descents, aux = _descents(problem, problem.params)
  return _answer(problem, losses, descents, aux, None)


def reweighted(
  problem: Problem, weigh: Weigh, scope: str
) -> tuple[Answer, jax.Array, list[jax.Array]]:
  """Scores, weights `[B]`, and the gradient's leaves.

  A sample whose loss overflows would poison the vjp whatever its weight. So the
  step is the body of a loop that runs once, and a second time, with the broken
  rows mended, if there are any. A loop and not a branch: it is compiled once,
  and holds no second set of intermediate results.
  """

  def attempt(carry):
    rounds, sound = carry[:2]
    mended = mend_rows(
      problem.batch, sound, jnp.argmax(problem.candidates & sound)
    )
    found, weights, leaves = _attempt(
      problem._replace(batch=mended, candidates=problem.candidates & sound),
      weigh,
      scope,
    )
    sound &= jnp.isfinite(found.losses) & jnp.isfinite(found.scores)
    return rounds + 1, sound, found, weights, leaves

  def unsettled(carry):
    rounds, sound = carry[:2]
    return (rounds == 0) | ((rounds == 1) & ~jnp.all(sound))

  _, _, found, weights, leaves = jax.lax.while_loop(
    unsettled, attempt, _blank(problem)
  )
  return found, weights, leaves


def _blank(problem):
  """A first carry for the loop: what `attempt` returns, with nothing in it."""
  losses, aux = jax.eval_shape(problem.losses_fn, problem.params, problem.batch)
  zeros = jnp.zeros(losses.shape, _tree.accumulation_dtype(losses.dtype))
  false = jnp.zeros(losses.shape, bool)
  found = Answer(
    scores=zeros,
    losses=zeros,
    valid=false,
    aux=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux),
  )
  leaves = [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(problem.params)]
  return jnp.zeros([], jnp.int32), ~false, found, zeros, leaves


def _attempt(problem, weigh, scope):
  losses, pullback, (descents, aux) = _linearize(problem)
  found = _answer(problem, losses, descents, aux, pullback)
  weights = weigh(found.scores, found.valid)
  (grads,) = pullback(weights.astype(losses.dtype))
  leaves = jax.tree.leaves(grads)
  if scope == "layers" and not all(problem.flags):
    # A second pullback for the plain mean of the other leaves; of both, jit
    # keeps only what leads to the leaves that are used.
    plain = mean_weights(found.valid, losses.dtype)
    (means,) = pullback(plain)
    chosen, _ = split(leaves, problem.flags)
    _, others = split(jax.tree.leaves(means), problem.flags)
    leaves = merge(chosen, others, problem.flags)
  # With no valid sample at all, there is no sound row to mend the others with.
  some = jnp.any(found.valid)
  return (
    found,
    weights,
    [jnp.where(some, leaf, jnp.zeros_like(leaf)) for leaf in leaves],
  )


def _descents(problem, params):
  """`(losses [B], descents [B], aux)` by one jvp along the unit direction."""
  leaves, structure = jax.tree.flatten(params)
  mimic, rest = split(leaves, problem.flags)

  def along(mimic):
    return problem.losses_fn(
      jax.tree.unflatten(structure, merge(mimic, rest, problem.flags)),
      problem.batch,
    )

  tangent = [
    u.astype(p.dtype) for u, p in zip(problem.unit, mimic, strict=True)
  ]
  losses, slopes, aux = jax.jvp(along, (mimic,), (tangent,), has_aux=True)
  return losses, -slopes, aux


def _linearize(problem):
  def with_descents(params):
    losses, descents, aux = _descents(problem, params)
    return losses, (descents, aux)

  return jax.vjp(with_descents, problem.params, has_aux=True)


def _answer(problem, losses, descents, aux, pullback):
  # Losses may come in bfloat16; scores and all that follows don't.
  descents, norms = _tree.to_accumulate(descents), None
  if problem.score.needs_norms:
    norms = _gradient_norms(problem, losses, pullback).astype(descents.dtype)
  scores = problem.score.fn(descents, norms)
  losses = _tree.to_accumulate(losses)
  valid = problem.candidates & jnp.isfinite(losses) & jnp.isfinite(scores)
  return Answer(scores, losses, valid, aux)


def _gradient_norms(problem, losses, pullback):
  """`||g_i||` over the mimic layers, one pullback a sample."""

  def norm_of(basis_vector):
    (grads,) = pullback(basis_vector)
    return _tree.norm(split(jax.tree.leaves(grads), problem.flags)[0])

  return jax.lax.map(norm_of, jnp.eye(losses.size, dtype=losses.dtype))
