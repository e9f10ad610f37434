"""Contrastive learning of image-text pairs: the batch's pairs are its labels.

The loss of a pair depends on its batch mates, so only the forward engine
computes its gradient; one pair alone, as the per-sample engine shows it, is
refused. All losses are over the global batch: where the batch is sharded over n
devices, each holds its own B / n rows of the logits `[B, B]`, and the columns'
sums are the only numbers `[B]` that meet.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.models.clip import Features
from experiments.runtime import programs
from experiments.tasks.base import Outputs
from gradmimic_jax import Direction
from gradmimic_jax.scores import Score

Apply = Callable[..., Features]

KINDS = ("clip", "sigmoid")
LARGEST_LOGIT_SCALE = math.log(100.0)
# The logit of a pair that doesn't count: no other is as low, no sum overflows.
_NEVER = -1e30


class _Pairs(NamedTuple):
  """A batch's features, with no row that isn't finite."""

  image: jax.Array  # [B, D]
  text: jax.Array  # [B, D]
  scale: jax.Array  # []
  bias: jax.Array  # []
  counted: jax.Array  # bool [B]: real pairs whose features are finite
  broken: jax.Array  # bool [B]: real pairs whose features are not


@programs.once
def make_losses_fn(
  apply: Apply,
  kind: str = "clip",
  *,
  sharding: jax.sharding.NamedSharding | None = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes the loss per pair, with hits as aux.

  With similarities `s_ij = exp(logit_scale) <image_i, text_j>`,

  `"clip"`: `l_i = (logsumexp_j s_ij + logsumexp_j s_ji) / 2 - s_ii`, the mean
  of the cross-entropies of image i with all texts and of text i with all
  images;

  `"sigmoid"`: `l_i = sum_j softplus(-z_ij (s_ij + logit_bias))`, with `z_ij` 1
  for j = i and -1 otherwise: image i with all texts. The mean over the batch is
  SigLIP's loss.

  The scale is capped at 100: above, its value stays and its gradient goes on,
  so that it finds the way back; see `keep_logit_scale`. Pairs outside the mask
  are nobody's negatives, and pairs with features that are not finite have the
  loss NaN and are nobody's negatives either.

  Args:
    apply: `(params, images [B, H, W, C], tokens [B, T]) -> Features`.
    kind: `"clip"` or `"sigmoid"`.
    sharding: of one row per pair, such as `NamedSharding(mesh, P("data"))`:
      fixes features and logits where the compiler might choose another.

  Returns:
    `losses_fn(params, batch) -> (losses [B], hits bool [B])`, for a batch with
    `image`, `text` (tokens) and, where there is padding, `mask`. Padding has
    loss 0. Hits: no other text is as similar to the image as its own. Calling
    it raises ValueError for a batch of one, and for the sigmoid loss of a model
    without logit_bias.

  Raises:
    ValueError: an unknown kind.

  References:
    Radford et al., `arXiv:2103.00020 <https://arxiv.org/abs/2103.00020>`_,
    section 2.3; Zhai et al., Sigmoid Loss for Language Image Pre-Training,
    `arXiv:2303.15343 <https://arxiv.org/abs/2303.15343>`_, section 3.2.
  """
  if kind not in KINDS:
    raise ValueError(
      f"the kind of contrastive loss is {kind!r}; expected one of"
      f" {', '.join(KINDS)}."
    )

  def losses_fn(params, batch):
    return losses_and_hits(
      _features(apply, params, batch), batch, kind, sharding=sharding
    )

  return losses_fn


