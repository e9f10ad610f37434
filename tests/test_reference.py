"""check_reference: its numbers by hand, and its verdicts on trained models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import gradmimic_jax as gm
from gradmimic_jax import reference as reference_lib

N, D, CLASSES, WIDTH = 256, 12, 4, 32


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def mlp(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
  hidden = jnp.tanh(hidden @ params["w2"])
  return cross_entropy(hidden @ params["head"], batch["y"])


def linear(params, batch):
  return cross_entropy(batch["x"] @ params["head"], batch["y"])


def mlp_params(seed):
  rng = np.random.default_rng(seed)
  shapes = {"w1": (D, WIDTH), "w2": (WIDTH, WIDTH), "head": (WIDTH, CLASSES)}
  params = {
    name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32)
    for name, s in shapes.items()
  }
  return params | {"b1": jnp.zeros(WIDTH)}


def blobs(rate=0.0):
  rng = np.random.default_rng(0)
  y = rng.integers(CLASSES, size=N)
  centers = rng.normal(size=(CLASSES, D))
  x = centers[y] + rng.normal(size=(N, D))
  wrong = rng.random(N) < rate
  y = np.where(wrong, (y + 1) % CLASSES, y)
  return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}


def train(losses_fn, params, batch, steps=300):
  """Heavy-ball gradient descent."""

  @jax.jit
  def step(carry, _):
    params, speed = carry
    grads = jax.grad(lambda p: losses_fn(p, batch).mean())(params)
    speed = jax.tree.map(lambda s, g: 0.9 * s - 0.05 * g, speed, grads)
    return (jax.tree.map(jnp.add, params, speed), speed), None

  start = (params, jax.tree.map(jnp.zeros_like, params))
  return jax.lax.scan(step, start, length=steps)[0][0]


@pytest.fixture(scope="module")
def references():
  """Trained on clean labels from the learner's initialisation and another."""
  return {seed: train(mlp, mlp_params(seed), blobs()) for seed in (0, 1)}


@pytest.mark.parametrize(("rate", "steps"), [(0.0, 0), (0.6, 0), (0.4, 15)])
@pytest.mark.parametrize(("seed", "verdict"), [(0, "ok"), (1, "foreign basin")])
def test_references_of_both_basins_are_told_apart(
  references, seed, verdict, rate, steps
):
  batch = blobs(rate)
  params = train(mlp, mlp_params(0), batch, steps)
  report = gm.check_reference(mlp, params, references[seed], batch)
  assert report.verdict == verdict
  assert report.advice == reference_lib.ADVICE[verdict]
  assert f"reference: {verdict}. {report.advice}" in " ".join(
    str(report).split("\n  ")[0].split("\n")
  )
  assert max(map(len, str(report).split("\n"))) <= 100


def test_a_foreign_reference_of_a_convex_model_is_ok():
  rng = np.random.default_rng(1)
  first, second = (
    {"head": jnp.asarray(rng.normal(size=(D, CLASSES)), jnp.float32)}
    for _ in range(2)
  )
  reference = train(linear, second, blobs(), 500)
  report = gm.check_reference(linear, first, reference, blobs(0.4))
  assert report.weight_cosine < 0.5
  assert report.verdict == "ok"


def test_a_reference_behind_the_learner_is_not_better(references):
  report = gm.check_reference(mlp, references[0], mlp_params(0), blobs())
  assert report.verdict == "not better than the learner"
  assert report.reference_loss > report.learner_loss


def test_the_learner_itself_is_identical(references):
  report = gm.check_reference(mlp, references[0], references[0], blobs())
  assert report.verdict == "identical"
  assert report.relative_distance == report.mean_score == 0
  assert np.isnan(report.agreement)


