"""The report in a real browser: Debian's package chromium, or another one."""

import browser as browser_lib
import numpy as np
import pytest
from PIL import Image

import gradmimic_jax as gm

pytestmark = browser_lib.NEEDED

NAMES = (
  "cat",
  "</script><script>document.title='broken'</script>",
  "<img src=x onerror=\"document.title='broken'\">",
  "",
)
LONG = "a_file_name_without_a_single_space_" * 8 + ".png"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  rng = np.random.default_rng(0)
  good = np.arange(600) >= 200
  scores = np.where(good[:, None], 1.0, -1.0) + rng.normal(0, 0.5, (600, 5))
  selection = gm.select(scores)
  labels = np.arange(600) % 4
  return gm.report(
    scores,
    selection,
    tmp_path_factory.mktemp("report") / "report.html",
    title=NAMES[1],
    run={"file": LONG, NAMES[2]: NAMES[2]},
    results={NAMES[1]: {"accuracy": 0.9}},
    dataset={
      "labels": labels,
      "suggested": np.where(good, labels, (labels + 1) % 4),
      "class_names": NAMES,
      "captions": [NAMES[2], LONG, "plain"] * 200,
      "images": rng.integers(0, 256, (600, 32, 32, 3), np.uint8),
    },
  )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  with browser_lib.Browser(tmp_path_factory.mktemp("profile")) as one:
    yield one


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_looks_right(page, browser, tmp_path, width, scheme):
  browser.open(page, width=width, height=800, scheme=scheme)
  # Nothing sticks out at the right, and nothing was asked for elsewhere.
  assert browser.evaluate("document.documentElement.scrollWidth") == width
  asked = [
    event["params"]["request"]["url"]
    for event in browser.events
    if event.get("method") == "Network.requestWillBeSent"
  ]
  assert [url.split(",")[0] for url in asked if url[:5] != "data:"] == [
    page.absolute().as_uri()
  ]
  assert not browser.complaints()
  assert browser.evaluate("document.title") == NAMES[1]
  broken = "[...document.images].filter(i => !i.naturalWidth).length"
  assert browser.evaluate(broken) == 0
  with Image.open(browser.screenshot(tmp_path / "a.png")) as shot:
    assert shot.size == (width, 800)
    background = np.asarray(shot.convert("L"))[2, 2]
  assert background > 250 if scheme == "light" else background < 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page, browser, scheme):
  """WCAG AA: 4.5 to 1 for text, against the colours it stands on."""
  browser.open(page, width=1280, height=800, scheme=scheme)
  ratios = browser.evaluate("""
    (() => {
      const canvas = document.createElement("canvas").getContext("2d");
      const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
      };
      const over = (top, below) => [0, 1, 2].map(
        (i) => top[i] * top[3] + below[i] * (1 - top[3]));
      const light = (color) => {
        const [r, g, b] = color.map((c) => {
          c /= 255;
          return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = (element) => {
        if (!element) return [255, 255, 255];
        const own = rgba(getComputedStyle(element).backgroundColor);
        return over(own, ground(element.parentElement));
      };
      const texts = document.createTreeWalker(document.body, 4);
      const found = [];
      while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !element.checkVisibility()
            || element.closest("select, script")) continue;
        const style = getComputedStyle(element);
        const svg = element.closest("svg");
        if (element.matches("title, desc")) continue;
        const below = ground(element);
        const ink = over(rgba(svg ? style.fill : style.color), below);
        const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), element.className + ": "
          + texts.currentNode.data.trim().slice(0, 40)]);
      }
      return found;
    })()
  """)
  assert len(ratios) > 500
  assert min(ratios)[0] >= 4.5, min(ratios)
