"""The synthetic pairs: what is drawn, what is said, and what is wrong."""

import collections
import re

import numpy as np
import pytest

from experiments.data.noise import captions as caption_noise
from experiments.data.pairs import drawing, shapes


@pytest.fixture(scope="module")
def pairs():
  return shapes.load("train", size=3000, seed=3, noise_rate=0.3)


def drawn(shape, *, radius=12.0, angle=0.0, image_size=64):
  """The share of each pixel that one object in the middle covers."""
  image = drawing.draw(
    shape=np.array([list(drawing.SHAPES).index(shape)]),
    x=np.array([[16.0]]),
    y=np.array([[16.0]]),
    radius=np.array([radius]),
    angle=np.array([[angle]]),
    foreground=np.full((1, 3), 255.0),
    background=np.zeros((1, 3)),
    image_size=image_size,
  )
  return image[0, ..., 0] / 255


class TestDrawing:
  @pytest.mark.parametrize(
    ("shape", "area"),
    [
      ("circle", np.pi),
      ("square", 1.6**2),
      ("triangle", 3 * np.sqrt(3) / 4),
      ("cross", 4 * 2 * 0.32 - 0.64**2),
      ("ring", np.pi * (1 - 0.44**2)),
      ("diamond", 2 * 0.55),
    ],
  )
  def test_area_is_the_geometric_one(self, shape, area):
    # Pixels are 1/24 of the radius wide; edges are right to a part of that.
    covered = drawn(shape).sum() / 24**2
    assert covered == pytest.approx(area, rel=0.015)

  @pytest.mark.parametrize("shape", drawing.SHAPES)
  def test_all_sizes_show_the_same(self, shape):
    small = drawn(shape, image_size=32)
    large = drawn(shape, image_size=128)
    shrunk = large.reshape(32, 4, 32, 4).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 0.01

  def test_edges_are_smooth(self):
    covered = drawn("circle")
    partly = (covered > 0.02) & (covered < 0.98)
    # About one pixel deep along a circumference of 2 pi 24 pixels.
    assert 100 < partly.sum() < 260

  def test_star_has_five_tips(self):
    covered = drawn("star", image_size=256)
    centre = np.arange(256) + 0.5 - 128
    y, x = np.meshgrid(centre, centre, indexing="ij")
    around = np.abs(np.hypot(x, y) - 0.6 * 96) < 1.5
    angles = np.sort(np.arctan2(y, x)[around & (covered > 0.5)])
    gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
    assert (gaps > 0.3).sum() == 5

  def test_turning_turns(self):
    turned = drawn("moon", angle=np.pi / 2)
    np.testing.assert_allclose(turned, np.rot90(drawn("moon"), -1), atol=0.01)


class TestPairs:
  def test_shapes_and_dtypes(self, pairs):
    assert pairs.images.shape == (3000, 32, 32, 3)
    assert pairs.images.dtype == np.uint8
    assert pairs.labels.dtype == np.int32
    assert len(pairs.class_names) == 64
    for array in (pairs.images, pairs.captions, pairs.uids):
      assert not array.flags.writeable

  def test_captions_say_what_is_shown(self, pairs):
    one = {"a": 0, "an": 0, "one": 0, "two": 1, "three": 2}
    for row in range(200):
      caption = pairs.clean_captions[row]
      found = [value[row] for value in pairs.attributes]
      colour, shape, count, position, background = found
      words = caption.replace(",", "").split()
      name = list(shapes.COLOURS)[colour]
      at = words.index(name)
      assert one[words[at - 1]] == count, caption
      assert (
        words[at + 1].rstrip("s").startswith(shapes.SHAPES[shape].rstrip("s"))
      )
      assert list(shapes.POSITIONS)[position] in caption
      assert re.search(
        rf"{list(shapes.BACKGROUNDS)[background]} (background|picture)", caption
      )
      assert pairs.class_names[pairs.labels[row]] == (
        f"{name} {shapes.SHAPES[shape]}"
      )

  def test_pictures_show_what_captions_say(self, pairs):
    """Colour, place and background, measured from the pixels alone."""
    palette = np.array(list(shapes.COLOURS.values()), float)
    grounds = np.array(list(shapes.BACKGROUNDS.values()), float)
    pixels = pairs.images.astype(float)
    ground = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    measured = np.square(ground[:, None] - grounds).sum(-1).argmin(1)
    assert (measured == pairs.attributes.background).mean() > 0.99

    away = np.abs(pixels - ground[:, None, None]).sum(-1)
    x = np.arange(32) + 0.5
    mass = np.where(away > 60, 1.0, 0.0)
    total = mass.sum((1, 2))
    centre = (
      np.stack([(mass.sum(1) @ x), (mass.sum(2) @ x)], 1) / total[:, None]
    )
    expected = np.array([[8, 16], [24, 16], [16, 8], [16, 24], [16, 16.0]])
    place = np.square(centre[:, None] - expected).sum(-1).argmin(1)
    assert (place == pairs.attributes.position).mean() > 0.99

    strongest = away.reshape(len(pixels), -1).argmax(1)
    colour = pixels.reshape(len(pixels), -1, 3)[
      np.arange(len(pixels)), strongest
    ]
    nearest = np.square(colour[:, None] - palette).sum(-1).argmin(1)
    assert (nearest == pairs.attributes.colour).mean() > 0.97

  def test_one_seed_one_set(self, pairs):
    shapes.load.cache_clear()
    again = shapes.load("train", size=3000, seed=3, noise_rate=0.3)
    assert again is not pairs
    assert again.fingerprint == pairs.fingerprint
    np.testing.assert_array_equal(again.uids, pairs.uids)
    other = shapes.load("train", size=3000, seed=4, noise_rate=0.3)
    assert other.fingerprint != pairs.fingerprint

  def test_noise_leaves_pictures_and_truth_alone(self, pairs):
    clean = shapes.load("train", size=3000, seed=3)
    np.testing.assert_array_equal(clean.images, pairs.images)
    np.testing.assert_array_equal(clean.captions, pairs.clean_captions)
    assert not clean.is_noisy.any()
    assert clean.fingerprint != pairs.fingerprint

  def test_splits_share_nothing(self, pairs):
    seen = collections.Counter()
    for split in shapes.SPLITS:
      part = shapes.load(split, size=1000, seed=3)
      seen.update(image.tobytes() for image in part.images)
      seen.update(part.uids.tolist())
    assert max(seen.values()) == 1
    assert all(re.fullmatch("[0-9a-f]{32}", uid) for uid in pairs.uids)

  def test_zero_shot_classes_are_balanced(self):
    part = shapes.load("zero_shot", size=640, seed=3)
    assert (np.bincount(part.labels, minlength=64) == 10).all()

  def test_prompts_name_their_class(self):
    prompts = shapes.class_prompts()
    names = shapes.class_names()
    assert len(prompts) == len(names) == 64
    for texts, name in zip(prompts, names, strict=True):
      assert all(name in text for text in texts)
      assert len(set(texts)) == len(texts)
    starts = [texts[0].partition(" on the ")[0] for texts in prompts]
    assert starts[names.index("orange star")] == "an orange star"
    assert any(
      text.startswith("two red crosses ")
      for text in prompts[names.index("red cross")]
    )

  def test_prompts_say_all_that_captions_say(self):
    """A text without a place or a background is like none to train on."""
    for texts in shapes.class_prompts():
      for words in (shapes.POSITIONS, shapes.BACKGROUNDS):
        said = [[word for word in words if word in text] for text in texts]
        assert all(len(found) == 1 for found in said)
        assert {found[0] for found in said} == set(words)

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"split": "test"}, "no split 'test'"),
      ({"size": 0}, "size must be at least 1, got 0"),
      ({"seed": -1}, "seed must be at least 0"),
      ({"image_size": 8}, "image_size must be at least 16"),
      ({"size": 4, "noise_rate": 1.5}, "noise rate must lie in"),
    ],
  )
  def test_bad_options_are_named(self, options, message):
    with pytest.raises(ValueError, match=message):
      shapes.load(**options)


