"""The joint model of all steps: one population or two, and whose is whose."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
from generated_scores import (
  SHAPES,
  _density_of_sum,
  broken,
  f1,
  gain_of_truth,
  judged,
  make,
  run,
  undecidable,
)
from hypothesis import Phase, given, settings, strategies as st
from scipy import integrate, optimize, stats

import gradmimic_jax as gm
from gradmimic_jax import metrics
from gradmimic_jax.selection import joint, pooling, populations, select
from gradmimic_jax.selection.binarize import make_binarizer

SLOW = pytest.mark.slow


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


def apart(seed, n=300, n_steps=3, rate=0.3, distance=5.0):
  """Two Gaussian groups of one width."""
  rng = np.random.default_rng(seed)
  wrong = rng.permutation(n) < rate * n
  return rng.normal(0, 1, (n, n_steps)) - distance * wrong[:, None], wrong


# One dimension: one population or two.


def test_densities_and_odds_are_the_brute_force_ones():
  tails = populations._Tails(
    np.array([[1.5], [populations._GAUSSIAN]]), np.array([[4.0], [1.5]])
  )
  two = populations.Two(
    np.array([-1.0, 2.0]),
    np.array([0.5, 1.5]),
    np.array([1.0, 0.4]),
    np.array([0.3, 0.7]),
    tails,
  )

  def half(d, tail, width):
    if tail == populations._GAUSSIAN:
      return math.exp(-((d / width) ** 2) / 2)
    return (1 + (d / width) ** 2 / tail) ** (-(tail + 1) / 2)

  def kernel(d, kind, noise):
    if d < 0:
      return half(d, tails.below[kind, 0], noise * two.left[kind])
    return half(d, tails.above[kind, 0], noise * two.right[kind])

  @functools.cache
  def total(*of):
    ends = (-np.inf, 0), (0, np.inf)
    return sum(integrate.quad(kernel, *end, args=of)[0] for end in ends)

  def density(x, kind, noise=1.0):
    return kernel(x - two.mode[kind], kind, noise) / total(kind, noise)

  for noise in (1.0, 2.0):
    x = np.linspace(-0.9, 1.9, 7)
    want = [
      math.log(0.7 * density(v, 1, noise) / (0.3 * density(v, 0, noise)))
      for v in x
    ]
    got = two.log_odds(x, np.full(7, noise))
    # The noise comes in steps of 5 %, the odds from a fine grid.
    np.testing.assert_allclose(got, want, atol=0.01 if noise == 1 else 0.1)
  wide = np.linspace(-50, 50, 999)
  assert (np.diff(two.log_odds(wide, np.ones(999))) >= 0).all()


def test_bic_is_that_of_the_maximum_likelihood():
  """Against scipy's optimiser and its closed forms."""
  rng = np.random.default_rng(1)
  x = np.r_[rng.normal(-2, 0.5, 90), rng.normal(1, 0.3, 210)]
  points, shift, scale = populations.make_points(x, np.ones(300))
  np.testing.assert_allclose(np.sort(x), points.x * scale + shift)

  def two(p):
    low = p[0] * stats.norm.pdf(x, p[1], p[2])
    return -np.log(low + (1 - p[0]) * stats.norm.pdf(x, p[3], p[4])).sum()

  best = optimize.minimize(
    two,
    [0.3, -2, 0.5, 1, 0.3],
    method="Nelder-Mead",
    options={"maxiter": 5000, "fatol": 1e-9, "xatol": 1e-7},
  )
  evidence, _, _ = populations.compare(x, np.ones(300))
  jacobian = 2 * 300 * math.log(scale)

  def penalty(k):
    return k * math.log(300) * 300 / (300 - k - 2)

  pairs = populations._pair_costs(points)
  # The pseudo-observations cost a little.
  cost = 2 * best.fun + penalty(5)
  assert pairs["Gaussians"][0] + jacobian == pytest.approx(cost, abs=1.5)
  singles = populations._single_costs(points)
  for name, (parameters, want) in {
    "Gaussian": (2, stats.norm.logpdf(x, x.mean(), x.std()).sum()),
    "power 1": (3, stats.laplace.logpdf(x, *stats.laplace.fit(x)).sum()),
    "uniform": (3, -300 * math.log(np.ptp(x))),
  }.items():
    got = singles[name] + jacobian
    assert got == pytest.approx(-2 * want + penalty(parameters), abs=1.5), name
  gamma = stats.gamma.rvs(2, size=300, random_state=rng)
  points, _, scale = populations.make_points(gamma, np.ones(300))
  want = stats.gamma.logpdf(gamma, *stats.gamma.fit(gamma)).sum()
  got = populations._single_costs(points)["gamma"] + 600 * math.log(scale)
  assert got == pytest.approx(-2 * want + penalty(3), abs=2.0)
  found = pairs["Gaussians"][1]
  assert found.share[0] == pytest.approx(best.x[0], abs=0.01)
  d = math.sqrt(2) * (best.x[3] - best.x[1]) / math.hypot(best.x[2], best.x[4])
  assert found.separation == pytest.approx(d, rel=0.05)
  assert populations.probability_of_two(evidence.gain) > 1 - 1e-9
  assert populations.probability_of_two(2.0) == 0.5
  assert populations.probability_of_two(4.0, lower_share=0.6) == 0.5


