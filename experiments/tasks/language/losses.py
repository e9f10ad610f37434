"""Next-token losses: one a sequence, the mean over its real tokens.

A batch has `tokens`, integers `[B, T + 1]`: a start token, then the sequence,
then padding, which has an id of its own. Each token but the first is predicted
from those before it, so a sequence of T tokens has T targets. Padding is no
target, and tokens after a sequence's end reach none of its logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.runtime import programs
from experiments.tasks.base import Outputs
from gradmimic_jax.scores import Score

Apply = Callable[[Any, jax.Array], jax.Array]


@programs.once
def make_losses_fn(
  apply: Apply, *, padding: int
) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
  """Makes the loss per sequence, with hits as aux.

  Args:
    apply: `(params, tokens [B, T]) -> logits [B, T, V]`, those at a place from
      the tokens up to it.
    padding: the id of padding.

  Returns:
    `losses_fn(params, batch) -> (losses [B], hits [B])`, as `losses_and_hits`
    has them.
  """

  def losses_fn(params, batch):
    return losses_and_hits(_logits(apply, params, batch), batch, padding)

  return losses_fn


def losses_and_hits(
  logits: jax.Array, batch: Any, padding: int
) -> tuple[jax.Array, jax.Array]:
  """Computes losses and hits of a batch's logits.

  `l_i = (1 / T_i) sum_t -log softmax(f_it)[y_it]` over the T_i real targets

  Args:
    logits: of the next tokens, `[B, T, V]`.
    batch: with `tokens` `[B, T + 1]`.
    padding: the id of padding.

  Returns:
    Losses `[B]` in nats a token, and hits `[B]`: the share of the targets that
    are the likeliest token, so that their mean is an accuracy. A sequence of
    padding alone has 0 for both, and no gradient.

  Example:
    >>> import jax.numpy as jnp
    >>> batch = {"tokens": jnp.array([[2, 1, 0], [2, 1, 3]])}  # 3: padding
    >>> logits = jnp.zeros((2, 2, 4)).at[:, 0, 1].set(9.0)
    >>> losses_and_hits(logits, batch, padding=3)[1]
    Array([1., 1.], dtype=float32)
  """
  targets = batch["tokens"][:, 1:]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  hits = (jnp.argmax(logits, axis=-1) == targets).astype(losses.dtype)
  real = targets != padding
  return _mean(losses, real), _mean(hits, real)


@programs.once
def make_outputs(apply: Apply, *, padding: int) -> Outputs:
  """Makes the Outputs of language modelling, of logits `[B, T, V]`.

  A reference's outputs are its logits for the batch. They are N T V numbers for
  N sequences: cheaper to compute than to store; see `reference`.

  Args:
    apply: the learner's, `(params, tokens [B, T]) -> logits [B, T, V]`.
    padding: the id of padding.

  Returns:
    The Outputs.
  """
  measure = functools.partial(losses_and_hits, padding=padding)

  def agrees(measured):
    return agreement(
      measured.aux.outputs, measured.reference, measured.batch, padding
    )

  return Outputs(
    functools.partial(_logits, apply),
    measure,
    toward_next_tokens(apply, padding=padding),
    scores={
      "output_agreement": Score(
        "output_agreement", agrees, needs_aux=True, needs_reference=True
      ),
      "excess_loss": gm.excess_loss(lambda *given: measure(*given)[0]),
    },
    divergences=functools.partial(divergences, padding=padding),
  )


def toward_next_tokens(apply: Apply, *, padding: int) -> gm.Direction:
  """Direction toward the reference's distributions of the next tokens.

  `v = -grad mean_it KL(softmax(r_it) || softmax(f_it))` over all real targets

  with f the learner's logits and r the reference's: `gm.toward_outputs` with a
  row for each token. The reference may be of any architecture that reads the
  same tokens.

  Args:
    apply: the learner's, `(params, tokens [B, T]) -> logits [B, T, V]`.
    padding: the id of padding.

  Returns:
    A direction whose `reference` is the reference's logits `[B, T, V]` for this
    batch. Sequences outside the mask, and those with a logit of the reference
    that is not finite, don't count. Calling it raises ValueError where the
    shapes of the two models' logits differ.
  """

  def outputs_fn(params, batch):
    return _rows(_logits(apply, params, batch))

  def direction(params, reference, batch, *, mask=None, **kwargs):
    del kwargs
    reference = check_logits(reference, batch)
    real = (batch["tokens"][:, 1:] != padding) & _known(reference)
    mask = batch.get("mask") if mask is None else mask
    if mask is not None:
      real &= mask[:, None]
    return gm.toward_outputs(outputs_fn)(
      params, _rows(reference), batch, mask=real.reshape(-1)
    )

  direction.repeats_forward = True  # type: ignore[attr-defined]
  return direction


def agreement(
  logits: jax.Array, reference: jax.Array, batch: Any, padding: int
) -> jax.Array:
  """Computes mimic scores in the space of logits, sequence by sequence.

  `m_i = (1 / T_i) sum_t <-dl_it/df_it, softmax(r_it) - softmax(f_it)>`

  Args:
    logits: the learner's, `[B, T, V]`.
    reference: the reference's, `[B, T, V]`.
    batch: with `tokens` `[B, T + 1]`.
    padding: the id of padding.

  Returns:
    Scores `[B]`, constants; NaN where a logit of the reference at a real
    target is not finite, 0 for a sequence of padding alone.

  Raises:
    ValueError: logits that are not of this batch, or of two vocabularies.
  """
  targets = batch["tokens"][:, 1:]
  scores = gm.scores.agreement(
    lambda rows: optax.softmax_cross_entropy_with_integer_labels(
      rows, targets.reshape(-1)
    ),
    _rows(logits),
    _rows(check_logits(reference, batch)),
  )
  return _mean(scores.reshape(targets.shape), targets != padding)


def divergences(
  reference: jax.Array, logits: jax.Array, batch: Any, padding: int
) -> jax.Array:
  """Averages `KL(softmax(reference) || softmax(logits))` over real targets.

  Args:
    reference: the reference's logits `[B, T, V]`, constants.
    logits: the learner's, `[B, T, V]`.
    batch: with `tokens` `[B, T + 1]`.
    padding: the id of padding.

  Returns:
    Divergences `[B]`; NaN, with gradient 0, where a logit of the reference is
    not finite.

  Raises:
    ValueError: logits that are not of this batch.
  """
  reference = check_logits(reference, batch)
  known = jnp.all(_known(reference), axis=1)
  # Zero times NaN is NaN: such a row must not get into the computation.
  reference = jnp.where(known[:, None, None], reference, 0)
  targets = jax.nn.log_softmax(reference)
  gaps = jnp.sum(jnp.exp(targets) * (targets - jax.nn.log_softmax(logits)), -1)
  found = _mean(gaps, batch["tokens"][:, 1:] != padding)
  return jnp.where(known, found, jnp.nan)


def check_logits(reference: Any, batch: Any) -> jax.Array:
  """Returns the reference's logits; raises unless they are of this batch.

  Args:
    reference: should be logits `[B, T, V]`.
    batch: with `tokens` `[B, T + 1]`.

  Returns:
    The reference.

  Raises:
    TypeError: no array.
    ValueError: an array of another shape.
  """
  if not hasattr(reference, "shape"):
    raise TypeError(
      f"the reference is a {type(reference).__name__}; expected the reference"
      " model's logits [B, T, V] for this batch."
    )
  size, length = batch["tokens"].shape
  if reference.ndim != 3 or reference.shape[:2] != (size, length - 1):
    raise ValueError(
      f"the reference's logits have shape {reference.shape}; expected"
      f" [{size}, {length - 1}, V], those of this batch."
    )
  return reference


def _logits(apply, params, batch):
  return apply(params, batch["tokens"][:, :-1])


def _rows(logits):
  return logits.reshape(-1, logits.shape[-1])


def _known(reference):
  """True for all places of sequences whose logits are finite, bool `[B, T]`."""
  finite = jnp.all(jnp.isfinite(reference), axis=(1, 2))
  return jnp.broadcast_to(finite[:, None], reference.shape[:2])


def _mean(values, real):
  """Averages over the real targets `[B, T]` of each sequence."""
  count = jnp.maximum(jnp.sum(real, axis=1), 1).astype(values.dtype)
  return jnp.sum(jnp.where(real, values, 0), axis=1) / count
