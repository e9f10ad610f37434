"""Streams of image-text pairs: hostile and damaged shards, order, resume."""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import struct
import tarfile
import threading
import time
import types
import zlib
from unittest import mock

import grain
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

import gradmimic_jax as gm
from configs import contrastive as clip_config
from experiments.data import workers
from experiments.data.pairs import (
  datacomp,
  images,
  in_memory as image_text,
  readers,
  shapes,
  shard_files,
  shard_samples,
  shards,
  tar,
)
from experiments.runtime import cache as arrays, limits as limits_lib

SIZE = 16
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tokenizer(captions):
  """Eight bytes of each caption: enough to tell them apart."""
  cut = [caption.encode()[:8].ljust(8, b"\0") for caption in captions]
  return np.frombuffer(b"".join(cut), np.uint8).reshape(-1, 8).astype(np.int32)


def png(width=SIZE, height=SIZE, value=100):
  content = io.BytesIO()
  Image.new("RGB", (width, height), (value, 0, 0)).save(content, "PNG")
  return content.getvalue()


def uid_of(number):
  return f"{number * 2**120 + number:032x}"


def sample(key, uid=None, **parts):
  """The members of a sample: {name: content}, None for one to leave out."""
  about = json.dumps({"uid": uid}).encode()
  parts = {"png": png(), "txt": b"a red star", "json": about, **parts}
  return {f"{key}.{kind}": part for kind, part in parts.items() if part}


def archive(path, members, tar_format=tarfile.GNU_FORMAT):
  """Writes `{name: content}`; a TarInfo in place of content is put in as is."""
  with tarfile.open(path, "w", format=tar_format) as file:
    for name, content in members.items():
      if isinstance(content, tarfile.TarInfo):
        content.name = name
        file.addfile(content)
      else:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
  return str(path)


def listed(path, limits=limits_lib.DEFAULT):
  """The members before the damage, and the damage."""
  found = []
  with open(path, "rb") as file:
    try:
      found.extend(tar.members(file, limits=limits))
    except tar.DamagedError as error:
      return found, str(error)
  return found, None


def rewritten(path, place, content):
  """The file with some bytes of its first header replaced, and a checksum."""
  raw = bytearray(pathlib.Path(path).read_bytes())
  raw[place : place + len(content)] = content
  raw[148:156] = b" " * 8
  raw[148:156] = b"%06o\0 " % sum(raw[:512])
  pathlib.Path(path).write_bytes(raw)


class TestTar:
  @pytest.mark.parametrize("tar_format", FORMATS)
  def test_agrees_with_the_standard_library(self, tmp_path, tar_format):
    members = {"folder/": tarfile.TarInfo(), "plain.txt": b"text"}
    members["folder/"].type = tarfile.DIRTYPE
    members["link"] = tarfile.TarInfo()
    members["link"].type, members["link"].linkname = tarfile.SYMTYPE, "x" * 90
    members["a" * 90 + "/" + "b" * 60] = b"7" * 513
    if tar_format != tarfile.USTAR_FORMAT:
      members["é" * 200] = b""
      members["y" * 300 + ".json"] = b"{}"
    path = archive(tmp_path / "x.tar", members, tar_format)
    found, damage = listed(path)
    assert damage is None
    with tarfile.open(path) as reference:
      expected = [(m.name, m.offset_data, m.size, m.isreg()) for m in reference]
    assert [
      (m.name.rstrip("/"), m.offset, m.size, m.kind == tar.FILE) for m in found
    ] == expected

  def test_sizes_beyond_octal_and_pax_sizes_are_read(self, tmp_path):
    path = archive(tmp_path / "x.tar", {"a": b"12345", "b": b""})
    rewritten(path, 124, b"\x80" + (5).to_bytes(11, "big"))
    assert [m.size for m in listed(path)[0]] == [5, 0]
    info = tarfile.TarInfo("c")
    info.size, info.pax_headers = 3, {"size": "3", "comment": "x" * 900}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
      file.addfile(info, io.BytesIO(b"123"))
      file.addfile(tarfile.TarInfo("d"))
    assert [(m.name, m.size) for m in listed(path)[0]] == [("c", 3), ("d", 0)]

  def test_cut_off_anywhere_keeps_all_before(self, tmp_path):
    members = {f"{n}.txt": b"x" * (300 * n) for n in range(5)}
    path = pathlib.Path(archive(tmp_path / "x.tar", members))
    whole, damage = listed(path)
    assert (len(whole), damage) == (5, None)
    content = path.read_bytes()
    closed = whole[-1].offset + 1200 // 512 * 512 + 512
    for end in range(0, closed, 100):
      path.write_bytes(content[:end])
      found, damage = listed(path)
      assert found == [m for m in whole if m.offset + m.size <= end]
      assert f"cut off at byte {end}" in damage

  def test_damaged_header_is_not_taken_for_the_end(self, tmp_path):
    path = pathlib.Path(archive(tmp_path / "x.tar", {"a": b"1", "b": b"2"}))
    content = bytearray(path.read_bytes())
    content[1024 + 5] ^= 1  # In the name of the second member.
    path.write_bytes(content)
    found, damage = listed(path)
    assert [m.name for m in found] == ["a"]
    assert damage == "a damaged header at byte 1024"
    # What the standard library makes of it, and why it isn't used.
    with tarfile.open(path) as reference:
      assert reference.getnames() == ["a"]

  @pytest.mark.parametrize(
    ("place", "content", "damage"),
    [
      (124, b"\xff" * 12, "a size that is no number"),  # -1, in binary
      (124, b"\x80" + b"\xff" * 11, "cut off"),  # 2**88 - 1
      (124, b"-0000000001\0", "a size that is no number"),
      (156, b"L", "an extra header of 5000 bytes"),
      (156, b"Z", None),
    ],
  )
  def test_hostile_headers(self, tmp_path, place, content, damage):
    path = archive(tmp_path / "x.tar", {"a": b"1" * 5000})
    rewritten(path, place, content)
    found, told = listed(path)
    if damage is None:
      assert found[0].kind == "member of an unknown kind"
    else:
      assert damage in told
      assert not found

  @pytest.mark.parametrize(
    "record",
    [b"12 size=-9\n", b"-1 path=x\n", b"99 path=x\n", b"9" * 40, b"0 a=b\n"],
  )
  def test_hostile_pax_headers(self, tmp_path, record):
    path = archive(tmp_path / "x.tar", {"a": record, "b": b"1" * 600})
    rewritten(path, 156, b"x")
    found, damage = listed(path)
    assert not found
    assert re_any(damage, "size that is no number", "damaged pax header")

  def test_records_in_a_row_take_no_time(self, tmp_path):
    """As they did while each was cut off from the rest."""
    path = archive(tmp_path / "x.tar", {"a": b"5 a=\n" * 13_000, "b": b""})
    rewritten(path, 156, b"x")
    since = time.process_time()
    assert [m.name for m in listed(path)[0]] == ["b"]
    assert time.process_time() - since < 0.5

  def test_other_headers_of_headers_and_names_of_archives(self, tmp_path):
    """Solaris' own, and the label that GNU tar gives to an archive."""
    path = archive(tmp_path / "x.tar", {"a": b"12 path=abc\n", "b": b""})
    rewritten(path, 156, b"X")
    assert [m.name for m in listed(path)[0]] == ["abc"]
    path = archive(tmp_path / "x.tar", {"a": b"", **sample("0", U)})
    rewritten(path, 156, b"V")
    batches, found = read_all(path)
    assert (uids_of(batches), found.broken, found.noted) == ([U], {}, {})

  def test_headers_in_a_row_take_no_memory(self, tmp_path):
    path = archive(tmp_path / "x.tar", {"a": b"12 path=abc\n", "b": b""})
    rewritten(path, 156, b"x")
    content = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(content[:1024] * 3000 + content)
    assert [m.name for m in listed(path)[0]] == ["abc"]

  def test_compressed_is_refused(self, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as file:
      file.addfile(tarfile.TarInfo("a" * 200))
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content.ljust(600, b"\1"))
    assert listed(tmp_path / "x.tar") == ([], "not an uncompressed tar file")


def re_any(text, *parts):
  return any(part in text for part in parts)


class TestImages:
  @pytest.mark.parametrize("width", [16, 50, 233])
  @pytest.mark.parametrize("height", [16, 97, 400])
  @pytest.mark.parametrize("size", [16, 64])
  def test_is_resize_then_middle(self, width, height, size):
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 210, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
    content = io.BytesIO()
    image.save(content, "PNG")
    short = min(width, height)
    whole = image.resize(
      (size * width // short, size * height // short), Image.BICUBIC
    )
    left, top = (round((side - size) / 2) for side in whole.size)
    expected = whole.crop((left, top, left + size, top + size))
    found = images.decode(content.getvalue(), size=size)
    difference = found.astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 2

  def test_a_very_long_image_takes_little(self):
    content = png(16_000, 1)
    assert images.decode(content, size=224).shape == (224, 224, 3)

  @pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"]
  )
  def test_every_mode_becomes_rgb(self, mode):
    content = io.BytesIO()
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (20, 30)).save(content, kind)
    image = images.decode(content.getvalue(), size=8)
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)


