"""Whole splits, decoded into memory at once, for who needs all of their images.

Batches of training and evaluation are decoded by the sample: `data.decoding`.
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np
from PIL import Image

from experiments.data.pairs import images as images_lib
from experiments.data.sources import base

_FORMATS = images_lib.find_formats(images_lib.OPTIONAL_FORMATS)
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_READ_SIZE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One split of a labelled image data set, in memory and read-only.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N], in 0 .. num_classes - 1.
    ids: str [N], each one different: the feature "id" where the set has one,
      else the sample's split and position, as in "train_00042".
    num_classes: How many classes there are.
    class_names: Their names, in the order of the labels.
    fingerprint: A hash of the set's name, split and decoded content.
  """

  images: np.ndarray
  labels: np.ndarray
  ids: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]
  fingerprint: str


def decode_split(source: base.Source, size: int | None) -> Dataset:
  """Decodes all of a source's images; what is decoded is kept.

  Args:
    source: Of images.
    size: Height and width in pixels to which every image is resized, by
      Pillow's bilinear filter, whatever its proportions; None leaves images as
      they are. All are held in memory: N * size * size * C bytes.

  Returns:
    The samples.

  Raises:
    ValueError: If an image is damaged, or images differ in size and `size` is
      None, or the samples are features.
  """
  if size is not None and size < 1:
    raise ValueError(f"size must be at least 1 pixel, or None; got {size}")
  if source.channels is None:
    raise ValueError(
      f"the samples of {source} are features {source.shape}; expected images"
    )
  return _decode(_Same(source), size)


class _Same:
  """A source that equals any other of the same content."""

  def __init__(self, source: base.Source):
    self.source = source
    self._key = (
      source.fingerprint,
      source.name,
      source.split,
      source.where,
      source.channels,
    )

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Same) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


@functools.lru_cache(maxsize=4)
def _decode(same: _Same, size: int | None) -> Dataset:
  source = same.source
  try:
    images = _decode_images(source, size)
  except OSError as error:
    raise source.damaged(error) from error
  images.setflags(write=False)  # Shared by all who load this split.
  arrays = (images, source.labels, source.ids)
  return Dataset(
    images=images,
    labels=source.labels,
    ids=source.ids,
    num_classes=source.num_classes,
    class_names=source.class_names,
    fingerprint=_fingerprint((source.name, source.split), arrays),
  )


def _decode_images(source: base.Source, size: int | None) -> np.ndarray:
  """Decodes every sample: uint8 [N, H, W, C]."""
  assert source.channels is not None
  mode, images = _PIL_MODES[source.channels], None
  for start in range(0, len(source), _READ_SIZE):
    rows = range(start, min(start + _READ_SIZE, len(source)))
    for row, content in zip(rows, source.read(rows), strict=True):
      try:
        image = _decode_image(content, mode, size)
      except images_lib.BadImageError as error:
        raise OSError(f"the image of sample {row}: {error}") from error
      if images is None:
        images = np.empty((len(source), *image.shape), np.uint8)
      if image.shape != images.shape[1:]:
        raise ValueError(
          f"images of {source} vary in size: sample 0 is {images.shape[1:]}, "
          f"sample {row} is {image.shape}; expected one size: set "
          "config.data.image_size (size=), such as 224, to resize them"
        )
      images[row] = image
  assert images is not None
  return images


def _decode_image(
  encoded: bytes | np.ndarray, mode: str, size: int | None
) -> np.ndarray:
  """Decodes one image as uint8 [H, W, C].

  Always by Pillow: TFDS takes OpenCV where that is installed, whose JPEG
  pixels differ, and with them the fingerprint.
  """
  # Converted first: the colours of a palette can't be averaged.
  if isinstance(encoded, np.ndarray):
    pixels = encoded[..., 0] if encoded.shape[-1] == 1 else encoded
    decoded = Image.fromarray(pixels)
  else:
    decoded = images_lib.load(encoded, mode, formats=_FORMATS)
  if size is not None and decoded.size != (size, size):
    decoded = decoded.resize((size, size), Image.Resampling.BILINEAR)
  pixels = np.asarray(decoded)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def _fingerprint(words, arrays) -> str:
  """Hashes some words and the content of some arrays."""
  digest = hashlib.sha256(json.dumps(words).encode())
  for array in arrays:
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()[:32]
