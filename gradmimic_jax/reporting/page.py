"""The report: one HTML page that needs nothing else, and its data as JSON."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradmimic_jax import _files
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.reporting import (
  charts,
  findings as findings_lib,
  listing,
  thumbnails,
)
from gradmimic_jax.reporting.samples import (
  Samples,
  column_names,
  find_samples,
  text,
)
from gradmimic_jax.selection import _ids
from gradmimic_jax.selection.selection import Selection

_FOLDER = pathlib.Path(__file__).parent
_UNKNOWN = "\N{EN DASH}"
# Sides of the images in pixels; the first with which the page fits is taken.
_SIDES = (128, 96, 64, 48, 32, 16)
# In the list, images stand beside the worst samples only.
_LIST_SIDES = (64, 48, 32)
_LIST_IMAGES = 300


def report(
  ledger: Any,
  selection: Selection,
  path: str | os.PathLike[str],
  *,
  dataset: Any = None,
  columns: Mapping[str, Any] | None = None,
  title: str = "Data report",
  run: Mapping[str, Any] | None = None,
  results: Mapping[str, Mapping[str, Any]] | None = None,
  gallery: int = 24,
  max_rows: int = listing.MAX_ROWS,
  max_bytes: int = 5_000_000,
) -> pathlib.Path:
  """Writes a selection's findings as a page to work in and to hand on.

  The page lists the samples, lets search, filter and overrule the decisions,
  and gives them as a CSV file, which `gm.read_decisions` reads. It opens from
  disk and fetches nothing: images, styles and a script are in it, and a policy
  that browsers enforce forbids all else. The same numbers are written as JSON
  beside it.

  | edge case                        | behaviour                              |
  |----------------------------------|----------------------------------------|
  | no dataset                       | ids and scores only                    |
  | thousands of classes, steps, ... | the most telling ones, and a note      |
  | more than max_rows samples       | all removals first, then those with    |
  |                                  | another label suggested; and a note    |
  | a page beyond max_bytes          | smaller images, then none, shorter     |
  |                                  | texts, fewer rows, and a note          |
  | images                           | of the galleries and the worst 300 of  |
  |                                  | the list; no other one is looked at    |
  | images that can't be read        | left out, and a note with the first    |
  |                                  | error                                  |
  | names and captions with HTML     | shown as they are written              |
  | names beyond 200 characters,     | cut off; ids only where they are       |
  | captions beyond 1,000            | shown, not in the file of decisions    |

  Args:
    ledger: the ScoreLedger that the selection was made of, or scores [N, T] or
      a data frame of them.
    selection: as `select` gave it.
    path: of the page, ending with `.html`; the data goes to the same name with
      `.json`.
    dataset: what is known about the samples, each entry one a sample [M]:
      `ids` (if the selection's aren't positions), `labels` as given and
      `suggested` or `true_labels` (integers, or names), `captions` (texts, or
      lists of tokens), `images` (uint8 [H, W] or [H, W, C], anything that
      gives one by position, and small ones by a method `at_most(position,
      side)` if it has that); and `class_names` [C]. Or a data frame with such
      columns, but for images and class_names; `label`, say, will do for
      `labels`, its index for `ids`, and other columns are passed over.
    columns: the user's own names, and those of the columns of a frame, of
      `ids`, `labels`, `suggested`, `true_labels`, `captions`, as texts, and of
      `scores`, a list [T].
    title: of the page.
    run: facts about the run, by name.
    results: its results, such as `{"retrained": {"test_accuracy": 0.96}}`.
    gallery: number of worst, borderline and best samples to show, of each.
    max_rows: of the list of samples, besides those of the galleries.
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
  if max_rows < 0:
    raise ValueError(f"max_rows is {max_rows}; expected >= 0 samples.")
  keep = _ids.mask(selection.keep, len(selection), "the selection's keep")
  selection = dataclasses.replace(selection, keep=keep)
  scores = findings_lib.align_scores(ledger, selection)
  names = column_names(columns, scores.shape[1])
  samples = find_samples(dataset, selection, columns)
  mean = findings_lib.mean_scores(scores)
  worst = findings_lib.rank(selection, mean)
  found = findings_lib.gather(
    scores,
    selection,
    samples,
    unit="epoch" if isinstance(ledger, ScoreLedger) else "step",
    title=title,
    run=run,
    results=results,
    gallery=gallery,
    columns=names,
    mean=mean,
    worst=worst,
  )
  unranked = np.setdiff1d(np.arange(len(selection)), worst)
  ranked = np.concatenate([worst, unranked])
  steps = findings_lib.step_names(selection, names)

  def make_list(limit: int) -> dict[str, Any]:
    rows = listing.choose(selection, samples, ranked, _shown(found), limit)
    return listing.build(
      rows,
      scores,
      selection,
      samples,
      mean=mean,
      steps=steps,
      room=max_bytes // 4,
    )

  page = _fitting(found, samples, make_list, max_rows, max_bytes)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = _json(found).encode("utf-8", "backslashreplace")
  _files.write_bytes(path.with_suffix(".json"), content + b"\n")
  _files.write_bytes(path, page)
  return path


