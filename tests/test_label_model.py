"""Label models: against brute force, another library, and their promises."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
from scipy import optimize

from gradmimic_jax.selection import LABEL_MODELS, select, voters
from gradmimic_jax.selection.label_model import (
  majority,
  one_coin,
  triplet,
  two_coin,
)

MODELS = {"one_coin": one_coin, "two_coin": two_coin, "triplet": triplet}


def independent(seed, n, keep_accuracy, drop_accuracy, clean_share=0.6):
  """Votes int8 [N, T] that are independent given the truth, and the truth."""
  rng = np.random.default_rng(seed)
  clean = rng.random(n) < clean_share
  keep = np.where(
    clean[:, None], keep_accuracy, 1 - np.asarray(drop_accuracy)[None]
  )
  return (rng.random((n, len(keep_accuracy))) < keep).astype(np.int8), clean


def abstaining(votes, seed, share):
  """The same votes, a share of them not cast."""
  gone = np.random.default_rng(seed).random(votes.shape) < share
  return np.where(gone, -1, votes).astype(np.int8)


def persistent(seed, n=1500, n_steps=20, spread=1.0):
  """Votes of successive epochs: a sample's error stays with it."""
  rng = np.random.default_rng(seed)
  clean = rng.random(n) < 0.6
  scores = np.where(clean, 1.0, -1.0)[:, None] + spread * rng.normal(
    size=(n, 1)
  )
  scores = scores + 0.7 * rng.normal(size=(n, n_steps))
  return (scores > 0).astype(np.int8), clean


def population(keep_accuracy, drop_accuracy, clean_share, total=1e4):
  """How often each row of votes is expected, every one of them."""
  rows = np.array(list(itertools.product((0, 1), repeat=len(keep_accuracy))))
  a, b = np.array(keep_accuracy), np.array(drop_accuracy)
  size = clean_share * np.prod(np.where(rows == 1, a, 1 - a), axis=1)
  size += (1 - clean_share) * np.prod(np.where(rows == 1, 1 - b, b), axis=1)
  return voters.Ballots(
    (rows == 1).astype(float),
    (rows == 0).astype(float),
    total * size,
    np.arange(len(rows)),
  )


def log_loss(probability, clean):
  right = np.where(clean, probability, 1 - probability)
  return -np.log(np.maximum(right, 1e-12)).mean()


# What is estimated: closed forms, brute force, another library.

A, B, C = [0.9, 0.8, 0.75, 0.65], [0.7, 0.85, 0.6, 0.95], 0.35


def test_two_coins_of_a_known_population_are_found():
  got = voters.fit_dawid_skene(
    population(A, B, C),
    coins=2,
    temper=False,
    smoothing=0,
    tolerance=1e-10,
    max_iterations=5000,
  )
  assert got.converged
  np.testing.assert_allclose(got.keep_accuracy, A, atol=1e-6)
  np.testing.assert_allclose(got.drop_accuracy, B, atol=1e-6)
  assert got.clean_fraction == pytest.approx(C, abs=1e-6)
  # And given the truth the votes are independent.
  np.testing.assert_allclose(got.correlation, np.eye(4), atol=1e-5)


def test_one_coin_of_a_known_population_is_found():
  ballots = population(A, A, C)
  em = voters.fit_dawid_skene(
    ballots,
    coins=1,
    temper=False,
    smoothing=0,
    tolerance=1e-10,
    max_iterations=5000,
  )
  closed = voters.fit_triplet(ballots, temper=False, smoothing=0)
  np.testing.assert_allclose(closed.keep_accuracy, A, atol=1e-12)
  assert closed.clean_fraction == pytest.approx(C, abs=1e-12)
  np.testing.assert_allclose(em.keep_accuracy, A, atol=1e-6)
  np.testing.assert_allclose(em.log_odds, closed.log_odds, atol=1e-4)


def test_tempering_leaves_independent_votes_alone():
  # Only if dependence is estimated right does it stay there.
  got = voters.fit_dawid_skene(
    population(A, B, C, total=1e6), coins=2, max_iterations=5000
  )
  assert got.converged
  np.testing.assert_allclose(got.keep_accuracy, A, atol=2e-3)
  np.testing.assert_allclose(got.correlation, np.eye(4), atol=5e-3)


