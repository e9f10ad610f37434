"""The report as a place to work, in a real browser."""

import csv
import io
import json
import time

import browser as browser_lib
import numpy as np
import pytest

import gradmimic_jax as gm

pytestmark = browser_lib.NEEDED

# What a spreadsheet would run, what breaks a table, and what breaks a page.
ODD = (
  "=1+1",
  "'quoted",
  'a"b,c',
  "two\nlines",
  "<img src=x onerror=\"document.title='broken'\">",
  "\u05e9\u05dc\u05d5\u05dd",
  "007",
  "__proto__",
)
NAMES = ("cat", "<b>dog</b>", "owl, barn", "\u05d7\u05ea\u05d5\u05dc")


def make(folder, n=600, name="report", odd=True, **dataset):
  """A page of n samples, a third of them bad, and what was put in."""
  rng = np.random.default_rng(0)
  good = np.arange(n) % 3 > 0
  scores = np.where(good[:, None], 1.0, -1.0) + rng.normal(0, 0.5, (n, 5))
  ids = np.array([f"sample {i:05d}" for i in range(n)])
  if odd:
    ids = ids.astype("<U80")
    ids[: 3 * len(ODD) : 3] = ODD  # bad ones
  selection = gm.select(scores, ids=ids)
  labels = np.arange(n) % 4
  dataset = {
    "ids": ids,
    "labels": labels,
    "suggested": np.where(selection.keep, labels, (labels + 1) % 4),
    "class_names": NAMES,
    **dataset,
  }
  path = gm.report(scores, selection, folder / f"{name}.html", dataset=dataset)
  return path, selection, dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  images = np.random.default_rng(1).integers(0, 256, (600, 9, 9, 3), np.uint8)
  return make(tmp_path_factory.mktemp("work"), images=images)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  with browser_lib.Browser(tmp_path_factory.mktemp("profile")) as found:
    yield found


@pytest.fixture
def browser(one, made):
  """The page, as if it was never opened before."""
  one.open(made[0], width=1280, height=800, scheme="light")
  one.evaluate("localStorage.clear()")
  one.open(made[0], width=1280, height=800, scheme="light")
  yield one
  assert not one.complaints()
  assert one.evaluate("document.title") == "Data report"


def set_to(browser, control, value):
  browser.evaluate(f"""
    (() => {{
      const control = document.getElementById({json.dumps(control)});
      control.value = {json.dumps(value)};
      control.dispatchEvent(new Event("input"));
      control.dispatchEvent(new Event("change"));
    }})()
  """)


def click(browser, selector):
  browser.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def copied(browser):
  """The ids that the list shows, by its own button."""
  browser.call(
    "Browser.grantPermissions",
    permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
  )
  browser.call("Page.bringToFront")
  browser.evaluate("document.getElementById('copy').click()")
  time.sleep(0.1)
  text = browser.evaluate("navigator.clipboard.readText()")
  return text.replace("two\nlines", "two lines").split("\n")


def downloaded(browser, folder):
  """The bytes of the file of decisions."""
  browser.call(
    "Browser.setDownloadBehavior",
    behavior="allow",
    downloadPath=str(folder),
  )
  click(browser, "#download")
  path = folder / "decisions.csv"
  for _ in range(100):
    if path.exists() and path.stat().st_size:
      break
    time.sleep(0.05)
  return path


def expected(made, test):
  """Ids of the samples that pass, as the page copies them."""
  _, selection, dataset = made
  rows = [i for i in range(len(selection)) if test(i, selection, dataset)]
  ids = [str(selection.ids[i]).replace("\n", " ") for i in rows]
  return sorted(ids)


def test_the_list_is_searched_and_filtered(browser, made):
  assert len(copied(browser)) == 600
  set_to(browser, "search", "SAMPLE 0001")
  ids = copied(browser)
  assert sorted(ids) == expected(
    made, lambda i, s, d: str(s.ids[i]).startswith("sample 0001")
  )
  click(browser, "#clear")
  set_to(browser, "given-filter", "2")
  set_to(browser, "decision-filter", "remove")
  assert sorted(copied(browser)) == expected(
    made, lambda i, s, d: d["labels"][i] == 2 and not s.keep[i]
  )
  set_to(browser, "decision-filter", "")
  set_to(browser, "suggested-filter", "other")
  assert sorted(copied(browser)) == expected(
    made,
    lambda i, s, d: d["labels"][i] == 2 and d["suggested"][i] != 2,
  )
  words = browser.evaluate("document.getElementById('shown').value")
  assert words.endswith("of 600 samples")
  set_to(browser, "search", "no such id")
  assert browser.evaluate("!document.getElementById('nothing').hidden")
  assert browser.evaluate("document.getElementById('copy').disabled")