POPULATIONS = {
  "normal": lambda rng, n: rng.normal(size=n),
  "exponential": lambda rng, n: rng.exponential(size=n),
  "lognormal": lambda rng, n: -rng.lognormal(0, 0.5, n),
  "uniform": lambda rng, n: rng.random(n),
  "t": lambda rng, n: rng.standard_t(2, n),
  "laplace": lambda rng, n: rng.laplace(size=n),
  "tenths": lambda rng, n: rng.normal(size=n).round(1),
  "integers": lambda rng, n: rng.normal(size=n).round(),
}
# Skewed, and with many ties.
SOME = [("lognormal", 600), ("integers", 60)]


@pytest.mark.parametrize(
  ("name", "n", "seed"),
  [
    pytest.param(name, n, seed, marks=() if quick else SLOW)
    for name, n, seed in itertools.product(POPULATIONS, (60, 600), (0, 1))
    for quick in ((name, n) in SOME and seed == 0,)
  ],
)
def test_one_population_is_not_split(name, n, seed):
  x = POPULATIONS[name](np.random.default_rng(seed), n)
  assert select(x[:, None]).keep.mean() >= 0.98


def test_the_bootstrap_is_as_wide_as_a_share_is_uncertain():
  scores, wrong = apart(0, n=300, n_steps=1, distance=8.0)
  about = select(scores).diagnostics["label_model"]
  draws = np.array(about["clean_fraction_draws"])
  deviation = math.sqrt(wrong.mean() * (1 - wrong.mean()) / 300)
  assert draws.std() == pytest.approx(deviation, rel=0.25)
  assert draws.mean() == pytest.approx(1 - wrong.mean(), abs=0.01)


# Guarantees, on generated matrices.

