"""One stream of batches: shuffled, augmented, padded, resumable at any step.

A batch is a dict of arrays, a row for each sample:

  image        uint8 [B, H, W, C] as decoded (or features, float32 [B, D])
  row          int32 [B], in place of "image" where images live on the devices:
               the row there
  label        int32 [B]
  index        int32 [B], the sample's position in the data set, -1 for padding
               and for images that can't be used
  mask         bool [B], False where index is -1
  flipped      bool [B], in batches whose images are mirrored at random
  batch_index  int32 [B of all processes], the positions that were planned

`expand` makes of it, in the jitted step, what a model sees. With several
processes, each makes its own rows of every batch: the p-th of P takes the p-th
of P equal parts, and decodes no other.

Which samples a batch has, its mirrored ones and its random crops depend on the
seed and the step alone; so the state of an iterator is the number of its next
step, whoever made the batches before.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data import decoding, purposes, store, workers as workers_lib


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
  """Counts the batches of an epoch, the last one padded.

  Args:
    num_samples: Samples of an epoch.
    batch_size: Rows in a batch.

  Returns:
    The number of batches.
  """
  return -(-num_samples // batch_size)


class Augmentation(NamedTuple):
  """What is drawn anew each time that a sample is seen."""

  flip: bool = False  # mirrored left to right with probability 1/2
  # Bounds of a random crop's share of the image's area; None: no random crops.
  crop_scale: tuple[float, float] | None = None


PLAIN = Augmentation()


class Planned(NamedTuple):
  """One batch of all processes, before any sample is read."""

  rows: np.ndarray  # int64 [B], positions; padding repeats the first
  mask: np.ndarray  # bool [B], False for padding
  flipped: np.ndarray | None  # bool [B]
  draws: np.ndarray | None  # [B, ATTEMPTS, 4] in [0, 1), of random crops


class Plan:
  """Which samples each batch has, and how they are augmented.

  Attributes:
    positions: Of the samples [M].
    batch_size: Rows in a batch, of all processes.
    augmentation: What is drawn anew each time.
    steps_per_epoch: Batches of an epoch.
  """

  def __init__(
    self,
    num_samples: int,
    *,
    batch_size: int,
    seed: int | None,
    indices: np.ndarray | Sequence[int] | None = None,
    augmentation: Augmentation = PLAIN,
  ):
    """Checks what is asked for.

    Args:
      num_samples: Of the data set, N.
      batch_size: Rows in a batch, of all processes.
      seed: Not negative: orders each epoch's samples, and draws augmentations;
        None keeps the order.
      indices: Positions [M] of the samples to go over, each once; None: all.
      augmentation: With a seed only.

    Raises:
      ValueError: If a value is out of range.
      TypeError: If indices are no integers.
    """
    self.positions = _positions(num_samples, indices)
    if batch_size < 1:
      raise ValueError(f"batch_size must be positive, got {batch_size}")
    if seed is not None and seed < 0:
      raise ValueError(f"seed must not be negative, got {seed}")
    self.batch_size, self._seed = batch_size, seed
    self.augmentation = augmentation
    self.steps_per_epoch = steps_per_epoch(len(self.positions), batch_size)
    self._orders: dict[int, np.ndarray] = {}

  def batch(self, step: int) -> Planned:
    """Plans the batch of a step."""
    epoch, place = divmod(step, self.steps_per_epoch)
    start, size = place * self.batch_size, self.batch_size
    rows = self._order(epoch)[start : start + size]
    mask = np.arange(size) < len(rows)
    if len(rows) < size:
      # A real row, so that a model's statistics and finiteness don't suffer.
      rows = np.append(rows, np.full(size - len(rows), rows[0]))
    flipped = draws = None
    if self.augmentation.flip:
      flipped = self._rng(purposes.FLIP, step).random(size) < 0.5
    if self.augmentation.crop_scale is not None:
      shape = (size, decoding.ATTEMPTS, 4)
      draws = self._rng(purposes.CROP, step).random(shape)
    return Planned(rows, mask, flipped, draws)

  def _rng(self, stream, number):
    if self._seed is None:
      raise ValueError("an order that is kept has no augmentation, got no seed")
    return np.random.default_rng((self._seed, stream, number))

  def _order(self, epoch):
    # grain's own shuffle maps one index at a time in Python, and gives epoch 1
    # of seed 0 the order of epoch 0 of seed 1.
    if self._seed is None:
      return self.positions
    order = self._orders.get(epoch)
    if order is None:
      order = self._rng(purposes.ORDER, epoch).permutation(self.positions)
      # Threads may be in two epochs at once.
      self._orders = {epoch: order, **dict([*self._orders.items()][:1])}
    return order

  def __getstate__(self):
    return {**self.__dict__, "_orders": {}}


class _Maker:
  """Makes the batch of a step; can be sent to worker processes."""

  def __init__(self, plan, labels, process, read):
    self._plan, self._labels, self._read = plan, labels, read
    number, count = process
    part = plan.batch_size // count
    self._own = slice(number * part, (number + 1) * part)

  def __call__(self, step: int) -> dict[str, Any]:
    planned = self._plan.batch(step)
    own = self._own
    rows, mask = planned.rows[own], planned.mask[own]
    batch: dict[str, Any] = {}
    if planned.flipped is not None:
      batch["flipped"] = planned.flipped[own]
    if self._read is None:
      batch["row"] = rows.astype(np.int32)
    else:
      batch["image"], batch["bad"] = self._images(planned, rows, mask)
    return {
      **batch,
      "label": self._labels[rows],
      "index": np.where(mask, rows, -1).astype(np.int32),
      "mask": mask,
      "batch_index": np.where(planned.mask, planned.rows, -1).astype(np.int32),
    }

  def _images(self, planned, rows, mask):
    real = int(mask.sum())
    some = min(real + 1, len(rows))  # padding is decoded once
    if planned.draws is None:
      found, bad = self._read(rows[:some])
    else:
      draws = planned.draws[self._own][:some]
      if real < len(rows):
        draws[real] = planned.draws[0]
      found, bad = self._read(
        rows[:some], draws, self._plan.augmentation.crop_scale
      )
    if some < len(rows):
      padding = np.broadcast_to(found[real], (len(rows), *found.shape[1:]))
      found = np.concatenate([found, padding[some:]])
    return found, bad


class Batches:
  """An iterator over batches, which can go to any step.

  Attributes:
    steps: The number of batches; None: there is no end.
  """

  def __init__(
    self,
    images: store.Images,
    labels: np.ndarray,
    plan: Plan,
    *,
    num_epochs: int | None,
    process: tuple[int, int] = (0, 1),
    workers: int = 0,
    worker_processes: bool = False,
  ):
    """Starts at the first step; reads nothing yet.

    Args:
      images: The samples.
      labels: Integers [N].
      plan: Of the batches.
      num_epochs: Number of epochs; None goes on for ever.
      process: This process's number, and the number of processes, which divides
        the batch.
      workers: Threads or processes that make batches ahead; 0: the thread that
        asks. Never more where samples live on the devices.
      worker_processes: Whether they are processes: for what holds Python's lock
        while it decodes. They don't share what they decode, so images in
        memory are read by threads.

    Raises:
      ValueError: If shapes don't fit together or a value is out of range.
      TypeError: If labels are no integers.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images.source),):
      raise ValueError(
        "labels must have one entry per image, shape"
        f" ({len(images.source)},), got {labels.shape}"
      )
    if labels.dtype.kind not in "iu":
      raise TypeError(f"labels must be integers, got {labels.dtype}")
    number, count = process
    if not 0 <= number < count or plan.batch_size % count:
      raise ValueError(
        f"process is {number} of {count} for batches of {plan.batch_size};"
        " expected a number from 0 on, below a count that divides the batch"
      )
    if num_epochs is not None and num_epochs < 1:
      raise ValueError(f"num_epochs must be positive or None, got {num_epochs}")
    if workers < 0:
      raise ValueError(f"workers must not be negative, got {workers}")
    self.steps = (
      None if num_epochs is None else num_epochs * plan.steps_per_epoch
    )
    self._images, self._step = images, 0
    self._workers = 0 if images.residence == "device" else workers
    self._processes = worker_processes and images.residence == "stream"
    read: Any = {
      "device": None,
      "memory": images.read,
      "stream": images.reader.read,
    }[images.residence]
    self._make = _Maker(plan, labels.astype(np.int32), process, read)
    self._ahead: Any = None

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._step == self.steps:
      raise StopIteration
    if not self._workers:
      batch = self._make(self._step)
    else:
      if self._ahead is None:
        self._ahead = self._start()
      try:
        batch = next(self._ahead)
      except RuntimeError as error:
        if self._processes and workers_lib.is_end(error):
          what = (
            f"the {self._workers} processes that decode {self._images.source}"
            " (config.data.workers)"
          )
          raise workers_lib.WorkerError(what, error) from error
        raise
    self._step += 1
    images = self._images
    if images.resident is not None:  # which is when all bad ones are known
      bad = images.bad.found
    else:
      # Here, not where batches are made ahead: in the order of the steps.
      bad = batch.pop("bad")
      images.bad.add(bad)
    if bad:
      lost = np.isin(batch["index"], list(bad))
      batch["index"] = np.where(lost, np.int32(-1), batch["index"])
      batch["mask"] = batch["mask"] & ~lost
    return batch

  def _start(self):
    """Starts the workers, at the step that comes next."""
    import grain  # here, as only workers need it

    last = sys.maxsize if self.steps is None else self.steps
    dataset = grain.MapDataset.range(self._step, last).map(self._make)
    threads = 1 if self._processes else self._workers
    ahead = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if self._processes:
      workers_lib.prepare_flags()
      ahead = ahead.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=self._workers),
        workers_lib.begin,
      )
    return iter(ahead)

  def get_state(self) -> dict[str, int]:
    """Returns the number of the next step."""
    return {"step": self._step}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a step."""
    step = int(state["step"])
    if step < 0 or (self.steps is not None and step > self.steps):
      raise ValueError(
        f"the saved place in the data is step {step} of {self.steps}; restore"
        " with the settings of the run"
      )
    self.close()
    self._step = step

  def close(self) -> None:
    """Ends the workers; a later batch starts new ones."""
    if self._ahead is not None:
      self._ahead.close()
      self._ahead = None


def train_batches(
  images: store.Images,
  labels: np.ndarray,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  indices: np.ndarray | None = None,
  augmentation: Augmentation = PLAIN,
  **options: Any,
) -> Batches:
  """Makes batches of epochs, each a fresh permutation of all the samples.

  Every epoch covers every sample once; its last batch is filled up with copies
  of a real row, masked.

  Args:
    images: The samples.
    labels: Integers [N].
    batch_size: Rows in a batch, of all processes.
    seed: Not negative; orders the samples and draws the augmentations.
    num_epochs: Number of epochs; None goes on for ever.
    indices: Positions [M] of the samples to train on, each once; None takes
      all. The batches' "index" stays the position among all N.
    augmentation: Flips and random crops.
    **options: `process`, `workers` and `worker_processes` of `Batches`.

  Returns:
    The Batches.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """
  plan = Plan(
    len(images.source),
    batch_size=batch_size,
    seed=seed,
    indices=indices,
    augmentation=augmentation,
  )
  return Batches(
    images,
    labels,
    plan,
    num_epochs=num_epochs,
    **options,
  )


def eval_batches(
  images: store.Images,
  labels: np.ndarray,
  *,
  batch_size: int,
  indices: np.ndarray | Sequence[int] | None = None,
  **options: Any,
) -> Batches:
  """Makes batches of all samples once, in order, and not augmented.

  Args:
    images: The samples.
    labels: Integers [N].
    batch_size: Rows in a batch, of all processes; the last batch is padded
      and masked.
    indices: Positions [M] of the samples to go over, in this order; None
      takes all.
    **options: As `train_batches`.

  Returns:
    The Batches.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """
  plan = Plan(
    len(images.source), batch_size=batch_size, seed=None, indices=indices
  )
  return Batches(images, labels, plan, num_epochs=1, **options)


def fingerprint(
  source: str,
  labels: np.ndarray,
  *,
  batch_size: int,
  seed: int,
  indices: np.ndarray | None = None,
  augmentation: Augmentation = PLAIN,
  transform: decoding.Transform | None = None,
  mean: float | Sequence[float] = 0.0,
  std: float | Sequence[float] = 1.0,
) -> str:
  """Hashes all that decides the batches of `train_batches`, for their state.

  Args:
    source: The fingerprint of the data set.
    labels: As given to `train_batches`, like all that follow.
    batch_size: Rows in a batch.
    seed: Orders the samples and draws the augmentations.
    indices: Positions of the samples to train on, or None.
    augmentation: Flips and random crops.
    transform: What is done to every sample.
    mean: Subtracted from pixels.
    std: Then divides them.

  Returns:
    32 hexadecimal characters.
  """
  if indices is None:
    indices = np.arange(len(labels))
  settings = {
    "source": source,
    "batch_size": int(batch_size),
    "seed": int(seed),
    "augmentation": augmentation,
    "transform": None if transform is None else vars(transform),
    "mean": np.atleast_1d(mean).astype(float).tolist(),
    "std": np.atleast_1d(std).astype(float).tolist(),
  }
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for array in (labels, indices):
    digest.update(np.asarray(array).astype("<i8").tobytes())
    digest.update(b";")
  return digest.hexdigest()[:32]


def _positions(
  num_samples: int, indices: np.ndarray | Sequence[int] | None
) -> np.ndarray:
  """Returns the positions [M] to go over, checked."""
  if indices is None:
    rows = np.arange(num_samples)
  else:
    rows = np.asarray(indices)
    if rows.dtype.kind not in "iu" and rows.size:
      raise TypeError(
        f"indices must be integer positions, got dtype {rows.dtype}; turn a "
        "mask into positions with np.flatnonzero"
      )
  if rows.ndim != 1 or not rows.size:
    raise ValueError(
      f"there must be at least one sample to go over, in a list of positions; "
      f"got shape {rows.shape}"
    )
  check_positions(rows, num_samples)
  return rows


def check_positions(rows: np.ndarray, count: int, noun: str = "sample") -> None:
  """Raises ValueError unless positions lie among `count`, and differ."""
  if rows.min() < 0 or rows.max() >= count:
    raise ValueError(
      f"indices must lie in 0 .. {count - 1}, got {rows.min()} .. {rows.max()}"
    )
  different = len(np.unique(rows))
  if different < len(rows):
    raise ValueError(
      f"indices must differ, got {len(rows)} with {different} different ones;"
      f" an epoch takes each {noun} once"
    )
