"""The ghost engine: scores and gradient from what one backward pass sees.

Where parameters meet data, as in `y = x W`, sample i's gradient is made of what
went in, x_i, and what comes back, `delta_i = d loss_i / d y_i`. No sample needs
a gradient of its own:

  `<-g_i, v> = -<delta_i, x_i V>`,  `sum_i w_i g_i = x^T (w delta)`

since the deltas of sample i only scale with w_i. losses_fn is traced for one
sample. Every operation that has parameters, or what is computed from parameters
alone, beside data among its operands is a site; an identity behind it, whose
derivative is kept, shows its deltas. No primitive has a rule here: JAX's own
`jvp` and `vjp` of the operation stand for `x V` and `x^T delta`, so that sites
need not be linear. A loop over layers (`lax.scan`) is taken apart likewise.

References:
  Goodfellow, Efficient Per-Example Gradient Computations, `arXiv:1510.01799
  <https://arxiv.org/abs/1510.01799>`_; Wang et al., Data Shapley in One
  Training Run, `arXiv:2406.11011 <https://arxiv.org/abs/2406.11011>`_ (the
  "ghost" dot product of two samples' gradients).
"""

import enum
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from gradmimic_jax import _forward, _mesh, _per_sample, _tree
from gradmimic_jax._problem import (
  Answer,
  Problem,
  Weigh,
  mean_weights,
  merge,
  scored,
  split,
)

# Calls whose operations are looked at one by one, and those that compute again.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_CHECKPOINTS = ("checkpoint", "remat", "remat2")
_BILINEAR = ("dot_general", "conv_general_dilated")
# From one small array to a larger one, linear.
_SPREADING = (
  "broadcast_in_dim",
  "convert_element_type",
  "copy",
  "expand_dims",
  "reshape",
  "squeeze",
)
# Single gradients are kept of parameters so many times smaller than what comes
# out where they are used: such as a bias that all tokens share. They cost one
# pass over the deltas, where a score and a gradient cost one each.
_SMALL = 8


def answer(problem: Problem) -> Answer:
  """Computes scores and losses without a gradient."""
  params, _ = _mesh.for_rows(problem.params, problem.candidates)
  found, _ = prepare(problem._replace(params=params))
  return found


def reweighted(
  problem: Problem, weigh: Weigh, scope: str
) -> tuple[Answer, jax.Array, list[jax.Array]]:
  """Computes scores, weights `[B]`, and the gradient's leaves."""
  params, back = _mesh.for_rows(problem.params, problem.candidates)
  problem = problem._replace(params=params)
  found, sums = prepare(problem)
  weights = weigh(found.scores, found.valid)
  in_scope = [scope == "all" or flag for flag in problem.flags]
  plain = mean_weights(found.valid, weights.dtype)
  leaves = _forward.without_poison(
    sums(in_scope, weights, plain), found, problem
  )
  return found, weights, back(leaves)


