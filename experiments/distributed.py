"""Batches over all devices of all processes, and what comes back to each."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "data"


class Devices:
  """A mesh of one axis, over which a batch's rows are divided.

  Attributes:
    rows: sharding of what has a row a sample; None for a single device.
    count: how many devices there are.
  """

  def __init__(self, count: int, *, batch_size: int):
    """Takes devices.

    Args:
      count: how many; 0 takes all. Several processes must take all.
      batch_size: rows in a batch of all processes.

    Raises:
      ValueError: there are not as many, or they don't divide a batch.
    """
    found = jax.devices()
    self.count = count or len(found)
    if self.count > len(found) or (
      jax.process_count() > 1 and self.count < len(found)
    ):
      raise ValueError(
        f"config.devices is {count}, and there are {len(found)} of"
        f" {jax.process_count()} process(es); expected at most as many, or 0"
        " for all."
      )
    if batch_size % self.count:
      raise ValueError(
        f"config.batch_size is {batch_size} on {self.count} devices; expected"
        " a multiple of their number: change it, or --config.devices."
      )
    self.rows = self._all = self._own_rows = self._own_all = None
    if self.count > 1:
      mesh = self._mesh(found[: self.count])
      self.rows = NamedSharding(mesh, PartitionSpec(AXIS))
      self._all = NamedSharding(mesh, PartitionSpec())
      own = [d for d in found[: self.count] if d in jax.local_devices()]
      mesh = self._mesh(own)
      self._own_rows = NamedSharding(mesh, PartitionSpec(AXIS))
      self._own_all = NamedSharding(mesh, PartitionSpec())

  def put(self, batch: Any) -> Any:
    """This process's rows of a batch, on the devices."""
    if self.rows is None:
      return jax.device_put(batch)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(self.rows, x), batch
    )

  def put_features(self, features: Any) -> Any:
    """As `put`, of a tree with scalars, which every process has alike."""
    return jax.tree.map(
      lambda x: self.put(x) if np.ndim(x) else self.replicate(x), features
    )

  def replicate(self, tree: Any) -> Any:
    """A tree that every process has alike, whole on every device."""
    if self._all is None:
      return jax.device_put(tree)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self._all, np.asarray(x)
      ),
      tree,
    )

  def put_own(self, batch: Any) -> Any:
    """Rows that concern no other process, on this one's devices."""
    if self._own_rows is None:
      return jax.device_put(batch)
    sizes = {len(x) for x in jax.tree.leaves(batch)}
    divided = all(size % self._own_rows.mesh.size == 0 for size in sizes)
    return jax.device_put(batch, self._own_rows if divided else self._own_all)

  def own_copy(self, params: Any) -> Any:
    """Replicated parameters for a program of this process alone."""
    if jax.process_count() == 1:
      return params
    return jax.device_put(jax.device_get(params), self._own_all)

  def _mesh(self, devices):
    return jax.make_mesh(
      (len(devices),), (AXIS,), (AxisType.Auto,), devices=devices
    )


def start(asked: bool) -> None:
  """Meets the other processes of the job, if that is asked for."""
  if asked and not jax.distributed.is_initialized():
    jax.distributed.initialize()


def own_rows(tree: Any) -> Any:
  """Numbers, and of what has a row a sample this process's rows.

  Args:
    tree: of scalars and arrays `[B, ...]`, B the rows of all processes. Where
      the compiler left the latter whole on every device, they are divided here.

  Returns:
    The tree as NumPy arrays.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_own_rows, tree)


def from_first(tree: Any) -> Any:
  """What the first process has, in every process."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)


def _own_rows(array):
  if array.is_fully_replicated:
    whole = np.asarray(array)
    if not whole.ndim:
      return whole
    return np.split(whole, jax.process_count())[jax.process_index()]
  parts = {
    shard.index[0].start or 0: shard.data for shard in array.addressable_shards
  }
  return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])
