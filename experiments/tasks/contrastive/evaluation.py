"""Features of many pairs, and tests of a model by them without training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.clip import Features
from experiments.runtime import distributed, prefetch, programs
from experiments.tasks.contrastive import (
  data as clip_data,
  losses as contrastive,
  zero_shot,
)

Apply = Callable[..., Features]

_RECALLS = (
  "image_to_text@1",
  "image_to_text@5",
  "text_to_image@1",
  "text_to_image@5",
)
_ACCURACIES = ("zero_shot_accuracy@1", "zero_shot_accuracy@5")


@programs.once
def scaled(apply: Apply, mean: Any, std: Any) -> Apply:
  """Makes a model take images as they are stored.

  Args:
    apply: `(params, images or None, tokens or None) -> Features`.
    mean: per channel, subtracted from pixels scaled to [0, 1].
    std: per channel, then divides them.

  Returns:
    The same function for uint8 images.
  """
  mean, std = (np.asarray(values, np.float32) for values in (mean, std))

  def apply_stored(params, images=None, tokens=None):
    if images is not None:
      images = (images.astype(jnp.float32) / 255 - mean) / std
    return apply(params, images, tokens)

  return apply_stored


class Extractor:
  """Features of any number of images and texts, in batches of one size."""

  def __init__(
    self, apply: Apply, devices: distributed.Devices, *, batch_size: int
  ):
    self._apply = jax.jit(apply, out_shardings=devices.whole)
    self._devices, self._size = devices, devices.divided(batch_size)

  def images(self, params: Any, images: np.ndarray) -> np.ndarray:
    """Maps images [N, H, W, C] to features [N, D]."""
    return self._extract(images, lambda x: self._apply(params, x, None).image)

  def texts(self, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Maps tokens [..., L] to features [..., D]."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    found = self._extract(flat, lambda x: self._apply(params, None, x).text)
    return found.reshape(*tokens.shape[:-1], -1)

  def _extract(self, rows, extract):
    def placed():
      for start in range(0, len(rows), self._size):
        # Filled up with real rows: one shape, one program.
        at = np.arange(start, start + self._size) % len(rows)
        yield self._devices.place_rows(rows[at])

    parts = [*prefetch.bounded(map(extract, placed()))]
    # Fetched at once: fetching one by one would make each wait.
    return np.concatenate(jax.device_get(parts))[: len(rows)]


class Evaluation:
  """Held-out loss, retrieval and zero-shot accuracy of parameters."""

  def __init__(
    self,
    apply: Apply,
    data: clip_data.Data,
    devices: distributed.Devices,
    *,
    loss: str,
    batch_size: int,
  ):
    """Prepares the evaluation.

    Args:
      apply: of stored images.
      data: the data to evaluate on.
      devices: the devices to compute on.
      loss: a kind of `contrastive.make_losses_fn`.
      batch_size: number of pairs among which the held-out loss tells one.

    Raises:
      ValueError: fewer held-out pairs than that.
    """
    self._data = data
    self._extract = Extractor(apply, devices, batch_size=batch_size)
    self._size = batch_size
    self._losses = jax.jit(make_feature_losses(loss))
    if data.held_out is not None and len(data.held_out[0]) < batch_size:
      raise ValueError(
        f"there are {len(data.held_out[0])} held-out pairs and"
        f" config.eval_batch_size is {batch_size}; expected as many at least:"
        " lower it, or raise config.data.held_out_size."
      )

  def __call__(self, params: Any) -> dict[str, float]:
    """Evaluates parameters; NaN where they have diverged.

    Args:
      params: the learner's.

    Returns:
      `held_out_loss` and recalls such as `image_to_text@1`, and
      `zero_shot_accuracy@1` and `@5`, as far as there is data for them.
    """
    found: dict[str, float] = {}
    if self._data.held_out is not None:
      images, tokens = self._data.held_out
      features = Features(
        self._extract.images(params, images),
        self._extract.texts(params, tokens),
        *jax.device_get((params["logit_scale"], params.get("logit_bias"))),
      )
      found["held_out_loss"] = self._loss(features)
      found |= _or_nan(
        _RECALLS,
        zero_shot.retrieval,
        features.image,
        features.text,
      )
    if self._data.zero_shot is not None:
      images, labels, prompts = self._data.zero_shot
      seen = self._extract.images(params, images)
      texts = self._extract.texts(params, prompts)
      found |= _or_nan(
        _ACCURACIES,
        lambda *features: {
          f"zero_shot_{name}": value
          for name, value in zero_shot.accuracy(
            features[0], zero_shot.class_embeddings(features[1]), labels
          ).items()
        },
        seen,
        texts,
      )
    return found

  def _loss(self, features):
    """Averages over whole batches: fewer negatives would be easier."""
    parts = []
    for start in range(0, len(features.image) - self._size + 1, self._size):
      rows = slice(start, start + self._size)
      part = features._replace(
        image=features.image[rows], text=features.text[rows]
      )
      batch = {"image": part.image, "text": part.text}
      parts.append(self._losses(part, batch))
    return float(np.mean(jax.device_get(parts)))


def make_feature_losses(kind: str) -> Callable[[Features, Any], jax.Array]:
  """Makes `(features of a batch, batch) -> losses [B]`: a model's losses."""

  def losses(features, batch):
    return contrastive.losses_and_hits(features, batch, kind)[0]

  return losses


def _or_nan(names, measure, *features):
  if not all(np.isfinite(x).all() for x in features):
    return dict.fromkeys(names, float("nan"))
  return measure(*features)