def prepare(
  problem: Problem, *, checkpoints: bool = False
) -> tuple[Answer, Callable[..., list[jax.Array]]]:
  """Computes the answer, and gets ready to sum up gradients.

  Args:
    problem: the problem.
    checkpoints: whether losses_fn may have `jax.checkpoint`s. What they would
      compute again is kept here.

  Returns:
    The answer, and `sums(in_scope, weights, plain) -> leaves [*p]`, which are
    `sum_i weights_i g_i` of the leaves whose flag is set and `sum_i plain_i
    g_i` of the others.
  """
  leaves, structure = jax.tree.flatten(problem.params)
  rows, batch_structure = jax.tree.flatten(problem.batch)
  traced: list[Any] = []

  def loss_of_one(leaves, sample):
    losses, aux = _per_sample.shown_alone(
      problem.losses_fn,
      jax.tree.unflatten(structure, leaves),
      jax.tree.unflatten(batch_structure, sample),
    )
    aux = jax.tree_util.tree_map_with_path(_per_sample.drop_batch_axis, aux)
    return losses[0], aux

  def trace(sample):
    closed, shapes = jax.make_jaxpr(loss_of_one, return_shape=True)(
      leaves, sample
    )
    closed = _inlined(closed, (*leaves, *sample), checkpoints)
    traced[:] = closed, jax.tree.structure(shapes[1])
    return jnp.zeros([])

  jax.vmap(trace)(rows)
  closed, aux_structure = traced
  level = _Level(
    closed,
    [
      *(_Origin(_Kind.PARAMS, frozenset([flag])) for flag in problem.flags),
      *(_DATA for _ in rows),
    ],
    outputs=1,
  )

  def backward(sample):
    def tapped(taps):
      (loss, *aux), seen = level.run([*leaves, *sample], taps)
      return loss, (aux, seen)

    loss, pullback, (aux, seen) = jax.vjp(tapped, level.taps(), has_aux=True)
    (deltas,) = pullback(jnp.ones_like(loss))
    return loss, aux, seen, deltas

  sites = list(level.sites())
  depths = [len(site.loops) for site in sites]
  losses, aux, seen, deltas = jax.vmap(
    backward, out_axes=(0, 0, depths, depths)
  )(rows)
  uses = _Uses(level, problem.flags, leaves, rows, seen, deltas, losses)
  descents = None
  if problem.score.needs_descents:
    assert problem.unit is not None
    mimic, _ = split(leaves, problem.flags)
    unit = [
      _mesh.like(_mesh.together(u.astype(p.dtype), p), p)
      for u, p in zip(problem.unit, mimic, strict=True)
    ]
    descents = -uses.slopes(unit)

  def sums(in_scope, weights, plain):
    others = [not flag for flag in in_scope]
    means = uses.sums(others, plain) if any(others) else []
    return merge(uses.sums(in_scope, weights), means, in_scope)

  aux = jax.tree.unflatten(aux_structure, aux)
  return scored(problem, losses, aux, descents=descents), sums


class _Kind(enum.Enum):
  """The kinds of values in a traced function."""

  CONSTANT = enum.auto()
  PARAMS = enum.auto()  # a parameter, or made of parameters alone
  DATA = enum.auto()  # hangs on a sample


class _Origin(NamedTuple):
  """The kind of a value, and what it hangs on."""

  kind: _Kind
  flags: frozenset[bool] = frozenset()  # of mimic leaves, of others
  sliced: tuple[bool, ...] = ()  # for each loop around it: differs by turn


_DATA = _Origin(_Kind.DATA)


class _Site(NamedTuple):
  """A place where parameters meet data."""

  call: Callable[..., list[jax.Array]]  # of one sample: (roots, fixed, inputs)
  roots: tuple[Any, ...]  # variables made of parameters, differentiated
  fixed: tuple[Any, ...]  # constants, and integers
  inputs: tuple[Any, ...]  # variables that hang on the sample
  outputs: tuple[int, ...]  # which of the operation's have deltas
  avals: list[Any]  # types of theirs
  flags: frozenset[bool]
  loops: tuple[int, ...]  # lengths of the loops around it
  # For each loop, which roots and which fixed differ by turn.
  sliced: tuple[tuple[list[bool], list[bool]], ...]
  single: bool  # whether each sample's gradient is kept, in place of deltas
  by_input: bool  # whether what goes in is scaled, being smaller


class _Loop(NamedTuple):
  """A loop whose body has sites."""

  eqn: Any
  level: "_Level"
  entries: dict[int, _Site]  # carries that begin as parameters