MATRICES = st.builds(
  dict,
  seed=st.integers(0, 10_000),
  n=st.integers(1, 120),
  n_steps=st.integers(1, 6),
  rate=st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.95]),
  distance=st.sampled_from([0.0, 2.0, 5.0, 30.0]),
)
# No shrinking: an example is a second, and its numbers are small already.
UNSHRUNK = settings(
  deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
# With missing entries and ties.
GAPS = {"seed": 15, "n": 60, "n_steps": 3, "rate": 0.3, "distance": 5.0}
MANY = settings(UNSHRUNK, max_examples=12)


def drawn(options):
  scores, _ = apart(**options)
  rng = np.random.default_rng(options["seed"])
  if options["seed"] % 3 == 0:
    scores[rng.random(scores.shape) < 0.2] = np.nan
  if options["seed"] % 5 == 0:
    scores = scores.round()
  return scores


def check_symmetries(options):
  scores = drawn(options)
  rng = np.random.default_rng(1)
  n, n_steps = scores.shape
  got = select(scores)
  known = np.isfinite(scores).any(axis=1)
  assert np.isfinite(got.quality[known]).all()
  order, steps = rng.permutation(n), rng.permutation(n_steps)
  shuffled = select(scores[order][:, steps])
  moved = select(scores * 10.0 ** rng.uniform(-6, 6, n_steps) + 8.0)
  copied = select(np.repeat(scores, 2, axis=1))
  for other, tolerance in (
    (shuffled.keep_probability[np.argsort(order)], 1e-6),
    (moved.keep_probability, 1e-3),
    (copied.keep_probability, 0.02),
  ):
    np.testing.assert_allclose(other, got.keep_probability, atol=tolerance)


def check_monotone(options):
  scores = drawn(options)
  got = select(scores)
  # Of two samples that were seen alike, the higher one is never the worse.
  order = np.random.default_rng(2).permutation(len(scores))
  same = (np.isfinite(scores) == np.isfinite(scores[order])).all(axis=1)
  with np.errstate(invalid="ignore"):
    above = ~(scores < scores[order]).any(axis=1) & same
  for values in (got.keep_probability, got.quality):
    pair = above & ~np.isnan(values) & ~np.isnan(values[order])
    assert (values[pair] >= values[order][pair] - 1e-12).all()
  # And so it is if one sample's scores are raised.
  one = int(np.random.default_rng(3).integers(len(scores)))
  raised = scores.copy()
  raised[one] += np.random.default_rng(4).choice([0.01, 1.0, 10.0])
  again = select(raised)
  if np.isfinite(scores[one]).any() and not np.isnan(got.keep_probability[one]):
    before, after = got.keep_probability[one], again.keep_probability[one]
    assert after >= before - 1e-3


def test_order_unit_zero_and_copies_make_no_difference():
  check_symmetries(GAPS)


def test_higher_scores_are_never_worse():
  check_monotone(GAPS)


@pytest.mark.slow
@given(MATRICES)
@MANY
def test_guarantees_on_many_matrices(options):
  check_symmetries(options)
  check_monotone(options)


@SLOW
@given(
  st.integers(0, 10_000),
  st.integers(1, 40),
  st.integers(1, 5),
  st.sampled_from(["float16", "float32", "float64"]),
)
@settings(UNSHRUNK, max_examples=2)
def test_finite_scores_of_any_size_never_crash(seed, n, n_steps, dtype):
  rng = np.random.default_rng(seed)
  low, high = {"float16": (-7, 4), "float32": (-44, 38)}.get(dtype, (-308, 308))
  scores = rng.choice([-1, 1], (n, n_steps)) * 10.0 ** rng.uniform(
    low, high, (n, n_steps)
  )
  scores = scores.astype(dtype)
  for binarize in ("auto", "gmm", "kmeans"):
    with np.errstate(all="ignore"):
      got = select(scores, binarize=binarize)
    assert np.isfinite(got.quality).all()
    texts = (got, gm.dataset_quality(got), gm.removal_curve(got))
    assert "nan" not in " ".join(map(str, texts)).lower()
    json.dumps(got.diagnostics, allow_nan=False)


@pytest.mark.parametrize("seed", range(4))
def test_generated_sets_come_out_right(seed):
  assert broken(make(seed)) == []


@pytest.mark.slow
def test_sixty_generated_sets_come_out_right():
  outcome = run(60, 100_000)
  print(outcome)
  # Not all are right: 1 in 45 came out otherwise (10 of 450), of which most are
  # undecidable by the truth's own evidence; the others are of skewed noise in
  # few steps, where the tail of one group is the other.
  assert len(outcome.wrong) + len(outcome.undecidable) <= 1
  assert not any(
    "none wrong" in " ".join(bad) for bad in outcome.wrong.values()
  )


@pytest.mark.slow  # as is what goes by it
def test_what_nobody_can_decide_is_stated_by_the_truth():
  """By a brute-force density, and not by how far apart the groups are alone."""
  x = np.random.default_rng(0).normal(np.arange(60)[:, None] < 20, 1.0)[:, 0]
  log_f = np.stack([stats.norm.logpdf(x), stats.norm.logpdf(x, 1)])
  got = gain_of_truth("gaussian", log_f, 1 / 3, x, np.ones(60))
  density = 2 / 3 * stats.norm.pdf(x) + 1 / 3 * stats.norm.pdf(x, 1)
  pair = -2 * np.log(density).sum() + 4 * math.log(60) * 60 / 54
  one = -2 * stats.norm.logpdf(x, x.mean(), x.std()).sum()
  one += 2 * math.log(60) * 60 / 56
  assert got <= one - pair + 0.5  # the Gaussian is one of the list
  assert got < 0
  rng = np.random.default_rng(1)
  for shape in ("t4", "gamma"):
    grid, log_density = _density_of_sum(shape, 3)
    step = grid[1] - grid[0]
    assert np.exp(log_density).sum() * step == pytest.approx(1, abs=1e-3)
    sums = SHAPES[shape].rvs((20_000, 3), random_state=rng).sum(1)
    below = np.cumsum(np.exp(log_density)) * step
    for q in (0.1, 0.5, 0.9):
      assert below[grid <= np.quantile(sums, q)][-1] == pytest.approx(
        q, abs=0.015
      )
  # No more than a few sets, and none whose groups hardly anybody could miss.
  some = [made for made in map(make, range(60)) if judged(made)]
  assert len(some) > 10
  open_ = [made for made in some if undecidable(made)]
  assert len(open_) <= 3
  assert all(made.gain < 20 for made in open_)


# What is known to have come out wrong.

VOTES = [("gmm", "two_coin"), ("kmeans", "one_coin"), ("threshold", "triplet")]


def test_separated_scores_are_sure():
  rng = np.random.default_rng(1)
  wrong = rng.random(400) < 0.3
  got = select(rng.normal(np.where(wrong, -5, 5)[:, None], 1.0, (400, 5)))
  assert gm.dataset_quality(got).clean_fraction == pytest.approx(
    1 - wrong.mean(), abs=1e-3
  )
  assert got.keep_probability[wrong].max() < 0.01
  assert got.keep_probability[~wrong].min() > 0.99


@pytest.mark.parametrize(
  ("binarize", "aggregate"),
  [
    pytest.param(*x, marks=() if x in VOTES else SLOW)
    for x in itertools.product(
      ("gmm", "kmeans", "threshold"), ("two_coin", "one_coin", "triplet")
    )
  ],
)
def test_votes_that_agree_are_believed(binarize, aggregate):
  rng = np.random.default_rng(1)
  wrong = rng.random(400) < 0.3
  scores = rng.normal(np.where(wrong, -5, 5)[:, None], 1.0, (400, 5))
  got = select(scores, binarize=binarize, aggregate=aggregate)
  assert got.keep_probability[wrong].max() < 0.1
  assert got.keep_probability[~wrong].min() > 0.9
  estimate = gm.dataset_quality(got)
  assert abs(estimate.clean_fraction - (1 - wrong.mean())) < 0.01


@pytest.mark.parametrize(
  "rate", [0.01, *(pytest.param(x, marks=SLOW) for x in (0.05, 0.1))]
)
def test_few_wrong_labels_are_found(rate):
  rng = np.random.default_rng(0)
  wrong = rng.permutation(5000) < 5000 * rate
  scores = rng.normal(np.where(wrong, -3.5, 0.0), 1.0)[:, None]
  got = select(scores)
  odds = 3.5 * (scores[:, 0] + 1.75) + math.log((1 - rate) / rate)
  assert f1(~got.keep, wrong) >= f1(odds < 0, wrong) - 0.04
  assert abs(got.keep_probability.mean() - (1 - rate)) < 0.01


@pytest.mark.parametrize("binarize", ["auto", "gmm", "kmeans"])
@pytest.mark.parametrize(
  ("n", "outliers", "size"),
  [
    *((100, 1, -1e6), (1000, 10, 1e5)),
    *(pytest.param(*x, marks=SLOW) for x in ((100, 1, 1e5), (1000, 10, -1e6))),
  ],
)
def test_a_few_absurd_scores_change_nothing_for_others(
  n, outliers, size, binarize
):
  rng = np.random.default_rng(n)
  wrong = rng.random(n) < 0.4
  scores = rng.normal(np.where(wrong, -1, 1), 0.3, (3, n)).T
  before = select(scores, binarize=binarize)
  out = np.flatnonzero(~wrong)[:outliers]
  scores[out] *= size
  after = select(scores, binarize=binarize)
  others = np.setdiff1d(np.arange(n), out)
  assert (before.keep == after.keep)[others].mean() >= 0.99
  assert after.keep[out].all() == (size > 0)


def test_tiny_scores_beside_large_ones_have_a_quality():
  rng = np.random.default_rng(0)
  wrong = rng.random(1000) < 0.3
  scores = np.where(
    wrong[:, None],
    rng.normal(-1, 0.3, (1000, 3)),
    1e-17 * rng.lognormal(0, 1, (1000, 3)),
  ).astype(np.float32)
  got = select(scores)
  assert (got.keep == ~wrong).all()
  assert not wrong[gm.subset(got, 0.5)].any()
  assert len(gm.discover_members(got).ids) == (~wrong).sum()


def test_a_step_that_tells_nothing_has_no_say():
  scores, wrong = apart(0, n=600, n_steps=3, distance=4.0)
  noise = np.random.default_rng(1).normal(size=(600, 12))
  got = select(np.hstack([scores, noise]))
  assert metrics.f1(~got.keep, wrong) > 0.98
  weights = got.diagnostics["label_model"]["weights"]
  assert sum(weights[:3]) > 0.85


def test_missing_entries_make_a_sample_less_sure():
  scores, wrong = apart(0, n=1000, n_steps=6, distance=3.0)
  some = scores.copy()
  some[:500, 1:] = np.nan
  got = select(some)
  p = got.keep_probability
  unsure = np.minimum(p, 1 - p)
  assert unsure[:500].mean() > 5 * unsure[500:].mean()
  assert metrics.calibration_error(p, ~wrong) < 0.03


@SLOW
@pytest.mark.parametrize("seed", [15, 16, 17])
def test_unanimous_votes_are_never_contradicted(seed):
  got = select(make(seed).scores)
  cast = (got.votes >= 0).sum(axis=1)
  keeps, drops = (got.votes == 1).sum(axis=1), (got.votes == 0).sum(axis=1)
  assert got.keep[(cast > 0) & (keeps == cast)].all()
  assert not got.keep[(cast > 0) & (drops == cast)].any()


# A mark.


@pytest.mark.parametrize(
  "seed", [0, *(pytest.param(x, marks=SLOW) for x in (1, 2))]
)
def test_without_noise_at_most_2_percent_are_flagged(seed):
  scores, _ = run_scores(seed, 0.0)
  assert (scores[:, -1] < 0).any()  # zero alone would flag some
  # What a mixture takes for granted: that there are two.
  assert (~select(scores[:, -1:], binarize="gmm").keep).mean() > 0.2
  for columns in (slice(None), slice(0, 1), slice(-1, None)):
    got = select(scores[:, columns], mark=0.0)
    assert (~got.keep).mean() <= 0.02


@pytest.mark.parametrize(
  ("rate", "mark"),
  [
    pytest.param(*x, marks=() if x in ((0.4, 0.0), (0.9, None)) else SLOW)
    for x in itertools.product((0.02, 0.2, 0.4, 0.6, 0.9), (None, 0.0))
  ],
)
def test_noise_of_any_rate_is_found(rate, mark):
  scores, noisy = run_scores(0, rate)
  got = select(scores, mark=mark)
  assert metrics.f1(~got.keep, noisy) > 0.95
  assert got.diagnostics["population"] == ""


def test_all_noise_is_all_dropped():
  scores, _ = run_scores(0, 1.0, n_steps=3)
  got = select(scores, mark=0.0)
  assert not got.keep.any()
  assert got.diagnostics["population"] == "one population below 0: all dropped"
  assert "all steps: one population below 0" in str(got)
  # Without a mark nobody could know.
  assert select(scores).keep.all()


# The ones that are most easily split.
WEAK = [
  (0.3, 0.5, -1.0, 0.0),
  (0.3, 2.0, -0.5, 0.0),
  (0.3, 4.0, -1.0, None),
  (1.0, 2.0, -1.0, 0.0),
]


@pytest.mark.parametrize(
  ("clean_fraction", "separation", "offset", "mark"),
  [
    pytest.param(*x, marks=() if x in WEAK[1:3] else SLOW)
    for x in dict.fromkeys(
      [
        *WEAK,
        *itertools.product((0.3, 1.0), (0.5, 4.0), (0.0, -1.0), (None, 0.0)),
      ]
    )
  ],
)
def test_weak_scores_never_drop_everything(
  clean_fraction, separation, offset, mark
):
  """Few are clean, or the scores are biased, and a model has hardly learned."""
  rng = np.random.default_rng(0)
  clean = rng.permutation(1500) < clean_fraction * 1500
  own = rng.normal(0, 0.77, (1500, 1))  # what a sample's steps have in common
  scores = own + rng.normal(0, 0.63, (1500, 6)) + offset
  scores += np.where(clean, 0.5, -0.5)[:, None] * separation
  got = select(scores * np.geomspace(1, 0.05, 6), mark=mark)
  if not got.keep.all():
    assert clean_fraction == 0.3
    assert separation >= 2
    assert metrics.f1(~got.keep, ~clean) > (0.95 if separation == 4 else 0.85)


def test_steps_together_tell_what_none_does():
  rng = np.random.default_rng(0)
  noisy = rng.permutation(1500) < 450
  centers = np.where(noisy, -1.0, 1.0)[:, None]
  scores = centers + rng.normal(0, 1.1, (1500, 8))
  assert select(scores[:, :1]).keep.all()
  got = select(scores)
  assert metrics.f1(~got.keep, noisy) > 0.98


def test_scores_around_the_mark_say_nothing():
  scores = np.random.default_rng(0).normal(size=(2000, 3))
  got = select(scores, mark=0.0)
  assert (got.votes == -1).all()
  assert got.keep.all()
  assert set(got.diagnostics["notes"]) == {
    "one population around 0: it says nothing"
  }


def test_a_kept_population_tells_how_many_lie_below_the_mark():
  """They may be a small group of wrong samples."""
  scores = np.random.default_rng(0).normal(1.2, 1.0, (1999, 1))
  got = select(scores, mark=0.0)
  below = (scores < 0).mean()
  assert got.keep.all()
  assert got.diagnostics["population"] == (
    f"one population above 0: all kept, and {below:.1%} lie below:"
    " binarize='threshold', threshold=0 takes such out"
  )
  cut = select(scores, binarize="threshold")
  assert (cut.keep == (scores[:, 0] > 0)).all()
  few = select(scores + 1.2, mark=0.0)
  assert few.diagnostics["population"] == "one population above 0: all kept"


def test_early_steps_that_know_nothing_do_not_decide():
  rng = np.random.default_rng(0)
  bad = np.arange(1000) < 50
  doubted = rng.random((1000, 1)) < 0.9
  early = np.where(doubted, -0.02, 0.3) * rng.normal(1, 0.1, (1000, 6))
  late = rng.normal(np.where(bad, -1.0, 0.8)[:, None], 0.05, (1000, 6))
  got = select(np.hstack([early, late]), mark=0.0)
  assert (~got.keep).mean() < 0.1


def test_few_scores_are_judged_by_the_mark():
  scores = np.linspace(-1, 2, 19)[:, None]
  got = select(scores, mark=0.0)
  assert (got.keep == (scores[:, 0] > 0)).all()
  assert got.diagnostics["population"] == (
    "19 samples are too few to fit: cut at 0"
  )
  assert set(got.keep_probability.round(3)) == {0.333, 0.667}
  assert select(scores).keep.all()


def test_a_mark_elsewhere_is_a_shift():
  scores, _ = run_scores(1, 0.3, n_steps=2)
  scores = scores.astype(np.float64)
  at_zero = select(scores, mark=0.0)
  at_five = select(scores + 5, mark=5.0)
  np.testing.assert_allclose(
    at_five.keep_probability, at_zero.keep_probability, atol=1e-6
  )
  np.testing.assert_allclose(
    np.array(at_five.diagnostics["cuts"]) - 5,
    at_zero.diagnostics["cuts"],
    atol=1e-6,
  )


@pytest.mark.parametrize("mark", [math.nan, math.inf, "zero"])
def test_a_mark_that_is_no_number(mark):
  with pytest.raises(ValueError, match="expected a finite number, or None"):
    select([[1.0], [2.0]], mark=mark)
  with pytest.raises(ValueError, match="no effect with binarize='gmm'"):
    select([[1.0], [2.0]], binarize="gmm", mark=0.0)


# Units and pools.


def test_a_unit_is_the_median_and_the_middle_distance():
  scores = np.array([5.0, 5.0, 5.0, 4.0, 8.0, np.nan, np.inf])
  unit = pooling.fit_unit(scores, None)
  assert (unit.center, unit.constant) == (5.0, False)
  assert unit.scale == pytest.approx(2.0 * 1.4826)  # of 1 and 3
  assert np.isnan(unit.z(scores)).tolist() == [False] * 5 + [True] * 2
  assert pooling.fit_unit(scores[5:], None) is None
  assert pooling.fit_unit(scores[:3], None).constant
  marked = pooling.fit_unit(scores, 4.0)
  assert (marked.center, marked.scale) == (4.0, 1.0)


def test_copies_are_those_of_the_brute_force_comparison(monkeypatch):
  """In blocks, of which most rule a pair out, as over all samples at once."""
  monkeypatch.setattr(joint, "_BLOCK", 7)
  copies = np.zeros((8, 8))
  for seed in range(10):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 60))
    one = rng.normal(size=n)
    one[rng.random(n) < 0.2] = np.nan
    seen = np.flatnonzero(~np.isnan(one))
    late, gap, other_gap = one.copy(), one.copy(), one.copy()
    late[seen[-1]] += 0.01
    gap[rng.choice(seen)] = np.nan
    other_gap[[seen[-1], np.flatnonzero(np.isnan(one))[-1]]] = np.nan, 0.0
    others = one.astype(np.float16), late, gap, other_gap, -one
    scores = np.stack([one, one * 1e9, one * 3 - 2, *others], axis=1)
    units = tuple(pooling.fit_unit(column, None) for column in scores.T)
    z = [unit.z(column) for unit, column in zip(units, scores.T, strict=True)]
    for i in range(8):
      for j in range(8):
        same = np.allclose(z[i], z[j], rtol=1e-6, atol=1e-9, equal_nan=True)
        assert joint._are_copies(scores, units, i, j) == same
        copies[i, j] += same
    steps, of = joint._distinct_steps(scores[:, :3], units[:3])
    assert (len(steps), of) == (1, [0, 0, 0])
  assert (copies[:3, :3] == 10).all()
  assert (copies[:3, 3:] == 0).all()


