"""What the headers of encoded images say, without decoding them."""

import io
import warnings

import numpy as np
from PIL import Image

from experiments.data.pairs import images as images_lib
from experiments.data.sources import parts

_SEEN = 16  # Images whose headers are read.
_HEAD = 1 << 16  # Bytes of each: a header that is longer says nothing.
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


def find_channels(reader: parts.Reader, count: int) -> int:
  """Finds how many channels the images of a set have.

  Args:
    reader: Of encoded images.
    count: How many there are; some of them are looked at, spread over all.

  Returns:
    1 if all of these are grey, else 3.
  """
  if not count:
    return 3
  rows = np.unique(np.linspace(0, count - 1, _SEEN).astype(int))
  grey = [_is_grey(content) for content in reader.read(rows)]
  known = [found for found in grey if found is not None]
  return 1 if known and all(known) else 3


def _is_grey(content: bytes) -> bool | None:
  """True for a grey image, None where its header doesn't tell."""
  formats = images_lib.find_formats(images_lib.OPTIONAL_FORMATS)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Of large or odd images.
      with Image.open(io.BytesIO(content[:_HEAD]), formats=formats) as image:
        return image.mode in _GREY
  except Exception:  # Pillow's readers raise whatever they run into.
    return None
