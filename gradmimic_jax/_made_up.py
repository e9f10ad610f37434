"""Made-up arrays, and programs that run on them while jit traces another.

Under jit an array has a shape and a dtype but no numbers. A function can still
be tried out, on other numbers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Numbers repeat after this many: a prime, so that no two rows are alike.
_PERIOD = 1_048_573
_CONSTRAINT = "sharding_constraint"
_CALLBACKS = ("debug_callback", "debug_print", "io_callback")


def make_shape(leaf: Any, count: int | None = None) -> jax.ShapeDtypeStruct:
  """Returns an array's shape and dtype, with `count` rows in place of its own.

  Random keys among rows become threefry keys: the others that JAX has don't
  draw the same numbers for a key alone and for one among others under `vmap`.
  """
  shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
  if count is not None:
    shape = (count, *shape[1:])
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
      dtype = jax.eval_shape(
        lambda: jax.random.key(0, impl="threefry2x32")
      ).dtype
  return jax.ShapeDtypeStruct(shape, dtype)


def parameter(leaf: Any, rng: np.random.Generator, signed: bool) -> Any:
  """Draws a parameter: matrices that keep a signal's size, vectors around one.

  Args:
    leaf: shape and dtype.
    rng: the source of the numbers.
    signed: whether vectors and scalars may be negative; if not, they will do
      for variances and temperatures too.

  Returns:
    A NumPy array; random keys are a JAX array.
  """
  if len(leaf.shape) > 1:
    # He's bound, by the inputs of kernels (..., in, out).
    fan_in = min(max(int(np.prod(leaf.shape[:-1])), 1), 1024)
    bounds = -((6 / fan_in) ** 0.5), (6 / fan_in) ** 0.5
  else:
    bounds = (-1.0, 1.0) if signed else (0.5, 1.5)
  return _between(bounds, leaf, rng, not signed)


def feature(leaf: Any, rng: np.random.Generator, signed: bool) -> Any:
  """Draws features of samples, in (0, 1) or signed.

  Integers may be labels or tokens: they are 0 or 1. Bools may be a mask: they
  are True, if features are not signed.
  """
  bounds = (-1.7, 1.7) if signed else (0.1, 0.9)
  return _between(bounds, leaf, rng, not signed)


def nudged(tree: Any, by: float) -> Any:
  """Changes every floating-point number of a tree to `x (1 +- by)`."""
  rng = np.random.default_rng(2)

  def nudge(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    signs = np.where(_unit(rng, x.shape) < 0.5, -by, by)
    return (np.asarray(x, np.float64) * (1 + signs)).astype(x.dtype)

  return jax.tree.map(nudge, tree)


def coarsest_eps(jaxpr: Any) -> float:
  """Finds the eps of the coarsest floating dtype in a jaxpr."""
  dtypes = {
    atom.aval.dtype
    for eqn in equations(jaxpr)
    for atom in (*eqn.invars, *eqn.outvars)
    if jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.floating)
  }
  return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


def equations(jaxpr: Any) -> Iterator[Any]:
  """Yields all equations of a jaxpr, those of inner jaxprs too."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in _inner(eqn.params):
      yield from equations(getattr(inner, "jaxpr", inner))


