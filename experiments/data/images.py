"""Encoded images of unknown origin as square pixels, as CLIP is shown them."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data import limits as limits_lib

# Pillow knows forty formats, some of which run other programs.
FORMATS = ("JPEG", "PNG", "WEBP")
INTERPOLATIONS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
}


class BadImageError(Exception):
  """An image that can't be used; `reason` is the same for all of its kind."""

  def __init__(self, reason: str, detail: str):
    """Keeps both."""
    super().__init__(f"{reason}: {detail}")
    self.reason, self.detail = reason, detail


def decode(
  encoded: bytes,
  *,
  size: int,
  interpolation: str = "bicubic",
  limits: limits_lib.Limits = limits_lib.DEFAULT,
) -> np.ndarray:
  """Decodes, resizes the shorter side and cuts out the middle square.

  As CLIP's preprocessing does: the longer side becomes `int(size * long /
  short)` pixels, antialiased; the cut is rounded as torchvision rounds it. Only
  the pixels of the cut are computed, so that a very long image takes no more
  memory than any other; they differ from those of the whole image by a level
  or two of 255, where Pillow rounds its two passes in another order.
  Transparency and all frames but the first are dropped.

  Args:
    encoded: A JPEG, PNG or WebP file.
    size: Height and width of the result in pixels, S.
    interpolation: Of `INTERPOLATIONS`.
    limits: `image_side` and `image_pixels`, compared with what the file's
      header says before anything is decoded.

  Returns:
    uint8 [S, S, 3].

  Raises:
    BadImageError: If the file is something else, damaged, or too large.
  """
  try:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise BadImageError("image too large", str(error)) from error
  except UnidentifiedImageError as error:
    raise BadImageError(
      "image not readable", f"it is none of {', '.join(FORMATS)}"
    ) from error
  except Exception as error:  # Pillow's readers raise whatever they run into.
    raise BadImageError("image not readable", _text(error)) from error
  with image:
    width, height = image.size
    if (
      max(width, height) > limits.image_side
      or width * height > limits.image_pixels
    ):
      raise BadImageError(
        "image too large",
        f"{width} x {height} pixels; the limits are {limits.image_side} a side"
        f" and {limits.image_pixels} in all",
      )
    try:
      decoded = image.convert("RGB")
      square = _middle_square(decoded, size, INTERPOLATIONS[interpolation])
    except Exception as error:
      raise BadImageError("image not readable", _text(error)) from error
  return np.asarray(square)


def _middle_square(
  image: Image.Image, size: int, interpolation: Image.Resampling
) -> Image.Image:
  width, height = image.size
  short = min(width, height)
  resized = size * width // short, size * height // short
  left, top = (round((side - size) / 2) for side in resized)
  x, y = width / resized[0], height / resized[1]
  box = (left * x, top * y, (left + size) * x, (top + size) * y)
  # Rounding can put an edge a hair outside.
  box = (*box[:2], min(box[2], width), min(box[3], height))
  if image.size == (size, size):
    return image
  return image.resize((size, size), interpolation, box)


def _text(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"[:200]