RED = np.array([200, 0, 0], np.uint8)


def saved(kind, image=None, **options):
  """An image in a format; by default one of two frames, the first one red."""
  content = io.BytesIO()
  if image is None:
    image = Image.new("RGB", (SIZE, SIZE), tuple(RED.tolist()))
    if kind in ("GIF", "TIFF"):
      green = Image.new("RGB", (SIZE, SIZE), (0, 200, 0))
      options |= {"save_all": True, "append_images": [green]}
  image.save(content, kind, **options)
  return content.getvalue()


def chunk(kind, content=b""):
  crc = struct.pack(">I", zlib.crc32(kind + content))
  return struct.pack(">I", len(content)) + kind + content + crc


def with_chunks(*chunks):
  """A PNG with more chunks after its header."""
  whole = png()
  return whole[:33] + b"".join(chunks) + whole[33:]


def tiff(values, *tags, order="<"):
  """A TIFF file of one strip, by hand: what no writer here can make."""
  values = np.asarray(values)
  kinds = {"u": 1, "i": 2, "f": 3}
  fields = {
    256: values.shape[1],
    257: values.shape[0],
    258: 8 * values.itemsize,
    259: 1,
    262: 1,
    273: 8,
    277: 1,
    278: values.shape[0],
    279: values.nbytes,
    339: kinds[values.dtype.kind],
  } | dict(tags)
  strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
  head = b"II*\0" if order == "<" else b"MM\0*"
  entries = b"".join(
    struct.pack(f"{order}HHII", tag, 4, 1, value)
    for tag, value in sorted(fields.items())
  )
  count = struct.pack(f"{order}H", len(fields))
  place = struct.pack(f"{order}I", 8 + len(strip))
  return head + place + strip + count + entries + b"\0" * 4


# Rows of all that 16 bits hold, black to white.
TONES = np.linspace(0, 65535, 256).round().astype(np.uint16)[:, None]
TONES = TONES.repeat(256, axis=1)
# Every mode that files of these formats are opened as: how, and what is shown.
# In the table, the first column of a 256 x 256 image whose rows get brighter.
LEVELS = np.arange(256)
SHOWN = {
  "grey of 16 bits, PNG": (saved("PNG", Image.fromarray(TONES)), LEVELS),
  "grey of 16 bits, TIFF": (saved("TIFF", Image.fromarray(TONES)), LEVELS),
  "big-endian": (tiff(TONES, order=">"), LEVELS),
  "white is zero": (tiff(TONES, (262, 0)), 255 - LEVELS),
  "float": (tiff(TONES / np.float32(65535)), LEVELS),
  "float, white is zero": (
    tiff(TONES / np.float32(65535), (262, 0)),
    255 - LEVELS,
  ),
}


def column(content, **options):
  """The first column of an image of 256 x 256, and that all others are so."""
  formats = images.find_formats(("gif", "bmp", "tiff"))
  found = images.decode(content, size=256, formats=formats, **options)
  assert (found == found[:, :1, :1]).all()
  return found[:, 0, 0]


class TestTones:
  @pytest.mark.parametrize("what", SHOWN)
  def test_grey_keeps_its_tones(self, what):
    content, expected = SHOWN[what]
    np.testing.assert_array_equal(column(content), expected)

  def test_grey_is_rounded(self):
    """Every value there is, against NumPy."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    content = saved("PNG", Image.fromarray(values))
    found = images.decode(content, size=256)[..., 0]
    np.testing.assert_array_equal(found, np.rint(values / 257.0))

  @pytest.mark.parametrize("colours", [3, 4])
  def test_colours_of_16_bits(self, colours):
    values = np.random.default_rng(0).integers(0, 65536, (32, 32, colours))
    rows = values.astype(">u2").reshape(32, -1).view(np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    kind = {3: 2, 4: 6}[colours]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
      [
        chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, kind, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(lines)),
        chunk(b"IEND"),
      ]
    )
    found = images.decode(content, size=32)
    assert np.abs(found - values[..., :3] / 257.0).max() <= 1

  @pytest.mark.parametrize(
    ("values", "message"),
    [
      (TONES.astype(np.int32), "nothing says what is white"),
      (TONES.astype(np.uint32), "nothing says what is white"),
      ((TONES // 2).astype(np.int16), "nothing says what is white"),
      (TONES.astype(np.float32), "float pixels of 0 to 6.554e"),
      (np.full((9, 9), np.nan, np.float32), "float pixels of nan"),
    ],
  )
  def test_grey_without_a_white_is_refused(self, values, message):
    with pytest.raises(images.BadImageError, match=message):
      column(tiff(values))

  @pytest.mark.parametrize(
    ("mode", "kind", "colour", "expected"),
    [
      ("1", "PNG", 1, (255, 255, 255)),
      ("L", "JPEG", 77, (77, 77, 77)),
      ("LA", "PNG", (77, 0), (77, 77, 77)),  # Transparent: its colour stays.
      ("RGBA", "PNG", (9, 8, 7, 0), (9, 8, 7)),
      ("RGBA", "TIFF", (9, 8, 7, 0), (9, 8, 7)),
      ("CMYK", "TIFF", (255, 0, 0, 0), (0, 255, 255)),
      ("CMYK", "TIFF", (0, 0, 0, 255), (0, 0, 0)),
      ("YCbCr", "TIFF", (76, 85, 255), (254, 0, 0)),
      ("LA", "TIFF", (77, 9), (77, 77, 77)),
      ("RGB", "BMP", (9, 8, 7), (9, 8, 7)),
      ("RGB", "WEBP", (9, 8, 7), (9, 8, 7)),
    ],
  )
  def test_each_mode_gives_its_colours(self, mode, kind, colour, expected):
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(kind, Image.new(mode, (8, 8), colour), **options)
    formats = images.find_formats(("bmp", "tiff"))
    found = images.decode(content, size=8, formats=formats)
    np.testing.assert_array_equal(
      found, np.broadcast_to(np.array(expected), (8, 8, 3))
    )

  def test_palettes_with_transparency(self):
    image = Image.new("P", (8, 8), 3)
    image.putpalette([v for n in range(256) for v in (n, 2 * n % 256, 0)])
    content = saved("PNG", image, transparency=3)
    assert images.decode(content, size=8)[0, 0].tolist() == [3, 6, 0]


def with_scans(repeats, side=64):
  """A progressive JPEG whose last scan comes again."""
  grey = Image.new("L", (side, side), 128)
  whole = saved("JPEG", grey, progressive=True)
  scan, end = whole.rfind(b"\xff\xda"), whole.rfind(b"\xff\xd9")
  return whole[:end] + whole[scan:end] * repeats + whole[end:]


def segment(kind, content):
  return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


def of_jpeg(extra):
  whole = saved("JPEG", Image.new("L", (8, 8)))
  return whole[:2] + extra + whole[2:]


def canvas(width, height):
  """A WebP file that claims a canvas, with a small picture in it."""
  small = saved("WEBP", Image.new("RGB", (8, 8)), lossless=True)[12:]
  size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
  blocks = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + small
  return b"RIFF" + struct.pack("<I", 4 + len(blocks)) + b"WEBP" + blocks


def many_tags(count, repeats):
  """A TIFF file with tags that all point to the same bytes."""
  entries = b"".join(
    struct.pack("<HHII", 40000 + n, 1, repeats, 8) for n in range(count)
  )
  head = struct.pack("<2sHI", b"II", 42, 8 + repeats)
  return head + bytes(repeats) + struct.pack("<H", count) + entries + bytes(4)


def rle_bmp(size):
  whole = bytearray(saved("BMP", Image.new("L", (8, 8))))
  whole[30] = 1
  return bytes(whole) + bytes(size)


packed = zlib.compress(bytes(1 << 20))
HOSTILE = {
  "scans": (with_scans(400), "51 scans"),
  "segments": (of_jpeg(segment(0xE1, b"Exif\0\0") * 5000), "1001 blocks"),
  "starts": (of_jpeg(b"\xff\xd8" * 5000), "1001 blocks"),
  "junk": (of_jpeg(bytes(1 << 17)), "bytes between segments"),
  "canvas": (canvas(16_000, 16_000), "16000 x 16000 pixels"),
  "frames": (canvas(8, 8) + b"ANMF\0\0\0\0" * 20_000, "10001 blocks"),
  "texts": (with_chunks(*[chunk(b"tEXt", b"a\0b")] * 2000), "1001 blocks"),
  "profiles": (
    with_chunks(*[chunk(b"iCCP", b"a\0\0" + packed)] * 90),
    "65 compressed texts",
  ),
  "pieces": (with_chunks(*[chunk(b"IDAT")] * 40_000), "32769 pieces|pieces"),
  "tags": (many_tags(2000, 9), "2000 tags"),
  "tags that overlap": (many_tags(900, 9999), "bytes of tags"),
  "numbers in tags": (
    tiff(TONES, (273, 8)).replace(
      struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 1 << 21)
    ),
    "numbers in tags",
  ),
  "comments": (
    b"GIF89a\x08\0\x08\0\0\0\0" + b"!\xfe\1a\0" * 20_000,
    "10001 blocks",
  ),
  "run lengths": (rle_bmp(1 << 20), "bytes of run lengths"),
}


class TestHostileImages:
  @pytest.mark.parametrize("what", HOSTILE)
  def test_are_refused_before_they_are_decoded(self, what):
    content, message = HOSTILE[what]
    formats = images.find_formats(("gif", "bmp", "tiff"))
    since = time.process_time()
    with pytest.raises(images.BadImageError, match=message) as error:
      images.decode(content, size=8, formats=formats)
    assert error.value.reason == "image too large"
    assert time.process_time() - since < 0.5

  def test_usual_files_are_decoded(self):
    """Scans of a thumbnail, and what follows a file's end, count for nothing.

    Phones put a film there, in which any bytes may be.
    """
    thumbnail = segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 1000)
    film = np.random.default_rng(0).bytes(1 << 22)
    assert film.count(b"\xff\xda") > 40
    for content in (
      with_scans(20) + film + b"\xff\xda" * 100,
      of_jpeg(thumbnail),
      of_jpeg(b"\xff" * 500),
      png() + film,
      with_chunks(*[chunk(b"tEXt", b"a\0b")] * 100),
    ):
      assert images.decode(content, size=8).shape == (8, 8, 3)

  def test_memory_is_the_machines(self, monkeypatch):
    def fail(self):
      raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
      images.decode(png(), size=8)

  @pytest.mark.slow
  def test_damage_anywhere_is_told(self):
    """Any byte of any format: an image, or a BadImageError, and soon."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
    formats = images.find_formats(("gif", "bmp", "tiff"))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
      whole = saved(kind, noise)
      for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
          place = int(rng.integers(min(len(damaged), 300)))
          damaged[place] = int(rng.integers(256))
        cut = len(damaged) if rng.random() < 0.7 else int(rng.integers(400))
        since = time.process_time()
        with contextlib.suppress(images.BadImageError):
          images.decode(bytes(damaged[:cut]), size=8, formats=formats)
        assert time.process_time() - since < 5