class _Level:
  """A traced function, or the body of a loop, taken apart."""

  def __init__(
    self,
    closed: jex.ClosedJaxpr,
    origins: Sequence[_Origin],
    *,
    outputs: int | None = None,
    loops: tuple[int, ...] = (),
  ):
    """Finds the sites; outputs are those that have a derivative (None: all)."""
    self._jaxpr, self._consts, self.loops = closed.jaxpr, closed.consts, loops
    self._origins = dict(zip(self._jaxpr.invars, origins, strict=True))
    self._makers: dict[Any, Any] = {}
    self._at: dict[int, _Site | _Loop] = {}
    for n, eqn in enumerate(self._jaxpr.eqns):
      origin = self._combined(eqn.invars)
      for v in eqn.outvars:
        self._origins[v], self._makers[v] = origin, eqn
      kinds = {self._origin(v).kind for v in eqn.invars}
      if {_Kind.DATA, _Kind.PARAMS} <= kinds:
        take = self._loop if eqn.primitive.name == "scan" else self._site
        item = take(eqn)
        if item is not None:
          self._at[n] = item
    self._ends = {
      n: self._end(v)
      for n, v in enumerate(self._jaxpr.outvars[:outputs])
      if self._differentiable(v)
    }
    self._alone = self._needed()

  def sites(self) -> Iterator[_Site]:
    """Iterates over the sites, those of loops among them."""
    for item in self._at.values():
      if isinstance(item, _Loop):
        yield from item.entries.values()
        yield from item.level.sites()
      else:
        yield item
    yield from self._ends.values()

  def taps(self) -> list[list[jax.Array]]:
    """Makes the zeros whose gradients are the deltas of the sites' outputs."""
    return [
      [_zeros(aval, site.loops) for aval in site.avals] for site in self.sites()
    ]

  def run(
    self, inputs: Sequence[Any], taps: list[list[jax.Array]]
  ) -> tuple[list[Any], list[list[Any]]]:
    """Computes the outputs, and what goes into each site."""
    env = self._start(inputs)
    left, seen = iter(taps), []
    for n, eqn in enumerate(self._jaxpr.eqns):
      values = [_read(env, v) for v in eqn.invars]
      item = self._at.get(n)
      if isinstance(item, _Loop):
        some = [next(left) for _ in _sites_of(item)]
        values, theirs = _run_loop(item, values, some)
        seen += theirs
      else:
        values = _bind(eqn, values)
        if item is not None:
          for k, tap in zip(item.outputs, next(left), strict=True):
            values[k] = _tapped(values[k], tap)
          seen.append([_read(env, v) for v in item.inputs])
      env.update(zip(eqn.outvars, values, strict=True))
    outs = [_read(env, v) for v in self._jaxpr.outvars]
    for n in self._ends:
      outs[n] = _tapped(outs[n], next(left)[0])
      seen.append([])
    return outs, seen

  def operands(
    self, inputs: Sequence[Any]
  ) -> tuple[list[list[Any]], list[list[Any]]]:
    """Computes each site's roots and fixed operands, of loops for all turns.

    Args:
      inputs: of the function, None for those that hang on the sample.

    Returns:
      For each site its roots; and for each site its fixed operands.
    """
    env = self._start(inputs)
    for eqn in self._alone:
      values = _bind(eqn, [_read(env, v) for v in eqn.invars])
      env.update(zip(eqn.outvars, values, strict=True))
    roots: list[list[Any]] = []
    fixed: list[list[Any]] = []

    def add(site):
      roots.append([_read(env, v) for v in site.roots])
      fixed.append([_read(env, v) for v in site.fixed])

    for item in self._at.values():
      if isinstance(item, _Site):
        add(item)
        continue
      for site in item.entries.values():
        add(site)
      values = [
        None if self._origin(v).kind is _Kind.DATA else _read(env, v)
        for v in item.eqn.invars
      ]
      found = _loop_operands(item, values)
      roots += found[0]
      fixed += found[1]
    for site in self._ends.values():
      add(site)
    return roots, fixed

  def _start(self, inputs):
    env = dict(zip(self._jaxpr.constvars, self._consts, strict=True))
    return env | dict(zip(self._jaxpr.invars, inputs, strict=True))

  def _origin(self, v):
    if isinstance(v, jex.Literal) or v not in self._origins:
      return _Origin(_Kind.CONSTANT, sliced=(False,) * len(self.loops))
    return self._origins[v]

  def _combined(self, variables):
    origins = [self._origin(v) for v in variables]
    kinds = {origin.kind for origin in origins}
    if _Kind.DATA in kinds:
      return _DATA
    return _Origin(
      _Kind.PARAMS if _Kind.PARAMS in kinds else _Kind.CONSTANT,
      frozenset().union(*(origin.flags for origin in origins)),
      tuple(
        any(origin.sliced[k] for origin in origins)
        for k in range(len(self.loops))
      ),
    )

  def _differentiable(self, v):
    return self._origin(v).kind is _Kind.PARAMS and _inexact(v)

  def _needed(self):
    """Returns the operations on no data that the sites need, in order."""
    wanted: set[Any] = set()
    for item in self._at.values():
      if isinstance(item, _Loop):
        wanted.update(v for v in item.eqn.invars if not _literal(v))
      else:
        wanted.update((*item.roots, *item.fixed))
    for site in self._ends.values():
      wanted.update(site.roots)
    found = []
    for eqn in reversed(self._jaxpr.eqns):
      made = wanted.intersection(eqn.outvars)
      if made and self._combined(eqn.invars).kind is not _Kind.DATA:
        found.append(eqn)
        wanted.update(v for v in eqn.invars if not _literal(v))
    return found[::-1]

  def _site(self, eqn):
    outputs = [k for k, v in enumerate(eqn.outvars) if _inexact(v)]
    size = sum(math.prod(eqn.outvars[k].aval.shape) for k in outputs)
    opaque = _has_custom_vjp(eqn)
    chain, roots, fixed, inputs = [], [], [], []
    for v in dict.fromkeys(v for v in eqn.invars if not _literal(v)):
      if self._origin(v).kind is _Kind.DATA:
        inputs.append(v)
      elif self._differentiable(v):
        makers, root = self._small_root(v, size)
        chain += makers
        roots.append(root)
      else:
        fixed.append(v)
    if not outputs or not roots:
      return None
    roots = list(dict.fromkeys(roots))
    total = sum(math.prod(v.aval.shape) for v in roots)
    is_convolution = eqn.primitive.name == "conv_general_dilated"

    def call(*operands):
      env: dict[Any, Any] = {}
      for variables, values in zip(
        (roots, fixed, inputs), operands, strict=True
      ):
        env.update(zip(variables, values, strict=True))
      for each in (*chain, eqn):
        made = _bind(each, [_read(env, v) for v in each.invars])
        env.update(zip(each.outvars, made, strict=True))
      return [made[k] for k in outputs]

    return self._made(
      call,
      roots,
      fixed,
      inputs,
      outputs,
      [eqn.outvars[k] for k in outputs],
      # A gradient a sample would be a grouped convolution, which is slow.
      single=opaque or (not is_convolution and total * _SMALL <= size),
      by_input=eqn.primitive.name in _BILINEAR
      and len(roots) == len(inputs) == 1
      and math.prod(inputs[0].aval.shape) <= size,
    )

  def _small_root(self, v, size):
    """Returns what a small array is spread from, and the operations between."""
    makers: list[Any] = []
    root = v
    while root in self._makers:
      eqn = self._makers[root]
      sources = [u for u in eqn.invars if self._differentiable(u)]
      if eqn.primitive.name not in _SPREADING or len(sources) != 1:
        break
      makers.insert(0, eqn)
      (root,) = sources
    if math.prod(root.aval.shape) * _SMALL <= size:
      return makers, root
    return [], v

  def _end(self, v):
    """Makes a site of an output, or a loop's entry, that hangs on no data."""
    return self._made(lambda roots, fixed, inputs: roots, [v], [], [], [0], [v])

  def _made(
    self,
    call,
    roots,
    fixed,
    inputs,
    outputs,
    made,
    *,
    single=False,
    by_input=False,
  ):
    origins, others = (
      [self._origin(v) for v in each] for each in (roots, fixed)
    )
    return _Site(
      call=call,
      roots=tuple(roots),
      fixed=tuple(fixed),
      inputs=tuple(inputs),
      outputs=tuple(outputs),
      avals=[v.aval for v in made],
      flags=frozenset().union(*(origin.flags for origin in origins)),
      loops=self.loops,
      sliced=tuple(
        (
          [origin.sliced[k] for origin in origins],
          [origin.sliced[k] for origin in others],
        )
        for k in range(len(self.loops))
      ),
      single=single,
      by_input=by_input and not single,
    )

  def _loop(self, eqn):
    names = ("jaxpr", "num_consts", "num_carry", "length")
    closed, consts, carries, length = (eqn.params[name] for name in names)
    origins = []
    for k, v in enumerate(eqn.invars):
      origin = self._origin(v)
      if consts <= k < consts + carries or origin.kind is _Kind.DATA:
        origins.append(_DATA)
      else:
        sliced = (*origin.sliced, k >= consts + carries)
        origins.append(origin._replace(sliced=sliced))
    carried = eqn.invars[consts : consts + carries]
    entries = {
      k: self._end(v) for k, v in enumerate(carried) if self._differentiable(v)
    }
    level = _Level(closed, origins, loops=(*self.loops, length))
    return _Loop(eqn, level, entries)


