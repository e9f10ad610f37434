"""Optax's transformations around ours and within, as the docstring has them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

PARAMS = {"w": np.zeros(2, np.float32), "b": np.zeros((), np.float32)}
REFERENCE = {"w": np.ones(2, np.float32), "b": np.ones((), np.float32)}
ROWS = {
  "w": np.float32([[1, 1], [-1, -1], [-2, -1]]),
  "b": np.float32([1, -1, 2]),
}
MASK = {"w": True, "b": False}


@pytest.fixture(autouse=True)
def lenient_promotion():
  """Optax's counts and steps promote among themselves."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def updates_of(tx, rows=ROWS, params=PARAMS, steps=1):
  state = tx.init(params)
  for _ in range(steps):
    updates, state = tx.update(rows, state, params)
  return updates, state


def same(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    actual,
    expected,
  )


@pytest.fixture(scope="module")
def plain():
  with jax.numpy_dtype_promotion("standard"):
    return updates_of(gm.mimic(optax.sgd(0.1), REFERENCE))[0]


def test_apply_if_finite_goes_inside(plain):
  tx = gm.mimic(optax.apply_if_finite(optax.sgd(0.1), 3), REFERENCE)
  same(updates_of(tx)[0], plain)
  broken = jax.tree.map(lambda x: x * np.float32(np.nan), ROWS)
  updates, state = updates_of(tx, broken)
  same(updates, PARAMS)  # zeros: the step is left out, and counted
  assert optax.tree.get(state, "notfinite_count") == 1


def test_multi_steps_goes_inside(plain):
  tx = gm.mimic(
    optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), REFERENCE
  )
  same(updates_of(tx)[0], PARAMS)
  same(updates_of(tx, steps=2)[0], plain)
  with pytest.raises(ValueError, match="averaged over the batch already"):
    updates_of(optax.MultiSteps(gm.mimic(optax.sgd(0.1), REFERENCE), 2))


def test_lookahead_goes_around(plain):
  params = optax.LookaheadParams.init_synced(PARAMS)
  tx = optax.lookahead(gm.mimic(optax.sgd(0.1), REFERENCE), 5, 0.5)
  updates, _ = updates_of(tx, params=params)
  same(updates.fast, plain)


def test_masked_and_partition_go_inside(plain):
  inside = optax.masked(optax.sgd(0.1), MASK)
  updates, _ = updates_of(gm.mimic(inside, REFERENCE))
  same(updates["w"], plain["w"])
  labels = {"w": "one", "b": "two"}
  parts = {"one": optax.sgd(0.1), "two": optax.sgd(0.2)}
  updates, _ = updates_of(gm.mimic(optax.partition(parts, labels), REFERENCE))
  same(updates, {"w": plain["w"], "b": 2 * plain["b"]})
  with pytest.raises(TypeError, match="layers="):
    optax.masked(gm.mimic(optax.sgd(0.1), REFERENCE), MASK).init(PARAMS)


def test_flatten_clipping_and_adam_go_inside(plain):
  updates, _ = updates_of(gm.mimic(optax.flatten(optax.sgd(0.1)), REFERENCE))
  same(updates, plain)
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
  updates, _ = updates_of(gm.mimic(inner, REFERENCE))
  mean, _ = updates_of(gm.reweight_by_mimic_score(REFERENCE))
  same(updates, updates_of(inner, mean)[0])


def test_docstring_names_them():
  for name in (
    "apply_if_finite",
    "MultiSteps",
    "lookahead",
    "masked",
    "partition",
    "flatten",
    "clip",
    "adam",
    "inject_hyperparams",
  ):
    assert name in gm.reweight_by_mimic_score.__doc__


def test_inject_hyperparams_takes_names_and_numbers(plain):
  inject = optax.inject_hyperparams(gm.mimic)
  updates, state = updates_of(inject(optax.sgd(0.1), REFERENCE))
  same(updates, plain)
  tx = inject(optax.sgd(0.1), REFERENCE, temperature=0.5)
  updates, state = updates_of(tx)
  assert state.hyperparams["temperature"] == 0.5
  made = gm.mimic(optax.sgd(0.1), REFERENCE, weighting=gm.softmax(0.5))
  same(updates, updates_of(made)[0])
  state.hyperparams["temperature"] = jnp.float32(1)
  same(jax.jit(tx.update)(ROWS, state, PARAMS)[0], plain)
  ess = inject(optax.sgd(0.1), REFERENCE, weighting="ess_softmax", fraction=0.5)
  updates, state = updates_of(ess)
  assert state.hyperparams["fraction"] == 0.5
  made = gm.mimic(optax.sgd(0.1), REFERENCE, weighting=gm.ess_softmax(0.5))
  same(updates, updates_of(made)[0])


def test_inject_hyperparams_takes_a_schedule(plain):
  schedule = optax.piecewise_constant_schedule(2.0, {1: 0.5})
  inject = optax.inject_hyperparams(gm.reweight_by_mimic_score)
  tx = inject(REFERENCE, temperature=schedule)
  updates, state = updates_of(tx, steps=2)
  assert state.hyperparams["temperature"] == 1
  same(jax.tree.map(lambda x: -x / 10, updates), plain)
  alone = gm.reweight_by_mimic_score(REFERENCE, temperature=schedule)
  same(updates, updates_of(alone, steps=2)[0])


@pytest.mark.parametrize(
  "weighting",
  [gm.softmax(1.0), gm.positive(), gm.warmup(gm.uniform(), steps=1)],
)
def test_inject_hyperparams_says_what_to_do_with_a_callable(weighting):
  tx = optax.inject_hyperparams(gm.reweight_by_mimic_score)(
    REFERENCE, weighting=weighting
  )
  with pytest.raises(ValueError, match=r"static_args=\('weighting',\)"):
    tx.init(PARAMS)
  tx = optax.inject_hyperparams(
    gm.reweight_by_mimic_score, static_args=("weighting",)
  )(REFERENCE, weighting=weighting)
  expected = gm.reweight_by_mimic_score(REFERENCE, weighting=weighting)
  same(updates_of(tx)[0], updates_of(expected)[0])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"weighting": "ess_softmax"}, "expected fraction="),
    ({"weighting": "top_fraction", "temperature": 1.0}, "expected fraction="),
    ({"weighting": "uniform", "fraction": 0.5}, "expected neither"),
    ({"weighting": gm.uniform(), "temperature": 1.0}, "made already with"),
    ({"weighting": "soft"}, "expected one of 'softmax'"),
    ({"temperature": -1.0}, "temperature is -1.0"),
  ],
)
def test_numbers_of_another_weighting_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    gm.reweight_by_mimic_score(REFERENCE, **options)
