"""The forward engine: all scores from one jvp, the gradient from one vjp.

All B scores are one directional derivative of the loss vector,
`-d/de losses(params + e v/||v||)`, and the reweighted gradient is one vjp of
the losses with the weights as cotangent. The jvp is taken inside the function
that the vjp differentiates, so that both share one forward pass, and along the
mimic layers only, so that a tangent flows from the first of them upward.
"""

import contextlib

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _per_sample, _tree
from gradmimic_jax._problem import (
  Answer,
  Problem,
  Weigh,
  mean_weights,
  merge,
  scored,
  split,
)


def answer(problem: Problem) -> Answer:
  """Computes scores and losses without a gradient."""
  if problem.score.needs_norms or problem.score.needs_gram:
    problem, _ = _own(problem)
    losses, pullback, (descents, aux) = _linearize(problem)
    return _answer(problem, losses, descents, aux, pullback)
  losses, descents, aux = _descents(problem, problem.params)
  return _answer(problem, losses, descents, aux, None)


def reweighted(
  problem: Problem, weigh: Weigh, scope: str
) -> tuple[Answer, jax.Array, list[jax.Array]]:
  """Computes scores, weights `[B]`, and the gradient's leaves."""
  problem, back = _own(problem)
  losses, pullback, (descents, aux) = _linearize(problem)
  found = _answer(problem, losses, descents, aux, pullback)
  weights = weigh(found.scores, found.valid)
  (grads,) = pullback(_mesh.rows_like(weights.astype(losses.dtype), losses))
  leaves = jax.tree.leaves(grads)
  if scope == "layers" and not all(problem.flags):
    # A second pullback for the plain mean of the other leaves; of both, jit
    # keeps only what leads to the leaves that are used.
    plain = mean_weights(found.valid, losses.dtype)
    (means,) = pullback(_mesh.rows_like(plain, losses))
    chosen, _ = split(leaves, problem.flags)
    _, others = split(jax.tree.leaves(means), problem.flags)
    leaves = merge(chosen, others, problem.flags)
  leaves = without_poison(leaves, found, problem)
  return found, weights, back(leaves)


def _own(problem):
  """Gives each device its own parameters; also returns the way back."""
  params, back = _mesh.for_rows(problem.params, problem.candidates, whole=False)
  return problem._replace(params=params), back


def without_poison(leaves, found, problem):
  """Puts zeros where a sample that overflowed on its way has left NaN.

  Where no sample is left, all entries become NaN.

  Computing the step again without the sample would take control flow, which
  compiles the model twice and makes accelerators wait for the host in every
  step. If all samples are sound, a gradient that is not finite is left for the
  user to see.
  """
  sound = jnp.isfinite(found.losses)
  if problem.score.needs_gradients:
    # Other scores don't depend on gradients: where only the score is not
    # finite, the sample has no weight, but its own gradient may be sound.
    sound &= jnp.isfinite(found.scores)
  return _tree.zero_nonfinite(
    leaves, unless=jnp.all(sound), lost=problem.lost(found.valid)
  )


def _descents(problem, params):
  """Computes `(losses [B], descents [B] or None, aux)`, by at most one jvp."""
  if not problem.score.needs_descents:
    losses, aux = problem.losses_fn(params, problem.batch)
    return losses, None, aux
  leaves, structure = jax.tree.flatten(params)
  mimic, rest = split(leaves, problem.flags)

  def along(mimic):
    return problem.losses_fn(
      jax.tree.unflatten(structure, merge(mimic, rest, problem.flags)),
      problem.batch,
    )

  tangent = [
    _mesh.together(u.astype(p.dtype), p)
    for u, p in zip(problem.unit, mimic, strict=True)
  ]
  with _explained_custom_vjp():
    losses, slopes, aux = jax.jvp(along, (mimic,), (tangent,), has_aux=True)
  return losses, -slopes, aux


def _linearize(problem):
  def with_descents(params):
    losses, descents, aux = _descents(problem, params)
    return losses, (descents, aux)

  with _explained_custom_vjp():
    return jax.vjp(with_descents, problem.params, has_aux=True)


@contextlib.contextmanager
def _explained_custom_vjp():
  """Rewords JAX's two refusals of a custom_vjp in terms of engines."""
  try:
    yield
  except (TypeError, NotImplementedError) as error:
    if not any(name in str(error) for name in ("custom_vjp", "custom_lin")):
      raise
    raise TypeError(
      "losses_fn goes through a jax.custom_vjp function, which has no forward"
      " derivative: the forward engine can't take it. Use engine='per_sample',"
      " with a microbatch_size if memory is short; or give the function a"
      " jax.custom_jvp rule."
    ) from error


def _answer(problem, losses, descents, aux, pullback):
  norms = None
  if problem.score.needs_norms:
    norms = _measure_each(_tree.norm, problem, losses, pullback)
    norms = _tree.to_accumulate(norms)
  if descents is not None:
    descents = _tree.to_accumulate(descents)
    norms = None if norms is None else norms.astype(descents.dtype)
  gram = counted = None
  if problem.score.needs_gram:
    gram, counted = _gram(problem, losses, pullback)
  return scored(
    problem,
    losses,
    aux,
    descents=descents,
    norms=norms,
    gram=gram,
    counted=counted,
  )


def _measure_each(measure, problem, losses, pullback):
  """Stacks `measure(g_i's mimic leaves)`, by one pullback a sample."""

  def measure_one(basis_vector):
    cotangent = _mesh.together(_mesh.rows_like(basis_vector, losses), losses)
    (grads,) = pullback(cotangent)
    return measure(split(jax.tree.leaves(grads), problem.flags)[0])

  return jax.lax.map(measure_one, jnp.eye(losses.size, dtype=losses.dtype))


def _gram(problem, losses, pullback):
  """Computes `<g_i, g_j>` over the mimic layers; all B gradients are held."""
  rows = _measure_each(list, problem, losses, pullback)
  losses = _mesh.rows_like(losses, problem.candidates)
  valid = problem.candidates & jnp.isfinite(losses) & _tree.rows_finite(rows)
  return _per_sample.inner_products(rows, valid)
