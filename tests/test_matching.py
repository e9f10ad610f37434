"""Gradient matching: against float64 by hand, scipy's NNLS and a plain OMP."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import gradmimic_jax as gm
from gradmimic_jax import matching

B, D = 9, 4
RNG = np.random.default_rng(7)
X = RNG.normal(size=(B, D)) + 0.5
Y = RNG.normal(size=B)
W, C = RNG.normal(size=D), 0.3
PULL = {"w": RNG.normal(size=D), "c": np.array(-0.7)}
MASK = np.arange(B) != 5
RIDGE = 0.05
ENGINES = ("forward", "per_sample")
SCORES = {
  "separable": matching.separable,
  "least_squares": lambda **kw: matching.least_squares(ridge=RIDGE, **kw),
  "omp": lambda **kw: matching.omp(0.4, ridge=RIDGE, **kw),
}


def losses_fn(params, batch):
  return (batch["x"] @ params["w"] + params["c"] - batch["y"]) ** 2


def reference_direction(params, reference, batch, **kwargs):
  return reference


# Engines and targets once each; each pair of two parameters' values when slow.
FAST = [
  ("least_squares", "forward", "direction"),
  ("omp", "per_sample", "batch"),
]
PAIRS = [
  ("least_squares", "per_sample", "batch"),
  ("omp", "forward", "direction"),
  ("separable", "forward", "batch"),
  ("separable", "per_sample", "direction"),
]


@functools.cache
def compiled(name, engine, target):
  """A jitted step, one for all tests; toward a direction, over w only."""
  return jax.jit(
    gm.mimic_value_and_grad(
      losses_fn,
      direction=reference_direction,
      score=SCORES[name](target=target),
      weighting=gm.proportional(),
      layers="w" if target == "direction" else None,
      engine=engine,
    )
  )


def run(name, engine, target="batch", *, x=X, mask=MASK):
  args = {"w": W, "c": np.array(C)}, PULL, {"x": x, "y": Y[: len(x)]}
  args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)
  return compiled(name, engine, target)(*args, mask=jnp.asarray(mask))


def slow_unless(fast, combinations):
  return [
    pytest.param(*c, marks=() if c in fast else pytest.mark.slow)
    for c in combinations
  ]


STEPS = pytest.mark.parametrize(
  ("name", "engine", "target"),
  slow_unless(FAST, FAST + PAIRS),
)


def gradients(layers=None):
  """Every sample's gradient, `[B, D + 1]`."""
  slopes = 2 * (X @ W + C - Y)
  rows = np.concatenate([X, np.ones((B, 1))], axis=1) * slopes[:, None]
  return rows if layers is None else rows[:, :D]


def target_of(rows, target, layers=None):
  if target == "batch":
    return rows.mean(axis=0)
  pull = np.append(PULL["w"], PULL["c"])[: D if layers else D + 1]
  return -pull / np.linalg.norm(pull)


def pursued(rows, target, limit, ridge):
  """Non-negative orthogonal matching pursuit on the vectors themselves."""
  chosen, x = [], np.zeros(0)
  root = math.sqrt(ridge * (rows**2).sum(axis=1).mean())
  while len(chosen) < limit:
    agreement = rows @ (target - x @ rows[chosen])
    agreement[chosen] = -np.inf
    if agreement.max() <= 1e-9:
      break
    chosen.append(int(agreement.argmax()))
    # The ridge as rows of its own: |A x - b|^2 + root^2 |x|^2.
    stacked = np.vstack([rows[chosen].T, root * np.eye(len(chosen))])
    x, _ = scipy.optimize.nnls(
      stacked, np.append(target, np.zeros(len(chosen)))
    )
  found = np.zeros(len(rows))
  found[chosen] = x
  return found


def expected(name, rows, target):
  if name == "separable":
    return rows @ target / (rows**2).sum(axis=1)
  if name == "least_squares":
    ridge = RIDGE * (rows**2).sum(axis=1).mean()
    return np.linalg.solve(
      rows @ rows.T + ridge * np.eye(len(rows)), rows @ target
    )
  return pursued(rows, target, math.ceil(0.4 * len(rows)), RIDGE)


