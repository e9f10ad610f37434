"""Votes, their aggregation and the decision."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from gradmimic_jax import metrics
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import Cut, Selection, binarize, select
from gradmimic_jax.selection.label_model import KeepProbability, majority

METHODS = {
  "auto": {},
  "threshold": {"threshold": 0.1},
  "kmeans": {},
  "gmm": {},
  "top_fraction": {"fraction": 0.6},
}


def noisy_scores(seed, n=600, n_steps=5, rate=0.4):
  """Scores like a run's: a narrow clean group and a wide mislabelled one."""
  rng = np.random.default_rng(seed)
  noisy = np.arange(n) < rate * n
  clean = np.abs(rng.standard_t(5, (n, n_steps))) * 0.5
  bad = -rng.gamma(2.0, 3.0, (n, n_steps))
  return np.where(noisy[:, None], bad, clean).astype(np.float32), noisy


# Majority.


def test_majority_is_the_brute_force_one():
  votes = np.random.default_rng(0).integers(-1, 2, (300, 4)).astype(np.int8)
  votes[0] = -1
  want = []
  for row in votes:
    cast = [v for v in row if v >= 0]
    want.append(sum(cast) / len(cast) if cast else math.nan)
  got, _ = majority(votes)
  assert math.isnan(got[0])
  np.testing.assert_allclose(got, want, rtol=1e-15)


def test_drops_only_below_one_half():
  scores = np.array(
    [
      [1, 1, 1, -1],
      [1, 1, -1, -1],
      [1, -1, -1, -1],
      [np.nan, np.nan, np.inf, -np.inf],
      [np.nan, -1, np.nan, np.nan],
    ]
  )
  got = select(
    scores, binarize="threshold", aggregate="majority", ids=[4, 2, 0, 1, 3]
  )
  assert got.keep.tolist() == [True, True, False, True, False]
  np.testing.assert_array_equal(
    got.keep_probability, [0.75, 0.5, 0.25, np.nan, 0]
  )
  assert got.votes.tolist() == [
    [1, 1, 1, 0],
    [1, 1, 0, 0],
    [1, 0, 0, 0],
    [-1, -1, -1, -1],
    [-1, 0, -1, -1],
  ]
  assert got.votes.dtype == np.int8
  assert got.kept_ids.tolist() == [4, 2, 1]
  assert got.dropped_ids.tolist() == [0, 3]
  assert got.kept_fraction == 0.6
  about = got.diagnostics
  assert (about["ties"], about["unvoted"], about["abstentions"]) == (1, 1, 7)
  assert about["coverages"] == [0.6, 0.8, 0.6, 0.6]
  assert about["keep_shares"] == [1, 0.5, pytest.approx(1 / 3), 0]


# Every binariser.


@pytest.mark.parametrize("method", METHODS)
def test_votes_are_monotone_in_the_score(method):
  for seed in range(2):
    scores, _ = noisy_scores(seed, n=300)
    scores[::50] *= 100  # extreme on both sides
    got = select(scores, binarize=method, **METHODS[method])
    for column, votes in zip(scores.T, got.votes.T, strict=True):
      assert (np.diff(votes[np.argsort(column)]) >= 0).all()
      assert set(votes) == {0, 1}


@pytest.mark.parametrize("method", METHODS)
def test_order_of_samples_does_not_matter(method):
  scores, _ = noisy_scores(0)
  order = np.random.default_rng(1).permutation(len(scores))
  got = select(scores, binarize=method, **METHODS[method])
  shuffled = select(scores[order], binarize=method, **METHODS[method])
  agree = got.votes[order] == shuffled.votes
  assert agree.mean() > (
    0.99 if method in ("auto", "gmm", "kmeans") else 0.999999
  )


@pytest.mark.parametrize(
  ("method", "scale"),
  [
    case
    if case in (("kmeans", 1e-6), ("gmm", 1e6), ("top_fraction", 1e6))
    else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(
      ("kmeans", "gmm", "top_fraction"), (1e-6, 1e6)
    )
  ],
)
def test_the_unit_and_the_zero_of_scores_do_not_matter(method, scale):
  scores, _ = noisy_scores(1)
  scores = scores.astype(np.float64)
  got = select(scores, binarize=method, **METHODS[method])
  moved = select((scores + 3) * scale, binarize=method, **METHODS[method])
  assert (got.votes == moved.votes).mean() > 0.999
  np.testing.assert_allclose(
    moved.diagnostics["cuts"],
    (np.array(got.diagnostics["cuts"]) + 3) * scale,
    rtol=1e-4,
  )