def forged_size(width, height):
  """A small PNG whose header claims another size, with the right checksum."""
  content = bytearray(png())
  content[16:24] = struct.pack(">II", width, height)
  content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
  return bytes(content)


def member(kind, **fields):
  info = tarfile.TarInfo()
  info.type = kind
  for name, value in fields.items():
    setattr(info, name, value)
  return info


def jpeg_cut_off():
  content = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(content, "JPEG")
  return content.getvalue()[:2000]


U = uid_of(7)
BROKEN = {
  "image not readable: text": sample("x", U, png=b"not an image"),
  "image not readable: cut off": sample("x", U, png=None, jpg=jpeg_cut_off()),
  "image not readable: a program": sample(
    "x", U, png=None, jpg=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
  ),
  "image too large: side": sample("x", U, png=forged_size(30_000, 30)),
  "image too large: area": sample("x", U, png=forged_size(9_000, 9_000)),
  "image too large: bomb": sample("x", U, png=forged_size(30_000, 30_000)),
  "image too large: bytes": sample("x", U, png=b"\0" * 200_001),
  "caption too large": sample("x", U, txt=b"w " * 150_000),
  "json too large": sample("x", U, json=b'{"uid": "' + b"0" * 70_000),
  "no image": sample("x", U, png=None),
  "no caption": sample("x", U, txt=None),
  "no caption: empty": sample("x", U, txt=b" \n\t "),
  "no uid: no file": sample("x", U, json=None),
  "no uid: no field": sample("x", U, json=b'{"url": "http://x"}'),
  "no uid: no object": sample("x", U, json=b"[1, 2]"),
  "json not readable: nested": sample("x", U, json=b"[" * 60_000),
  "json not readable: digits": sample("x", U, json=b"1" * 60_000),
  "json not readable: bytes": sample("x", U, json=b"\xff\xfe\xfa"),
  "uid is not 32 hexadecimal digits: words": sample("x", "../../etc/passwd"),
  "uid is not 32 hexadecimal digits: long": sample("x", "0" * 33),
  "uid is not 32 hexadecimal digits: a number": sample("x", 12),
  "unsafe name: up": sample("../../x", U),
  "unsafe name: up within": sample("a/../../x", U),
  "unsafe name: absolute": sample("/etc/x", U),
  "unsafe name: drive": sample("C:\\x", U),
  "unsafe name: backslashes": sample("..\\..\\x", U),
  "unsafe name: no sample": {"../../.bashrc": b"echo"},
  "symbolic link in place of a file": sample(
    "x", U, png=member(tarfile.SYMTYPE, linkname="/etc/passwd")
  ),
  "hard link in place of a file": sample(
    "x", U, txt=member(tarfile.LNKTYPE, linkname="0.txt")
  ),
  "device in place of a file": sample("x", U, txt=member(tarfile.CHRTYPE)),
  "named pipe in place of a file": sample("x", U, txt=member(tarfile.FIFOTYPE)),
  "more than one file of a kind": {
    **sample("x", U),
    **{"x.PNG": png(), "x.jpeg": png()},
  },
}
TIGHT = limits_lib.Limits(
  image_bytes=200_000, caption_bytes=200_000, json_bytes=65_536
)


def read_all(paths, **options):
  """All batches of one epoch in order, and the statistics."""
  asked = {
    "tokenizer": tokenizer,
    "batch_size": 4,
    "image_size": SIZE,
    "seed": None,
    "num_epochs": 1,
    "max_broken_share": 1.0,
    "num_threads": 0,
    "limits": TIGHT,
    **options,
  }
  iterator = iter(shards.ShardStream(paths, **asked))
  batches = list(iterator)
  iterator.close()
  return batches, iterator.statistics


def uids_of(batches):
  return [uid for batch in batches for uid in batch["uid"][batch["mask"]]]


