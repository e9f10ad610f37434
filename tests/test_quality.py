"""Answers: issues, quality, how much to remove, members, subsets."""

import dataclasses

import numpy as np
import pytest

import gradmimic_jax.selection as gs
from gradmimic_jax import metrics
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import Selection, pooling, select


def noisy_scores(seed, rate=0.4, n=1500, n_steps=6):
  """Two overlapping groups, with a share of each step of its own."""
  rng = np.random.default_rng(seed)
  noisy = rng.permutation(n) < rate * n
  center = np.where(noisy, -1.0, 1.0)[:, None]
  size = np.geomspace(1, 0.001, n_steps)
  return size * (center + rng.normal(0, 0.55, (n, n_steps))), noisy


def made(p, quality=None, keep=None, votes=None):
  """A selection with given probabilities."""
  p = np.asarray(p, np.float64)
  if votes is None:
    votes = np.where(np.isnan(p), -1, p >= 0.5)[:, None]
  return Selection(
    np.arange(len(p)) + 100,
    ~(p < 0.5) if keep is None else np.asarray(keep),
    p,
    np.asarray(votes, np.int8),
    {"aggregate": "majority", "notes": []},
    None if quality is None else np.asarray(quality, np.float64),
  )


# Pooled scores and quality.


@pytest.mark.parametrize("n", [1, 2, 30, 5000])
def test_quality_rises_with_the_pooled_score(n):
  rng = np.random.default_rng(n)
  pooled = rng.normal(size=n).round(3)
  p = (rng.random(n) < 1 / (1 + np.exp(-4 * pooled))).astype(float)
  quality = pooling.calibrate_quality(pooled, p)
  assert ((quality >= 0) & (quality <= 1)).all()
  order = np.argsort(pooled)
  rises = np.diff(quality[order])
  apart = np.diff(pooled[order]) > 0
  assert (rises[apart] > 0).all()
  assert (rises[~apart] == 0).all()
  if n > 1000:
    assert metrics.calibration_error(quality, p == 1) < 0.02


def test_quality_is_known_where_scores_are():
  pooled = np.array([-1.0, 2.0, np.nan, 0.5])
  quality = pooling.calibrate_quality(pooled, np.array([0.0, 1.0, 1.0, np.nan]))
  assert np.isnan(quality).tolist() == [False, False, True, False]
  assert quality[0] < quality[3] < quality[1]
  # Without a probability there is only the order.
  nothing = pooling.calibrate_quality(pooled, np.full(4, np.nan))
  assert nothing[0] < nothing[3] == 0.5 < nothing[1]
  assert abs(nothing[[0, 1, 3]] - 0.5).max() < 1e-3


def test_scores_that_differ_by_rounding_have_a_quality():
  # Isotonic regression by score merged such scores, and knew none beyond.
  pooled = 1.0 + np.arange(200) * 2e-16
  quality = pooling.calibrate_quality(pooled, np.arange(200) % 2 == 0)
  assert np.isfinite(quality).all()


@pytest.mark.parametrize(
  "rate", [0.4, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.2, 0.6))]
)
def test_probabilities_and_qualities_are_calibrated(rate):
  scores, noisy = noisy_scores(1, rate)
  got = select(scores)
  assert metrics.calibration_error(got.keep_probability, ~noisy) <= 0.05
  assert metrics.calibration_error(got.quality, ~noisy) <= 0.05
  assert metrics.auroc(got.quality, ~noisy) > 0.99
  np.testing.assert_array_equal(gs.label_quality_scores(scores), got.quality)
  np.testing.assert_array_equal(gs.label_quality_scores(got), got.quality)


# Issues.


