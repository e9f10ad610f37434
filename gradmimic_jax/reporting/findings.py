"""The contents of a report, as plain numbers and strings that JSON has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradmimic_jax import metrics
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.reporting import charts
from gradmimic_jax.reporting.samples import Samples, text
from gradmimic_jax.selection._frames import refuse_frames
from gradmimic_jax.selection.quality import (
  DatasetQuality,
  RemovalCurve,
  class_table,
  dataset_quality,
  removal_curve,
  worst_first,
)
from gradmimic_jax.selection.selection import Selection

MAX_CLASSES = 100  # rows of the class table
MAX_MATRIX = 50  # classes on a side of the label matrix
MAX_PAIRS = 20
MAX_VOTERS = 100
MAX_FACTS = 100
MAX_PANELS = 6
GALLERIES = ("worst", "borderline", "best")


def align_scores(ledger: Any, selection: Selection) -> np.ndarray:
  """Puts the scores [N, T] in the order of the selection.

  Args:
    ledger: a ScoreLedger, or scores [N, T].
    selection: the selection that `select` made of it.

  Returns:
    Scores [N, T].

  Raises:
    TypeError: a data frame with more in it than scores.
    ValueError: a ledger of other samples or steps than the selection.
  """
  if isinstance(ledger, ScoreLedger):
    ids, scores = ledger.matrix("score")
    if not np.array_equal(ids, selection.ids):
      raise ValueError(
        f"the ledger at {ledger.path} has {len(ids)} samples and the selection"
        f" {len(selection)}, and they aren't the same ones in the same order."
        " Give the ledger that the selection was made of."
      )
  else:
    refuse_frames(ledger, "ledger")
    scores = np.asarray(ledger)
  if scores.shape != selection.votes.shape:
    raise ValueError(
      f"scores have shape {scores.shape} and the selection's votes"
      f" {selection.votes.shape}; expected the [N, T] that the selection was"
      " made of."
    )
  return scores


def gather(
  scores: np.ndarray,
  selection: Selection,
  samples: Samples,
  *,
  unit: str,
  title: str,
  run: Mapping[str, Any] | None,
  results: Mapping[str, Mapping[str, Any]] | None,
  gallery: int,
  columns: Mapping[str, Any],
  mean: np.ndarray,
  worst: np.ndarray,
) -> dict[str, Any]:
  """Gathers the contents of a report.

  Args:
    scores: [N, T], in the order of the selection.
    selection: as `select` gave it.
    samples: the samples' labels, names and images.
    unit: the word for a column of scores.
    title: of the page.
    run: facts about the run, by name.
    results: numbers that came out of training, by what it was trained on.
    gallery: the number of samples in each gallery.
    columns: the user's own names, as `samples.column_names` gives them.
    mean: of the samples' scores [N].
    worst: rows that can be ranked, the worst first.

  Returns:
    Plain lists, dicts, numbers and strings; None for the unknown.
  """
  about = selection.diagnostics
  quality, curve = (
    dataset_quality(selection),
    removal_curve(selection, max_points=200),
  )
  notes: list[str] = []
  steps = step_names(selection, columns)
  classes, n_classes = _classes(selection, samples, notes)
  matrix, pairs = _labels(selection, samples, notes)
  found = {
    "version": 2,
    "title": text(title),
    "unit": unit,
    "columns": {k: v for k, v in columns.items() if k != "scores"},
    "verdict": verdict(selection, quality),
    "run": _facts(run, notes),
    "fingerprints": {
      text(k): text(v) for k, v in about.get("fingerprints", {}).items()
    },
    "selection": {
      "samples": len(selection),
      "steps": selection.votes.shape[1],
      "kept": int(selection.keep.sum()),
      "dropped": int((~selection.keep).sum()),
      "ties": about.get("ties", 0),
      "abstentions": int((selection.votes < 0).sum()),
      "joint": "probability_of_two" in about.get("label_model", {}),
      "binarize": text(about.get("binarize", "")),
      "aggregate": text(about.get("aggregate", "")),
      "population": text(about.get("population", "")),
      "note": text(about.get("label_model", {}).get("note", "")),
    },
    "quality": quality._asdict(),
    "removal": {
      "removed": curve.removed.tolist(),
      "precision": curve.precision.tolist(),
      "recall": curve.recall.tolist(),
      "recommended": curve.recommended,
      "uncertain": list(curve.uncertain),
    },
    "advice": _advice(curve),
    "histograms": _histograms(scores, selection, list(steps), notes),
    "voters": _voters(selection, list(steps), notes),
    "voting": {
      key: about.get("label_model", {}).get(key)
      for key in ("n_voters", "effective_voters", "vote_correlation")
    },
    "classes": classes,
    "n_classes": n_classes,
    "matrix": matrix,
    "pairs": pairs,
    "truth": _truth(selection, samples, mean),
    "galleries": _galleries(selection, samples, mean, worst, gallery),
    "tokens": samples.has_tokens,
    "results": _results(results),
    "notes": notes,
  }
  return _plain(found)


def step_names(selection: Selection, columns: Mapping[str, Any]) -> list[Any]:
  """Names the columns of scores: as the user does, or by their numbers."""
  names = columns.get("scores") or selection.diagnostics.get("steps")
  return list(names or range(selection.votes.shape[1]))


def verdict(selection: Selection, quality: DatasetQuality) -> str:
  """Sums the report up in one line.

  Args:
    selection: as `select` gave it.
    quality: the outcome of `dataset_quality`.

  Returns:
    A sentence.
  """
  n, dropped = len(selection), int((~selection.keep).sum())
  population = selection.diagnostics.get("population")
  if math.isnan(quality.clean_fraction):
    return (
      "The scores don't tell good samples from bad: no step has a vote, and"
      f" all {n:,} samples are kept."
    )
  if population and dropped in (0, n):
    does = "all are kept" if not dropped else "nothing clean is in sight"
    return f"The {n:,} samples are one population, and {does}."
  return (
    f"Remove {dropped:,} of {n:,} samples ({dropped / n:.1%}): about"
    f" {quality.clean_fraction:.1%} of the data look clean"
    f" ({quality.level:.0%} interval {quality.low:.1%} to {quality.high:.1%})."
  )


def _advice(curve: RemovalCurve) -> str:
  return str(curve)[:1].upper() + str(curve)[1:] if len(curve.removed) else ""


def mean_scores(scores: np.ndarray) -> np.ndarray:
  """Averages the finite scores of each sample [N]; nan where there are none."""
  finite = np.isfinite(scores)
  total = np.where(finite, scores, 0).sum(axis=1, dtype=np.float64)
  count = finite.sum(axis=1)
  return np.divide(
    total, count, out=np.full(len(scores), np.nan), where=count > 0
  )


def _histograms(scores, selection, steps, notes) -> list[dict[str, Any]]:
  n_steps = scores.shape[1]
  shown = np.unique(
    np.linspace(0, n_steps - 1, min(MAX_PANELS, n_steps)).astype(int)
  )
  if len(shown) < n_steps:
    notes.append(f"Score histograms: {len(shown)} of {n_steps}.")
  cuts = selection.diagnostics.get("cuts") or [None] * n_steps
  panels = []
  for t in shown.tolist():
    edges, (kept, dropped), width = charts.bin_scores(
      scores[:, t], selection.keep, ~selection.keep
    )
    panels.append(
      {
        "step": steps[t],
        "edges": edges,
        "unit": width,
        "kept": kept,
        "dropped": dropped,
        "cut": cuts[t],
        "unseen": int((~np.isfinite(scores[:, t])).sum()),
      }
    )
  return panels


def _voters(selection, steps, notes) -> list[dict[str, Any]]:
  about, n_steps = selection.diagnostics, len(steps)
  model = about.get("label_model", {})
  nothing = [None] * n_steps

  def column(of, name):
    values = of.get(name)
    return values if values is not None and len(values) == n_steps else nothing

  shown = np.unique(
    np.linspace(0, n_steps - 1, min(MAX_VOTERS, n_steps)).astype(int)
  ).tolist()
  if len(shown) < n_steps:
    notes.append(f"Voters: {len(shown)} of {n_steps}.")
  return [
    {
      "step": steps[t],
      "cut": column(about, "cuts")[t],
      "coverage": column(about, "coverages")[t],
      "keep_share": column(about, "keep_shares")[t],
      "agreement": column(model, "agreements")[t],
      "accuracy": column(model, "accuracies")[t],
      "note": text(column(about, "notes")[t] or ""),
    }
    for t in shown
  ]


def _classes(selection, samples, notes):
  if samples.labels is None:
    return None, None
  table = class_table(selection, samples.labels)
  rows = [
    {
      "name": samples.label_name(label),
      "samples": size,
      "issues": issues,
      "noise": noise,
      "quality": quality,
    }
    for label, size, issues, noise, quality in zip(
      *(
        table[name].slice(0, MAX_CLASSES).to_pylist()
        for name in (
          "Class Name",
          "Samples",
          "Label Issues",
          "Label Noise",
          "Label Quality Score",
        )
      ),
      strict=True,
    )
  ]
  if len(rows) < len(table):
    notes.append(
      f"Classes: the {len(rows)} noisiest of {len(table):,}; gm.class_table has"
      " all of them."
    )
  return rows, len(table)


def _labels(selection, samples, notes):
  """Makes the matrix and the commonest pairs; None without suggestions."""
  if samples.labels is None or samples.suggested is None:
    return None, None
  labels = np.concatenate([samples.labels, samples.suggested])
  classes, place = np.unique(labels, return_inverse=True)
  given, suggested = np.split(place, 2)
  if len(classes) <= MAX_MATRIX:
    counts = np.zeros((len(classes),) * 2, np.int64)
    np.add.at(counts, (given, suggested), 1)
    matrix = {
      "values": [str(label) for label in classes.tolist()],
      "classes": [samples.label_name(label) for label in classes],
      "counts": counts.tolist(),
    }
  else:
    matrix = None
    notes.append(
      f"Given against suggested labels: {len(classes):,} classes are too many"
      " for a matrix; the commonest pairs are listed."
    )
  pair = given * len(classes) + suggested
  keys, place = np.unique(pair[given != suggested], return_inverse=True)
  size = np.bincount(place, minlength=len(keys))
  dropped = np.bincount(
    place, ~selection.keep[given != suggested], minlength=len(keys)
  )
  order = np.argsort(-size, kind="stable")[:MAX_PAIRS]
  pairs = [
    {
      "values": [
        str(classes[keys[k] // len(classes)]),
        str(classes[keys[k] % len(classes)]),
      ],
      "given": samples.label_name(classes[keys[k] // len(classes)]),
      "suggested": samples.label_name(classes[keys[k] % len(classes)]),
      "samples": int(size[k]),
      "dropped": int(dropped[k]),
    }
    for k in order
  ]
  if len(order) < len(keys):
    notes.append(
      f"Pairs of given and suggested labels: {len(order)} of {len(keys):,}."
    )
  return matrix, pairs


def _truth(selection, samples, mean):
  if samples.labels is None or samples.true_labels is None:
    return None
  wrong = samples.labels != samples.true_labels
  seen = np.isfinite(mean)
  if not seen.any():
    return None
  found = metrics.detection(
    mean[seen], selection.keep[seen], wrong[seen]
  )._asdict()
  return found | {"clean_fraction": float(1 - wrong.mean())}


def rank(selection: Selection, mean: np.ndarray) -> np.ndarray:
  """Rows, the worst first; without those of which nothing is known."""
  worst = worst_first(selection)
  if not len(worst):  # without votes, scores still rank
    worst = np.argsort(mean, kind="stable")[: int(np.isfinite(mean).sum())]
  return worst


def _galleries(selection, samples, mean, worst, size) -> dict[str, Any]:
  p = selection.keep_probability[worst]
  quality = selection.quality
  if quality is None:
    quality = np.full(len(selection), np.nan)
  # Nearest to 1/2 first, by probability, then by quality.
  doubt = np.lexsort((np.abs(quality[worst] - 0.5), np.abs(p - 0.5)))
  taken: set[int] = set()
  galleries: dict[str, Any] = {}
  for name, rows in (
    ("worst", worst),
    ("best", worst[::-1]),
    ("borderline", worst[doubt]),
  ):
    # A sample is in one gallery, also where there are but a few of them.
    chosen: list[int] = []
    for row in rows[: 3 * size].tolist():
      if len(chosen) < size and row not in taken:
        chosen.append(row)
    taken.update(chosen)
    galleries[name] = [
      {
        "id": text(selection.ids[row]),
        "row": row,
        "kept": bool(selection.keep[row]),
        "keep_probability": float(selection.keep_probability[row]),
        "quality": float(quality[row]),
        "score": float(mean[row]),
        **samples.about(row),
      }
      for row in chosen
    ]
  return {name: galleries[name] for name in GALLERIES}


def _facts(run, notes) -> dict[str, str]:
  facts = {text(key): text(value) for key, value in (run or {}).items()}
  if len(facts) > MAX_FACTS:
    notes.append(f"What was run: {MAX_FACTS} of {len(facts)} entries.")
  return dict(list(facts.items())[:MAX_FACTS])


def _results(results) -> dict[str, Any] | None:
  if not results:
    return None
  columns = list(dict.fromkeys(key for row in results.values() for key in row))
  return {
    "columns": [text(key) for key in columns],
    "rows": [
      {"name": text(name), "values": [row.get(key) for key in columns]}
      for name, row in results.items()
    ],
  }


def _plain(value: Any) -> Any:
  """Replaces what JSON lacks: NaN and infinities become None."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, (bool, int, str)):
    return value
  return text(value)
