"""Batches of image-text pairs streamed from webdataset shards.

Shards are read in place: a header at a time, seeking past samples that a filter
leaves out, each shard by one process. The `webdataset` package was read and not
taken: its pipelines have no state to save, so a run can't go on with the very
next sample; it reads members of any size into memory (a sparse member claims
terabytes in 512 bytes), opens names that start with "pipe:" as shell commands,
and takes the rest of a damaged shard for its end. This module has a grain
iterator instead: checkpoints hold its state as they hold that of any other.

The order is one of windows. Shards are permuted, consecutive samples in them
are collected into windows, and each window is permuted; both permutations are
drawn from the seed and the place. So the state is that place, a few numbers,
and a restored stream reads one window again to go on exactly.

A batch is a dict of NumPy arrays:

  image  uint8 [B, S, S, 3]
  text   int32 [B, L], the captions' tokens
  uid    str [B], 32 hexadecimal digits, "" for padding; none twice in a batch
  index  int64 [B], the sample's place in this process's stream (with several
         readers, a number of its own there), -1 for padding
  mask   bool [B], False for padding
"""

import concurrent.futures
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from experiments.data import purposes
from experiments.data.pairs import (
  images,
  readers as readers_lib,
  shard_files,
  shard_samples,
)
from experiments.data.pairs.shard_samples import Parts, Sample, Statistics
from experiments.data.pairs.windows import Place, Window, Windows
from experiments.data.rows import check_state
from experiments.runtime import limits as limits_lib

Tokenizer = Callable[[list[str]], np.ndarray]

# Before this many, a few broken samples are a large share.
_ENOUGH = 1000


class ShardStream(grain.IterDataset):
  """Pairs from shards, shuffled, filtered, decoded and batched.

  Guarantees:
    * The same arguments give the same batches, bit for bit, whatever the number
      of threads, and after a restore at any batch.
    * A reader that dies is an error within seconds.
    * A broken sample or shard is counted in `statistics` and passed over. Only
      if their share is above `max_broken_share` is it an error.
    * Each shard is read by one process an epoch, each sample of it once. No
      uid is twice in a batch: of copies that meet there, and of samples of two
      epochs at the turn, the second is left out and counted.
    * Nothing is written to disk, and no limit of `limits` is exceeded.

  Each process goes through its own shards: processes may differ in how many
  samples an epoch has. Run for a number of steps, not of epochs.

  Args:
    shards: Paths, folders or patterns; see `shard_files.expand`.
    tokenizer: `(captions [n]) -> int [n, L]`; it cuts what is too long.
    batch_size: Rows in a batch of this process, B.
    image_size: Height and width of the images in pixels, S.
    seed: Not negative; None reads everything in its order, for evaluation.
    num_epochs: Epochs to read; None goes on for ever. The last batch is padded.
    keep: Uids to keep: the path of a DataComp subset file, a Filter, or uids;
      None keeps all.
    window: Samples that are shuffled at once, held in memory as stored.
    uid_source: "json", or "name" for shards that have no uids.
    parts: Files that make a sample: extensions of images, captions and JSON,
      and the JSON's field for captions; see `shard_samples.Parts`.
    process_index: This process's number.
    process_count: Number of processes.
    max_broken_share: Share of broken samples above which reading stops, once
      a thousand have been looked at or an epoch is over.
    num_threads: Decoding threads, of each reader; 0 decodes in place. With
      some, one more reads the next window.
    readers: Processes that read, each shards of its own, whose batches come in
      turn: another number is another order. 0 reads in this one, in the order
      of 1.
    limits: Bounds on the files' claims.

  Raises:
    FileNotFoundError: If a shard is not there.
    TypeError: If `parts` is something else.
    ValueError: If a value is out of range, or there are fewer shards than
      processes. While reading: if too much is broken, or nothing is left.
  """

  def __init__(
    self,
    shards: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    image_size: int,
    seed: int | None,
    num_epochs: int | None = None,
    keep: Any = None,
    window: int = 4096,
    uid_source: str = "json",
    parts: Parts = shard_samples.PARTS,
    process_index: int = 0,
    process_count: int = 1,
    max_broken_share: float = 0.1,
    num_threads: int = 8,
    readers: int = 0,
    limits: limits_lib.Limits = limits_lib.DEFAULT,
  ):
    super().__init__()
    for name, value, least in (
      ("batch_size", batch_size, 1),
      ("image_size", image_size, 1),
      ("seed", 0 if seed is None else seed, 0),
      ("num_epochs", 1 if num_epochs is None else num_epochs, 1),
      ("window", window, 1),
      ("process_count", process_count, 1),
      ("num_threads", num_threads, 0),
      ("readers", readers, 0),
    ):
      if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= process_index < process_count:
      raise ValueError(
        f"process_index must lie in 0 .. {process_count - 1}, got"
        f" {process_index}"
      )
    if not 0 <= max_broken_share <= 1:
      raise ValueError(
        f"max_broken_share must lie in [0, 1], got {max_broken_share}"
      )
    if not isinstance(parts, Parts):
      raise TypeError(f"parts must be shard_samples.Parts, got {parts!r}")
    self.paths = _expand(shards, uid_source)
    if len(self.paths) < process_count * max(readers, 1):
      each = f" of {readers} readers each" if readers > 1 else ""
      raise ValueError(
        f"{len(self.paths)} shards for {process_count} processes{each};"
        " expected at least one for each: write smaller shards"
      )
    self.tokenizer = tokenizer
    self.batch_size, self.image_size = batch_size, image_size
    self.seed, self.num_epochs = seed, num_epochs
    self.keep = None if keep is None else shard_samples.kept_uids(keep)
    self.window, self.uid_source, self.parts = window, uid_source, parts
    self.process_index, self.process_count = process_index, process_count
    self.max_broken_share, self.num_threads = max_broken_share, num_threads
    self.limits = limits
    self.readers = readers
    self.fingerprint = self._fingerprint()

  def __iter__(self) -> "ShardIterator | readers_lib.ReadersIterator":
    if self.readers:
      return readers_lib.ReadersIterator(self)
    return ShardIterator(self)

  def split(self) -> "list[ShardStream]":
    """Makes the stream of each reader."""
    count = max(self.readers, 1)
    found = []
    for number in range(count):
      part = copy.copy(self)
      part.process_index = self.process_index * count + number
      part.process_count = self.process_count * count
      part.readers = 0
      part.fingerprint = part._fingerprint()
      found.append(part)
    return found

  def order(self, epoch: int) -> list[str]:
    """Returns the shards that this process reads in an epoch, in order."""
    numbers = np.arange(len(self.paths))
    if self.seed is not None:
      rng = np.random.default_rng((self.seed, purposes.SHARDS, epoch))
      numbers = rng.permutation(numbers)
    mine = numbers[self.process_index :: self.process_count]
    return [self.paths[number] for number in mine]

  def _fingerprint(self) -> str:
    """Hashes the arguments that decide which samples come when; no folders."""
    settings = {
      "shards": [[os.path.basename(p), os.path.getsize(p)] for p in self.paths],
      "batch_size": self.batch_size,
      "image_size": self.image_size,
      "seed": self.seed,
      "num_epochs": self.num_epochs,
      "window": self.window,
      "uid_source": self.uid_source,
      "process": [self.process_index, self.process_count],
      "parts": repr(self.parts),
      "limits": repr(self.limits),
    }
    if self.readers:
      settings["readers"] = self.readers
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(b"all" if self.keep is None else self.keep.tobytes())
    return digest.hexdigest()[:32]