def test_a_cell_of_the_matrix_shows_its_samples(browser, made):
  counts = json.loads(made[0].with_suffix(".json").read_text())["matrix"]
  click(browser, "#matrix tbody tr:nth-child(2) td:nth-child(4) button")
  ids = copied(browser)
  assert len(ids) == counts["counts"][1][2] > 0
  assert sorted(ids) == expected(
    made,
    lambda i, s, d: (d["labels"][i], d["suggested"][i]) == (1, 2),
  )
  # The arrows go on to the next number there is.
  browser.evaluate(
    "document.querySelector('#matrix td:nth-child(2) button').focus()"
  )
  browser.press("ArrowRight", "ArrowDown")
  assert browser.evaluate(
    "document.activeElement.getAttribute('aria-label')"
  ).endswith("given <b>dog</b>, suggested <b>dog</b>; show them")


def test_orders_are_those_of_the_numbers(browser, made):
  _, selection, _ = made
  rank = gm.find_label_issues(
    selection, return_indices_ranked_by="keep_probability"
  )
  worst = [str(one).replace("\n", " ") for one in selection.ids[rank]]
  assert copied(browser)[: len(worst)] == worst
  set_to(browser, "order", "-place")
  assert copied(browser)[::-1][: len(worst)] == worst
  set_to(browser, "order", "id")
  ids = [one for one in copied(browser) if one.startswith("sample")]
  assert ids == sorted(ids)


def test_keys_decide_and_the_file_says_so(browser, made, tmp_path):
  """From the keyboard to a selection, by way of the file."""
  path, selection, dataset = made
  first = copied(browser)[:6]
  browser.evaluate("document.querySelector('#sheet .row').focus()")
  # Keep, take the suggestion, keep and take back, remove what is removed.
  browser.press("k", "ArrowDown", "s", "ArrowDown", "k", "u", "ArrowDown", "r")
  said = browser.evaluate("document.getElementById('said').textContent")
  assert "removed" in said
  # The last sample of all was the best; remove it.
  browser.press("End", "r")
  best = browser.evaluate(
    "document.activeElement.querySelector('.id').textContent"
  )
  # They are still there when the page is opened again.
  browser.open(path, width=1280, height=800, scheme="light")
  words = browser.evaluate("document.getElementById('count').textContent")
  assert words.startswith("Decided by you: 4.")
  file = downloaded(browser, tmp_path)
  decisions = gm.read_decisions(file)
  by_id = {
    one.replace("\n", " "): i for i, one in enumerate(selection.ids.tolist())
  }
  keep = selection.keep.copy()
  keep[[by_id[first[0]], by_id[first[1]]]] = True
  keep[by_id[best]] = False
  assert decisions.apply(selection).keep.tolist() == keep.tolist()
  labels = dataset["labels"].copy()
  row = by_id[first[1]]
  labels[row] = dataset["suggested"][row]
  assert decisions.relabel(selection.ids, dataset["labels"]).tolist() == (
    labels.tolist()
  )
  assert decisions.by_person.sum() == 4
  keep[row] = False  # a filter can't relabel
  kept = gm.filters.of_decisions(decisions, selection.ids)
  assert sorted(kept.ids) == sorted(selection.ids[keep])
  # A table reader of another maker sees the same, and nothing to run.
  rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))
  assert rows[0] == ["id", "decision", "label", "by"]
  assert len(rows) - 1 == len(decisions)
  assert not [row for row in rows[1:] if row[0][0] in "=+-@\t\r\n"]
  assert {"'=1+1", "''quoted", "two\nlines", "007"} <= {r[0] for r in rows}


def test_all_shown_are_decided_on_and_undone(browser, made):
  click(browser, "#pairs tr button")
  n = len(copied(browser))
  click(browser, "[data-all=suggestion]")
  count = "document.getElementById('count').textContent"
  assert f"relabelled: {n}." in browser.evaluate(count)
  click(browser, "[data-all=remove]")
  assert "relabelled" not in browser.evaluate(count)
  click(browser, "#undo")
  assert f"relabelled: {n}." in browser.evaluate(count)
  set_to(browser, "decision-filter", "relabel")
  assert len(copied(browser)) == n
  click(browser, "#forget")
  assert browser.evaluate(count).startswith("Decided by you: 0.")


