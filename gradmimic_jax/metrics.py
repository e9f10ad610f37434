"""Metrics of how well scores and decisions find what they should find.

Two sign conventions meet here. `auroc`, `average_precision` and `f1` are the
textbook ones: a *high* score speaks for the positive class. `detection` looks
for mislabelled samples, which mimic scores mark by *low* values, and turns the
sign itself. NumPy in, Python floats out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class DetectionMetrics(NamedTuple):
  """The success of a search for mislabelled samples, which are "positive".

  A value is nan where the data leave it undefined (see `detection`).
  """

  auroc: float  # P(a mislabelled sample scores below a clean one)
  average_precision: float  # precision averaged over recall, lowest first
  precision: float  # mislabelled among the dropped
  recall: float  # dropped among the mislabelled
  f1: float  # harmonic mean of precision and recall


def auroc(scores: Any, is_positive: Any) -> float:
  """The area under the ROC curve; a high score speaks for "positive".

  P(score of a positive > score of a negative), ties counting one half. nan
  where only one class is there.

  Args:
    scores: real numbers [N], finite.
    is_positive: booleans [N].

  Returns:
    The area, in [0, 1].

  Raises:
    TypeError: classes that aren't booleans or scores that aren't numbers.
    ValueError: arrays that aren't [N] with one N >= 1, scores not finite.

  Example:
    >>> auroc([0.1, 0.4, 0.8, 0.9], [False, True, False, True])
    0.75
  """
  scores, is_positive = _checked(scores, is_positive, "is_positive")
  if is_positive.all() or not is_positive.any():
    return float("nan")
  # scikit-learn takes more than a second to import; training needs none of it.
  from sklearn.metrics import roc_auc_score

  return float(roc_auc_score(is_positive, scores))


def average_precision(scores: Any, is_positive: Any) -> float:
  """The average precision; a high score speaks for "positive".

  sum_n (R_n - R_{n-1}) P_n over the thresholds, with precision P and recall R.
  nan where there is no positive; 1 where there is no negative.

  Args:
    scores: real numbers [N], finite.
    is_positive: booleans [N].

  Returns:
    The average precision, in [0, 1].

  Raises:
    TypeError: classes that aren't booleans or scores that aren't numbers.
    ValueError: arrays that aren't [N] with one N >= 1, scores not finite.

  Example:
    >>> average_precision([0.1, 0.4, 0.9], [False, True, False])
    0.5
  """
  scores, is_positive = _checked(scores, is_positive, "is_positive")
  if not is_positive.any():
    return float("nan")
  # See `auroc` for why the import is here.
  from sklearn.metrics import average_precision_score

  return float(average_precision_score(is_positive, scores))


def f1(predicted: Any, actual: Any) -> float:
  """The F1 of a decision: 2 TP / (2 TP + FP + FN).

  nan where nothing is predicted and nothing is there to be found.

  Args:
    predicted: booleans [N], True where the sample is called positive.
    actual: booleans [N], True where it is positive.

  Returns:
    The harmonic mean of precision and recall, in [0, 1].

  Raises:
    TypeError: arrays that aren't booleans.
    ValueError: arrays that aren't [N] with one N >= 1.

  Example:
    >>> f1([True, True, False, False], [True, False, False, False])
    0.6666666666666666
  """
  return _decision(predicted, "predicted", actual, "actual")[2]


def calibration_error(
  probability: Any, is_positive: Any, *, bins: int = 10
) -> float:
  """The expected calibration error: probabilities against frequencies.

  `sum_k n_k / N |p_k - f_k|`, with p_k the mean probability and f_k the share
  of positives in bin k, over bins of equal width; 1 belongs to the last one. It
  is 0 for calibrated probabilities, and the share of errors if they are only 0
  and 1.

  Args:
    probability: of being positive [N], in [0, 1].
    is_positive: booleans [N].
    bins: the number of bins that [0, 1] is cut into.

  Returns:
    The error, in [0, 1].

  Raises:
    TypeError: classes that aren't booleans, probabilities that aren't numbers.
    ValueError: arrays that aren't [N] with one N >= 1, values outside [0, 1],
      fewer than one bin.

  Example:
    >>> calibration_error([0.0, 0.75, 0.75, 1.0], [False, True, False, True])
    0.125

  References:
    Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian
    Binning, 2015.
  """
  p, is_positive = _checked(probability, is_positive, "is_positive")
  if p.min() < 0 or p.max() > 1:
    raise ValueError(
      f"probability goes from {p.min()} to {p.max()}; expected [0, 1]."
    )
  if bins < 1:
    raise ValueError(f"bins is {bins}; expected at least 1.")
  place = np.minimum((p * bins).astype(np.int64), bins - 1)
  surplus = np.bincount(place, p - is_positive, minlength=bins)
  return float(np.abs(surplus).sum() / len(p))


def detection(scores: Any, keep: Any, is_mislabelled: Any) -> DetectionMetrics:
  """Measures how well scores and a selection find the mislabelled samples.

  "Positive" is mislabelled. Scores are mimic scores, so a *low* one is
  suspicious, and a sample is called mislabelled where keep is False. The paper
  reports the F1 (arXiv 2501.06708, Table 2).

  | edge case                           | nan                                 |
  |-------------------------------------|-------------------------------------|
  | no sample is mislabelled            | auroc, average_precision, recall    |
  | every sample is mislabelled         | auroc                               |
  | nothing is dropped                  | precision                           |
  | nothing dropped, none mislabelled   | f1 as well                          |

  Args:
    scores: mimic scores [N], finite, high = good; over several steps, their
      mean.
    keep: booleans [N], as `Selection.keep`.
    is_mislabelled: booleans [N], the truth.

  Returns:
    DetectionMetrics(auroc, average_precision, precision, recall, f1).

  Raises:
    TypeError: decisions that aren't booleans or scores that aren't numbers.
    ValueError: arrays that aren't [N] with one N >= 1, scores not finite.

  Example:
    >>> detection(
    ...   scores=[1.0, 2.0, -3.0, -1.0],
    ...   keep=[True, True, False, False],
    ...   is_mislabelled=[False, False, True, False],
    ... )
    DetectionMetrics(auroc=1.0, average_precision=1.0, precision=0.5,
                     recall=1.0, f1=0.66...)
  """
  scores, is_mislabelled = _checked(scores, is_mislabelled, "is_mislabelled")
  dropped = ~_booleans(keep, "keep")
  precision, recall, f1_value = _decision(
    dropped, "keep", is_mislabelled, "is_mislabelled"
  )
  return DetectionMetrics(
    auroc(-scores, is_mislabelled),
    average_precision(-scores, is_mislabelled),
    precision,
    recall,
    f1_value,
  )


def _decision(
  predicted: Any, predicted_name: str, actual: Any, actual_name: str
) -> tuple[float, float, float]:
  """Computes precision, recall and F1, nan where undefined."""
  predicted = _booleans(predicted, predicted_name)
  actual = _booleans(actual, actual_name)
  if predicted.shape != actual.shape:
    raise ValueError(
      f"{predicted_name} has shape {predicted.shape} and {actual_name}"
      f" {actual.shape}; expected [N] twice."
    )
  found = int((predicted & actual).sum())
  n_predicted, n_actual = int(predicted.sum()), int(actual.sum())
  return (
    found / n_predicted if n_predicted else float("nan"),
    found / n_actual if n_actual else float("nan"),
    2 * found / (n_predicted + n_actual)
    if n_predicted + n_actual
    else float("nan"),
  )


def steps_to(steps: Any, values: Any, target: float) -> float | None:
  """Finds where a falling curve is at a value, or below, for the first time.

  Args:
    steps: at which it was measured [K], ascending.
    values: what was measured [K]; NaN reaches nothing.
    target: the value.

  Returns:
    The step, on the line from the measurement before; None if it never is.

  Example:
    >>> steps_to([0, 10, 20], [3.0, 2.0, 1.0], 1.5)
    15.0
  """
  reached = np.flatnonzero(np.asarray(values) <= target)
  if not len(reached):
    return None
  k = int(reached[0])
  if k == 0 or not np.isfinite(values[k - 1]):
    return float(steps[k])
  share = (values[k - 1] - target) / (values[k - 1] - values[k])
  return float(steps[k - 1] + share * (steps[k] - steps[k - 1]))


def _checked(
  scores: Any, classes: Any, classes_name: str
) -> tuple[np.ndarray, np.ndarray]:
  scores = np.asarray(scores)
  classes = _booleans(classes, classes_name)
  if scores.shape != classes.shape:
    raise ValueError(
      f"scores has shape {scores.shape} and {classes_name} {classes.shape};"
      " expected [N] twice."
    )
  if not np.can_cast(scores.dtype, np.float64, "same_kind"):
    raise TypeError(f"scores has dtype {scores.dtype}; expected real numbers.")
  scores = scores.astype(np.float64)
  n_bad = int((~np.isfinite(scores)).sum())
  if n_bad:
    raise ValueError(
      f"{n_bad} of {scores.size} scores are NaN or infinite, which have no"
      " place in a ranking. Leave those samples out, and say how many:"
      " ok = np.isfinite(scores)."
    )
  return scores, classes


def _booleans(values: Any, name: str) -> np.ndarray:
  array = np.asarray(values)
  if array.ndim != 1 or not array.size:
    raise ValueError(f"{name} has shape {array.shape}; expected [N], N >= 1.")
  if array.dtype != np.bool_:
    raise TypeError(
      f"{name} has dtype {array.dtype}; expected booleans. Compare first, for"
      f" example {name} == 1."
    )
  return array