class TestBrokenSamples:
  @pytest.mark.parametrize("what", BROKEN)
  def test_is_counted_and_its_neighbours_come(self, tmp_path, what):
    members = {**sample("0", uid_of(1)), **BROKEN[what]}
    path = archive(tmp_path / "x.tar", members | sample("1", uid_of(2)))
    batches, found = read_all(path)
    assert uids_of(batches) == [uid_of(1), uid_of(2)]
    reason = what.partition(":")[0]
    assert found.broken == {reason: 1}, found
    assert (found.read, found.samples, found.filtered) == (3, 2, 0)
    assert found.listed[0][:2] == [reason, "x.tar"]
    assert f"broken: {reason}: 1" in str(found)
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]

  def test_sparse_members_get_no_memory(self, tmp_path):
    """A member of 512 bytes that claims to be 8 GB."""
    path = pathlib.Path(
      archive(tmp_path / "x.tar", {"0.png": b"x" * 512, **sample("1", U)})
    )
    rewritten(path, 156, b"S")
    rewritten(path, 483, b"%011o\0" % (8 << 30))
    batches, found = read_all(path)
    assert uids_of(batches) == [U]
    assert found.broken == {"sparse file in place of a file": 1}

  def test_damaged_shard_gives_what_is_whole(self, tmp_path):
    members = {}
    for number in range(6):
      members |= sample(str(number), uid_of(number + 1))
    path = pathlib.Path(archive(tmp_path / "x.tar", members))
    place = next(m.offset for m in listed(path)[0] if m.name == "4.txt")
    path.write_bytes(path.read_bytes()[: place + 3])
    other = archive(tmp_path / "y.tar", sample("0", uid_of(9)))
    batches, found = read_all([path, other])
    assert uids_of(batches) == [uid_of(n) for n in (1, 2, 3, 4, 9)]
    # The fifth has its image only.
    assert found.broken == {"no uid": 1, "shard damaged": 1}
    assert ["shard damaged", "x.tar", ""] in [row[:3] for row in found.listed]

  def test_damage_anywhere_is_survived(self, tmp_path):
    """Random bytes anywhere: all samples before them, and no exception."""
    members = {}
    for number in range(8):
      members |= sample(str(number), uid_of(number + 1))
    path = pathlib.Path(archive(tmp_path / "x.tar", members))
    content = path.read_bytes()
    starts = [m.offset - 512 for m in listed(path)[0]][::3]
    good = archive(tmp_path / "y.tar", sample("0", uid_of(99)))
    rng = np.random.default_rng(0)
    for _ in range(60):
      damaged = bytearray(content)
      place = int(rng.integers(len(content) // 2))
      damaged[place : place + 40] = rng.bytes(40)
      path.write_bytes(damaged)
      batches, found = read_all([path, good])
      whole = sum(start <= place for start in starts) - 1
      uids = uids_of(batches)
      assert uids[:whole] == [uid_of(n + 1) for n in range(whole)]
      assert uids[-1] == uid_of(99)
      assert found.samples == len(uids)

  def test_no_tar_file_at_all(self, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>404 Not Found</html>" * 90)
    other = archive(tmp_path / "y.tar", sample("0", U))
    batches, found = read_all(tmp_path)
    assert uids_of(batches) == [U]
    assert found.broken == {"shard damaged": 1}
    assert "not an uncompressed tar file" in found.listed[0][3]
    assert shard_files.expand(tmp_path) == [str(tmp_path / "x.tar"), other]

  def test_odd_captions_come_through(self, tmp_path):
    texts = [
      "\x1b[31mred\x00\x07 star",
      "🟥⭐ ein Stern, 赤い星",
      "word " * 10_000,
    ]
    members = {}
    for number, text in enumerate(texts):
      key = f"{number}"
      members |= sample(key, uid_of(number), txt=text.encode())
    members |= sample("3", uid_of(3), txt=b"caf\xe9")
    path = archive(tmp_path / "x.tar", members)
    seen = []

    def keeping(captions):
      seen.extend(captions)
      return tokenizer(captions)

    _, found = read_all(path, tokenizer=keeping)
    assert seen == [text.strip() for text in texts] + ["caf\ufffd"]
    assert found.samples == 4
    assert not found.broken
    assert found.noted == {
      "control characters in the caption": 1,
      "unknown characters in the caption": 1,
    }

  def test_names_are_listed_as_ascii(self, tmp_path):
    name = "\x1b[2Jé"
    path = archive(
      tmp_path / "x.tar", sample(name, U, txt=None) | sample("1", U)
    )
    _, found = read_all(path)
    assert found.listed[0][2] == "\\x1b[2J\\xe9"
    assert "\x1b" not in str(found)

  def test_uids_are_padded_or_made_of_names(self, tmp_path):
    path = archive(tmp_path / "x.tar", sample("0", "abc") | sample("1", "abd"))
    batches, _ = read_all(path)
    assert uids_of(batches) == ["abc".zfill(32), "abd".zfill(32)]
    path = archive(
      tmp_path / "x.tar", sample("0", json=None) | sample("1", json=None)
    )
    batches, found = read_all(path, uid_source="name")
    assert found.samples == 2
    assert len(set(uids_of(batches))) == 2
    assert all(len(uid) == 32 for uid in uids_of(batches))

  def test_too_many_broken_is_an_error_that_says_which(self, tmp_path):
    members = {}
    for number in range(30):
      text = None if number < 6 else b"text"
      members |= sample(str(number), uid_of(number), txt=text)
    path = archive(tmp_path / "x.tar", members)
    assert read_all(path, max_broken_share=0.2)[1].samples == 24
    with pytest.raises(
      ValueError, match=r"20\.0%.*max_broken_share=19"
    ) as error:
      read_all(path, max_broken_share=0.19)
    assert "no caption: 6\n    x.tar 0\n" in str(error.value)

  def test_repeated_uids(self, tmp_path):
    order = [1, 2, 1, 3, 4, 1, 5]
    members = {}
    for place, number in enumerate(order):
      members |= sample(str(place), uid_of(number))
    path = archive(tmp_path / "x.tar", members)
    batches, found = read_all(path)
    # A copy is left out of the batch that has the sample, and comes in another.
    assert uids_of(batches) == [uid_of(n) for n in (1, 2, 3, 4, 1, 5)]
    assert found.noted == {
      "uid repeated": 2,
      "uid twice in a batch, left out": 1,
    }

  def test_metadata_and_other_files_are_no_samples(self, tmp_path):
    members = {
      "__index__.json": b"{}",
      "README": b"hello",
      **sample("a/0", U),
      "a/._0.png": b"x",
      "a/notes.v1.md": b"x",
    }
    batches, found = read_all(archive(tmp_path / "x.tar", members))
    assert (uids_of(batches), found.broken, found.read) == ([U], {}, 1)
    assert found.noted == {"file that is no part of a sample": 2}


def renamed(members, prefix):
  return {f"{prefix}{name}": content for name, content in members.items()}


SEGMENTED = {
  name: content
  for n in range(4)
  for name, content in sorted(
    {
      **sample(f"{n:03}", uid_of(n)),
      f"{n:03}.seg.png": png(),
      f"{n:03}.clip.json": b"{}",
      f"{n:03}.0.txt": b"another one",
    }.items()
  )
}
DOTTED = {
  name: content
  for n in range(4)
  for name, content in sample(f"clip {n} v1.{n}", uid_of(n)).items()
}
LITTER = {
  "._0.png": b"x",
  **{f"__MACOSX/._{name}": b"x" for name in ("0.png", "0.txt")},
  "PaxHeaders.77/0.png": b"30 mtime=1\n",
  "pax_global_header": b"52 comment=x\n",
  ".DS_Store": b"x",
}


def found_in(path, **options):
  """What is found in a shard of which nothing need be sound."""
  found = shard_samples.Statistics()
  list(shard_samples.read(str(path), found, **options))
  return found


class TestNames:
  @pytest.mark.parametrize(
    ("members", "count", "broken"),
    [
      (SEGMENTED, 4, {}),
      (renamed(SEGMENTED, "./v1.2/a.b/"), 4, {}),
      (DOTTED, 4, {}),
      (renamed(DOTTED, "v1.2/"), 4, {}),
      ({**DOTTED, **sample("plain", uid_of(9))}, 5, {}),
      (  # Each image is alone by either rule, and so are the texts.
        {
          **{name.replace("png", "JPG.PNG"): x for name, x in DOTTED.items()},
          **sample("1", uid_of(9)),
        },
        1,
        {"name fits no sample": 8},
      ),
      # One that doesn't fit the others' rule: seen by itself, or beside them.
      (
        {**SEGMENTED, **sample("x.1", uid_of(9))},
        4,
        {"name fits no sample": 1},
      ),
      (
        {**SEGMENTED, **sample("x", U), **sample("x.1", uid_of(9))},
        5,
        {"name fits no sample": 1},
      ),
      ({**DOTTED, "clip.seg.png": png()}, 4, {"no uid": 1}),
    ],
  )
  def test_the_rule_is_the_one_that_makes_whole_samples(
    self, tmp_path, members, count, broken
  ):
    path = archive(tmp_path / "x.tar", members)
    batches, found = read_all(path)
    assert len(set(uids_of(batches))) == found.samples == count
    assert found.broken == broken
    assert found.read == count + sum(broken.values())
    assert found.noted == {}
    if broken:
      share = found.broken_share - 0.001
      with pytest.raises(ValueError, match="are broken, more than"):
        read_all(path, max_broken_share=share)

  def test_the_rule_is_logged_once(self, tmp_path, caplog):
    for number in range(3):
      archive(tmp_path / f"{number}.tar", renamed(DOTTED, f"{number}"))
    archive(tmp_path / "3.tar", sample("0", uid_of(77)))
    for _ in range(2):
      assert read_all(tmp_path)[1].broken == {}
    said = [x for x in caplog.messages if "up to the last dot" in x]
    assert len(said) == 1
    assert "first 0 are whole and 4 broken, up to the last 4 are" in said[0]

  def test_a_restored_stream_cuts_names_alike(self, tmp_path):
    """Neither the first samples nor the state tell the rule."""
    members = {f"0{n}": sample(f"0{n}", uid_of(n + 20)) for n in range(3)}
    plain = {k: x for part in members.values() for k, x in part.items()}
    path = archive(tmp_path / "x.tar", plain | DOTTED)

    def fresh():
      return iter(stream(path, batch_size=1, window=1, num_epochs=1))

    iterator, states = fresh(), []
    states = [iterator.get_state() for _ in iterator]
    assert states[-1]["statistics"]["samples"] == 7
    for step, state in enumerate(states):
      again = fresh()
      again.set_state(json.loads(json.dumps(state)))
      assert len(list(again)) == 6 - step

  def test_litter_of_systems_is_no_sample(self, tmp_path):
    """Between the members of a sample too, which it must not part."""
    members, litter = {}, iter(renamed(LITTER, "").items())
    for name, content in sample("0", U).items():
      members |= dict(itertools.islice(litter, 2)) | {name: content}
    path = archive(tmp_path / "x.tar", members)
    batches, found = read_all(path)
    assert uids_of(batches) == [U]
    assert (found.read, found.broken, found.noted) == (1, {}, {})

  def test_members_that_lie_apart_are_reported(self, tmp_path):
    """As of `tar cf x.tar *.json *.png *.txt`; also where reading goes on."""
    members = {}
    for number in range(4):
      members |= sample(str(number), uid_of(number))
    members = dict(sorted(members.items(), key=lambda x: x[0][::-1]))
    path = archive(tmp_path / "x.tar", members)
    found = found_in(path)
    assert found.samples == 0
    assert found.broken["rest of a sample before"] == 8
    assert "must follow one another" in found.advice()
    rest = found_in(path, skip=5)
    assert rest.broken == {"rest of a sample before": 7}

  def test_a_sample_of_too_many_files(self, tmp_path):
    members = sample("0", U) | {f"0.{n}": b"" for n in range(1000)}
    path = archive(tmp_path / "x.tar", members | sample("1", uid_of(1)))
    batches, found = read_all(path)
    assert uids_of(batches) == [uid_of(1)]
    assert found.broken == {"too many files of one name": 1}

  def test_the_rule_is_that_of_a_plain_count(self, tmp_path):
    """Members of any names in any order, against the rule written out."""
    rng = np.random.default_rng(1)
    roles = {"png": "image", "txt": "caption", "json": "json"}
    patterns = {"first": r"([^.]*)\.?(.*)", "last": r"(.*?)(?:\.([^.]*))?"}

    def expected(names, rule):
      """The whole samples, and how many are broken."""
      cut = [re.fullmatch(patterns[rule], name).groups() for name in names]
      whole, broken = [], 0
      runs = itertools.groupby(zip(names, cut, strict=True), lambda x: x[1][0])
      for stem, run in runs:
        run = list(run)
        kinds = [roles[end] for _, (_, end) in run if end in roles and stem]
        by_last = collections.defaultdict(set)
        for name, (_, end) in run:
          other, _, last = name.rpartition(".")
          if rule == "first" and end not in roles and last in roles and other:
            by_last[other].add(last)
        lost = [x for x in by_last.values() if not kinds or len(x) == 3]
        if sorted(kinds) == ["caption", "image", "json"]:
          whole.append(stem)
          broken += len(lost)
        elif len(set(kinds)) < len(kinds):
          broken += 1  # Nothing more is made of such a group.
        else:
          broken += bool(kinds) + len(lost)
      return whole, broken

    chosen = collections.Counter()
    for turn in range(150):
      letters = rng.choice(list("ab."), (8, 2))
      stems = ["".join(x) for x in letters[: int(rng.integers(2, 9))]]
      names = [f"{x}.{end}" for x in stems for end in (*roles, "md", "c.png")]
      rng.shuffle(names[int(rng.integers(len(names))) :])
      kept = rng.random(len(names)) < 0.8 + 0.2 * (turn % 2)
      names = [x for x, keep in zip(names, kept, strict=True) if keep]
      names = list(dict.fromkeys(names))
      about = json.dumps({"uid": U}).encode()
      path = archive(tmp_path / f"{turn}.tar", dict.fromkeys(names, about))
      found = shard_samples.Statistics()
      keys = [x.key for x in shard_samples.read(path, found) if x]
      counts = {rule: expected(names, rule) for rule in patterns}
      rule = max(
        counts, key=lambda rule: len(counts[rule][0]) - counts[rule][1]
      )
      chosen[rule] += 1
      whole, broken = counts[rule]
      assert (keys, sum(found.broken.values())) == (whole, broken), names
    assert min(chosen.values()) > 10

  @pytest.mark.slow
  @pytest.mark.parametrize("tool", ["webdataset", "dotted"])
  def test_names_of_any_tool_give_its_samples(self, tmp_path, tool):
    """Names as each tool writes them, at random; what it wrote is known."""
    rng = np.random.default_rng(len(tool))
    letters = list("ab1 _-é") + ["."] * (tool == "dotted")
    for _ in range(150):
      count = int(rng.integers(2, 8))
      members, expected = {}, []
      for number in range(count):
        middle = "".join(rng.choice(letters, 5))
        stem = f"{number}{middle}x"
        parts = sample(stem, uid_of(number))
        if tool == "webdataset":
          for extra in rng.choice(["seg.png", "a.json", "b.c.txt"], 2):
            parts[f"{stem}.{extra}"] = b"x"
          expected.append(stem)
        else:
          expected.append(stem)
        members |= dict(sorted(parts.items()))
      path = archive(tmp_path / "x.tar", members)
      found = shard_samples.Statistics()
      keys = [x.key for x in shard_samples.read(path, found) if x]
      assert (keys, found.broken) == (expected, {}), list(members)


class TestParts:
  def test_uids_that_are_missing_name_the_option(self, tmp_path):
    about = b'{"caption": "a", "key": "000000000", "url": "http://x"}'
    path = archive(tmp_path / "x.tar", sample("0", json=about))
    with pytest.raises(ValueError, match=r"uid_source='name'.*one of json, na"):
      read_all(path, max_broken_share=0.1)
    found = found_in(path)
    assert found.listed[0][3].startswith("no 'uid' in the json, which has 'cap")
    assert found.listed[0][3].endswith("'url'")

  def test_shards_of_one_name_make_no_uids(self, tmp_path):
    for name in ("a", "b"):
      (tmp_path / name).mkdir()
      archive(tmp_path / name / "0.tar", sample("0", uid_of(ord(name))))
    paths = [tmp_path / "a", tmp_path / "b"]
    assert len(uids_of(read_all(paths)[0])) == 2
    with pytest.raises(ValueError, match="would have the same uids"):
      read_all(paths, uid_source="name")

  def test_extensions_and_captions_are_options(self, tmp_path):
    about = {"uid": U, "text": " a star ", "n": 3, "none": None}
    members = {
      "x.v1.IMG": png(),
      "x.v1.meta.json": json.dumps(about).encode(),
      "x.v1.cap": b"another one",
      "x.v1.json": b"{}",
    }
    path = archive(tmp_path / "x.tar", members)
    names = {"image": ("img",), "json": ("meta.json",), "caption": ("cap",)}

    def read(**options):
      parts = shard_samples.Parts(**names, **options)
      batches, found = read_all(path, parts=parts)
      return [bytes(row.tolist()) for b in batches for row in b["text"]], found

    assert read()[0][0] == b"another "
    assert read(caption_key="text")[0][0] == b"a star\0\0"
    for key in ("n", "none", "title"):
      parts = shard_samples.Parts(**names, caption_key=key)
      assert found_in(path, parts=parts).broken == {"no caption": 1}
    path = archive(tmp_path / "y.tar", {"0.img": png(), "0.cap": b"x"})
    parts = shard_samples.Parts(**names, caption_key="text")
    for source, broken in (("json", "no uid"), ("name", "no caption")):
      found = found_in(path, parts=parts, uid_source=source)
      assert found.broken == {broken: 1}

  def test_parts_of_the_config_are_the_default(self, folder):
    section = clip_config.get_config().data.parts
    assert shard_samples.Parts(**section) == shard_samples.PARTS
    with pytest.raises(TypeError, match="parts must be shard_samples"):
      stream(folder, parts={"image": ("jpg",)})

  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"image": "png"}, "parts.image must be a tuple of extensions"),
      ({"caption": ()}, "parts.caption must be a tuple of extensions"),
      ({"json": (".json",)}, "without the dot"),
      ({"json": ("JSON",)}, "lower case"),
      ({"json": ("txt",)}, "'txt' is in parts.caption and in parts.json"),
      ({"caption_key": ""}, "caption_key must be the name of a field"),
      ({"caption_key": 3}, "caption_key must be the name of a field"),
    ],
  )
  def test_bad_parts_are_named(self, fields, message):
    with pytest.raises(ValueError, match=message):
      shard_samples.Parts(**fields)

  def test_formats_come_by_extension(self, tmp_path):
    members = {}
    for number, kind in enumerate(("gif", "bmp", "tiff")):
      members |= sample(
        f"{number}", uid_of(number), png=None, **{kind: saved(kind.upper())}
      )
    path = archive(tmp_path / "x.tar", members)
    assert found_in(path).broken == {"no image": 3}
    # Under another name they are not let in either.
    members = sample("0", U, png=saved("GIF")) | sample("1", uid_of(1))
    _, found = read_all(archive(tmp_path / "y.tar", members))
    assert found.broken == {"image not readable": 1}
    parts = shard_samples.Parts(image=("gif", "bmp", "tiff"))
    batches, found = read_all(path, parts=parts)
    assert (found.samples, found.broken) == (3, {})
    rows = batches[0]["image"][batches[0]["mask"]]
    np.testing.assert_array_equal(rows, np.broadcast_to(RED, rows.shape))


