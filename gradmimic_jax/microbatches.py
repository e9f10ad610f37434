"""`choose_microbatch_size`: measured once, on the device and model at hand.

Microbatches trade time for memory: smaller ones hold fewer samples' gradients
or tangents at a time, and fill a device less. How much depends on the model,
the engine and the device, so no rule replaces a measurement.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_SHARES = (2, 4, 8)  # of the batch, where no sizes are given


@dataclasses.dataclass(frozen=True)
class MicrobatchSizes:
  """The outcome of `choose_microbatch_size`; its `str` is a table.

  Attributes:
    chosen: the fastest size that fits; None is the whole batch at a time.
    seconds: of a call, by size: the median of the rounds.
    bytes: of a call's temporaries on one device, by size, as compiled; None
      where the compiler doesn't tell.
  """

  chosen: int | None
  seconds: Mapping[int | None, float]
  bytes: Mapping[int | None, int | None]

  def __str__(self) -> str:
    fastest = min(self.seconds.values(), default=1.0)
    lines = ["microbatch_size     seconds   by fastest   temporaries"]
    for size, room in self.bytes.items():
      timed = "    too large           -"
      if size in self.seconds:
        seconds = self.seconds[size]
        timed = f"{seconds:13.4g}{seconds / fastest:12.2f}"
      memory = "-" if room is None else f"{room / 2**20:,.1f} MiB"
      mark = "  <- chosen" if size == self.chosen else ""
      lines.append(f"{size!s:>15}{timed}{memory:>14}{mark}")
    return "\n".join(lines)


def choose_microbatch_size(
  make: Callable[[int | None], Callable[..., Any]],
  *args: Any,
  memory: int | None = None,
  sizes: Sequence[int | None] | None = None,
  rounds: int = 5,
  **kwargs: Any,
) -> MicrobatchSizes:
  """Chooses the microbatch size that is fastest in the memory there is.

  `min over k of seconds(k), for which bytes(k) <= memory`

  Every size is compiled. Those that fit run `rounds` times after one call that
  doesn't count, in turn, so that a device whose speed drifts does no size an
  injustice. A size that the device itself has no room for doesn't fit. Numbers
  are the same for all sizes but for rounding.

  Args:
    make: makes a function for a size, such as `lambda size:
      gm.mimic_value_and_grad(losses_fn, microbatch_size=size)`.
    *args: of that function; a batch of the size that is trained on.
    memory: bytes that a call's temporaries may take on a device; None: as many
      as they like. What the arguments and results take comes on top.
    sizes: candidates; None: the whole batch and a half, a quarter and an eighth
      of it, by the leading axis of the third argument, the batch.
    rounds: timed calls of each.
    **kwargs: of the function.

  Returns:
    MicrobatchSizes; `chosen` goes into `microbatch_size=`, and into
    `config.mimic.microbatch_size` of a job.

  Raises:
    ValueError: no sizes, a size below 1, or none that fits: the message names
      their needs.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return (batch["x"] @ params["w"] - batch["y"]) ** 2
    >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.zeros(8)}
    >>> found = gm.choose_microbatch_size(
    ...   lambda size: gm.mimic_value_and_grad(
    ...     losses_fn, engine="per_sample", microbatch_size=size
    ...   ),
    ...   {"w": jnp.ones(3)},  # params
    ...   {"w": jnp.zeros(3)},  # the reference
    ...   batch,
    ...   sizes=(None, 4),
    ... )
    >>> found.chosen in (None, 4)
    True
  """
  if rounds < 1:
    raise ValueError(f"rounds is {rounds}; expected at least 1.")
  candidates = _candidates(sizes, args)
  compiled: dict[int | None, Any] = {}
  needs: dict[int | None, int | None] = {}
  for size in candidates:
    try:
      program = jax.jit(make(size)).lower(*args, **kwargs).compile()
      needs[size] = need = _count_temporaries(program)
      if memory is None or need is None or need <= memory:
        jax.block_until_ready(program(*args, **kwargs))
        compiled[size] = program
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      needs.setdefault(size, None)
  if not compiled:
    told = ", ".join(
      f"{size}: {'unknown' if need is None else f'{need:,}'}"
      for size, need in needs.items()
    )
    raise ValueError(
      "no microbatch_size fits into"
      f" {'the device' if memory is None else f'{memory:,} bytes'}; their needs"
      f" are {told}. Expected more memory, a smaller size among sizes, or fewer"
      " mimic layers."
    )
  times: dict[int | None, list[float]] = {size: [] for size in compiled}
  for _ in range(rounds):
    for size, program in compiled.items():
      started = time.perf_counter()
      jax.block_until_ready(program(*args, **kwargs))
      times[size].append(time.perf_counter() - started)
  seconds = {size: statistics.median(found) for size, found in times.items()}
  return MicrobatchSizes(min(seconds, key=seconds.__getitem__), seconds, needs)


def _candidates(sizes, args):
  if sizes is None:
    leaves = jax.tree.leaves(args[2:3])
    if not leaves or not jnp.ndim(leaves[0]):
      raise ValueError(
        "sizes is None, and there is no batch to take them from; expected a"
        " batch as the third argument, or sizes."
      )
    rows = leaves[0].shape[0]
    parts = (rows // share for share in _SHARES)
    sizes = (None, *(size for size in parts if size >= 1))
  chosen = tuple(dict.fromkeys(sizes))
  if not chosen or any(size is not None and size < 1 for size in chosen):
    raise ValueError(
      f"sizes is {sizes}; expected at least one, each None or from 1 on."
    )
  return chosen


def _count_temporaries(program):
  found = program.memory_analysis()
  return None if found is None else int(found.temp_size_in_bytes)
