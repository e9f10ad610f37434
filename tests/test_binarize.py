"""The automatic binariser: two groups, one, or none to be seen."""

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from gradmimic_jax import metrics
from gradmimic_jax.selection import auto, binarize, select
from gradmimic_jax.selection.binarize import votes_of
from gradmimic_jax.selection.binarizers import make_binarizer
from gradmimic_jax.selection.label_model import (
  LABEL_MODELS,
  KeepProbability,
  majority,
  two_coin,
)


def run_scores(seed, rate, n=1500, n_steps=8):
  """Scores like a run's: the clean ones shrink as they are learned.

  Log-normal and positive at first, a thousandth and of either sign at last;
  the mislabelled ones stay where they are, below zero.
  """
  rng = np.random.default_rng(seed)
  noisy = np.arange(n) < rate * n
  size = np.geomspace(0.4, 0.0005, n_steps)
  spread = np.linspace(0.3, 1.5, n_steps)
  clean = size * rng.lognormal(0, spread, (n, n_steps))
  clean -= np.linspace(0, 0.1, n_steps) * size * rng.lognormal(0, 1.5, (n, 1))
  wrong = rng.normal(-0.8, 0.25, (n, n_steps))
  return np.where(noisy[:, None], wrong, clean).astype(np.float32), noisy


@pytest.mark.parametrize("seed", range(3))
def test_without_noise_at_most_2_percent_are_flagged(seed):
  scores, _ = run_scores(seed, 0.0)
  assert (scores[:, -1] < 0).any()  # zero alone would flag some
  # What a mixture takes for granted: that there are two.
  assert (~select(scores, binarize="gmm").keep).mean() > 0.2
  for columns in (slice(None), slice(0, 1), slice(-1, None)):
    assert (~select(scores[:, columns]).keep).mean() <= 0.02


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.4, 0.6, 0.9])
def test_noise_of_any_rate_is_found(rate):
  scores, noisy = run_scores(0, rate)
  got = select(scores)
  assert metrics.f1(~got.keep, noisy) > 0.95
  assert got.diagnostics["population"] == ""
  # A step by itself may take 2 % for a tail.
  for step in range(scores.shape[1] if rate >= 0.2 else 0):
    alone = select(scores[:, step : step + 1])
    assert metrics.f1(~alone.keep, noisy) > 0.9, step


def test_all_noise_is_all_dropped():
  scores, _ = run_scores(0, 1.0)
  got = select(scores)
  assert not got.keep.any()
  assert got.diagnostics["population"] == "one population below 0: all dropped"
  assert "all steps: one population below 0" in str(got)
  single = select(scores[:, :1])
  assert not single.keep.any()
  assert single.diagnostics["notes"] == ["one population below 0: all dropped"]