@pytest.mark.parametrize(
  ("method", "rate"),
  [
    case
    if case in (("auto", 0.2), ("gmm", 0.4), ("threshold", 0.6))
    else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(("auto", "gmm", "threshold"), (0.2, 0.4, 0.6))
  ],
)
def test_a_narrow_and_a_wide_group_are_told_apart(method, rate):
  scores, noisy = noisy_scores(2, rate=rate)
  got = select(scores, binarize=method)
  assert metrics.f1(~got.keep, noisy) > 0.98


@pytest.mark.parametrize(
  ("method", "rate"),
  [
    case
    if case
    in (("auto", 0.6), ("gmm", 0.4), ("kmeans", 0.2), ("threshold", 0.6))
    else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(
      ("auto", "gmm", "kmeans", "threshold"), (0.2, 0.4, 0.6)
    )
  ],
)
def test_two_groups_of_one_width_are_told_apart(method, rate):
  # k-means is only promised this: it cuts a wide group in two.
  noisy = np.arange(500) < 500 * rate
  noise = np.random.default_rng(0).normal(size=(500, 3))
  got = select(np.where(noisy, -3, 3)[:, None] + noise, binarize=method)
  assert metrics.f1(~got.keep, noisy) > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_in_the_seed(method):
  scores, _ = noisy_scores(3, n=300)
  a, b = (select(scores, binarize=method, **METHODS[method]) for _ in range(2))
  np.testing.assert_array_equal(a.votes, b.votes)
  assert a.diagnostics == b.diagnostics


def test_columns_are_binarised_by_themselves():
  scores, _ = noisy_scores(4, n=300, n_steps=3)
  scores[:, 1] *= 1000
  together = select(scores)
  for step in range(scores.shape[1]):
    alone = select(scores[:, step : step + 1])
    np.testing.assert_array_equal(alone.votes[:, 0], together.votes[:, step])


def test_a_large_column_is_fitted_on_a_subsample(monkeypatch):
  scores, _ = noisy_scores(5, n=8000, n_steps=1)
  whole = {m: select(scores, binarize=m) for m in ("gmm", "kmeans")}
  monkeypatch.setattr(binarize, "FIT_SIZE", 2000)
  for method, all_scores in whole.items():
    some = select(scores, binarize=method, seed=1)
    again = select(scores, binarize=method, seed=1)
    assert some.diagnostics["fit_size"] == 2000
    assert some.diagnostics["cuts"] == again.diagnostics["cuts"]
    assert some.diagnostics["cuts"] != all_scores.diagnostics["cuts"]
    assert (some.votes == all_scores.votes).mean() > 0.98


# One binariser each.


def test_threshold_is_strict_and_zero_by_default():
  scores = np.array([[-1.0], [0.0], [1e-30], [2.0]])
  assert select(scores, binarize="threshold").keep.tolist() == [0, 0, 1, 1]
  got = select(scores, binarize="threshold", threshold=-0.5)
  assert got.keep.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.25, 0.333, 0.7, 1.0])
def test_top_fraction_keeps_the_top(dtype, fraction):
  scores = np.random.default_rng(0).permutation(97).astype(dtype) - 40
  got = select(scores[:, None], binarize="top_fraction", fraction=fraction)
  n = max(1, round(fraction * 97))
  assert set(scores[got.keep]) == set(np.sort(scores)[97 - n :])


def test_top_fraction_keeps_ties():
  scores = np.array([3.0, 2.0, 2.0, 2.0, 1.0])[:, None]
  got = select(scores, binarize="top_fraction", fraction=0.4)
  assert got.keep.tolist() == [1, 1, 1, 1, 0]


def test_kmeans_is_the_best_split():
  scores, _ = noisy_scores(6, n=200, n_steps=1)
  column = np.sort(scores[:, 0].astype(np.float64))
  column = np.clip(column, *np.quantile(column, [0.01, 0.99]))
  spread = [
    column[:i].var() * i + column[i:].var() * (200 - i) for i in range(1, 200)
  ]
  got = select(scores, binarize="kmeans")
  assert int((~got.keep).sum()) == 1 + int(np.argmin(spread))


