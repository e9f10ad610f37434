"""Mimic-guided training as an optax gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradmimic_jax import (
  _mesh,
  _per_sample,
  _problem,
  _tree,
  _validate,
  directions,
  layers as layers_lib,
  scores as scores_lib,
  weighting as weighting_lib,
)
from gradmimic_jax.gradients import SCOPES
from gradmimic_jax.layers import Layers
from gradmimic_jax.scores import Score
from gradmimic_jax.weighting import Weighting


class ReweightByMimicScoreState(NamedTuple):
  """State of `reweight_by_mimic_score`; every field is an array or a tree."""

  # [], updates done so far; drives temperature schedules. The name is optax's.
  count: jax.Array  # type: ignore[assignment]
  reference: Any  # like params; optax.MaskedNode outside the mimic layers
  distance: jax.Array  # [], ||reference - params|| at the last update
  effective_sample_size: jax.Array  # [], of the last update's weights
  nonfinite: jax.Array  # [], samples of the last update given weight 0 for it


def reweight_by_mimic_score(
  reference: Any,
  *,
  layers: Layers = None,
  score: str | Score = "projection",
  weighting: str | Weighting = "softmax",
  temperature: Any = None,
  fraction: Any = None,
  scope: str = "all",
) -> optax.GradientTransformationExtraArgs:
  """Turns per-sample gradients into one gradient, weighted by mimic score.

  `m_i = <-g_i, v> / ||v||`, `v = reference - params` over the mimic layers,
  `w = weighting(m)`, `update = sum_i w_i g_i`

  The updates that come in carry a leading batch axis on every leaf, `[B, *p]`,
  as `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))` makes them; what goes out
  has the shapes of params. It must therefore come first in a chain, and what
  other transformations expect to be averaged goes inside, after it:

  ========================= ===================================================
  instead of, around it     write
  ========================= ===================================================
  `optax.apply_if_finite`,  `mimic(optax.apply_if_finite(tx, 3), reference)`: a
  `conditionally_...`       batch without a finite sample has a NaN update
  `optax.MultiSteps`        `mimic(optax.MultiSteps(tx, 4)
                            .gradient_transformation(), reference)`: batches are
                            weighted one by one, and their updates averaged
  `optax.lookahead`         it works: `lookahead(mimic(tx, reference), 5, 0.5)`
  `optax.masked`,           `layers=` and `scope=`; around the optimizer alone,
  `optax.partition`         `mimic(optax.masked(tx, mask), reference)`
  `optax.flatten`           `mimic(optax.flatten(tx), reference)`
  clipping, `adam` before   after it: `chain(reweight_by_mimic_score(reference),
                            clip_by_global_norm(1.0), adam(1e-3))`; before it
                            they would take the batch axis for a parameter's,
                            without an error
  `inject_hyperparams`      `inject_hyperparams(mimic)(tx, reference,
                            temperature=0.5)`: by names and numbers; `layers`
                            or a weighting that is callable, and a reference or
                            an optimizer that is, go into `static_args`
  ========================= ===================================================

  Gradients are per-sample ones only if each loss depends on its own sample
  alone: not with BatchNorm in training mode, contrastive losses, or a
  random key that all samples share (hand `vmap` a key for each, of
  `jax.random.split(key, B)`, with in_axes 0). The transformation can't see the
  loss: `gradmimic_jax.check_independence` can, from a loss function of batches.

  Args:
    reference: a parameter tree with the structure and shapes of params. Its
      mimic layers are copied into the state, so that they are sharded, donated
      and checkpointed with it.
    layers: the mimic layers, as in `mimic_value_and_grad`.
    score: `"projection"`, `"cosine"`, `"gradient_norm"`, or a score that is
      made and needs neither losses nor outputs, such as `matching.omp(0.3)` or
      `random_score()`.
    weighting: `"softmax"`, `"ess_softmax"`, `"top_fraction"`, `"positive"`,
      `"proportional"`, `"uniform"`, or a weighting as in `mimic_value_and_grad`
      (with `optax.inject_hyperparams`, by name only).
    temperature: of `"softmax"`: a number, or a schedule, which follows the
      state's count; None is 1.
    fraction: of `"ess_softmax"` and `"top_fraction"`, which need one.
    scope: `"all"`, or `"layers"` (leaves outside the mimic layers get the plain
      mean).

  Returns:
    A transformation. `update(updates, state, params, mask=None, **extra_args)`
    needs params; `mask` is bool `[B]`, False for padding. A sample whose
    gradient is not finite gets weight 0 and is counted in the state; if samples
    came and none is left, the update is NaN (0 for nothing but padding).

  Raises:
    ValueError: an unknown score or scope; from `init` and `update`, layers that
      match nothing, shapes that differ, or gradients that are averaged already.
    TypeError: from `init` and `update`, trees that differ.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import gradmimic_jax as gm
    >>> def loss_fn(params, example):
    ...   return (example["x"] @ params["w"] - example["y"]) ** 2
    >>> params, reference = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    >>> optimizer = optax.chain(
    ...   gm.reweight_by_mimic_score(reference), optax.sgd(1e-2))
    >>> state = optimizer.init(params)
    >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.array([2.0, 2.0, 2.0, -2.0])}
    >>> grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)
    >>> updates, state = optimizer.update(grads, state, params)
    >>> optax.apply_updates(params, updates)["w"].round(3)
    Array([0.04, 0.04], dtype=float32)

  References:
    Huang et al., Evaluating Sample Utility for Efficient Data Selection by
    Mimicking Model Weights, `arXiv:2501.06708
    <https://arxiv.org/abs/2501.06708>`_, section 3.
  """
  _validate.choice("scope", scope, SCOPES)
  weigh = weighting_lib.named(
    weighting, temperature=temperature, fraction=fraction
  )
  score_kind = scores_lib.get(score)
  if score_kind.needs_besides:
    raise ValueError(
      f"score is {score_kind.name!r}, which needs {score_kind.needs_besides};"
      " an optax transformation sees gradients only: use"
      " gm.mimic_value_and_grad."
    )

  def init_fn(params):
    _validate.unmasked(params)
    # optax.tree.map_params calls init with a placeholder, not with params, to
    # see which fields are shaped like them: hand the placeholder on.
    if not jax.tree.leaves(params):
      stored = params
    else:
      stored = _mimic_layers(reference, params, layers)
    return ReweightByMimicScoreState(
      count=jnp.zeros([], jnp.int32),
      reference=stored,
      distance=jnp.zeros([], jnp.float32),
      effective_sample_size=jnp.zeros([], jnp.float32),
      nonfinite=jnp.zeros([], jnp.int32),
    )

  def update_fn(updates, state, params=None, *, mask=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        "reweight_by_mimic_score got no params; call update(updates, state,"
        " params): the direction is reference - params."
      )
    size = _validate.per_sample_gradients(updates, params)
    flags = layers_lib.choose(layers, params)
    rows, structure = jax.tree.flatten(_mesh.rows_alike(updates))
    mask = _validate.padding_mask(mask, size, rows[0])
    ours = jax.tree.leaves(params)
    mimic, _ = _problem.split(ours, flags)
    # Of the leaves that are no mimic layers the state holds nothing.
    chosen = jax.tree.unflatten(
      jax.tree.structure(params),
      [
        p if flag else optax.MaskedNode()
        for p, flag in zip(ours, flags, strict=True)
      ],
    )
    stored = _tree.leaves_like(state.reference, chosen)
    if stored is None:
      found = len(jax.tree.leaves(state.reference))
      raise ValueError(
        f"the state holds a reference for {found} mimic layers and"
        f" layers={layers!r} chooses {len(mimic)}, or others; restore a state"
        " with the layers that it was made with."
      )
    unit, distance = directions.normalize(directions.gap(mimic, stored))
    scores = _per_sample.score_rows(
      rows,
      unit,
      flags,
      score_kind,
      mask,
      baseline=score_kind.get_baseline(None, None, state.count, mask),
      step=state.count,
    )
    valid = mask & _per_sample.sound_rows(rows, scores)
    weights = weighting_lib.guarded(weigh, scores, valid, state.count)
    lost = jnp.any(mask) & ~jnp.any(valid)
    leaves = _per_sample.reweight_rows(rows, weights, valid, flags, scope, lost)
    leaves = [_mesh.like(x, p) for x, p in zip(leaves, ours, strict=True)]
    size_now = weighting_lib.effective_sample_size(weights)
    new_state = ReweightByMimicScoreState(
      count=optax.safe_increment(state.count),
      reference=state.reference,
      distance=distance.astype(jnp.float32),
      effective_sample_size=size_now.astype(jnp.float32),
      nonfinite=jnp.sum(mask & ~valid).astype(jnp.int32),
    )
    return jax.tree.unflatten(structure, leaves), new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mimic(
  optimizer: optax.GradientTransformation,
  reference: Any,
  *,
  layers: Layers = None,
  score: str | Score = "projection",
  weighting: str | Weighting = "softmax",
  temperature: Any = None,
  fraction: Any = None,
  scope: str = "all",
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that it takes per-sample gradients.

  `mimic(optimizer, reference) = chain(reweight_by_mimic_score(reference),
  optimizer)`

  Args:
    optimizer: any optax transformation.
    reference: as in `reweight_by_mimic_score`.
    layers: as in `reweight_by_mimic_score`.
    score: as in `reweight_by_mimic_score`.
    weighting: as in `reweight_by_mimic_score`.
    temperature: as in `reweight_by_mimic_score`.
    fraction: as in `reweight_by_mimic_score`.
    scope: as in `reweight_by_mimic_score`.

  Returns:
    An optax transformation over per-sample gradients, leaves `[B, *p]`.

  Raises:
    ValueError: as `reweight_by_mimic_score`.
    TypeError: as `reweight_by_mimic_score`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> import gradmimic_jax as gm
    >>> params, reference = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    >>> optimizer = gm.mimic(optax.sgd(1.0), reference)
    >>> state = optimizer.init(params)
    >>> grads = {"w": jnp.array([[-9.0, -9.0], [9.0, 9.0]])}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> updates
    {'w': Array([9., 9.], dtype=float32)}

  References:
    Huang et al., `arXiv:2501.06708 <https://arxiv.org/abs/2501.06708>`_,
    section 3.
  """
  return optax.chain(
    reweight_by_mimic_score(
      reference,
      layers=layers,
      score=score,
      weighting=weighting,
      temperature=temperature,
      fraction=fraction,
      scope=scope,
    ),
    optimizer,
  )


def _mimic_layers(reference, params, layers):
  """Copies the reference's mimic layers; puts MaskedNode elsewhere."""
  reference = directions.match_params(reference, params)
  flags = layers_lib.choose(layers, params)
  leaves, structure = jax.tree.flatten(reference)
  # A copy, because a donated state would otherwise delete the caller's arrays.
  return jax.tree.unflatten(
    structure,
    [
      jnp.array(leaf, copy=True) if flag else optax.MaskedNode()
      for leaf, flag in zip(leaves, flags, strict=True)
    ],
  )