def test_pooling_is_the_brute_force_mean():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(50, 4)) * 10.0 ** np.arange(-2, 2)
  scores[rng.random((50, 4)) < 0.3] = np.nan
  scores[7] = np.nan
  units = tuple(pooling.fit_unit(column, None) for column in scores.T)
  pool = pooling.even_pool(units, curved=True)
  x, noise = pool(scores)
  for row, (got, spread) in enumerate(zip(x, noise, strict=True)):
    values = [
      math.asinh((s - unit.center) / unit.scale)
      for s, unit in zip(scores[row], units, strict=True)
      if math.isfinite(s)
    ]
    if not values:
      assert math.isnan(got)
      continue
    assert got == pytest.approx(np.mean(values))
    # Independent steps: a mean of k is sqrt(T / k) times as uncertain.
    assert spread == pytest.approx(math.sqrt(4 / len(values)))


def test_ten_thousand_times_as_many_samples_are_fitted_from_some(monkeypatch):
  scores, noisy = run_scores(3, 0.3, n=6000, n_steps=2)
  whole = select(scores, mark=0.0)
  monkeypatch.setattr(joint, "FIT_SIZE", 1000)
  some = select(scores, mark=0.0)
  assert some.diagnostics["fit_size"] == 1000
  assert metrics.f1(~some.keep, noisy) > 0.95
  assert (whole.keep == some.keep).mean() > 0.99


def test_by_name():
  assert make_binarizer("auto") is None
  with pytest.raises(ValueError, match=r"fraction=0\.5 has no effect"):
    make_binarizer("auto", fraction=0.5)
