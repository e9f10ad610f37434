"""`check_reference`: a test of a reference's weights as this learner's guide.

A score is the first-order prediction of what a sample's loss gains on the way
to the reference. Where the reference lies in another basin the prediction is
worthless, or inverted: it is then the mislabelled samples that score highest.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.experimental import multihost_utils

from gradmimic_jax import (
  _mesh,
  _problem,
  _tables,
  _tree,
  _validate,
  directions,
  layers as layers_lib,
)
from gradmimic_jax.gradients import mimic_scores
from gradmimic_jax.layers import Layers

if TYPE_CHECKING:
  import pandas as pd

# Label noise makes mean losses useless: that of a good reference on noisy
# labels is higher than the learner's. So a model's loss is the mean of its
# lowest losses, this share of the samples.
EASIEST = 0.3
# Between references of the learner's own initialisation and others, as
# measured by `experiments.benchmark` (check_reference).
FOREIGN_COSINE = 0.3
FOREIGN_BARRIER = 0.02  # relative
# Relative distances below the rounding of float32 parameters.
_IDENTICAL = 1e-6

ADVICE = {
  "ok": "Its weights can guide this learner.",
  "foreign basin": (
    "Scores toward its weights would be worthless or inverted: start the"
    " learner from the reference's own initialisation, or go by its outputs"
    " alone, with direction=gm.toward_outputs(outputs_fn) or"
    " score='excess_loss'."
  ),
  "not better than the learner": (
    "The learner explains this batch at least as well: use a better reference,"
    " or check on a batch with clean labels that the learner has not seen."
  ),
  "identical": (
    "All scores would be 0: hand over a reference that is ahead of the learner."
  ),
}


@dataclasses.dataclass(frozen=True)
class ReferenceReport:
  """The outcome of `check_reference`; its `str` is made for reading.

  Attributes:
    verdict: `"ok"`, `"foreign basin"`, `"not better than the learner"` or
      `"identical"`.
    advice: what to do about the verdict.
    learner_loss: mean of the lowest 30 % of the learner's losses.
    reference_loss: the same of the reference.
    path: `[K]`, the a of `params + a (reference - params)`, from 0 to 1.
    path_losses: `[K]`, the same at each of them.
    barrier: how far the path's losses rise above the straight line between its
      ends, at most.
    relative_barrier: the same over the higher end's loss; free of the losses'
      units.
    positive_share: share of the scores that are positive.
    mean_score: mean of the scores.
    agreement: rank correlation, in [-1, 1], of the scores with what the
      samples' losses really gain on the way, `l_i(params) - l_i(reference)`;
      NaN if either does not vary.
    descent_cosine: of the mean descent direction with `reference - params`; 0
      if either is 0.
    weight_cosine: of params with the reference, over all leaves of two and more
      axes (over all there are, if there is none); 0 if either is 0.
    relative_distance: `||reference - params|| / ||reference||` over the mimic
      layers.
    num_samples: the number of samples that counted.
  """

  verdict: str
  advice: str
  learner_loss: float
  reference_loss: float
  path: np.ndarray
  path_losses: np.ndarray
  barrier: float
  relative_barrier: float
  positive_share: float
  mean_score: float
  agreement: float
  descent_cosine: float
  weight_cosine: float
  relative_distance: float
  num_samples: int

  def to_arrow(self) -> pa.Table:
    """One row, a column a field; `path` and `path_losses` are lists."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return pa.table({name: pa.array([value]) for name, value in fields.items()})

  def to_pandas(self) -> pd.DataFrame:
    """One row, as a pandas DataFrame."""
    return _tables.to_pandas(self.to_arrow())

  def _repr_html_(self) -> str:
    return _tables.html(self)

  def __repr__(self) -> str:
    return f"<ReferenceReport: {self.verdict}, {self.num_samples} samples>"

  def __str__(self) -> str:
    """Verdict, advice and a table."""
    # A few of the points, both ends among them, to fit a line.
    shown = np.linspace(0, len(self.path) - 1, min(6, len(self.path)))
    path = " ".join(f"{self.path_losses[int(i)]:.3g}" for i in shown)
    rows = (
      ("loss of the learner", f"{self.learner_loss:.4g}"),
      ("loss of the reference", f"{self.reference_loss:.4g}"),
      ("losses from one to the other", path),
      (
        "barrier between them",
        f"{self.barrier:.3g}, {self.relative_barrier:.3g} of the higher loss",
      ),
      ("cosine of the two models' weights", f"{self.weight_cosine:.3f}"),
      ("relative distance of weights", f"{self.relative_distance:.3f}"),
      ("cosine of descent and direction", f"{self.descent_cosine:.3f}"),
      ("scores above zero", f"{self.positive_share:.0%}"),
      ("mean score", f"{self.mean_score:.4g}"),
      (
        "scores and true gains agree",
        "no telling: one of them does not vary"
        if np.isnan(self.agreement)
        else f"{self.agreement:.3f}",
      ),
    )
    lines = [
      *textwrap.wrap(f"reference: {self.verdict}. {self.advice}", 80),
      *(f"  {name:<36}{value}" for name, value in rows),
      f"  ({self.num_samples} samples; a loss is the mean of the lowest"
      f" {EASIEST:.0%})",
    ]
    return "\n".join(lines)


