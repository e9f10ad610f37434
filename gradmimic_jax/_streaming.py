"""Engines in microbatches: few samples' gradients at a time, same numbers.

A softmax over the whole batch needs no second look at the gradients. With the
highest score so far, `peak`, the sums `sum exp((m_i - peak) / tau) g_i` and
`sum exp((m_i - peak) / tau)` are carried over the microbatches and rescaled
whenever the peak rises; their quotient is the reweighted gradient. Weightings
of another kind take two passes: all scores, then the weighted gradient.

Where a mesh is set (`jax.set_mesh`), each of its devices carries the per-sample
engine's sums of its own, over its own rows of every microbatch, and all meet
once, at the end: gradients are then summed over devices once a step, not once a
microbatch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from gradmimic_jax import (
  _forward,
  _ghost,
  _mesh,
  _per_sample,
  _tree,
  weighting as weighting_lib,
)
from gradmimic_jax._problem import (
  Answer,
  Problem,
  Weigh,
  mean_weights,
  merge,
  split,
)


def answer(problem: Problem, microbatch_size: int, engine: str) -> Answer:
  """Computes scores and losses without a gradient."""
  params, _ = _mesh.for_rows(problem.params, problem.candidates)
  problem = problem._replace(params=params)
  stacked, restore = _stack(problem, microbatch_size)
  found = jax.lax.map(
    lambda part: _prepare(engine, _part(problem, part))[0], stacked
  )
  return restore(found)


def reweighted(
  problem: Problem,
  weigh: Weigh,
  scope: str,
  microbatch_size: int,
  engine: str,
) -> tuple[Answer, jax.Array, list[jax.Array]]:
  """Computes scores, weights `[B]`, and the gradient's leaves."""
  params, back = _mesh.for_rows(problem.params, problem.candidates)
  problem = problem._replace(params=params)
  once = weigh.temperature is not None
  in_passes = _in_one_pass if once else _in_two_passes
  found, weights, leaves = in_passes(
    problem, weigh, scope, microbatch_size, engine
  )
  if engine == "ghost":
    leaves = _forward.without_poison(leaves, found, problem)
  return found, weights, back(leaves)


def _prepare(engine, problem, grouped=None):
  """Computes a microbatch's answer, and gets ready to sum up its gradients.

  Args:
    engine: "per_sample" or "ghost".
    problem: the microbatch's.
    grouped: of the per-sample engine: rows `[M, ...]` by group.

  Returns:
    The answer, and `sums(in_scope, weights [groups, M], plain [groups, M]) ->
    leaves [groups, *p]`.
  """
  if engine == "ghost":
    found, sums = _ghost.prepare(problem, checkpoints=True)

    def one_group(in_scope, weights, plain):
      return [x[None] for x in sums(in_scope, weights[0], plain[0])]

    return found, one_group
  found, rows = _per_sample.dense(problem)

  def by_group(in_scope, weights, plain):
    chosen = [weights if weighted else plain for weighted in in_scope]
    return [
      jax.vmap(_tree.weighted_sum)(
        each, grouped(_tree.where_rows(found.valid, row))
      )
      for row, each in zip(rows, chosen, strict=True)
    ]

  return found, by_group


