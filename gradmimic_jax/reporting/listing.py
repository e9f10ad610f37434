"""The list of samples that a page lets search, filter and decide on.

Columns of plain values, short enough for ten thousand rows in a page: labels
are numbers of `classes`, and each sample's scores over the steps are one sign
a step, for its place among all samples there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gradmimic_jax.reporting.samples import Samples, text
from gradmimic_jax.selection.selection import Selection

MAX_ROWS = 10_000
MAX_STEPS = 48  # of a sample's line
# 0 to 63, from the lowest score to the highest; none where there is a blank.
LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
# The lengths of a text, the first of which all texts have room for.
_CAPTIONS = (1000, 400, 200, 80, 40)


def choose(
  selection: Selection,
  samples: Samples,
  ranked: np.ndarray,
  shown: Iterable[int],
  limit: int,
) -> np.ndarray:
  """Chooses the rows of the list, as they are ranked.

  What is shown elsewhere comes first, then removals, then samples with another
  label suggested, then the rest, each the worst first.

  Args:
    selection: whose samples they are.
    samples: their labels.
    ranked: all rows [N], the worst first.
    shown: rows that the page shows.
    limit: the most rows besides those.

  Returns:
    Rows [n], in the order of `ranked`.
  """
  shown = np.fromiter(shown, np.int64)
  limit += len(shown)
  if len(ranked) <= limit:
    return ranked
  urgency = np.full(len(selection), 3, np.int8)
  if samples.labels is not None and samples.suggested is not None:
    urgency[samples.labels != samples.suggested] = 2
  urgency[~selection.keep] = 1
  urgency[shown] = 0
  place = np.argsort(urgency[ranked], kind="stable")[:limit]
  return ranked[np.sort(place)]


def build(
  rows: np.ndarray,
  scores: np.ndarray,
  selection: Selection,
  samples: Samples,
  *,
  mean: np.ndarray,
  steps: Sequence[Any],
  room: int,
) -> dict[str, Any]:
  """Builds the columns of the list.

  Args:
    rows: of the selection [n], the worst first.
    scores: [N, T].
    selection: the samples' probabilities and decisions.
    samples: their labels and texts.
    mean: the samples' mean scores [N].
    steps: names of the steps [T].
    room: bytes that texts may take.

  Returns:
    Lists and strings, one entry a row; and what holds for all of them.
  """
  places, cuts, chosen = _lines(rows, scores, selection)
  listed = int((~selection.keep[rows]).sum())
  removals = int((~selection.keep).sum())
  quality = selection.quality
  columns, classes = _labels(rows, samples)
  return {
    "fingerprint": fingerprint(selection, samples),
    "samples": len(selection),
    "removals": removals,
    "listed": listed,
    "whole": listed == removals,
    "integers": selection.ids.dtype.kind in "iu",
    "rows": rows.tolist(),
    "ids": [str(one) for one in selection.ids[rows].tolist()],
    "keep": "".join("1" if keep else "0" for keep in selection.keep[rows]),
    "p": _rounded(selection.keep_probability[rows], 4),
    "quality": None if quality is None else _rounded(quality[rows], 4),
    "score": _significant(mean[rows]),
    "lines": places,
    "cuts": cuts,
    "steps": [text(steps[t]) for t in chosen],
    "classes": classes,
    "values_are_integers": samples.labels is not None
    and samples.labels.dtype.kind in "iu",
    **columns,
    **_captions(rows, samples, room),
  }


def fingerprint(selection: Selection, samples: Samples) -> str:
  """Names a selection and its labels: what decisions on a page belong to."""
  found = hashlib.sha256()
  for array in (selection.ids, selection.keep, samples.labels):
    if array is not None:
      found.update(f"{array.dtype.str} {array.shape} ".encode())
      found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()[:16]


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
  return [
    None if np.isnan(value) else round(value, digits)
    for value in values.tolist()
  ]


def _significant(values: np.ndarray) -> list[float | None]:
  return [
    float(f"{value:.4g}") if np.isfinite(value) else None
    for value in values.tolist()
  ]


def _lines(rows, scores, selection):
  """Makes each row's line, the cuts' places, and the steps that are shown."""
  n_steps = scores.shape[1]
  chosen = np.unique(
    np.linspace(0, n_steps - 1, min(MAX_STEPS, n_steps)).astype(int)
  ).tolist()
  cuts = selection.diagnostics.get("cuts") or [None] * n_steps
  signs = np.array([*LEVELS, " "])
  lines = np.empty((len(rows), len(chosen)), "<U1")
  marks = ""
  for i, t in enumerate(chosen):
    values = np.asarray(scores[:, t], np.float64)
    ordered = np.sort(values[np.isfinite(values)])

    def place(asked, ordered=ordered):
      below = np.searchsorted(ordered, asked, "left")
      upto = np.searchsorted(ordered, asked, "right")
      share = (below + upto) / (2 * max(1, len(ordered)))
      level = np.minimum((share * 64).astype(int), 63)
      return signs[np.where(np.isfinite(asked), level, 64)]

    lines[:, i] = place(values[rows])
    cut = np.nan if cuts[t] is None else cuts[t]
    marks += str(place(np.array([cut], np.float64))[0])
  return ["".join(line) for line in lines.tolist()], marks, chosen


def _labels(rows, samples):
  """Numbers the labels of the rows by the classes that there are."""
  if samples.labels is None:
    return {"labels": None, "suggested": None, "true_labels": None}, []
  named = {
    name: None if values is None else values[rows]
    for name, values in (
      ("labels", samples.labels),
      ("suggested", samples.suggested),
      ("true_labels", samples.true_labels),
    )
  }
  parts = [values for values in named.values() if values is not None]
  if samples.suggested is not None:
    # The matrix has all classes, and so has the choice of a new label.
    few = np.unique(np.concatenate([samples.labels, samples.suggested]))
    parts += [few] if len(few) <= 1000 else []
  elif len(few := np.unique(samples.labels)) <= 1000:
    parts.append(few)
  is_integer = samples.labels.dtype.kind in "iu"
  if samples.class_names is not None and is_integer:
    known = len(samples.class_names)
    parts += [np.arange(known)] if known <= 1000 else []
  values = np.unique(np.concatenate(parts))
  columns = {
    name: None if found is None else np.searchsorted(values, found).tolist()
    for name, found in named.items()
  }
  classes = [
    [str(value), samples.label_name(value)] for value in values.tolist()
  ]
  return columns, classes


def _captions(rows, samples, room):
  if samples.captions is None:
    return {"captions": None, "caption_length": None}
  captions: list[str] = []
  longest = _CAPTIONS[0]
  for longest in _CAPTIONS:
    captions = [samples.caption(row, longest) or "" for row in rows.tolist()]
    size = len(
      json.dumps(captions, ensure_ascii=False).encode(errors="replace")
    )
    if size <= room:
      break
  return {"captions": captions, "caption_length": longest}