class _Uses:
  """The sites with all that a batch's scores and gradient need of them."""

  def __init__(
    self,
    level: _Level,
    flags: Sequence[bool],
    leaves: list[jax.Array],
    rows: list[jax.Array],
    seen: list[list[jax.Array]],
    deltas: list[list[jax.Array]],
    losses: jax.Array,
  ):
    self._nothing = jnp.zeros_like(losses, _tree.common_dtype(leaves))
    self._level, self._sites, self._flags = level, list(level.sites()), flags
    self._leaves, self._data = leaves, [None] * len(rows)
    self._seen, self._deltas = seen, deltas
    operands = zip(*level.operands([*leaves, *self._data]), strict=True)
    self._rows = [
      _single_rows(site, roots, fixed, seen, deltas) if site.single else None
      for site, (roots, fixed), seen, deltas in zip(
        self._sites, operands, seen, deltas, strict=True
      )
    ]

  def slopes(self, unit: list[jax.Array]) -> jax.Array:
    """Computes `<g_i, unit>` over the mimic leaves, `[B]`."""
    roots_of, mimic, live = self._roots_of(self._flags)
    roots, tangents, fixed = jax.jvp(roots_of, (mimic,), (unit,), has_aux=True)
    total = self._nothing
    for k, ours, theirs in zip(live, roots, tangents, strict=True):
      total += self._slope(k, ours, fixed[k], theirs)
    return total

  def sums(self, chosen: list[bool], weights: jax.Array) -> list[jax.Array]:
    """Computes `sum_i weights_i g_i` of the chosen leaves."""
    roots_of, leaves, live = self._roots_of(chosen)
    roots, pullback, fixed = jax.vjp(roots_of, leaves, has_aux=True)
    cotangents = [
      [
        x.astype(root.dtype)
        for x, root in zip(
          self._sum(k, ours, fixed[k], weights), ours, strict=True
        )
      ]
      for k, ours in zip(live, roots, strict=True)
    ]
    return pullback(cotangents)[0]

  def _roots_of(self, chosen):
    """Returns live sites' roots as a function of the chosen leaves."""
    pairs = zip(self._flags, chosen, strict=True)
    flags = {flag for flag, take in pairs if take}
    live = [k for k, site in enumerate(self._sites) if site.flags & flags]
    some, others = split(self._leaves, chosen)

    def roots_of(some):
      leaves = merge(some, others, chosen)
      roots, fixed = self._level.operands([*leaves, *self._data])
      return [roots[k] for k in live], fixed

    return roots_of, some, live

  def _slope(self, k, roots, fixed, tangents):
    site, seen, deltas = self._sites[k], self._seen[k], self._deltas[k]
    dtype = self._nothing.dtype
    if site.single:
      return sum(
        _inner(rows, jnp.expand_dims(t, axis), axis, dtype)
        for (rows, axis), t in zip(self._rows[k], tangents, strict=True)
      )
    axis, of_batch = len(site.loops), _over_batch(site)
    if site.by_input:
      _, pullback = jax.vjp(lambda x: of_batch(tangents, fixed, x), seen)
      ((back,), (x,)) = pullback(deltas)[0], seen
      return _inner(x, back, axis, dtype)
    _, moved = jax.jvp(
      lambda roots: of_batch(roots, fixed, seen), (roots,), (tangents,)
    )
    return sum(
      _inner(t, delta, axis, dtype)
      for t, delta in zip(moved, deltas, strict=True)
    )

  def _sum(self, k, roots, fixed, weights):
    site, seen, deltas = self._sites[k], self._seen[k], self._deltas[k]
    if site.single:
      return [_weighted(weights, rows, axis) for rows, axis in self._rows[k]]
    axis = len(site.loops)
    if site.by_input:
      seen = [_scaled(weights, x, axis) for x in seen]
    else:
      deltas = [_scaled(weights, delta, axis) for delta in deltas]
    if not seen:  # all samples have the same
      deltas = [jnp.sum(x, axis=axis, keepdims=True) for x in deltas]
    of_batch = _over_batch(site)
    _, pullback = jax.vjp(lambda roots: of_batch(roots, fixed, seen), roots)
    return pullback(deltas)[0]


