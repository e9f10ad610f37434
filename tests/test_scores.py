"""Scores that others use, against numbers worked out by hand in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

B, D = 7, 3
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(B, D)), RNG.normal(size=B)
BASELINE = RNG.uniform(size=B)
W, C = RNG.normal(size=D), 0.3
MASK = np.arange(B) != 5
ENGINES = (
  {"engine": "forward"},
  {"engine": "per_sample"},
  {"engine": "per_sample", "microbatch_size": 2},
)


def losses_fn(params, batch):
  return (batch["x"] @ params["w"] + params["c"] - batch["y"]) ** 2


# What takes all engines' scores in one way asks two of them.
TWO_ENGINES = (ENGINES[0], ENGINES[2])


@functools.cache
def compiled(score, engine, layers, temperature):
  step = gm.mimic_value_and_grad(
    losses_fn,
    score=score,
    layers=layers,
    weighting=gm.softmax(temperature),
    **dict(engine),
  )
  return jax.jit(step)


def run(score, reference, engine, *, layers=None, temperature=2.0):
  params = {"w": W, "c": np.array(C)}
  batch = {"x": X, "y": Y}
  args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))
  step = compiled(score, tuple(engine.items()), layers, temperature)
  return step(args[0], reference, args[1], mask=jnp.asarray(MASK))


def residuals():
  return X @ W + C - Y


def reweighted(scores, temperature):
  """The gradient of w and c that softmax weights of these scores give."""
  weights = np.where(MASK, np.exp((scores - scores.max()) / temperature), 0)
  weights /= weights.sum()
  slopes = 2 * weights * residuals()
  return slopes @ X, slopes.sum()


@pytest.mark.parametrize(
  ("engine", "layers"),
  [*((engine, None) for engine in ENGINES), (ENGINES[2], "w")],
)
def test_gradient_norms_in_every_engine(engine, layers):
  expected = 2 * np.abs(residuals())
  expected *= np.sqrt((X**2).sum(axis=1) + (layers is None))
  (_, info), grads = run("gradient_norm", None, engine, layers=layers)
  np.testing.assert_allclose(info.scores, np.where(MASK, expected, 0), 1e-5)
  w, c = reweighted(expected, 2.0)
  np.testing.assert_allclose(grads["w"], w, 1e-5, 1e-6)
  np.testing.assert_allclose(grads["c"], c, 1e-5, 1e-6)
  assert info.distance == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_excess_losses_in_every_engine(engine):
  expected = residuals() ** 2 - BASELINE
  baseline = jnp.asarray(BASELINE, jnp.float32)
  (_, info), grads = run("excess_loss", baseline, engine)
  np.testing.assert_allclose(
    info.scores, np.where(MASK, expected, 0), 1e-5, 1e-6
  )
  w, c = reweighted(expected, 2.0)
  np.testing.assert_allclose(grads["w"], w, 1e-5, 1e-6)
  np.testing.assert_allclose(grads["c"], c, 1e-5, 1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_baseline_that_is_not_finite_costs_its_own_sample_only(engine):
  baseline = jnp.asarray(BASELINE, jnp.float32).at[2].set(jnp.nan)
  (_, info), grads = run("excess_loss", baseline, engine)
  assert np.isnan(info.scores[2])
  assert info.weights[2] == 0
  np.testing.assert_allclose(info.weights.sum(), 1, rtol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_excess_loss_computes_no_tangent():
  batch = {"x": jnp.zeros((B, D)), "y": jnp.zeros(B)}
  params = {"w": jnp.zeros(D), "c": jnp.zeros([])}
  scores = gm.mimic_scores(losses_fn, score="excess_loss")
  text = str(jax.make_jaxpr(scores)(params, jnp.zeros(B), batch))
  plain = str(jax.make_jaxpr(losses_fn)(params, batch))
  assert text.count("dot_general") == plain.count("dot_general") == 1


@pytest.mark.parametrize(
  ("reference", "error", "message"),
  [
    (np.zeros(3, np.float32), ValueError, r"shape \(3,\).*\[7\]"),
    (np.zeros(B, np.int32), ValueError, "int32"),
    ({"w": np.zeros(D)}, TypeError, "dict"),
    (None, TypeError, "NoneType"),
  ],
)
def test_a_baseline_of_another_kind_is_refused(reference, error, message):
  with pytest.raises(error, match=message):
    run("excess_loss", reference, {})


def test_the_transformation_takes_gradient_norms_and_refuses_losses():
  with pytest.raises(ValueError, match="mimic_value_and_grad"):
    gm.reweight_by_mimic_score({"w": jnp.zeros(D)}, score="excess_loss")
  params = {"w": jnp.zeros(D)}
  tx = gm.reweight_by_mimic_score(params, score="gradient_norm")
  rows = jnp.asarray(X, jnp.float32)
  update = functools.partial(tx.update, {"w": rows})
  updates, _ = jax.jit(update)(tx.init(params), params)
  norms = np.linalg.norm(X, axis=1)
  weights = np.exp(norms - norms.max())
  np.testing.assert_allclose(
    updates["w"], weights @ X / weights.sum(), 1e-5, 1e-6
  )


@pytest.mark.parametrize("engine", TWO_ENGINES)
def test_given_scores_are_what_weights_come_from(engine):
  given = jnp.asarray(BASELINE, jnp.float32)
  (_, info), grads = run("given", given, engine, temperature=0.5)
  np.testing.assert_array_equal(info.scores, jnp.where(MASK, given, 0))
  w, c = reweighted(BASELINE, 0.5)
  np.testing.assert_allclose(grads["w"], w, 1e-5, 1e-6)
  np.testing.assert_allclose(grads["c"], c, 1e-5, 1e-6)


def test_output_agreement_is_the_slope_of_each_loss_toward_the_reference():
  rng = np.random.default_rng(1)
  outputs, reference = rng.normal(size=(2, B, 4))
  labels = rng.integers(4, size=B)

  def softmax(x):
    parts = np.exp(x - x.max(axis=1, keepdims=True))
    return parts / parts.sum(axis=1, keepdims=True)

  def losses_of(logits):
    logits = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return -jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], 1)[:, 0]

  descent = np.eye(4)[labels] - softmax(outputs)
  expected = (descent * (softmax(reference) - softmax(outputs))).sum(axis=1)
  args = [jnp.asarray(x, jnp.float32) for x in (outputs, reference)]
  scores_fn = functools.partial(gm.scores.agreement, losses_of)
  scores = jax.jit(scores_fn)(*args)
  np.testing.assert_allclose(scores, expected, 1e-5, 1e-6)
  with pytest.raises(ValueError, match="same"):
    scores_fn(args[0], args[1][:, :2])


OUTPUTS = jnp.asarray(RNG.normal(size=(B, 4)), jnp.float32)
LOGITS_BATCH = {
  "x": jnp.asarray(X, jnp.float32),
  "label": jnp.asarray(RNG.integers(4, size=B)),
}
HEAD = {"w": jnp.asarray(RNG.normal(size=(D, 4)), jnp.float32)}


def label_losses(outputs, batch):
  return optax.softmax_cross_entropy_with_integer_labels(
    outputs, batch["label"]
  )


def with_outputs(params, batch):
  outputs = batch["x"] @ params["w"]
  return label_losses(outputs, batch), {"logits": outputs}


AGREEMENT = gm.output_agreement(
  label_losses, outputs_of=lambda aux: aux["logits"]
)


@pytest.mark.parametrize(
  "engine",
  [TWO_ENGINES[0], pytest.param(TWO_ENGINES[1], marks=pytest.mark.slow)],
)
def test_output_agreement_in_both_engines(engine):
  """Scores by the definition; weights and gradient as of given scores."""
  outputs = OUTPUTS.at[2].set(jnp.nan)
  p = np.float64(jax.nn.softmax(with_outputs(HEAD, LOGITS_BATCH)[1]["logits"]))
  descents = np.eye(4)[LOGITS_BATCH["label"]] - p
  expected = (descents * (np.float64(jax.nn.softmax(outputs)) - p)).sum(axis=1)
  counted = MASK & (np.arange(B) != 2)
  weights = (
    np.where(counted, np.exp(expected), 0) / np.exp(expected[counted]).sum()
  )
  step = gm.mimic_value_and_grad(
    with_outputs, score=AGREEMENT, has_aux=True, **engine
  )
  mask = jnp.asarray(MASK)
  (_, info), grads = jax.jit(step)(HEAD, outputs, LOGITS_BATCH, mask=mask)
  found = gm.mimic_scores(with_outputs, score=AGREEMENT, has_aux=True, **engine)
  scores = jax.jit(found)(HEAD, outputs, LOGITS_BATCH, mask=mask).scores
  expected[5] = 0  # padding
  for one in (info.scores, scores):
    np.testing.assert_allclose(one, expected, 1e-5, 1e-6)
  np.testing.assert_allclose(info.weights, weights, 1e-5, 1e-6)
  np.testing.assert_allclose(
    grads["w"], -np.einsum("i,id,ic->dc", weights, X, descents), 1e-5, 1e-6
  )


def test_output_agreement_needs_an_aux_and_rows():
  with pytest.raises(ValueError, match=r"'output_agreement'.*has_aux=True"):
    gm.mimic_value_and_grad(with_outputs, score=AGREEMENT)
  with pytest.raises(ValueError, match=r"losses_fn's aux.*value_and_grad"):
    gm.reweight_by_mimic_score(HEAD, score=AGREEMENT)
  with pytest.raises(ValueError, match=r"'s aux; use gm\.mimic_scores"):
    gm.linear_head.scores(X, X, score=AGREEMENT)
  custom = gm.scores.Score(
    "custom", lambda measured: measured.losses, needs_reference=True
  )
  fn = gm.mimic_scores(losses_fn, score=custom, microbatch_size=2)
  params = {"w": jnp.zeros(D), "c": jnp.zeros([])}
  with pytest.raises(ValueError, match=r"reference/c has shape \(\).*\[7\]"):
    jax.eval_shape(
      fn, params, params, {"x": jnp.ones((B, D)), "y": jnp.ones(B)}
    )


@pytest.mark.parametrize("engine", TWO_ENGINES)
def test_excess_losses_of_outputs_are_those_of_their_losses(engine):
  found = [
    jax.jit(gm.mimic_scores(with_outputs, score=score, has_aux=True, **engine))(
      HEAD, reference, LOGITS_BATCH, mask=jnp.asarray(MASK)
    )
    for score, reference in (
      (gm.excess_loss(label_losses), OUTPUTS),
      ("excess_loss", label_losses(OUTPUTS, LOGITS_BATCH)),
    )
  ]
  np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_random_scores_are_the_same_in_every_engine_and_others_each_step():
  key = jax.random.fold_in(jax.random.key(3), 11)
  drawn = np.where(MASK, jax.random.uniform(key, (B,)), 0)
  score = gm.random_score(3)
  for engine in ENGINES:
    step = jax.jit(gm.mimic_value_and_grad(losses_fn, score=score, **engine))
    params = {"w": jnp.zeros(D), "c": jnp.zeros([])}
    batch = {"x": jnp.ones((B, D)), "y": jnp.ones(B)}
    args = params, None, batch
    mask = jnp.asarray(MASK)
    (_, info), _ = step(*args, mask=mask, step=jnp.int32(11))
    np.testing.assert_array_equal(info.scores, drawn)
    with pytest.raises(ValueError, match="expected step=, the updates done"):
      step(*args, mask=mask)
  (_, info), _ = step(*args, mask=mask, step=jnp.int32(12))
  assert (np.asarray(info.scores)[MASK] != drawn[MASK]).all()


@pytest.mark.slow
def test_the_transformation_draws_the_same_random_scores():
  params = {"w": jnp.zeros(D)}
  tx = gm.reweight_by_mimic_score(
    params, score=gm.random_score(), weighting=gm.top_fraction(0.2)
  )
  state, rows = tx.init(params), jnp.asarray(X, jnp.float32)
  for count in range(2):
    updates, state = tx.update({"w": rows}, state, params)
    key = jax.random.fold_in(jax.random.key(0), count)
    best = np.argmax(jax.random.uniform(key, (B,)))
    np.testing.assert_allclose(updates["w"], rows[best], rtol=1e-6)


@functools.cache
def compiled_scores(score, **engine):
  """Of scaled losses: one compilation for all the scales."""

  def scaled(params, batch, *, scale):
    return scale * losses_fn(params, batch)

  return jax.jit(gm.mimic_scores(scaled, score=score, **engine))


@pytest.mark.parametrize("scale", [1e-20, 1e18])
@pytest.mark.parametrize("score", ["cosine", "gradient_norm"])
def test_norms_of_tiny_and_huge_gradients_are_neither_0_nor_infinite(
  score, scale
):
  params = {"w": jnp.asarray(W, jnp.float32), "c": jnp.asarray(C, jnp.float32)}
  reference = jax.tree.map(lambda x: x + 1, params)
  batch = {
    "x": jnp.asarray(X, jnp.float32),
    "y": jnp.asarray(Y, jnp.float32),
  }
  args = params, reference, batch
  plain = compiled_scores(score)(*args, scale=jnp.float32(1))
  expected = plain.scores * (1 if score == "cosine" else scale)
  for engine in ENGINES:
    found = compiled_scores(score, **engine)(*args, scale=jnp.float32(scale))
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4)


def test_a_gradient_that_is_not_finite_shows_beside_a_baseline_that_is_not():
  def rooted(params, batch):
    return jnp.sqrt(params["w"].sum() * 0) + losses_fn(params, batch)

  baseline = jnp.asarray(BASELINE, jnp.float32).at[5].set(jnp.nan)  # masked
  step = jax.jit(
    gm.mimic_value_and_grad(rooted, score="given", engine="forward")
  )
  params = {"w": jnp.asarray(W, jnp.float32), "c": jnp.asarray(C, jnp.float32)}
  batch = {
    "x": jnp.asarray(X, jnp.float32),
    "y": jnp.asarray(Y, jnp.float32),
  }
  _, grads = step(params, baseline, batch, mask=jnp.asarray(MASK))
  assert np.isnan(grads["w"]).all()
