"""Two tests of a contrastive model's features that need no training.

Zero-shot classification names the class whose texts are the most similar to an
image; retrieval finds an image's texts among all texts, and a text's image
among all images. Where similarities tie, as equal captions do, a hit counts for
the share of the orders in which it is one: a model with the same features for
everything scores as chance does.
"""

from collections.abc import Sequence

import numpy as np

_ROWS = 1024  # of the similarities that are held at a time


def class_embeddings(text_features: np.ndarray) -> np.ndarray:
  """Averages the directions of a class's texts.

  `c = normalised(mean_t normalised(f_t))`

  Args:
    text_features: of C classes in T templates each, `[C, T, D]`.

  Returns:
    `[C, D]`, float32, of length one.

  Raises:
    ValueError: another shape, features that are zero or not finite.

  References:
    Radford et al., `arXiv:2103.00020 <https://arxiv.org/abs/2103.00020>`_,
    section 3.1.4.
  """
  text_features = np.asarray(text_features)
  if text_features.ndim != 3 or 0 in text_features.shape:
    raise ValueError(
      f"text_features have shape {text_features.shape}; expected [C, T, D],"
      " T templates for each of C classes."
    )
  return _normalised(
    "text_features", _normalised("text_features", text_features).mean(axis=1)
  )


def accuracy(
  image_features: np.ndarray,
  class_features: np.ndarray,
  labels: np.ndarray,
  *,
  ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
  """Computes the share of images whose class is among the k most similar.

  Args:
    image_features: `[N, D]`, of any length.
    class_features: `[C, D]`, as `class_embeddings` gives them.
    labels: integers `[N]` in [0, C).
    ks: numbers of guesses.

  Returns:
    `{"accuracy@1": ..., "accuracy@5": ...}`, in [0, 1].

  Raises:
    ValueError: shapes or labels that don't fit, features that are zero or not
      finite.

  Example:
    >>> features = np.eye(3, dtype=np.float32)
    >>> accuracy(features, features, np.array([0, 1, 1]), ks=[1])
    {'accuracy@1': 0.666...}
  """
  images = _features("image_features", image_features)
  classes = _features("class_features", class_features, like=images)
  labels = _places("labels", labels, len(images), len(classes), "classes")
  return {
    f"accuracy@{k}": share
    for k, share in _shares(
      images, classes, labels, np.arange(len(classes)), ks
    ).items()
  }


def retrieval(
  image_features: np.ndarray,
  text_features: np.ndarray,
  *,
  image_of_text: np.ndarray | None = None,
  ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
  """Computes recall@k both ways: one's own is among the k most similar.

  Args:
    image_features: `[N, D]`, of any length.
    text_features: `[M, D]`, of any length.
    image_of_text: integers `[M]` in [0, N): the image that each text belongs
      to; every image has one text or more. None: text i belongs to image i.
    ks: numbers of candidates.

  Returns:
    `{"image_to_text@1": ..., "text_to_image@1": ..., ...}`, in [0, 1]: the
    share of images with one of their texts among the k most similar, and of
    texts with their image there.

  Raises:
    ValueError: shapes or places that don't fit, an image without texts,
      features that are zero or not finite.
  """
  images = _features("image_features", image_features)
  texts = _features("text_features", text_features, like=images)
  if image_of_text is None:
    if len(images) != len(texts):
      raise ValueError(
        f"there are {len(images)} images and {len(texts)} texts; expected as"
        " many, or image_of_text."
      )
    image_of_text = np.arange(len(images))
  owners = _places(
    "image_of_text", image_of_text, len(texts), len(images), "images"
  )
  numbers = np.arange(len(images))
  lonely = np.setdiff1d(numbers, owners)
  if lonely.size:
    raise ValueError(
      f"{lonely.size} images have no text, the first is {lonely[0]}; expected"
      " one or more for each: leave them out."
    )
  there = _shares(images, texts, numbers, owners, ks)
  back = _shares(texts, images, owners, numbers, ks)
  return {f"image_to_text@{k}": x for k, x in there.items()} | {
    f"text_to_image@{k}": x for k, x in back.items()
  }


def _shares(asking, asked, wanted, owners, ks):
  """Computes the mean chance of a hit for each k.

  `wanted [n]` is the owner of the features that a row looks for, `owners [m]`
  the owner of each.
  """
  ks = list(ks)
  if not ks or any(isinstance(k, bool) or int(k) != k or k < 1 for k in ks):
    raise ValueError(f"ks is {ks}; expected positive integers.")
  totals = dict.fromkeys(ks, 0.0)
  for start in range(0, len(asking), _ROWS):
    rows = slice(start, start + _ROWS)
    similarities = asking[rows] @ asked.T
    own = owners[None] == wanted[rows, None]
    best = np.max(similarities, where=own, initial=-np.inf, axis=1)
    above = np.sum(~own & (similarities > best[:, None]), axis=1)
    tied = np.sum(~own & (similarities == best[:, None]), axis=1)
    good = np.sum(own & (similarities == best[:, None]), axis=1)
    for k in ks:
      totals[k] += _chances(k - above, tied, good).sum()
  return {k: float(total / len(asking)) for k, total in totals.items()}


def _chances(places, tied, good):
  """Computes the chance that one of `good` is first among `tied` others."""
  misses = np.ones(len(places))
  for taken in range(max(int(places.max(initial=0)), 0)):
    left = np.maximum(tied + good - taken, 1)
    at_this_place = np.maximum(tied - taken, 0) / left
    misses = np.where(taken < places, misses * at_this_place, misses)
  return 1 - misses


def _features(name, features, like=None):
  features = np.asarray(features)
  width = None if like is None else like.shape[1]
  if (
    features.ndim != 2
    or not len(features)
    or width
    not in (
      None,
      features.shape[1],
    )
  ):
    raise ValueError(
      f"{name} have shape {features.shape}; expected"
      f" [N, {'D' if width is None else width}], N at least 1."
    )
  return _normalised(name, features)


def _normalised(name, features):
  features = np.asarray(features, np.float32)
  lengths = np.linalg.norm(features, axis=-1, keepdims=True)
  bad = ~(np.isfinite(lengths) & (lengths > 0))
  if bad.any():
    raise ValueError(
      f"{bad.sum()} of the {name} are zero or not finite, the first is"
      f" {np.argwhere(bad[..., 0])[0].tolist()}; expected features with a"
      " direction."
    )
  return features / lengths


def _places(name, places, size, below, what):
  places = np.asarray(places)
  if (
    places.shape != (size,)
    or not np.issubdtype(places.dtype, np.integer)
    or places.min() < 0
    or places.max() >= below
  ):
    raise ValueError(
      f"{name} have shape {places.shape} and dtype {places.dtype}"
      + (f", from {places.min()} to {places.max()}" if places.size else "")
      + f"; expected [{size}] integers in [0, {below}), one of the {what} each."
    )
  return places
