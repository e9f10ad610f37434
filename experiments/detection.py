"""How well scores find the mislabelled, by one binariser and another."""

import math
from typing import Any

import numpy as np

import gradmimic_jax as gm

# "weight" is the published threshold, on the weights; the others are the
# library's, on the raw scores.
BINARIZERS = ("weight", "threshold", "gmm", "kmeans", "top_fraction", "auto")


def check(config: Any) -> None:
  """Raises ValueError for a binariser that isn't there."""
  for name in config.study.binarizers:
    if name not in BINARIZERS:
      raise ValueError(
        f"config.study.binarizers has {name!r}; expected some of"
        f" {', '.join(BINARIZERS)}."
      )


def measure(
  config: Any, scores: np.ndarray, weights: np.ndarray, wrong: np.ndarray
) -> dict[str, Any]:
  """Compares selections with the truth.

  Args:
    config: `study.binarizers`, `select` and `batch_size` are looked at.
    scores: `[N, T]`; NaN where a sample was not seen.
    weights: `[N, T]`, likewise.
    wrong: bool `[N]`, whose label is wrong.

  Returns:
    `clean_fraction`, the truth; `auroc` of the mean score; and for each
    binariser `f1` of finding the mislabelled, and `kept_fraction`. What is not
    defined is None. Nothing where no sample has a score.
  """
  seen = ~np.isnan(scores).all(axis=1)
  if not seen.any():  # the run has diverged at once
    return {}
  scores, weights, wrong = scores[seen], weights[seen], wrong[seen]
  mean = np.nanmean(scores, axis=1)
  about: dict[str, Any] = {"clean_fraction": float(1 - wrong.mean())}
  about["auroc"] = plain(
    gm.metrics.detection(mean, np.ones(len(mean), bool), wrong).auroc
  )
  for name in config.study.binarizers:
    options = {}
    if name == "weight":
      options["threshold"] = 1 / config.batch_size
    elif name in ("threshold", "top_fraction"):
      field = {"top_fraction": "fraction"}.get(name, name)
      options[field] = config.select[field]
    selection = gm.select(
      weights if name == "weight" else scores,
      binarize="threshold" if name == "weight" else name,
      aggregate=config.select.aggregate,
      **options,
    )
    found = gm.metrics.detection(mean, selection.keep, wrong)
    about[name] = {
      "f1": plain(found.f1),
      "kept_fraction": float(selection.keep.mean()),
    }
  return about


def mean(config: Any, found: list[dict[str, Any]]) -> dict[str, float | None]:
  """Means over runs, as the flat fields of a table's row.

  Args:
    config: `study.binarizers`.
    found: what `measure` gave for each run.

  Returns:
    `auroc`, `clean_fraction` and, for each binariser, `f1_<name>` and
    `kept_<name>`; None where a run has none.
  """
  fields = ["auroc", "clean_fraction"]
  row: dict[str, float | None] = dict.fromkeys(fields)
  for name in config.study.binarizers:
    row[f"f1_{name}"] = row[f"kept_{name}"] = None
  if not found or not all(found):
    return row
  for field in fields:
    row[field] = _mean([entry[field] for entry in found])
  for name in config.study.binarizers:
    row[f"f1_{name}"] = _mean([entry[name]["f1"] for entry in found])
    row[f"kept_{name}"] = _mean(
      [entry[name]["kept_fraction"] for entry in found]
    )
  return row


def _mean(values):
  values = [value for value in values if value is not None]
  return float(np.mean(values)) if values else None


def plain(value: float) -> float | None:
  """The number as JSON may have it: None where it is not finite."""
  return float(value) if math.isfinite(value) else None
