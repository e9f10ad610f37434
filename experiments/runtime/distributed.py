"""Several processes and devices: meeting, dividing, agreeing.

Every process runs the same program. Work for one alone (to print, to write a
result, to claim a run) is done by the first, and the others learn the outcome.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from experiments.runtime import sharding

# Seconds; the default of `start`.
HEARTBEAT_TIMEOUT = 40
# Seconds that processes which have finished wait for the last one.
_SHUTDOWN_TIMEOUT = 120
_LONG = 7 * 24 * 3600  # seconds: longer than the first process is ever alone

_meetings = itertools.count()
Result = TypeVar("Result")


def start(
  *,
  detect: bool = False,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
  """Meets the other processes of the job, if there are any.

  Args:
    detect: whether JAX is to find out by itself, as on Cloud TPU, Slurm or Open
      MPI.
    coordinator: "host:port" of the first process. Any of these three makes
      processes meet; JAX finds out those that are None.
    num_processes: number of processes.
    process_id: this process's number.
    heartbeat_timeout: seconds without a sign of life after which a process
      counts as lost, which ends the others; the same in all of them.

  Raises:
    ValueError: a missing value can't be found out, or a number is out of range.
  """
  asked = any(x is not None for x in (coordinator, num_processes, process_id))
  if not (detect or asked) or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"the job's processes can't meet: {error} Expected --distributed on a"
      " cluster that JAX knows, or all of --coordinator=host:port,"
      " --num_processes=N and --process_id=0 .. N-1."
    ) from error


def is_first() -> bool:
  """True in the process that prints and writes for all."""
  return jax.process_index() == 0


class Devices:
  """The mesh of a run, and the ways of its arrays to the devices.

  On a single device there is no mesh: everything stays as it is.

  Attributes:
    mesh: with the axes "data" and "fsdp"; None for a single device.
    rows: sharding of arrays with a row a sample; None for a single device.
    whole: sharding of arrays that every device has whole; None for a single
      device.
    count: number of devices.
    process: this process's number, and the number of processes.
  """

  def __init__(self, sizes: Mapping[str, int], *, batch_size: int):
    """Takes devices.

    Args:
      sizes: `config.mesh`: devices along "data" and "fsdp"; one of them may be
        -1, for all that are left. Several processes must take all.
      batch_size: rows in a batch of all processes.

    Raises:
      ValueError: there are not as many, or they don't divide a batch.
    """
    data, fsdp = _sizes(sizes["data"], sizes["fsdp"])
    self.count = data * fsdp
    if batch_size % self.count:
      raise ValueError(
        f"config.batch_size is {batch_size} on {self.count} devices; expected"
        " a multiple of their number: change it, or --config.mesh.data."
      )
    self.process = (jax.process_index(), jax.process_count())
    self.mesh = self.rows = self.whole = None
    if self.count > 1:
      self.mesh = jax.make_mesh(
        (data, fsdp),
        (sharding.DATA, sharding.FSDP),
        (AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: self.count],
      )
      self.rows = NamedSharding(self.mesh, sharding.ROWS)
      self.whole = NamedSharding(self.mesh, sharding.WHOLE)

  @classmethod
  def alone(cls) -> "Devices":
    """Takes this process's default device, whatever other processes do."""
    devices = cls.__new__(cls)
    devices.count, devices.process = 1, (0, 1)
    devices.mesh = devices.rows = devices.whole = None
    return devices

  def agree(self, here: bool) -> bool:
    """True if `here` is true in every process that takes part."""
    return here if self.process[1] == 1 else agree(here)

  def divided(self, size: int) -> int:
    """Returns the least number of rows from `size` on that devices share."""
    return -(-size // self.count) * self.count

  def shardings(self, tree: Any) -> Any:
    """Makes the shardings of a tree of parameters; None for a single device."""
    if self.mesh is None:
      return None
    return sharding.make_param_shardings(tree, self.mesh)

  def place(self, tree: Any) -> Any:
    """Places parameters that every process has alike, by their own rule."""
    return self._spread(tree, self.shardings)

  def place_whole(self, tree: Any) -> Any:
    """Places a tree that every process has alike, whole on every device."""
    return self._spread(
      tree, lambda tree: jax.tree.map(lambda _: self.whole, tree)
    )

  def place_rows(self, tree: Any) -> Any:
    """Places a tree that every process has alike, rows divided if possible.

    Arrays without rows, or with a number of them that the devices don't divide,
    are whole on every device.
    """

    def choose_sharding(leaf):
      shape = np.shape(leaf)
      return self.rows if shape and shape[0] % self.count == 0 else self.whole

    return self._spread(tree, lambda tree: jax.tree.map(choose_sharding, tree))

  def compute(self, make: Callable[..., Any], *args: Any) -> Any:
    """Computes `make(*args)`, divided as parameters are from the start."""
    if self.mesh is None:
      return make(*args)
    shardings = self.shardings(jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*args)

  def put(self, batch: Any, *, stacked: bool = False) -> Any:
    """Puts this process's rows of a batch on the devices.

    Args:
      batch: arrays `[B, ...]`.
      stacked: whether there are several: `[K, B, ...]`.

    Returns:
      The arrays, of all processes' rows.
    """
    if self.mesh is None:
      return jax.device_put(batch)
    rows = self.rows
    if stacked:
      rows = NamedSharding(self.mesh, PartitionSpec(None, *sharding.ROWS))
    if jax.process_count() == 1:
      return jax.device_put(batch, rows)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(rows, x), batch
    )

  def put_own(self, batch: Any) -> Any:
    """Puts rows on the devices as `put`; on a single device they stay."""
    return batch if self.mesh is None else self.put(batch)

  def place_shared(self, tree: Any) -> Any:
    """Places rows as `place_rows`; on a single device they stay."""
    return tree if self.mesh is None else self.place_rows(tree)

  def _spread(self, tree, make_shardings):
    if self.mesh is None:
      return jax.device_put(tree)
    if jax.process_count() == 1:
      return jax.device_put(tree, make_shardings(tree))
    return jax.tree.map(spread, tree, make_shardings(tree))


