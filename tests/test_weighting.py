"""Weightings: what they promise for any scores and any mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

SIZE = 32
WEIGHTINGS = {
  "softmax": gm.softmax(0.5),
  "ess_softmax": gm.ess_softmax(0.3),
  "top_fraction": gm.top_fraction(0.25),
  "positive": gm.positive(),
  "proportional": gm.proportional(),
  "uniform": gm.uniform(),
}
SCORES = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
MASK = np.random.default_rng(1).random(SIZE) < 0.6
KINDS = {
  "normal": SCORES,
  "equal": np.full(SIZE, 2.5, np.float32),
  "zero": np.zeros(SIZE, np.float32),
  "two values": np.where(SCORES > 0, 1, -1).astype(np.float32),
  "outlier above": np.where(np.arange(SIZE) == 3, 1e6, SCORES).astype("f4"),
  "outlier below": np.where(np.arange(SIZE) == 3, -1e6, SCORES).astype("f4"),
  "tiny": SCORES * np.float32(1e-8),
  "huge": SCORES * np.float32(1e8),
  "negative": -np.abs(SCORES) - np.float32(0.1),
}

COMPILED = {name: jax.jit(fn) for name, fn in WEIGHTINGS.items()}
# The fraction is an argument, so that one compilation serves every test.
ESS = jax.jit(
  lambda scores, fraction, mask: gm.ess_softmax(fraction)(scores, mask)
)


def ess_softmax(scores, fraction, mask=None):
  mask = np.ones(len(scores), bool) if mask is None else mask
  return np.asarray(ESS(scores, np.float32(fraction), mask))


def size_of(weights):
  return float(gm.effective_sample_size(jnp.asarray(weights)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_sum_to_one_over_real_samples(name, kind):
  for mask in (MASK, ~MASK, MASK | True):
    weights = np.asarray(COMPILED[name](KINDS[kind], mask))
    assert weights.dtype == np.float32
    assert weights.shape == (SIZE,)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert np.all(weights >= 0)
    np.testing.assert_array_equal(weights[~mask], 0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_masked_scores_influence_nothing(name):
  fn = COMPILED[name]
  expected = np.asarray(fn(SCORES, MASK))
  for value in (1e30, -1e30, 0, np.inf, -np.inf, np.nan):
    scores = np.where(MASK, SCORES, np.float32(value))
    np.testing.assert_array_equal(fn(scores, MASK), expected)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_mask_is_the_same_as_leaving_samples_out(name):
  alone = np.asarray(jax.jit(WEIGHTINGS[name])(SCORES[MASK]))
  masked = np.asarray(COMPILED[name](SCORES, MASK))
  np.testing.assert_allclose(masked[MASK], alone, rtol=1e-5)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_empty_mask_gives_zero_weights(name):
  weights = COMPILED[name](SCORES, MASK & False)
  np.testing.assert_array_equal(weights, 0)


@pytest.mark.parametrize("score", [0.0, -3.0, 1e20])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_batch_of_one_gets_all_the_weight(name, score):
  np.testing.assert_array_equal(COMPILED[name](np.float32([score])), [1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_higher_score_never_weighs_less(name, kind):
  scores = KINDS[kind]
  weights = np.asarray(COMPILED[name](scores, MASK))
  order = np.argsort(scores[MASK], kind="stable")
  weights, ordered = weights[MASK][order], scores[MASK][order]
  higher = np.diff(ordered) > 0
  assert np.all(np.diff(weights)[higher] >= -1e-7)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_order_of_the_samples_does_not_matter(name):
  order = np.random.default_rng(5).permutation(SIZE)
  np.testing.assert_allclose(
    COMPILED[name](SCORES[order], MASK[order]),
    np.asarray(COMPILED[name](SCORES, MASK))[order],
    rtol=1e-5,
  )


@pytest.mark.parametrize("temperature", [0.03, 0.5, 1, 20.0])
def test_softmax_closed_form(temperature):
  wide = SCORES.astype(np.float64) / temperature
  expected = np.exp(wide - wide.max())
  weights = gm.softmax(temperature)(jnp.asarray(SCORES))
  np.testing.assert_allclose(
    weights, expected / expected.sum(), rtol=1e-5, atol=1e-7
  )


def test_softmax_at_extreme_temperatures():
  scores = jnp.array([1.0, 3.0, 2.0, 3.0])
  mask = np.array([True, True, True, False])
  for coldest in (1e-30, 1e-37, 1e-45, 1e-60):
    fn = gm.softmax(coldest)
    np.testing.assert_array_equal(fn(scores), [0, 0.5, 0, 0.5])
    np.testing.assert_array_equal(fn(scores, mask), [0, 1, 0, 0])
  for hottest in (1e30, 1e38, 1e60):
    fn = gm.softmax(hottest)
    np.testing.assert_allclose(fn(scores), 0.25, rtol=1e-6)
    np.testing.assert_allclose(fn(scores, mask), mask / 3, rtol=1e-6)


def test_softmax_takes_an_array_temperature_inside_jit():
  fn = jax.jit(lambda scores, t: gm.softmax(t)(scores))
  for temperature in (0.1, 2.0):
    np.testing.assert_allclose(
      fn(SCORES, np.float32(temperature)),
      gm.softmax(temperature)(jnp.asarray(SCORES)),
      rtol=1e-5,
    )
  assert fn._cache_size() == 1


def test_softmax_follows_a_schedule():
  schedule = optax.linear_schedule(2.0, 0.5, 10)
  fn = jax.jit(lambda scores, step: gm.softmax(schedule)(scores, None, step))
  for step, temperature in ((0, 2.0), (5, 1.25), (10, 0.5), (99, 0.5)):
    np.testing.assert_allclose(
      fn(SCORES, step), gm.softmax(temperature)(jnp.asarray(SCORES)), rtol=1e-5
    )
  assert fn._cache_size() == 1


def test_softmax_with_a_schedule_that_reaches_zero_takes_the_best():
  schedule = optax.linear_schedule(1.0, 0.0, 10)
  weights = gm.softmax(schedule)(jnp.array([1.0, 3.0, 2.0]), None, 10)
  np.testing.assert_array_equal(weights, [0, 1, 0])


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.9])
def test_ess_softmax_hits_its_target_at_any_scale(scale, fraction):
  scores = SCORES * np.float32(scale)
  weights = ess_softmax(scores, fraction)
  np.testing.assert_allclose(size_of(weights), fraction * SIZE, rtol=1e-3)
  masked = ess_softmax(scores, fraction, MASK)
  target = max(fraction * MASK.sum(), 1)
  np.testing.assert_allclose(size_of(masked), target, rtol=1e-3)
  # A softmax it is: weights are log-linear in the scores.
  logs = np.log(weights[weights > 1e-6])
  line = np.polyfit(scores[weights > 1e-6] / scale, logs, 1)
  np.testing.assert_allclose(
    logs, np.polyval(line, scores[weights > 1e-6] / scale), atol=1e-3
  )


def test_ess_softmax_shifts_with_the_scores():
  np.testing.assert_allclose(
    ess_softmax(SCORES + np.float32(64), 0.3),
    ess_softmax(SCORES, 0.3),
    atol=1e-5,
  )


@pytest.mark.parametrize("outlier", [1e2, -1e2, 1e4, -1e4, 1e6, -1e6, -1e30])
def test_ess_softmax_hits_its_target_beside_an_outlier(outlier):
  scores = SCORES.copy()
  scores[7] = outlier
  np.testing.assert_allclose(
    size_of(ess_softmax(scores, 0.3)), 0.3 * SIZE, rtol=1e-3
  )


def test_ess_softmax_of_one_is_uniform():
  np.testing.assert_allclose(ess_softmax(SCORES, 1), 1 / SIZE, rtol=1e-4)


def test_ess_softmax_below_one_sample_takes_the_best():
  weights = ess_softmax(SCORES, 1e-3)
  assert np.argmax(SCORES) == np.argmax(weights)
  np.testing.assert_allclose(weights.max(), 1, rtol=1e-5)


def test_ess_softmax_shares_the_weight_among_ties_for_the_best():
  # Ten tie and the target is 3.2: the ten it is, alike, and none of the rest.
  scores = np.where(np.arange(SIZE) < 10, 1, SCORES - 9).astype(np.float32)
  weights = ess_softmax(scores, 0.1)
  np.testing.assert_allclose(weights[:10], 0.1, rtol=1e-5)
  np.testing.assert_allclose(weights[10:], 0, atol=1e-6)


def test_ess_softmax_hits_its_target_with_two_values():
  weights = ess_softmax(KINDS["two values"], 0.8)
  np.testing.assert_allclose(size_of(weights), 0.8 * SIZE, rtol=1e-3)


@pytest.mark.parametrize(
  ("f", "size", "expected"),
  [
    (0.25, 32, 8),
    (1.0, 32, 32),
    (0.3, 10, 3),
    (0.01, 32, 1),
    (0.1, 5, 1),
    (0.9, 5, 4),
    (0.7, 10, 7),
    (0.6, 5, 3),
  ],
)
def test_top_fraction_counts(f, size, expected):
  scores = SCORES[:size]
  weights = np.asarray(jax.jit(gm.top_fraction(f))(scores))
  chosen = np.argsort(-scores)[:expected]
  assert set(np.flatnonzero(weights)) == set(chosen)
  np.testing.assert_allclose(weights[chosen], 1 / expected, rtol=1e-6)


def test_top_fraction_is_of_the_real_samples():
  weights = np.asarray(COMPILED["top_fraction"](SCORES, MASK))
  assert np.count_nonzero(weights) == max(1, round(0.25 * int(MASK.sum())))
  assert not weights[~MASK].any()


def test_top_fraction_gives_ties_to_the_earlier_sample():
  np.testing.assert_array_equal(
    gm.top_fraction(0.5)(jnp.array([1.0, 2.0, 2.0, 2.0])), [0, 0.5, 0.5, 0]
  )


def test_positive_takes_scores_above_zero_alike():
  weights = gm.positive()(jnp.array([0.0, 5.0, -1.0, 1e-6]))
  np.testing.assert_array_equal(weights, [0, 0.5, 0, 0.5])


def test_positive_skips_where_it_is_told_to():
  fn = gm.positive(otherwise="skip")
  np.testing.assert_array_equal(fn(jnp.array([0.0, -1.0])), 0)
  assert size_of(fn(jnp.array([0.0, -1.0]))) == 0
  np.testing.assert_array_equal(
    fn(jnp.array([1.0, 2.0]), np.array([False, False])), 0
  )
  scores = jnp.asarray(SCORES)
  np.testing.assert_array_equal(fn(scores, MASK), gm.positive()(scores, MASK))
  with pytest.raises(ValueError, match=r"otherwise is 'raise'.*'skip'"):
    gm.positive(otherwise="raise")


def test_a_skipped_step_has_no_gradient():
  step = gm.mimic_value_and_grad(
    lambda params, batch: batch * params["w"],
    weighting=gm.positive(otherwise="skip"),
  )
  (_, info), grads = jax.jit(step)(
    {"w": jnp.ones([])}, {"w": jnp.array(2.0)}, jnp.array([1.0, 2.0])
  )
  np.testing.assert_array_equal(info.scores, [-1, -2])
  assert grads["w"] == info.effective_sample_size == 0


def test_warmup_is_uniform_and_then_it_is_not():
  inner = gm.softmax(0.5)
  weighting = jax.jit(gm.warmup(inner, steps=3))
  uniform = gm.uniform()(SCORES, MASK)
  for step, expected in ((0, uniform), (2, uniform), (3, inner(SCORES, MASK))):
    np.testing.assert_allclose(weighting(SCORES, MASK, step), expected)
  with pytest.raises(ValueError, match="pass step="):
    gm.warmup(inner, steps=3)(SCORES, MASK)
  with pytest.raises(ValueError, match="expected 0 or more"):
    gm.warmup(inner, steps=-1)


def test_warmup_of_training_is_plain_until_it_is_over():
  """Two steps of the engine: one down the mean, one down the weighted sum."""
  params, reference = jnp.zeros(2), jnp.ones(2)
  batch = jnp.array([[1.0, 0.0], [0.0, -3.0]])

  def losses_fn(params, batch):
    return -jnp.sum(batch * params[None], axis=-1)

  fn = jax.jit(
    gm.mimic_value_and_grad(
      losses_fn, weighting=gm.warmup(gm.top_fraction(0.5), steps=1)
    )
  )
  _, first = fn(params, reference, batch, step=0)
  _, second = fn(params, reference, batch, step=1)
  np.testing.assert_allclose(first, -batch.mean(axis=0))
  np.testing.assert_allclose(second, -batch[0])


def test_proportional_closed_form():
  positive = np.maximum(SCORES, 0) * MASK
  np.testing.assert_allclose(
    COMPILED["proportional"](SCORES, MASK), positive / positive.sum(), rtol=1e-6
  )
  np.testing.assert_allclose(
    COMPILED["proportional"](KINDS["negative"], MASK),
    MASK / MASK.sum(),
    rtol=1e-6,
  )
  huge = gm.proportional()(jnp.full(64, 8e37))  # their sum is out of range
  np.testing.assert_allclose(huge, 1 / 64, rtol=1e-6)


def test_positive_falls_back_to_the_plain_mean():
  np.testing.assert_allclose(
    COMPILED["positive"](KINDS["negative"], MASK), MASK / MASK.sum(), rtol=1e-6
  )
  # What is positive only outside the mask doesn't count.
  scores = np.where(MASK, -1, 1).astype(np.float32)
  np.testing.assert_allclose(
    COMPILED["positive"](scores, MASK), MASK / MASK.sum(), rtol=1e-6
  )


def test_effective_sample_size_closed_form():
  cases = [
    ([0.25] * 4, 4),
    ([1, 0, 0], 1),
    ([0, 0], 0),
    ([0.5, 0.25, 0.25], 1 / 0.375),
    ([2, 2, 0], 2),  # any scale
  ]
  for weights, expected in cases:
    size = gm.effective_sample_size(jnp.array(weights, jnp.float32))
    assert size.shape == ()
    np.testing.assert_allclose(size, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, -np.inf])
def test_softmax_refuses_a_temperature_that_is_not_above_zero(value):
  with pytest.raises(ValueError, match=r"temperature is .*above 0"):
    gm.softmax(value)
  with pytest.raises(ValueError, match=r"temperature is .*above 0"):
    gm.softmax(jnp.float32(value))


def test_softmax_refuses_a_temperature_that_is_not_a_number():
  with pytest.raises(TypeError, match=r"temperature is 'hot'.*a number"):
    gm.softmax("hot")
  with pytest.raises(TypeError, match=r"temperature is None.*a number"):
    gm.softmax(None)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, np.nan, np.inf])
def test_fractions_out_of_range_are_refused(value):
  with pytest.raises(ValueError, match=r"fraction is .*in \(0, 1\]"):
    gm.ess_softmax(value)
  with pytest.raises(ValueError, match=r"^f is .*in \(0, 1\]"):
    gm.top_fraction(value)


def test_a_schedule_without_a_step_is_refused():
  fn = gm.softmax(optax.constant_schedule(1.0))
  with pytest.raises(ValueError, match=r"schedule but no step.*pass step="):
    fn(jnp.asarray(SCORES))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_mask_of_another_length_is_refused(name):
  with pytest.raises(ValueError, match=r"mask has shape \(3,\).*\(32,\)"):
    WEIGHTINGS[name](jnp.asarray(SCORES), jnp.ones(3, bool))


FINITE = {
  "softmax": gm.softmax(1.0),
  "cold": gm.softmax(1e-45),
  "hot": gm.softmax(1e38),
  "ess": gm.ess_softmax(0.3),
  "least ess": gm.ess_softmax(1e-6),
  "top": gm.top_fraction(0.3),
  "positive": gm.positive(),
  "proportional": gm.proportional(),
  "uniform": gm.uniform(),
  "warmup": gm.warmup(gm.ess_softmax(0.3), steps=1),
}


def finite_scores(rng, size, dtype):
  """Of any magnitude that the dtype has, alike or not."""
  limits = jnp.finfo(dtype)
  most, least = float(limits.max), float(limits.smallest_subnormal)
  exponents = rng.uniform(np.log10(least), np.log10(most) - 0.01, size)
  draws = (
    rng.normal(size=size),
    rng.choice([-1, 1], size) * 10.0**exponents,
    rng.choice([most, -most], size),
    np.full(size, rng.choice([0, most, -most, least])),
    rng.choice([least, -least, 0], size),
    rng.choice([most, -most, least, 0, 1], size),
  )
  return draws[rng.integers(len(draws))].astype(dtype)


@pytest.mark.parametrize(
  "sizes", [(7,), pytest.param((1, 7), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow)
    if name in ("hot", "least ess", "warmup")
    else name
    for name in FINITE
  ],
)
def test_weights_of_any_finite_scores_sum_to_one(name, sizes):
  weigh = jax.jit(lambda s, m: FINITE[name](s, m, jnp.int32(3)))
  rng = np.random.default_rng(0)
  for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    for size in sizes:
      for _ in range(40):
        scores = finite_scores(rng, size, dtype)
        mask = rng.random(size) < rng.choice([0.6, 1])
        scores[~mask] = np.nan
        weights = np.asarray(weigh(scores, mask))
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
        assert not weights[~mask].any()
        assert abs(weights.sum() - mask.any()) < 1e-5, (scores, weights)


def test_weights_of_huge_scores_are_those_of_small_ones():
  scores = np.float32([-3, 1, 2, 3])
  for weigh, at_one in (
    (gm.softmax(8e37), gm.softmax(0.8)),
    (gm.ess_softmax(0.5), gm.ess_softmax(0.5)),
    (gm.proportional(), gm.proportional()),
  ):
    np.testing.assert_allclose(
      jax.jit(weigh)(scores * np.float32(1e38)), at_one(scores), rtol=1e-4
    )
