"""Scores of points on the way to the reference, and made otherwise."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import methods
from experiments.training import steps

B, D = 7, 5


@pytest.fixture
def problem():
  rng = np.random.default_rng(0)
  return types.SimpleNamespace(
    x=rng.normal(size=(B, D)),
    y=rng.normal(size=B),
    label=np.array([0, 1, 0, 2, 1, 0, 2]),
    mask=np.arange(B) < 6,
    learner=rng.normal(size=D),
    reference=rng.normal(size=D),
  )


def losses_of(problem, weights):
  return (problem.x @ weights - problem.y) ** 2


def step_of(problem, make_config, method, tx=None, first=0, **fields):
  """The state after a step, and the step's samples."""

  def losses_fn(params, batch):
    gaps = batch["x"] @ params["w"] - batch["y"]
    return gaps**2, gaps > 0

  config = make_config(**{f"mimic.{k}": v for k, v in fields.items()}).mimic
  tx = tx or optax.sgd(1.0)
  step = steps.make_train_step(
    losses_fn, tx, methods.create(method, config), config
  )
  state = steps.init_state({"w": jnp.float32(problem.learner)}, tx)
  batch = {
    "x": jnp.float32(problem.x),
    "y": jnp.float32(problem.y),
    "label": jnp.asarray(problem.label),
    "mask": jnp.asarray(problem.mask),
  }
  for _ in range(first):
    state, _ = step(state, {"w": jnp.float32(problem.reference)}, batch)
  before = jax.device_get((state.params["w"], state.opt_state))
  state, output = step(state, {"w": jnp.float32(problem.reference)}, batch)
  return before, np.asarray(state.params["w"]), output.samples


def descents(problem, weights):
  """[B, D], minus each sample's gradient."""
  return -2 * (problem.x @ weights - problem.y)[:, None] * problem.x


def unit(v):
  return v / np.linalg.norm(v)


@pytest.mark.parametrize(
  "points",
  [(0.5,), (0.25, 0.75), pytest.param((0.0, 1.0), marks=pytest.mark.slow)],
)
def test_points_around_the_middle_integrate_to_the_excess_loss(
  problem, make_config, points
):
  """A rule that is exact for lines is exact for losses that are squares."""
  _, moved, samples = step_of(
    problem, make_config, "grad_mimic", points=points, weighting="softmax"
  )
  excess = losses_of(problem, problem.learner)
  excess = excess - losses_of(problem, problem.reference)
  scores = excess / np.linalg.norm(problem.reference - problem.learner)
  known = problem.mask
  np.testing.assert_allclose(samples["score"][known], scores[known], rtol=2e-4)
  weights = np.exp(scores[known] - scores[known].max())
  weights /= weights.sum()
  np.testing.assert_allclose(samples["weight"][known], weights, rtol=2e-3)
  # The step is of the learner's own gradients.
  step = weights @ descents(problem, problem.learner)[known]
  np.testing.assert_allclose(moved - problem.learner, step, rtol=1e-3)


def test_one_point_is_the_mimic_score_there(problem, make_config):
  _, _, samples = step_of(problem, make_config, "grad_mimic", points=(0.3,))
  way = problem.reference - problem.learner
  scores = descents(problem, problem.learner + 0.3 * way) @ unit(way)
  known = problem.mask
  np.testing.assert_allclose(samples["score"][known], scores[known], rtol=1e-4)
  assert samples["weight"][~known] == 0


def test_adams_metric_scales_the_way(problem, make_config):
  before, _, samples = step_of(
    problem, make_config, "grad_mimic_adam", tx=optax.adam(0.05), first=3
  )
  weights, moments = before[0], optax.tree.get(before[1], "nu")["w"]
  way = (problem.reference - weights) / np.sqrt(moments)
  scores = descents(problem, weights) @ unit(way)
  known = problem.mask
  np.testing.assert_allclose(samples["score"][known], scores[known], rtol=1e-3)
  assert (moments > 0).all()


def test_adams_metric_needs_adam(problem, make_config):
  with pytest.raises(ValueError, match=r"expected config\.optimizer\.name"):
    step_of(problem, make_config, "grad_mimic_adam")


def test_scores_less_those_of_the_class(problem, make_config):
  _, _, samples = step_of(problem, make_config, "grad_mimic_by_class")
  scores = descents(problem, problem.learner) @ unit(
    problem.reference - problem.learner
  )
  for label in range(3):
    own = problem.mask & (problem.label == label)
    np.testing.assert_allclose(
      samples["score"][own], scores[own] - scores[own].mean(), atol=1e-4
    )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mimic.points": (1.5,)}, "from 0, the learner,"),
    ({"mimic.points": ()}, "from 0, the learner,"),
    ({"mimic.points": (0.5,), "mimic.direction": "outputs"}, "a way to go"),
  ],
)
def test_points_that_cannot_be(make_config, fields, message):
  with pytest.raises(ValueError, match=message):
    methods.create("grad_mimic", make_config(**fields).mimic)