class TestCaptionNoise:
  def test_rate_and_kinds_are_exact(self, pairs):
    assert pairs.is_noisy.sum() == 900
    counts = collections.Counter(pairs.noise_kind.tolist())
    assert counts == {"": 2100, "swapped": 300, "truncated": 300, "padded": 300}
    changed = pairs.captions != pairs.clean_captions
    np.testing.assert_array_equal(changed, pairs.is_noisy)

  def test_swapped_captions_are_of_another_class(self, pairs):
    classes_of = collections.defaultdict(set)
    for caption, label in zip(
      pairs.clean_captions.tolist(), pairs.labels.tolist(), strict=True
    ):
      classes_of[caption].add(label)
    rows = np.flatnonzero(pairs.noise_kind == "swapped")
    for row in rows:
      assert classes_of[pairs.captions[row]]
      assert pairs.labels[row] not in classes_of[pairs.captions[row]]

  def test_donors_are_drawn_evenly(self):
    classes = np.array([0, 0, 1, 2])
    counts = collections.Counter()
    for seed in range(600):
      noisy = caption_noise.apply_noise(
        ["a", "b", "c", "d"], classes, rate=1, seed=seed, kinds=("swapped",)
      )
      counts.update(
        zip(noisy.clean_captions.tolist(), noisy.captions.tolist(), strict=True)
      )
    assert set(counts) == {
      *[("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")],
      *[("c", "a"), ("c", "b"), ("c", "d"), ("d", "a"), ("d", "b"), ("d", "c")],
    }
    # 600 draws between two or three: standard deviations 12 and 11.5.
    for (whose, _), count in counts.items():
      assert count == pytest.approx(300 if whose in "ab" else 200, abs=50)

  def test_truncated_is_the_first_word(self, pairs):
    for row in np.flatnonzero(pairs.noise_kind == "truncated")[:50]:
      assert pairs.captions[row] == pairs.clean_captions[row].split()[0]

  def test_padding_fills_the_context(self, pairs):
    for row in np.flatnonzero(pairs.noise_kind == "padded")[:50]:
      words, clean = pairs.captions[row].split(), pairs.clean_captions[row]
      assert " ".join(words[77:]) == clean
      assert not set(words[:77]) & set(clean.split())

  def test_one_word_cannot_be_truncated(self):
    noisy = caption_noise.apply_noise(
      ["star", "a ring"], np.array([0, 1]), rate=1, seed=0, kinds=("truncated",)
    )
    assert noisy.captions.tolist() == ["star", "a"]
    assert noisy.is_noisy.tolist() == [False, True]
    assert noisy.kind.tolist() == ["", "truncated"]

  def test_one_class_cannot_be_swapped(self):
    with pytest.raises(ValueError, match="all 2 images are of one class"):
      caption_noise.apply_noise(
        ["a", "b"], np.array([1, 1]), rate=1, seed=0, kinds=("swapped",)
      )

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"kinds": ()}, "kinds must be some of"),
      ({"kinds": ("upside down",)}, "kinds must be some of"),
      ({"context_length": 0}, "context_length must be positive"),
      ({"classes": np.zeros(3)}, "captions and classes"),
      ({"seed": -1}, "seed must not be negative"),
    ],
  )
  def test_bad_options_are_named(self, options, message):
    asked = {"classes": np.array([0, 1]), "rate": 0.5, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
      caption_noise.apply_noise(["a b", "c d"], **asked)
