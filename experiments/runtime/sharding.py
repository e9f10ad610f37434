"""Rules for dividing arrays over devices, along one of their axes.

The mesh has two axes. A batch's rows are divided over both. Parameters, the
optimizer's state and a reference are divided over "fsdp" by the rule of
`make_spec`, and are whole on each of the devices along "data".
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
ROWS = PartitionSpec((DATA, FSDP))
WHOLE = PartitionSpec()
# Smaller arrays are whole everywhere: dividing them would save nothing.
LEAST_SIZE = 2**16


def make_spec(
  shape: tuple[int, ...], fsdp: int, *, least_size: int = LEAST_SIZE
) -> PartitionSpec:
  """Divides an array along its largest axis that fsdp divides.

  Args:
    shape: the array's.
    fsdp: devices along the axis of that name.
    least_size: elements of the smallest array to divide.

  Returns:
    A spec of "fsdp" at one axis, the last one of those that are equally large;
    or of no axis, if the array is small or no axis can be divided.
  """
  axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or math.prod(shape) < least_size or not axes:
    return WHOLE
  axis = max(axes, key=lambda axis: (shape[axis], axis))
  return PartitionSpec(*[None] * axis, FSDP)


def make_param_shardings(
  tree: Any, mesh: Mesh, *, least_size: int = LEAST_SIZE
) -> Any:
  """Makes a tree of shardings for parameters.

  Args:
    tree: of arrays, or of anything that has a shape.
    mesh: with the axes "data" and "fsdp".
    least_size: as in `make_spec`.

  Returns:
    A like tree of NamedShardings.
  """
  fsdp = mesh.shape[FSDP]
  return jax.tree.map(
    lambda leaf: NamedSharding(
      mesh, make_spec(leaf.shape, fsdp, least_size=least_size)
    ),
    tree,
  )
