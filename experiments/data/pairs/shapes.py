"""`shapes`: pictures of coloured shapes with captions, for work without a web.

Each picture shows one to three objects of one shape and colour, somewhere
before a background, and its caption tells all of that. Everything is drawn from
one seed, in seconds, and the truth about wrong captions is kept beside them.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import purposes
from experiments.data.noise import captions as caption_noise
from experiments.data.pairs import drawing

SPLITS = ("train", "held_out", "zero_shot")
SHAPES = tuple(drawing.SHAPES)
COLOURS = {
  "red": (215, 35, 40),
  "green": (35, 165, 55),
  "blue": (45, 75, 235),
  "yellow": (245, 220, 40),
  "purple": (150, 50, 185),
  "orange": (245, 135, 20),
  "pink": (250, 145, 190),
  "cyan": (50, 205, 220),
}
BACKGROUNDS = {
  "black": (14, 14, 14),
  "gray": (125, 125, 125),
  "white": (240, 240, 240),
  "brown": (88, 56, 30),
}
COUNTS = ("one", "two", "three")
# Where the objects are, and where each of them stands on a canvas 32 wide:
# objects in the upper or lower third stand side by side, on the left or right
# above each other, and in the middle on a diagonal.
POSITIONS = {
  "on the left": (8.0, None),
  "on the right": (24.0, None),
  "at the top": (None, 8.0),
  "at the bottom": (None, 24.0),
  "in the middle": (None, None),
}
_PLACES = ((16.0,), (9.5, 22.5), (6.0, 16.0, 26.0))  # by count
_RADII = (6.8, 5.6, 4.6)  # by count; what fits without touching
_TEMPLATES = (
  "{objects} {where} on a {background} background",
  "a photo of {objects} {where}, {background} background",
  "{objects} {where} of a {background} picture",
  "{background} background with {objects} {where}",
)


class Attributes(NamedTuple):
  """The content of each picture, int8 [N]: positions in this module's lists."""

  colour: np.ndarray  # in COLOURS
  shape: np.ndarray  # in SHAPES
  objects: np.ndarray  # in COUNTS
  position: np.ndarray  # in POSITIONS
  background: np.ndarray  # in BACKGROUNDS


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
  """One split, in memory and read-only.

  Attributes:
    images: uint8 [N, S, S, 3].
    captions: str [N], as a learner is given them.
    clean_captions: str [N], as they describe the pictures.
    is_noisy: bool [N], where the two differ.
    noise_kind: str [N], one of `caption_noise.KINDS`, or "".
    labels: int32 [N], the class for zero-shot classification: colour and shape.
    class_names: Their names [C], as "red circle".
    attributes: The content of each picture.
    uids: str [N], 32 hexadecimal digits each, as DataComp's.
    fingerprint: A hash of images and captions.
  """

  images: np.ndarray
  captions: np.ndarray
  clean_captions: np.ndarray
  is_noisy: np.ndarray
  noise_kind: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  attributes: Attributes
  uids: np.ndarray
  fingerprint: str

  def __len__(self) -> int:
    return len(self.images)


@functools.lru_cache(maxsize=4)
def load(
  split: str = "train",
  *,
  size: int = 20_000,
  seed: int = 0,
  image_size: int = 32,
  noise_rate: float = 0.0,
  noise_kinds: Sequence[str] = caption_noise.KINDS,
  context_length: int = 77,
) -> Shapes:
  """Draws one split, which is kept for the rest of the process.

  The pictures and true captions depend on split, size, seed and image size
  alone, whatever the noise. Splits of one seed are drawn independently and
  share no picture; "zero_shot" has as many of each class, to within one.

  Args:
    split: One of `SPLITS`.
    size: The number of pairs, N.
    seed: Not negative.
    image_size: Height and width in pixels, S; at least 16.
    noise_rate: Share of pairs that get a wrong caption, in [0, 1].
    noise_kinds: The kinds of wrong captions, a tuple; see `caption_noise`.
    context_length: The tokenizer's: the number of filler words in front of a
      padded caption.

  Returns:
    The split.

  Raises:
    ValueError: If there is no such split or a value is out of range.

  Example:
    >>> pairs = load("held_out", size=3, seed=0)
    >>> print(pairs.images.shape, pairs.captions[0])
    (3, 32, 32, 3) one cyan triangle at the top of a black picture
  """
  if split not in SPLITS:
    raise ValueError(f"no split {split!r} of shapes; there are {SPLITS}")
  for name, value, least in (
    ("size", size, 1),
    ("seed", seed, 0),
    ("image_size", image_size, 16),
  ):
    if value < least:
      raise ValueError(f"{name} must be at least {least}, got {value}")
  number = SPLITS.index(split)
  rng = np.random.default_rng((seed, purposes.SHAPES, number))
  labels = rng.integers(len(COLOURS) * len(SHAPES), size=size)
  if split == "zero_shot":
    labels = rng.permutation(np.arange(size) % (len(COLOURS) * len(SHAPES)))
  attributes = Attributes(
    *(
      values.astype(np.int8)
      for values in (
        labels // len(SHAPES),
        labels % len(SHAPES),
        rng.integers(len(COUNTS), size=size),
        rng.integers(len(POSITIONS), size=size),
        rng.integers(len(BACKGROUNDS), size=size),
      )
    )
  )
  images = _draw(attributes, rng, image_size)
  noisy = caption_noise.apply_noise(
    _captions(attributes, rng),
    labels,
    rate=noise_rate,
    # Another seed for each split, or small splits would share their noise.
    seed=seed * len(SPLITS) + number,
    kinds=tuple(noise_kinds),
    context_length=context_length,
  )
  labels = labels.astype(np.int32)
  uids = np.array([_uid(seed, split, row) for row in range(size)])
  for array in (images, labels, uids, *attributes, *noisy):
    array.setflags(write=False)  # Shared by all who load this split.
  return Shapes(
    images=images,
    captions=noisy.captions,
    clean_captions=noisy.clean_captions,
    is_noisy=noisy.is_noisy,
    noise_kind=noisy.kind,
    labels=labels,
    class_names=class_names(),
    attributes=attributes,
    uids=uids,
    fingerprint=_fingerprint(images, noisy.captions),
  )