def check_reference(
  losses_fn: Callable[..., Any],
  params: Any,
  reference: Any,
  batch: Any,
  *,
  layers: Layers = None,
  mask: jax.Array | None = None,
  num_points: int = 11,
  engine: str = "auto",
  has_aux: bool = False,
  **kwargs: Any,
) -> ReferenceReport:
  """Tests if a reference's weights can guide this learner.

  `l(params + a (reference - params))` for a in [0, 1], and the scores that the
  samples of the batch would get.

  A reference lies in a foreign basin if a barrier parts it from the learner and
  their weights have nothing in common: that of another initialisation, of the
  same accuracy or not. Labels may be noisy, as long as more than the easiest
  30 % are right. Call it before the first step, with a few hundred samples.

  Args:
    losses_fn: as in `mimic_value_and_grad`.
    params: the learner's parameters.
    reference: a parameter tree like params.
    batch: leaves `[B, ...]`.
    layers: the mimic layers, as in `mimic_value_and_grad`.
    mask: bool `[B]`, False for padding.
    num_points: on the path, both ends included.
    engine: as in `mimic_value_and_grad`.
    has_aux: whether losses_fn returns `(losses, aux)`.
    **kwargs: for losses_fn.

  Returns:
    A ReferenceReport.

  Raises:
    ValueError: shapes that don't fit, fewer than 3 points, or no sample with a
      finite loss.
    TypeError: trees that differ.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return (batch["x"] @ params["w"] - batch["y"]) ** 2
    >>> batch = {"x": jnp.eye(3), "y": jnp.array([1.0, 2.0, 3.0])}
    >>> params, reference = {"w": jnp.zeros(3)}, {"w": batch["y"]}
    >>> gm.check_reference(losses_fn, params, reference, batch).verdict
    'ok'

  References:
    The barrier: Frankle et al., Linear Mode Connectivity and the Lottery Ticket
    Hypothesis, `arXiv:1912.05671 <https://arxiv.org/abs/1912.05671>`_.
  """
  _validate.positive_int("num_points", num_points)
  if num_points < 3:
    raise ValueError(
      f"num_points is {num_points}; expected at least 3: both ends and a point"
      " between them."
    )
  reference = directions.match_params(reference, params)
  gap = directions.gap(params, reference)
  losses_of, arrays = _bind_losses(losses_fn, has_aux, kwargs)
  flags = tuple(layers_lib.choose(layers, params))
  size = _validate.batch_size(batch)
  batch, candidates = _problem.mend_rows(
    jax.tree.map(jnp.asarray, batch), _validate.padding_mask(mask, size)
  )
  scores, valid, geometry = _fetch(
    _at_params(
      (losses_of, flags, engine), arrays, params, reference, batch, candidates
    )
  )
  if not valid.any():
    raise ValueError(
      f"none of the {valid.size} samples has a finite loss and score; check the"
      " batch, the mask, params and the reference."
    )
  path = np.linspace(0, 1, num_points)
  losses = np.stack(
    _fetch(
      [
        _losses_at(losses_of, arrays, np.float32(a), params, gap, batch)
        for a in path
      ]
    )
  )
  losses, scores = losses[:, valid].astype(float), scores[valid].astype(float)
  # On its way a loss may overflow: that is as high as a barrier gets.
  losses = np.where(np.isfinite(losses), losses, np.inf)
  path_losses = _easiest(losses)
  with np.errstate(invalid="ignore"):
    line = (1 - path) * path_losses[0] + path * path_losses[-1]
    barrier = float(np.max(path_losses - line))
    higher = np.max(np.abs(path_losses[[0, -1]]))
    relative_barrier = barrier / higher if higher > 0 else barrier
    gains = losses[0] - losses[-1]
  facts: dict[str, Any] = {
    "learner_loss": float(path_losses[0]),
    "reference_loss": float(path_losses[-1]),
    "path": path,
    "path_losses": path_losses,
    "barrier": barrier,
    "relative_barrier": relative_barrier,
    "positive_share": float(np.mean(scores > 0)),
    "mean_score": float(np.mean(scores)),
    "agreement": _rank_correlation(scores, gains),
    "num_samples": int(valid.sum()),
    **{name: float(value) for name, value in geometry.items()},
  }
  verdict = _verdict(**facts)
  return ReferenceReport(verdict=verdict, advice=ADVICE[verdict], **facts)


