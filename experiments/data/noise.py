"""Label noise: which samples get a wrong label, and which label.

Everything is drawn from one seed and saved with the run, so that selection and
reports compare against the truth.
"""

import math
import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class NoisyLabels(NamedTuple):
  """Labels after noise, beside the truth."""

  labels: np.ndarray  # int32 [N], what a learner is given.
  clean_labels: np.ndarray  # int32 [N], what was there before.
  is_noisy: np.ndarray  # bool [N], where the two differ.
  rate: float  # The exact share of noisy labels.


def symmetric(
  labels: np.ndarray,
  *,
  rate: float,
  num_classes: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Moves a random `rate` of the labels to any other class, uniformly.

  Exactly `int(rate * N)` samples, drawn without replacement, get
  `(y + U{1 .. C-1}) mod C`, which is never the label that they had.

  Args:
    labels: int [N].
    rate: Share of labels to change, in [0, 1).
    num_classes: How many classes there are, C.
    rng: Where the randomness comes from.

  Returns:
    The new labels [N].

  References:
    Huang et al., Evaluating Sample Utility for (Efficient) Data Selection by
    Mimicking Model Weights, https://arxiv.org/abs/2501.06708
  """
  chosen = rng.permutation(len(labels))[: noisy_count(rate, len(labels))]
  shift = rng.integers(1, num_classes, size=len(chosen))
  noisy = labels.copy()
  noisy[chosen] = (labels[chosen] + shift) % num_classes
  return noisy


# kind -> function(labels [N], *, rate, num_classes, rng) -> labels [N]
KINDS: dict[str, Callable[..., np.ndarray]] = {"symmetric": symmetric}


def noisy_count(rate: float, num_samples: int) -> int:
  """How many of `num_samples` a noise rate changes: `int(rate * num_samples)`.

  Taken of the product as it is written: 0.29 * 100 is 28.999... in floating
  point, and counts as 29.

  Args:
    rate: Share of labels to change, in [0, 1).
    num_samples: How many labels there are.

  Returns:
    The count, rounded down.
  """
  return math.floor(rate * num_samples + 1e-6)


def apply_noise(
  labels: np.ndarray,
  *,
  kind: str = "symmetric",
  rate: float,
  num_classes: int,
  seed: int,
) -> NoisyLabels:
  """Replaces a share of the labels by wrong ones.

  Args:
    labels: The true labels, integers [N] in 0 .. num_classes - 1.
    kind: One of `KINDS`.
    rate: Share of labels to change, in [0, 1).
    num_classes: How many classes there are.
    seed: Not negative; the same seed gives the same noise.

  Returns:
    The labels with and without noise.

  Raises:
    ValueError: If the kind is unknown, or a value is out of range.
    TypeError: If `labels` are not integers.
  """
  labels = np.asarray(labels)
  if labels.dtype.kind not in "iu":
    raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
  if labels.ndim != 1:
    raise ValueError(f"labels must have shape [N], got {labels.shape}")
  if kind not in KINDS:
    raise ValueError(f"no noise kind {kind!r}; there are {sorted(KINDS)}")
  if not 0 <= rate < 1:
    raise ValueError(f"the noise rate must lie in [0, 1), got {rate}")
  if num_classes < 2:
    raise ValueError(f"num_classes must be at least 2, got {num_classes}")
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(
      f"labels must lie in 0 .. {num_classes - 1}, got "
      f"{labels.min()} .. {labels.max()}; check num_classes"
    )
  if seed < 0:
    raise ValueError(f"seed must not be negative, got {seed}")

  clean = labels.astype(np.int32)
  noisy = KINDS[kind](
    clean,
    rate=float(rate),
    num_classes=num_classes,
    rng=np.random.default_rng(seed),
  )
  return _compare(noisy, clean)


def _compare(labels: np.ndarray, clean_labels: np.ndarray) -> NoisyLabels:
  is_noisy = labels != clean_labels
  rate = float(is_noisy.mean()) if is_noisy.size else 0.0
  return NoisyLabels(labels, clean_labels, is_noisy, rate)


def save(path: str | os.PathLike, noisy: NoisyLabels, ids: np.ndarray) -> None:
  """Writes labels with and without noise to an `.npz` file, all or nothing.

  Args:
    path: Where to; an existing file is replaced.
    noisy: What `apply_noise` gave, N labels.
    ids: The samples' ids [N].

  Raises:
    ValueError: If there are not as many ids as labels.
  """
  path = os.fspath(path)
  ids = np.asarray(ids)
  if ids.shape != noisy.labels.shape:
    raise ValueError(f"{noisy.labels.shape} labels, but {ids.shape} ids")
  if ids.dtype.kind == "O":
    ids = ids.astype(np.str_)  # An array of objects would need pickle.
  folder, name = os.path.split(path)
  descriptor, temporary = tempfile.mkstemp(
    prefix=f"{name}.", suffix=".tmp", dir=folder or "."
  )
  try:
    with os.fdopen(descriptor, "wb") as file:
      np.savez_compressed(
        file,
        ids=ids,
        labels=noisy.labels,
        clean_labels=noisy.clean_labels,
      )
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def load(path: str | os.PathLike) -> tuple[NoisyLabels, np.ndarray]:
  """Reads what `save` wrote.

  Args:
    path: The `.npz` file.

  Returns:
    The labels with and without noise, and the samples' ids [N].

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If the file is damaged or something else.
  """
  with open(path, "rb") as file:
    try:
      with np.load(file, allow_pickle=False) as arrays:
        ids, labels = arrays["ids"], arrays["labels"]
        noisy = _compare(labels, arrays["clean_labels"])
    except Exception as error:  # zipfile, zlib and numpy each raise their own.
      raise ValueError(
        f"{os.fspath(path)} is not a file of noisy labels, or is damaged "
        f"({type(error).__name__}: {error}); delete it to draw the noise again"
      ) from error
  if not ids.shape == labels.shape == noisy.clean_labels.shape:
    raise ValueError(
      f"{os.fspath(path)} holds {ids.shape} ids, {labels.shape} labels and "
      f"{noisy.clean_labels.shape} clean labels; expected as many of each: "
      "delete it to draw the noise again"
    )
  return noisy, ids
