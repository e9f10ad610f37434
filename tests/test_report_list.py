"""The page's list of samples: what is in it, and what it leaves out."""

import base64
import io
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

import gradmimic_jax as gm
from gradmimic_jax.reporting import charts, listing, thumbnails

N = 200


@pytest.fixture(scope="module")
def scores():
  rng = np.random.default_rng(0)
  good = np.arange(N)[:, None] % 4 > 0
  values = np.where(good, 1.0, -1.0) + rng.normal(0, 0.4, (N, 3))
  values[5, 1] = np.nan
  return values


@pytest.fixture(scope="module")
def selection(scores):
  return gm.select(scores)


@pytest.fixture(scope="module")
def dataset(selection):
  labels = np.arange(N) % 5
  return {
    "labels": labels,
    "suggested": np.where(selection.keep, labels, (labels + 1) % 5),
    "class_names": list("abcde"),
  }


def listed(path):
  return json.loads(path.with_suffix(".json").read_text())["list"]


def test_every_row_is_its_sample(scores, selection, dataset, tmp_path):
  """Against plain loops over the scores."""
  path = gm.report(scores, selection, tmp_path / "a.html", dataset=dataset)
  found = listed(path)
  worst = gm.find_label_issues(
    selection, return_indices_ranked_by="keep_probability"
  )
  assert found["rows"][: len(worst)] == worst.tolist()
  assert sorted(found["rows"]) == list(range(N))
  assert found["whole"]
  assert found["removals"] == int((~selection.keep).sum())
  names = [name for _, name in found["classes"]]
  for i, row in enumerate(found["rows"]):
    assert found["ids"][i] == str(row)
    assert (found["keep"][i] == "1") == selection.keep[row]
    assert found["p"][i] == round(selection.keep_probability[row], 4)
    assert names[found["labels"][i]] == "abcde"[dataset["labels"][row]]
    for t, sign in enumerate(found["lines"][i]):
      value = scores[row, t]
      if np.isnan(value):
        assert sign == " "
        continue
      known = scores[:, t][~np.isnan(scores[:, t])]
      share = ((known < value).sum() + (known <= value).sum()) / 2 / len(known)
      assert listing.LEVELS.index(sign) == min(63, int(64 * share))


def test_removals_come_before_what_is_kept(
  scores, selection, dataset, tmp_path
):
  other = dataset["suggested"].copy()
  kept = np.flatnonzero(selection.keep)
  other[kept[:3]] = (dataset["labels"][kept[:3]] + 2) % 5
  found = listed(
    gm.report(
      scores,
      selection,
      tmp_path / "a.html",
      dataset=dataset | {"suggested": other},
      gallery=2,
      max_rows=60,
    )
  )
  assert len(found["rows"]) == 66  # those of the galleries are in it anyway
  assert found["whole"]
  assert set(np.flatnonzero(~selection.keep)) <= set(found["rows"])
  assert set(kept[:3]) <= set(found["rows"])
  few = listed(
    gm.report(scores, selection, tmp_path / "b.html", gallery=2, max_rows=9)
  )
  assert not few["whole"]
  assert few["listed"] == sum(sign == "0" for sign in few["keep"]) < 50
  text = (tmp_path / "b.html").read_text()
  assert f"with {few['listed']} of the {few['removals']} to remove" in text


class Lazy:
  """Images that are decoded when they are asked for."""

  def __init__(self, n, side=24):
    self.asked, self._n, self._side = [], n, side

  def __len__(self):
    return self._n

  def __getitem__(self, position):
    assert isinstance(position, int)
    self.asked.append(position)
    rng = np.random.default_rng(position)
    return rng.integers(0, 256, (self._side, self._side, 3), np.uint8)


