"""How much is believed of files that strangers wrote: all limits in one place.

Nothing in a shard is ever unpacked to disk, followed as a link, or run. Beyond
that, every size that a file claims is compared with these before memory is
given to it. A sample beyond a limit is a broken sample; see `shards`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """Upper bounds; whatever exceeds one is refused before it is read.

  Attributes:
    image_bytes: Of an encoded image.
    caption_bytes: Of a caption. A long caption is no fault: the tokenizer cuts
      it. Ten thousand words take some 60 KB.
    json_bytes: Of a sample's JSON, which may hold EXIF data.
    name_bytes: Of the name of a member of a tar file.
    header_bytes: Of what a tar file says about one member (pax, GNU).
    image_side: Pixels, the longer side of an image.
    image_pixels: Width times height. Decoding takes 3 to 4 bytes for each, on
      each of the decoding threads.
    window_bytes: What one window of the shuffle holds in memory; it is closed
      early where large samples fill it.
  """

  image_bytes: int = 32 << 20
  caption_bytes: int = 1 << 20
  json_bytes: int = 1 << 20
  name_bytes: int = 4096
  header_bytes: int = 1 << 16
  image_side: int = 16_384
  image_pixels: int = 64_000_000
  window_bytes: int = 1 << 30

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(
          f"limit {field.name} must be a positive integer, got {value!r}"
        )


DEFAULT = Limits()
