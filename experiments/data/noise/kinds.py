"""The kinds of label noise: each takes labels [N] and gives labels [N].

Every kind changes a count of samples that is known beforehand, not one that is
drawn: a rate means the same for every seed, and for small sets too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.noise import tables as noise_tables

# Classes that people take for one another in CIFAR-10, by Patrini et al.
CIFAR10_MAPPING = {
  "truck": "automobile",
  "bird": "airplane",
  "deer": "horse",
  "cat": "dog",
  "dog": "cat",
}

# CIFAR-100's superclasses; in each the next class follows, and the first one
# after the last.
CIFAR100_GROUPS = (
  "beaver dolphin otter seal whale",
  "aquarium_fish flatfish ray shark trout",
  "orchid poppy rose sunflower tulip",
  "bottle bowl can cup plate",
  "apple mushroom orange pear sweet_pepper",
  "clock keyboard lamp telephone television",
  "bed chair couch table wardrobe",
  "bee beetle butterfly caterpillar cockroach",
  "bear leopard lion tiger wolf",
  "bridge castle house road skyscraper",
  "cloud forest mountain plain sea",
  "camel cattle chimpanzee elephant kangaroo",
  "fox porcupine possum raccoon skunk",
  "crab lobster snail spider worm",
  "baby boy girl man woman",
  "crocodile dinosaur lizard snake turtle",
  "hamster mouse rabbit shrew squirrel",
  "maple_tree oak_tree palm_tree pine_tree willow_tree",
  "bicycle bus motorcycle pickup_truck train",
  "lawn_mower rocket streetcar tank tractor",
)


def noisy_count(rate: float, num_samples: int) -> int:
  """Counts the samples that a noise rate changes: `int(rate * num_samples)`.

  The product counts as it is written: 0.29 * 100 is 28.999... in floating
  point, and gives 29.

  Args:
    rate: Share of labels to change, in [0, 1].
    num_samples: The number of labels.

  Returns:
    The count, rounded down.
  """
  return math.floor(rate * num_samples + 1e-6)


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
    rng: The source of randomness.

  Returns:
    The new labels [N].

  References:
    Huang et al., Evaluating Sample Utility for (Efficient) Data Selection by
    Mimicking Model Weights, https://arxiv.org/abs/2501.06708
  """
  return _shifted(
    labels,
    rate,
    num_classes,
    rng,
    lambda count: rng.integers(1, num_classes, size=count),
  )