def losses_and_hits(
  features: Features,
  batch: Any,
  kind: str = "clip",
  *,
  sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes losses and hits of a batch's features, as `make_losses_fn`.

  Args:
    features: of the batch.
    batch: with `mask` where there is padding.
    kind: as in `make_losses_fn`.
    sharding: as in `make_losses_fn`.

  Returns:
    Losses `[B]` and hits `[B]`.

  Raises:
    ValueError: the sigmoid loss of a model without logit_bias.
  """
  if kind == "sigmoid" and features.logit_bias is None:
    raise ValueError(
      "the model has no logit_bias, which the sigmoid loss learns; set"
      " config.model.clip.logit_bias (SigLIP starts it at -10, and"
      f" logit_scale at {math.log(10):.4g})."
    )
  pairs = _pairs(features, batch.get("mask"), sharding)
  logits = _held(_similarities(pairs.image, pairs.text, pairs), sharding)
  own = jnp.eye(len(logits), dtype=bool)
  seen = (pairs.counted[:, None] & pairs.counted[None]) | own
  matches = jnp.sum(jnp.where(own, logits, 0), axis=1)
  others = jnp.where(seen & ~own, logits, _NEVER)
  hits = matches > jnp.max(others, axis=1)
  if kind == "clip":
    logits = jnp.where(seen, logits, _NEVER)
    rows, columns = (jax.nn.logsumexp(logits, axis=x) for x in (1, 0))
    losses = (rows + columns) / 2 - matches
  else:
    # softplus has a gradient of exactly 0 at _NEVER.
    losses = jax.nn.softplus(-matches) + jnp.sum(
      jax.nn.softplus(others), axis=1
    )
  losses = jnp.where(pairs.counted, losses, 0)
  return jnp.where(pairs.broken, jnp.nan, losses), hits & pairs.counted


@programs.once
def make_outputs(
  apply: Apply,
  kind: str = "clip",
  *,
  sharding: jax.sharding.NamedSharding | None = None,
) -> Outputs:
  """Makes the Outputs of contrastive learning, of `Features`.

  Args:
    apply: the learner's, `(params, images, tokens) -> Features`.
    kind: as in `make_losses_fn`.
    sharding: as in `make_losses_fn`.

  Returns:
    The Outputs.
  """
  measure = functools.partial(losses_and_hits, kind=kind, sharding=sharding)

  def agrees(measured):
    return agreement(
      measured.aux.outputs,
      measured.reference,
      measured.batch,
      kind,
      sharding=sharding,
    )

  return Outputs(
    functools.partial(_features, apply),
    measure,
    toward_similarities(apply, sharding=sharding),
    scores={
      "output_agreement": Score(
        "output_agreement", agrees, needs_aux=True, needs_reference=True
      ),
      "excess_loss": gm.excess_loss(lambda *given: measure(*given)[0]),
    },
    coupled=True,
  )


def toward_similarities(
  apply: Apply, *, sharding: jax.sharding.NamedSharding | None = None
) -> Direction:
  """Direction toward the reference's similarities within the batch.

  `v = -grad mean_i (KL(r_i: || f_i:) + KL(r_:i || f_:i)) / 2`

  with f_i: the learner's distribution of image i over the texts of the batch,
  f_:i that of text i over its images, and r the reference's. `toward_outputs`
  for contrastive models: the reference may be of any architecture, image size
  and width of features.

  Args:
    apply: the learner's, `(params, images, tokens) -> Features`.
    sharding: as in `make_losses_fn`.

  Returns:
    A direction whose `reference` is the reference's `Features` for this batch.
    They don't depend on batch mates, so they may be computed once and stored.
    Pairs outside the mask, and those whose reference features are not finite,
    are in no distribution. Calling it raises TypeError when the
    reference is no Features, and ValueError when they are not of this batch.
  """

  def direction(params, reference, batch, *, mask=None, **kwargs):
    del kwargs
    _check_reference(reference, len(batch["image"]))
    mask = batch.get("mask") if mask is None else mask
    theirs = _pairs(reference, mask, sharding)

    def outputs_fn(params, batch):
      ours = _pairs(_features(apply, params, batch), mask, sharding)
      return _both_ways(ours, theirs.counted & ours.counted, sharding)

    # Two rows a pair: its image's similarities, and its text's.
    return gm.toward_outputs(outputs_fn)(
      params,
      _both_ways(theirs, theirs.counted, sharding),
      batch,
      mask=jnp.repeat(theirs.counted, 2),
    )

  direction.repeats_forward = True  # type: ignore[attr-defined]
  return direction


def agreement(
  features: Features,
  reference: Features,
  batch: Any,
  kind: str = "clip",
  *,
  sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
  """Computes mimic scores in the space of similarities, pair by pair.

  `m_i = (<-dl_i:/df_i:, softmax(r_i:) - softmax(f_i:)> + the same of :i) / 2`

  with f_i: the learner's logits of image i over the texts of the batch, f_:i
  those of text i over its images, r the reference's, and l_i: and l_:i the two
  cross-entropies that pair i's loss is the mean of. The sigmoid loss has images
  over texts only. `toward_similarities` sums over the batch before it looks at
  a pair; here each pair is looked at by itself.

  Args:
    features: the learner's, of the batch.
    reference: the reference's, of any architecture.
    batch: with `mask` where there is padding.
    kind: as in `make_losses_fn`.
    sharding: as in `make_losses_fn`.

  Returns:
    Scores `[B]`, constants; NaN where one's features are not finite.

  Raises:
    TypeError: the reference is no Features.
    ValueError: the reference's features are not of this batch.
  """
  mask = batch.get("mask")
  ours = _pairs(features, mask, sharding)
  _check_reference(reference, len(ours.image))
  theirs = _pairs(reference, mask, sharding)
  counted = ours.counted & theirs.counted
  own = jnp.repeat(jnp.arange(len(counted)), 2)

  def row_losses(logits):
    if kind == "sigmoid":
      is_own = own[:, None] == jnp.arange(len(counted))
      return jnp.sum(
        jax.nn.softplus(jnp.where(is_own, -logits, logits)), axis=1
      )
    return optax.softmax_cross_entropy_with_integer_labels(logits, own)

  found = gm.scores.agreement(
    row_losses,
    _both_ways(ours, counted, sharding),
    _both_ways(theirs, counted, sharding),
  ).reshape(-1, 2)
  scores = found[:, 0] if kind == "sigmoid" else jnp.mean(found, axis=1)
  return jnp.where(ours.broken | theirs.broken, jnp.nan, scores)


def keep_logit_scale(
  largest: float = LARGEST_LOGIT_SCALE,
) -> optax.GradientTransformation:
  """Keeps `params["logit_scale"]` in [0, largest]; the last of a chain.

  After each update the parameter is put back into the range, as is common.

  Args:
    largest: the logarithm of the largest scale; ln 100 is CLIP's.

  Returns:
    A transformation of final updates, which needs params.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(optax.NO_PARAMS_MSG)
    now = params["logit_scale"]
    kept = jnp.clip(now + updates["logit_scale"], 0.0, largest)
    return {**updates, "logit_scale": kept - now}, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _features(apply, params, batch):
  """Computes features of a batch of at least two."""
  if len(batch["image"]) < 2:
    raise ValueError(
      "a contrastive loss was shown a batch of one pair; expected at least two."
      " The per-sample engine (and microbatch_size) shows pairs one at a time,"
      " but their losses depend on batch mates: use engine='forward'."
    )
  return apply(params, batch["image"], batch["text"])


def _check_reference(reference, size):
  if not isinstance(reference, Features):
    raise TypeError(
      f"the reference is a {type(reference).__name__}; expected the reference"
      " model's Features for this batch."
    )
  for name in ("image", "text"):
    there = getattr(reference, name)
    if there is None or there.ndim != 2 or len(there) != size:
      found = "none" if there is None else f"of shape {there.shape}"
      raise ValueError(
        f"the reference's {name} features are {found}; expected [{size}, D],"
        " those of this batch."
      )


def _pairs(features, mask, sharding):
  image, text = (_held(x, sharding) for x in (features.image, features.text))
  finite = jnp.all(jnp.isfinite(image), axis=1) & jnp.all(
    jnp.isfinite(text), axis=1
  )
  mask = jnp.ones_like(finite) if mask is None else mask
  scale = features.logit_scale
  excess = jnp.maximum(scale - LARGEST_LOGIT_SCALE, 0)
  bias = features.logit_bias
  return _Pairs(
    # Zero times NaN is NaN: such a row must not get into the products.
    jnp.where(finite[:, None], image, 0),
    jnp.where(finite[:, None], text, 0),
    jnp.exp(scale - jax.lax.stop_gradient(excess)),
    jnp.zeros_like(scale) if bias is None else bias,
    counted=mask & finite,
    broken=mask & ~finite,
  )


def _similarities(rows, columns, pairs):
  """Computes logits `[B, B]` of features `[B, D]`."""
  # Half precision has too few bits for products that are multiplied by 100.
  products = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
  return pairs.scale * products + pairs.bias


def _both_ways(pairs, counted, sharding):
  """Stacks logits `[2 B, B]`: image 0 over texts, text 0 over images, ..."""
  ways = [
    _held(_similarities(rows, columns, pairs), sharding)
    for rows, columns in ((pairs.image, pairs.text), (pairs.text, pairs.image))
  ]
  logits = jnp.stack(ways, axis=1)
  # Rows stay where they are: a device's pairs are its rows.
  logits = logits.reshape(-1, len(counted))
  return jnp.where(counted[None], logits, _NEVER)


def _held(rows, sharding):
  if sharding is None:
    return rows
  return jax.lax.with_sharding_constraint(rows, sharding)
