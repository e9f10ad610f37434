"""A source of samples that a test makes up, and files of images."""

import io

import jax
import numpy as np
from PIL import Image

from experiments.data import decoding, store
from experiments.data.sources import base
from experiments.tasks.classification import inputs


class Handmade(base.Source):
  """Samples in a list: encoded images, or arrays."""

  def __init__(self, samples, labels=None, *, channels=3, shape=None):
    self.samples = samples
    labels = np.zeros(len(samples), int) if labels is None else labels
    super().__init__(
      name="handmade",
      split="train",
      where="memory",
      labels=labels,
      ids=np.array([f"id{row}" for row in range(len(samples))]),
      class_names=[str(label) for label in range(int(np.max(labels)) + 1)],
      content=b"".join(np.asarray(sample).tobytes() for sample in samples),
      channels=channels,
      shape=shape,
    )

  def read(self, positions):
    return [self.samples[at] for at in self.check_positions(positions)]


def encode(pixels, kind="PNG", mode=None, **options):
  """An image file of pixels."""
  image = Image.fromarray(np.asarray(pixels))
  if mode is not None:
    image = image.convert(mode)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def photos(count, *, kind="JPEG", seed=0, side=(20, 60)):
  """Encoded smooth images of several sizes, and labels."""
  rng = np.random.default_rng(seed)
  files = []
  for _ in range(count):
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    size = tuple(int(x) for x in rng.integers(*side, 2))
    files.append(encode(coarse.resize(size, Image.Resampling.BICUBIC), kind))
  return files, rng.integers(0, 3, count)


def see(images, mean=(0.0,), std=(1.0,)):
  """All images as a model sees them, normalised."""
  pixels, _ = images.reader.read(range(len(images.source)))
  expand = jax.jit(inputs.make_expand(mean, std))
  return np.asarray(expand({"image": pixels}, None)["image"])


def open_images(source, *, size=None, resize="keep_ratio", **options):
  """Images of a source, with no share that may be bad."""
  transform = decoding.Transform(source.channels, size, resize)
  return store.Images(source, transform, **options)
