"""Scores for a linear head with softmax cross-entropy, in closed form.

With features `h_i [D]`, logits `h_i W + b` and the cross-entropy of softmax,
sample i's gradient is `outer(h_i, e_i)` for the kernel W and `e_i` for the bias
b, with the error `e_i = softmax(logits_i) - label_i`. Descents, norms and inner
products then come from features `[B, D]` and errors `[B, C]` alone; the
gradients `[B, D, C]` never exist. They are exact for a linear probe, and, in
any network, when the mimic layers are its linear head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gradmimic_jax import (
  _mesh,
  _tree,
  _validate,
  directions,
  scores as scores_lib,
)
from gradmimic_jax.scores import Measured, Score

_HIGHEST = jax.lax.Precision.HIGHEST


def errors(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The derivative of softmax cross-entropy by the logits.

  `e_i = softmax(logits_i) - label_i`

  Args:
    logits: `[B, C]`.
    labels: integers `[B]`, or probabilities `[B, C]` that sum to 1.

  Returns:
    Errors `[B, C]`, float32 or wider.

  Raises:
    ValueError: labels of another shape.

  Example:
    >>> import jax.numpy as jnp
    >>> errors(jnp.zeros((1, 2)), jnp.array([0]))
    Array([[-0.5,  0.5]], dtype=float32)
  """
  logits = _tree.to_accumulate(logits)
  labels = jnp.asarray(labels)
  if jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim == 1:
    labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  if labels.shape != logits.shape:
    raise ValueError(
      f"labels has shape {labels.shape} and dtype {labels.dtype}; expected"
      f" integers [{logits.shape[0]}], or probabilities {logits.shape}."
    )
  return jax.nn.softmax(logits) - labels.astype(logits.dtype)


