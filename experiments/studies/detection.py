"""Detection of wrong samples by scores: of all, by kind and by binariser."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.selection import files

# "weight" is the published threshold, on the weights; the others are the
# library's, on the raw scores.
BINARIZERS = ("weight", "threshold", "gmm", "kmeans", "top_fraction", "auto")


def check(config: config_dict.ConfigDict) -> None:
  """Raises ValueError for a binariser that isn't there."""
  for name in config.study.binarizers:
    if name not in BINARIZERS:
      raise ValueError(
        f"config.study.binarizers has {name!r}; expected some of"
        f" {', '.join(BINARIZERS)}."
      )


def measure(
  config: config_dict.ConfigDict,
  scores: np.ndarray,
  weights: np.ndarray,
  wrong: np.ndarray,
) -> dict[str, Any]:
  """Compares selections with the truth.

  Args:
    config: `study.binarizers`, `select` and `batch_size` are looked at.
    scores: `[N, T]`; NaN where a sample was not seen.
    weights: `[N, T]`, likewise.
    wrong: bool `[N]`, whose label is wrong.

  Returns:
    `clean_fraction`, the truth; `auroc` of the mean score; and for each
    binariser `f1` of finding the mislabelled, the share `kept`, and the
    `estimate` of the clean fraction. What is not defined is None. Nothing where
    no sample has a score.
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
    if name == "weight":
      section = {**config.select, "threshold": 1 / config.batch_size}
      selection = files.select(section, weights, "threshold")
    else:
      selection = files.select(config.select, scores, name)
    found = gm.metrics.detection(mean, selection.keep, wrong)
    probability = selection.keep_probability
    about[name] = {
      "f1": plain(found.f1),
      "kept": float(selection.keep.mean()),
      "estimate": _mean(probability[~np.isnan(probability)]),
    }
  return about


def auroc_by_kind(
  scores: np.ndarray, kinds: np.ndarray, names: Sequence[str]
) -> dict[str, float | None]:
  """AUROC of all wrong samples, and of each kind, against those that are right.

  Scores [N] are finite, high is good; kinds [N] are as `Truth.kinds`. Of each
  of the names there is an `auroc_<name>`; None where it isn't defined.
  """

  def auroc(wrong):
    chosen = wrong | (kinds == "")
    if not chosen.any():
      return None
    return plain(gm.metrics.auroc(-scores[chosen], wrong[chosen]))

  of_kinds = {f"auroc_{name}": auroc(kinds == name) for name in names}
  return {"auroc": auroc(kinds != ""), **of_kinds}


def mean(
  config: config_dict.ConfigDict, found: list[dict[str, Any]]
) -> dict[str, float | None]:
  """Means of what `measure` found over runs, as fields of a table's row.

  They are `auroc`, `clean_fraction` and, for each binariser, `f1_<name>`,
  `kept_<name>` and `estimate_<name>`; None where a run has none.
  """
  paths: list[tuple[str, ...]] = [("auroc",), ("clean_fraction",)]
  for name in config.study.binarizers:
    paths += [(name, key) for key in ("f1", "kept", "estimate")]
  known = bool(found) and all(found)
  return {
    "_".join(reversed(path)): _mean(
      [functools.reduce(operator.getitem, path, entry) for entry in found]
    )
    if known
    else None
    for path in paths
  }


def _mean(values):
  values = [value for value in values if value is not None]
  return float(np.mean(values)) if len(values) else None


def plain(value: float) -> float | None:
  """The number as JSON may have it: None where it is not finite."""
  return float(value) if math.isfinite(value) else None
