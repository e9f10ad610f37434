"""Scores and gradients in float64, one gradient a sample: what is true.

It shares nothing with the library but the choice of layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradmimic_jax as gm

_PART = 8  # samples whose gradients exist at a time


def answers(
  losses_fn: Callable[..., jax.Array],
  params: Any,
  batch: Any,
  directions: dict[str, list[np.ndarray]],
  temperature: float,
) -> dict[str, tuple[np.ndarray, Any]]:
  """Scores and softmax-weighted gradients by vmap(grad) in float64.

  It goes over the batch twice, a few samples at a time, because a large batch's
  float64 gradients would not fit into memory.

  Args:
    losses_fn: `(params, batch) -> losses [B]`.
    params: the learner's parameters.
    batch: leaves `[B, ...]`.
    directions: names and unit vectors: a leaf for each of params.
    temperature: of the softmax.

  Returns:
    For each name the scores `[B]` and the gradient, float64.
  """
  with jax.enable_x64(True):
    params, batch = jax.tree.map(_widen, (params, batch))

    def loss_of_one(params, sample):
      return losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

    rows_of = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0))

    @jax.jit
    def scores_of(params, directions, part):
      rows = jax.tree.leaves(rows_of(params, part))
      return {
        name: -sum(
          jnp.tensordot(row, v, v.ndim)
          for row, v in zip(rows, direction, strict=True)
        )
        for name, direction in directions.items()
      }

    @jax.jit
    def add(sums, params, part, weights):
      rows = rows_of(params, part)
      return {
        name: jax.tree.map(
          lambda total, row, w=w: total + jnp.tensordot(w, row, 1),
          sums[name],
          rows,
        )
        for name, w in weights.items()
      }

    size = len(jax.tree.leaves(batch)[0])
    slices = [slice(i, i + _PART) for i in range(0, size, _PART)]
    parts = [jax.tree.map(lambda x, at=at: x[at], batch) for at in slices]
    found = jax.device_get(
      [scores_of(params, directions, part) for part in parts]
    )
    scores = {
      name: np.concatenate([part[name] for part in found])
      for name in directions
    }
    weights = {name: _softmax(m / temperature) for name, m in scores.items()}
    sums = {name: jax.tree.map(np.zeros_like, params) for name in directions}
    for part, at in zip(parts, slices, strict=True):
      chosen = {name: w[at] for name, w in weights.items()}
      sums = add(sums, params, part, chosen)
    sums = jax.device_get(sums)
  return {name: (scores[name], sums[name]) for name in directions}


def weights_gap(params: Any, reference: Any) -> Any:
  """`reference - params`, float64."""
  return jax.tree.map(lambda p, r: _widen(r) - _widen(p), params, reference)


def outputs_descent(
  outputs_fn: Callable[..., jax.Array], params: Any, targets: Any, batch: Any
) -> Any:
  """Minus the gradient of the mean KL from softmax(targets), float64."""
  with jax.enable_x64(True):
    params, targets, batch = jax.tree.map(_widen, (params, targets, batch))

    @jax.jit
    @jax.grad
    def descent(params):
      p = jax.nn.softmax(targets)
      gaps = jnp.log(p) - jax.nn.log_softmax(outputs_fn(params, batch))
      return -jnp.mean(jnp.sum(p * gaps, axis=-1))

    return jax.device_get(descent(params))


def unit_vector(tree: Any, pattern: str | None) -> list[np.ndarray]:
  """The leaves over their joint norm, 0 outside the mimic layers."""
  flags = gm.layers.choose(pattern, tree)
  leaves = [
    np.asarray(flag * leaf)
    for leaf, flag in zip(jax.tree.leaves(tree), flags, strict=True)
  ]
  norm = np.sqrt(sum(np.sum(v**2) for v in leaves))
  return [v / norm for v in leaves]


def error(ours: Any, exact: Any) -> float:
  """Largest difference of two trees, relative to the largest entry."""
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
  difference = max(
    np.max(np.abs(np.asarray(a, np.float64) - b)) for a, b in pairs
  )
  largest = max(np.max(np.abs(b)) for b in jax.tree.leaves(exact))
  return float(difference / largest)


def _widen(x):
  x = np.asarray(x)
  return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x


def _softmax(x):
  parts = np.exp(x - x.max())
  return parts / parts.sum()
