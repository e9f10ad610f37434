"""Gradient matching: samples whose weighted gradients add up to a target.

`min_w ||sum_i w_i g_i - t||^2` with t the batch's mean gradient, or a unit
vector along the direction. The inner products `K_ij = <g_i, g_j>` and `b_i =
<g_i, t>` over the mimic layers are all it needs, so no gradient is looked at
twice. Scores are the coefficients `[B]`; a weighting makes weights of them,
`proportional` those of the published method.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradmimic_jax import _mesh, _validate
from gradmimic_jax.scores import Measured, Score

TARGETS = ("batch", "direction")


def separable(*, target: str = "batch") -> Score:
  """Matching coefficients of each sample on its own, in closed form.

  `m_i = <g_i, t> / ||g_i||^2`

  Coefficients of small gradients are large: a sample that is fitted already,
  with a gradient along the mean's, outweighs all others.

  Args:
    target: t, the mean gradient of the `"batch"`, or the `"direction"`: the
      unit vector along it (scores are then up to a positive factor).

  Returns:
    A Score, for `score=`; 0 where a gradient is 0. Toward `"direction"` it
    works in microbatches too.

  Raises:
    ValueError: an unknown target.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return batch * params["w"]  # the gradients are the batch itself
    >>> score = gm.mimic_scores(losses_fn, score=gm.matching.separable())
    >>> score({"w": jnp.ones([])}, None, jnp.array([4.0, 2.0, -3.0])).scores
    Array([ 0.25      ,  0.5       , -0.33333334], dtype=float32)

  References:
    Killamsetty et al., `arXiv:2103.00123 <https://arxiv.org/abs/2103.00123>`_
    (GRAD-MATCH), in the form that Huang et al., `arXiv:2501.06708
    <https://arxiv.org/abs/2501.06708>`_, compare with.
  """
  _validate.choice("target", target, TARGETS)

  def toward_batch(measured):
    return _quotient(_wanted(measured, target), jnp.diagonal(measured.gram))

  def toward_direction(measured):
    once = _quotient(measured.descents, measured.norms)
    return _quotient(once, measured.norms)

  if target == "batch":
    return _score("separable", target, lambda m: _known(m, toward_batch(m)))
  return Score(
    "matching.separable",
    toward_direction,
    needs_descents=True,
    needs_norms=True,
  )


def least_squares(*, ridge: float = 0.1, target: str = "batch") -> Score:
  """Matching coefficients of all samples together, of either sign.

  `m = argmin_w ||sum_i w_i g_i - t||^2 + ridge k ||w||^2`, `k = mean_i
  ||g_i||^2`, solved as `(K + ridge k I) m = b`

  Toward the batch's own mean, w = 1/n has no error: a small ridge gives equal
  weights wherever gradients are linearly independent, a large one weights in
  proportion to `<g_i, t>`.

  Args:
    ridge: > 0, in units of the mean squared gradient norm.
    target: as in `separable`.

  Returns:
    A Score, for `score=`.

  Raises:
    ValueError: ridge is not above 0, or an unknown target.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return batch @ params["w"]  # the gradients are the batch itself
    >>> score = gm.mimic_scores(
    ...   losses_fn, score=gm.matching.least_squares(ridge=1.0))
    >>> score({"w": jnp.ones(2)}, None, jnp.eye(2)).scores.round(2)
    Array([0.25, 0.25], dtype=float32)

  References:
    Killamsetty et al., `arXiv:2103.00123 <https://arxiv.org/abs/2103.00123>`_.
  """
  _validate.positive_scalar("ridge", ridge)
  _validate.choice("target", target, TARGETS)

  def fn(measured):
    gram, wanted = _scaled(measured, target, ridge)
    return _known(measured, _solve(gram, wanted, measured.valid))

  return _score("least_squares", target, fn)


def omp(fraction: float, *, ridge: float = 0.1, target: str = "batch") -> Score:
  """Matching coefficients >= 0 of a few samples, picked one by one.

  Non-negative orthogonal matching pursuit: take the sample whose gradient
  agrees best with what is left of t, fit all taken ones anew by non-negative
  least squares (with the ridge of `least_squares`), and go on until `k =
  ceil(fraction n)` of n real samples are taken, or no other one agrees.

  Args:
    fraction: in (0, 1], a number known when jit traces.
    ridge: > 0, in units of the mean squared gradient norm.
    target: as in `separable`.

  Returns:
    A Score, for `score=`; 0 for the samples that were not taken.

  Raises:
    ValueError: fraction outside (0, 1], ridge not above 0, an unknown target.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return batch @ params["w"]  # the gradients are the batch itself
    >>> score = gm.mimic_scores(losses_fn, score=gm.matching.omp(0.3))
    >>> gradients = jnp.array([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    >>> score({"w": jnp.ones(2)}, None, gradients).scores.round(2)
    Array([0.  , 0.32, 0.  ], dtype=float32)

  References:
    Killamsetty et al., `arXiv:2103.00123 <https://arxiv.org/abs/2103.00123>`_
    (GRAD-MATCH). Lawson and Hanson, Solving Least Squares Problems, chapter 23
    (non-negative least squares).
  """
  _validate.fraction("fraction", fraction)
  _validate.positive_scalar("ridge", ridge)
  _validate.choice("target", target, TARGETS)

  def fn(measured):
    gram, wanted = _scaled(measured, target, ridge)
    coefficients = pursue(gram, wanted, measured.valid, float(fraction))
    return _known(measured, coefficients)

  return _score("omp", target, fn)


def pursue(
  gram: jax.Array, wanted: jax.Array, valid: jax.Array, fraction: float
) -> jax.Array:
  """Non-negative orthogonal matching pursuit on inner products.

  Args:
    gram: `K [B, B]`, positive definite over the valid samples.
    wanted: `b [B]`, the samples' inner products with the target.
    valid: bool `[B]`, the samples that may be taken.
    fraction: in (0, 1], of the valid samples.

  Returns:
    Coefficients `[B]`, >= 0.
  """
  size = wanted.size
  # By a table in float64: in float32, ceil(0.3 * 10) is 4.
  limits = np.ceil(np.arange(size + 1) * fraction - 1e-9).astype(np.int32)
  limit = jnp.asarray(limits)[jnp.sum(valid)]
  tolerance = _tolerance(wanted)

  def left_over(state):
    slots, _, coefficients = state
    fitted = jnp.matmul(gram[:, slots], coefficients, precision=_HIGHEST)
    return wanted - fitted

  def take(i, state):
    slots, chosen, coefficients = state
    # Slots that are not in use hold sample 0 with a coefficient of 0.
    taken = jnp.zeros([size], bool).at[slots].max(chosen)
    left = jnp.where(valid & ~taken, left_over(state), -jnp.inf)
    best = jnp.argmax(left)
    found = (i < limit) & (left[best] > tolerance)
    slots = slots.at[i].set(jnp.where(found, best.astype(jnp.int32), 0))
    chosen = chosen.at[i].set(found)
    passive = (chosen & (coefficients > 0)).at[i].set(found)
    refit = functools.partial(
      nonnegative_least_squares,
      gram[slots[:, None], slots[None, :]],
      wanted[slots],
      chosen,
      coefficients,
      passive,
    )
    return slots, chosen, jax.lax.cond(found, refit, lambda: coefficients)

  slots = jnp.zeros([max(int(limits[-1]), 1)], jnp.int32)
  slots = _mesh.together(slots, gram, wanted, valid)
  start = slots, slots.astype(bool), slots.astype(wanted.dtype)
  slots, _, coefficients = jax.lax.fori_loop(0, slots.size, take, start)
  return jnp.zeros_like(wanted).at[slots].add(coefficients)


def nonnegative_least_squares(
  gram: jax.Array,
  wanted: jax.Array,
  chosen: jax.Array,
  start: jax.Array,
  passive: jax.Array,
) -> jax.Array:
  """`argmin x'Kx / 2 - b'x` over x >= 0, x = 0 where not chosen.

  The active-set method of Lawson and Hanson, from a start.

  Args:
    gram: `K [k, k]`, positive definite.
    wanted: `b [k]`.
    chosen: bool `[k]`, the entries that may be above 0.
    start: `x [k]` >= 0 to begin with, 0 where not passive.
    passive: bool `[k]`, the entries to solve for at first.

  Returns:
    `x [k]`.
  """
  tolerance = _tolerance(wanted)
  # Each turn lowers the objective, or would but for rounding: hence a limit.
  most = 4 * wanted.size + 4

  def turn(state):
    turns, _, x, passive = state
    solution = _solve(gram, wanted, passive)
    short = passive & (solution <= 0)
    # Go toward the solution only as far as nothing falls below 0, and leave
    # out whatever reaches it.
    gap = jnp.where(short, x - solution, 1)
    ratios = jnp.where(short, x / jnp.where(gap > 0, gap, 1), jnp.inf)
    stride = jnp.minimum(jnp.min(ratios), 1)
    kept = passive & ~(short & (ratios <= stride))
    x = jnp.where(kept, jnp.maximum(x + stride * (solution - x), 0), 0)
    slope = wanted - jnp.matmul(gram, x, precision=_HIGHEST)
    slope = jnp.where(chosen & ~kept, slope, -jnp.inf)
    best = jnp.argmax(slope)
    entering = (slope[best] > tolerance) & ~jnp.any(short)
    kept = kept.at[best].set(kept[best] | entering)
    return turns + 1, jnp.any(short) | entering, x, kept

  def unfinished(state):
    turns, more, _, _ = state
    return more & (turns < most)

  values = gram, wanted, chosen, start, passive
  state = (
    _mesh.together(jnp.zeros([], jnp.int32), *values),
    _mesh.together(jnp.array(True), *values),
    _mesh.together(start, *values),
    _mesh.together(passive, *values),
  )
  _, _, x, _ = jax.lax.while_loop(unfinished, turn, state)
  return x


_HIGHEST = jax.lax.Precision.HIGHEST


def _score(name: str, target: str, fn: Any) -> Score:
  return Score(
    f"matching.{name}",
    fn,
    needs_descents=target == "direction",
    needs_gram=True,
  )


def _wanted(measured: Measured, target: str) -> jax.Array:
  """Computes the samples' inner products with the target, `[B]`."""
  gram: Any = measured.gram
  valid: Any = measured.valid
  if target == "direction":
    descents: Any = measured.descents
    return jnp.where(valid, descents, 0).astype(gram.dtype)
  # Invalid samples' columns are 0: the sum is over the valid ones.
  count = jnp.maximum(jnp.sum(valid.astype(gram.dtype)), 1)
  return jnp.sum(gram, axis=1) / count


def _scaled(measured, target, ridge):
  """Computes `K + ridge I` and b in units of the mean squared norm."""
  squares = jnp.diagonal(measured.gram)
  count = jnp.maximum(jnp.sum(measured.valid.astype(squares.dtype)), 1)
  unit = jnp.sum(squares / count)
  unit = jnp.where(unit > 0, unit, 1)
  eye = jnp.eye(squares.size, dtype=squares.dtype)
  return measured.gram / unit + ridge * eye, _wanted(measured, target) / unit


def _known(measured, coefficients):
  # NaN: a sample whose own norm overflows has no inner products to go by.
  return jnp.where(measured.valid, coefficients, jnp.nan)


def _quotient(above, below):
  """Computes `above / below`, 0 where a gradient is 0."""
  still = below == 0
  return jnp.where(still, 0, above / jnp.where(still, 1, below))


def _solve(gram, wanted, chosen):
  """Solves `K x = b` for `x` over the chosen entries, 0 elsewhere."""
  both = chosen[:, None] & chosen[None, :]
  eye = jnp.eye(wanted.size, dtype=gram.dtype)
  factor = jax.scipy.linalg.cho_factor(jnp.where(both, gram, eye))
  x = jax.scipy.linalg.cho_solve(factor, jnp.where(chosen, wanted, 0))
  return jnp.where(chosen, x, 0)


def _tolerance(wanted):
  """Returns the size up to which entries count as 0 beside those of b."""
  return 32 * jnp.finfo(wanted.dtype).eps * jnp.max(jnp.abs(wanted), initial=0)
