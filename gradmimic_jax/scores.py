"""Scores: the worth of each sample, raw, high = good.

The mimic scores, projection and cosine, measure the agreement with a direction;
the others are there to compare with. Gradients and directions are looked at
over the mimic layers only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _validate


class Measured(NamedTuple):
  """The measurements of a batch's samples; None where nobody asked."""

  losses: jax.Array | None = None  # [B]
  descents: jax.Array | None = None  # [B], <-g_i, v> / ||v||
  norms: jax.Array | None = None  # [B], ||g_i||
  baseline: jax.Array | None = None  # [B], known before any loss is
  gram: jax.Array | None = None  # [B, B], <g_i, g_j>; 0 where not valid
  valid: jax.Array | None = None  # bool [B], the samples in the gram
  aux: Any = None  # losses_fn's aux
  batch: Any = None  # leaves [B, ...], as losses_fn sees them
  reference: Any = None  # the reference, as it came
  step: Any = None  # [], updates done so far, if the caller said


@dataclasses.dataclass(frozen=True)
class Score:
  """A function from measurements to scores, and its needs.

  Attributes:
    name: its name for `score=`.
    fn: `Measured -> scores [B]`.
    needs_descents: whether `fn` looks at the descents, and so at a direction.
    needs_norms: whether `fn` looks at the gradient norms.
    needs_baseline: whether the reference is the baseline: a number a sample,
      such as the reference's loss.
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
  needs_aux: bool = False
  needs_reference: bool = False
  make_baseline: Callable[..., jax.Array] | None = None

  @property
  def needs_gradients(self) -> bool:
    """True if `fn` looks at anything of the samples' gradients."""
    return self.needs_descents or self.needs_norms or self.needs_gram

  @property
  def needs_besides(self) -> str:
    """The needs of `fn` besides gradients, in words; "" if it has none."""
    if self.needs_aux:
      return "losses_fn's aux"
    return "losses" if self.needs_baseline or self.needs_reference else ""

  def get_baseline(
    self, reference: Any, batch: Any, step: Any, rows: jax.Array
  ) -> jax.Array | None:
    """Returns the baseline `[B]`, divided as `rows [B]` are; or None."""
    if self.needs_baseline:
      found = _validate.baseline(self.name, reference, len(rows))
    elif self.make_baseline is not None:
      found = self.make_baseline(reference, batch, step, len(rows))
      found = _validate.baseline(
        self.name, found, len(rows), "what make_baseline returned"
      )
    else:
      return None
    return _mesh.rows_like(found, rows)

  def compute(self, measured: Measured, rows: jax.Array) -> jax.Array:
    """Computes scores `[B]`, divided over devices as `rows [B]` are."""
    if self.needs_gram:
      # Every sample's score depends on all of them.
      samples = measured._replace(step=None)
      measured = jax.tree.map(_mesh.whole, samples)._replace(step=measured.step)
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
  """Returns the score of that name, or the Score that came.

  * `"projection"`: `m_i = <-g_i, v> / ||v||`, unbounded, in units of loss per
    unit of parameter distance. Needs no gradient of a single sample.
  * `"cosine"`: `m_i = <-g_i, v> / (||g_i|| ||v||)`, in [-1, 1]; 0 where g_i is.
  * `"gradient_norm"`: `m_i = ||g_i||`, GraNd; there is no direction.
  * `"excess_loss"`: `m_i = l_i(params) - l_i(reference)`, RHO-loss; the
    reference's losses `[B]` stand in the place of the reference.
  * `"given"`: the scores `[B]` themselves stand there, from wherever they are.

  Scores with options of their own are made, not named: `excess_loss`,
  `output_agreement`, `random_score`, and those of `gradmimic_jax.matching`.

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


def excess_loss(losses_of: Callable[[Any, Any], jax.Array]) -> Score:
  """Excess losses of a reference whose outputs are known, for `score=`.

  `m_i = l_i(params) - losses_of(r, batch)_i`

  with r the reference's outputs, which stand in the reference's place. It is
  `"excess_loss"` for outputs that were stored once, for any labels.

  Args:
    losses_of: `(outputs, batch) -> losses [B]`.

  Returns:
    A Score.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_of(outputs, batch):
    ...   return (outputs - batch["y"]) ** 2
    >>> score = gm.mimic_scores(
    ...   lambda params, batch: losses_of(params["w"] * batch["x"], batch),
    ...   score=gm.excess_loss(losses_of))
    >>> batch = {"x": jnp.ones(2), "y": jnp.array([1.0, 3.0])}
    >>> score({"w": jnp.zeros([])}, jnp.array([1.0, 1.0]), batch).scores
    Array([1., 5.], dtype=float32)

  References:
    Mindermann et al., `arXiv:2206.07137 <https://arxiv.org/abs/2206.07137>`_
    (RHO-loss).
  """
  return Score(
    "excess_loss",
    _excess_loss,
    needs_reference=True,
    make_baseline=lambda reference, batch, *_: losses_of(reference, batch),
  )


def random_score(seed: int = 0) -> Score:
  """Random scores, for `score=`: the others have to be better.

  Uniform in [0, 1), drawn anew in each step. They depend on the seed, the step
  and a sample's place in the batch alone: all runs that see the same batches
  draw the same ones, whatever the engine.

  Args:
    seed: of the draws.

  Returns:
    A Score. Functions with it need `step=`, the updates done so far.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> score = gm.mimic_scores(
    ...   lambda params, batch: batch * params["w"], score=gm.random_score())
    >>> found = score({"w": jnp.ones([])}, None, jnp.ones(3), step=0)
    >>> bool(((found.scores >= 0) & (found.scores < 1)).all())
    True
  """

  def draw(reference, batch, step, size):
    del reference, batch
    if step is None:
      raise ValueError(
        "step is None with score 'random', which draws anew in each step;"
        " expected step=, the updates done so far."
      )
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.uniform(key, (size,))

  return Score("random", _given, make_baseline=draw)


def output_agreement(
  losses_of: Callable[[jax.Array, Any], jax.Array],
  *,
  outputs_of: Callable[[Any], jax.Array] = lambda aux: aux,
) -> Score:
  """Mimic scores in the space of outputs, for `score=`.

  `m_i = <-dl_i/df_i, softmax(r_i) - softmax(f_i)>`

  with f_i the learner's outputs and r_i the reference's: how much a step on
  sample i alone moves its own outputs toward the reference's. The direction of
  `toward_outputs` is that of the batch, and what batch mates ask for drowns
  what a sample's own label says; here they don't enter. (With r_i - f_i in
  place of the probabilities' difference it would be, to first order, the excess
  loss, which is unbounded.) No tangent goes through the model: it costs nothing
  beside the outputs, which losses_fn has anyway and returns as its aux.

  Args:
    losses_of: `(outputs [B, C], batch) -> losses [B]`, each of its own row
      only.
    outputs_of: takes the outputs from losses_fn's aux; by default the aux is
      the outputs.

  Returns:
    A Score, of functions with `has_aux=True`. Their `reference` is the
    reference's logits for this batch `[B, C]`, of any architecture; a sample
    whose logits are not finite has no score. Calling them raises TypeError or
    ValueError where one of the two is no logits, or they differ in shape.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> import gradmimic_jax as gm
    >>> def losses_of(outputs, batch):
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     outputs, batch["y"])
    >>> def losses_fn(params, batch):
    ...   outputs = batch["x"] @ params["w"]
    ...   return losses_of(outputs, batch), outputs
    >>> step = gm.mimic_value_and_grad(
    ...   losses_fn, score=gm.output_agreement(losses_of), has_aux=True)
    >>> batch = {"x": jnp.ones((2, 1)), "y": jnp.array([0, 1])}
    >>> reference = jnp.array([[9.0, -9.0], [9.0, -9.0]])  # 0 for both
    >>> (loss, info), grads = step({"w": jnp.zeros((1, 2))}, reference, batch)
    >>> info.scores
    Array([ 0.5, -0.5], dtype=float32)
  """

  def fn(measured):
    return agreement(
      lambda outputs: losses_of(outputs, measured.batch),
      outputs_of(measured.aux),
      measured.reference,
    )

  return Score("output_agreement", fn, needs_aux=True, needs_reference=True)


def agreement(
  losses_of: Callable[[jax.Array], jax.Array],
  outputs: jax.Array,
  reference: jax.Array,
) -> jax.Array:
  """Computes the scores of `output_agreement` from arrays.

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
    >>> agreement(losses_of, jnp.zeros((2, 2)), reference)
    Array([ 0.5, -0.5], dtype=float32)
  """
  outputs = jax.lax.stop_gradient(_validate.logits("outputs", outputs))
  reference = jax.lax.stop_gradient(_validate.logits("reference", reference))
  _validate.same_outputs(reference, outputs)
  reference = _mesh.like(reference, outputs)
  toward = jax.nn.softmax(reference) - jax.nn.softmax(outputs)
  _, slopes = jax.jvp(losses_of, (outputs,), (toward,))
  return -slopes
