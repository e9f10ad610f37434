"""Arrays on meshes with explicit axes, and inside `jax.shard_map`.

`jax.make_mesh` makes axes explicit: an array's type says along which axes of
the mesh the array is divided, and an operation whose result could be divided in
more than one way is an error unless the caller says which way. This module says
it for the library. Automatic axes are left to the compiler. Off a mesh with
explicit axes, every function here does what its name says of undivided arrays,
and no more.

Inside `jax.shard_map` an array's type says along which axes its values differ
between devices; a loop must begin with the type that it goes on with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# The axes of the mesh that divide each axis of an array; () where none does.
Axes = tuple[tuple[str, ...], ...]


def get_axes(x: Any) -> Axes:
  """Returns the explicit axes of its mesh that divide each axis of `x`."""
  found: list[tuple[str, ...]] = []
  for entry in jax.typeof(x).sharding.spec:
    names = entry if isinstance(entry, tuple) else (entry,)
    found.append(tuple(name for name in names if isinstance(name, str)))
  return tuple(found) + ((),) * (jnp.ndim(x) - len(found))


def row_axes(x: Any) -> tuple[str, ...]:
  """Returns the explicit axes of its mesh that divide the rows of `x`."""
  return get_axes(x)[0]


def divide(x: jax.Array, axes: Axes, on: Any) -> jax.Array:
  """Divides `x` along those of `axes` that fit, of the mesh of `on`.

  Args:
    x: an array.
    axes: the axes of the mesh for each axis of `x`.
    on: an array of that mesh.

  Returns:
    The same values.
  """
  mesh = _explicit_mesh(on)
  if mesh is None:
    return x
  fitting = []
  for size, names in zip(x.shape, axes, strict=True):
    while names and size % _devices(mesh, names):
      names = names[:-1]
    fitting.append(names)
  axes = tuple(fitting)
  if axes == get_axes(x):
    return x
  return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*axes)))


def like(x: jax.Array, other: Any) -> jax.Array:
  """Divides `x` as `other`, an array of its shape, is divided."""
  return divide(x, get_axes(other), other)


def rows_like(x: jax.Array, other: Any) -> jax.Array:
  """Divides the rows of `x [B, ...]` as those of `other [B, ...]` are."""
  names = row_axes(other)
  rest = tuple(_without(a, names) for a in get_axes(x)[1:])
  return divide(x, (names, *rest), other)


def whole(x: jax.Array) -> jax.Array:
  """Gathers `x`, for whatever goes by the order of all its entries."""
  return divide(x, ((),) * x.ndim, x)


def dot(
  x: jax.Array,
  y: jax.Array,
  over: tuple[Sequence[int], Sequence[int]],
  **options: Any,
) -> jax.Array:
  """`jax.lax.dot_general` without batch axes; its result is divided as `x` is.

  Args:
    x: an array.
    y: another.
    over: the axes of each that are summed over.
    **options: for dot_general.

  Returns:
    The free axes of `x`, then those of `y` along axes that `x` doesn't use.
  """
  dimensions = (over, ((), ()))
  mesh = _explicit_mesh(x) or _explicit_mesh(y)
  if mesh is None:
    return jax.lax.dot_general(x, y, dimensions, **options)
  summed = dict(zip(over[1], over[0], strict=True))
  ours = get_axes(x)
  used = tuple(name for names in ours for name in names)
  theirs = tuple(
    ours[summed[axis]] if axis in summed else _without(names, used)
    for axis, names in enumerate(get_axes(y))
  )
  y = divide(y, theirs, x if _explicit_mesh(x) is not None else y)
  free = [a for axis, a in enumerate(ours) if axis not in over[0]]
  free += [a for axis, a in enumerate(theirs) if axis not in over[1]]
  out = NamedSharding(mesh, PartitionSpec(*free))
  return jax.lax.dot_general(x, y, dimensions, out_sharding=out, **options)


def reshape(x: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
  """Reshapes `x`, with the result divided along `axes` where they fit."""
  mesh = _explicit_mesh(x)
  if mesh is None:
    return x.reshape(shape)
  out = NamedSharding(mesh, PartitionSpec(*axes))
  return jax.lax.reshape(x, shape, out_sharding=out)


def flat_rows(x: jax.Array) -> jax.Array:
  """Flattens `x [B, ...]` to `[B, P]`, unless more than its rows is divided."""
  if any(get_axes(x)[1:]):
    return x
  return x.reshape(x.shape[0], -1)


def full(
  shape: tuple[int, ...], fill: Any, dtype: Any, axes: Axes, on: jax.Array
) -> jax.Array:
  """Makes an array of one value to begin a loop with.

  Args:
    shape: its shape.
    fill: its value.
    dtype: its dtype.
    axes: the axes of the mesh of `on` that divide it.
    on: an array that differs between devices as the loop's results do.

  Returns:
    The array.
  """
  return divide(jax.lax.full_like(on, fill, dtype, shape), axes, on)


def devices(x: jax.Array, names: tuple[str, ...]) -> int:
  """Counts the devices of the mesh of `x` along these axes."""
  mesh = _explicit_mesh(x)
  return 1 if mesh is None else _devices(mesh, names)


def together(x: jax.Array, *trees: Any) -> jax.Array:
  """Makes `x` differ between devices wherever a leaf of the trees does.

  Args:
    x: an array, of numbers or bools.
    *trees: inside `jax.shard_map`, the arrays that it is to be used with.

  Returns:
    The same values.
  """
  if not _is_manual():
    return x
  for leaf in jax.tree.leaves(trees):
    if not isinstance(leaf, jax.Array):
      continue
    zero = jax.lax.full_like(leaf, 0, x.dtype, ())
    x = x | zero if x.dtype == bool else x + zero
  return x


def rows_alike(tree: Any) -> Any:
  """Divides the rows of arrays `[B, ...]` as the most divided one's are."""
  leaves = jax.tree.leaves(tree)
  most = max(leaves, key=lambda leaf: devices(leaf, row_axes(leaf)))
  return jax.tree.map(lambda leaf: rows_like(leaf, most), tree)