@pytest.fixture(scope="module")
def pairs():
  return shapes.load("train", size=230, seed=5, image_size=SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pairs):
  """Eight shards of up to 32 pairs."""
  folder = tmp_path_factory.mktemp("shards")
  shard_files.write(
    folder,
    pairs.images,
    pairs.captions,
    pairs.uids,
    samples_per_shard=32,
    image_format="png",
  )
  return folder


def stream(folder, **options):
  asked = {
    "tokenizer": tokenizer,
    "batch_size": 24,
    "image_size": SIZE,
    "seed": 1,
    "window": 50,
    "num_threads": 0,
  }
  return shards.ShardStream(folder, **{**asked, **options})


def assert_same(ones, others):
  for one, other in itertools.zip_longest(ones, others):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


class TestStream:
  def test_everything_comes_once_as_it_was_written(self, folder, pairs):
    batches = list(stream(folder, num_epochs=1))
    rows = {uid: row for row, uid in enumerate(pairs.uids.tolist())}
    found = [rows[uid] for uid in uids_of(batches)]
    assert sorted(found) == list(range(230))
    assert found != sorted(found)
    for name, expected in (
      ("image", pairs.images),
      ("text", tokenizer(pairs.captions.tolist())),
    ):
      values = np.concatenate([b[name][b["mask"]] for b in batches])
      np.testing.assert_array_equal(values, expected[found])
    index = np.concatenate([b["index"] for b in batches])
    assert index.tolist() == [*range(230), *[-1] * 10]
    assert batches[0]["image"].dtype == np.uint8
    assert batches[0]["text"].dtype == np.int32
    # Padding repeats a real row.
    assert (batches[-1]["image"][-1] == batches[-1]["image"][0]).all()

  def test_in_order_without_a_seed(self, folder, pairs):
    batches = list(stream(folder, seed=None, num_epochs=1))
    assert uids_of(batches) == pairs.uids.tolist()

  def test_order_is_that_of_seed_and_epoch(self, folder):
    one = list(stream(folder, num_epochs=2, batch_size=230))
    assert_same(one, list(stream(folder, num_epochs=2, batch_size=230)))
    orders = {tuple(batch["uid"]) for batch in one}
    orders.add(tuple(next(iter(stream(folder, seed=2, batch_size=230)))["uid"]))
    assert len(orders) == 3

  def test_threads_change_nothing(self, folder):
    threaded = iter(stream(folder, num_epochs=1, num_threads=3))
    assert_same(list(stream(folder, num_epochs=1)), list(threaded))
    threaded.close()
    with pytest.raises(ValueError, match="closed"):
      next(threaded)

  @pytest.mark.parametrize(
    "prefetch", [pytest.param(0, marks=pytest.mark.slow), 2]
  )
  def test_resumes_at_every_batch(self, folder, tmp_path, prefetch):
    """With broken samples, a filter and the turn of an epoch in between."""
    broken = archive(
      tmp_path / "b.tar",
      sample("0", uid_of(1), png=b"x") | sample("1", uid_of(2), txt=None),
    )
    paths = [*shard_files.expand(folder), broken]
    keep = shapes.load("train", size=230, seed=5, image_size=SIZE).uids[::2]

    def fresh():
      made = stream(
        paths,
        batch_size=20,
        num_epochs=2,
        keep=[*keep, uid_of(1), uid_of(2)],
        num_threads=prefetch,  # windows are read ahead, too
      )
      if prefetch:
        made = grain.experimental.ThreadPrefetchIterDataset(
          made, prefetch_buffer_size=prefetch
        )
      return iter(made)

    iterator, states, batches = fresh(), [], []
    while True:
      states.append(json.loads(json.dumps(iterator.get_state())))
      try:
        batches.append(next(iterator))
      except StopIteration:
        break
    assert len(batches) == 12  # Twice 115, in batches of 20.
    last = states[-1]["statistics"]
    # At the turn of the epoch, some would be twice in a batch.
    left_out = last["noted"]["uid twice in a batch, left out"]
    assert last["samples"] == 230 - left_out
    assert left_out < 8
    assert last["filtered"] == 230
    assert last["broken"] == {"image not readable": 2, "no caption": 2}
    for step, state in enumerate(states):
      again = fresh()
      again.set_state(state)
      assert again.get_state() == state
      assert_same(batches[step:], list(again))
      assert again.get_state()["statistics"] == last
      again.close()

  def test_state_goes_through_a_checkpoint(self, folder, tmp_path):
    iterator = iter(stream(folder))
    for _ in range(3):
      next(iterator)
    with ocp.CheckpointManager(tmp_path / "c", item_names=("data",)) as manager:
      manager.save(
        3,
        args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)),
      )
      manager.wait_until_finished()
      again = iter(stream(folder))
      manager.restore(
        3,
        args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)),
      )
    assert_same([next(iterator)], [next(again)])

  @pytest.mark.parametrize(
    "other", [{"seed": 2}, {"window": 51}, {"keep": ["0" * 32]}]
  )
  def test_state_of_another_stream_is_refused(self, folder, other):
    state = iter(stream(folder)).get_state()
    with pytest.raises(ValueError, match="other data or settings"):
      iter(stream(folder, **other)).set_state(state)

  def test_processes_share_the_shards(self, folder, pairs):
    parts = [
      uids_of(
        stream(folder, num_epochs=1, process_index=index, process_count=3)
      )
      for index in range(3)
    ]
    counts = collections.Counter(itertools.chain(*parts))
    assert counts == collections.Counter(pairs.uids.tolist())
    assert min(map(len, parts)) > 50
    with pytest.raises(ValueError, match="8 shards for 9 processes"):
      stream(folder, process_index=0, process_count=9)

  def test_filter_is_that_of_a_subset_file(self, folder, pairs, tmp_path):
    chosen = pairs.uids[np.random.default_rng(0).random(230) < 0.3]
    path = gm.export.write_datacomp_subset(
      tmp_path / "subset.npy", [*chosen, "f" * 32]
    )
    iterator = iter(stream(folder, keep=path, num_epochs=1))
    assert sorted(uids_of(iterator)) == sorted(chosen)
    assert iterator.statistics.filtered == 230 - len(chosen)

  def test_membership_is_that_of_a_set(self):
    rng = np.random.default_rng(0)
    words = rng.integers(2**64, size=(500, 2), dtype=np.uint64)
    words[::3, 0] = 2**63  # Many with one first half.
    uids = [f"{a:016x}{b:016x}" for a, b in words.tolist()]
    keep = shard_samples.kept_uids(uids[:250])
    inside = [shard_samples._is_in(keep, uid) for uid in uids]
    assert inside == [uid in set(uids[:250]) for uid in uids]

  def test_filter_of_other_data_ends(self, folder):
    with pytest.raises(ValueError, match="filter is for other data"):
      next(iter(stream(folder, keep=["0" * 32])))

  def test_batch_larger_than_the_data_ends(self, folder):
    with pytest.raises(ValueError, match="fewer than batch_size=300"):
      next(iter(stream(folder, batch_size=300)))
    (batch,) = stream(folder, batch_size=300, num_epochs=1)
    assert batch["mask"].sum() == 230

  def test_window_is_closed_when_it_is_full_of_bytes(self, folder):
    small = limits_lib.Limits(window_bytes=1)
    iterator = iter(stream(folder, limits=small, num_epochs=1, batch_size=8))
    next(iterator)
    assert iterator.get_state()["taken"] == 1
    assert len(set(uids_of(iterator))) == 222

  def test_shard_that_vanishes_is_counted(self, folder, tmp_path):
    gone = tmp_path / "gone.tar"
    gone.write_bytes(pathlib.Path(shard_files.expand(folder)[0]).read_bytes())
    made = stream([folder, gone], num_epochs=1)
    gone.unlink()
    iterator = iter(made)
    assert len(uids_of(iterator)) == 230
    assert iterator.statistics.broken == {"shard not readable": 1}

  @pytest.mark.slow
  def test_readers_take_turns_and_resume_at_every_batch(
    self, folder, pairs, monkeypatch
  ):
    """Without processes, which change nothing: the next test."""
    monkeypatch.setattr(readers._Part, "mp_prefetch", lambda part, *_: part)

    def fresh(**options):
      asked = {"num_epochs": 2, "process_count": 2, "readers": 3, **options}
      return iter(stream(folder, **asked))

    iterator, states, batches = fresh(), [], []
    while True:
      states.append(json.loads(json.dumps(iterator.get_state())))
      try:
        batches.append(next(iterator))
      except StopIteration:
        break
    alone = [
      list(stream(folder, num_epochs=2, process_index=n, process_count=6))
      for n in range(3)
    ]
    for batch in alone[0] + alone[1] + alone[2]:
      del batch["index"]  # each has numbers of its own
    turns = [x for row in itertools.zip_longest(*alone) for x in row if x]
    shown = [{k: v for k, v in b.items() if k != "index"} for b in batches]
    assert_same(turns, shown)
    index = np.concatenate([batch["index"] for batch in batches])
    assert len(np.unique(index)) == (index >= 0).sum() + 1  # and -1
    for step, state in enumerate(states):
      again = fresh()
      again.set_state(state)
      assert again.get_state() == state
      assert_same(batches[step:], list(again))
      assert again.statistics == iterator.statistics
    other = list(fresh(process_index=1))
    found = collections.Counter(uids_of(batches + other))
    assert found == dict.fromkeys(pairs.uids.tolist(), 2)
    with pytest.raises(ValueError, match="other data or settings"):
      fresh(readers=2).set_state(states[0])
    with pytest.raises(ValueError, match="for 2 processes of 5 readers each"):
      fresh(readers=5)

  @pytest.mark.slow  # processes start
  def test_reader_that_dies_is_an_error_and_the_stream_goes_on(self, folder):
    with mock.patch.object(readers._Part, "mp_prefetch", lambda part, *_: part):
      whole = list(itertools.islice(stream(folder, readers=2), 12))
    iterator = iter(stream(folder, readers=2))
    batches = [next(iterator) for _ in range(4)]
    state = json.loads(json.dumps(iterator.get_state()))
    started = multiprocessing.active_children()
    assert len(started) == 2
    os.kill(started[1].pid, signal.SIGINT)  # Ctrl-C is the owner's
    os.kill(started[0].pid, signal.SIGKILL)
    since = time.monotonic()
    with pytest.raises(workers.WorkerError, match=r"2 processes that.*code -9"):
      list(itertools.islice(iterator, 8))
    assert time.monotonic() - since < 60
    iterator.close()
    assert not multiprocessing.active_children()
    again = iter(stream(folder, readers=2))
    again.set_state(state)
    batches += [next(again) for _ in range(8)]
    again.close()
    assert_same(whole, batches)

  def test_closing_ends_the_threads(self, folder):
    before = threading.active_count()
    iterator = iter(stream(folder, num_threads=4))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    assert threading.active_count() == before

  def test_tokenizer_is_checked(self, folder):
    with pytest.raises(ValueError, match="the tokenizer gave float64"):
      next(iter(stream(folder, tokenizer=lambda texts: np.zeros((24, 3)))))

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"batch_size": 0}, "batch_size must be at least 1"),
      ({"seed": -1}, "seed must be at least 0"),
      ({"window": 0}, "window must be at least 1"),
      ({"process_index": 1}, "process_index must lie in 0 .. 0"),
      ({"max_broken_share": 2}, "max_broken_share must lie in"),
      ({"uid_source": "url"}, "uid_source must be one of"),
      ({"keep": []}, "keeps no uid"),
      ({"keep": ["x"]}, "32 lower-case hexadecimal"),
    ],
  )
  def test_bad_options_are_named(self, folder, options, message):
    with pytest.raises(ValueError, match=message):
      stream(folder, **options)


