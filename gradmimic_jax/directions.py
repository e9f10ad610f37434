"""Directions: where the learner should go.

A direction is any callable `(params, reference, batch, **kwargs) -> tree like
params`; each direction says what its `reference` is. Only its leaves in the
mimic layers are looked at, and only their direction counts: scores divide by
the norm. It is a constant of the step: no gradient flows through it. It
gets the keyword arguments of losses_fn, and `mask` if it has a parameter of
that name: bool `[B]`, the samples of the batch that count.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _problem, _tree, _validate

# Probabilities closer than this many roundings agree.
_AGREE = 64


class Direction(Protocol):
  """`(params, reference, batch, **kwargs) -> tree like params`."""

  def __call__(
    self, params: Any, reference: Any, batch: Any, **kwargs: Any
  ) -> Any:
    """The tree that points where the learner should go."""


def toward_weights() -> Direction:
  """Direction toward the reference's weights.

  `v = reference - params`

  The reference must lie in the learner's basin: a model that was trained from
  the learner's own initialisation, or a later checkpoint of the same run. The
  scores of a reference of the same accuracy from another initialisation are
  inverted.

  Returns:
    A direction whose `reference` is a parameter tree with the paths and the
    shapes of params, in whatever containers. Calling it raises TypeError when
    paths differ and ValueError when shapes do.

  Example:
    >>> import jax.numpy as jnp
    >>> direction = toward_weights()
    >>> direction({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, None)
    {'w': Array([1., 1.], dtype=float32)}

  References:
    Huang et al., Evaluating Sample Utility for Efficient Data Selection by
    Mimicking Model Weights, `arXiv:2501.06708
    <https://arxiv.org/abs/2501.06708>`_, section 3.
  """

  def direction(params, reference, batch, **kwargs):
    del batch, kwargs
    return gap(params, match_params(reference, params))

  return direction


def match_params(reference: Any, params: Any) -> Any:
  """Puts a reference's weights in params' containers; raises if unlike."""
  return _validate.like_params(
    "reference",
    reference,
    params,
    "The reference must be a checkpoint of the learner's own architecture.",
  )


def gap(params: Any, reference: Any) -> Any:
  """Computes `reference - params`, leaf by leaf.

  The dtype is wide: near the end of training a bfloat16 difference is noise.
  """

  def between(p, r):
    return _mesh.like(_tree.to_accumulate(r), p) - _tree.to_accumulate(p)

  return jax.tree.map(between, params, reference)


def toward_outputs(outputs_fn: Callable[..., jax.Array]) -> Direction:
  """Direction toward the reference's outputs, in the learner's own basin.

  `v = -grad mean_i KL(softmax(r_i) || softmax(f(params)_i))`

  with r_i the reference's outputs for sample i of the batch and f the
  learner's. Only the reference's outputs are looked at, so it may be of any
  architecture and any initialisation, and its outputs may be computed once and
  stored. In exchange the step costs one more backward pass, down to the mimic
  layers. Under jit, the forward pass is shared as far as outputs_fn and
  losses_fn do the same, except inside loops such as `jax.lax.scan`.

  Args:
    outputs_fn: `outputs_fn(params, batch, **kwargs) -> logits [B, C]`, with the
      keyword arguments of losses_fn.

  Returns:
    A direction whose `reference` is the reference's logits for this batch, `[B,
    C]`. Samples outside the mask, and samples with a logit that is not finite,
    don't count in the mean; where the two models agree up to rounding, there is
    no direction; entries that something not finite has reached are 0. Calling
    it raises TypeError or ValueError when what comes is no logits, or the two
    models' differ in shape.

  Example:
    >>> import jax.numpy as jnp
    >>> direction = toward_outputs(lambda params, batch: batch @ params["w"])
    >>> direction({"w": jnp.zeros((1, 2))}, jnp.array([[9.0, -9.0]]),
    ...           jnp.ones((1, 1)))["w"].round(1)
    Array([[ 0.5, -0.5]], dtype=float32)
  """

  def direction(params, reference, batch, *, mask=None, **kwargs):
    reference = _validate.logits("reference", reference)

    def compute_outputs(params):
      outputs = outputs_fn(params, batch, **kwargs)
      return _validate.logits("what outputs_fn returned", outputs)

    outputs, pullback = jax.vjp(compute_outputs, params)
    _validate.same_outputs(reference, outputs)
    reference = _mesh.like(reference, outputs)
    valid = jnp.all(jnp.isfinite(reference), axis=-1)
    if mask is not None:
      valid &= _mesh.rows_like(mask, outputs)
    targets = jax.nn.softmax(jnp.where(valid[:, None], reference, 0))
    # Minus the gradient of the divergence with respect to the outputs. Where
    # the two agree it is rounding, which the unit vector would blow up.
    toward = targets - jax.nn.softmax(outputs)
    told_apart = jnp.abs(toward) > _AGREE * jnp.finfo(toward.dtype).eps
    counted = told_apart & valid[:, None]
    total = jnp.maximum(jnp.sum(valid.astype(toward.dtype)), 1)
    (tree,) = pullback(jnp.where(counted, toward, 0) / total)
    return _tree.zero_nonfinite(tree)

  direction.repeats_forward = True  # type: ignore[attr-defined]
  return direction


def toward_clean_gradient(losses_fn: Callable[..., jax.Array]) -> Direction:
  """Direction down the mean loss of a batch that is known to be clean.

  `v = -grad mean_j l_j(params)` over the clean batch

  Scores are then the few-shot influence of each sample on the clean loss; with
  an independent noisy batch instead and the cosine score, they are AGRA's.

  Args:
    losses_fn: `losses_fn(params, batch, **kwargs) -> losses [B]`.

  Returns:
    A direction whose `reference` is a clean batch, of any size. Samples that
    are not finite don't count. Calling it raises TypeError or ValueError when
    losses_fn returns anything but losses `[B]`.

  Example:
    >>> import jax.numpy as jnp
    >>> direction = toward_clean_gradient(lambda p, b: (p["w"] - b) ** 2)
    >>> direction({"w": jnp.zeros([])}, jnp.array([1.0, 3.0]), None)
    {'w': Array(4., dtype=float32)}

  References:
    Huang et al., `arXiv:2501.06708 <https://arxiv.org/abs/2501.06708>`_,
    section 4, baselines.
  """

  def direction(params, reference, batch, **kwargs):
    del batch
    advice = "If it has an aux, leave it out: lambda p, b: losses_fn(p, b)[0]."
    plain = _problem.plain_losses_fn(losses_fn, False, kwargs, advice)
    everybody = jnp.ones(_validate.batch_size(reference), bool)
    reference = jax.tree.map(jnp.asarray, reference)
    reference, finite = _problem.mend_rows(reference, everybody)

    def mean_loss(params):
      losses = _tree.to_accumulate(plain(params, reference)[0])
      valid = finite & jnp.isfinite(losses)
      weights = _problem.mean_weights(valid, losses.dtype)
      return jnp.sum(weights * jnp.where(valid, losses, 0))

    tree = jax.grad(mean_loss)(params)
    return _tree.zero_nonfinite(jax.tree.map(jnp.negative, tree))

  return direction


def check(direction: Any) -> None:
  """Raises TypeError unless this may be a direction."""
  factories = (toward_weights, toward_outputs, toward_clean_gradient)
  _validate.made("direction", direction, factories, "gm.toward_weights()")


def repeats_forward(direction: Any) -> bool:
  """True if the direction repeats the forward pass of losses_fn.

  Only then is it worth tracing a step twice, to find equal operations.
  """
  return getattr(direction, "repeats_forward", False)


def call(
  direction: Direction,
  params: Any,
  reference: Any,
  batch: Any,
  mask: jax.Array,
  kwargs: dict[str, Any],
) -> Any:
  """Calls the direction, with the mask if it has a parameter of that name."""
  if "mask" in inspect.signature(direction).parameters:
    kwargs = {**kwargs, "mask": mask}
  return direction(params, reference, batch, **kwargs)


def unit_vector(
  direction_tree: Any, params: Any, flags: list[bool]
) -> tuple[list[jax.Array], jax.Array]:
  """Scales the direction over the mimic layers to length one.

  Args:
    direction_tree: the tree that a direction returned.
    params: the parameter tree.
    flags: which leaves are mimic layers.

  Returns:
    The unit vector's leaves `[*p]`, mimic layers only, zeros if the direction
    vanishes there (a reference equal to params); and the norm before, `[]`.
  """
  direction_tree = _validate.like_params(
    "the direction's tree",
    direction_tree,
    params,
    "A direction returns a tree with the structure and the shapes of params.",
  )
  leaves = [
    jax.lax.stop_gradient(_mesh.like(leaf, param))
    for leaf, param, chosen in zip(
      jax.tree.leaves(direction_tree),
      jax.tree.leaves(params),
      flags,
      strict=True,
    )
    if chosen
  ]
  return normalize(leaves)


def normalize(
  leaves: list[jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
  """Divides leaves by their joint norm (zeros if that is 0); also the norm."""
  unit, distance = _tree.unit(leaves)
  return [
    x.astype(_tree.accumulation_dtype(leaf.dtype))
    for x, leaf in zip(unit, leaves, strict=True)
  ], distance