def for_rows(
  params: Any, rows: jax.Array, *, whole: bool = True
) -> tuple[Any, Callable[[list[jax.Array]], list[jax.Array]]]:
  """Prepares parameters for one gradient a row; also returns the way back.

  A gradient of one row belongs to that row's device. Parameters are gathered
  along the axes that also divide the rows. Parameters that devices have alike
  become each device's own: JAX would otherwise sum over the devices what has to
  be looked at row by row.

  Args:
    params: a tree of arrays.
    rows: `[B, ...]`, an array of the batch that differs between devices as the
      gradients will.
    whole: whether to put parameters together; without `jax.vmap` over rows
      there is no need.

  Returns:
    The parameters, and a function of gradients' leaves that are summed over the
    device's rows, to those that `jax.grad` would give.
  """
  names = row_axes(rows) if whole else ()

  def take(leaves):
    return [
      together(
        divide(x, tuple(_without(a, names) for a in get_axes(x)), x), rows
      )
      for x in leaves
    ]

  leaves, structure = jax.tree.flatten(params)
  if not _is_manual() and not names:
    return params, lambda grads: grads
  taken, back = jax.vjp(take, leaves)

  def sums(grads):
    placed = [like(g, x) for g, x in zip(grads, taken, strict=True)]
    return [like(g, x) for g, x in zip(back(placed)[0], leaves, strict=True)]

  return jax.tree.unflatten(structure, taken), sums


def _explicit_mesh(x):
  """Returns the mesh of `x`; None if none of its axes is explicit."""
  mesh = jax.typeof(x).sharding.mesh
  if AxisType.Explicit not in mesh.axis_types:
    return None
  concrete = not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array)
  return x.sharding.mesh if concrete else mesh


def _devices(mesh, names):
  count = 1
  for name in names:
    count *= mesh.shape[name]
  return count


def _without(names, used):
  return tuple(name for name in names if name not in used)


def _is_manual():
  kinds = jax.sharding.get_abstract_mesh().axis_types
  return AxisType.Manual in kinds
