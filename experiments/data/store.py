"""A source's samples: on the devices, in memory, or decoded each time.

Where they live ("residence") is chosen by size, and changes no batch:

  device   all samples are decoded once and stay on the devices, uint8; steps
           gather their rows. Each of several processes decodes its own part.
  memory   each sample is decoded when it is first asked for, and kept in this
           process's memory.
  stream   each sample is decoded each time.
"""

import collections
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging

from experiments.data import decoding, sources
from experiments.data.pairs import images as images_lib
from experiments.runtime import distributed

RESIDENCES = ("device", "memory", "stream")
# By size: the most bytes of a split on each device, as a share of its memory,
# and on a CPU, where devices and processes share one memory,
DEVICE_SHARE = 1 / 8
CPU_BYTES = 32 << 20
# and in a process's memory, as a share of the machine's.
MEMORY_SHARE = 1 / 64
# Samples that are decoded at once, and of small ones as many as have so many
# bytes: a call of array_record costs as much as some hundred records.
_CHUNK = 64
_CHUNK_BYTES = 1 << 20
_KEPT = 4  # splits, for the next run of this process
_LISTED = 5  # bad images in an error


class BadImagesError(ValueError):
  """More images can't be used than `config.faults.bad_images` allows."""


class BadImages:
  """The images of a source that can't be used: listed, and bounded.

  Attributes:
    found: The reasons, by the images' positions.
  """

  def __init__(self, source: sources.Source, share: float):
    """Starts with none.

    Args:
      source: The images'.
      share: Of the source's images that may be bad.
    """
    if not 0 <= share <= 1:
      raise ValueError(
        f"config.faults.bad_images is {share}; expected a share, 0 to 1"
      )
    self._source, self._share = source, share
    self.found: dict[int, str] = {}

  def add(self, found: Mapping[int, str]) -> None:
    """Adds images; BadImagesError if they are too many."""
    new = {at: text for at, text in found.items() if at not in self.found}
    if not new:
      return
    self.found.update(new)
    for at, reason in new.items():
      logging.warning(
        "image %r of %s is left out (%s).",
        str(self._source.ids[at]),
        self._source,
        reason,
      )
    if len(self.found) <= self._share * len(self._source):
      return
    named = ", ".join(
      f"{str(self._source.ids[at])!r} ({self.found[at]})"
      for at in sorted(self.found)[:_LISTED]
    )
    more = len(self.found) - _LISTED
    raise BadImagesError(
      f"{len(self.found)} of {len(self._source)} images of {self._source} in"
      f" {self._source.where} can't be used: {named}"
      f"{f' and {more} more' if more > 0 else ''}; expected at most a share of"
      f" {self._share:g} (config.faults.bad_images): {self._source.remedy}, or"
      " allow more"
    )

  def share(self, devices: distributed.Devices) -> None:
    """Adds what the other processes have found; all call this at once."""
    if devices.process[1] > 1:
      for text in distributed.gather_texts(json.dumps(self.found)):
        self.add({int(at): reason for at, reason in json.loads(text).items()})

  def listed(self) -> dict[str, str]:
    """Returns the reasons by the images' ids, in the source's order."""
    return {
      str(self._source.ids[at]): self.found[at] for at in sorted(self.found)
    }


class _Decoded:
  """Samples that were decoded, and room for those that were not."""

  def __init__(self, reader: decoding.Reader):
    # The system gives memory to pages when they are written to.
    count = len(reader.source)
    self.samples = np.empty((count, *reader.shape), reader.dtype)
    self.bad: dict[int, str] = {}
    self._there = np.zeros(count, bool)

  def read(self, reader, positions):
    missing = positions[~self._there[positions]]
    if len(missing):
      # Another thread may do the same, and comes to the same.
      missing = np.unique(missing)
      found, bad = reader.read(missing)
      self.bad.update(bad)
      self.samples[missing] = found
      self._there[missing] = True
    bad = {}
    if self.bad:
      bad = {at: self.bad[at] for at in positions.tolist() if at in self.bad}
    return np.take(self.samples, positions, axis=0), bad


