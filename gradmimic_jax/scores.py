"""Scores: what a sample is worth, raw, high = good.

The mimic scores, projection and cosine, measure the agreement with a direction;
the others are what they are compared with. All gradients and directions are
looked at over the mimic layers only.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _validate


class Measured(NamedTuple):
  """What an engine knows of a batch's samples; None where nobody asked."""

  losses: jax.Array | None  # [B]
  descents: jax.Array | None  # [B], <-g_i, v> / ||v||
  norms: jax.Array | None  # [B], ||g_i||
  baseline: jax.Array | None  # [B], what stands in the reference's place
  gram: jax.Array | None = None  # [B, B], <g_i, g_j>; 0 where not valid
  valid: jax.Array | None = None  # bool [B], the samples in the gram


@dataclasses.dataclass(frozen=True)
class Score:
  """How measurements become scores.

  Attributes:
    name: what `score=` calls it.
    fn: `Measured -> scores [B]`.
    needs_descents: whether `fn` looks at the descents, and so at a direction.
    needs_norms: whether `fn` looks at the gradient norms.
    needs_baseline: whether `fn` looks at a number a sample that stands in the
      reference's place, such as the reference's loss.
    needs_gram: whether `fn` looks at all samples' inner products with each
      other, and at which of them are valid. Its scores then depend on batch
      mates; it sees no sample that is padding or not finite.
  """

  name: str
  fn: Callable[[Measured], jax.Array]
  needs_descents: bool = False
  needs_norms: bool = False
  needs_baseline: bool = False
  needs_gram: bool = False

  def of(self, measured: Measured, rows: jax.Array) -> jax.Array:
    """Scores `[B]`, divided over devices as `rows [B]` are."""
    if self.needs_gram:
      # Every sample's score depends on all of them.
      measured = jax.tree.map(_mesh.whole, measured)
    return _mesh.rows_like(self.fn(measured), rows)


def _projection(measured):
  return measured.descents


def _cosine(measured):
  # A zero gradient agrees with no direction: its cosine is 0, not 0 / 0. One
  # whose norm is out of range may agree with it or not: NaN, not x / inf = 0.
  norms = jnp.where(jnp.isfinite(measured.norms), measured.norms, jnp.nan)
  still = norms == 0
  return jnp.where(still, 0, measured.descents / jnp.where(still, 1, norms))


def _gradient_norm(measured):
  return measured.norms


def _excess_loss(measured):
  return measured.losses - measured.baseline.astype(measured.losses.dtype)


def _given(measured):
  return measured.baseline


SCORES = {
  score.name: score
  for score in (
    Score("projection", _projection, needs_descents=True),
    Score("cosine", _cosine, needs_descents=True, needs_norms=True),
    Score("gradient_norm", _gradient_norm, needs_norms=True),
    Score("excess_loss", _excess_loss, needs_baseline=True),
    Score("given", _given, needs_baseline=True),
  )
}


def get(name: str | Score) -> Score:
  """The score of that name, or the Score that came.

  * `"projection"`: `m_i = <-g_i, v> / ||v||`, unbounded, in units of loss per
    unit of parameter distance. Needs no gradient of a single sample.
  * `"cosine"`: `m_i = <-g_i, v> / (||g_i|| ||v||)`, in [-1, 1]; 0 where g_i is.
  * `"gradient_norm"`: `m_i = ||g_i||`, GraNd; there is no direction.
  * `"excess_loss"`: `m_i = l_i(params) - l_i(reference)`, RHO-loss; the
    reference's losses `[B]` stand in the place of the reference.
  * `"given"`: the scores `[B]` themselves stand there, from wherever they are;
    `output_agreement` makes some.

  Scores with options of their own are made, not named: see
  `gradmimic_jax.matching`.

  Args:
    name: one of the five, or a Score.

  Returns:
    The Score.

  Raises:
    ValueError: there is no score of that name.

  Example:
    >>> get("cosine").needs_norms
    True

  References:
    Huang et al., `arXiv:2501.06708 <https://arxiv.org/abs/2501.06708>`_,
    section 3. Paul et al., `arXiv:2107.07075
    <https://arxiv.org/abs/2107.07075>`_ (GraNd). Mindermann et al.,
    `arXiv:2206.07137 <https://arxiv.org/abs/2206.07137>`_ (RHO-loss).
  """
  if isinstance(name, Score):
    return name
  _validate.choice("score", name, SCORES)
  return SCORES[name]


def output_agreement(
  losses_of: Callable[[jax.Array], jax.Array],
  outputs: jax.Array,
  reference: jax.Array,
) -> jax.Array:
  """Mimic scores in the space of outputs, for `score="given"`.

  `m_i = <-dl_i/df_i, softmax(r_i) - softmax(f_i)>`

  with f_i the learner's outputs and r_i the reference's: how much a step on
  sample i alone moves its own outputs toward the reference's. The direction of
  `toward_outputs` is that of the batch, and what batch mates ask for drowns
  what a sample's own label says; here they don't enter. (With r_i - f_i in
  place of the probabilities' difference it would be, to first order, the excess
  loss, which is unbounded.) No tangent goes through the model: it costs nothing
  beside the outputs.

  Args:
    losses_of: `outputs [B, C] -> losses [B]`, each of its own row only.
    outputs: the learner's logits `[B, C]`.
    reference: the reference's logits `[B, C]`, any architecture.

  Returns:
    Scores `[B]`, constants; NaN where the reference's logits are not finite.

  Raises:
    TypeError: one of the two is no array.
    ValueError: one is no logits `[B, C]`, or they differ in shape.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> labels = jnp.array([0, 1])
    >>> def losses_of(outputs):
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     outputs, labels)
    >>> reference = jnp.array([[9.0, -9.0], [9.0, -9.0]])  # 0 for both
    >>> output_agreement(losses_of, jnp.zeros((2, 2)), reference)
    Array([ 0.5, -0.5], dtype=float32)
  """
  outputs = jax.lax.stop_gradient(_validate.logits("outputs", outputs))
  reference = jax.lax.stop_gradient(_validate.logits("reference", reference))
  _validate.same_outputs(reference, outputs)
  reference = _mesh.like(reference, outputs)
  toward = jax.nn.softmax(reference) - jax.nn.softmax(outputs)
  _, slopes = jax.jvp(losses_of, (outputs,), (toward,))
  return -slopes
