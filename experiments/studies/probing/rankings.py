"""Rankings of samples by suspicion, and how well they find wrong labels.

A ranking is float64 [N], low for what is suspicious: mimic scores and others of
their kind, the log-likelihood by probabilities that are out of sample, and what
cleanlab makes of the same probabilities.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.data import noise
from experiments.data.noise import tables as noise_tables
from experiments.runtime import tables
from experiments.studies import detection
from experiments.studies.probing import features as features_lib

CONFIDENT_LEARNING = "confident_learning"
LOSS = "out_of_sample_loss"


class Truth(NamedTuple):
  """What is known of which labels are wrong."""

  wrong: np.ndarray  # bool [N]
  known: np.ndarray  # bool [N]; the others don't count


def check_cleanlab() -> None:
  """Raises ModuleNotFoundError where cleanlab isn't installed."""
  try:
    import cleanlab.filter  # noqa: F401 - takes seconds, so not above
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"there is no module {error.name!r}; a cross-fitting compares with"
      " cleanlab: pip install 'gradmimic_jax[cleanlab]'"
    ) from error


def rank(
  probabilities: np.ndarray,
  labels: np.ndarray,
  scores: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Makes the rankings.

  Args:
    probabilities: [N, C], out of sample.
    labels: integers [N], as they are given.
    scores: of each method [N], high = good.

  Returns:
    The scores; `out_of_sample_loss`, in which samples stand as by cleanlab's
    self-confidence; `confident_learning`, cleanlab's issues by self-confidence
    before all others; and cleanlab's `normalized_margin` and
    `confidence_weighted_entropy`, its other label quality scores.

  Raises:
    ValueError: scores that are not finite.
  """
  from cleanlab.rank import get_label_quality_scores

  for name, values in scores.items():
    if not np.isfinite(values).all():
      raise ValueError(
        f"{np.sum(~np.isfinite(values))} of {len(values)} scores of {name} are"
        " not finite: the heads have diverged. Lower"
        " config.optimizer.learning_rate."
      )
  p = np.asarray(probabilities, np.float64)
  p /= p.sum(axis=1, keepdims=True)
  own = p[np.arange(len(labels)), labels]
  found = {name: np.asarray(v, np.float64) for name, v in scores.items()}
  found[CONFIDENT_LEARNING] = -np.arange(len(labels), 0, -1.0)
  issues = find_issues(p, labels)
  others = np.setdiff1d(np.arange(len(labels)), issues)
  order = np.concatenate([issues, others[np.argsort(own[others])]])
  found[CONFIDENT_LEARNING][order] = np.arange(len(labels), dtype=float)
  found[LOSS] = np.log(np.maximum(own, np.finfo(np.float32).tiny))
  for name in ("normalized_margin", "confidence_weighted_entropy"):
    found[name] = np.asarray(get_label_quality_scores(labels, p, method=name))
  return found


def find_issues(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Positions of cleanlab's label issues, the least confident first."""
  from cleanlab.filter import find_label_issues

  return find_label_issues(
    np.asarray(labels, np.int64),
    np.asarray(probabilities, np.float64),
    return_indices_ranked_by="self_confidence",
    n_jobs=1,
  )


def lowest(ranking: np.ndarray, count: int) -> np.ndarray:
  """Positions of the lowest, the lowest first; of equals the earlier first."""
  return np.argsort(ranking, kind="stable")[:count]


def read_truths(
  config: config_dict.ConfigDict,
  train: features_lib.Features,
  labels: noise.NoisyLabels,
) -> dict[str, Truth]:
  """What is known of the given labels: the noise in them, the proxy's word.

  Args:
    config: `config.cross`.
    train: the samples.
    labels: as they are given.

  Returns:
    "noise" where labels were changed, and "people" where there is a proxy.

  Raises:
    ValueError: a proxy without columns, one that lacks a column, a sample or a
      sample's label, or one with no majority at all.
    FileNotFoundError: a proxy that is not there.
  """
  found = {}
  if labels.rate:
    found["noise"] = Truth(labels.is_noisy, np.ones(len(labels.labels), bool))
  if config.proxy is None:
    return found
  if not config.proxy_columns:
    raise ValueError(
      f"config.cross.proxy is {config.proxy!r}, and config.cross.proxy_columns"
      " is empty; expected the columns of labels by people."
    )
  columns = []
  for column in config.proxy_columns:
    try:
      given = noise_tables.read_labels(
        train.labels,
        num_classes=train.num_classes,
        path=config.proxy,
        ids=train.ids,
        class_names=train.class_names,
        column=column,
        id_column=config.proxy_id_column,
      )
    except (ValueError, FileNotFoundError) as error:
      raise type(error)(f"config.cross.proxy: {error}") from error
    missing = given == noise_tables.NO_LABEL
    if missing.any():
      raise ValueError(
        f"config.cross.proxy {config.proxy} has no label in column {column!r}"
        f" for {missing.sum()} of {len(missing)} samples, such as"
        f" {str(train.ids[np.argmax(missing)])!r}; expected one for each."
      )
    columns.append(given)
  most, divided = majority(np.stack(columns, axis=1), train.num_classes)
  if divided.all():
    raise ValueError(
      f"config.cross.proxy {config.proxy} has no majority for any sample in the"
      f" columns {', '.join(config.proxy_columns)}; expected three or more"
      " columns that mostly agree."
    )
  found["people"] = Truth((most != labels.labels) & ~divided, ~divided)
  return found


def majority(
  labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """The label that most people gave, and where no label has most.

  Args:
    labels: integers [N, K] of K people, in 0 .. C - 1.
    num_classes: C.

  Returns:
    Labels [N], and bool [N], True where two labels share the first place (the
    smaller one is the label then).

  Example:
    >>> most, divided = majority(np.array([[1, 2, 1], [0, 1, 2]]), 3)
    >>> most.tolist(), divided.tolist()
    ([1, 0], [False, True])
  """
  votes = np.zeros((len(labels), num_classes), np.int32)
  for column in labels.T:
    votes[np.arange(len(labels)), column] += 1
  first = votes.max(axis=1, keepdims=True)
  return votes.argmax(axis=1), (votes == first).sum(axis=1) > 1


def measure(
  together: Mapping[str, np.ndarray],
  by_seed: list[dict[str, np.ndarray]],
  truth: Truth,
  count: int,
) -> list[dict[str, Any]]:
  """Compares rankings with a truth, a row for each.

  Args:
    together: the rankings of all seeds together.
    by_seed: those of each seed alone.
    truth: what is known.
    count: the length of a list.

  Returns:
    Of each ranking its `auroc` and `average_precision`, with mean and standard
    error over the seeds, and how many of the `count` lowest are `wrong_lowest`
    and how many of them are not known, `unknown_lowest`.
  """

  def of(ranking):
    values, wrong = ranking[truth.known], truth.wrong[truth.known]
    return {
      "auroc": detection.plain(gm.metrics.auroc(-values, wrong)),
      "average_precision": detection.plain(
        gm.metrics.average_precision(-values, wrong)
      ),
    }

  rows = []
  for name, ranking in together.items():
    row: dict[str, Any] = {"ranking": name, **of(ranking)}
    alone = [of(rankings[name]) for rankings in by_seed]
    for field in ("auroc", "average_precision"):
      values = [found[field] for found in alone]
      known = all(value is not None for value in values)
      mean, error = tables.mean_and_error(values) if known else (None, None)
      row[f"{field}_mean"], row[f"{field}_error"] = mean, error
    low = lowest(ranking, count)
    row["wrong_lowest"] = int(truth.wrong[low].sum())
    row["unknown_lowest"] = int((~truth.known[low]).sum())
    rows.append(row)
  return rows