# Of this process, so that a study of many runs decodes and counts once.
_kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()


def keep(key: Any, make: Callable[[], Any]) -> Any:
  """Returns what was made for a key; forgets what was used longest ago."""
  if key not in _kept:
    _kept[key] = make()
  _kept.move_to_end(key)
  kind = [other for other in _kept if other[0] == key[0]]
  for other in kind[:-_KEPT]:
    del _kept[other]
  return _kept[key]


class Images:
  """A source's samples, wherever they live.

  Attributes:
    source: The samples'.
    reader: Reads and decodes them.
    shape: Of a sample as a model sees it, [H, W, C] or [D].
    residence: "device", "memory" or "stream".
    threads: That decode.
    bad: Those that can't be used, as far as is known.
  """

  def __init__(
    self,
    source: sources.Source,
    transform: decoding.Transform,
    *,
    residence: str = "auto",
    random_crop: bool = False,
    devices: distributed.Devices | None = None,
    threads: int | None = None,
    bad_share: float = 0.0,
  ):
    """Chooses the residence; decodes nothing but, if need be, one sample.

    Args:
      source: Of the samples.
      transform: What is done to each.
      residence: "auto" chooses by size.
      random_crop: Whether random crops are asked for, which are taken from
        images as they are stored.
      devices: Those of "device"; None: `Devices.alone()`.
      threads: That decode; 0: the thread that asks, None: as many as cores.
      bad_share: Of the images that may be bad.

    Raises:
      ValueError: An unknown residence, or one that has no random crops.
    """
    self.source = source
    self.bad = BadImages(source, bad_share)
    self._devices = devices or distributed.Devices.alone()
    self.threads = cores() if threads is None else threads
    self.reader = decoding.Reader(
      source, transform, self._find_shape(transform)
    )
    self.shape = self.reader.shape
    self.bytes = (
      len(source) * math.prod(self.shape) * self.reader.dtype.itemsize
    )
    self._chunk = max(_CHUNK, _CHUNK_BYTES * len(source) // max(self.bytes, 1))
    self.residence, reason = self._choose(residence, random_crop)
    self._shard: np.ndarray | None = None
    if self.residence == "memory":
      key = ("memory", source.fingerprint, transform)
      self._decoded = keep(key, lambda: _Decoded(self.reader))
    logging.info(
      "%s: %d samples of %s, %.4g MB: %s (%s).",
      source,
      len(source),
      self.shape,
      self.bytes / 1e6,
      self.residence,
      reason,
    )

  def _find_shape(self, transform):
    if transform.channels is not None and transform.size is not None:
      return (transform.size, transform.size, transform.channels)
    if self.source.shape is not None:
      return tuple(self.source.shape)
    for at in range(len(self.source)):
      try:
        return transform.decode(self.source.read([at])[0]).shape
      except images_lib.BadImageError as error:
        self.bad.add({at: str(error)})
    raise ValueError(f"{self.source} has no image that can be read")

  def _choose(self, asked, random_crop):
    if asked not in ("auto", *RESIDENCES):
      raise ValueError(
        f"config.data.residence is {asked!r}; expected 'auto' or one of"
        f" {', '.join(RESIDENCES)}"
      )
    if random_crop and asked in ("device", "memory"):
      raise ValueError(
        f"config.data.residence is {asked!r} and config.data.crop"
        " 'random_resized', whose crops are taken from images as they are"
        " stored; expected 'stream'"
      )
    if asked != "auto":
      return asked, "config.data.residence"
    if random_crop:
      return "stream", "random crops"
    room, agree = device_room(), self._devices.agree
    if agree(self.bytes <= room):
      return "device", f"at most {room / 1e6:.4g} MB"
    if agree(self.bytes <= room * self._devices.count):
      return "device", f"divided: at most {room / 1e6:.4g} MB each"
    limit = MEMORY_SHARE * host_bytes()
    if self.bytes <= limit:
      return "memory", f"at most {limit / 1e6:.4g} MB"
    return "stream", f"more than {limit / 1e6:.4g} MB"

  @property
  def shard(self) -> range:
    """The positions that are this process's own, of all processes' alike."""
    number, count = self._devices.process
    # Devices share rows evenly, so the last process may have fewer samples.
    rows = self._devices.divided(len(self.source)) // count
    last = len(self.source)
    return range(min(number * rows, last), min((number + 1) * rows, last))

  def read(
    self,
    positions: Sequence[int] | np.ndarray,
    draws: np.ndarray | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
  ) -> tuple[np.ndarray, dict[int, str]]:
    """Reads samples into memory, as `decoding.Reader`; counts no bad ones."""
    if self.residence == "memory":
      return self._decoded.read(self.reader, np.asarray(positions, np.int64))
    return self.reader.read(positions, draws, scale)

  def read_own(self, positions: Sequence[int]) -> Iterable[np.ndarray]:
    """Yields samples of this process's `shard`, some at a time; no bad ones."""
    wanted = np.asarray(positions, np.int64)
    chunks = np.split(wanted, range(self._chunk, len(wanted), self._chunk))
    read: Any = self.read
    threads = self.threads
    if self.residence == "device":
      shard, first = self._read_shard(), self.shard.start

      def read(chunk):
        return shard[chunk - first], self.bad.found

      threads = 0
    for chunk, (found, bad) in zip(
      chunks, in_threads(read, chunks, threads), strict=True
    ):
      self.bad.add(bad)
      yield found[[at not in bad for at in chunk.tolist()]]

  @functools.cached_property
  def resident(self) -> jax.Array | None:
    """All samples, on the devices; None unless that is where they live.

    All processes ask for it at once. Rows past the last sample are zeros.
    """
    if self.residence != "device":
      return None
    key = (
      "device",
      self.source.fingerprint,
      self.reader.transform,
      self._devices.mesh,
    )
    array, bad = keep(key, self._place)
    self.bad.add(bad)
    return array

  def _place(self):
    shard, devices = self._read_shard(), self._devices
    self._shard = None
    self.bad.share(devices)
    bad = dict(self.bad.found)
    if devices.mesh is None:
      return jax.device_put(shard), bad
    whole = devices.agree(self.bytes <= device_room())
    if devices.process[1] == 1:
      return jax.device_put(
        shard, devices.whole if whole else devices.rows
      ), bad
    array = jax.make_array_from_process_local_data(devices.rows, shard)
    if whole:
      array = jax.jit(lambda x: x, out_shardings=devices.whole)(array)
    return array, bad

  def _read_shard(self) -> np.ndarray:
    """Decodes this process's rows of the array on the devices."""
    if self._shard is None:
      own = self.shard
      rows = self._devices.divided(len(self.source)) // self._devices.process[1]
      shard = np.zeros((rows, *self.shape), self.reader.dtype)
      starts = range(0, len(own), self._chunk)
      chunks = [own[start : start + self._chunk] for start in starts]
      read = in_threads(self.reader.read, chunks, self.threads)
      for start, (found, bad) in zip(starts, read, strict=True):
        shard[start : start + len(found)] = found
        self.bad.add(bad)
      self._shard = shard
    return self._shard


def in_threads(
  function: Callable[[Any], Any], items: Sequence[Any], threads: int
) -> Iterable[Any]:
  """Yields `function(item)` in order, a few ahead; 0 uses no other thread."""
  if threads < 1 or len(items) < 2:
    yield from map(function, items)
    return
  with futures.ThreadPoolExecutor(min(threads, len(items))) as pool:
    ahead: collections.deque[Any] = collections.deque()
    for item in items:
      ahead.append(pool.submit(function, item))
      if len(ahead) > 2 * threads:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()


def cores() -> int:
  """Counts the cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def device_room() -> float:
  """Bytes of a split that may stay on each device."""
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  return CPU_BYTES if limit is None else DEVICE_SHARE * limit


def host_bytes() -> float:
  """Bytes of memory that this machine, or its container, has."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  try:
    with open("/sys/fs/cgroup/memory.max") as file:
      return min(total, int(file.read()))
  except (OSError, ValueError):
    return total