@pytest.mark.parametrize(
  "seed",
  [
    0,
    1,
    2,
    3,
    *(pytest.param(x, marks=pytest.mark.slow) for x in range(4, 20)),
  ],
)
def test_gmm_cut_is_where_the_posterior_rises_through_one_half(seed):
  rng = np.random.default_rng(seed)
  share = rng.dirichlet([2, 2])
  mean = np.sort(rng.normal(0, 2, 2))
  variance = rng.gamma(2, 1, 2)
  s = np.linspace(-60, 60, 240_001)
  high = np.log(share[1]) + stats.norm.logpdf(s, mean[1], variance[1] ** 0.5)
  low = np.log(share[0]) + stats.norm.logpdf(s, mean[0], variance[0] ** 0.5)
  rises = np.flatnonzero((high <= low)[:-1] & (high > low)[1:])
  got = binarize.upward_crossing(share, mean, variance)
  if len(rises):
    assert len(rises) == 1
    assert got == pytest.approx(s[rises[0]], abs=1e-3)
  else:
    assert math.isnan(got) or abs(got) > 60


@pytest.mark.parametrize("difference", [0.0, 1e-12, -1e-12])
def test_gmm_cut_of_equal_variances_is_stable(difference):
  got = binarize.upward_crossing(
    np.array([0.5, 0.5]), np.array([-1.0, 3.0]), np.array([1, 1 + difference])
  )
  assert got == pytest.approx(1.0)


def test_gmm_keeps_extreme_high_scores():
  # The wide lower component is the likelier source of 40 than the narrow upper.
  rng = np.random.default_rng(0)
  scores = np.r_[rng.normal(-6, 4, 500), rng.normal(1, 0.2, 500), 40.0]
  got = select(scores[:, None], binarize="gmm")
  assert got.keep[-1]
  assert got.diagnostics["fits"][0]["low_std"] > 2


def test_gmm_of_two_distinct_values():
  scores = np.array([0.0, 0.0, 0.0, 5.0, 5.0])[:, None]
  for method in ("gmm", "kmeans"):  # "auto" needs more than five scores
    got = select(scores, binarize=method)
    assert got.keep.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("method", ["auto", "gmm", "kmeans"])
def test_a_column_of_one_value_abstains(method):
  scores, _ = noisy_scores(7)
  scores[:, 2] = 0.25
  scores[:, 4] = np.nan
  got = select(scores, binarize=method)
  assert (got.votes[:, [2, 4]] == -1).all()
  assert (got.votes[:, [0, 1, 3]] >= 0).all()
  assert got.diagnostics["cuts"][2] is got.diagnostics["cuts"][4] is None
  assert got.diagnostics["keep_shares"][2] is None
  assert got.diagnostics["notes"] == [
    "",
    "",
    "all scores are equal",
    "",
    "no finite score",
  ]
  assert "step 2: all scores are equal" in str(got)


def test_scores_that_say_nothing_drop_nobody():
  # A reference equal to the learner gives zeros.
  got = select(np.zeros((4, 3)))
  assert got.keep.all()
  assert np.isnan(got.keep_probability).all()
  assert got.diagnostics["unvoted"] == 4
  assert "4 samples without a vote, kept" in str(got)
  single = select([[1.0, 2.0]])
  assert single.keep.all()


def test_one_population_abstains():
  # One component inside the other: the wide upper one wins nowhere or always.
  share, mean = np.array([0.01, 0.99]), np.array([-0.1, 0.1])
  assert math.isnan(binarize.upward_crossing(share, mean, np.array([1, 1.1])))
  got = select(
    np.array([[1.0], [2.0]]),
    binarize=lambda s, seed: Cut(math.nan, "one population"),
  )
  assert (got.votes == -1).all()
  assert got.diagnostics["notes"] == ["one population"]


# Ledgers, functions, and what is said about a selection.


def test_a_ledger_gives_ids_and_epochs(tmp_path):
  scores, _ = noisy_scores(8, n=50, n_steps=2)
  ids = np.random.default_rng(0).permutation(500)[:50]
  with ScoreLedger(tmp_path) as ledger:
    for column, epoch in enumerate((3, 7)):
      ledger.append(ids, scores[:, column], step=epoch, epoch=epoch)
  got = select(ledger)
  order = np.argsort(ids)
  want = select(scores[order, :], ids=ids[order])
  np.testing.assert_array_equal(got.ids, np.sort(ids))
  np.testing.assert_array_equal(got.votes, want.votes)
  assert got.diagnostics["steps"] == [3, 7]
  with pytest.raises(ValueError, match="a ledger brings its own"):
    select(ledger, ids=ids)