def test_a_sample_is_enlarged_and_relabelled(browser):
  browser.evaluate("document.querySelector('.card').focus()")
  browser.press("Enter")
  title = "document.getElementById('large-title').textContent"
  first = browser.evaluate(title)
  assert browser.evaluate("document.getElementById('large').open")
  assert browser.evaluate("document.activeElement.id") == "large-title"
  width = "document.querySelector('#large img').offsetWidth"
  assert browser.evaluate(width) > 300
  set_label = """
    (() => {
      const select = document.querySelector("#large select");
      const other = [...select.options].at(-1);
      select.value = other.value;
      select.dispatchEvent(new Event("change"));
      return other.text;
    })()
  """
  name = browser.evaluate(set_label)
  state = "document.querySelector('.card .state').textContent"
  assert browser.evaluate(state) == f"\u2192 {name}"
  browser.press("ArrowRight")
  assert browser.evaluate(title) != first
  browser.press("ArrowLeft", "r")
  assert browser.evaluate(title) == first
  assert browser.evaluate(state) == "remove, by you"
  browser.press("Escape")
  assert not browser.evaluate("document.getElementById('large').open")
  assert browser.evaluate("document.activeElement.className") == "card"


def test_storage_that_is_broken_or_refused_does_no_harm(made, one):
  fingerprint = json.loads(made[0].with_suffix(".json").read_text())["list"][
    "fingerprint"
  ]
  count = "document.getElementById('count').textContent"
  for stored in (
    "{",
    "7",
    '[["=1+1","explode",null],5,[],["nobody","keep",null]]',
    '[["007","relabel","no such class"]]',
  ):
    one.open(made[0], width=1280, height=800, scheme="light")
    one.evaluate(
      f"localStorage.setItem({json.dumps('gradmimic ' + fingerprint)},"
      f" {json.dumps(stored)})"
    )
    one.open(made[0], width=1280, height=800, scheme="light")
    assert one.evaluate(count).startswith("Decided by you: 0.")
    assert not one.complaints()
  script = one.call(
    "Page.addScriptToEvaluateOnNewDocument",
    source="Object.defineProperty(window, 'localStorage',"
    " { get() { throw new Error('refused'); } });",
  )["identifier"]
  one.open(made[0], width=1280, height=800, scheme="light")
  one.evaluate("document.querySelector('#sheet .row').focus()")
  one.press("k")
  assert one.evaluate(count).startswith("Decided by you: 1.")
  words = one.evaluate("document.getElementById('storage').textContent")
  assert "keeps nothing" in words
  assert not one.complaints()
  one.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
  one.open(made[0], width=1280, height=800, scheme="light")
  one.evaluate("localStorage.clear()")


def test_ten_thousand_removals(one, tmp_path):
  """All listed in a page below 5 MB, few of them in the document."""
  n = 30_000
  images = np.random.default_rng(1).integers(0, 256, (n, 8, 8, 3), np.uint8)
  path, selection, _ = make(
    tmp_path,
    n,
    odd=False,
    images=images,
    captions=[f"a caption of some words, number {i}" for i in range(n)],
  )
  assert int((~selection.keep).sum()) > 9_000
  assert path.stat().st_size < 5_000_000
  one.open(path, width=1280, height=800, scheme="light")
  listed = json.loads(path.with_suffix(".json").read_text())["list"]
  assert listed["whole"]
  assert len(listed["rows"]) >= 10_000
  rows = "document.querySelectorAll('#sheet .row').length"
  assert 0 < one.evaluate(rows) < 60
  milliseconds = one.evaluate(
    "performance.getEntriesByName('ready')[0].startTime"
    " - performance.getEntriesByName('begin')[0].startTime"
  )
  print(f"{path.stat().st_size:,} bytes; {milliseconds:.0f} ms to be ready")
  one.evaluate("document.querySelector('#sheet .row').focus()")
  one.press("End")
  time.sleep(0.2)
  last = listed["ids"][-1]
  assert one.evaluate("document.activeElement.textContent").find(last) >= 0
  one.press("r")
  assert one.evaluate("document.activeElement.textContent").find(last) >= 0
  assert one.evaluate(rows) < 60
  # Between the worst and the best there are no pictures, and it says so.
  one.evaluate(
    "(v => { v.scrollTop = v.scrollHeight / 2; })"
    "(document.getElementById('viewport'))"
  )
  time.sleep(0.2)
  assert "no picture" in one.evaluate(
    "document.getElementById('sheet').textContent"
  )
  assert not one.complaints()
  one.evaluate("localStorage.clear()")