class TestShardFiles:
  def test_braces(self):
    assert shard_files.names("a{8..11}.tar") == [
      *("a8.tar", "a9.tar"),
      *("a10.tar", "a11.tar"),
    ]
    assert shard_files.names("{x,y}/{00..01}") == [
      *("x/00", "x/01"),
      *("y/00", "y/01"),
    ]
    for bad in ("a{0..", "a}b", "{a{0..1}}"):
      with pytest.raises(ValueError, match="braces"):
        shard_files.names(bad)
    with pytest.raises(ValueError, match="more than 1000000"):
      shard_files.names("{0..9999}{0..9999}")

  def test_missing_shards_are_named(self, folder, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"1 of 9 shards.*00000008"):
      shard_files.expand(f"{folder}/{{00000000..00000008}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no \.tar file"):
      shard_files.expand(tmp_path)
    with pytest.raises(ValueError, match="more than once"):
      shard_files.expand([folder, f"{folder}/00000000.tar"])
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"1 like '0\.tar\.gz'.*uncomp"):
      shard_files.expand(tmp_path)
    for name in ("._1.tar", ".1.tar", "1.tar", "1.tar.tmp", "2.TAR", "3.txt"):
      (tmp_path / name).write_bytes(b"x")
    assert shard_files.expand(tmp_path) == [str(tmp_path / "1.tar")]
    assert "1 shards that are read and 3 like '0.tar.gz' that" in caplog.text
    with pytest.raises(FileNotFoundError, match="pipe:"):
      shard_files.expand("pipe:touch x")

  def test_written_shards_are_datacomps(self, folder, pairs, tmp_path):
    files = sorted(path.name for path in folder.iterdir())
    assert files[:2] == ["00000000.tar", "00000000_stats.json"]
    assert len(files) == 16
    stats = json.loads((folder / "00000007_stats.json").read_text())
    assert stats == {"successes": 230 - 7 * 32}
    with tarfile.open(folder / "00000001.tar") as file:
      names = file.getnames()
      about = json.load(file.extractfile("000000032.json"))
    assert names[:3] == ["000000032.png", "000000032.json", "000000032.txt"]
    assert about == {"uid": pairs.uids[32]}
    arguments = (pairs.images[:32], pairs.captions[:32], pairs.uids[:32])
    (again,) = shard_files.write(tmp_path, *arguments, image_format="png")
    first = (folder / "00000000.tar").read_bytes()
    assert pathlib.Path(again).read_bytes() == first
    with pytest.raises(FileExistsError, match="has shards"):
      shard_files.write(tmp_path, *arguments)
    with pytest.raises(ValueError, match="1 uids are not 32"):
      shard_files.write(tmp_path, pairs.images[:1], ["a"], ["x"])

  def test_jpeg_is_close(self, pairs, tmp_path):
    shard_files.write(
      tmp_path, pairs.images[:9], pairs.captions[:9], pairs.uids[:9]
    )
    (batch,) = stream(tmp_path, seed=None, num_epochs=1, batch_size=9)
    difference = batch["image"].astype(float) - pairs.images[:9]
    assert 0 < np.sqrt(np.square(difference).mean()) < 16


