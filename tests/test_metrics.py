"""Metrics against their definitions, computed by brute force."""

import itertools
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from gradmimic_jax import metrics


def scores_and_classes(seed, n=60):
  rng = np.random.default_rng(seed)
  # Rounded, so that there are ties.
  return rng.normal(size=n).round(1), rng.random(n) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_the_share_of_ordered_pairs(seed):
  scores, positive = scores_and_classes(seed)
  pairs = list(itertools.product(scores[positive], scores[~positive]))
  want = np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])
  assert metrics.auroc(scores, positive) == pytest.approx(want, abs=1e-12)
  assert metrics.auroc(-scores, positive) == pytest.approx(1 - want, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_its_sum(seed):
  scores, positive = scores_and_classes(seed)
  want, recall_before = 0.0, 0.0
  for cut in sorted(set(scores), reverse=True):
    called = scores >= cut
    recall = (called & positive).sum() / positive.sum()
    want += (recall - recall_before) * positive[called].mean()
    recall_before = recall
  got = metrics.average_precision(scores, positive)
  assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_detection_matches_scikit_learn(seed):
  scores, noisy = scores_and_classes(seed)
  keep = scores > -0.2
  got = metrics.detection(scores, keep, noisy)
  assert got.auroc == pytest.approx(metrics.auroc(-scores, noisy))
  assert got.average_precision == pytest.approx(
    metrics.average_precision(-scores, noisy)
  )
  assert got.precision == sklearn_metrics.precision_score(noisy, ~keep)
  assert got.recall == sklearn_metrics.recall_score(noisy, ~keep)
  assert got.f1 == pytest.approx(sklearn_metrics.f1_score(noisy, ~keep))
  assert metrics.f1(~keep, noisy) == got.f1
  assert all(type(value) is float for value in got)


@pytest.mark.parametrize("bins", [1, 3, 10])
def test_calibration_error_is_the_brute_force_one(bins):
  rng = np.random.default_rng(bins)
  p = np.append(rng.random(500) ** 2, [0.0, 1.0, 1 / 3, 0.5])
  truth = rng.random(504) < 0.4
  want = 0.0
  for k in range(bins):
    inside = (p >= k / bins) & ((p < (k + 1) / bins) | (k == bins - 1))
    want += inside.mean() * abs(p[inside].mean() - truth[inside].mean())
  got = metrics.calibration_error(p, truth, bins=bins)
  assert got == pytest.approx(want, rel=1e-12)
  assert metrics.calibration_error(truth.astype(float), truth) == 0
  sure = metrics.calibration_error((p > 0.5).astype(float), truth)
  assert sure <= ((p > 0.5) != truth).mean()
  with pytest.raises(
    ValueError, match=r"from -0\.5 to 1\.0; expected \[0, 1\]"
  ):
    metrics.calibration_error([-0.5, 1.0], [True, False])
  with pytest.raises(ValueError, match="bins is 0"):
    metrics.calibration_error([0.5], [True], bins=0)


def test_low_scores_and_drops_speak_for_mislabelled():
  noisy = np.array([True, False, False, True])
  scores = np.where(noisy, -1.0, 1.0)
  assert metrics.detection(scores, ~noisy, noisy) == (1, 1, 1, 1, 1)
  inverted = metrics.detection(-scores, noisy, noisy)
  assert inverted.auroc == inverted.recall == inverted.f1 == 0


@pytest.mark.parametrize(
  ("keep", "noisy", "nan_fields"),
  [
    (
      [True, True, True],
      [False, False, False],
      {"auroc", "average_precision", "precision", "recall", "f1"},
    ),
    (
      [True, False, True],
      [False, False, False],
      {"auroc", "average_precision", "recall"},
    ),
    ([True, False, True], [True, True, True], {"auroc"}),
    ([True, True, True], [True, False, True], {"precision"}),
  ],
)
def test_undefined_values_are_nan(keep, noisy, nan_fields):
  got = metrics.detection([1.0, 2.0, 3.0], keep, noisy)
  assert {k for k, v in got._asdict().items() if math.isnan(v)} == nan_fields
  if all(noisy):
    assert got.average_precision == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
  with pytest.raises(ValueError, match="1 of 3 scores are NaN or infinite"):
    metrics.auroc([1.0, bad, 2.0], [True, False, True])


@pytest.mark.parametrize(
  ("scores", "classes", "error", "message"),
  [
    ([1.0, 2.0], [True], ValueError, r"scores has shape \(2,\)"),
    ([[1.0]], [[True]], ValueError, r"is_positive has shape \(1, 1\)"),
    ([], [], ValueError, r"is_positive has shape \(0,\)"),
    ([1.0, 2.0], [0, 1], TypeError, "is_positive has dtype int"),
    (["a", "b"], [True, False], TypeError, "scores has dtype <U1"),
  ],
)
def test_bad_input(scores, classes, error, message):
  for metric in (metrics.auroc, metrics.average_precision):
    with pytest.raises(error, match=message):
      metric(scores, classes)


def test_decisions_of_different_lengths_are_refused():
  with pytest.raises(ValueError, match=r"predicted has shape \(1,\)"):
    metrics.f1([True], [True, False])
  with pytest.raises(ValueError, match=r"keep has shape \(1,\)"):
    metrics.detection([1.0, 2.0], [True], [True, False])
  with pytest.raises(TypeError, match="keep has dtype float64"):
    metrics.detection([1.0, 2.0], [0.2, 0.9], [True, False])
