"""Encoded images of unknown origin as square pixels, as CLIP sees them.

Of every image the first frame is decoded as Pillow reads it, then turned to 8
bits a channel:

  1, L, P, RGB, YCbCr    as they are
  LA, PA, RGBA, ...      without their transparency: colours are those that are
                         stored, under transparent pixels too
  CMYK                   as ink without a profile: (1 - C)(1 - K)
  16 or 12 bits of grey  black is 0 and white the most that the bits hold,
                         rounded: v * 255 / 65535
  16 bits of a colour    the upper 8 of them, which is at most one level less
  float                  0 is black and 1 is white; other values are refused
  signed, 32-bit grey    refused: nothing says what white is

Profiles and gamma are left aside, as CLIP's own preprocessing does, and so is
the camera's orientation, unless `load` is asked to turn images upright; but
Pillow itself turns TIFF files upright.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.runtime import limits as limits_lib

# Pillow knows forty formats, some of which run other programs.
FORMATS = ("JPEG", "PNG", "WEBP")
# By request only: their extensions, and Pillow's names of them.
OPTIONAL_FORMATS = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF"}
INTERPOLATIONS = {
  "bicubic": Image.Resampling.BICUBIC,
  "bilinear": Image.Resampling.BILINEAR,
}
_PHOTOMETRIC, _BITS = 262, 258  # Tags of TIFF.
_SUB_FOLDERS = (34665, 34853, 40965)  # Of the camera: Pillow reads them too.
# In a JPEG file: neither a byte of pixels, which has a 0 behind it, nor one of
# the marks by which reading goes on after damage.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_JUNK = 1 << 16  # Bytes; Pillow passes over them one by one.
_PACKED = 64  # Compressed texts and profiles of a PNG file.
# The camera's orientation, by EXIF's numbers, and how to turn it upright.
_ORIENTATION = 274
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_TOO_LARGE, _NOT_READABLE = "image too large", "image not readable"


class BadImageError(Exception):
  """An image that can't be used; `reason` is the same for all of its kind."""

  def __init__(self, reason: str, detail: str):
    """Keeps both."""
    super().__init__(f"{reason}: {detail}")
    self.reason, self.detail = reason, detail


def find_formats(extensions: Iterable[str]) -> tuple[str, ...]:
  """Adds to `FORMATS` those of `OPTIONAL_FORMATS` that have such extensions.

  Example:
    >>> find_formats(["jpg", "tiff"])
    ('JPEG', 'PNG', 'WEBP', 'TIFF')
  """
  more = (OPTIONAL_FORMATS.get(extension) for extension in extensions)
  return tuple(dict.fromkeys((*FORMATS, *filter(None, more))))