def proportional(scores):
  parts = np.maximum(scores, 0)
  return parts / parts.sum()


@STEPS
def test_coefficients_and_gradient(name, engine, target):
  layers = "w" if target == "direction" else None
  rows = gradients(layers)[MASK]
  wanted = expected(name, rows, target_of(rows, target, layers))
  (_, info), grads = run(name, engine, target)
  found = np.asarray(info.scores)
  assert found[~MASK] == 0
  # A unit vector as the target leaves a factor open.
  found = found[MASK] * (wanted.sum() / found[MASK].sum())
  if target == "batch":
    np.testing.assert_allclose(info.scores[MASK], wanted, 1e-4, 1e-6)
  np.testing.assert_allclose(found, wanted, 1e-4, 1e-5 * abs(wanted).max())
  weights = proportional(wanted)
  np.testing.assert_allclose(info.weights[MASK], weights, 1e-4, 1e-6)
  total = weights @ gradients()[MASK]
  np.testing.assert_allclose(grads["w"], total[:D], 1e-4, 1e-5)
  np.testing.assert_allclose(grads["c"], total[D], 1e-4, 1e-5)


@pytest.mark.slow
def test_separable_toward_a_direction_takes_microbatches():
  fn = functools.partial(
    gm.mimic_scores,
    losses_fn,
    direction=reference_direction,
    score=matching.separable(target="direction"),
  )
  args = {"w": W, "c": np.array(C)}, PULL, {"x": X, "y": Y}
  args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)
  whole, parts = (f(*args).scores for f in (fn(), fn(microbatch_size=2)))
  np.testing.assert_allclose(parts, whole, 1e-5, 1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_microbatches_are_refused_where_all_samples_are_compared(name):
  with pytest.raises(ValueError, match=rf"microbatch.*matching.{name}.*None"):
    gm.mimic_scores(losses_fn, score=SCORES[name](), microbatch_size=2)


@STEPS
def test_broken_samples_cost_themselves_only(name, engine, target):
  x = X.copy()
  x[2] = np.nan
  x[3] = 1e30  # finite, but the loss overflows
  sound = MASK & ~np.isin(np.arange(B), [2, 3])
  (_, info), grads = run(name, engine, target, x=x)
  (_, without), _ = run(name, engine, target, mask=sound)
  np.testing.assert_array_equal(np.isnan(info.scores), MASK & ~sound)
  np.testing.assert_allclose(info.weights, without.weights, 1e-4, 1e-6)
  np.testing.assert_array_equal(info.weights[~sound], 0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_a_gradient_whose_norm_overflows_costs_itself_only(name):
  rows = gradients().astype(np.float32)
  updates = {"w": jnp.asarray(rows).at[2].set(1e25)}
  params = {"w": jnp.zeros(D + 1)}
  moved = []
  for mask in (MASK, MASK & (np.arange(B) != 2)):
    tx = gm.reweight_by_mimic_score(
      params, score=SCORES[name](), weighting=gm.proportional()
    )
    update = jax.jit(tx.update)
    out, state = update(updates, tx.init(params), params, mask=mask)
    moved.append((out["w"], int(state.nonfinite)))
  np.testing.assert_allclose(moved[0][0], moved[1][0], 1e-5)
  assert (moved[0][1], moved[1][1]) == (1, 0)


@STEPS
def test_one_sample_gets_all_the_weight_and_none_gets_nothing(
  name, engine, target
):
  # Toward the direction, a sample may agree or not; toward itself, it does.
  only = np.arange(B) == 4
  (_, info), _ = run(name, engine, target, mask=only)
  assert target == "direction" or info.scores[4] > 0
  np.testing.assert_array_equal(info.weights, only)
  (_, info), grads = run(name, engine, target, mask=only & False)
  np.testing.assert_array_equal(info.weights, 0)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_a_batch_of_one(name):
  (_, info), _ = run(name, "per_sample", x=X[:1], mask=[True])
  assert info.scores[0] > 0
  np.testing.assert_array_equal(info.weights, [1])


@STEPS
def test_gradients_of_zero_give_uniform_weights(name, engine, target):
  exact = {"w": jnp.zeros(D), "c": jnp.zeros([])}
  batch = {"x": jnp.asarray(X, jnp.float32), "y": jnp.zeros(B)}
  pull = jax.tree.map(jnp.float32, PULL)
  step = compiled(name, engine, target)
  (_, info), _ = step(exact, pull, batch, mask=jnp.asarray(MASK))
  np.testing.assert_array_equal(info.scores, 0)
  np.testing.assert_allclose(info.weights, MASK / MASK.sum(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [1e-4, 1e4])
def test_the_limits_of_the_ridge(ridge):
  rows = np.eye(5) * np.arange(1, 6)[:, None]
  step = gm.mimic_value_and_grad(
    lambda params, batch: batch @ params["w"],
    score=matching.least_squares(ridge=ridge),
    weighting=gm.proportional(),
  )
  args = {"w": jnp.ones(5)}, None, jnp.asarray(rows, jnp.float32)
  (_, info), _ = step(*args)
  agreement = rows @ rows.mean(axis=0)
  wanted = np.full(5, 0.2) if ridge < 1 else agreement / agreement.sum()
  np.testing.assert_allclose(info.weights, wanted, rtol=2e-3)


# One compilation for each size serves all problems.
NNLS = jax.jit(matching.nonnegative_least_squares)
PURSUE = jax.jit(matching.pursue, static_argnums=3)


def test_nonnegative_least_squares_as_scipy_has_it():
  rng = np.random.default_rng(11)
  size = 8
  with jax.enable_x64(True):
    for start in ("empty", "all", "odd") * 20:
      matrix, wanted = rng.normal(size=(12, size)), rng.normal(size=12)
      matrix[:, 1] = matrix[:, 0] + 1e-2 * rng.normal(size=12)
      chosen = rng.random(size) < 0.8
      x = np.zeros(size)
      if start != "empty":
        some = rng.random(size) < 0.5
        x = np.where(chosen & (some | (start == "all")), 1.0, 0)
      # Of NumPy: JAX would compile each number of chosen ones.
      found = np.asarray(
        NNLS(matrix.T @ matrix, matrix.T @ wanted, chosen, x, x > 0)
      )
      right, _ = scipy.optimize.nnls(matrix[:, chosen], wanted)
      np.testing.assert_allclose(found[chosen], right, atol=1e-9)
      np.testing.assert_array_equal(found[~chosen], 0)


@pytest.mark.parametrize("fraction", [0.6, *slow_unless((), [(0.05,), (1.0,)])])
def test_pursuit_as_a_plain_loop_has_it(fraction):
  rng = np.random.default_rng(12)
  size = 10
  with jax.enable_x64(True):
    for _ in range(20):
      rows, target = rng.normal(size=(size, 8)), rng.normal(size=8)
      valid = rng.random(size) < 0.8
      ridge = 1e-2 * (rows[valid] ** 2).sum(axis=1).mean()
      gram = np.where(valid[:, None] & valid, rows @ rows.T, 0)
      found = np.asarray(
        PURSUE(gram + ridge * np.eye(size), rows @ target, valid, fraction)
      )
      limit = math.ceil(fraction * valid.sum())
      np.testing.assert_allclose(
        found[valid], pursued(rows[valid], target, limit, 1e-2), atol=1e-9
      )
      np.testing.assert_array_equal(found[~valid], 0)
      assert (found > 0).sum() <= limit


def test_pursuit_takes_no_more_than_its_share_in_float32():
  """In float32, 0.3 * 10 is more than 3."""
  gram = jnp.eye(10) * 2
  found = PURSUE(gram, jnp.arange(1.0, 11.0), jnp.ones(10, bool), 0.3)
  np.testing.assert_allclose(found, [0] * 7 + [4, 4.5, 5], rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: matching.omp(0.0), "fraction is 0.0"),
    (lambda: matching.omp(0.3, ridge=0.0), "ridge is 0.0"),
    (lambda: matching.least_squares(ridge=-1.0), "ridge is -1.0"),
    (lambda: matching.separable(target="mean"), "target is 'mean'.*'batch'"),
    (lambda: matching.omp(0.3, target="mean"), "target is 'mean'.*'batch'"),
  ],
)
def test_options_out_of_range_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