def _in_one_pass(problem, weigh, scope, microbatch_size, engine):
  stacked, restore = _stack(problem, microbatch_size)
  in_scope = [scope == "all" or flag for flag in problem.flags]
  leaves = jax.tree.leaves(problem.params)
  dtype = _tree.common_dtype(leaves)
  temperature = weighting_lib.in_range(weigh.temperature, dtype)
  groups, names, grouped = _groups(stacked["candidates"], engine)

  def relative(peak, base):
    # Before the first valid sample the peak is -inf and there is nothing to
    # rescale; -inf - -inf would be NaN.
    some = jnp.isfinite(peak)
    peak = jnp.where(some, peak, base)
    found = weighting_lib.relative(peak, base, temperature)
    return jnp.where(some, found, 0)

  def step(carry, part):
    peak, total, count, sums = carry
    found, sums_of = _prepare(engine, _part(problem, part), grouped)
    valid = grouped(found.valid)
    scores = jnp.where(valid, grouped(found.scores.astype(dtype)), -jnp.inf)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    base = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
    rescale = relative(peak, base)
    parts = jnp.where(valid, relative(scores, base[:, None]), 0)
    plain = valid.astype(dtype)
    added = sums_of(in_scope, parts, plain)
    new_sums = []
    for total_so_far, x, weighted in zip(sums, added, in_scope, strict=True):
      if weighted:
        factor = rescale.astype(total_so_far.dtype)
        total_so_far *= _tree.expand_rows(factor, total_so_far.ndim)
      new_sums.append(total_so_far + x.astype(total_so_far.dtype))
    carry = (
      new_peak,
      total * rescale + jnp.sum(parts, axis=1),
      count + jnp.sum(plain, axis=1),
      new_sums,
    )
    return carry, found

  rows = problem.candidates
  zeros = _mesh.full((groups,), 0, dtype, (names,), rows)
  lowest = _mesh.full((groups,), -jnp.inf, dtype, (names,), rows)
  start = lowest, zeros, zeros, _no_sums(leaves, groups, names, rows)
  (peak, total, count, sums), found = jax.lax.scan(step, start, stacked)
  found = restore(found)
  highest = jnp.max(peak)
  shares = relative(peak, jnp.where(jnp.isfinite(highest), highest, 0))
  total = jnp.sum(shares * total)
  lost = problem.lost(found.valid)
  total = jnp.where(total > 0, total, jnp.where(lost, jnp.nan, 1))
  count = jnp.where(lost, jnp.nan, jnp.maximum(jnp.sum(count), 1))
  grads = []
  for x, weighted, leaf in zip(sums, in_scope, leaves, strict=True):
    x = _tree.weighted_sum(shares if weighted else jnp.ones_like(shares), x)
    x /= (total if weighted else count).astype(x.dtype)
    grads.append(x.astype(leaf.dtype))
  return found, weigh(found.scores, found.valid), grads


def _in_two_passes(problem, weigh, scope, microbatch_size, engine):
  found = answer(problem, microbatch_size, engine)
  weights = weigh(found.scores, found.valid)
  plain = mean_weights(found.valid, weights.dtype)
  # Losses don't depend on batch mates here, so a sample of weight 0 may be
  # anything: a copy of a valid one keeps its NaN out of the sum.
  sound = jax.tree.map(
    lambda x: _tree.replace_rows(found.valid, x, found.valid), problem.batch
  )
  split_rows, _ = microbatches(problem.candidates, microbatch_size)
  stacked = (
    jax.tree.map(split_rows, sound),
    split_rows(weights, fill=0),
    split_rows(plain, fill=0),
  )
  leaves = jax.tree.leaves(problem.params)
  groups, names, grouped = _groups(stacked[1], engine)

  def gradient(batch, weights, plain):
    losses, pullback = jax.vjp(
      lambda params: problem.losses_fn(params, batch)[0], problem.params
    )
    (grads,) = pullback(weights.astype(losses.dtype))
    added = jax.tree.leaves(grads)
    if scope == "layers":
      (means,) = pullback(plain.astype(losses.dtype))
      chosen, _ = split(added, problem.flags)
      _, others = split(jax.tree.leaves(means), problem.flags)
      added = merge(chosen, others, problem.flags)
    return added

  def step(sums, part):
    if groups > 1:
      added = jax.vmap(gradient)(*jax.tree.map(grouped, part))
    else:
      added = [x[None] for x in gradient(*part)]
    return [
      total + x.astype(total.dtype)
      for total, x in zip(sums, added, strict=True)
    ], None

  start = _no_sums(leaves, groups, names, found.valid)
  sums, _ = jax.lax.scan(step, start, stacked)
  sums = [jnp.sum(x, axis=0) for x in sums]
  # Without a valid sample there was no sound copy either.
  some = jnp.any(found.valid)
  nothing = jnp.where(problem.lost(found.valid), jnp.nan, 0)
  grads = [
    jnp.where(some, x, nothing.astype(x.dtype)).astype(leaf.dtype)
    for x, leaf in zip(sums, leaves, strict=True)
  ]
  return found, weights, grads


