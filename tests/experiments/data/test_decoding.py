"""From files of images to pixels: sizes, crops, and what files may hold."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from experiments.data import decoding
from experiments.data.pairs.images import BadImageError
from tests.experiments.data.source_case import encode, photos

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), np.uint8)


def decode(content, size=None, resize="keep_ratio", channels=3, **options):
  return decoding.Transform(channels, size, resize).decode(content, **options)


class TestSizes:
  def test_an_image_of_the_wanted_size_stays_as_it_is(self):
    square = np.ascontiguousarray(PIXELS[:, :12])
    for resize in ("keep_ratio", "squeeze"):
      for sample in (square, encode(square)):
        np.testing.assert_array_equal(decode(sample, 12, resize), square)

  @pytest.mark.parametrize("shape", [(12, 20), (20, 12), (17, 17), (9, 40)])
  def test_keeps_the_ratio_or_squeezes(self, shape):
    pixels = RNG.integers(0, 256, (*shape, 3), np.uint8)
    whole = Image.fromarray(pixels)
    height, width = shape
    for sample in (pixels, encode(pixels)):
      squeezed = decode(sample, 8, "squeeze")
      np.testing.assert_array_equal(squeezed, whole.resize((8, 8), 2))
      kept = decode(sample, 8)
      assert kept.shape == (8, 8, 3)
      short = min(shape)
      resized = whole.resize((8 * width // short, 8 * height // short), 2)
      left, top = (round((side - 8) / 2) for side in resized.size)
      cut = np.asarray(resized.crop((left, top, left + 8, top + 8)))
      # Pillow rounds between its two passes.
      assert np.abs(kept.astype(int) - cut).max() <= 2

  def test_a_jpeg_file_is_decoded_no_larger_than_needed(self):
    (content,), _ = photos(1, side=(640, 641))
    whole = Image.open(io.BytesIO(content))
    small = Image.open(io.BytesIO(content))
    small.draft(None, (80, 80))
    assert small.size == (80, 80)
    found = decode(content, 80)
    np.testing.assert_array_equal(found, np.asarray(small))
    exact = np.asarray(whole.resize((80, 80), Image.Resampling.BILINEAR))
    assert np.abs(found.astype(float) - exact).mean() < 2
    # An array is what the file would be, so it has nothing to skip.
    assert decode(content, 81).shape == (81, 81, 3)

  def test_bad_values(self):
    with pytest.raises(ValueError, match="at least 1 pixel"):
      decoding.Transform(3, 0)
    with pytest.raises(ValueError, match="expected 'keep_ratio' or 'squeeze'"):
      decoding.Transform(3, 8, "stretch")
    with pytest.raises(ValueError, match="expected the size of the crops"):
      decode(PIXELS, draws=np.zeros((10, 4)))


class TestRandomCrops:
  def test_are_what_was_drawn(self):
    draws, scale = RNG.random((10, 4)), (0.2, 0.5)
    box = decoding.random_box((20, 12), draws, scale)
    expected = None
    for area, ratio, left, top in draws:
      target = (0.2 + 0.3 * area) * 240
      proportion = (3 / 4) ** (1 - ratio) * (4 / 3) ** ratio
      width = round(math.sqrt(target * proportion))
      height = round(math.sqrt(target / proportion))
      if width <= 20 and height <= 12:
        x = math.floor(left * (21 - width))
        y = math.floor(top * (13 - height))
        expected = (x, y, x + width, y + height)
        break
    assert box == expected
    for sample in (PIXELS, encode(PIXELS)):
      found = decode(sample, 8, draws=draws, scale=scale)
      shown = Image.fromarray(PIXELS).resize((8, 8), 2, box)
      np.testing.assert_array_equal(found, shown)

  def test_lie_within_and_cover_the_asked_share(self):
    shares = []
    for draws in np.random.default_rng(1).random((500, 10, 4)):
      left, top, right, bottom = decoding.random_box((50, 40), draws, (0.25, 1))
      assert 0 <= left < right <= 50
      assert 0 <= top < bottom <= 40
      shares.append((right - left) * (bottom - top) / 2000)
    assert 0.22 < min(shares) < 0.3
    assert max(shares) > 0.9

  @pytest.mark.parametrize("shape", [(1, 1), (100, 1), (1, 100)])
  def test_of_an_image_that_has_none_are_its_middle(self, shape):
    draws = np.full((10, 4), 0.999)
    left, top, right, bottom = decoding.random_box(shape, draws, (1, 1))
    assert (bottom - top, min(shape)) == (1, 1)
    assert 0 <= left < right <= shape[0]
    assert 0 <= top < bottom <= shape[1]


class TestKindsOfFiles:
  def test_every_mode_has_the_asked_channels(self):
    files = {
      "palette": encode(PIXELS, mode="P"),
      "one bit": encode(PIXELS, mode="1"),
      "grey": encode(PIXELS, mode="L"),
      "grey and alpha": encode(PIXELS, mode="LA"),
      "alpha": encode(PIXELS, mode="RGBA"),
      "CMYK": encode(PIXELS, "JPEG", mode="CMYK"),
      "progressive": encode(PIXELS, "JPEG", progressive=True),
      "WebP": encode(PIXELS, "WEBP", lossless=True),
      "BMP": encode(PIXELS, "BMP"),
      "GIF": encode(PIXELS, "GIF"),
      "TIFF": encode(PIXELS, "TIFF"),
      "a pixel": encode(PIXELS[:1, :1]),
    }
    for name, content in files.items():
      for channels in (1, 3, 4):
        found = decode(content, 6, channels=channels)
        assert found.shape == (6, 6, channels), name
        assert found.dtype == np.uint8

  def test_tones_of_16_bits_are_kept(self):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    content = encode(ramp[:, None].repeat(3, axis=1))
    for channels in (1, 3):
      found = decode(content, channels=channels)
      assert found.shape == (256, 3, channels)
      np.testing.assert_array_equal(found[:, 0, 0], np.arange(256))

  @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
  def test_photographs_are_turned_upright(self, kind):
    turns = {
      1: lambda x: x,
      2: lambda x: x[:, ::-1],
      3: lambda x: x[::-1, ::-1],
      4: lambda x: x[::-1],
      5: lambda x: x.transpose(1, 0, 2),
      6: lambda x: np.rot90(x, -1),
      7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
      8: np.rot90,
    }
    for number, turn in turns.items():
      exif = Image.Exif()
      exif[274] = number
      content = encode(PIXELS, kind, exif=exif)
      stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
      np.testing.assert_array_equal(decode(content), turn(stored))

  def test_damaged_and_huge_ones_are_bad(self):
    (photo,), _ = photos(1, side=(200, 201))
    bomb = encode(np.zeros((1, 30_000), np.uint8))
    for content, reason in (
      (photo[: len(photo) // 2], "not readable"),
      (encode(RNG.integers(0, 9, (60, 60, 3), np.uint8))[:-2000], "readable"),
      (b"", "not readable"),
      (b"<svg/>", "not readable"),
      (bomb, "30000 x 1 pixels"),
    ):
      with pytest.raises(BadImageError, match=reason):
        decode(content, 8)

  def test_a_damaged_orientation_does_not_cost_the_image(self):
    content = encode(PIXELS, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(content), PIXELS)