@contextlib.contextmanager
def on_host() -> Iterator[None]:
  """Enters a context in which JAX computes at once, on the host.

  Float32 is float32 there; accelerators multiply matrices in less. Where JAX
  was told to start without a backend for the host, it is the first device.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.ensure_compile_time_eval())
    with contextlib.suppress(RuntimeError):
      host = jax.local_devices(backend="cpu")[0]
      stack.enter_context(jax.default_device(host))
    yield


@contextlib.contextmanager
def apart(mesh: Any = None) -> Iterator[None]:
  """Enters a context without the caller's mesh, debugging switches and guards.

  Args:
    mesh: the abstract mesh of the context; None for no mesh.
  """
  if mesh is None:
    mesh = jax.sharding.AbstractMesh((), ())
  with (
    jax.sharding.use_abstract_mesh(mesh),
    jax.default_matmul_precision("highest"),
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.transfer_guard("allow"),
  ):
    yield


def program(
  closed: Any, consts: Sequence[Any], outputs: Sequence[int]
) -> Callable[..., list[np.ndarray]]:
  """Turns a jaxpr into a function of arrays to NumPy arrays.

  Callbacks that return nothing, such as `jax.debug.print`, are left out, and so
  are sharding constraints.

  Args:
    closed: the ClosedJaxpr.
    consts: constants in place of its own.
    outputs: positions of the outputs to return.

  Returns:
    A function of as many arrays as the jaxpr has inputs.
  """
  jaxpr = _plain(closed.jaxpr)
  if jaxpr.effects:
    raise NotImplementedError(
      f"it has side effects: {', '.join(map(str, jaxpr.effects))}"
    )
  jaxpr = jaxpr.replace(
    constvars=[],
    invars=[*jaxpr.constvars, *jaxpr.invars],
    outvars=[jaxpr.outvars[i] for i in outputs],
    debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
  )
  fn = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
  compiled = jax.jit(fn)
  return lambda *arrays: [np.asarray(x) for x in compiled(*consts, *arrays)]


def _between(bounds, leaf, rng, true):
  low, high = bounds
  unit = _unit(rng, leaf.shape)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return _keys(leaf, rng)
  if leaf.dtype == bool:
    return (unit < 0.5) | true
  if not jnp.issubdtype(leaf.dtype, jnp.inexact):
    return (unit < 0.5).astype(leaf.dtype)
  return (np.float32(low) + np.float32(high - low) * unit).astype(leaf.dtype)


def _unit(rng, shape):
  """Draws numbers in [0, 1)."""
  size = int(np.prod(shape))
  return np.resize(rng.random(min(size, _PERIOD), np.float32), shape)


def copied(array: Any) -> Any:
  """Copies an array to NumPy, wherever it is; random keys to a JAX array."""
  if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    return np.asarray(array)
  data = jnp.asarray(np.asarray(jax.random.key_data(array)))
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))


def _keys(leaf, rng):
  impls = []

  def key_data(keys):
    impls.append(jax.random.key_impl(keys))
    return jax.random.key_data(keys)

  shape = jax.eval_shape(key_data, leaf).shape
  bits = jnp.asarray(rng.integers(2**32, size=shape, dtype=np.uint32))
  return jax.random.wrap_key_data(bits, impl=impls[0])


def _is_jaxpr(x):
  return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))


def _inner(params):
  """The jaxprs among an equation's parameters."""
  leaves = jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
  return [x for x in leaves if _is_jaxpr(x)]


def _plain(x):
  """Drops from jaxprs what `program` leaves out; returns others as they are."""
  # From JAX 0.12 on a jaxpr has its constants in it, and is its own `jaxpr`.
  if isinstance(x, core.ClosedJaxpr) and x.jaxpr is not x:
    return core.ClosedJaxpr(_plain(x.jaxpr), x.consts)
  if not isinstance(x, core.Jaxpr):
    return x
  left_out = [eqn for eqn in equations(x) if _is_left_out(eqn)]
  if not left_out:
    return x
  gone = set().union(*(eqn.effects for eqn in left_out))

  def still(effects, parts):
    there = set().union(*(part.effects for part in parts))
    return {effect for effect in effects if effect not in gone - there}

  (copy,) = jax.make_jaxpr(jnp.copy)(0.0).eqns
  eqns = []
  for eqn in x.eqns:
    if eqn.primitive.name == _CONSTRAINT:
      eqn = eqn.replace(primitive=copy.primitive, params=copy.params)
    elif _is_left_out(eqn):
      continue
    elif _inner(eqn.params):
      params = jax.tree.map(_plain, eqn.params, is_leaf=_is_jaxpr)
      effects = still(eqn.effects, _inner(params))
      eqn = eqn.replace(params=params, effects=effects)
    eqns.append(eqn)
  return x.replace(eqns=eqns, effects=still(x.effects, eqns))


def _is_left_out(eqn):
  name = eqn.primitive.name
  return name == _CONSTRAINT or (name in _CALLBACKS and not eqn.outvars)