def spread(array: Any, to: jax.sharding.Sharding) -> jax.Array:
  """Spreads an array that every process has whole over devices, in parts.

  Args:
    array: anything like an array.
    to: sharding, over the devices of all processes.

  Returns:
    The global array.
  """
  host = np.asarray(array)
  return jax.make_array_from_callback(host.shape, to, lambda at: host[at])


def own_rows(tree: Any) -> Any:
  """Fetches numbers, and of arrays with a row a sample this process's rows.

  Args:
    tree: of scalars and of arrays whose rows are divided as `Devices.rows` has
      it: `[B, ...]` or `[K, B, ...]`, B the rows of all processes.

  Returns:
    The tree as NumPy arrays.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_own_rows, tree)


def _own_rows(array):
  if array.is_fully_replicated:
    return np.asarray(array)
  shards = array.addressable_shards
  starts = [[part.start or 0 for part in shard.index] for shard in shards]
  # The axis that is divided.
  sizes = shards[0].data.shape
  axis = next(i for i, n in enumerate(array.shape) if sizes[i] < n)
  parts = {at[axis]: x.data for at, x in zip(starts, shards, strict=True)}
  return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)], axis)


def stack(trees: list[Any]) -> Any:
  """Stacks the arrays of like trees, where they are: host or devices."""
  return jax.tree.map(
    lambda *xs: _stack(*xs) if isinstance(xs[0], jax.Array) else np.stack(xs),
    *trees,
  )


@jax.jit
def _stack(*arrays):
  return jnp.stack(arrays)


def from_first(tree: Any) -> Any:
  """Sends the first process's arrays to every process; shapes must agree."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)


def agree(here: bool) -> bool:
  """True if `here` is true in every process."""
  if jax.process_count() == 1:
    return bool(here)
  return bool(np.all(multihost_utils.process_allgather(np.bool_(here))))


def gather_texts(text: str) -> list[str]:
  """Gathers a text of each process, in their order, in every process."""
  if jax.process_count() == 1:
    return [text]
  mine = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(mine)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(mine)] = mine
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode()
    for row, size in zip(np.asarray(rows), sizes, strict=True)
  ]


def meet() -> None:
  """Waits until all processes are here, however long they take.

  Unlike a collective this keeps no device waiting, and the end of a process
  that is waited for ends it.
  """
  if jax.process_count() > 1:
    multihost.sync_global_processes(
      f"meeting {next(_meetings)}",
      timeout=_LONG,
      processes=set(range(jax.process_count())),
    )


def by_first(work: Callable[[], Result]) -> Result:
  """Lets the first process do something, while the others wait for it.

  Args:
    work: returns a value that JSON can hold.

  Returns:
    The result, in every process.

  Raises:
    RuntimeError: in the others, where the first one raised an error.
  """
  if jax.process_count() == 1:
    return work()
  told, failure = "", None
  if is_first():
    try:
      told = json.dumps({"result": work()})
    except Exception as error:
      failure, told = error, json.dumps({"error": str(error)})
  meet()
  found = json.loads(gather_texts(told)[0])
  if failure is not None:
    raise failure
  if "error" in found:
    raise RuntimeError(f"the first process has failed: {found['error']}")
  return found["result"]


def _sizes(data, fsdp):
  """Returns the mesh's sides, as numbers."""
  found = jax.device_count()
  named = f"config.mesh is data={data}, fsdp={fsdp}"
  if min(data, fsdp) < -1 or 0 in (data, fsdp) or data == fsdp == -1:
    raise ValueError(
      f"{named}; expected numbers of devices, of which one may be -1, for all"
      " that are left."
    )
  if -1 in (data, fsdp):
    given = max(data, fsdp)
    if found % given:
      raise ValueError(
        f"{named}, and there are {found} devices; expected a number that"
        " divides them."
      )
    data, fsdp = (found // given if x == -1 else x for x in (data, fsdp))
  count, processes = data * fsdp, jax.process_count()
  if count > found or (processes > 1 and count < found):
    raise ValueError(
      f"{named}, and there are {found} devices of {processes} process(es);"
      " expected at most as many, or -1 for all. Several processes take all."
    )
  return data, fsdp