class TestPairs:
  def make(self, pairs, **options):
    asked = {"batch_size": 50, "seed": 3, "num_epochs": 2}
    text = tokenizer(pairs.captions.tolist())
    arrays = (pairs.images, text, pairs.uids)
    return image_text.Pairs(*arrays, **{**asked, **options})

  def test_batches_are_those_of_shards(self, folder, pairs):
    """The same keys, dtypes and values, in order."""
    made = self.make(pairs, seed=None, num_epochs=1, batch_size=24)
    assert_same(
      list(made), list(stream(folder, seed=None, num_epochs=1, batch_size=24))
    )

  def test_epochs_are_permutations(self, pairs):
    batches = list(self.make(pairs))
    index = np.concatenate([batch["index"] for batch in batches])
    epochs = [part[part >= 0] for part in np.split(index, 2)]
    for epoch in epochs:
      assert sorted(epoch) == list(range(230))
    assert (epochs[0] != epochs[1]).any()
    for batch in batches:
      rows = batch["index"][batch["mask"]]
      np.testing.assert_array_equal(
        batch["image"][batch["mask"]], pairs.images[rows]
      )
      assert batch["uid"][batch["mask"]].tolist() == pairs.uids[rows].tolist()

  def test_processes_take_parts_of_one_batch(self, pairs):
    whole = list(self.make(pairs, batch_size=60))
    parts = [
      list(self.make(pairs, batch_size=20, process_index=n, process_count=3))
      for n in range(3)
    ]
    for batch, *pieces in zip(whole, *parts, strict=True):
      index = np.concatenate([piece["index"] for piece in pieces])
      np.testing.assert_array_equal(index, batch["index"])

  def test_subset_and_dropped_rest(self, pairs):
    made = self.make(pairs, indices=np.arange(0, 230, 2), drop_last=True)
    assert made.steps_per_epoch == 2
    index = np.concatenate([batch["index"] for batch in made])
    assert len(index) == 200
    assert (index % 2 == 0).all()
    assert all(batch["mask"].all() for batch in made)
    with pytest.raises(ValueError, match="115 pairs don't fill one batch"):
      self.make(pairs, indices=np.arange(115), drop_last=True, batch_size=200)

  def test_resumes_and_refuses_other_data(self, pairs):
    iterator = iter(self.make(pairs))
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = iter(self.make(pairs))
    again.set_state(state)
    assert_same(list(iterator), list(again))
    with pytest.raises(ValueError, match="other data or settings"):
      iter(self.make(pairs, seed=4)).set_state(state)

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"batch_size": 0}, "batch_size must be at least 1"),
      ({"seed": -1}, "seed must be at least 0"),
      ({"indices": [0, 0]}, "indices must differ"),
      ({"indices": [230]}, r"indices must lie in 0 \.\. 229"),
      ({"indices": np.ones(230, bool)}, "indices must be positions"),
      ({"process_count": 2, "process_index": 2}, "process_index must lie"),
    ],
  )
  def test_bad_options_are_named(self, pairs, options, message):
    with pytest.raises(ValueError, match=message):
      self.make(pairs, **options)


