"""Batches of in-memory images: shuffled, padded, resumable at any step.

A batch is a dict of NumPy arrays:

  image  float32 [B, H, W, C], normalised
  label  int32 [B]
  index  int32 [B], the sample's position in the data set, -1 for padding
  mask   bool [B], False for padding

and, in batches whose images are mirrored at random:

  flipped  bool [B], True where the image is mirrored

With several processes, each makes its own rows of every batch: the p-th of P
takes the p-th of P equal parts. These batches have another field:

  batch_index  int32 [P * B], the index of the whole batch

Iterators are grain's: `get_state` and `set_state` take them to any step, and
their state is nothing but that step's number. Callers compare `fingerprint`
before they restore, as grain accepts the state of any other pipeline.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence

import grain
import numpy as np

from experiments.data import streams

# Gathering rows from memory costs less than handing them between threads.
_IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
  """Counts the batches of an epoch, the last one padded.

  Args:
    num_samples: Samples of an epoch.
    batch_size: Rows in a batch.

  Returns:
    The number of batches.
  """
  return -(-num_samples // batch_size)


def train_batches(
  images: np.ndarray,
  labels: np.ndarray,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  indices: np.ndarray | None = None,
  flip: bool = False,
  mean: float | Sequence[float] = 0.0,
  std: float | Sequence[float] = 1.0,
  process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
  """Makes batches of epochs, each a fresh permutation of all the samples.

  Every epoch covers every sample once; its last batch is filled up with copies
  of a real row, masked. Order and flips depend on the seed and the step alone,
  so a restored iterator goes on as if it had never stopped.

  Args:
    images: uint8 [N, H, W, C].
    labels: Integers [N].
    batch_size: Rows in a batch, of all processes.
    seed: Not negative; orders the samples and draws the flips.
    num_epochs: Number of epochs; None goes on for ever.
    indices: Positions [M] of the samples to train on, each once; None takes
      all. The batches' "index" stays the position among all N.
    flip: Whether to mirror each image left to right with probability 1/2.
    mean: Subtracted from pixels scaled to [0, 1], one or one per channel.
    std: Then divides them, one or one per channel.
    process: This process's number, and the number of processes, which divides
      the batch.

  Returns:
    A grain iterator over batches.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """
  rows = _rows(images, labels, indices)
  gather = _gatherer(images, labels, batch_size, mean, std, process)
  if seed < 0:
    raise ValueError(f"seed must not be negative, got {seed}")
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f"num_epochs must be positive or None, got {num_epochs}")
  steps = steps_per_epoch(len(rows), batch_size)

  # grain's own shuffle maps one index at a time in Python, 30 times the cost
  # of the batch, and gives epoch 1 of seed 0 the order of epoch 0 of seed 1.
  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, streams.ORDER, epoch)).permutation(rows)

  def batch(step: int, _) -> dict[str, np.ndarray]:
    epoch, step_in_epoch = divmod(step, steps)
    start = step_in_epoch * batch_size
    flipped = None
    if flip:
      rng = np.random.default_rng((seed, streams.FLIP, step))
      flipped = rng.random(batch_size) < 0.5
    return gather(order(epoch)[start : start + batch_size], flipped)

  return _iterate(batch, steps, num_epochs)


def eval_batches(
  images: np.ndarray,
  labels: np.ndarray,
  *,
  batch_size: int,
  indices: np.ndarray | None = None,
  mean: float | Sequence[float] = 0.0,
  std: float | Sequence[float] = 1.0,
  process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
  """Makes batches of all samples once, in order.

  Args:
    images: uint8 [N, H, W, C].
    labels: Integers [N].
    batch_size: Rows in a batch, of all processes; the last batch is padded
      and masked.
    indices: Positions [M] of the samples to go over, in this order; None
      takes all.
    mean: Subtracted from pixels scaled to [0, 1], one or one per channel.
    std: Then divides them, one or one per channel.
    process: This process's number, and the number of processes, which divides
      the batch.

  Returns:
    A grain iterator over batches.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """
  rows = _rows(images, labels, indices)
  gather = _gatherer(images, labels, batch_size, mean, std, process)

  def batch(step: int, _) -> dict[str, np.ndarray]:
    return gather(rows[step * batch_size : (step + 1) * batch_size])

  return _iterate(batch, steps_per_epoch(len(rows), batch_size), 1)


def fingerprint(
  source: str,
  labels: np.ndarray,
  *,
  batch_size: int,
  seed: int,
  indices: np.ndarray | None = None,
  flip: bool = False,
  mean: float | Sequence[float] = 0.0,
  std: float | Sequence[float] = 1.0,
) -> str:
  """Hashes all that decides the batches of `train_batches`, for its state.

  Args:
    source: The fingerprint of the data set.
    labels: As given to `train_batches`, like all that follow.
    batch_size: Rows in a batch.
    seed: Orders the samples and draws the flips.
    indices: Positions of the samples to train on, or None.
    flip: Whether images are mirrored at random.
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
    "flip": bool(flip),
    "mean": np.atleast_1d(mean).astype(float).tolist(),
    "std": np.atleast_1d(std).astype(float).tolist(),
  }
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for array in (labels, indices):
    digest.update(np.asarray(array).astype("<i8").tobytes())
    digest.update(b";")
  return digest.hexdigest()[:32]


