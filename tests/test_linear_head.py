"""A linear head in closed form, against vmap(grad) in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm
from gradmimic_jax import linear_head

B, D, C = 8, 5, 3
RNG = np.random.default_rng(3)
FEATURES = RNG.normal(size=(B, D))
LABELS = RNG.integers(0, C, B).astype(np.int32)
HEAD = {"kernel": RNG.normal(size=(D, C)), "bias": RNG.normal(size=C)}
REFERENCE = {"kernel": RNG.normal(size=(D, C)), "bias": RNG.normal(size=C)}
MASK = np.arange(B) != 1
MADE = {
  "separable": gm.matching.separable(),
  "least_squares": gm.matching.least_squares(),
  "omp": gm.matching.omp(0.4),
  "omp_direction": gm.matching.omp(0.4, target="direction"),
}
FAST = {("least_squares", True)}
SCORES = ("projection", "cosine", "gradient_norm", *MADE)


def losses_fn(params, batch):
  features, labels = batch
  logits = features @ params["kernel"] + jnp.expand_dims(params["bias"], 0)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def logits():
  return FEATURES @ HEAD["kernel"] + HEAD["bias"]


@jax.jit
def rows(params):
  def loss(params, sample):
    return losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

  grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(
    params, (FEATURES, LABELS)
  )
  return grads["kernel"].reshape(B, -1), grads["bias"]


@pytest.mark.parametrize(
  "has_bias", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_measures_are_those_of_the_gradients(has_bias):
  with jax.enable_x64(True):
    kernels, biases = rows(HEAD)
    flat = np.concatenate([kernels, biases], 1) if has_bias else kernels
    errors = np.asarray(linear_head.errors(logits(), LABELS))
    assert errors.dtype == np.float64
    np.testing.assert_allclose(
      linear_head.gram(FEATURES, errors, has_bias=has_bias),
      flat @ flat.T,
      atol=1e-12,
    )
    np.testing.assert_allclose(
      linear_head.gradient_norms(FEATURES, errors, has_bias=has_bias),
      np.linalg.norm(flat, axis=1),
      rtol=1e-12,
    )
    v, u = REFERENCE["kernel"], REFERENCE["bias"] if has_bias else None
    unit = v.ravel() if u is None else np.append(v.ravel(), u)
    unit /= np.linalg.norm(unit)
    np.testing.assert_allclose(
      linear_head.descents(FEATURES, errors, v, u), -flat @ unit, atol=1e-12
    )
    weights = RNG.random(B)
    kernel, bias = linear_head.gradient(FEATURES, errors, weights)
    np.testing.assert_allclose(kernel.ravel(), weights @ kernels, atol=1e-12)
    np.testing.assert_allclose(bias, weights @ biases, atol=1e-12)


@pytest.mark.parametrize(
  ("name", "has_bias"),
  [
    *FAST,
    *(
      pytest.param(name, number % 2 == 0, marks=pytest.mark.slow)
      for number, name in enumerate(SCORES)
      if (name, number % 2 == 0) not in FAST
    ),
  ],
)
def test_scores_are_those_of_the_engines(name, has_bias):
  score = MADE.get(name, name)
  with jax.enable_x64(True):
    args = jax.tree.map(jnp.asarray, (HEAD, REFERENCE, (FEATURES, LABELS)))
    layers = None if has_bias else "kernel"
    engine = jax.jit(gm.mimic_scores(losses_fn, score=score, layers=layers))
    right = engine(*args, mask=jnp.asarray(MASK)).scores
    gap = {k: REFERENCE[k] - HEAD[k] for k in HEAD}
    scores = linear_head.scores(
      FEATURES,
      linear_head.errors(logits(), LABELS),
      score=score,
      direction=(gap["kernel"], gap["bias"] if has_bias else None),
      has_bias=has_bias,
      mask=MASK,
    )
    np.testing.assert_allclose(scores, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
  "name",
  [
    "projection",
    *(pytest.param(name, marks=pytest.mark.slow) for name in MADE),
  ],
)
def test_a_broken_sample_costs_itself_only(name):
  errors = linear_head.errors(np.float32(logits()), LABELS)
  features = np.float32(FEATURES)
  broken = features.copy()
  broken[4] = np.inf
  gap = tuple(np.float32(REFERENCE[k] - HEAD[k]) for k in ("kernel", "bias"))
  options = {"score": MADE.get(name, name), "direction": gap}
  found = linear_head.scores(broken, errors, mask=MASK, **options)
  rest = MASK & (np.arange(B) != 4)
  right = linear_head.scores(features, errors, mask=rest, **options)
  assert np.isnan(found[4])
  assert found[1] == 0
  np.testing.assert_allclose(found[rest], right[rest], 1e-5, 1e-6)
  kernel, _ = linear_head.gradient(broken, errors, jnp.asarray(rest * 0.1))
  assert np.isfinite(kernel).all()


@pytest.mark.slow
def test_labels_may_be_probabilities():
  soft = RNG.dirichlet(np.ones(C), B).astype(np.float32)
  of_rows = jax.vmap(jax.grad(lambda z, y: -jnp.sum(y * jax.nn.log_softmax(z))))
  np.testing.assert_allclose(
    linear_head.errors(np.float32(logits()), soft),
    of_rows(jnp.float32(logits()), soft),
    atol=1e-6,
  )


def test_no_gradient_of_a_sample_exists():
  jaxpr = jax.make_jaxpr(
    lambda h, e: linear_head.scores(h, e, score=MADE["omp"])
  )(jnp.zeros((6, 50)), jnp.zeros((6, 40)))
  assert "6,50,40" not in str(jaxpr)
  assert "6,2000" not in str(jaxpr)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"score": "excess_loss"}, "needs no gradients but losses"),
    ({}, "direction is NoneType.*pair"),
    ({"direction": (np.zeros((D, C)), None)}, "has_bias is True"),
    (
      {"direction": (np.zeros((C, D)), np.zeros(C))},
      r"kernel has shape \(3, 5\); expected \(5, 3\)",
    ),
    (
      {"features": np.zeros((7, 5), np.float32)},
      r"features has shape \(7, 5\)",
    ),
    ({"mask": np.ones(3, bool)}, "mask has shape"),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  zeros = np.zeros((B, C), np.float32)
  given = {"features": np.float32(FEATURES), "errors": zeros} | options
  with pytest.raises(ValueError, match=message):
    linear_head.scores(given.pop("features"), given.pop("errors"), **given)


def test_labels_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"labels has shape \(8,\) and dtype fl"):
    linear_head.errors(np.float32(logits()), LABELS.astype(np.float32))