def _negative_log_likelihood(logits, votes, coins):
  n_voters = votes.shape[1]
  rates = 1 / (1 + np.exp(-logits))
  c, a = rates[0], rates[1 : 1 + n_voters]
  b = rates[1 + n_voters :] if coins == 2 else a
  total = 0.0
  for row in votes:
    clean, noisy = c, 1 - c
    for vote, keep, drop in zip(row, a, b, strict=True):
      if vote >= 0:
        clean *= keep if vote == 1 else 1 - keep
        noisy *= 1 - drop if vote == 1 else drop
    total -= math.log(clean + noisy)
  return total


@pytest.mark.parametrize("coins", [1, 2])
def test_em_finds_the_maximum_of_the_likelihood(coins):
  votes, _ = independent(3, 80, [0.9, 0.8, 0.85], [0.8, 0.75, 0.9])
  votes = abstaining(votes, 4, 0.15)
  votes = votes[(votes >= 0).any(axis=1)]
  got = voters.fit_dawid_skene(
    voters.count_ballots(votes),
    coins=coins,
    temper=False,
    smoothing=0,
    tolerance=1e-10,
    max_iterations=20_000,
  )
  assert got.converged
  found = [got.clean_fraction, *got.keep_accuracy]
  if coins == 2:
    found += [*got.drop_accuracy]
  found = np.array(found)
  loss = functools.partial(_negative_log_likelihood, votes=votes, coins=coins)
  rng = np.random.default_rng(0)
  best = min(
    optimize.minimize(loss, rng.normal(0.8, 0.5, len(found))).fun
    for _ in range(2)
  )
  assert loss(np.log(found / (1 - found))) == pytest.approx(best, abs=1e-4)


def test_posterior_and_correlation_are_the_brute_force_ones():
  votes, _ = independent(0, 40, [0.9, 0.8, 0.6], [0.7, 0.6, 0.8])
  votes = abstaining(votes, 1, 0.3)
  votes = votes[(votes >= 0).any(axis=1)]
  ballots = voters.count_ballots(votes)
  got = voters.fit_dawid_skene(ballots, coins=2, temper=False)
  a, b, c = got.keep_accuracy, got.drop_accuracy, got.clean_fraction
  want = []
  for row in votes:
    clean, noisy = c, 1 - c
    for t in np.flatnonzero(row >= 0):
      clean *= a[t] if row[t] == 1 else 1 - a[t]
      noisy *= 1 - b[t] if row[t] == 1 else b[t]
    want.append(clean / (clean + noisy))
  want = np.array(want)
  np.testing.assert_allclose(
    1 / (1 + np.exp(-got.log_odds[ballots.row])), want, rtol=1e-9
  )

  covariance = np.zeros((3, 3))
  for t, s in itertools.product(range(3), repeat=2):
    both = np.flatnonzero((votes[:, t] >= 0) & (votes[:, s] >= 0))
    covariance[t, s] = np.mean(
      [
        want[i] * (votes[i, t] - a[t]) * (votes[i, s] - a[s])
        + (1 - want[i]) * (votes[i, t] - 1 + b[t]) * (votes[i, s] - 1 + b[s])
        for i in both
      ]
    )
  scale = np.sqrt(np.diag(covariance))
  np.testing.assert_allclose(
    got.correlation, covariance / np.outer(scale, scale), atol=1e-9
  )


