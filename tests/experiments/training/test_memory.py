"""Weights by scores of earlier epochs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import methods
from experiments.training import memory, steps

N, B, D = 9, 4, 3
RATE = 0.05


def losses_fn(params, batch):
  gaps = batch["x"] @ params["w"] - batch["y"]
  return gaps**2, gaps > 0


def draw_epochs(rng, count):
  """Three batches an epoch; the last has padding, which is row 0."""
  for _ in range(count):
    rows = np.append(rng.permutation(N), [0, 0, 0])
    yield from zip(
      rows.reshape(-1, B), (np.arange(12) < N).reshape(-1, B), strict=True
    )


@pytest.mark.parametrize(
  ("method", "every"),
  [
    ("grad_mimic", 2),
    ("grad_mimic", 3),
    ("grad_mimic_averaged", 1),
    ("grad_mimic_averaged", 2),
  ],
)
def test_weights_are_those_of_numpy(make_config, method, every):
  """Four epochs; a sample that is broken in the first has no score in it.

  Where the next epoch measures none, it has that of its batch mates.
  """
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(N, D)), rng.normal(size=N)
  w, reference = rng.normal(size=D), rng.normal(size=D)
  config = make_config(
    **{"mimic.refresh_epochs": every, "mimic.weighting": "softmax"}
  ).mimic
  chosen = methods.create(method, config)
  plan = memory.make_plan(config, chosen, samples=N, steps_per_epoch=3)
  tx = optax.sgd(RATE)
  train_steps = {
    measures: steps.make_train_step(
      losses_fn, tx, chosen, config, memory=plan, measures=measures
    )
    for measures in (True, False)
  }
  state = steps.init_state({"w": jnp.float32(w)}, tx, samples=N)
  toward = {"w": jnp.float32(reference)}
  found: dict[int, list[float]] = {i: [] for i in range(N)}
  for number, (rows, mask) in enumerate(draw_epochs(rng, 4)):
    epoch, broken = number // 3, np.zeros(B, bool)
    if epoch == 0:
      broken = rows == 5
    targets = np.where(broken, np.nan, y[rows])
    state, output = train_steps[plan.measures(number)](
      state,
      toward,
      {
        "x": jnp.float32(x[rows]),
        "y": jnp.float32(targets),
        "mask": jnp.asarray(mask),
        memory.POSITION: jnp.asarray(rows),
      },
    )
    real = mask & ~broken
    gradients = 2 * (x[rows] @ w - y[rows])[:, None] * x[rows]
    way = reference - w
    scores = -gradients @ way / np.linalg.norm(way)
    if epoch % every == 0:
      for i, score in zip(rows[real], scores[real], strict=True):
        found[i].append(score)
    else:
      scores = np.array(
        [
          np.nan
          if not found[i]
          else (
            np.mean(found[i])
            if method == "grad_mimic_averaged"
            else found[i][-1]
          )
          for i in rows
        ]
      )
      # One that was never measured counts like the mean of the others.
      unknown = np.isnan(scores)
      scores[unknown] = scores[real & ~unknown].mean()
    np.testing.assert_allclose(
      output.samples["score"][real], scores[real], rtol=1e-4, atol=1e-5
    )
    strengths = scores[real]
    if method == "grad_mimic_averaged" and epoch % every == 0:
      strengths = np.array([np.mean(found[i]) for i in rows[real]])
    weights = np.zeros(B)
    weights[real] = np.exp(strengths - strengths.max())
    weights /= weights.sum()
    np.testing.assert_allclose(
      output.samples["weight"], weights, rtol=1e-4, atol=1e-6
    )
    w = w - RATE * weights[real] @ gradients[real]
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4, atol=1e-5)


def test_epochs_in_between_measure_nothing(make_config):
  """Their step has no product along a tangent."""
  config = make_config(**{"mimic.refresh_epochs": 2}).mimic
  chosen = methods.create("grad_mimic", config)
  plan = memory.make_plan(config, chosen, samples=N, steps_per_epoch=3)
  tx = optax.sgd(RATE)
  state = steps.init_state({"w": jnp.ones(D)}, tx, samples=N)
  batch = {
    "x": jnp.ones((B, D)),
    "y": jnp.ones(B),
    "mask": jnp.ones(B, bool),
    memory.POSITION: jnp.arange(B),
  }

  def count_products(method, **options):
    step = steps.make_train_step(losses_fn, tx, method, config, **options)
    jaxpr = step.trace(state, {"w": jnp.zeros(D)}, batch).jaxpr
    return str(jaxpr).count("dot_general")

  plain = count_products(None)
  assert count_products(chosen, memory=plan, measures=False) == plain
  assert count_products(chosen, memory=plan) > plain


@pytest.mark.parametrize(
  ("method", "fields", "samples", "message"),
  [
    ("grad_mimic", {"mimic.refresh_epochs": 0}, N, "expected at least 1"),
    ("rho_as_published", {"mimic.refresh_epochs": 2}, N, "expected 1"),
    ("grad_mimic", {"mimic.refresh_epochs": 2}, None, "has no epochs"),
    ("rho_averaged", {}, None, "has no epochs"),
  ],
)
def test_what_cannot_be_remembered_is_refused(
  make_config, method, fields, samples, message
):
  config = make_config(**fields).mimic
  with pytest.raises(ValueError, match=message):
    memory.make_plan(
      config,
      methods.create(method, config),
      samples=samples,
      steps_per_epoch=3,
    )


@pytest.mark.parametrize("method", ["sgd", "random", "distillation"])
def test_methods_without_scores_remember_none(make_config, method):
  config = make_config(**{"mimic.refresh_epochs": 2}).mimic
  chosen = methods.create(method, config)
  assert memory.make_plan(config, chosen, samples=N, steps_per_epoch=3) is None
