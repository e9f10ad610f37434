"""`mimic_value_and_grad` and `mimic_scores`: the method in one's own loop."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradmimic_jax import (
  _forward,
  _ghost,
  _mesh,
  _per_sample,
  _problem,
  _sharing,
  _streaming,
  _validate,
  directions,
  independence,
  layers as layers_lib,
  scores as scores_lib,
  weighting as weighting_lib,
)
from gradmimic_jax.directions import Direction, toward_weights
from gradmimic_jax.layers import Layers
from gradmimic_jax.scores import Score
from gradmimic_jax.weighting import Weighting

_ENGINES = {
  "forward": _forward,
  "per_sample": _per_sample,
  "ghost": _ghost,
}
SCOPES = ("all", "layers")
_ADVICE = "Pass has_aux=True if it returns (losses, aux)."


class _Solver(NamedTuple):
  """The two functions of an engine."""

  answer: Callable[..., Any]
  reweighted: Callable[..., Any]


class MimicInfo(NamedTuple):
  """The measurements of a reweighted step; float32 or wider throughout."""

  scores: jax.Array  # [B], raw, high = good; NaN: not finite; 0: padding
  weights: jax.Array  # [B], sum to 1 over the valid samples
  losses: jax.Array  # [B]; NaN where not finite, 0 where padding
  distance: jax.Array  # [], norm of the direction; 0 if the score has none
  effective_sample_size: jax.Array  # [], 1 / sum of squared weights
  aux: Any  # losses_fn's aux, or None


class MimicScores(NamedTuple):
  """Scores of a batch; float32 or wider throughout."""

  scores: jax.Array  # [B], raw, high = good; NaN: not finite; 0: padding
  losses: jax.Array  # [B]; NaN where not finite, 0 where padding
  distance: jax.Array  # [], norm of the direction; 0 if the score has none


def mimic_value_and_grad(
  losses_fn: Callable[..., Any],
  *,
  direction: Direction = toward_weights(),  # noqa: B008 - a pure closure
  layers: Layers = None,
  score: str | Score = "projection",
  weighting: Weighting = weighting_lib.softmax(1.0),  # noqa: B008 - frozen
  scope: str = "all",
  engine: str = "auto",
  microbatch_size: int | None = None,
  has_aux: bool = False,
  check_independence: bool = True,
) -> Callable[..., tuple[tuple[jax.Array, MimicInfo], Any]]:
  """Like `jax.value_and_grad`, with samples weighted by their mimic scores.

  `m_i = <-g_i, v> / ||v||`, `w = weighting(m)`, `grads = sum_i w_i g_i`

  with g_i the gradient of sample i's loss, v the direction toward the
  reference, and the inner product over the mimic layers only. Weights are
  constants: no gradient flows through them.

  Guarantees:

  * All engines give the same numbers up to rounding.
  * A reference equal to params gives scores 0 and uniform softmax weights.
  * Samples outside the mask and samples whose features, loss or score are not
    finite get weight 0; the others' weights sum to 1. If samples came and none
    is left (params or the reference are NaN, say), the loss and the gradient
    are NaN, the weights 0. For a batch of nothing but padding, all three are 0.
  * Non-finite features of such a sample leave the others' gradient untouched.
    Where finite features overflow on their way through the model, the
    per-sample engine still leaves the others untouched; the forward and ghost
    engines return 0 in those entries of the gradient that the overflow has
    reached, and are exact in the rest. A gradient that is not finite although
    loss and score are shows in their results, as in `jax.grad`'s.
  * A sample with non-finite features has a copy of a good one's when losses_fn
    and the direction see it; its aux means nothing. Finite rows are never
    touched, so pad with copies of a real row: zeros may have no derivative
    (under a norm, say), which counts as an overflow.
  * With losses that couple the samples of a batch (contrastive ones, batch
    statistics) the forward engine is exact: g_i is then the gradient of the
    i-th loss with its batch mates as they are. The others show losses_fn one
    sample at a time, and must not be used for them.
  * Scores, weights and sums are float32 or wider; gradients have the dtypes of
    params.

  Args:
    losses_fn: `losses_fn(params, batch, **kwargs) -> losses [B]`, or `(losses,
      aux)` with `has_aux`. Leaves of params are floating point.
    direction: where the learner should go; see `toward_weights`.
    layers: the mimic layers: None (all), a regular expression or a list of them
      on "/"-joined leaf paths, a predicate `(path, leaf) -> bool`, or a tree of
      bools.
    score: `"projection"`, or `"cosine"` (divided by the gradient norm too); or
      `output_agreement(losses_of)`, which looks at the outputs in losses_fn's
      aux and takes a reference of any initialisation. To compare with:
      `"gradient_norm"` (GraNd) and `"excess_loss"` (RHO-loss; the reference is
      then the reference's losses on this batch, `[B]`, or with
      `excess_loss(losses_of)` its outputs), which look at no direction;
      `"given"` (the reference is then the scores `[B]`); or another score that
      is made, such as `matching.omp(0.3)` or `random_score()`.
    weighting: `softmax`, `ess_softmax`, `top_fraction`, `positive`,
      `proportional`, `uniform`, or a callable of their kind.
    scope: the leaves that get the weighted gradient: `"all"`, or `"layers"`
      (the mimic layers; the others get the plain mean).
    engine: `"forward"`: one jvp inside one vjp, at about the price of a plain
      gradient where few layers are mimic layers, and 1.6 times it with all.
      `"per_sample"`: `vmap(grad)`, for losses that don't depend on batch mates.
      `"ghost"`: one backward pass, and a product more for each mimic layer: 1.2
      to 1.3 times a plain gradient with all layers on an accelerator. It is for
      losses that don't depend on batch mates, and gives no score of gradient
      norms or their inner products; `jax.checkpoint`, whose savings it would
      undo, it takes in microbatches only. `"auto"`: per_sample with a
      microbatch size or a score with gradient norms or their inner products
      (for which the forward engine takes one more pullback a sample), else
      forward. The returned function's `engine` attribute names the one it is.
    microbatch_size: of the per-sample and ghost engines: how many samples are
      computed at a time. `softmax` and `uniform` need one pass over the
      microbatches; weightings that need all scores before any weight
      (`ess_softmax`, `top_fraction`, `positive`, `proportional`) take two,
      scores first. Scores of all samples' inner products can't be had this way.
      A batch that is sharded stays so if the microbatch size is a multiple of
      the number of devices and divides the batch; otherwise rows move between
      them. Call the step within `jax.set_mesh(mesh)` then: devices sum up
      per-sample gradients once a step, where they would do so in every
      microbatch, as those of the ghost engine do. None: all at once.
    has_aux: whether losses_fn returns `(losses, aux)`. The per-sample and ghost
      engines call losses_fn with batches of one and stack their aux over
      samples, so that aux leaves `[B, ...]` are the same in all engines. They
      refuse other leaves, such as BatchNorm's new statistics; the forward
      engine gives them as losses_fn does.
    check_independence: whether these engines first check that each loss depends
      on its own sample only, once for each losses_fn and its shapes; see
      `gradmimic_jax.check_independence`. The forward engine needs no such
      check.

  Returns:
    `fn(params, reference, batch, *, mask=None, step=None, **kwargs) -> ((loss,
    MimicInfo), grads)`. `reference`: what the direction asks for. `batch`: a
    tree of arrays with leading axis `[B]`. `mask`: bool `[B]`, False for
    padding. `step`: updates done so far, needed by scheduled weightings and
    random scores; it is not handed to losses_fn. Other keyword arguments go to
    losses_fn and to the direction. `loss`: mean unweighted loss over the valid
    samples. `grads`: the reweighted gradient, a tree like params.

  Raises:
    ValueError: an unknown score, scope or engine, a score that microbatches or
      the engine can't give, or one that looks at an aux without has_aux; and,
      from `fn`, shapes that don't fit, layers that match nothing, or, in the
      per-sample engine, losses or an aux that are not of single samples.
    TypeError: from `fn`, trees or dtypes that don't fit.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   logits = batch["x"] @ params["w"]
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     logits, batch["y"])
    >>> params = {"w": jnp.zeros((2, 2))}
    >>> reference = {"w": jnp.eye(2)}
    >>> batch = {"x": jnp.eye(2)[jnp.array([0, 1, 1])],
    ...          "y": jnp.array([0, 1, 0])}  # the last one is mislabelled
    >>> step = jax.jit(gm.mimic_value_and_grad(
    ...   losses_fn, weighting=gm.softmax(0.1)))
    >>> (loss, info), grads = step(params, reference, batch)
    >>> info.weights.round(2)
    Array([0.5, 0.5, 0. ], dtype=float32)

  References:
    Huang et al., Evaluating Sample Utility for Efficient Data Selection by
    Mimicking Model Weights, `arXiv:2501.06708
    <https://arxiv.org/abs/2501.06708>`_, section 3.
  """
  _validate.choice("scope", scope, SCOPES)
  weighting_lib.check(weighting)
  directions.check(direction)
  score_kind = scores_lib.get(score)
  _check_aux(score_kind, has_aux)
  engine, solver = _engine(engine, score_kind, microbatch_size)
  independent = _independence_check(engine, check_independence)

  def fn(params, reference, batch, *, mask=None, step=None, **kwargs):
    plain = _problem.plain_losses_fn(losses_fn, has_aux, kwargs, _ADVICE)
    arguments = params, reference, batch, mask, step, kwargs
    problem, mask, distance = _pose(
      plain, direction, layers, score_kind, *arguments
    )

    with independent(losses_fn, problem, kwargs, has_aux):
      found, weights, leaves = solver.reweighted(
        problem, _problem.Weigh(weighting, step), scope
      )
    scores, losses = _presentable(found, mask)
    info = MimicInfo(
      scores=scores,
      weights=weights,
      losses=losses,
      distance=distance,
      effective_sample_size=weighting_lib.effective_sample_size(weights),
      aux=found.aux,
    )
    plain_mean = _problem.mean_weights(found.valid, losses.dtype)
    loss = jnp.sum(plain_mean * jnp.where(found.valid, found.losses, 0))
    loss = jnp.where(problem.lost(found.valid), jnp.nan, loss)
    grads = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return (loss, info), grads

  return _finished(fn, direction, score_kind, engine)


def mimic_scores(
  losses_fn: Callable[..., Any],
  *,
  direction: Direction = toward_weights(),  # noqa: B008 - a pure closure
  layers: Layers = None,
  score: str | Score = "projection",
  engine: str = "auto",
  microbatch_size: int | None = None,
  has_aux: bool = False,
  check_independence: bool = True,
) -> Callable[..., MimicScores]:
  """Mimic scores of a batch, without a gradient.

  `m_i = <-g_i, v> / ||v||`

  With the forward engine this is one jvp of the losses: the price of about two
  forward passes, and no backward pass.

  Args:
    losses_fn: `losses_fn(params, batch, **kwargs) -> losses [B]`, or `(losses,
      aux)` with `has_aux`.
    direction: as in `mimic_value_and_grad`.
    layers: the mimic layers, as in `mimic_value_and_grad`.
    score: as in `mimic_value_and_grad`.
    engine: as in `mimic_value_and_grad`.
    microbatch_size: as in `mimic_value_and_grad`.
    has_aux: as in `mimic_value_and_grad`; only the score sees the aux.
    check_independence: as in `mimic_value_and_grad`.

  Returns:
    `fn(params, reference, batch, *, mask=None, step=None, **kwargs) ->
    MimicScores`, called as `mimic_value_and_grad`'s.

  Raises:
    ValueError: as `mimic_value_and_grad`.
    TypeError: as `mimic_value_and_grad`.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return (batch["x"] * params["w"] - batch["y"]) ** 2
    >>> score = gm.mimic_scores(losses_fn)
    >>> batch = {"x": jnp.ones(2), "y": jnp.array([1.0, -1.0])}
    >>> score({"w": jnp.zeros([])}, {"w": jnp.ones([])}, batch).scores
    Array([ 2., -2.], dtype=float32)

  References:
    Huang et al., `arXiv:2501.06708 <https://arxiv.org/abs/2501.06708>`_,
    section 3.
  """
  directions.check(direction)
  score_kind = scores_lib.get(score)
  _check_aux(score_kind, has_aux)
  engine, solver = _engine(engine, score_kind, microbatch_size)
  independent = _independence_check(engine, check_independence)

  def fn(params, reference, batch, *, mask=None, step=None, **kwargs):
    plain = _problem.plain_losses_fn(losses_fn, has_aux, kwargs, _ADVICE)
    arguments = params, reference, batch, mask, step, kwargs
    problem, mask, distance = _pose(
      plain, direction, layers, score_kind, *arguments
    )
    with independent(losses_fn, problem, kwargs, has_aux):
      found = solver.answer(problem)
    scores, losses = _presentable(found, mask)
    return MimicScores(scores, losses, distance)

  return _finished(fn, direction, score_kind, engine)


def _finished(fn, direction, score, engine):
  """Merges repeated operations of `fn`, and tells it its engine."""
  if score.needs_descents and directions.repeats_forward(direction):
    fn = _sharing.computed_once(fn)
  fn.engine = engine
  return fn


def _check_aux(score, has_aux):
  if score.needs_aux and not has_aux:
    raise ValueError(
      f"score is {score.name!r}, which looks at losses_fn's aux, with"
      " has_aux=False; expected has_aux=True and a losses_fn that returns"
      " (losses, aux)."
    )


def _engine(name, score, microbatch_size):
  """Returns the engine's name and its `answer` and `reweighted`."""
  _validate.choice("engine", name, ("auto", *_ENGINES))
  if name == "ghost" and (score.needs_norms or score.needs_gram):
    raise ValueError(
      f"score is {score.name!r} with engine='ghost', which has no sample's"
      " gradient; expected engine='auto' or 'per_sample'."
    )
  if microbatch_size is not None:
    _validate.positive_int("microbatch_size", microbatch_size)
    if name == "forward":
      raise ValueError(
        f"microbatch_size is {microbatch_size} with engine='forward', which"
        " sees the whole batch; expected None, or engine='per_sample'."
      )
    if score.needs_gram:
      raise ValueError(
        f"microbatch_size is {microbatch_size} with score {score.name!r}, which"
        " compares all samples' gradients with each other; expected None, or,"
        " where the mimic layers are one linear head, gm.linear_head.scores."
      )
    name = "per_sample" if name == "auto" else name
    options = {"microbatch_size": microbatch_size, "engine": name}
    return name, _Solver(
      functools.partial(_streaming.answer, **options),
      functools.partial(_streaming.reweighted, **options),
    )
  if name == "auto":
    one_by_one = score.needs_norms or score.needs_gram
    name = "per_sample" if one_by_one else "forward"
  engine = _ENGINES[name]
  return name, _Solver(engine.answer, engine.reweighted)