def _over_batch(site):
  """Maps a site's operation over the samples, and over the turns of loops.

  Of a site without data one sample stands for all.
  """

  def call(roots, fixed, inputs):
    if not inputs:
      return [x[None] for x in site.call(roots, fixed, [])]
    return jax.vmap(site.call, in_axes=(None, None, 0))(roots, fixed, inputs)

  return _over_turns(site, call)


def _over_turns(site, call):
  """Maps `call(roots, fixed, data)` over the turns of the loops around."""
  loops = zip(site.loops, site.sliced, strict=True)
  for length, sliced in reversed(list(loops)):
    axes = [[0 if differs else None for differs in each] for each in sliced]
    call = jax.vmap(call, in_axes=(*axes, 0), axis_size=length)
  return call


def _single_rows(site, roots, fixed, seen, deltas):
  """Computes gradients `[B, *p]` by sample, and where their batch axis is."""

  def of_one(roots, fixed, data):
    inputs, deltas = data
    _, pullback = jax.vjp(lambda roots: site.call(roots, fixed, inputs), roots)
    return pullback(deltas)[0]

  of_batch = _over_turns(site, jax.vmap(of_one, in_axes=(None, None, 0)))
  rows = of_batch(roots, fixed, (seen, deltas))
  found = []
  for k, row in enumerate(rows):
    same = tuple(
      loop for loop, (ours, _) in enumerate(site.sliced) if not ours[k]
    )
    found.append((jnp.sum(row, axis=same), len(site.loops) - len(same)))
  return found