@pytest.mark.parametrize("layers", [None, "head|b1"])
def test_every_number_against_float64(references, layers):
  batch, mask = blobs(0.3), np.arange(N) % 5 != 0
  params, reference = mlp_params(0), references[1]
  report = gm.check_reference(
    mlp,
    params,
    reference,
    batch,
    layers=layers,
    mask=jnp.asarray(mask),
    num_points=5,
  )
  with jax.enable_x64(True):
    p, r, b = jax.tree.map(
      lambda x: (
        np.asarray(x, np.float64) if x.dtype == jnp.float32 else np.asarray(x)
      ),
      (params, reference, batch),
    )
    path = [0, 0.25, 0.5, 0.75, 1]
    one = jax.jit(mlp)
    losses = np.array(
      [
        one(jax.tree.map(lambda p, r, a=a: (1 - a) * p + a * r, p, r), b)
        for a in path
      ]
    )[:, mask]
    gradient = jax.grad(
      lambda p, s: mlp(p, jax.tree.map(lambda x: x[None], s))[0]
    )
    rows = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(p, b)
  chosen = ["b1", "head"] if layers else list(p)
  flat = np.concatenate(
    [np.asarray(rows[k])[mask].reshape(mask.sum(), -1) for k in chosen], axis=1
  )
  v = np.concatenate([(r[k] - p[k]).ravel() for k in chosen])
  matrices = [k for k in p if k != "b1"]  # whatever the layers are
  ours, theirs = (
    np.concatenate([t[k].ravel() for k in matrices]) for t in (p, r)
  )
  all_of_theirs = np.concatenate([r[k].ravel() for k in chosen])
  scores = -flat @ v / np.linalg.norm(v)
  mean = -flat.mean(axis=0)
  count = int(0.3 * mask.sum())
  curve = np.sort(losses, axis=1)[:, :count].mean(axis=1)
  expected = {
    "learner_loss": curve[0],
    "reference_loss": curve[-1],
    "path": path,
    "path_losses": curve,
    "barrier": np.max(curve - np.interp(path, [0, 1], curve[[0, -1]])),
    "relative_barrier": np.max(curve - np.interp(path, [0, 1], curve[[0, -1]]))
    / max(curve[0], curve[-1]),
    "positive_share": np.mean(scores > 0),
    "mean_score": scores.mean(),
    "agreement": stats.spearmanr(scores, losses[0] - losses[-1]).statistic,
    "descent_cosine": mean @ v / np.linalg.norm(mean) / np.linalg.norm(v),
    "weight_cosine": ours
    @ theirs
    / np.linalg.norm(ours)
    / np.linalg.norm(theirs),
    "relative_distance": np.linalg.norm(v) / np.linalg.norm(all_of_theirs),
    "num_samples": mask.sum(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(
      getattr(report, name), value, rtol=1e-4, atol=1e-6, err_msg=name
    )


def test_ranks_share_ties_as_in_scipy():
  x = np.array([3.0, 1.0, 3.0, 2.0, 1.0, 3.0])
  y = np.array([0.0, 0.0, 5.0, 1.0, 1.0, 2.0])
  ours = reference_lib._rank_correlation(x, y)
  assert ours == pytest.approx(stats.spearmanr(x, y).statistic)


def test_samples_that_are_not_finite_do_not_count(references):
  batch = blobs(0.3)
  mask = np.arange(N) != 7
  broken = batch | {"x": batch["x"].at[7].set(jnp.nan)}
  args = mlp, mlp_params(0), references[0]
  report = gm.check_reference(*args, broken)
  expected = gm.check_reference(*args, batch, mask=jnp.asarray(mask))
  assert report.num_samples == N - 1
  assert report.verdict == expected.verdict
  assert report.mean_score == pytest.approx(expected.mean_score, rel=1e-5)
  assert report.descent_cosine == pytest.approx(
    expected.descent_cosine, rel=1e-5
  )


def test_a_reference_whose_losses_overflow_is_not_better():
  params = mlp_params(0)
  reference = jax.tree.map(lambda x: jnp.full_like(x, 3e38), params)
  report = gm.check_reference(mlp, params, reference, blobs())
  assert report.verdict == "not better than the learner"


def test_keyword_arguments_and_aux_are_taken(references):
  """In any unit of losses, and with no second compilation."""
  traces = []

  def losses_fn(params, batch, *, scale, name):
    traces.append(name)
    return scale * mlp(params, batch), batch["y"]

  batch = blobs(0.4)
  expected = gm.check_reference(mlp, mlp_params(0), references[0], batch)
  for scale in (1e-3, 2.0, 100.0):
    for seed, verdict in ((0, "ok"), (1, "foreign basin")):
      report = gm.check_reference(
        losses_fn,
        mlp_params(0),
        references[seed],
        batch,
        has_aux=True,
        scale=jnp.float32(scale),
        name="a",
      )
      assert report.verdict == verdict
      assert report.learner_loss == pytest.approx(
        scale * expected.learner_loss, rel=1e-5
      )
  assert len(traces) == 3  # scores, mean gradient, path


def test_callables_that_cannot_be_hashed_are_taken():
  @dataclasses.dataclass
  class Losses:
    scale: float

    def __call__(self, params, batch):
      return self.scale * linear(params, batch)

  args = {"head": jnp.zeros((D, CLASSES))}, {"head": jnp.eye(D, CLASSES)}
  report = gm.check_reference(Losses(1.0), *args, blobs())
  expected = gm.check_reference(linear, *args, blobs())
  assert str(report) == str(expected)


def test_bfloat16_models_are_measured_in_float32(references):
  def narrow(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  def losses_fn(params, batch):
    batch = {"x": batch["x"].astype(jnp.bfloat16), "y": batch["y"]}
    return mlp(params, batch).astype(jnp.float32)

  args = narrow(mlp_params(0)), narrow(references[0]), blobs()
  report = gm.check_reference(losses_fn, *args)
  expected = gm.check_reference(mlp, mlp_params(0), references[0], blobs())
  assert report.verdict == "ok"
  assert report.relative_distance == pytest.approx(
    expected.relative_distance, rel=2e-2
  )


def test_mistakes_are_told(references):
  args = mlp, mlp_params(0), references[0], blobs()
  with pytest.raises(ValueError, match="at least 3"):
    gm.check_reference(*args, num_points=2)
  with pytest.raises(ValueError, match="none of the 256 samples"):
    gm.check_reference(*args, mask=jnp.zeros(N, bool))
  with pytest.raises(ValueError, match="head"):
    gm.check_reference(*args, layers="nothing")
  with pytest.raises(TypeError, match="w1"):
    gm.check_reference(mlp, mlp_params(0), {"head": 0.0}, blobs())