def _fetch(tree):
  """The tree as NumPy arrays, whole in each process that holds a part."""
  if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


@dataclasses.dataclass(frozen=True)
class _BoundLosses:
  """A function `(params, batch, arrays) -> losses [B]`.

  Two of them are equal if they were made of the same function and keyword
  arguments, so that a second check is not compiled again.
  """

  losses_fn: Callable[..., Any]
  has_aux: bool
  structure: Any  # of the keyword arguments
  constants: tuple[Any, ...]  # their leaves; None for arrays

  def __call__(self, params, batch, arrays):
    advice = "Pass has_aux=True if it returns (losses, aux)."
    leaves = [
      array if constant is None else constant
      for constant, array in zip(self.constants, arrays, strict=True)
    ]
    kwargs = jax.tree.unflatten(self.structure, leaves)
    plain = _problem.plain_losses_fn(
      self.losses_fn, self.has_aux, kwargs, advice
    )
    return plain(params, batch)[0]


def _bind_losses(losses_fn, has_aux, kwargs):
  """Makes a hashable `_BoundLosses`; also the arrays among its arguments."""
  leaves, structure = jax.tree.flatten(kwargs)
  # Text and objects are no arrays for JAX, even within NumPy's.
  is_array = [
    isinstance(x, (jax.Array, np.ndarray)) and _validate.is_array(x)
    for x in leaves
  ]
  constants = tuple(
    None if flag else x for x, flag in zip(leaves, is_array, strict=True)
  )
  arrays = [
    x if flag else None for x, flag in zip(leaves, is_array, strict=True)
  ]
  found = _BoundLosses(losses_fn, has_aux, structure, constants)
  try:
    hash(found)
  except TypeError:  # a callable object or a constant that can't be compared
    return functools.partial(found.__call__), arrays  # equal to itself only
  return found, arrays


@functools.partial(jax.jit, static_argnums=0)
def _losses_at(losses_of, arrays, a, params, gap, batch):
  """Computes losses `[B]` at `params + a gap`."""

  def between(p, v):
    return (_tree.to_accumulate(p) + a.astype(v.dtype) * v).astype(p.dtype)

  params = jax.tree.map(between, params, gap)
  return _tree.to_accumulate(losses_of(params, batch, arrays))