def test_issues_are_a_mask_or_ranked_indices(tmp_path):
  scores, noisy = noisy_scores(2, n=400)
  mask = gs.find_label_issues(scores)
  assert mask.dtype == bool
  assert metrics.f1(mask, noisy) > 0.95
  selection = select(scores)
  for ranking in ("quality", "keep_probability"):
    ranked = gs.find_label_issues(scores, return_indices_ranked_by=ranking)
    assert set(ranked) == set(np.flatnonzero(mask))
    values = getattr(selection, ranking)[ranked]
    assert (np.diff(values) >= 0).all()
  half = gs.find_label_issues(
    selection, frac_noise=0.5, return_indices_ranked_by="quality"
  )
  whole = gs.find_label_issues(selection, return_indices_ranked_by="quality")
  assert half.tolist() == whole[: int(np.ceil(len(whole) / 2))].tolist()
  with ScoreLedger(tmp_path) as ledger:
    for step, column in enumerate(scores.T):
      ledger.append(np.arange(400), column, step=step, epoch=step)
  np.testing.assert_array_equal(gs.find_label_issues(ledger), mask)


def test_every_class_is_left_some():
  selection = made(
    [0.1, 0.2, 0.3, 0.9, 0.4, np.nan], [0.1, 0.2, 0.3, 0.9, 0.4, np.nan]
  )
  labels = ["a", "a", "a", "b", "b", "c"]

  def issues(least, **options):
    return gs.find_label_issues(
      selection, labels, min_examples_per_class=least, **options
    ).tolist()

  ranked = {"return_indices_ranked_by": "quality"}
  assert issues(0, **ranked) == [0, 1, 2, 4]
  assert issues(1, **ranked) == [0, 1, 4]
  assert issues(2, **ranked) == [0]
  assert issues(5, **ranked) == []
  assert issues(1) == [True, True, False, False, True, False]
  assert gs.find_label_issues(selection).sum() == 4


# The data set.


@pytest.mark.parametrize(
  "rate", [0.4, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.2, 0.6))]
)
def test_the_clean_fraction_is_found_with_its_interval(rate):
  scores, noisy = noisy_scores(3, rate)
  got = gs.dataset_quality(select(scores))
  assert abs(got.clean_fraction - (1 - rate)) < 0.03
  assert got.low <= 1 - noisy.mean() <= got.high
  assert 0.02 < got.high - got.low < 0.12
  wider = gs.dataset_quality(select(scores), level=0.99)
  assert wider.low <= got.low
  assert wider.high >= got.high


def test_the_interval_of_one_step_is_that_of_a_share():
  # Majority of one vote: a mean of independent zeros and ones.
  rng = np.random.default_rng(0)
  p = (rng.random(900) < 0.7).astype(float)
  got = gs.dataset_quality(made(p), n_bootstrap=2000)
  sigma = np.sqrt(p.mean() * (1 - p.mean()) / 900)
  assert got.clean_fraction == p.mean()
  assert got.low == pytest.approx(p.mean() - 1.96 * sigma, abs=0.15 * sigma)
  assert got.high == pytest.approx(p.mean() + 1.96 * sigma, abs=0.15 * sigma)


def test_steps_that_disagree_widen_the_interval():
  votes = np.zeros((1000, 3), np.int8)
  for step, share in enumerate((200, 500, 800)):
    votes[:share, step] = 1
  split = made(votes.mean(axis=1), votes=votes)
  agree = made(votes[:, 1], votes=votes[:, [1, 1, 1]])
  wide, narrow = map(gs.dataset_quality, (split, agree))
  assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_interval_holds_the_share_kept():
  got = gs.dataset_quality(made(np.full(50, 0.8)))
  assert (got.clean_fraction, got.high) == (pytest.approx(0.8), 1.0)
  clean = np.random.default_rng(0).lognormal(0, 1, (500, 5))
  got = gs.dataset_quality(select(clean))
  # Nobody of 500 is what a share of .6 % shows in one of twenty sets.
  assert (got.low, got.high) == (pytest.approx(0.994, abs=1e-3), 1.0)


def test_what_is_unknown_has_words():
  got = gs.dataset_quality(select(np.zeros((4, 2))))
  assert "unknown" in str(got)
  assert "nan" not in str(got)