def test_only_images_that_are_shown_are_decoded_each_once(tmp_path):
  n = 400
  scores = np.where(np.arange(n) % 2, 1.0, -1.0)[:, None]
  scores = scores + np.linspace(0, 0.5, n)[:, None]
  images = Lazy(n)
  path = gm.report(
    scores,
    gm.select(scores, binarize="threshold"),
    tmp_path / "a.html",
    dataset={"images": images},
    gallery=8,
    max_bytes=600_000,
  )
  page = path.read_text()
  shown = {int(row) for row in re.findall(r'data-row="(\d+)"', page)}
  pattern = r'<script type="application/json" id="pictures">(.*?)</script>'
  beside = {int(row) for row in json.loads(re.search(pattern, page)[1])}
  assert len(images.asked) == len(set(images.asked)) <= 24 + 300
  assert shown | beside <= set(images.asked)
  assert len(shown) == 24
  assert beside < set(listed(path)["rows"][:300])  # what there was room for
  assert path.stat().st_size <= 600_000
  assert f"{len(shown | beside)} have a picture" in page


def test_damaged_images_are_left_out_and_named(scores, selection, tmp_path):
  class Folder:  # without a length
    def __getitem__(self, position):
      if position % 2:
        raise OSError(f"photo_{position}.jpg is truncated <b>")
      return np.zeros((4, 4), np.uint8)

  path = gm.report(
    scores,
    selection,
    tmp_path / "a.html",
    dataset={"images": Folder()},
    gallery=4,
  )
  page = path.read_text()
  assert f"Images: {N // 2} could not be read" in page
  assert "is truncated &lt;b&gt;" in page
  assert 0 < page.count("<img ") < 12


def test_a_page_too_large_gets_fewer_rows(scores, selection, tmp_path):
  ids = np.array([f"{i:03d}" + "x" * 2000 for i in range(N)])
  path = gm.report(
    scores,
    gm.select(scores, ids=ids),
    tmp_path / "a.html",
    gallery=2,
    max_bytes=200_000,
  )
  assert path.stat().st_size <= 200_000
  found = listed(path)
  assert 6 <= len(found["rows"]) < 100
  # Whole, as a file of decisions needs them.
  assert found["ids"][0] == ids[found["rows"][0]]


def test_texts_are_cut_where_there_are_many(scores, selection, tmp_path):
  captions = ["word " * 1000] * N
  found = listed(
    gm.report(
      scores,
      selection,
      tmp_path / "a.html",
      dataset={"captions": captions},
      max_bytes=400_000,
    )
  )
  assert found["caption_length"] == 400
  assert {len(one) for one in found["captions"]} == {400}
  page = (tmp_path / "a.html").read_text()
  assert "Texts are cut off at 400 characters" in page


def test_tokens_are_shown_as_tokens(scores, selection, tmp_path):
  for tokens in (np.arange(9) * 11, ["\u2581The", "\u2581c<at", "s"]):
    path = gm.report(
      scores,
      selection,
      tmp_path / "a.html",
      dataset={"captions": [tokens] * N},
    )
    assert listed(path)["captions"][0] == " ".join(map(str, tokens))
    assert 'class="caption tokens"' in path.read_text()


def test_columns_have_the_names_that_the_user_gives(
  scores, selection, dataset, tmp_path
):
  columns = {
    "ids": "file",
    "labels": "species<b>",
    "scores": ["loss_1", "loss_2", "loss_10"],
  }
  path = gm.report(
    scores, selection, tmp_path / "a.html", dataset=dataset, columns=columns
  )
  page = path.read_text()
  assert "species&lt;b&gt;" in page
  assert "<b>" not in re.sub(r"<b>(P\(keep\)|Quality|mean score)", "", page)
  assert listed(path)["steps"] == columns["scores"]
  assert "loss_10" in page

  def refused(error, match, columns):
    with pytest.raises(error, match=match):
      gm.report(scores, selection, tmp_path / "b.html", columns=columns)

  refused(TypeError, "is a list", ["file"])
  refused(ValueError, "has 'id'", {"id": "file"})
  refused(ValueError, "2 names, and there are 3 steps", {"scores": ["a", "b"]})


