"""Directions in function space against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

RNG = np.random.default_rng(0)
SIZE, FEATURES, CLASSES = 9, 4, 3
BATCH = {
  "x": RNG.normal(size=(SIZE, FEATURES)).astype(np.float32),
  "y": RNG.integers(0, CLASSES, SIZE).astype(np.int32),
}
MASK = np.arange(SIZE) % 4 != 2
PARAMS = {"w": RNG.normal(size=(FEATURES, CLASSES)).astype(np.float32)}
TARGETS = (3 * RNG.normal(size=(SIZE, CLASSES))).astype(np.float32)


def outputs_fn(params, batch, scale=1.0):
  return scale * (batch["x"] @ params["w"])


def losses_fn(params, batch, scale=1.0):
  return optax.softmax_cross_entropy_with_integer_labels(
    outputs_fn(params, batch, scale), batch["y"]
  )


def softmax(logits):
  shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
  return shifted / shifted.sum(axis=1, keepdims=True)


def kl_direction(mask, targets=TARGETS):
  """Minus the gradient of the mean KL of a linear model, in closed form."""
  x = BATCH["x"].astype(np.float64)
  learner = softmax(x @ PARAMS["w"].astype(np.float64))
  errors = softmax(targets.astype(np.float64)) - learner
  return x[mask].T @ errors[mask] / mask.sum()


def by_hand(direction, mask):
  """Scores of a linear model along a direction, `[B]`."""
  x = BATCH["x"].astype(np.float64)
  errors = np.eye(CLASSES)[BATCH["y"]] - softmax(x @ PARAMS["w"])
  descents = np.einsum("bf,bc,fc->b", x, errors, direction)
  return np.where(mask, descents / np.linalg.norm(direction), 0)


@pytest.mark.parametrize(
  ("options", "masked"),
  [
    ({"engine": "forward"}, True),
    ({"microbatch_size": 4}, False),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ({"engine": "forward"}, False),
        ({"microbatch_size": 4}, True),
        ({"engine": "per_sample"}, True),
        ({"engine": "per_sample"}, False),
      )
    ),
  ],
)
def test_toward_outputs_descends_the_divergence(options, masked):
  mask = MASK if masked else MASK | True
  fn = gm.mimic_value_and_grad(
    losses_fn, direction=gm.toward_outputs(outputs_fn), **options
  )
  (_, info), _ = jax.jit(fn)(PARAMS, TARGETS, BATCH, mask=mask)
  direction = kl_direction(mask)
  np.testing.assert_allclose(info.scores, by_hand(direction, mask), atol=1e-5)
  np.testing.assert_allclose(
    info.distance, np.linalg.norm(direction), rtol=1e-5
  )


def test_a_reference_output_that_is_not_finite_does_not_count():
  broken = TARGETS.copy()
  broken[3, 1] = np.nan
  direction = jax.jit(gm.toward_outputs(outputs_fn))(PARAMS, broken, BATCH)
  expected = kl_direction(np.arange(SIZE) != 3)
  np.testing.assert_allclose(direction["w"], expected, atol=1e-6)


@pytest.mark.parametrize(
  "jit",
  [jax.jit, pytest.param(lambda fn: fn, marks=pytest.mark.slow)],
  ids=["jit", "eager"],
)
def test_a_reference_that_agrees_leaves_uniform_weights(jit):
  fn = gm.mimic_value_and_grad(
    losses_fn,
    direction=gm.toward_outputs(outputs_fn),
    weighting=gm.softmax(0.01),
  )
  own = outputs_fn(PARAMS, BATCH)
  (_, info), grads = jit(fn)(PARAMS, own, BATCH)
  assert np.all(np.isfinite(grads["w"]))
  np.testing.assert_allclose(info.weights, np.full(SIZE, 1 / SIZE), rtol=1e-6)
  assert info.distance == 0


def norm_fn(params, batch):
  return jnp.linalg.norm(batch["x"] * params["w"][:, 0][None], axis=1)


@pytest.mark.parametrize(
  "options",
  [
    {},
    pytest.param({"engine": "per_sample"}, marks=pytest.mark.slow),
    {"microbatch_size": 4},
  ],
)
def test_padding_without_a_derivative_costs_the_direction_not_the_step(options):
  """A norm has no derivative at 0; the direction sees the whole batch."""

  def outputs_fn(params, batch):
    return norm_fn(params, batch)[:, None] * jnp.array([[1.0, 2.0]])

  def losses_fn(params, batch):
    return norm_fn(params, batch) ** 2

  batch = {"x": jnp.asarray(BATCH["x"]).at[2].set(0.0)}
  mask = jnp.arange(SIZE) != 2
  fn = gm.mimic_value_and_grad(
    losses_fn, direction=gm.toward_outputs(outputs_fn), **options
  )
  (_, info), _ = jax.jit(fn)(PARAMS, TARGETS[:, :2], batch, mask=mask)
  np.testing.assert_allclose(
    info.weights, np.where(mask, 1 / (SIZE - 1), 0), rtol=1e-6
  )


def test_outputs_of_another_shape_are_refused():
  with pytest.raises(ValueError, match=r"\(9, 2\).*\(9, 3\)"):
    gm.toward_outputs(outputs_fn)(PARAMS, TARGETS[:, :2], BATCH)


def test_keyword_arguments_reach_the_outputs():
  direction = gm.toward_outputs(outputs_fn)
  one = direction(PARAMS, TARGETS, BATCH, scale=1.0)
  two = direction(PARAMS, TARGETS, BATCH, scale=2.0)
  assert np.abs(one["w"] - two["w"]).max() > 0.01


def test_toward_clean_gradient_is_minus_the_mean_gradient():
  clean = jax.tree.map(lambda x: x[:5], BATCH)
  direction = jax.jit(gm.toward_clean_gradient(losses_fn))
  gradient = jax.jit(jax.grad(lambda p: jnp.mean(losses_fn(p, clean))))
  np.testing.assert_allclose(
    direction(PARAMS, clean, BATCH)["w"], -gradient(PARAMS)["w"], rtol=1e-6
  )


def test_clean_samples_that_are_not_finite_do_not_count():
  direction = jax.jit(gm.toward_clean_gradient(losses_fn))
  broken = dict(BATCH)
  broken["x"] = jnp.asarray(broken["x"]).at[1].set(jnp.nan)
  others = jax.tree.map(lambda x: np.delete(np.asarray(x), 1, axis=0), BATCH)
  np.testing.assert_allclose(
    direction(PARAMS, broken, None)["w"],
    direction(PARAMS, others, None)["w"],
    rtol=1e-5,
    atol=1e-7,
  )


def test_what_is_no_losses_or_logits_is_refused():
  def with_aux(params, batch):
    return losses_fn(params, batch), losses_fn(params, batch)

  with pytest.raises(TypeError, match=r"lambda p, b: losses_fn\(p, b\)\[0\]"):
    jax.eval_shape(gm.toward_clean_gradient(with_aux), PARAMS, BATCH, None)
  direction = functools.partial(jax.eval_shape, gm.toward_outputs(outputs_fn))
  with pytest.raises(ValueError, match="int32"):
    direction(PARAMS, np.zeros(TARGETS.shape, np.int32), BATCH)
  with pytest.raises(ValueError, match=r"shape \(9,\)"):
    direction(PARAMS, TARGETS[:, 0], BATCH)
  with pytest.raises(TypeError, match="outputs_fn returned is a tuple"):
    jax.eval_shape(gm.toward_outputs(with_aux), PARAMS, TARGETS, BATCH)


def test_scores_toward_a_clean_gradient_are_its_influence():
  clean = jax.tree.map(lambda x: x[:5], BATCH)
  fn = gm.mimic_scores(losses_fn, direction=gm.toward_clean_gradient(losses_fn))
  scores = jax.jit(fn)(PARAMS, clean, BATCH).scores

  # A small step on one sample lowers the clean loss in proportion to its score.
  @jax.jit
  @jax.vmap
  def clean_losses_after(size, one):
    one = jax.tree.map(lambda x: x[None], one)
    grad = jax.grad(lambda p: losses_fn(p, one)[0])(PARAMS)
    return losses_fn({"w": PARAMS["w"] - size * grad["w"]}, clean)

  before, after = (
    np.asarray(clean_losses_after(size * np.ones(SIZE, "f4"), BATCH), "f8")
    for size in (0, np.float32(1e-3))
  )
  gains = (before - after).mean(axis=1)
  assert np.corrcoef(gains, scores)[0, 1] > 0.999


def test_the_forward_pass_is_shared_with_the_direction():
  params = {"w": np.ones((64, 64), np.float32), "v": np.ones((64, 64), "f")}
  batch = {"x": np.ones((32, 64), np.float32), "y": np.zeros(32, np.int32)}

  def outputs(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]

  def losses(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      outputs(params, batch), batch["y"]
    )

  def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

  plain = flops(jax.grad(lambda p: jnp.mean(losses(p, batch))), params)
  fn = gm.mimic_value_and_grad(losses, direction=gm.toward_outputs(outputs))
  guided = flops(fn, params, outputs(params, batch), batch)
  # Forward 1, direction 2, tangent 2, update 2, over forward 1 and update 2;
  # less where the first layer has no gradient with respect to its input.
  assert guided / plain <= 7 / 3


def normed(params, batch):
  """A model whose copies XLA alone does not merge, for its layer norm."""
  hidden = batch["x"] @ params["w"]
  center = hidden - hidden.mean(axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.square(center).mean(axis=-1, keepdims=True) + 1e-6)
  # A jitted function and a custom derivative lie in between, as in real models.
  return jax.nn.relu(jax.jit(jnp.tanh)(center * scale) @ params["v"])


def headed(params, batch):
  return normed(params, batch) @ params["head"]


def headed_losses(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(
    headed(params, batch), batch["y"]
  )


WIDTHS = {"w": (FEATURES, 64), "v": (64, 64), "head": (64, CLASSES)}
HEADED = {
  name: RNG.normal(size=shape).astype(np.float32) / 8
  for name, shape in WIDTHS.items()
}


def test_sharing_the_forward_pass_changes_no_number():
  shared = gm.toward_outputs(headed)

  def unshared(params, reference, batch, mask):
    return shared(params, reference, batch, mask=mask)

  answers = [
    jax.jit(gm.mimic_value_and_grad(headed_losses, direction=chosen))(
      HEADED, TARGETS, BATCH, mask=jnp.asarray(MASK)
    )
    for chosen in (shared, unshared)
  ]
  for a, b in zip(*map(jax.tree.leaves, answers), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_head_pays_for_no_second_forward_pass():
  def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

  def step(direction):
    return gm.mimic_value_and_grad(
      headed_losses, direction=direction, layers="^head$"
    )

  def lower_bound(params, reference, batch):
    # As much as mimicking must cost: a direction that needs no model.
    return step(gm.toward_weights())(params, HEADED, batch)

  guided = flops(step(gm.toward_outputs(headed)), HEADED, TARGETS, BATCH)
  assert guided / flops(lower_bound, HEADED, TARGETS, BATCH) < 1.1


def test_side_effects_happen_as_often_as_they_are_written():
  seen = []

  def outputs(params, batch):
    jax.debug.callback(lambda x: seen.append(x), jnp.sum(batch["x"]))
    return headed(params, batch)

  def losses(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      outputs(params, batch), batch["y"]
    )

  fn = gm.mimic_scores(losses, direction=gm.toward_outputs(outputs))
  jax.block_until_ready(jax.jit(fn)(HEADED, TARGETS, BATCH))
  jax.effects_barrier()
  assert len(seen) == 2