def _shown(found: dict[str, Any]) -> list[int]:
  """The rows in the galleries."""
  return [
    entry["row"] for entries in found["galleries"].values() for entry in entries
  ]


def _fitting(
  found: dict[str, Any],
  samples: Samples,
  make_list: Callable[[int], dict[str, Any]],
  max_rows: int,
  limit: int,
) -> bytes:
  """Renders the page with what it has room for; `found` gets the list."""
  gallery = _shown(found) if samples.images is not None else []
  blank = dict.fromkeys(gallery, "")
  while True:
    found["list"] = make_list(max_rows)
    page = _render(found, blank, {})
    if len(page) <= limit or not max_rows:
      break
    max_rows //= 4
  if not gallery:
    return _checked(page, limit)
  read = _Reader(samples)
  pixels = read(gallery, _SIDES[0])
  images, room = _encoded(pixels, _SIDES, limit - len(page))
  if len(images) < len(pixels):
    found["notes"].append(
      f"Images: left out, as the page would exceed {limit:,} bytes."
    )
    return _checked(_render(found, {}, {}), limit)
  rows = found["list"]["rows"][:_LIST_IMAGES]
  pixels = read([row for row in rows if row not in gallery], _LIST_SIDES[0])
  if read.failed:
    room -= 3000  # for the note
    found["notes"].append(
      f"Images: {read.failed:,} could not be read; the first of them:"
      f" {text(read.error)}"
    )
  small, _ = _encoded(pixels, _LIST_SIDES, room)
  return _checked(_render(found, images, small), limit)


class _Reader:
  """Reads and shrinks images; counts those that can't be read."""

  def __init__(self, samples: Samples):
    self._samples = samples
    self.failed = 0
    self.error: Exception | None = None

  def __call__(self, rows: Sequence[int], side: int) -> dict[int, np.ndarray]:
    """Returns images by row, each read once; at most side x side."""
    found = {}
    for row in rows:
      try:
        image = self._samples.image(row, side)
      except (OSError, ValueError) as error:  # a damaged file, or none
        self.failed += 1
        self.error = self.error or error
        continue
      found[row] = thumbnails.shrunk(image, side)
    return found


def _encoded(
  pixels: Mapping[int, np.ndarray], sides: Sequence[int], room: int
) -> tuple[dict[int, str], int]:
  """Encodes images, as large as they all fit; else the first ones that fit.

  Args:
    pixels: uint8 [h, w, C], by row.
    sides: in pixels, the largest first.
    room: bytes that they may take.

  Returns:
    Addresses by row, and the bytes that are left.
  """
  encoded: dict[int, str] = {}
  left = room
  largest = max([max(one.shape) for one in pixels.values()], default=0)
  for side, next_side in zip(sides, (*sides[1:], 0), strict=True):
    if next_side >= largest:
      continue  # it is all the same to images as small
    encoded, left = {}, room
    for row, one in pixels.items():
      address = thumbnails.data_uri(one, side)
      cost = len(address) + len(f'"{row}":"",')
      if cost > left:
        break
      encoded[row] = address
      left -= cost
    if len(encoded) == len(pixels):
      break
  return encoded, left


def _checked(page: bytes, limit: int) -> bytes:
  if len(page) > limit:
    raise ValueError(
      f"the page has {len(page):,} bytes without images, and max_bytes is"
      f" {limit:,}. Raise it, or show fewer samples: gallery=."
    )
  return page


@functools.cache
def _environment() -> Any:
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
    "count": _count,
    "number": _number,
    "share": lambda value: _UNKNOWN if value is None else f"{value:.3f}",
  }
  return environment


def _render(
  found: dict[str, Any],
  images: Mapping[int, str],
  list_images: Mapping[int, str],
) -> bytes:
  style, script = (
    (_FOLDER / name).read_text(encoding="utf-8")
    for name in ("page.css", "page.js")
  )
  removal = found["removal"]
  page = (
    _environment()
    .get_template("page.html.jinja")
    .render(
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
          panel["edges"],
          panel["kept"],
          panel["dropped"],
          cut=panel["cut"],
          unit=panel["unit"],
        )
        if panel["edges"]
        else None
        for panel in found["histograms"]
      ],
      curve=charts.removal(**removal) if removal["removed"] else None,
      embedded=_json(found),
      n_pictures=len(list_images),
      pictures=_json({str(row): one for row, one in list_images.items()}),
    )
  )
  return page.encode("utf-8", "backslashreplace")


def _json(found: Mapping[str, Any]) -> str:
  """Writes JSON that may stand in a script element: without <, > and &.

  What is no Unicode becomes JSON's own escape as it is encoded, with
  "backslashreplace".
  """
  content = json.dumps(
    found, allow_nan=False, ensure_ascii=False, separators=(",", ":")
  )
  for sign in "<>&":
    content = content.replace(sign, f"\\u{ord(sign):04x}")
  return content


def _count(value: Any) -> str:
  if isinstance(value, str):
    return value
  return _UNKNOWN if value is None else f"{value:,}"


def _number(value: Any) -> str:
  """Formats four digits of a float; other values as they are."""
  if value is None:
    return _UNKNOWN
  if isinstance(value, float):
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
  return f"{value:,}" if isinstance(value, int) else str(value)