@pytest.mark.parametrize("offset", [0.0, -0.5, -1.0])
@pytest.mark.parametrize("separation", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("clean_fraction", [0.3, 1.0])
def test_weak_scores_never_drop_everything(clean_fraction, separation, offset):
  """Few are clean, or the scores are biased, and a model has hardly learned."""
  rng = np.random.default_rng(0)
  clean = rng.permutation(1500) < clean_fraction * 1500
  own = rng.normal(0, 0.77, (1500, 1))  # what a sample's steps have in common
  scores = own + rng.normal(0, 0.63, (1500, 6)) + offset
  scores += np.where(clean, 0.5, -0.5)[:, None] * separation
  got = select(scores * np.geomspace(1, 0.05, 6))
  if got.keep.all():
    assert np.isnan(got.keep_probability).all() or clean_fraction == 1.0
  else:
    assert clean_fraction == 0.3
    assert separation >= 2
    assert metrics.f1(~got.keep, ~clean) > (0.95 if separation == 4 else 0.85)


def test_pooled_scores_vote_where_no_step_tells():
  rng = np.random.default_rng(0)
  noisy = rng.permutation(1500) < 450
  centers = np.where(noisy, -1.0, 1.0)[:, None]
  scores = centers + rng.normal(0, 1.1, (1500, 8))
  assert {votes_of(scores, auto())[1][t].fit["groups"] for t in range(8)} == {1}
  got = select(scores)
  assert metrics.f1(~got.keep, noisy) > 0.98
  assert (got.votes == got.keep[:, None]).all()
  assert got.diagnostics["cuts"] == [None] * 8
  assert "step 0: no step by itself tells two groups apart" in str(got)
  assert "one voter; taken by majority" in str(got)
  # Whoever brings a label model gets what it says of those votes.
  ours = select(scores, aggregate=lambda votes: majority(1 - votes))
  assert (ours.keep == ~got.keep).all()


def test_scores_around_zero_say_nothing():
  scores = np.random.default_rng(0).normal(size=(2000, 3))
  got = select(scores)
  assert (got.votes == -1).all()
  assert got.keep.all()
  assert np.isnan(got.quality).all()
  assert set(got.diagnostics["notes"]) == {
    "one population around 0: it says nothing"
  }


def test_pooled_scores_overrule_single_steps():
  # At first the learner knows nothing, and steps split what is one group.
  rng = np.random.default_rng(0)
  early = np.where(rng.random((1000, 4)) < 0.7, -1, 1) * rng.normal(
    0.1, 0.02, (1000, 4)
  )
  late = rng.lognormal(0, 0.5, (1000, 6))
  early_only = select(early)
  assert (~early_only.keep).mean() > 0.5
  got = select(np.hstack([early, late]))
  assert got.keep.all()
  assert got.diagnostics["population"] == "one population above 0: all kept"
  assert (got.votes == 1).all()


def test_one_population_overrules_a_label_model():
  # Some is bad, but half the steps come before the learner knows anything.
  rng = np.random.default_rng(0)
  bad = np.arange(1000) < 50
  doubted = rng.random((1000, 1)) < 0.9
  early = np.where(doubted, -0.02, 0.3) * rng.normal(1, 0.1, (1000, 6))
  late = rng.normal(np.where(bad, -1.0, 0.8)[:, None], 0.05, (1000, 6))
  scores = np.hstack([early, late])
  assert (two_coin(votes_of(scores, auto())[0]).probability < 0.5).mean() > 0.9
  assert (~select(scores).keep).mean() < 0.1


def test_a_label_model_against_the_pooled_scores_is_overruled(monkeypatch):
  def swapped(votes):
    found = majority(votes)
    return KeepProbability(1 - found.probability, {})

  scores, noisy = run_scores(4, 0.3)
  monkeypatch.setitem(LABEL_MODELS, "label_model", swapped)
  got = select(scores)
  assert metrics.f1(~got.keep, noisy) > 0.95
  assert "taken by majority" in str(got)
  # Whoever brings a function of their own gets what it says.
  assert (got.keep == ~select(scores, aggregate=swapped).keep).mean() > 0.95


def test_few_scores_are_cut_at_the_mark():
  scores = np.linspace(-1, 2, binarize_size := 19)
  cut = auto()(scores, 0)
  assert cut.value == 0
  assert cut.note == f"{binarize_size} scores are too few to fit: cut at 0"
  assert auto(0.5)(scores, 0).value == 0.5
  assert math.isnan(auto(None)(scores, 0).value)


def test_a_mark_elsewhere_is_a_shift():
  scores, _ = run_scores(1, 0.3, n_steps=2)
  scores = scores.astype(np.float64)
  at_zero = select(scores)
  at_five = select(scores + 5, binarize=auto(5.0))
  assert (at_zero.votes == at_five.votes).mean() > 0.999
  np.testing.assert_allclose(
    np.array(at_five.diagnostics["cuts"]) - 5,
    at_zero.diagnostics["cuts"],
    atol=1e-6,
  )


def test_without_a_mark_the_shape_decides():
  rng = np.random.default_rng(0)
  low = np.arange(1000) < 300
  apart = np.where(low, -9.0, -3.0) + rng.normal(size=1000)
  assert metrics.f1(apart <= auto(None)(apart, 0).value, low) > 0.99
  for one in (
    rng.normal(size=1000),
    -rng.lognormal(0, 0.5, 1000),
    rng.random(1000),
    np.where(low, -1.0, 1.0) + rng.normal(size=1000),  # D is below 2
  ):
    cut = auto(None)(one, 0)
    assert cut.note == "one population: all kept"
    assert cut.value < one.min()


def test_separation_and_bic_gain_are_what_they_say():
  # Against a maximum likelihood fit by another optimiser.
  rng = np.random.default_rng(1)
  z = np.r_[rng.normal(-2, 0.5, 300), rng.normal(1, 0.3, 700)]
  fit = auto()(np.sinh(z), 0).fit

  def two(p):
    low = p[0] * stats.norm.pdf(u, p[1], p[2])
    return -np.log(low + (1 - p[0]) * stats.norm.pdf(u, p[3], p[4])).sum()

  s = np.sinh(z)
  x = s / np.median(np.abs(s))
  x = np.clip(x, np.sort(x)[2], np.sort(x)[-3])
  u = np.arcsinh(x)
  best = optimize.minimize(
    two,
    [0.3, u[:300].mean(), u[:300].std(), u[300:].mean(), u[300:].std()],
    method="Nelder-Mead",
    options={"maxiter": 5000, "fatol": 1e-9, "xatol": 1e-7},
  )
  share, m, sd, m2, sd2 = best.x
  # One group: here a Laplace distribution in the scores' own unit is the best.
  jacobian = np.log(np.cosh(u)).sum()
  one = (
    min(
      -stats.norm.logpdf(u, u.mean(), u.std()).sum() + jacobian,
      -stats.laplace.logpdf(u, *stats.laplace.fit(u)).sum() + jacobian,
      -stats.norm.logpdf(x, x.mean(), x.std()).sum(),
      -stats.laplace.logpdf(x, *stats.laplace.fit(x)).sum(),
    )
    - jacobian
  )
  gain = 2 * (one - best.fun) - 3 * np.log(len(u))
  assert fit["groups"] == 2
  assert fit["low_share"] == pytest.approx(share, abs=2e-3)
  assert fit["bic_gain"] == pytest.approx(gain, rel=2e-3)
  d = math.sqrt(2) * (m2 - m) / math.hypot(sd, sd2)
  assert fit["separation"] == pytest.approx(d, rel=1e-2)
  assert fit["above_mark"] == (z > 0).mean()


def test_extreme_scores_do_no_harm():
  scores, noisy = run_scores(2, 0.3, n_steps=3)
  scores = scores.astype(np.float64)
  scores[0] = -1e300
  scores[-1] = 1e300
  scores[-2] = np.inf
  got = select(scores)
  assert metrics.f1(~got.keep, noisy) > 0.95
  json.dumps(got.diagnostics, allow_nan=False)


def test_a_large_column_is_cut_from_a_sample():
  scores, noisy = run_scores(3, 0.3, n=3 * binarize.FIT_SIZE, n_steps=1)
  got = select(scores)
  assert metrics.f1(~got.keep, noisy) > 0.95
  assert select(scores).diagnostics == got.diagnostics


@pytest.mark.parametrize("mark", [math.nan, math.inf])
def test_a_mark_that_is_no_number(mark):
  with pytest.raises(ValueError, match="expected a finite number, or None"):
    auto(mark)


def test_by_name():
  assert make_binarizer("auto") == auto(0.0)
  with pytest.raises(ValueError, match=r"fraction=0\.5 has no effect"):
    make_binarizer("auto", fraction=0.5)