def _loop_operands(item, values):
  """Computes the operands of a loop's sites, stacked where turns differ."""
  eqn = item.eqn
  start = eqn.params["num_consts"] + eqn.params["num_carry"]
  sites = list(item.level.sites())
  # Sites of loops within have more loops around them: this one is not last.
  depth = len(item.level.loops) - 1
  out_axes = tuple(
    [
      [0 if differs else None for differs in site.sliced[depth][part]]
      for site in sites
    ]
    for part in (0, 1)
  )
  in_axes = [0 if k >= start else None for k in range(len(values))]
  mapped = jax.vmap(
    lambda *values: item.level.operands(values),
    in_axes=in_axes,
    out_axes=out_axes,
    axis_size=eqn.params["length"],
  )
  return mapped(*values)


def _run_loop(item, values, taps):
  """Runs a loop; what its sites have seen is stacked by turn."""
  names = ("num_consts", "num_carry", "length", "reverse", "unroll")
  consts, carries, length, reverse, unroll = (
    item.eqn.params[name] for name in names
  )
  carry = list(values[consts : consts + carries])
  taps = list(taps)
  for k in item.entries:
    carry[k] = _tapped(carry[k], taps.pop(0)[0])

  def turn(carry, sliced):
    xs, taps = sliced
    outs, seen = item.level.run([*values[:consts], *carry, *xs], taps)
    return outs[:carries], (outs[carries:], seen)

  carry, (ys, seen) = jax.lax.scan(
    turn,
    carry,
    (values[consts + carries :], taps),
    length=length,
    reverse=reverse,
    unroll=unroll,
  )
  return [*carry, *ys], [*([] for _ in item.entries), *seen]