class TestDatacomp:
  @pytest.fixture
  def metadata(self, tmp_path):
    """Two files, 7 rows; what basic filtering says of each beside it."""
    rows = [
      ("a red star", 200, 600, True),
      ("two words", 300, 300, False),
      ("a b c", 300, 300, False),  # 5 characters.
      ("a bc d", 300, 300, True),  # 3 words, 6 characters.
      ("  a  red   star ", 199, 300, False),
      ("赤い 星 です ね", 300, 300, False),
      ("a red star", 200, 601, False),
    ]
    for number, part in enumerate((rows[:3], rows[3:])):
      first = 3 * number
      table = {
        "url": ["http://x"] * len(part),
        "clip_l14_similarity_score": pa.array(
          [(first + n) / 10 for n in range(len(part))], pa.float32()
        ),
        "uid": [uid_of(first + n) for n in range(len(part))],
        "text": [row[0] for row in part],
        "original_width": [row[1] for row in part],
        "original_height": [row[2] for row in part],
      }
      pq.write_table(pa.table(table), tmp_path / f"{number}.parquet")
    columns = ("clip_l14_similarity_score", *datacomp.BASIC_COLUMNS)
    read = datacomp.read_metadata(tmp_path, columns)
    return read, np.array([row[3] for row in rows])

  def test_metadata_is_read_row_by_row(
    self, metadata, tmp_path, tmp_path_factory
  ):
    read, _ = metadata
    scores = read.column("clip_l14_similarity_score")
    np.testing.assert_allclose(scores, np.arange(7) / 10, atol=1e-7)
    expected = [(int(uid_of(n)[:16], 16), n) for n in range(7)]
    assert read.uids.tolist() == expected
    with pytest.raises(ValueError, match="no column clip_b32_similarity_score"):
      datacomp.read_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
      datacomp.read_metadata(tmp_path_factory.mktemp("empty"))

  def test_basic(self, metadata):
    read, expected = metadata
    kept = datacomp.basic(read)
    assert kept.ids.tolist() == read.uids[expected].tolist()
    said = datacomp.basic(read, is_english=np.arange(7) > 2)
    assert said.ids["f1"].tolist() == [3, 5]

  def test_texts_that_many_rows_share_are_counted_before_they_are_copied(
    self, tmp_path
  ):
    text = pa.DictionaryArray.from_arrays(
      np.zeros(1000, np.int32), ["x" * 10_000]
    )
    table = {"uid": [f"{n:032x}" for n in range(1000)], "text": text}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    small = limits_lib.Limits(table_row_group=1 << 20)
    with pytest.raises(ValueError, match=r"x\.parquet: 1000 rows .*'text' are"):
      datacomp.read_metadata(tmp_path, ["text"], limits=small)
    read = datacomp.read_metadata(tmp_path, ["text"])
    assert read.table["text"].to_pylist() == ["x" * 10_000] * 1000
    table["uid"] = ["0" * 40_000] * 1000
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: .*'uid' are 40000000 b"):
      datacomp.read_metadata(tmp_path, [])

  @pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
      (1 << 50, {}, f"has 1000 bytes and claims {1 << 50} rows"),
      (-1, {}, "claims -1 rows"),
      (9, {}, "claims 9 rows, its row groups 8"),
      (8, {"total_uncompressed_size": 1 << 42}, "claims 4398046511104 bytes"),
      (8, {"total_uncompressed_size": -1}, "claims -1 bytes"),
      (8, {"total_compressed_size": 2000}, "bytes 4 to 2004 of a file of 1000"),
      (8, {"data_page_offset": -4}, "claims bytes -4"),
      (8, {"path_in_schema": "other", "total_compressed_size": 9999}, None),
    ],
  )
  def test_claims_of_tables_are_compared(self, rows, column, message):
    """What Arrow reads of a footer, by hand: no writer makes such ones."""
    sound = {
      "path_in_schema": "uid",
      "total_compressed_size": 300,
      "total_uncompressed_size": 400,
      "data_page_offset": 4,
      "has_dictionary_page": False,
    }
    group = types.SimpleNamespace(
      num_rows=8,
      num_columns=1,
      column=lambda place: types.SimpleNamespace(**sound | column),
    )
    about = types.SimpleNamespace(
      num_rows=rows, num_row_groups=1, row_group=lambda number: group
    )

    def check():
      datacomp._check_claims(about, ["uid"], 1000, limits_lib.DEFAULT)

    if message is None:
      check()
    else:
      with pytest.raises(ValueError, match=message):
        check()

  def test_files_that_do_not_fit_are_named(self, tmp_path):
    table = {"uid": [uid_of(0)], "s": pa.array([0.5], pa.float32())}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    pq.write_table(pa.table(table | {"s": ["a"]}), tmp_path / "1.parquet")
    with pytest.raises(
      ValueError, match=r"1\.parquet: its columns are s strin"
    ):
      datacomp.read_metadata(tmp_path, ["s"])
    (tmp_path / "1.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"1\.parquet: "):
      datacomp.read_metadata(tmp_path, ["s"])
    pq.write_table(pa.table(table)[:0], tmp_path / "1.parquet")
    assert len(datacomp.read_metadata(tmp_path, ["s"]).uids) == 1
    (tmp_path / "0.parquet").unlink()
    assert len(datacomp.read_metadata(tmp_path, ["s"]).uids) == 0

  @pytest.mark.slow
  def test_damage_anywhere_is_told(self, tmp_path):
    """Any bytes of a table: a one-line error with its name, or its rows."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.parquet"
    uids = [uid_of(n) for n in range(500)]
    table = pa.table({"uid": uids, "text": [f"t {n % 9}" for n in range(500)]})
    pq.write_table(table, path, row_group_size=200)
    whole = path.read_bytes()
    told = 0
    for turn in range(400):
      damaged = bytearray(whole)
      start = len(whole) - 1500 if turn % 2 else 0
      for place in rng.integers(start, len(whole), rng.integers(1, 4)):
        damaged[place] = int(rng.integers(256))
      if turn % 5 == 0:
        del damaged[int(rng.integers(len(whole))) :]
      path.write_bytes(damaged)
      said = f"{path}: damaged"
      try:
        read = datacomp.read_metadata(path, ["text"])
      except ValueError as error:
        told, said = told + 1, str(error)
      else:
        assert read.table.num_rows == len(read.uids)
      assert said.startswith(f"{path}: ")
      assert "\n" not in said
    assert told > 100

  def test_top_is_the_published_rule(self):
    """Against the rule written out with a loop."""
    rng = np.random.default_rng(0)
    for size, fraction in ((10, 0.3), (57, 0.3), (57, 0.999), (1, 0.5), (9, 1)):
      scores = rng.integers(0, 20, size) / 10  # With ties.
      uids = [uid_of(n) for n in range(size)]
      ranked = [*sorted(scores, reverse=True), -1.0]
      threshold = ranked[int(size * fraction)]
      expected = [n for n in range(size) if scores[n] >= threshold]
      kept = datacomp.top(uids, scores, fraction)
      assert kept.ids["f1"].tolist() == expected

  def test_clip_without_the_lowest_by_mimic_score(self, tmp_path):
    rng = np.random.default_rng(1)
    uids = np.array([uid_of(n) for n in range(100)])
    clip, mimic = rng.normal(size=100), rng.normal(size=100)
    mimic[:20] = np.nan  # Never scored.
    kept = datacomp.top(uids, clip, 0.3) - datacomp.bottom(uids, mimic, 0.15)
    scored = [n for n in range(100) if n >= 20]
    lowest = sorted(scored, key=lambda n: mimic[n])[:12]
    highest = sorted(range(100), key=lambda n: -clip[n])[:31]
    expected = sorted(set(highest) - set(lowest))
    assert kept.ids["f1"].tolist() == expected
    path = gm.export.write_datacomp_subset(tmp_path / "x.npy", kept.ids)
    assert gm.export.read_datacomp_subset(path)["f1"].tolist() == expected

  def test_missing_scores_are_never_at_the_top(self):
    uids = [uid_of(n) for n in range(4)]
    kept = datacomp.top(uids, [np.nan, 1.0, np.nan, 0.5], 1.0)
    assert kept.ids["f1"].tolist() == [1, 3]

  @pytest.mark.parametrize("fraction", [0, 1.5, np.nan])
  def test_bad_fractions(self, fraction):
    with pytest.raises(ValueError, match="fraction must lie"):
      datacomp.top([uid_of(0)], [1.0], fraction)
    with pytest.raises(ValueError, match="one entry per uid"):
      datacomp.bottom([uid_of(0)], [1.0, 2.0], 0.5)


class TestArrays:
  @pytest.mark.parametrize(
    ("shape", "descr", "message"),
    [
      ((1 << 40,), "<f4", "mmap length is greater"),
      ((1 << 62, 8), "<f4", "can't be read as a .npy file"),
      ((-3,), "<f4", "can't be read as a .npy file"),
      ((2,), "<f4", "has 144 bytes, and by its header 136"),
      ((4,), "|O", "can't be read as a .npy file"),
      ((4,), "<x9", "can't be read as a .npy file"),
    ],
  )
  def test_headers_are_not_believed(self, tmp_path, shape, descr, message):
    file = tmp_path / "x.npy"
    np.save(file, np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(arrays.load(file), [0, 1, 2, 3])
    content = file.read_bytes()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    header = repr(fields).encode().ljust(117) + b"\n"
    file.write_bytes(content[:10] + header + content[128:])
    with pytest.raises(ValueError, match=message) as error:
      arrays.load(file)
    assert str(file) in str(error.value)

  def test_other_files_are_none(self, tmp_path):
    file = tmp_path / "x.npy"
    for content in (b"", b"\x93NUMPY", b"PK\3\4", b"\x93NUMPY\1\0\xff\xff{"):
      file.write_bytes(content)
      with pytest.raises(ValueError, match=r"x\.npy"):
        arrays.load(file)

  def test_what_was_kept_and_is_damaged_counts_for_nothing(self, tmp_path):
    file, array = tmp_path / "x.npy", np.ones((2, 3), np.float32)
    arrays.write(file, array)
    np.testing.assert_array_equal(arrays.read(file, (2, 3)), array)
    assert arrays.read(file, (3, 2)) is None
    forged = file.read_bytes().replace(b"(2, 3)", b"(9, 9)")
    file.write_bytes(forged)
    assert arrays.read(file, (2, 3)) is None
    total = hashlib.sha256(forged).hexdigest()
    file.with_suffix(".sha256").write_text(total)
    assert arrays.read(file, (2, 3)) is None


def test_json_is_read_as_far_as_it_is_believed():
  rng = np.random.default_rng(0)

  def made(depth):
    if not depth:
      return {"a": [1, "x", None]}
    inner = made(depth - 1)
    return {"b": inner, "c": 2} if rng.random() < 0.5 else [1, inner]

  for depth in (0, 3, 97, 98, 99, 300):
    content = json.dumps(made(depth)).encode()
    if depth + 2 <= 100:
      assert limits_lib.parse_json(content, most=1 << 20) == json.loads(content)
    else:
      with pytest.raises(ValueError, match="more than 100 deep"):
        limits_lib.parse_json(content, most=1 << 20)
  with pytest.raises(ValueError, match="has 30 bytes; the limit is 29"):
    limits_lib.parse_json(b'"' + b"x" * 28 + b'"', most=29)


def test_limits_are_positive():
  with pytest.raises(ValueError, match="limit image_side must be a positive"):
    limits_lib.Limits(image_side=0)