def decode(
  encoded: bytes,
  *,
  size: int,
  interpolation: str = "bicubic",
  formats: tuple[str, ...] = FORMATS,
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
    formats: Those that are read, as `find_formats` gives them.
    limits: All that begin with `image_`, compared with the file's claims before
      anything is decoded.

  Returns:
    uint8 [S, S, 3].

  Raises:
    BadImageError: If the file is something else, damaged, or too large.
  """
  decoded = load(encoded, "RGB", formats=formats, limits=limits)
  square = middle_square(decoded, size, INTERPOLATIONS[interpolation])
  return np.asarray(square)


def load(
  encoded: bytes,
  mode: str,
  *,
  formats: tuple[str, ...] = FORMATS,
  limits: limits_lib.Limits = limits_lib.DEFAULT,
  upright: bool = False,
  least: Callable[[tuple[int, int]], tuple[float, float]] | None = None,
) -> Image.Image:
  """Decodes a whole image within `limits`, to 8 bits a channel.

  Args:
    encoded: The file's content.
    mode: Pillow's: "L", "RGB" or "RGBA".
    formats: Those that are read.
    limits: As in `decode`.
    upright: Whether to turn it as the camera's orientation says.
    least: From an image's (width, height) to those that are needed. A JPEG file
      is decoded at the least half, quarter or eighth of its size that is not
      below them, which takes a fraction of the time; None decodes all of it.

  Returns:
    The image, of that mode.

  Raises:
    BadImageError: As `decode`.
  """
  try:
    _check_blocks(encoded, limits)
    image = Image.open(io.BytesIO(encoded), formats=formats)
  except BadImageError:
    raise
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise BadImageError(_TOO_LARGE, str(error)) from error
  except UnidentifiedImageError as error:
    raise BadImageError(
      _NOT_READABLE, f"it is none of {', '.join(formats)}"
    ) from error
  except MemoryError:
    raise  # It is the machine's, not the image's.
  except Exception as error:  # Pillow's readers raise whatever they run into.
    raise BadImageError(_NOT_READABLE, _text(error)) from error
  with image:
    _check_size(*image.size, limits)
    try:
      if least is not None and image.format == "JPEG":
        turned = upright and _orientation(image) >= 5  # Lies on its side.
        width, height = least(image.size[::-1] if turned else image.size)
        wanted = (height, width) if turned else (width, height)
        image.draft(None, (math.ceil(wanted[0]), math.ceil(wanted[1])))
      image.load()
      _check_size(*image.size, limits)
      turn = _UPRIGHT.get(_orientation(image)) if upright else None
      decoded = _to_eight_bits(image).convert(mode)
      return decoded if turn is None else decoded.transpose(turn)
    except (BadImageError, MemoryError):
      raise
    except Exception as error:
      raise BadImageError(_NOT_READABLE, _text(error)) from error


def _orientation(image: Image.Image) -> int:
  """Returns EXIF's number of the orientation; 1, upright, if it has none."""
  try:
    return int(image.getexif().get(_ORIENTATION, 1))
  except Exception:  # Of a damaged block: the pixels are there all the same.
    return 1


def _check_size(width: int, height: int, limits: limits_lib.Limits) -> None:
  if (
    max(width, height) > limits.image_side
    or width * height > limits.image_pixels
  ):
    raise BadImageError(
      _TOO_LARGE,
      f"{width} x {height} pixels; the limits are {limits.image_side} a side"
      f" and {limits.image_pixels} in all",
    )


def _to_eight_bits(image: Image.Image) -> Image.Image:
  """Converts an image to values in 0 .. 255, whatever Pillow read them as."""
  if image.mode in ("La", "RGBa"):  # Multiplied by their opacity.
    return image.convert(image.mode.upper())
  if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
    return image
  tags = getattr(image, "tag_v2", {})
  values = np.asarray(image)
  if image.mode == "F":
    # Comparisons with NaN are false.
    if not (values.min() >= 0 and values.max() <= 1):
      raise BadImageError(
        _NOT_READABLE,
        f"float pixels of {values.min():.4g} to {values.max():.4g}; expected 0"
        " (black) to 1 (white)",
      )
    white = 1
  elif image.mode == "I" and (
    image.format != "PNG" or values.min() < 0 or values.max() > 0xFFFF
  ):
    raise BadImageError(
      _NOT_READABLE,
      "grey of 32 bits or with a sign, of which nothing says what is white;"
      " expected 8 or 16 bits",
    )
  else:
    # Older versions of Pillow read the 16 bits of a PNG file as "I".
    white = (1 << tags.get(_BITS, (16,))[0]) - 1
  levels = np.multiply(values, 255 / white, dtype=np.float32)
  if tags.get(_PHOTOMETRIC) == 0:  # White is stored as zero.
    np.subtract(255, levels, out=levels)
  return Image.fromarray(np.rint(levels, out=levels).astype(np.uint8))


def _check_blocks(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Raises BadImageError if a file's parts would take too long to go through.

  Pillow reads these before it tells an image's size, or decodes as often as the
  file repeats itself. Only parts that take a reader time or memory are checked;
  damage is left to Pillow.
  """
  if encoded.startswith(b"\xff\xd8"):
    _check_jpeg(encoded, limits)
  elif encoded.startswith(b"\x89PNG\r\n\x1a\n"):
    _check_png(encoded, limits)
  elif encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
    _check_webp(encoded, limits)
  elif encoded.startswith((b"GIF87a", b"GIF89a")):
    _check_gif(encoded, limits)
  elif encoded.startswith(b"BM"):
    _check_bmp(encoded, limits)
  elif encoded.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
    _check_tiff(encoded, limits)


def _too_many(what: str, count: int, most: int) -> BadImageError:
  return BadImageError(_TOO_LARGE, f"{count} {what}; the limit is {most}")


def _check_jpeg(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Checks scans: each of a progressive file passes over all of its pixels."""
  place, blocks, scans, colours = 2, 0, 0, None
  while found := _MARKER.search(encoded, place):
    if not scans and found.start() - place > _JUNK:
      raise _too_many("bytes between segments", found.start() - place, _JUNK)
    kind, place = found[1][0], found.end()
    if kind == 0xD9:  # The end; anything may follow.
      return
    if kind in (0xC0, 0xC1):  # All colours, if they are in one scan.
      colours = encoded[place + 7 : place + 8]
    if kind == 0xDA:
      scans += 1
      if colours == encoded[place + 2 : place + 3]:
        return  # Almost always: there can be no other.
    else:
      blocks += 1
    if scans > limits.image_scans:
      raise _too_many("scans or more", scans, limits.image_scans)
    if blocks > limits.image_blocks:
      raise _too_many("blocks or more", blocks, limits.image_blocks)
    if kind not in (0x01, 0xD8):  # These stand alone.
      place += int.from_bytes(encoded[place : place + 2], "big")


def _check_png(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Checks chunks beside pixels; a reader unpacks compressed ones."""
  place, others, packed = 8, 0, 0
  pixels = 0
  while place + 8 <= len(encoded):
    length = int.from_bytes(encoded[place : place + 4], "big")
    kind = encoded[place + 4 : place + 8]
    if kind in (b"IDAT", b"fdAT", b"fcTL"):
      pixels += 1
    else:
      others += 1
    packed += kind in (b"iCCP", b"zTXt", b"iTXt")
    if kind == b"IEND":
      return
    place += 12 + length
    if others > limits.image_blocks:
      raise _too_many("blocks or more", others, limits.image_blocks)
    # Each may grow to a megabyte, by Pillow's own limit.
    if packed > _PACKED:
      raise _too_many("compressed texts or more", packed, _PACKED)
    # Writers make them of some KB each.
    if pixels > max(limits.image_blocks, limits.image_bytes >> 10):
      raise _too_many("pieces or more", pixels, limits.image_bytes >> 10)


def _check_webp(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Checks the canvas, which opening the file makes, and the blocks."""
  kind, about = encoded[12:16], encoded[20:30]
  if kind == b"VP8X" and len(about) == 10:
    width = 1 + int.from_bytes(about[4:7], "little")
    height = 1 + int.from_bytes(about[7:10], "little")
    _check_size(width, height, limits)
  elif kind == b"VP8 " and len(about) == 10:
    width, height = (x & 0x3FFF for x in struct.unpack("<HH", about[6:10]))
    _check_size(width, height, limits)
  elif kind == b"VP8L" and len(about) >= 5:
    bits = int.from_bytes(about[1:5], "little")
    width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    _check_size(width, height, limits)
  place, blocks = 12, 0
  while place + 8 <= len(encoded):
    length = int.from_bytes(encoded[place + 4 : place + 8], "little")
    place += 8 + length + length % 2
    blocks += 1
    if blocks > 10 * limits.image_blocks:  # Frames are among them.
      raise _too_many("blocks or more", blocks, 10 * limits.image_blocks)


def _check_gif(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Checks extensions before the first image: comments are joined in turn."""
  flags = encoded[10] if len(encoded) > 10 else 0
  place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
  blocks = 0
  while encoded[place : place + 1] == b"!":
    place += 2
    while place < len(encoded) and encoded[place]:
      place += 1 + encoded[place]
      blocks += 1
      if blocks > 10 * limits.image_blocks:
        raise _too_many("blocks or more", blocks, 10 * limits.image_blocks)
    place += 1
    blocks += 1


def _check_bmp(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Checks run lengths, which are unpacked one at a time, in Python."""
  if int.from_bytes(encoded[30:34], "little") in (1, 2) and (
    len(encoded) > limits.image_metadata
  ):
    raise _too_many("bytes of run lengths", len(encoded), limits.image_metadata)


def _check_tiff(encoded: bytes, limits: limits_lib.Limits) -> None:
  """Checks tags: each may point to all of the file; lists become Python's."""
  order: Literal["little", "big"]
  order = "little" if encoded.startswith(b"II") else "big"
  big = encoded[2:4] in (b"+\0", b"\0+")
  word, entry, counted = (8, 20, 8) if big else (4, 12, 2)

  def number(place: int, length: int) -> int:
    return int.from_bytes(encoded[place : place + length], order)

  places = [number(8, 8) if big else number(4, 4)]
  tags, values, kept, seen = 0, 0, 0, set()
  while places:
    place = places.pop()
    if place in seen or not 0 < place < len(encoded):
      continue
    seen.add(place)
    count = number(place, counted)
    tags += count
    if tags > limits.image_blocks:
      raise _too_many("tags", tags, limits.image_blocks)
    for start in range(place + counted, place + counted + entry * count, entry):
      tag, kind = number(start, 2), number(start + 2, 2)
      if kind in (1, 2, 7):  # Bytes and texts are kept as they are.
        kept += number(start + 4, word)
      else:
        values += number(start + 4, word)
      if tag in _SUB_FOLDERS:
        places.append(number(start + 4 + word, word))
  if kept > len(encoded):
    raise _too_many("bytes of tags", kept, len(encoded))
  if values > limits.image_metadata:
    raise _too_many("numbers in tags", values, limits.image_metadata)


def middle_square(
  image: Image.Image, size: int, interpolation: Image.Resampling
) -> Image.Image:
  """Resizes the shorter side and cuts out the middle, as `decode` does."""
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
