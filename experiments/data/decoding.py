"""From a stored sample to the array that a model sees of it.

An image is turned upright by the camera's orientation and converted to the
source's channels, then resized by Pillow's antialiased bilinear filter. JPEG
files are decoded at half, a quarter or an eighth of their size where that is
still no smaller than what is needed, whatever they are stored in. Images that
already have the wanted size stay as they are, bit for bit.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from experiments.data import sources
from experiments.data.pairs import images as images_lib

KEEP_RATIO, SQUEEZE = "keep_ratio", "squeeze"
# How often a random crop is drawn until it lies within the image, as published.
ATTEMPTS = 10
RATIO = (3 / 4, 4 / 3)  # bounds of a random crop's width by its height
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BILINEAR = Image.Resampling.BILINEAR
_FORMATS = images_lib.find_formats(images_lib.OPTIONAL_FORMATS)


@dataclasses.dataclass(frozen=True)
class Transform:
  """What is done to every sample alike.

  Attributes:
    channels: Of images: 1, 3 or 4; None: samples are features.
    size: Height and width in pixels, S; None leaves images as they are.
    resize: "keep_ratio" resizes the shorter side and cuts out the middle;
      "squeeze" resizes both sides, whatever their proportions.

  Raises:
    ValueError: If a value is out of range.
  """

  channels: int | None
  size: int | None = None
  resize: str = KEEP_RATIO

  def __post_init__(self):
    if self.size is not None and self.size < 1:
      raise ValueError(
        f"size must be at least 1 pixel, or None; got {self.size}"
      )
    if self.resize not in (KEEP_RATIO, SQUEEZE):
      raise ValueError(
        f"config.data.resize is {self.resize!r}; expected {KEEP_RATIO!r} or"
        f" {SQUEEZE!r}"
      )

  def decode(
    self,
    sample: bytes | np.ndarray,
    draws: np.ndarray | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
  ) -> np.ndarray:
    """Decodes and resizes one sample.

    Args:
      sample: An encoded image, or an array: uint8 [H, W, C], float32 [D].
      draws: [ATTEMPTS, 4] in [0, 1), which a random crop is made of; None takes
        no random crop.
      scale: Bounds of a random crop's share of the image's area.

    Returns:
      uint8 [S, S, C], or [H, W, C] without a size; float32 [D] of features.

    Raises:
      images_lib.BadImageError: If the image is damaged or too large.
      ValueError: If a random crop is asked for, and no size.
    """
    if self.channels is None:
      return np.asarray(sample, np.float32)
    if draws is not None and self.size is None:
      raise ValueError(
        "config.data.crop is 'random_resized' and config.data.image_size 0;"
        " expected the size of the crops, such as 224"
      )
    if isinstance(sample, np.ndarray):
      whole = (self.size, self.size) if self.size else sample.shape[:2]
      if draws is None and sample.shape[:2] == whole:
        return sample
      flat = sample[..., 0] if sample.shape[-1] == 1 else sample
      return self._resized(Image.fromarray(flat), draws, scale)
    decoded = images_lib.load(
      sample,
      _MODES[self.channels],  # First: a palette's colours can't be averaged.
      formats=_FORMATS,
      upright=True,
      least=self._least(draws, scale),
    )
    return self._resized(decoded, draws, scale)

  def _least(self, draws, scale):
    """Makes the function of the size that a JPEG file must be decoded at."""
    size = self.size
    if size is None:
      return None

    def least(shape):
      width, height = shape
      if draws is not None:
        left, top, right, bottom = random_box(shape, draws, scale)
        return size * width / (right - left), size * height / (bottom - top)
      if self.resize == SQUEEZE:
        return size, size
      short = min(shape)
      return size * width / short, size * height / short

    return least

  def _resized(self, image, draws, scale):
    if self.size is not None:
      wanted = (self.size, self.size)
      if draws is not None:
        box = random_box(image.size, draws, scale)
        image = image.resize(wanted, _BILINEAR, box)
      elif self.resize == KEEP_RATIO:
        image = images_lib.middle_square(image, self.size, _BILINEAR)
      elif image.size != wanted:
        image = image.resize(wanted, _BILINEAR)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads and decodes samples; can be sent to worker processes.

  Attributes:
    source: The samples'.
    transform: What is done to each.
    shape: Of every sample, [H, W, C] or [D].
  """

  source: sources.Source
  transform: Transform
  shape: tuple[int, ...]

  @property
  def dtype(self) -> np.dtype:
    """uint8 of images, float32 of features."""
    return np.dtype(np.float32 if self.transform.channels is None else np.uint8)

  def read(
    self,
    positions: Sequence[int] | np.ndarray,
    draws: np.ndarray | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
  ) -> tuple[np.ndarray, dict[int, str]]:
    """Reads samples.

    Args:
      positions: M of them.
      draws: [M, ATTEMPTS, 4] of random crops; None takes none.
      scale: Bounds of a crop's share of an image's area.

    Returns:
      Samples [M, ...], zeros where an image is bad, and the reasons of those by
      their positions.

    Raises:
      ValueError: If samples differ in size, or files are damaged.
    """
    found = np.zeros((len(positions), *self.shape), self.dtype)
    bad = {}
    stored = self.source.read(np.asarray(positions).tolist())
    for row, (at, sample) in enumerate(zip(positions, stored, strict=True)):
      try:
        array = self.transform.decode(
          sample, None if draws is None else draws[row], scale
        )
      except images_lib.BadImageError as error:
        bad[int(at)] = str(error)
        continue
      if array.shape != self.shape:
        raise ValueError(
          f"images of {self.source} vary in size: sample 0 is {self.shape},"
          f" sample {at} is {array.shape}; expected one size: set"
          " config.data.image_size (size=), such as 224, to resize them"
        )
      found[row] = array
    return found, bad


def random_box(
  shape: tuple[int, int], draws: np.ndarray, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
  """Draws the part of an image that a random-resized crop shows.

  Its area's share and the logarithm of its proportions are uniform; where none
  of the attempts lies within the image, it is the largest middle part whose
  proportions are within the bounds.

  Args:
    shape: The image's width and height.
    draws: [ATTEMPTS, 4] in [0, 1): area, proportions, left, top.
    scale: Bounds of its share of the area.

  Returns:
    left, top, right and bottom in pixels.

  Example:
    >>> random_box((8, 6), np.full((10, 4), 0.5), (0.5, 0.5))
    (2, 1, 7, 6)
  """
  width, height = shape
  low, high = scale
  for area, ratio, left, top in np.asarray(draws).tolist():
    pixels = width * height * (low + (high - low) * area)
    logs = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = math.exp(logs[0] + (logs[1] - logs[0]) * ratio)
    wide, tall = (
      round(math.sqrt(pixels * ratio)),
      round(math.sqrt(pixels / ratio)),
    )
    if 0 < wide <= width and 0 < tall <= height:
      x = int(left * (width - wide + 1))
      y = int(top * (height - tall + 1))
      return x, y, x + wide, y + tall
  wide = min(width, max(1, round(height * RATIO[1])))
  tall = min(height, max(1, round(width / RATIO[0])))
  x, y = (width - wide) // 2, (height - tall) // 2
  return x, y, x + wide, y + tall


def transform_of(data: Any, channels: int | None) -> Transform:
  """Makes the transform that `config.data` asks for.

  Args:
    data: `config.data`: `image_size` (0: as they are) and `resize`.
    channels: Of the source.

  Returns:
    The Transform.

  Raises:
    ValueError: As `Transform`.
  """
  return Transform(channels, data.image_size or None, data.resize)