@pytest.mark.parametrize(
  "clean_fraction", [0.9, pytest.param(0.95, marks=pytest.mark.slow)]
)
def test_a_lone_population_may_be_two_that_overlap(clean_fraction):
  rng = np.random.default_rng(0)
  clean = rng.permutation(1500) < clean_fraction * 1500
  scores = np.where(clean, 1.0, -1.0)[:, None] + rng.normal(0, 1, (1500, 1))
  scores = scores + rng.normal(0, 0.3, (1500, 5))
  selection = select(scores, mark=0.0)
  assert selection.keep.all()
  got = gs.dataset_quality(selection)
  assert got.low < clean.mean() < got.high == 1.0
  assert got.low <= (scores > 0).mean() + 0.03


def test_without_a_vote_nothing_is_said():
  got = gs.dataset_quality(made([np.nan, np.nan]))
  assert np.isnan([got.clean_fraction, got.low, got.high]).all()
  assert (got.kept_fraction, got.unvoted) == (1.0, 2)
  curve = gs.removal_curve(made([np.nan, np.nan]))
  assert len(curve.removed) == curve.recommended == 0
  with pytest.raises(ValueError, match="no step has a vote"):
    gs.subset(made([np.nan], [np.nan]), 1)


def test_the_removal_curve_is_the_brute_force_one():
  p = np.array([0.05, 0.95, 0.5, np.nan, 0.3, 0.7])
  curve = gs.removal_curve(made(p))
  worst = np.sort(p[~np.isnan(p)])
  assert curve.removed.tolist() == [1, 2, 3, 4, 5]
  for k, precision, recall in zip(*curve[:3], strict=True):
    assert precision == pytest.approx(np.mean(1 - worst[:k]))
    assert recall == pytest.approx(np.sum(1 - worst[:k]) / np.sum(1 - worst))
  assert (curve.recommended, curve.uncertain) == (2, (1, 4))
  assert "remove 2 samples; 1 are almost certainly" in str(curve)
  coarse = gs.removal_curve(made(p), max_points=2)
  assert coarse.removed.tolist() == [1, 5]


def test_estimated_precision_is_the_true_one():
  scores, noisy = noisy_scores(4)
  selection = select(scores)
  curve = gs.removal_curve(selection)
  order = np.lexsort((selection.quality, selection.keep_probability))
  true = np.cumsum(noisy[order])[curve.removed - 1] / curve.removed
  assert np.abs(curve.precision - true).max() < 0.05
  assert abs(curve.recommended - noisy.sum()) < 40


def test_the_class_table_counts_classes():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 7, 300) * 3  # not every integer is a class
  p, quality = rng.random(300), rng.random(300)
  quality[labels == 6] = np.nan
  selection = made(p, quality)
  rows = gs.class_table(selection, labels).to_pylist()
  assert [r["Class Index"] for r in rows] != sorted(set(labels))
  assert sorted(r["Class Index"] for r in rows) == sorted(set(labels))
  noise = [r["Label Noise"] for r in rows]
  assert noise == sorted(noise, reverse=True)
  for row in rows:
    inside = labels == row["Class Index"]
    assert row["Class Name"] == str(row["Class Index"])
    assert row["Samples"] == inside.sum()
    assert row["Label Issues"] == (p[inside] < 0.5).sum()
    assert row["Label Noise"] == (p[inside] < 0.5).mean()
    if row["Class Index"] == 6:
      assert row["Label Quality Score"] is None
    else:
      assert row["Label Quality Score"] == pytest.approx(quality[inside].mean())
  text = gs.class_table(made([0.1, 0.9]), ["ship", "cat"]).to_pylist()
  assert [r["Class Name"] for r in text] == ["ship", "cat"]
  assert [r["Class Index"] for r in text] == [1, 0]


# Members and subsets.


