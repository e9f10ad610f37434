"""The report: one HTML page that needs nothing else, and its data as JSON."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gradmimic_jax import _files
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.reporting import charts, findings as findings_lib, thumbnails
from gradmimic_jax.reporting.samples import Samples, find_samples
from gradmimic_jax.selection import _ids
from gradmimic_jax.selection.selection import Selection

_FOLDER = pathlib.Path(__file__).parent
_UNKNOWN = "\N{EN DASH}"
# Sides of the images in pixels; the first with which the page fits is taken.
_SIDES = (96, 64, 48, 32, 16)


def report(
  ledger: Any,
  selection: Selection,
  path: str | os.PathLike[str],
  *,
  dataset: Mapping[str, Any] | None = None,
  title: str = "Data report",
  run: Mapping[str, Any] | None = None,
  results: Mapping[str, Mapping[str, Any]] | None = None,
  gallery: int = 24,
  max_bytes: int = 5_000_000,
) -> pathlib.Path:
  """Writes a selection's findings as a page to look at and to hand on.

  The page opens from disk and fetches nothing: images, styles and a little
  script are in it, and a policy that browsers enforce forbids all else. The
  same numbers are written as JSON beside it.

  | edge case                        | behaviour                              |
  |----------------------------------|----------------------------------------|
  | no dataset                       | ids and scores only                    |
  | thousands of classes, steps, ... | the most telling ones, and a note      |
  | a page beyond max_bytes          | smaller images, then none, and a note  |
  | names and captions with HTML     | shown as they are written              |
  | texts beyond 200 characters      | cut off                                |

  Args:
    ledger: the ScoreLedger that the selection was made of, or scores [N, T].
    selection: as `select` gave it.
    path: of the page, ending with `.html`; the data goes to the same name with
      `.json`.
    dataset: what is known about the samples, each entry one a sample [M]:
      `ids` (if the selection's aren't positions), `labels` as given and
      `suggested` or `true_labels` (integers, or names), `captions`, `images`
      (uint8 [H, W] or [H, W, C], anything that gives one by position); and
      `class_names` [C].
    title: of the page.
    run: facts about the run, by name.
    results: its results, such as `{"retrained": {"test_accuracy": 0.96}}`.
    gallery: number of worst, borderline and best samples to show, of each.
    max_bytes: of the page.

  Returns:
    The page's path.

  Raises:
    ImportError: jinja2 is not installed.
    TypeError, ValueError: a path with another ending, a ledger or dataset that
      doesn't fit the selection, a page that can't be made so small.

  Example:
    >>> import tempfile
    >>> from gradmimic_jax.selection import select
    >>> scores = [[2.0], [1.0], [-1.0]]
    >>> path = report(
    ...   scores,
    ...   select(scores, binarize="threshold"),
    ...   tempfile.mkdtemp() + "/report.html",
    ...   dataset={"labels": [0, 1, 1], "class_names": ["cat", "dog"]},
    ... )
    >>> "Remove 1 of 3 samples" in path.read_text()
    True
  """
  path = pathlib.Path(path)
  if path.suffix != ".html":
    raise ValueError(f"path is {str(path)!r}; expected it to end with .html")
  if gallery < 0:
    raise ValueError(f"gallery is {gallery}; expected >= 0 samples.")
  keep = _ids.mask(selection.keep, len(selection), "the selection's keep")
  selection = dataclasses.replace(selection, keep=keep)
  scores = findings_lib.align_scores(ledger, selection)
  samples = find_samples(dataset, selection)
  found = findings_lib.gather(
    scores,
    selection,
    samples,
    unit="epoch" if isinstance(ledger, ScoreLedger) else "step",
    title=title,
    run=run,
    results=results,
    gallery=gallery,
  )
  page = _fitting(found, samples, max_bytes)
  path.parent.mkdir(parents=True, exist_ok=True)
  _files.write_bytes(path.with_suffix(".json"), _json(found).encode() + b"\n")
  _files.write_bytes(path, page)
  return path


def _fitting(found: dict[str, Any], samples: Samples, limit: int) -> bytes:
  """Renders the page with the largest images that it has room for."""
  rows = [
    entry["row"] for entries in found["galleries"].values() for entry in entries
  ]
  bare = _render(found, {})
  if samples.images is None or not rows:
    return _checked(bare, limit)
  for side in _SIDES:
    images = {
      row: thumbnails.data_uri(samples.image(row), side) for row in rows
    }
    page = _render(found, images)
    if len(page) <= limit:
      return page
  found["notes"].append(
    f"Images: left out, as the page would exceed {limit:,} bytes."
  )
  return _checked(_render(found, {}), limit)


def _checked(page: bytes, limit: int) -> bytes:
  if len(page) > limit:
    raise ValueError(
      f"the page has {len(page):,} bytes without images, and max_bytes is"
      f" {limit:,}. Raise it, or show fewer samples: gallery=."
    )
  return page


def _render(found: dict[str, Any], images: Mapping[int, str]) -> bytes:
  try:
    import jinja2
  except ImportError as error:
    raise ImportError(
      "a report needs jinja2: pip install 'gradmimic_jax[report]'"
    ) from error
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "percent": lambda value: _UNKNOWN if value is None else f"{value:.1%}",
    "count": lambda value: _UNKNOWN if value is None else f"{value:,}",
    "number": _number,
    "share": lambda value: _UNKNOWN if value is None else f"{value:.3f}",
  }
  style, script = (
    (_FOLDER / name).read_text(encoding="utf-8")
    for name in ("page.css", "page.js")
  )
  removal = found["removal"]
  page = environment.get_template("page.html.jinja").render(
    found=found,
    images=images,
    style=style,
    script=script,
    # The only script that may run is this one.
    script_hash=base64.b64encode(
      hashlib.sha256(script.encode()).digest()
    ).decode(),
    histograms=[
      charts.histogram(
        panel["edges"], panel["kept"], panel["dropped"], cut=panel["cut"]
      )
      if panel["edges"]
      else None
      for panel in found["histograms"]
    ],
    curve=charts.removal(**removal) if removal["removed"] else None,
    class_options=_class_options(found),
    embedded=_json(found),
  )
  return page.encode("utf-8")


def _class_options(found: dict[str, Any]) -> list[str]:
  """The given labels that the galleries have."""
  return sorted(
    {
      entry["label"]
      for entries in found["galleries"].values()
      for entry in entries
      if entry["label"] is not None
    }
  )


def _json(found: dict[str, Any]) -> str:
  """Writes JSON that may stand in a script element: without <, > and &."""
  text = json.dumps(found, allow_nan=False)
  for sign in "<>&":
    text = text.replace(sign, f"\\u{ord(sign):04x}")
  return text


def _number(value: Any) -> str:
  """Formats four digits of a float; other values as they are."""
  if value is None:
    return _UNKNOWN
  if isinstance(value, float):
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
  return f"{value:,}" if isinstance(value, int) else str(value)