def test_text_that_is_no_unicode_does_not_stop_a_page(tmp_path):
  ids = np.array(["a\ud800", "b\u2028</script>", "\x1bc"])
  scores = np.array([[1.0], [-1.0], [2.0]])
  selection = gm.select(scores, ids=ids, binarize="threshold")
  path = gm.report(scores, selection, tmp_path / "a.html")
  assert set(listed(path)["ids"]) == set(ids.tolist())


def test_decisions_belong_to_a_selection_and_its_labels(
  scores, selection, dataset, tmp_path
):
  def print_of(name, selection=selection, **options):
    path = gm.report(scores, selection, tmp_path / f"{name}.html", **options)
    return listed(path)["fingerprint"]

  same = print_of("a", dataset=dataset)
  assert print_of("b", dataset=dataset, title="other", gallery=1) == same
  labels = dataset["labels"][::-1].copy()
  assert print_of("c", dataset=dataset | {"labels": labels}) != same
  strict = gm.select(scores, binarize="threshold", threshold=0.9)
  assert print_of("d", strict, dataset=dataset) != same


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_come_back_as_they_were(channels):
  rng = np.random.default_rng(channels)
  y, x = np.mgrid[:31, :37]
  smooth = (x * 3 + y * 5 + np.zeros((channels, 1, 1))).astype(np.uint8)
  noise = rng.integers(0, 256, (channels, 31, 37), np.uint8)
  sizes = []
  for image in (smooth, noise):
    image = np.moveaxis(image, 0, -1)
    uri = thumbnails.data_uri(image, 64)
    content = base64.b64decode(uri.split(",")[1])
    found = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(found.reshape(image.shape), image)
    sizes.append(len(content))
  assert sizes[0] < 300 < sizes[1]  # differences of a slope are all alike


def test_no_group_of_scores_is_squeezed_into_a_bar():
  """Late in training, most scores are near zero, and the bad ones far off."""
  rng = np.random.default_rng(0)
  kept = np.abs(rng.normal(0, 1e-3, 5000))
  dropped = -rng.gamma(2.0, 0.5, 50)
  scores = np.concatenate([kept, dropped])
  is_kept = np.arange(len(scores)) < 5000
  edges, counts, unit = charts.bin_scores(scores, is_kept, ~is_kept)
  assert unit is not None
  assert np.all(np.diff(edges) > 0)
  for group, found in zip((is_kept, ~is_kept), counts, strict=True):
    clipped = np.clip(scores[group], edges[0], edges[-1])
    brute = [
      sum(low <= v < high or (high == edges[-1] and v == high) for v in clipped)
      for low, high in itertools.pairwise(edges)
    ]
    assert found == brute
    assert max(found) <= 0.3 * sum(found)
  even, _, none = charts.bin_scores(rng.normal(0, 1, 500), np.ones(500, bool))
  assert none is None
  np.testing.assert_allclose(np.diff(even), even[1] - even[0])


@pytest.mark.parametrize(
  ("low", "high", "unit"),
  [(-3.0, 0.02, 1e-3), (-1e6, 1e-6, 1e-7), (0.5, 40.0, 0.6), (-2, 2, None)],
)
def test_marks_of_an_axis_have_room(low, high, unit):
  edges = np.linspace(low, high, 41).tolist()
  chart = charts.histogram(edges, [1] * 40, [0] * 40, cut=0.0, unit=unit)
  assert 1 <= len(chart.x_ticks) <= 6
  ends = [
    (tick.at - 4.5 * len(tick.text), tick.at + 4.5 * len(tick.text))
    for tick in chart.x_ticks
  ]
  assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
  values = [float(t.text.replace("\u2212", "-")) for t in chart.x_ticks]
  assert values == sorted(values)
  assert all(low <= value <= high for value in values)