def _iterate(
  batch: Callable[[int, int], dict[str, np.ndarray]],
  steps: int,
  num_epochs: int | None,
) -> grain.DatasetIterator:
  """Makes an iterator whose state is the number of the next step."""
  dataset = grain.MapDataset.range(steps).repeat(num_epochs)
  return iter(dataset.map_with_index(batch).to_iter_dataset(_IN_PLACE))


def _rows(
  images: np.ndarray, labels: np.ndarray, indices: np.ndarray | None
) -> np.ndarray:
  """Returns the positions [M] to go over, checked."""
  num_samples = len(images)
  if np.shape(labels) != (num_samples,):
    raise ValueError(
      f"labels must have one entry per image, shape ({num_samples},), got "
      f"{np.shape(labels)}"
    )
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
  if rows.min() < 0 or rows.max() >= num_samples:
    raise ValueError(
      f"indices must lie in 0 .. {num_samples - 1}, got "
      f"{rows.min()} .. {rows.max()}"
    )
  if len(np.unique(rows)) < len(rows):
    raise ValueError(
      f"indices must differ, got {len(rows)} with "
      f"{len(np.unique(rows))} different ones; an epoch takes each sample once"
    )
  return rows


def _gatherer(
  images: np.ndarray,
  labels: np.ndarray,
  batch_size: int,
  mean: float | Sequence[float],
  std: float | Sequence[float],
  process: tuple[int, int],
) -> Callable[..., dict[str, np.ndarray]]:
  """Makes a function for a process's part of a padded batch of positions."""
  if images.dtype != np.uint8:
    raise TypeError(f"images must be uint8, got {images.dtype}")
  if images.ndim != 4:
    raise ValueError(f"images must have shape [N, H, W, C], got {images.shape}")
  if np.asarray(labels).dtype.kind not in "iu":
    raise TypeError(f"labels must be integers, got {np.asarray(labels).dtype}")
  if batch_size < 1:
    raise ValueError(f"batch_size must be positive, got {batch_size}")
  number, count = process
  if not 0 <= number < count or batch_size % count:
    raise ValueError(
      f"process is {number} of {count} for batches of {batch_size}; expected a"
      " number from 0 on, below a count that divides the batch"
    )
  part = batch_size // count
  own = slice(number * part, (number + 1) * part)
  channels = images.shape[-1]
  means, stds = np.atleast_1d(mean), np.atleast_1d(std)
  for name, values in (("mean", means), ("std", stds)):
    if values.shape not in ((1,), (channels,)):
      raise ValueError(
        f"{name} must be one number or one per channel, {channels}, got shape "
        f"{values.shape}"
      )
  if not (stds > 0).all():
    raise ValueError(f"std must be positive, got {stds.tolist()}")
  labels = np.array(labels, np.int32)
  # (x / 255 - mean) / std in one multiplication and one addition, written out
  # for every value of an image: broadcasting over so few channels is slow.
  image_shape = images.shape[1:]
  mirrored = np.arange(image_shape[1])[::-1]
  scale = np.broadcast_to(np.float32(1 / (255 * stds)), image_shape).copy()
  shift = np.broadcast_to(np.float32(-means / stds), image_shape).copy()

  def gather(
    rows: np.ndarray, flipped: np.ndarray | None = None
  ) -> dict[str, np.ndarray]:
    mask = np.arange(batch_size) < len(rows)
    if len(rows) < batch_size:
      # A real row, so that a model's statistics and finiteness don't suffer.
      rows = np.append(rows, np.full(batch_size - len(rows), rows[0]))
    index = np.where(mask, rows, -1).astype(np.int32)
    batch = {"index": index, "mask": mask}
    if count > 1:
      rows = rows[own]
      flipped = None if flipped is None else flipped[own]
      batch = {"index": index[own], "mask": mask[own], "batch_index": index}
    picked = images[rows]
    if flipped is not None:
      batch["flipped"] = flipped
      picked[flipped] = np.take(picked[flipped], mirrored, axis=2)
    image = picked * scale
    image += shift
    return {"image": image, "label": labels[rows], **batch}

  return gather