def _groups(stacked, engine):
  """Finds the groups of rows that are summed apart, one for each device.

  Devices are those over which microbatches are divided along explicit axes;
  without such axes, those of the mesh that is set, if they can share a
  microbatch. There is one group if no mesh is set, as jit doesn't show which
  devices a batch is divided over; inside `jax.shard_map`, where each device has
  its own microbatches; and for the ghost engine, whose products sum over rows.

  Args:
    stacked: microbatches `[K, M]`.
    engine: the engine's name.

  Returns:
    The number, the axes' names, and a function of rows `[M, ...]` to groups
    `[groups, M / groups, ...]`.
  """
  microbatch_size = stacked.shape[1]
  names = _mesh.get_axes(stacked)[1]
  mesh = jax.sharding.get_abstract_mesh()
  automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
  count = _mesh.devices(stacked, names)
  if not mesh.empty and automatic and microbatch_size % mesh.size == 0:
    count = mesh.size
  if engine == "ghost":
    count, names = 1, ()

  def grouped(rows):
    return _mesh.reshape(
      rows,
      (count, microbatch_size // count, *rows.shape[1:]),
      (names, (), *_mesh.get_axes(rows)[1:]),
    )

  return count, names, grouped


def _no_sums(leaves, groups, names, rows):
  """Makes zeros `[groups, *p]` to begin with."""
  return [
    _mesh.together(
      _mesh.full(
        (groups, *x.shape),
        0,
        _tree.accumulation_dtype(x.dtype),
        (names, *_mesh.get_axes(x)),
        x,
      ),
      rows,
    )
    for x in leaves
  ]


def _stack(problem, microbatch_size):
  """Cuts the problem's batch into microbatches; also returns the way back."""
  split_rows, restore = microbatches(problem.candidates, microbatch_size)
  size = problem.candidates.size
  for path, leaf in jax.tree_util.tree_leaves_with_path(problem.reference):
    if jnp.shape(leaf)[:1] != (size,):
      name = "/".join(["reference", *filter(None, [_tree.key_path(path)])])
      raise ValueError(
        f"{name} has shape {jnp.shape(leaf)} with score {problem.score.name!r}"
        f" in microbatches; expected a leading axis [{size}], a row for each"
        " sample, or engine='forward'."
      )
  rows = {
    "batch": problem.batch,
    "baseline": problem.baseline,
    "reference": problem.reference,
  }
  stacked = jax.tree.map(split_rows, rows)
  stacked["candidates"] = split_rows(problem.candidates, fill=False)
  return stacked, restore


def _part(problem, part):
  return problem._replace(**part)


def microbatches(
  rows: jax.Array, microbatch_size: int
) -> tuple[Callable[..., jax.Array], Callable[[Any], Any]]:
  """Makes functions of rows `[B, ...]` to microbatches `[K, M, ...]` and back.

  Microbatch k takes rows k, K + k, 2K + k, ...: where the batch axis is sharded
  over devices, whose number divides M, each of them has a share of every
  microbatch, and no row moves. The last microbatches are filled up with copies
  of real rows or with `fill`; rows of a sharded batch then do move.

  Args:
    rows: an array `[B, ...]` that is divided as the batch is.
    microbatch_size: M, at most; B is less, if there are less rows.

  Returns:
    `split(leaf, fill=None)`, and the way back for a tree.
  """
  size = rows.size
  m = min(microbatch_size, size)
  k = -(-size // m)
  extra = k * m - size

  def stack(leaf, fill=None):
    names, *rest = _mesh.get_axes(leaf)
    if extra or m % _mesh.devices(leaf, names):
      leaf = _mesh.divide(leaf, ((), *rest), leaf)
    if extra:
      copies = leaf[:extra]
      if fill is not None:
        copies = jnp.full_like(copies, fill)
      leaf = jnp.concatenate([leaf, copies])
    axes = (_mesh.row_axes(leaf), (), *rest)
    leaf = _mesh.reshape(leaf, (m, k, *leaf.shape[1:]), axes)
    leaf = _mesh.divide(leaf, (names, (), *rest), leaf)
    return jnp.swapaxes(leaf, 0, 1)

  def unstack(leaf):
    leaf = jnp.swapaxes(leaf, 0, 1)
    names, _, *rest = _mesh.get_axes(leaf)
    leaf = _mesh.reshape(leaf, (m * k, *leaf.shape[2:]), (names, *rest))
    if extra:
      leaf = _mesh.divide(leaf, ((), *rest), leaf)[:size]
    return _mesh.rows_like(leaf, rows)

  return stack, lambda tree: jax.tree.map(unstack, tree)