def test_members_are_found_and_compared():
  quality = [0.9, 0.2, 0.8, 0.1, 0.7, np.nan]
  selection = made([1.0, 0, 1, 0, 0.4, np.nan], quality)
  got = gs.discover_members(selection, members=[100, 104])
  assert got.ids.tolist() == [100, 102]
  assert got.mask.tolist() == [True, False, True, False, False, False]
  assert got.jaccard == 1 / 3
  assert got.auroc == 7 / 8
  three = gs.discover_members(selection, count=3)
  assert three.ids.tolist() == [100, 102, 104]
  assert np.isnan([three.jaccard, three.auroc]).all()


def test_a_budget_takes_the_best():
  rng = np.random.default_rng(0)
  quality = rng.random(100)
  selection = made(quality, quality)
  want = 100 + np.argsort(-quality)
  assert gs.subset(selection, 7).tolist() == want[:7].tolist()
  assert gs.subset(selection, 0.25).tolist() == want[:25].tolist()
  assert gs.subset(selection, 1.0).tolist() == want.tolist()


def test_class_balanced_fills_up_from_the_others():
  rng = np.random.default_rng(1)
  quality = rng.random(100)
  labels = np.array([0] * 70 + [1] * 27 + [2] * 3)
  got = gs.subset(
    made(quality, quality), 45, labels=labels, class_balanced=True
  )
  rows = got - 100
  assert np.bincount(labels[rows]).tolist() == [21, 21, 3]
  for label in range(3):
    inside = np.flatnonzero(labels == label)
    best = inside[np.argsort(-quality[inside])]
    taken = rows[labels[rows] == label]
    assert taken.tolist() == best[: len(taken)].tolist()


@pytest.mark.parametrize(
  ("ask", "error", "message"),
  [
    (
      lambda s: gs.find_label_issues(s, return_indices_ranked_by="margin"),
      ValueError,
      "expected None for a mask, or",
    ),
    (lambda s: gs.find_label_issues(s, [0]), ValueError, "there are 2 samples"),
    (lambda s: gs.find_label_issues(s, [0.5, 1]), TypeError, "dtype float64"),
    (lambda s: gs.find_label_issues(s, [0, -1]), ValueError, "holds -1"),
    (lambda s: gs.find_label_issues(s, frac_noise=0), ValueError, "frac_noise"),
    (
      lambda s: gs.find_label_issues(s, min_examples_per_class=-1),
      ValueError,
      "expected >= 0",
    ),
    (lambda s: gs.find_label_issues(s, seed=1), TypeError, "a Selection"),
    (lambda s: gs.dataset_quality(s, level=1), ValueError, "level is 1"),
    (lambda s: gs.dataset_quality(s, n_bootstrap=1), ValueError, "at least 2"),
    (lambda s: gs.removal_curve(s, sure=0.4), ValueError, "sure is"),
    (lambda s: gs.removal_curve(s, max_points=1), ValueError, "at least 2"),
    (lambda s: gs.class_table(s, [0, 5], names=["a"]), ValueError, "holds 5"),
    (lambda s: gs.subset(s, 3), ValueError, "expected 1 to 2"),
    (lambda s: gs.subset(s, 0), ValueError, "budget is 0"),
    (lambda s: gs.subset(s, 1.5), ValueError, "budget is 1.5"),
    (
      lambda s: gs.subset(s, 1, class_balanced=True),
      ValueError,
      "needs labels",
    ),
    (lambda s: gs.subset(s, 1, labels=[0, 1]), ValueError, "no effect"),
    (
      lambda s: gs.discover_members(s, members=[100, 7]),
      ValueError,
      "of which 1 are",
    ),
    (
      lambda s: gs.discover_members(s, members=[100, 100]),
      ValueError,
      "each once",
    ),
    (
      lambda s: gs.label_quality_scores(dataclasses.replace(s, quality=None)),
      ValueError,
      "has no quality",
    ),
    (lambda s: gs.find_label_issues([1.0]), ValueError, r"expected \[N, T\]"),
  ],
)
def test_bad_input(ask, error, message):
  with pytest.raises(error, match=message):
    ask(made([0.1, 0.9], [0.1, 0.9]))