def class_names() -> tuple[str, ...]:
  """Returns the classes of zero-shot classification [C], in order of labels."""
  return tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def class_prompts() -> tuple[tuple[str, ...], ...]:
  """Returns the texts of each class [C][T], to average over T templates.

  They tell all that a caption tells, each another place, number and background:
  a text without these would be like none that was trained on.

  Example:
    >>> class_prompts()[0][:2]
    ('a red circle on the left on a black background',
     'two red circles on the right on a gray background')
  """
  return tuple(_prompts(name) for name in class_names())


def _prompts(name: str) -> tuple[str, ...]:
  positions, backgrounds = tuple(POSITIONS), tuple(BACKGROUNDS)
  prompts = []
  for number, (template, count) in enumerate(
    itertools.product(_TEMPLATES, range(len(COUNTS)))
  ):
    prompts.append(
      template.format(
        objects=_objects(name, count),
        where=positions[number % len(positions)],
        background=backgrounds[number % len(backgrounds)],
      )
    )
  return tuple(prompts)


def _draw(
  attributes: Attributes, rng: np.random.Generator, image_size: int
) -> np.ndarray:
  """Draws the pictures [N, S, S, 3], each a little different from others."""
  size, most = len(attributes.objects), len(COUNTS)
  # Of [position, count]: the objects' places, NaN for those there are not.
  places = np.full((2, len(POSITIONS), most, most), np.nan)
  for position, (x, y) in enumerate(POSITIONS.values()):
    for count, along in enumerate(_PLACES):
      for axis, fixed in enumerate((x, y)):
        places[axis, position, count, : count + 1] = fixed or along
  x, y = places[:, attributes.position, attributes.objects]
  radius = np.take(_RADII, attributes.objects) * rng.uniform(0.88, 1.0, size)
  jitter = rng.uniform(-1, 1, (2, size, most))
  front = np.array(list(COLOURS.values()))[attributes.colour]
  back = np.array(list(BACKGROUNDS.values()))[attributes.background]
  grain = rng.standard_normal((size, image_size, image_size), np.float32)
  grain *= 5
  return drawing.draw(
    shape=attributes.shape,
    x=x + jitter[0],
    y=y + jitter[1],
    radius=radius,
    angle=rng.uniform(-0.2, 0.2, (size, most)),
    foreground=front + rng.uniform(-14, 14, (size, 3)),
    background=back + rng.uniform(-10, 10, (size, 1)),
    grain=grain,
    image_size=image_size,
  )


def _captions(attributes: Attributes, rng: np.random.Generator) -> list[str]:
  colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
  positions = tuple(POSITIONS)
  size = len(attributes.objects)
  templates = rng.integers(len(_TEMPLATES), size=size).tolist()
  says_one = (rng.random(size) < 0.5).tolist()
  rows = zip(*(values.tolist() for values in attributes), strict=True)
  captions = []
  for (colour, shape, count, position, background), template, one in zip(
    rows, templates, says_one, strict=True
  ):
    name = f"{colours[colour]} {SHAPES[shape]}"
    captions.append(
      _TEMPLATES[template].format(
        objects=_objects(name, count, says_one=one),
        where=positions[position],
        background=backgrounds[background],
      )
    )
  return captions


def _objects(name: str, count: int, *, says_one: bool = False) -> str:
  if count:
    return f"{COUNTS[count]} {_plural(name)}"
  return f"{COUNTS[0] if says_one else _article(name)} {name}"


def _article(name: str) -> str:
  return "an" if name[0] in "aeiou" else "a"


def _plural(name: str) -> str:
  return f"{name}es" if name.endswith("s") else f"{name}s"


def _uid(seed: int, split: str, row: int) -> str:
  text = f"shapes {seed} {split} {row}"
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fingerprint(images: np.ndarray, captions: np.ndarray) -> str:
  digest = hashlib.sha256(json.dumps(captions.tolist()).encode())
  digest.update(f"{images.shape}".encode())
  digest.update(images.data)
  return digest.hexdigest()[:32]