def test_triplets_are_the_brute_force_ones():
  votes, _ = independent(1, 300, [0.9, 0.8, 0.7, 0.75, 0.6], [0.8] * 5)
  votes = abstaining(votes, 2, 0.2)
  votes = votes[(votes >= 0).any(axis=1)]
  got = voters.fit_triplet(
    voters.count_ballots(votes), temper=False, smoothing=0
  )
  for t in range(5):
    squares = []
    for s, u in itertools.combinations(sorted({*range(5)} - {t}), 2):
      moment = {}
      for pair in ((t, s), (t, u), (s, u)):
        both = (votes[:, pair] >= 0).all(axis=1)
        moment[pair] = np.mean(np.prod(2 * votes[both][:, pair] - 1, axis=1))
      squares.append(abs(moment[t, s] * moment[t, u] / moment[s, u]))
    edge = math.sqrt(min(np.median(squares), 1))
    assert got.keep_accuracy[t] == pytest.approx((1 + edge) / 2, rel=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of that library and of pandas
@pytest.mark.parametrize("coins", [1, 2])
def test_agrees_with_crowd_kit(coins):
  aggregation = pytest.importorskip("crowdkit.aggregation")
  pandas = pytest.importorskip("pandas")
  name = "DawidSkene" if coins == 2 else "OneCoinDawidSkene"
  for seed in range(2):
    votes, _ = independent(
      seed, 200, [0.9, 0.8, 0.7, 0.75, 0.6], [0.8, 0.7, 0.9, 0.6, 0.8]
    )
    votes = abstaining(votes, seed, 0.2)
    votes = votes[(votes >= 0).any(axis=1)]
    task, worker = np.nonzero(votes >= 0)
    table = pandas.DataFrame(
      {"task": task, "worker": worker, "label": votes[task, worker]}
    )
    theirs = getattr(aggregation, name)(n_iter=400, tol=-1.0)
    want = theirs.fit_predict_proba(table).sort_index()[1].to_numpy()
    ballots = voters.count_ballots(votes)
    ours = voters.fit_dawid_skene(
      ballots,
      coins=coins,
      temper=False,
      smoothing=0,
      tolerance=0,
      max_iterations=400,
    )
    got = 1 / (1 + np.exp(-ours.log_odds[ballots.row]))
    np.testing.assert_allclose(got, want, atol=1e-5)


# Dependent votes.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_copies_of_every_voter_change_little(name, share):
  model = MODELS[name]
  votes, _ = independent(
    0, 2000, [0.85, 0.8, 0.75, 0.8, 0.7], [0.8, 0.7, 0.75, 0.8, 0.75]
  )
  votes = abstaining(votes, 1, share)
  votes = votes[(votes >= 0).any(axis=1)]
  before, about = model(votes)
  after, copied = model(np.repeat(votes, 4, axis=1))
  assert np.abs(after - before).max() < 0.04
  assert copied["effective_voters"] == pytest.approx(
    about["effective_voters"], abs=0.3
  )
  # Which is what tempering is there for.
  certain, _ = model(np.repeat(votes, 4, axis=1), temper=False)
  assert np.abs(certain - before).max() > 0.2


@pytest.mark.parametrize("name", MODELS)
def test_effective_voters_are_counted(name):
  rates = [0.8] * 12
  votes, _ = independent(2, 3000, rates, rates)
  _, about = MODELS[name](votes)
  assert about["effective_voters"] == pytest.approx(12, abs=0.5)
  assert abs(about["vote_correlation"]) < 0.01
  _, about = MODELS[name](np.repeat(votes[:, :4], 3, axis=1))
  assert about["effective_voters"] == pytest.approx(4, abs=0.3)
  _, about = MODELS[name](np.repeat(votes[:, :1], 12, axis=1))
  assert about["effective_voters"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_epochs_do_not_add_up_to_false_certainty(name):
  votes, clean = persistent(0)
  tempered, about = MODELS[name](votes)
  certain, _ = MODELS[name](votes, temper=False)
  assert about["effective_voters"] < 6
  assert log_loss(tempered, clean) < 0.5 * log_loss(certain, clean)


# Promises.


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(5))
def test_unanimous_votes_are_never_contradicted(name, seed):
  rng = np.random.default_rng(seed)
  a, b = rng.uniform(0.2, 1, (2, 6))
  votes, _ = independent(seed, 400, a, b, clean_share=rng.random())
  votes = abstaining(votes, seed, 0.6)
  probability, _ = MODELS[name](votes)
  share, _ = majority(votes)
  assert (probability[share == 1] > 0.5).all()
  assert (probability[share == 0] < 0.5).all()
  np.testing.assert_array_equal(np.isnan(probability), np.isnan(share))
  assert 0 <= np.nanmin(probability) <= np.nanmax(probability) <= 1


@pytest.mark.parametrize("name", MODELS)
def test_a_weak_vote_wins_over_a_strong_prior_and_is_counted(name):
  votes, _ = independent(0, 2000, [0.8] * 5, [0.8] * 5, clean_share=0.95)
  votes = abstaining(votes, 0, 0.5)
  probability, about = MODELS[name](votes)
  share, _ = majority(votes)
  assert about["corrected"] > 0
  corrected = probability == np.nextafter(0.5, 0)
  assert corrected.sum() == about["corrected"]
  assert (share[corrected] == 0).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_more_keep_votes_never_lower_a_probability(name, seed):
  rng = np.random.default_rng(seed)
  a, b = rng.uniform(0.1, 1, (2, 5))
  drawn, _ = independent(seed, 300, a, b)
  every = np.array(list(itertools.product((0, 1, -1), repeat=5)), np.int8)
  votes = np.concatenate([every, drawn])
  probability = MODELS[name](votes)[0][: len(every)]
  for t in range(5):
    drop, keep = every[:, t] == 0, every[:, t] == 1
    assert (probability[keep] >= probability[drop] - 1e-12).all()


@pytest.mark.parametrize("name", MODELS)
def test_good_voters_count_more(name):
  rates = [0.95, 0.9, 0.6, 0.6, 0.6]
  votes, clean = independent(0, 4000, rates, rates)
  probability, about = MODELS[name](votes)
  np.testing.assert_allclose(about["accuracies"], rates, atol=0.03)
  share, _ = majority(votes)
  wrong = ((probability >= 0.5) != clean).mean()
  assert wrong < 0.6 * ((share >= 0.5) != clean).mean()
  # Two good ones against three bad ones.
  split = (votes == [1, 1, 0, 0, 0]).all(axis=1)
  assert split.any()
  assert (probability[split] > 0.5).all()


@pytest.mark.parametrize("name", MODELS)
def test_fewer_than_three_voters_are_the_majority(name):
  votes, _ = independent(0, 50, [0.8, 0.7], [0.8, 0.7])
  for some in (votes[:, :1], votes, np.full((4, 3), -1, np.int8)):
    some = np.insert(some, 1, -1, axis=1)
    probability, about = MODELS[name](some)
    np.testing.assert_array_equal(probability, majority(some).probability)
    assert "it takes three" in about["note"]
    assert about["accuracies"] == [None] * some.shape[1]
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fill", [0, 1])
def test_one_sample_and_votes_all_alike(name, fill):
  for n in (1, 30):
    probability, about = MODELS[name](np.full((n, 5), fill, np.int8))
    assert np.isfinite(probability).all()
    assert ((probability > 0.5) == fill).all()
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize("name", MODELS)
def test_voters_who_share_no_sample(name):
  votes = np.full((30, 5), -1, np.int8)
  votes[np.arange(30), np.arange(30) % 5] = np.arange(30) % 2
  probability, _ = MODELS[name](votes)
  assert ((probability > 0.5) == np.arange(30) % 2).all()


# Diagnostics, and what `select` makes of it.


@pytest.mark.parametrize("name", [*MODELS, "label_model"])
def test_select_takes_it_by_name(name):
  rng = np.random.default_rng(0)
  noisy = rng.random(400) < 0.4
  scores = np.where(noisy, -1, 1)[:, None] + rng.normal(size=(400, 6))
  scores[::7, 1] = np.nan
  scores[:, 4] = np.nan
  got = select(scores, binarize="threshold", aggregate=name)
  about = got.diagnostics["label_model"]
  assert json.loads(json.dumps(about, allow_nan=False)) == about
  assert got.diagnostics["aggregate"] == name
  assert (got.keep != noisy).mean() > 0.95
  assert about["n_voters"] == 5
  assert about["coverages"] == got.diagnostics["coverages"]
  agreements = [
    (column[column >= 0] == got.keep[column >= 0]).mean()
    for column in got.votes.T
    if (column >= 0).any()
  ]
  assert about["agreements"][4] is about["accuracies"][4] is None
  np.testing.assert_allclose(
    [x for x in about["agreements"] if x is not None], agreements
  )
  assert about["clean_fraction"] == pytest.approx(0.6, abs=0.05)
  share = majority(got.votes).probability
  assert about["split_votes"] == (share == 0.5).sum() > 0
  assert about["split_kept"] == got.keep[share == 0.5].sum()


def test_the_recommended_one_is_two_coins():
  assert LABEL_MODELS["label_model"] is two_coin


def test_no_convergence_is_said():
  votes, _ = independent(0, 2000, [0.7] * 3, [0.7] * 3, clean_share=0.5)
  ballots = voters.count_ballots(votes)
  cut_short = voters.fit_dawid_skene(ballots, coins=2, max_iterations=3)
  assert (cut_short.converged, cut_short.iterations) == (False, 3)
  # Three weak voters have many explanations.
  got = select(votes - 0.5, binarize="threshold", aggregate="two_coin")
  about = got.diagnostics["label_model"]
  assert not about["converged"]
  assert "two_coin: not settled after 500 rounds" in str(got)


def test_ballots_count_distinct_rows():
  votes = np.random.default_rng(0).integers(-1, 2, (500, 3)).astype(np.int8)
  ballots = voters.count_ballots(votes)
  assert len(ballots.size) == 27
  np.testing.assert_array_equal(
    (ballots.keep - (ballots.keep + ballots.drop == 0))[ballots.row], votes
  )
  np.testing.assert_array_equal(np.bincount(ballots.row), ballots.size)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
  "votes", [np.zeros(3, np.int8), np.full((2, 3), 2), np.full((2, 3), 0.5)]
)
def test_bad_votes(name, votes):
  with pytest.raises(ValueError, match=r"expected \[N, T\], 1 keep, 0 drop"):
    MODELS[name](votes)