class ShardIterator(grain.DatasetIterator):
  """Goes through a `ShardStream`; its state is a small JSON dict.

  Attributes:
    statistics: Counts so far; restored with the state.
    epoch: The pass over the shards in which the last batch began.
  """

  def __init__(self, stream: ShardStream):
    """Starts at the beginning."""
    super().__init__()
    self._stream = stream
    self._pool = None
    if stream.num_threads:
      self._pool = concurrent.futures.ThreadPoolExecutor(stream.num_threads)
    self._windows = Windows(stream, ahead=stream.num_threads > 0)
    self._start_at(Place(0, 0, 0), Statistics(), samples_before_epoch=0)

  def _start_at(self, place, statistics, samples_before_epoch):
    self.statistics = statistics
    self._samples_before_epoch = samples_before_epoch
    self._window: Window | None = None  # None: not read yet.
    self._taken = 0  # Of the window.
    self._place = place  # Where the window begins.
    self.epoch = place.epoch

  def get_state(self) -> dict[str, Any]:
    """Returns the stream's place, for `set_state`."""
    return {
      "fingerprint": self._stream.fingerprint,
      "place": list(self._place),
      "has_window": self._window is not None,
      "taken": self._taken,
      "samples_before_epoch": self._samples_before_epoch,
      "statistics": self.statistics.as_dict(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Sets the stream to a place.

    Args:
      state: A state that `get_state` gave.

    Raises:
      ValueError: If it is the state of a stream of other data or settings.
    """
    check_state(state, self._stream.fingerprint)
    place = Place(*state["place"])
    # These counts have the window's, which is read again.
    counts = copy.deepcopy(state["statistics"])
    self._start_at(place, Statistics(**counts), state["samples_before_epoch"])
    if state["has_window"]:
      self._window = self._windows.read(place)
    self._taken = state["taken"]

  def close(self) -> None:
    """Closes the shard that is open and ends the threads."""
    super().close()
    self._windows.close()
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)

  def __next__(self) -> dict[str, np.ndarray]:
    self._assert_not_closed()
    size = self._stream.batch_size
    rows: list[tuple[Sample, np.ndarray]] = []
    seen: set[str] = set()
    while len(rows) < size:
      samples = self._take(size - len(rows))
      if not samples:
        break
      if not seen:
        self.epoch = self._place.epoch
      fresh = []
      for sample in samples:
        if sample.uid in seen:
          # Two like pairs would be each other's negatives, and a ledger holds
          # one row of a sample a step.
          self.statistics.add_noted(
            "uid twice in a batch, left out", sample.shard, sample.key
          )
        else:
          seen.add(sample.uid)
          fresh.append(sample)
      rows += self._decode(fresh)
      self._check_broken(_ENOUGH)
    if not rows:
      raise StopIteration
    return self._batch(rows)

  def _take(self, count: int) -> Sequence[Sample]:
    """Takes the next samples of the window, up to `count`; none at the end."""
    while self._window is None or self._taken == len(self._window.samples):
      place = self._window.following if self._window else self._place
      epochs = self._stream.num_epochs
      if epochs is not None and place.epoch == epochs:
        return ()
      window = self._windows.read(place)
      self.statistics.add(window.found)
      if window.samples:
        self._place, self._window, self._taken = place, window, 0
        self._check_broken(_ENOUGH)
      else:
        self._end_epoch(place.epoch)
    taken = self._window.samples[self._taken : self._taken + count]
    self._taken += len(taken)
    return taken

  def _end_epoch(self, epoch: int) -> None:
    self._check_broken(1)
    if self.statistics.samples == self._samples_before_epoch:
      raise ValueError(
        "an epoch brought no sample that wasn't in the batch already: the"
        " shards of this process are all broken, the filter is for other data,"
        f" or they have fewer than batch_size={self._stream.batch_size}"
        f" samples.{self.statistics.advice()}\n{self.statistics}"
      )
    if self.statistics.broken or self.statistics.noted:
      logging.warning("After epoch %d: %s", epoch, self.statistics)
    self._place = Place(epoch + 1, 0, 0)
    self._window, self._taken = None, 0
    self._samples_before_epoch = self.statistics.samples

  def _check_broken(self, enough: int) -> None:
    found, most = self.statistics, self._stream.max_broken_share
    if found.read >= enough and found.broken_share > most:
      raise ValueError(
        f"{found.broken_share:.1%} of the samples that were looked at are"
        f" broken, more than max_broken_share={most:.1%}; mend the shards, or"
        f" raise it.{found.advice()}\n{found}"
      )

  def _decode(
    self, samples: Sequence[Sample]
  ) -> list[tuple[Sample, np.ndarray]]:
    def decode(sample: Sample) -> np.ndarray | images.BadImageError:
      try:
        return images.decode(
          sample.image,
          size=self._stream.image_size,
          formats=self._stream.parts.formats,
          limits=self._stream.limits,
        )
      except images.BadImageError as error:
        return error
      except BaseException as error:
        error.add_note(f"in the image of {sample.key!a} in {sample.shard!a}")
        raise

    run = map if self._pool is None else self._pool.map
    sound = []
    for sample, image in zip(samples, run(decode, samples), strict=True):
      if isinstance(image, images.BadImageError):
        self.statistics.add_broken(
          image.reason, sample.shard, sample.key, image.detail
        )
      else:
        sound.append((sample, image))
    self.statistics.samples += len(sound)
    return sound

  def _batch(
    self, rows: Sequence[tuple[Sample, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    count, size = len(rows), self._stream.batch_size
    text = np.asarray(self._stream.tokenizer([row.caption for row, _ in rows]))
    if text.ndim != 2 or len(text) != count or text.dtype.kind not in "iu":
      raise ValueError(
        f"the tokenizer gave {text.dtype} {text.shape} for {count} captions;"
        " expected integers [n, L]"
      )
    # A real row, so that a model's statistics and finiteness don't suffer.
    source = np.where(np.arange(size) < count, np.arange(size), 0)
    mask = np.arange(size) < count
    pixels = np.empty((size, *rows[0][1].shape), np.uint8)
    for place, (_, image) in enumerate(rows):
      pixels[place] = image
    pixels[count:] = rows[0][1]
    first = self.statistics.samples - count
    uids = [row.uid for row, _ in rows] + [""] * (size - count)
    return {
      "image": pixels,
      "text": text.astype(np.int32)[source],
      "uid": np.array(uids, "<U32"),
      "index": np.where(mask, first + np.arange(size), -1).astype(np.int64),
      "mask": mask,
    }


def _expand(shards, uid_source: str) -> list[str]:
  """Lists the shards' paths; if names make uids, refuses two of one name."""
  if uid_source not in shard_samples.UID_SOURCES:
    raise ValueError(
      f"uid_source must be one of {shard_samples.UID_SOURCES}, got"
      f" {uid_source!r}"
    )
  paths = shard_files.expand(shards)
  if uid_source == "name":
    # Folders don't count: the same data elsewhere have the same uids.
    by_name: dict[str, str] = {}
    for path in paths:
      other = by_name.setdefault(os.path.basename(path), path)
      if other != path:
        raise ValueError(
          f"the shards {other!r} and {path!r} have one name, and with"
          " uid_source='name' their samples would have the same uids; rename"
          " one of the files"
        )
  return paths