@functools.partial(jax.jit, static_argnums=0)
def _at_params(how, arrays, params, reference, batch, candidates):
  """Computes scores `[B]`, which of them count, and the geometry by names."""
  losses_of, flags, engine = how
  losses_fn = functools.partial(losses_of, arrays=arrays)
  layers = jax.tree.unflatten(jax.tree.structure(params), flags)
  scores_fn = mimic_scores(losses_fn, layers=layers, engine=engine)
  found = scores_fn(params, reference, batch, mask=candidates)
  valid = candidates & jnp.isfinite(found.scores)
  geometry = _geometry(losses_fn, flags, params, reference, batch, valid)
  return found.scores, valid, geometry


def _verdict(
  *,
  relative_distance,
  weight_cosine,
  relative_barrier,
  learner_loss,
  reference_loss,
  **_,
):
  if relative_distance < _IDENTICAL:
    return "identical"
  # A barrier alone is not enough, nor are unrelated weights: convex models
  # have no barriers, and a weak reference of the same initialisation may.
  related = weight_cosine > FOREIGN_COSINE
  if relative_barrier > FOREIGN_BARRIER and not related:
    return "foreign basin"
  if reference_loss >= learner_loss:
    return "not better than the learner"
  return "ok"


def _easiest(losses):
  """Computes the mean of the lowest share of losses `[K, N]`, `[K]`."""
  count = max(1, int(EASIEST * losses.shape[1]))
  return np.sort(losses, axis=1)[:, :count].mean(axis=1)


def _geometry(losses_fn, flags, params, reference, batch, valid):
  """Computes cosines and the relative distance, over the mimic layers."""

  def mean_loss(params):
    losses = _tree.to_accumulate(losses_fn(params, batch))
    weights = _problem.mean_weights(valid, losses.dtype)
    return jnp.sum(weights * jnp.where(valid, losses, 0))

  def mimic(tree):
    leaves, _ = _problem.split(jax.tree.leaves(tree), list(flags))
    return [_tree.to_accumulate(leaf) for leaf in leaves]

  descent = [-g for g in mimic(jax.grad(mean_loss)(params))]
  ours, theirs = mimic(params), mimic(reference)
  theirs = [_mesh.like(r, p) for p, r in zip(ours, theirs, strict=True)]
  gap = [r - p for p, r in zip(ours, theirs, strict=True)]
  distance = _tree.norm(gap)
  distance = jnp.where(distance == 0, 0, distance / _tree.norm(theirs))
  return {
    "descent_cosine": _cosine(descent, gap),
    "weight_cosine": _weight_cosine(params, reference),
    "relative_distance": distance,
  }


def _weight_cosine(params, reference):
  """Computes the cosine over all leaves: a basin is the whole model's."""
  ours, theirs = (
    [_tree.to_accumulate(leaf) for leaf in jax.tree.leaves(tree)]
    for tree in (params, reference)
  )
  # Biases and scales start alike in every initialisation.
  if any(leaf.ndim > 1 for leaf in ours):
    ours, theirs = ([x for x in xs if x.ndim > 1] for xs in (ours, theirs))
  return _cosine(ours, theirs)


def _cosine(first, second):
  # Each is scaled to length one first: products of huge or tiny entries may be
  # out of range. A zero vector agrees with nothing.
  units = [directions.normalize(leaves)[0] for leaves in (first, second)]
  return _tree.inner_product(*units)


def _rank_correlation(x, y) -> float:
  """Computes Spearman's rank correlation, ties at their mean rank."""
  ranks = [_ranks(values) for values in (x, y)]
  if any(np.ptp(r) == 0 for r in ranks):
    return float("nan")
  return float(np.corrcoef(ranks)[0, 1])


def _ranks(values):
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return (last - (counts - 1) / 2)[place]