def _sites_of(loop):
  return [*loop.entries.values(), *loop.level.sites()]


@jax.custom_vjp
def _tapped(value, tap):
  """Returns the value; the gradient of the tap is the value's."""
  del tap  # Zeros that are never read: they take no memory in a loop.
  return value


_tapped.defvjp(
  lambda value, tap: (value, None), lambda _, delta: (delta, delta)
)


def _inner(x, y, axis, dtype):
  """Sums the product over all axes but that of the batch, `[B]`."""
  over = tuple(k for k in range(x.ndim) if k != axis)
  return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=over)


def _along(weights, x, axis):
  shape = [1] * x.ndim
  shape[axis] = weights.size
  return weights.reshape(shape)


def _scaled(weights, x, axis):
  """Scales rows; those of weight 0 are 0 even where they are not finite."""
  wide = _tree.to_accumulate(x)
  weights = _along(weights.astype(wide.dtype), x, axis)
  return jnp.where(weights == 0, 0, wide * weights).astype(x.dtype)


def _weighted(weights, rows, axis):
  rows = jnp.where(_along(weights, rows, axis) == 0, 0, rows)
  return _tree.weighted_sum(weights, jnp.moveaxis(rows, axis, 0))


def _inexact(v):
  return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _literal(v):
  return isinstance(v, jex.Literal)


def _zeros(aval, loops):
  """Makes zeros of a type, mesh axes included, stacked by the loops' turns."""

  def make(x):
    return jnp.broadcast_to(jnp.zeros_like(x), (*loops, *aval.shape))

  closed = jax.make_jaxpr(make)(aval)
  env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
  for eqn in closed.jaxpr.eqns:  # none reads x
    values = _bind(eqn, [_read(env, v) for v in eqn.invars])
    env.update(zip(eqn.outvars, values, strict=True))
  return _read(env, closed.jaxpr.outvars[0])


def _read(env, v):
  return v.val if _literal(v) else env[v]


def _bind(eqn, operands):
  options = eqn.primitive.get_bind_params(eqn.params)
  functions = ()
  if isinstance(options, tuple):  # of older JAX
    functions, options = options
  found = eqn.primitive.bind(*functions, *operands, **options)
  return list(found) if eqn.primitive.multiple_results else [found]


def _called(eqn):
  """Iterates over the functions that an operation calls, with constants."""
  for value in eqn.params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(each, "jaxpr", each)
      if hasattr(inner, "eqns"):
        yield inner, getattr(each, "consts", ())


def _has_custom_vjp(eqn):
  """Tells whether an operation has a backward derivative only."""
  return "custom_vjp" in eqn.primitive.name or any(
    _has_custom_vjp(each) for inner, _ in _called(eqn) for each in inner.eqns
  )


def _inlined(closed, args, checkpoints):
  """Returns the function without calls, down into the bodies of loops."""

  def run(jaxpr, consts, *args):
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
      values = [_read(env, v) for v in eqn.invars]
      name = eqn.primitive.name
      if name in _CHECKPOINTS and not checkpoints:
        raise ValueError(
          "losses_fn has a jax.checkpoint, and engine='ghost' keeps what that"
          " would compute again; expected a microbatch_size, which bounds it,"
          " or engine='forward'."
        )
      if name in (*_CALLS, *_CHECKPOINTS):
        (function,) = _called(eqn)
        values = run(*function, *values)
      elif name == "scan":
        body = eqn.params["jaxpr"]
        avals = [v.aval for v in body.jaxpr.invars]
        flat = _inlined(body, avals, checkpoints)
        params = dict(eqn.params, jaxpr=flat)
        values = eqn.primitive.bind(*values, **params)
      else:
        values = _bind(eqn, values)
      env.update(zip(eqn.outvars, values, strict=True))
    return [_read(env, v) for v in jaxpr.outvars]

  return jax.make_jaxpr(functools.partial(run, closed.jaxpr, closed.consts))(
    *args
  )
