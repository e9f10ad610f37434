"""Mean and standard deviation of pixels, by counting the 256 levels.

Counts are exact, so that the sum of several processes' counts is that of one,
and it takes no memory worth the name.
"""

import json
import math

import numpy as np

from experiments.data import store
from experiments.runtime import distributed

# Pixels up to which all images are looked at: somewhat more than CIFAR-10 has.
WHOLE = 1 << 26
_LEAST_STD = 1e-3  # a constant channel would divide by zero


def measure(
  images: store.Images, *, samples: int, devices: distributed.Devices
) -> tuple[list[float], list[float]]:
  """Measures mean and standard deviation per channel.

  All processes call this at once; each decodes its own part of the sample.

  Args:
    images: uint8 images.
    samples: Images to look at, spread evenly over the set, where it has more
      than `WHOLE` pixels; all of a smaller one.
    devices: Those of the run.

  Returns:
    Mean and standard deviation of pixels scaled to [0, 1], the latter at least
    0.001.

  Raises:
    ValueError: If no sample is asked for, or all are bad.
  """
  if samples < 1:
    raise ValueError(
      f"config.data.statistics_samples is {samples}; expected at least 1"
    )
  key = ("statistics", images.source.fingerprint, images.reader.transform)
  return store.keep((*key, samples), lambda: _measure(images, samples, devices))


def _measure(images, samples, devices):
  channels = images.shape[-1]
  own = _sample(images, samples, images.shard)
  counts = np.zeros((channels, 256), np.int64)
  for part in images.read_own(own):
    for channel in range(channels):
      counts[channel] += np.bincount(
        part[..., channel].reshape(-1), minlength=256
      )
  if devices.process[1] > 1:
    texts = distributed.gather_texts(json.dumps(counts.tolist()))
    counts = np.sum([json.loads(text) for text in texts], axis=0)
  total = int(counts[0].sum())
  if not total:
    raise ValueError(
      f"none of the images of {images.source} that were looked at for their"
      " mean and deviation can be used; set config.data.mean and"
      " config.data.std"
    )
  levels = np.arange(256) / 255
  mean = counts @ levels / total
  spread = (levels - mean[:, None]) ** 2
  std = np.sqrt((counts * spread).sum(axis=1) / total)
  return mean.tolist(), np.maximum(std, _LEAST_STD).tolist()


def _sample(images, samples, own):
  count = len(images.source)
  if count * math.prod(images.shape[:2]) <= WHOLE or samples >= count:
    return np.arange(own.start, own.stop)
  chosen = np.arange(samples) * count // samples
  return chosen[(chosen >= own.start) & (chosen < own.stop)]