BROKEN_NUMBERS = r"""
  (() => {
    const texts = document.createTreeWalker(document.body, 4);
    const broken = [];
    while (texts.nextNode()) {
      const node = texts.currentNode;
      const element = node.parentElement;
      if (!element.checkVisibility() || element.closest(
          "script, option, title, desc, .hidden, .id, .caption, .label")) {
        continue;
      }
      for (const match of node.data.matchAll(/[\u22120-9][0-9,.%]*/g)) {
        const range = document.createRange();
        range.setStart(node, match.index);
        range.setEnd(node, match.index + match[0].length);
        const tops = new Set([...range.getClientRects()]
          .map((rect) => Math.round(rect.top)));
        if (tops.size > 1) {
          broken.push(`${match[0]} in ${element.outerHTML.slice(0, 80)}`);
        }
      }
    }
    return broken;
  })()
"""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
  """Pages of several kinds of data, by name."""
  folder = tmp_path_factory.mktemp("kinds")
  rng = np.random.default_rng(0)
  n = 120
  good = np.arange(n) % 3 > 0
  few = np.where(good, 1.0, -1.0)[:, None] + rng.normal(0, 0.3, (n, 3))
  long = np.array(["x" * 300 + str(i) for i in range(n)])
  labels = rng.integers(0, 50, n)
  pages = {
    "bare": (few * 1e6, None, None),
    "none to remove": (np.abs(few) + 1, None, None),
    "texts": (
      few,
      {"captions": ["\u05e9\u05dc\u05d5\u05dd 1,234 " * 9] * n},
      {"captions": "body", "scores": ["loss_a", "loss_b", "loss_c"]},
    ),
    "tokens": (few, {"captions": [np.arange(99) * 97] * n}, None),
    "long": (few, {"ids": long, "labels": long, "suggested": long[::-1]}, None),
    "fifty": (
      few,
      {
        "labels": labels,
        "suggested": labels[::-1],
        "class_names": [f"class {i} &amp; <i>more</i>" for i in range(50)],
      },
      {"ids": "file", "labels": "species", "suggested": "model_says"},
    ),
  }
  found = {}
  for name, (scores, dataset, columns) in pages.items():
    selection = gm.select(
      scores,
      ids=(dataset or {}).get("ids"),
      mark=0.0 if name == "none to remove" else None,
    )
    found[name] = gm.report(
      scores,
      selection,
      folder / f"{name}.html",
      dataset=dataset,
      columns=columns,
    )
  return found


@pytest.mark.parametrize("width", [1280, 360])
def test_other_kinds_of_data_fit(one, kinds, width):
  for name, path in kinds.items():
    one.open(path, width=width, height=800, scheme="dark")
    assert one.evaluate("document.documentElement.scrollWidth") == width, name
    assert not one.complaints(), name
    assert one.evaluate(BROKEN_NUMBERS) == [], name
    # Nothing of a row of the list lies on something else of it.
    overlapping = one.evaluate("""
      (() => {
        const cells = [...document.querySelector("#sheet .row").children]
          .map((cell) => cell.getBoundingClientRect());
        return cells.some((a, i) => cells.some((b, k) => i < k
          && a.left < b.right - 1 && b.left < a.right - 1
          && a.top < b.bottom - 1 && b.top < a.bottom - 1));
      })()
    """)
    assert not overlapping, name
    words = one.evaluate("document.body.innerText")
    for word in {"fifty": ["species", "model_says", "Copy files"]}.get(
      name, {"texts": ["loss_c"]}.get(name, [])
    ):
      assert word in words


def test_a_screen_reader_has_names_for_all(browser):
  """By the browser's own tree of what it tells one."""
  browser.evaluate("document.getElementById('list').scrollIntoView()")
  nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
  by_role = {}
  for node in nodes:
    if not node.get("ignored"):
      role = node["role"].get("value")
      by_role.setdefault(role, []).append(node.get("name", {}).get("value"))
  for role in ("button", "combobox", "searchbox", "image", "grid", "dialog"):
    names = by_role.get(role, [])
    assert all(names), role
    assert names or role == "dialog", role  # which is closed
  assert len(by_role["columnheader"]) >= 8
  assert by_role["gridcell"]
  assert by_role["status"]
  # One stop of the Tab key in the list, and one in each gallery.
  for selector in ("#sheet .row", "#worst-title + ol .card", "#matrix button"):
    stops = browser.evaluate(
      f"[...document.querySelectorAll({json.dumps(selector)})]"
      ".filter((one) => one.tabIndex === 0).length"
    )
    assert stops == 1, selector