def test_a_ledger_without_rows_or_with_holes(tmp_path):
  with pytest.raises(ValueError, match="nowhere holds no rows"):
    select(ScoreLedger(tmp_path / "nowhere"))
  with ScoreLedger(tmp_path / "holes") as ledger:
    ledger.append([4, 9], [1.0, np.nan], step=0, epoch=0)
    ledger.append([2, 9], [-1.0, np.inf], step=1, epoch=1)
    ledger.append([2, 4], [-2.0, 0.5], step=2, epoch=2)
  got = select(ledger, binarize="threshold", aggregate="majority")
  assert got.ids.tolist() == [2, 4, 9]
  assert got.votes.tolist() == [[-1, 0, 0], [1, -1, 1], [-1, -1, -1]]
  assert got.keep.tolist() == [False, True, True]
  about = got.diagnostics
  assert (about["abstentions"], about["unvoted"]) == (5, 1)


def test_functions_for_binarize_and_aggregate():
  def halves(scores, seed):
    return Cut(float(np.median(scores)))

  def unanimous(votes):
    return KeepProbability((votes == 1).all(1).astype(float), {"voters": 2})

  scores = np.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
  got = select(scores, binarize=halves, aggregate=unanimous)
  assert not got.keep.any()
  assert got.diagnostics["binarize"] == "halves"
  assert got.diagnostics["aggregate"] == "unanimous"
  assert got.diagnostics["label_model"] == {"voters": 2}


@pytest.mark.parametrize("method", METHODS)
def test_diagnostics_are_plain_json(method):
  scores, _ = noisy_scores(9, n=60)
  scores[:, 0] = np.nan
  got = select(scores, binarize=method, **METHODS[method])
  text = json.dumps(got.diagnostics, allow_nan=False)
  assert json.loads(text) == got.diagnostics


def test_a_selection_is_frozen_and_says_what_it_is():
  got = select([[1.0], [-1.0]], binarize="threshold", ids=["x", "y"])
  assert isinstance(got, Selection)
  assert len(got) == 2
  assert repr(got) == "<Selection of 1 of 2 samples, 1 steps>"
  assert str(got).startswith("Selection: keeps 1 of 2 samples (50.0%)")
  assert got.kept_ids.tolist() == ["x"]
  with pytest.raises(AttributeError):
    got.keep = None


@pytest.mark.parametrize(
  ("scores", "options", "error", "message"),
  [
    (np.zeros((0, 3)), {}, ValueError, "at least one sample"),
    (np.zeros((3, 0)), {}, ValueError, "at least one sample"),
    ([1.0, 2.0], {}, ValueError, r"One step's scores are scores\[:, None\]"),
    (np.zeros((2, 2, 2)), {}, ValueError, r"expected \[N, T\]"),
    ([["a"]], {}, TypeError, "scores has dtype <U1"),
    ([[None]], {}, TypeError, "scores has dtype object"),
    ([[1.0]], {"binarize": "mean"}, ValueError, "'gmm', 'kmeans'"),
    ([[1.0]], {"binarize": 3}, TypeError, "binarize is 3; expected one of"),
    ([[1.0]], {"aggregate": "vote"}, ValueError, "'label_model', 'majority'"),
    ([[1.0]], {"aggregate": None}, TypeError, "aggregate is None"),
    ([[1.0]], {"threshold": 0.0}, ValueError, "threshold=0.0 has no effect"),
    ([[1.0]], {"fraction": 0.5}, ValueError, "use binarize='top_fraction'"),
    (
      [[1.0]],
      {"binarize": "threshold", "fraction": 0.5},
      ValueError,
      "fraction=0.5 has no effect",
    ),
    (
      [[1.0]],
      {"binarize": "threshold", "threshold": np.nan},
      ValueError,
      "threshold is nan",
    ),
    ([[1.0]], {"binarize": "top_fraction"}, ValueError, "needs fraction"),
    (
      [[1.0]],
      {"binarize": "top_fraction", "fraction": 0.0},
      ValueError,
      "0 < fraction <= 1",
    ),
    (
      [[1.0]],
      {"binarize": "top_fraction", "fraction": 1.5},
      ValueError,
      "fraction is 1.5",
    ),
    ([[1.0]], {"ids": [1, 2]}, ValueError, "but scores has 1 rows"),
    ([[1.0], [2.0]], {"ids": [5, 5]}, ValueError, "came 2 times"),
    ([[1.0]], {"ids": [-1]}, ValueError, "ids holds -1"),
    ([[1.0]], {"ids": [1.0]}, TypeError, "ids has dtype float64"),
  ],
)
def test_bad_input(scores, options, error, message):
  with pytest.raises(error, match=message):
    select(scores, **options)