def descents(
  features: jax.Array,
  errors: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Computes how far each sample's descent goes along a direction.

  `<-g_i, v> / ||v|| = -(h_i' V e_i + u' e_i) / ||(V, u)||`

  Args:
    features: the head's input, `[B, D]`.
    errors: `[B, C]`, as of `errors`.
    kernel: V, the direction of the kernel, `[D, C]`.
    bias: u, the direction of the bias, `[C]`; None where it is no mimic layer.

  Returns:
    Descents `[B]`; 0 if the direction vanishes.

  Raises:
    ValueError: shapes that don't fit.

  Example:
    >>> import jax.numpy as jnp
    >>> descents(jnp.array([[2.0]]), jnp.array([[-1.0, 1.0]]),
    ...          jnp.array([[3.0, -4.0]])).round(1)
    Array([2.8], dtype=float32)
  """
  features, errors = _wide(features, errors)
  expected = (features.shape[1], errors.shape[1])
  for name, leaf, shape in (
    ("kernel", kernel, expected),
    ("bias", bias, expected[1:]),
  ):
    if leaf is not None and jnp.shape(leaf) != shape:
      raise ValueError(
        f"{name} has shape {jnp.shape(leaf)}; expected {shape}, from features"
        f" {features.shape} and errors {errors.shape}."
      )
  unit, _ = directions.normalize([x for x in (kernel, bias) if x is not None])
  unit = [x.astype(features.dtype) for x in unit]
  slopes = _mesh.dot(features, unit[0], ((1,), (0,)), precision=_HIGHEST)
  if bias is not None:
    slopes += unit[1][None, :]
  return -jnp.sum(slopes * errors, axis=1)


def gradient_norms(
  features: jax.Array, errors: jax.Array, *, has_bias: bool = True
) -> jax.Array:
  """The norm of each sample's gradient.

  `||g_i|| = sqrt(||h_i||^2 + 1) ||e_i||`, without the 1 if there is no bias

  Args:
    features: the head's input, `[B, D]`.
    errors: `[B, C]`, as of `errors`.
    has_bias: whether the bias is a mimic layer.

  Returns:
    Norms `[B]`.

  Raises:
    ValueError: shapes that don't fit.

  Example:
    >>> import jax.numpy as jnp
    >>> gradient_norms(jnp.array([[2.0]]), jnp.array([[-3.0, 4.0]]),
    ...                has_bias=False)
    Array([10.], dtype=float32)
  """
  features, errors = _wide(features, errors)
  squares = jnp.sum(jnp.square(features), axis=1) + int(has_bias)
  return jnp.sqrt(squares) * jnp.sqrt(jnp.sum(jnp.square(errors), axis=1))


def gram(
  features: jax.Array, errors: jax.Array, *, has_bias: bool = True
) -> jax.Array:
  """The samples' inner products with each other.

  `<g_i, g_j> = (<h_i, h_j> + 1) <e_i, e_j>`, without the 1 if there is no bias

  Args:
    features: the head's input, `[B, D]`.
    errors: `[B, C]`, as of `errors`.
    has_bias: whether the bias is a mimic layer.

  Returns:
    The Gram matrix `[B, B]`.

  Raises:
    ValueError: shapes that don't fit.

  Example:
    >>> import jax.numpy as jnp
    >>> gram(jnp.array([[2.0], [1.0]]), jnp.array([[-1.0, 1.0], [1.0, -1.0]]))
    Array([[10., -6.],
           [-6.,  4.]], dtype=float32)
  """
  features, errors = _wide(features, errors)

  def products(rows):
    return _mesh.dot(rows, rows, ((1,), (1,)), precision=_HIGHEST)

  return (products(features) + int(has_bias)) * products(errors)


def gradient(
  features: jax.Array, errors: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The weighted gradient, `sum_i w_i g_i`.

  Args:
    features: the head's input, `[B, D]`.
    errors: `[B, C]`, as of `errors`.
    weights: `[B]`; a sample of weight 0 may be anything.

  Returns:
    The gradients of the kernel `[D, C]` and of the bias `[C]`.

  Raises:
    ValueError: shapes that don't fit.

  Example:
    >>> import jax.numpy as jnp
    >>> gradient(jnp.array([[2.0]]), jnp.array([[-1.0, 1.0]]), jnp.ones(1))
    (Array([[-2.,  2.]], dtype=float32), Array([-1.,  1.], dtype=float32))
  """
  features, errors = _wide(features, errors)
  weights = jnp.asarray(weights).astype(errors.dtype)
  # Zero times NaN is NaN.
  chosen = (weights != 0)[:, None]
  features = jnp.where(chosen, features, 0)
  errors = jnp.where(chosen, errors, 0) * weights[:, None]
  kernel = _mesh.dot(features, errors, ((0,), (0,)), precision=_HIGHEST)
  return kernel, jnp.sum(errors, axis=0)


def scores(
  features: jax.Array,
  errors: jax.Array,
  *,
  score: str | Score = "projection",
  direction: tuple[jax.Array, jax.Array | None] | None = None,
  has_bias: bool = True,
  mask: jax.Array | None = None,
) -> jax.Array:
  """The scores of `mimic_value_and_grad`, without a gradient of any sample.

  Memory: the inputs, and `[B, B]` for scores of inner products.

  Args:
    features: the head's input, `[B, D]`.
    errors: `[B, C]`, as of `errors`.
    score: as in `mimic_value_and_grad`; none that needs losses.
    direction: of kernel `[D, C]` and bias `[C]`, such as the reference's head
      minus the learner's, for scores that look at one; the bias is None exactly
      if has_bias is False.
    has_bias: whether the bias is a mimic layer.
    mask: bool `[B]`, False for padding.

  Returns:
    Scores `[B]`; NaN where features or errors are not finite, 0 where padding.

  Raises:
    ValueError: an unknown score, one that needs losses, a direction that is
      missing, or shapes that don't fit.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> features = jnp.eye(2)[jnp.array([0, 1, 1])]
    >>> labels = jnp.array([0, 1, 0])  # the last one is wrong
    >>> kernel, bias = jnp.zeros((2, 2)), jnp.zeros(2)  # the learner's head
    >>> logits = features @ kernel + bias[None]
    >>> errors = gm.linear_head.errors(logits, labels)
    >>> direction = (jnp.eye(2) - kernel, -bias)
    >>> scores = gm.linear_head.scores(features, errors, direction=direction)
    >>> weights = gm.softmax(0.1)(scores)
    >>> weights.round(2)
    Array([0.5, 0.5, 0. ], dtype=float32)
    >>> grads = gm.linear_head.gradient(features, errors, weights)
  """
  kind = scores_lib.get(score)
  features, errors = _wide(features, errors)
  mask = _validate.padding_mask(mask, features.shape[0], features)
  if kind.needs_besides or kind.make_baseline:
    needed, instead = kind.needs_besides or "the step", "use gm.mimic_scores"
    if needed == "losses":
      instead = "subtract the reference's losses from the learner's"
    raise ValueError(
      f"score is {kind.name!r}, which needs no gradients but {needed};"
      f" {instead}."
    )
  valid = mask & _tree.rows_finite([features, errors])
  features = jnp.where(valid[:, None], features, 0)
  errors = jnp.where(valid[:, None], errors, 0)
  along = norms = products = None
  if kind.needs_descents:
    along = descents(features, errors, *_pair(direction, has_bias, kind))
  if kind.needs_norms:
    norms = gradient_norms(features, errors, has_bias=has_bias)
  if kind.needs_gram:
    products = _mesh.whole(gram(features, errors, has_bias=has_bias))
    valid = _mesh.whole(valid) & jnp.isfinite(jnp.diagonal(products))
    products = jnp.where(valid[:, None] & valid[None, :], products, 0)
  measured = Measured(descents=along, norms=norms, gram=products, valid=valid)
  found = kind.compute(measured, features)
  valid &= jnp.isfinite(found)
  unknown = jnp.where(mask, jnp.nan, 0).astype(found.dtype)
  return jnp.where(valid, found, unknown)


def _pair(direction: Any, has_bias: bool, kind: Score) -> tuple[Any, Any]:
  if not isinstance(direction, tuple) or len(direction) != 2:
    raise ValueError(
      f"direction is {type(direction).__name__} with score {kind.name!r};"
      " expected a pair: that of the kernel [D, C], and that of the bias [C] or"
      " None."
    )
  if (direction[1] is not None) != has_bias:
    raise ValueError(
      f"has_bias is {has_bias} and the direction's bias is"
      f" {'given' if direction[1] is not None else 'None'}; expected a bias"
      " exactly if it is a mimic layer."
    )
  return direction


def _wide(features: Any, errors: Any) -> tuple[jax.Array, jax.Array]:
  """Converts both, `[B, D]` and `[B, C]`, to the wider accumulation dtype."""
  features, errors = jnp.asarray(features), jnp.asarray(errors)
  fits = features.ndim == errors.ndim == 2
  if not fits or features.shape[0] != errors.shape[0]:
    raise ValueError(
      f"features has shape {features.shape} and errors {errors.shape}; expected"
      " [B, D] and [B, C]."
    )
  features, errors = _mesh.rows_alike((features, errors))
  dtype = _tree.common_dtype([features, errors])
  return features.astype(dtype), errors.astype(dtype)
