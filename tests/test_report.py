"""The report: what the page says, that it is safe, small and needs no other."""

import base64
import dataclasses
import html.parser
import io
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

import gradmimic_jax as gm
from gradmimic_jax.reporting import charts, thumbnails

HOSTILE = (
  "</script><script>alert('x')</script><img src=x onerror=\"alert(1)\">&"
)


@pytest.fixture(scope="module")
def scores():
  """600 samples, a third of them noisy, in 5 steps."""
  rng = np.random.default_rng(0)
  good = np.arange(600)[:, None] >= 200
  return np.where(good, 1.0, -1.0) + rng.normal(0, 0.4, (600, 5))


@pytest.fixture(scope="module")
def selection(scores):
  return gm.select(scores)


class Page(html.parser.HTMLParser):
  """A page's elements and texts."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.texts, self._open = [], [], []
    self.source = path.read_text()
    self.feed(self.source)

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    self._open = [*self._open[-50:], tag]

  def handle_data(self, data):
    self.texts.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]

  @property
  def text(self):
    return "".join(self.texts)

  @property
  def data(self):
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, self.source, re.DOTALL)[1])


def test_the_page_says_what_the_selection_found(scores, selection, tmp_path):
  labels = np.arange(600) % 3
  suggested = np.where(np.arange(600) < 200, (labels + 1) % 3, labels)
  path = gm.report(
    scores,
    selection,
    tmp_path / "report.html",
    title="Three animals",
    run={"model": "mlp"},
    results={"retrained": {"test_accuracy": 0.9612}},
    dataset={
      "labels": labels,
      "suggested": suggested,
      "true_labels": suggested,
      "class_names": ["cat", "dog", "owl"],
      "images": np.zeros((600, 4, 4, 3), np.uint8),
    },
  )
  page = Page(path)
  dropped = int((~selection.keep).sum())
  assert f"Remove {dropped} of 600 samples" in page.text
  quality = gm.dataset_quality(selection)
  assert f"{quality.low:.1%} to {quality.high:.1%}" in page.text
  for words in ("Three animals", "mlp", "retrained", "0.9612", "owl"):
    assert words in page.text
  galleries = page.data["galleries"]
  assert [len(galleries[name]) for name in galleries] == [24, 24, 24]
  ids = [entry["id"] for name in galleries for entry in galleries[name]]
  assert len(set(ids)) == 72  # none twice
  worst = [int(entry["id"]) for entry in galleries["worst"]]
  ranked = gm.find_label_issues(
    selection, return_indices_ranked_by="keep_probability"
  )
  assert worst == ranked[:24].tolist()
  assert all(entry["kept"] for entry in galleries["best"])
  counts = np.array(page.data["matrix"]["counts"])
  np.testing.assert_array_equal(
    counts, [[133, 67, 0], [0, 133, 67], [66, 0, 134]]
  )
  assert {(p["given"], p["suggested"]) for p in page.data["pairs"]} == {
    ("cat", "dog"),
    ("dog", "owl"),
    ("owl", "cat"),
  }
  found = gm.metrics.detection(
    scores.mean(axis=1), selection.keep, np.arange(600) < 200
  )
  assert page.data["truth"]["f1"] == found.f1


def test_the_json_beside_is_the_data_in_the_page(scores, selection, tmp_path):
  labels = np.array([HOSTILE, "<b>", "\u2028'\"&amp;"])[np.arange(600) % 3]
  path = gm.report(
    scores, selection, tmp_path / "a.html", dataset={"labels": labels}
  )
  beside = json.loads((tmp_path / "a.json").read_text())
  assert Page(path).data == beside
  assert beside["selection"]["kept"] == selection.keep.sum()
  panel = beside["histograms"][-1]
  assert sum(panel["kept"]) + sum(panel["dropped"]) == 600


def test_what_data_holds_is_text_wherever_it_stands(
  scores, selection, tmp_path
):
  names = [HOSTILE, '" onmouseover="alert(1)', "{{ 7 * 7 }}"]
  selection.diagnostics["fingerprints"] = {HOSTILE: HOSTILE}
  labels = np.arange(600) % 3
  path = gm.report(
    scores,
    selection,
    tmp_path / "a.html",
    title=HOSTILE,
    run={HOSTILE: HOSTILE},
    results={HOSTILE: {HOSTILE: HOSTILE}},
    dataset={
      "labels": labels,
      "suggested": (labels + 1) % 3,
      "class_names": names,
      "captions": [HOSTILE] * 600,
      "images": np.zeros((600, 2, 2), np.uint8),
    },
  )
  selection.diagnostics["fingerprints"] = {}
  page = Page(path)
  assert [attrs.get("type") for attrs in page.all("script")] == [
    "application/json",
    "application/json",
    None,
  ]
  for _, attrs in page.elements:
    assert not [name for name in attrs if name.startswith("on")]
  assert all(a["src"].startswith("data:image/png") for a in page.all("img"))
  for name in names:
    assert name in page.text
  assert [name for _, name in page.data["list"]["classes"]] == names


def test_nothing_is_fetched(scores, selection, tmp_path):
  path = gm.report(
    scores,
    selection,
    tmp_path / "a.html",
    dataset={"images": np.zeros((600, 9, 9, 1), np.uint8)},
  )
  page = Page(path)
  assert not page.all("link")
  assert not re.search(r"https?://|@import|url\(", page.source)
  for _, attrs in page.elements:
    for name in ("src", "href", "action", "data"):
      assert re.match("data:image/png;base64,|#|$", attrs.get(name) or "")
  (policy,) = [
    attrs["content"]
    for attrs in page.all("meta")
    if attrs.get("http-equiv") == "Content-Security-Policy"
  ]
  assert policy.startswith("default-src 'none'")


def test_a_screen_reader_finds_its_way(scores, selection, tmp_path):
  labels = np.arange(600) % 3
  path = gm.report(
    scores,
    selection,
    tmp_path / "a.html",
    dataset={
      "labels": labels,
      "suggested": labels[::-1],
      "images": np.zeros((600, 9, 9, 1), np.uint8),
    },
  )
  page = Page(path)
  assert page.all("html") == [{"lang": "en"}]
  for tag in ("header", "nav", "main", "footer", "h1", "title"):
    assert page.all(tag), tag
  ids = [a["id"] for _, a in page.elements if "id" in a]
  assert len(ids) == len(set(ids))
  for _, attrs in page.elements:
    for name in ("aria-labelledby", "aria-describedby"):
      assert set((attrs.get(name) or "").split()) <= set(ids)
    if (attrs.get("href") or "").startswith("#"):
      assert attrs["href"][1:] in ids
  assert all(attrs["alt"] for attrs in page.all("img"))
  assert all(attrs.get("scope") for attrs in page.all("th"))
  assert all(attrs["role"] == "img" for attrs in page.all("svg"))
  assert len(page.all("desc")) == len(page.all("svg"))
  levels = [
    int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)
  ]
  assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.slow
def test_large_images_leave_the_page_small(scores, selection, tmp_path):
  rng = np.random.default_rng(0)
  photo = rng.integers(0, 256, (120, 160, 3), np.uint8)  # doesn't compress
  images = [photo] * 600
  path = gm.report(
    scores, selection, tmp_path / "a.html", dataset={"images": images}
  )
  assert path.stat().st_size < 5_000_000
  assert len(Page(path).all("img")) == 72
  small = gm.report(
    scores,
    selection,
    tmp_path / "b.html",
    dataset={"images": images},
    max_bytes=150_000,
  )
  assert small.stat().st_size <= 150_000
  assert not Page(small).all("img")
  assert "Images: left out" in Page(small).text
  with pytest.raises(ValueError, match="max_bytes is 5,000"):
    gm.report(scores, selection, tmp_path / "c.html", max_bytes=5000)


@pytest.mark.slow
@pytest.mark.parametrize("n", [20_000, 100_000])
def test_a_hundred_thousand_classes(tmp_path, n):
  rng = np.random.default_rng(0)
  scores = np.where(np.arange(n) % 4, 1.0, -1.0) + rng.normal(0, 0.3, n)
  labels = np.arange(n)
  path = gm.report(
    scores[:, None],
    gm.select(scores[:, None]),
    tmp_path / "a.html",
    dataset={
      "labels": labels,
      "suggested": np.roll(labels, 1),
      "class_names": [f"class {i} {HOSTILE}" for i in range(n)],
    },
  )
  page = Page(path)
  assert path.stat().st_size < 5_000_000  # ten thousand of them
  assert len(page.data["classes"]) == 100
  assert page.data["matrix"] is None
  assert f"the 100 noisiest of {n:,}" in page.text
  assert f"{n:,} classes are too many for a matrix" in page.text


@pytest.mark.parametrize(
  ("scores", "words"),
  [
    (np.zeros((30, 2)), "no step has a vote"),
    (np.full((30, 2), np.nan), "no step has a vote"),
    (np.ones((30, 1)) * np.linspace(1, 2, 30)[:, None], "one population"),
    (np.full((1, 1), 2.0), "no step has a vote"),
  ],
)
def test_scores_that_say_little(tmp_path, scores, words):
  path = gm.report(scores, gm.select(scores), tmp_path / "a.html")
  assert words in Page(path).text
  json.loads((tmp_path / "a.json").read_text())


def test_without_votes_the_scores_rank(tmp_path):
  scores = np.random.default_rng(0).normal(0, 1, (100, 1))
  scores[7] = np.nan
  selection = gm.select(
    scores, binarize=lambda scores, seed: gm.selection.Cut(np.nan, "no idea")
  )
  assert np.isnan(selection.keep_probability).all()
  data = Page(gm.report(scores, selection, tmp_path / "a.html")).data
  worst = [entry["row"] for entry in data["galleries"]["worst"]]
  assert worst == np.argsort(scores[:, 0])[:24].tolist()
  assert data["galleries"]["worst"][0]["keep_probability"] is None


def test_ids_find_their_samples(tmp_path):
  ids = np.array([f"s{i}" for i in range(40)])
  scores = np.linspace(-1, 1, 40)[:, None]
  with gm.ScoreLedger(tmp_path / "ledger") as ledger:
    ledger.append(ids[::-1], scores[::-1, 0], step=0, epoch=3)
  selection = gm.select(ledger, binarize="threshold")
  shuffled = np.random.default_rng(0).permutation(60)
  known = np.array([f"s{i}" for i in range(60)])[shuffled]
  path = gm.report(
    ledger,
    selection,
    tmp_path / "a.html",
    dataset={
      "ids": known,
      "captions": [f"caption of s{i}" for i in shuffled],
      "labels": shuffled,
    },
  )
  data = Page(path).data
  for entry in data["galleries"]["worst"]:
    assert entry["caption"] == f"caption of {entry['id']}"
    assert f"s{entry['label']}" == entry["id"]
  assert data["histograms"][0]["step"] == 3
  assert data["unit"] == "epoch"


def test_what_does_not_fit_is_refused(scores, selection, tmp_path):
  def refused(error, match, path="a.html", first=scores, **options):
    with pytest.raises(error, match=match):
      gm.report(first, selection, tmp_path / path, **options)
    assert not list(tmp_path.glob("a*"))

  refused(ValueError, r"end with \.html", path="a.pdf")
  refused(ValueError, r"scores have shape \(5, 2\)", first=np.zeros((5, 2)))
  refused(ValueError, "has 'label'", dataset={"label": [1]})
  refused(TypeError, "is a list", dataset=[1])
  refused(
    ValueError, "200 of the selection's 600", dataset={"labels": [0] * 400}
  )
  refused(
    ValueError,
    "differ in length",
    dataset={"labels": [0] * 600, "captions": ["a"]},
  )
  refused(
    ValueError,
    r"holds 2, but there are 2 class_names",
    dataset={"labels": np.arange(600) % 3, "class_names": ["a", "b"]},
  )
  refused(
    TypeError,
    "two kinds",
    dataset={"labels": [0] * 600, "suggested": ["a"] * 600},
  )
  refused(
    ValueError,
    r"dataset\['ids'\] repeat",
    dataset={"ids": [*range(600), 5], "labels": [0] * 601},
  )
  refused(
    TypeError,
    "float64; expected uint8",
    dataset={"images": np.zeros((600, 2, 2))},
  )


def test_keep_as_0_and_1_is_the_same_page(scores, selection, tmp_path):
  numbers = dataclasses.replace(selection, keep=selection.keep.astype(int))
  one, other = (
    gm.report(scores, found, tmp_path / f"{name}.html").read_bytes()
    for name, found in (("a", selection), ("b", numbers))
  )
  assert one == other


def test_a_ledger_of_other_samples_is_refused(selection, tmp_path):
  with gm.ScoreLedger(tmp_path / "ledger") as ledger:
    ledger.append([1, 2], [0.0, 1.0], step=0, epoch=0)
  with pytest.raises(ValueError, match="has 2 samples and the selection 600"):
    gm.report(ledger, selection, tmp_path / "a.html")


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (4, 4, 3), (3, 2, 4)])
def test_small_images_stay_as_they_are(shape):
  image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  pixels = decoded(thumbnails.data_uri(image, 16))
  np.testing.assert_array_equal(pixels, np.squeeze(image))


def test_large_images_are_averaged_down():
  image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
  boxes = image.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3)).round()
  np.testing.assert_array_equal(decoded(thumbnails.data_uri(image, 24)), boxes)
  odd = thumbnails.data_uri(np.full((1000, 3, 1), 77, np.uint8), 64)
  np.testing.assert_array_equal(decoded(odd), np.full((64, 1), 77))


def decoded(uri):
  content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
  return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("n", [3, 1500, 10_000_000])
def test_no_number_of_an_axis_is_cut_off(n):
  curve = charts.removal(
    [1, n], [1.0, 0.3], [0.1, 1.0], recommended=2, uncertain=(1, 3)
  )
  for tick in curve.x_ticks:  # a digit of 12 pixels is some 7 wide
    half = 3.5 * len(tick.text)
    assert half <= tick.at <= curve.frame.width - half


@pytest.mark.parametrize(
  ("low", "high"), [(0, 1), (-3.2, 8.9), (1e-9, 3e-9), (-5e6, -4e6), (0, 1437)]
)
def test_ticks_are_round_numbers_inside(low, high):
  ticks = charts.ticks(low, high, 4)
  assert 2 <= len(ticks) <= 6
  assert all(low <= t <= high for t in ticks)
  np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