def _independence_check(engine, wanted):
  """Returns a context for an engine's work: an independence check, or none."""

  def check(losses_fn, problem, kwargs, has_aux):
    if not wanted or engine == "forward":  # this one sees the whole batch
      return contextlib.nullcontext()
    return independence.checked(
      losses_fn, problem.params, problem.batch, kwargs, has_aux
    )

  return check


def _pose(
  losses_fn,
  direction,
  layers,
  score,
  params,
  reference,
  batch,
  mask,
  step,
  kwargs,
):
  """Poses the step as a Problem; also the padding mask and direction's norm."""
  _validate.floating_params(params)
  size = _validate.batch_size(batch)
  flags = layers_lib.choose(layers, params)
  batch = _mesh.rows_alike(jax.tree.map(jnp.asarray, batch))
  mask = _validate.padding_mask(mask, size, jax.tree.leaves(batch)[0])
  batch, candidates = _problem.mend_rows(batch, mask)
  params = jax.tree.map(jnp.asarray, params)
  unit, distance = None, jnp.zeros([])
  if score.needs_descents:
    unit, distance = directions.unit_vector(
      directions.call(direction, params, reference, batch, candidates, kwargs),
      params,
      flags,
    )
  baseline = score.get_baseline(reference, batch, step, candidates)
  reference = reference if score.needs_reference else None
  candidates = _mesh.together(
    candidates, params, batch, unit, baseline, reference, kwargs
  )
  problem = _problem.Problem(
    losses_fn,
    params,
    batch,
    flags,
    unit,
    score,
    candidates,
    baseline,
    reference,
    step,
    jnp.any(mask),
  )
  return problem, mask, distance


def _presentable(found, mask):
  """Puts NaN for broken samples and 0 for padding into scores and losses."""
  unknown = jnp.where(mask, jnp.nan, 0)
  return tuple(
    jnp.where(found.valid, x, unknown.astype(x.dtype))
    for x in (found.scores, found.losses)
  )
