"""Limits on the claims of strangers' files, all in one place.

Nothing in a shard is ever unpacked to disk, followed as a link, or run. Beyond
that, every size that a file claims is compared with these before memory is
given to it. A sample beyond a limit is a broken sample; see `shards`.
"""

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Limits:
  """Upper bounds; whatever exceeds one is refused before it is read.

  Attributes:
    image_bytes: Of an encoded image.
    caption_bytes: Of a caption. A long caption is no fault: the tokenizer cuts
      it. Ten thousand words take some 60 KB.
    json_bytes: Of a sample's JSON, which may hold EXIF data.
    name_bytes: Of a member's name in a tar file.
    header_bytes: Of a member's headers in a tar file (pax, GNU).
    sample_members: Files of one name in a tar file.
    image_side: Pixels, the longer side of an image.
    image_pixels: Width times height. Decoding takes 3 to 12 bytes for each, on
      each of the decoding threads.
    image_scans: Of a JPEG file: each is a pass over all of its pixels.
      Progressive files have some ten.
    image_blocks: Of a PNG, GIF or WebP file, and tags of a TIFF file: pieces
      that are no pixels of the first frame. Photographs have some ten.
    image_metadata: Bytes in these, beside pixels, where they must be unpacked
      to be passed over.
    json_depth: Lists and objects within each other.
    config_bytes: Of a JSON file beside weights.
    tokenizer_bytes: Of a tokenizer's file, unpacked.
    weights_header: Bytes of a safetensors file's table of contents.
    table_row_group: Bytes that a row group of a Parquet file may claim to take
      once it is unpacked.
    window_bytes: Memory of one window of the shuffle, which is closed early
      where large samples fill it.
  """

  image_bytes: int = 32 << 20
  caption_bytes: int = 1 << 20
  json_bytes: int = 1 << 20
  name_bytes: int = 4096
  header_bytes: int = 1 << 16
  sample_members: int = 1000
  image_side: int = 16_384
  image_pixels: int = 64_000_000
  image_scans: int = 50
  image_blocks: int = 1000
  image_metadata: int = 1 << 20
  json_depth: int = 100
  config_bytes: int = 16 << 20
  tokenizer_bytes: int = 64 << 20
  weights_header: int = 32 << 20
  table_row_group: int = 8 << 30
  window_bytes: int = 1 << 30

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f"limit {field.name} must be a positive integer, got {value!r}"
        )


DEFAULT = Limits()


def parse_json(
  content: bytes | str, *, most: int, limits: Limits = DEFAULT
) -> Any:
  """Parses JSON, unless it is larger or deeper than the limits.

  Args:
    content: The file's content.
    most: Bytes that it may have.
    limits: `json_depth`.

  Returns:
    The value.

  Raises:
    ValueError: If it is no JSON, too large or too deep; without a file's name.

  Example:
    >>> parse_json(b'{"uid": "07"}', most=100)
    {'uid': '07'}
  """
  if len(content) > most:
    raise ValueError(f"it has {len(content)} bytes; the limit is {most}")
  try:
    value = json.loads(content)
  except RecursionError:
    depth = limits.json_depth + 1
  else:
    depth, level = 0, [value]
    while level and depth <= limits.json_depth:
      depth += 1
      level = [
        inner
        for outer in level
        if isinstance(outer, (dict, list))
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, (dict, list))
      ]
  if depth > limits.json_depth:
    raise ValueError(
      f"its lists and objects lie in each other, more than {limits.json_depth}"
      " deep"
    )
  return value