def pair(
  labels: np.ndarray,
  *,
  rate: float,
  num_classes: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Moves a random `rate` of the labels to the next class, y -> (y + 1) mod C.

  Exactly `int(rate * N)` samples, drawn without replacement.

  Args:
    labels: int [N].
    rate: Share of labels to change, in [0, 1).
    num_classes: How many classes there are, C.
    rng: The source of randomness.

  Returns:
    The new labels [N].

  References:
    Han et al., Co-teaching: Robust Training of Deep Neural Networks with
    Extremely Noisy Labels, https://arxiv.org/abs/1804.06872
  """
  return _shifted(labels, rate, num_classes, rng, lambda count: 1)


def asymmetric(
  labels: np.ndarray,
  *,
  rate: float,
  num_classes: int,
  rng: np.random.Generator,
  class_names: Sequence[str] | None = None,
  mapping: Mapping[Any, Any] | str | None = None,
) -> np.ndarray:
  """Moves a random `rate` of some classes' samples to a look-alike class.

  Of the n samples of the source classes exactly `int(rate * n)` are changed,
  shared out over these classes in proportion to their sizes. The rate over all
  samples is lower: half of it for CIFAR-10, where 5 of 10 classes are sources.

  Args:
    labels: int [N].
    rate: Share of the source classes' labels to change, in [0, 1).
    num_classes: How many classes there are, C.
    rng: The source of randomness.
    class_names: The names [C]. Those of CIFAR-10 and CIFAR-100 bring their
      mapping: truck to automobile, bird to airplane, deer to horse, cat and
      dog to each other; and the next class of the same superclass.
    mapping: Source class to target class, by names or numbers, as a mapping or
      as text "cat:dog,dog:cat".

  Returns:
    The new labels [N].

  Raises:
    ValueError: If there is no mapping, or one with classes there aren't.

  References:
    Patrini et al., Making Deep Neural Networks Robust to Label Noise: A Loss
    Correction Approach, https://arxiv.org/abs/1609.03683
  """
  pairs = _pairs(mapping, class_names, num_classes)
  sizes = np.zeros(num_classes)
  sizes[list(pairs)] = np.bincount(labels, minlength=num_classes)[list(pairs)]
  count = noisy_count(rate, int(sizes.sum()))
  shares = sizes * (count / max(sizes.sum(), 1))
  counts = largest_remainder(shares, count, rng)
  noisy = labels.copy()
  for source, target in pairs.items():
    noisy[_draw(labels, source, counts[source], rng)] = target
  return noisy


def confusion(
  labels: np.ndarray,
  *,
  rate: float | None,
  num_classes: int,
  rng: np.random.Generator,
  matrix: Any,
) -> np.ndarray:
  """Moves labels by a confusion matrix.

  Row c, divided by its sum, is the distribution of the label that a sample of
  class c is given. The number of noisy samples is `int` of what the matrix
  expects of these labels; they are shared out over the classes, and in each
  over the given labels, by largest remainder: only which sample goes where
  (and who gets the last one of equals) is drawn.

  Args:
    labels: int [N].
    rate: If given, in [0, 1): all off-diagonal entries are multiplied by one
      number so that exactly `int(rate * N)` samples are noisy.
    num_classes: How many classes there are, C.
    rng: The source of randomness.
    matrix: Counts or rates [C, C], true class by given class, or the path of
      a .npy file or of a .csv file (numbers only, no header) that holds them.

  Returns:
    The new labels [N].

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If the matrix isn't one of counts or rates, or can't reach the
      rate.
  """
  values = noise_tables.read_matrix(matrix, num_classes)
  sizes = np.bincount(labels, minlength=num_classes)
  sums = values.sum(axis=1, keepdims=True)
  empty = (sums[:, 0] == 0) & (sizes > 0)
  if empty.any():
    raise ValueError(
      f"row {np.argmax(empty)} of the confusion matrix is all zeros, but "
      f"{sizes[np.argmax(empty)]} samples have that class; say which labels "
      "they get (1 on the diagonal keeps theirs)"
    )
  moved = np.divide(values, sums, out=np.zeros_like(values), where=sums > 0)
  np.fill_diagonal(moved, 0)
  expected = sizes[:, None] * moved  # samples, [C, C]
  total = expected.sum()
  if rate is None:
    count = math.floor(total + 1e-6)
  else:
    count = noisy_count(rate, len(labels))
    largest = moved.sum(axis=1)[sizes > 0].max(initial=0.0)
    reach = total / largest if largest > 0 else 0.0
    if count > reach + 1e-6:
      raise ValueError(
        f"rate {rate} is out of the confusion matrix's reach: by the ratios of "
        f"its off-diagonal entries one class is all noisy at "
        f"{reach / len(labels):.4g}; ask for no more"
      )
  noisy = labels.copy()
  if not count:
    return noisy
  expected *= count / total
  counts = largest_remainder(expected.sum(axis=1), count, rng)
  for source in np.flatnonzero(counts):
    row = expected[source] * (counts[source] / expected[source].sum())
    given = largest_remainder(row, counts[source], rng)
    chosen = _draw(labels, source, counts[source], rng)
    noisy[chosen] = np.repeat(np.arange(num_classes), given)
  return noisy


class Kind(NamedTuple):
  """One kind of noise, and its options."""

  draw: Callable[..., np.ndarray]
  rate: str  # "needed", "optional" or "none"
  takes: tuple[str, ...] = ()  # options of `apply_noise`
  needs: tuple[str, ...] = ()  # those of them that must be given


KINDS: dict[str, Kind] = {
  "symmetric": Kind(symmetric, "needed"),
  "asymmetric": Kind(asymmetric, "needed", ("class_names", "mapping")),
  "pair": Kind(pair, "needed"),
  "confusion": Kind(confusion, "optional", ("matrix",), ("matrix",)),
  "file": Kind(
    noise_tables.read_labels,
    "none",
    ("ids", "class_names", "path", "column", "id_column"),
    ("ids", "path"),
  ),
}


def largest_remainder(
  shares: np.ndarray, total: int, rng: np.random.Generator
) -> np.ndarray:
  """Rounds shares that sum to `total` to whole numbers that do as well.

  All are rounded down, and the largest remainders get one more; of equal ones
  chance decides.

  Args:
    shares: Numbers >= 0, [K].
    total: Their sum, a whole number.
    rng: The source of randomness.

  Returns:
    int [K], each less than 1 away from its share.
  """
  whole = np.floor(shares + 1e-9).astype(np.int64)
  # Rounded, so that remainders which differ only by rounding are equal.
  order = np.lexsort((rng.random(len(shares)), -np.round(shares - whole, 9)))
  whole[order[: total - whole.sum()]] += 1
  return whole


def _shifted(labels, rate, num_classes, rng, by):
  """Moves a random `rate` of the labels on by `by(count)`."""
  chosen = rng.permutation(len(labels))[: noisy_count(rate, len(labels))]
  noisy = labels.copy()
  noisy[chosen] = (labels[chosen] + by(len(chosen))) % num_classes
  return noisy


def _draw(labels, source, count, rng):
  """Draws the indices of `count` random samples of one class."""
  return rng.permutation(np.flatnonzero(labels == source))[:count]


def _pairs(mapping, class_names, num_classes) -> dict[int, int]:
  """Reads source and target classes, as numbers."""
  names = None if class_names is None else list(class_names)
  if mapping is None:
    mapping = _known_mapping(names)
  items: Iterable[Any]
  if isinstance(mapping, str):
    items = [text.split(":") for text in mapping.split(",")]
    if any(len(item) != 2 for item in items):
      raise ValueError(
        f"mapping is {mapping!r}; expected 'source:target' pairs between "
        "commas, as in 'cat:dog,dog:cat'"
      )
  else:
    items = mapping.items()
  pairs: dict[int, int] = {}
  for item in items:
    source, target = (_class_number(name, names, num_classes) for name in item)
    if source == target or source in pairs:
      why = "itself" if source == target else "two classes"
      raise ValueError(f"the mapping sends class {item[0]!r} to {why}")
    pairs[source] = target
  return pairs


def _known_mapping(names) -> dict[str, str]:
  known = set(names or ())
  groups = [group.split() for group in CIFAR100_GROUPS]
  if known == {name for group in groups for name in group}:
    return {
      name: group[(place + 1) % len(group)]
      for group in groups
      for place, name in enumerate(group)
    }
  look_alikes = {*CIFAR10_MAPPING, *CIFAR10_MAPPING.values()}
  if known == look_alikes | {"frog", "ship"}:
    return CIFAR10_MAPPING
  found = "none were given" if not names else f"they are {names[:10]}"
  raise ValueError(
    "asymmetric noise knows the look-alikes of CIFAR-10 and CIFAR-100 only, by "
    f"their class names ({found}); give mapping, as in 'cat:dog,dog:cat', or "
    "take kind 'pair', y -> y + 1"
  )


def _class_number(name, names, num_classes) -> int:
  if isinstance(name, str):
    name = name.strip()
    if names and name in names:
      return names.index(name)
  try:
    number = int(name)
  except (TypeError, ValueError):
    number = -1
  if not 0 <= number < num_classes:
    raise ValueError(
      f"the mapping has a class {name!r}; expected numbers in 0 .. "
      f"{num_classes - 1} or names in {names}"
    )
  return number
