"""The problem of one step, as both engines are given it, and its answer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _tree, _validate
from gradmimic_jax.scores import Measured, Score
from gradmimic_jax.weighting import Weighting, guarded


class Problem(NamedTuple):
  """The inputs of an engine for one step."""

  losses_fn: Callable[[Any, Any], tuple[jax.Array, Any]]  # -> losses [B], aux
  params: Any  # the learner's parameters
  batch: Any  # leaves [B, ...], every floating row finite
  flags: list[bool]  # which leaves of params are mimic layers
  unit: list[jax.Array] | None  # unit direction over them, if the score asks
  score: Score  # the function from measurements to scores
  candidates: jax.Array  # bool [B]: real samples whose input is finite
  baseline: jax.Array | None  # [B], if the score has one
  reference: Any  # as it came, if the score asks
  step: Any  # [], updates done so far, if the caller said
  real: jax.Array  # bool []: True if there is a sample that is no padding

  def known(self, losses: jax.Array, aux: Any) -> dict[str, Any]:
    """Returns the measurements besides gradients, by `Measured`'s names."""
    rows = self.score.needs_reference
    return {
      "losses": losses,
      "baseline": self.baseline,
      "aux": aux if self.score.needs_aux else None,
      "batch": self.batch if rows else None,
      "reference": self.reference,
      "step": self.step,
    }

  def lost(self, valid: jax.Array) -> jax.Array:
    """True if there are samples but none is valid, bool `[]`."""
    return self.real & ~jnp.any(valid)


class Answer(NamedTuple):
  """The measurements of an engine for a batch."""

  scores: jax.Array  # [B], raw
  losses: jax.Array  # [B]
  valid: jax.Array  # bool [B]: candidates with finite loss, score, gradient
  aux: Any  # losses_fn's aux, or None


def scored(
  problem: Problem,
  losses: jax.Array,
  aux: Any,
  *,
  descents: jax.Array | None,
  norms: jax.Array | None = None,
  gram: jax.Array | None = None,
  counted: jax.Array | None = None,
) -> Answer:
  """Computes the scores of a batch of which no single gradients are at hand.

  Args:
    problem: the problem.
    losses: `[B]`, perhaps in bfloat16: scores and all that follows are not.
    aux: losses_fn's, or None.
    descents: `[B]`, if the score asks for them, and likewise the others.
    norms: `[B]`.
    gram: `[B, B]`.
    counted: bool `[B]`, the samples in the Gram matrix.

  Returns:
    The answer.
  """
  losses = _mesh.rows_like(_tree.to_accumulate(losses), problem.candidates)
  scores = problem.score.compute(
    Measured(
      descents=descents,
      norms=norms,
      gram=gram,
      valid=counted,
      **problem.known(losses, aux),
    ),
    problem.candidates,
  )
  valid = problem.candidates & jnp.isfinite(losses) & jnp.isfinite(scores)
  return Answer(scores, losses, valid, aux)


class Weigh(NamedTuple):
  """The step's weighting: `(scores [B], valid [B]) -> weights [B]`."""

  weighting: Weighting
  step: jax.Array | None  # updates done so far, if the caller said

  def __call__(self, scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Computes weights over the valid samples, 0 elsewhere."""
    return guarded(self.weighting, scores, valid, self.step)

  @property
  def temperature(self) -> jax.Array | None:
    """The softmax's temperature, `[]`; None for other weightings."""
    known = getattr(self.weighting, "temperature_at", None)
    return None if known is None else known(self.step)


def plain_losses_fn(
  losses_fn: Callable[..., Any],
  has_aux: bool,
  kwargs: dict[str, Any],
  advice: str,
) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
  """Binds keyword arguments to `losses_fn`, which then always has an aux.

  Args:
    losses_fn: the user's.
    has_aux: whether it returns `(losses, aux)`.
    kwargs: its keyword arguments.
    advice: what to do about a tuple that was not expected.

  Returns:
    `(params, batch) -> (losses [B], aux or None)`.
  """

  def call(params, batch):
    returned = losses_fn(params, batch, **kwargs)
    if not has_aux:
      losses, aux = returned, None
    elif isinstance(returned, tuple) and len(returned) == 2:
      losses, aux = returned
    else:
      raise TypeError(
        "losses_fn returned no (losses, aux) pair although has_aux=True;"
        f" it returned {type(returned).__name__}."
      )
    if isinstance(losses, tuple):
      raise TypeError(
        f"losses_fn returned a tuple; expected losses [B]. {advice}"
      )
    losses = jnp.asarray(losses)
    _validate.losses_shape(losses, _validate.batch_size(batch))
    return losses, aux

  return call


def mend_rows(batch: Any, mask: jax.Array) -> tuple[Any, jax.Array]:
  """Makes a batch finite throughout, and finds the samples that may count.

  A weight of zero can't undo a NaN on the way back (zero times NaN is NaN). So
  before anything is computed, a row with non-finite features gets the floating
  features of the first good row. Finite rows stay as they are, padding too:
  losses that couple the samples of a batch may look at it.

  Args:
    batch: leaves `[B, ...]`.
    mask: bool `[B]`, True for real samples.

  Returns:
    The batch, and bool `[B]`: the real samples that came finite.
  """
  batch = _mesh.rows_alike(batch)
  finite = _tree.rows_finite(jax.tree.leaves(batch))
  candidates = finite & mask

  def mend(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      return leaf
    return _tree.replace_rows(finite, leaf, candidates)

  return jax.tree.map(mend, batch), candidates


def split(items: list[Any], flags: list[bool]) -> tuple[list[Any], list[Any]]:
  """Splits items into those whose flag is set and the others."""
  chosen = [x for x, flag in zip(items, flags, strict=True) if flag]
  others = [x for x, flag in zip(items, flags, strict=True) if not flag]
  return chosen, others


def merge(chosen: list[Any], others: list[Any], flags: list[bool]) -> list[Any]:
  """Merges the two lists that `split` made."""
  first, second = iter(chosen), iter(others)
  return [next(first) if flag else next(second) for flag in flags]


def mean_weights(valid: jax.Array, dtype: Any) -> jax.Array:
  """Weights of the plain mean over the valid samples, `[B]`."""
  chosen = valid.astype(dtype)
  return chosen / jnp.maximum(jnp.sum(chosen), 1)
