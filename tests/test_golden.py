"""The method against numbers produced by its authors' functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

pytestmark = pytest.mark.usefixtures("optimized")

LAYERS = ("head.weight", "body.weight")
TEMPERATURES = (0.03, 0.1, 0.5, 1.0)
SCOPES = {"layer_only": "layers", "all": "all"}
ENGINES = ("forward", "per_sample")


@pytest.fixture(scope="module")
def golden(request):
  path = request.path.parent / "data" / "official_steps.npz"
  with np.load(path, allow_pickle=False) as file:
    return {key: file[key] for key in file.files}


def tree(golden, prefix):
  return {
    key.removeprefix(prefix): jnp.asarray(value)
    for key, value in golden.items()
    if key.startswith(prefix)
  }


def losses_fn(params, batch):
  """Linear, gelu, LayerNorm, Linear; weights are (out, in)."""
  hidden = batch["x"] @ params["body.weight"].T + params["body.bias"][None]
  hidden = jax.nn.gelu(hidden, approximate=True)
  hidden = jax.nn.standardize(hidden, axis=-1, epsilon=1e-6)
  hidden = hidden * params["norm.weight"][None] + params["norm.bias"][None]
  logits = hidden @ params["head.weight"].T + params["head.bias"][None]
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def exact(layer):
  return "^" + layer.replace(".", r"\.") + "$"


def close(actual, expected, tolerance):
  """Relative to the largest entry, as float32 sums are."""
  expected = np.asarray(expected)
  np.testing.assert_allclose(
    np.asarray(actual),
    expected,
    rtol=tolerance,
    atol=tolerance * np.abs(expected).max(),
  )


def step(golden, engine, **kwargs):
  fn = gm.mimic_value_and_grad(losses_fn, engine=engine, **kwargs)
  batch = {"x": jnp.asarray(golden["x"]), "y": jnp.asarray(golden["y"])}
  return jax.jit(fn)(tree(golden, "params/"), tree(golden, "reference/"), batch)


def slow(*case):
  """With the fast ones, each pair of two parameters' values."""
  return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ("engine", "layer", "scope"),
  [
    ("forward", "head.weight", "layer_only"),
    ("per_sample", "body.weight", "all"),
    slow("forward", "body.weight", "layer_only"),
    slow("forward", "head.weight", "all"),
    slow("per_sample", "head.weight", "layer_only"),
  ],
)
def test_losses_scores_weights_and_gradients(golden, engine, layer, scope):
  (loss, info), grads = step(
    golden,
    engine,
    layers=exact(layer),
    weighting=gm.softmax(0.5),
    scope=SCOPES[scope],
  )
  close(info.losses, golden["losses"], 1e-5)
  close(loss, golden["losses"].mean(), 1e-5)
  close_scores_and_weights(golden, info.scores, layer, "proj")
  expected = tree(golden, f"grad/{layer}/{scope}/")
  assert grads.keys() == expected.keys()
  for name, value in expected.items():
    close(grads[name], value, 1e-5)


@pytest.mark.parametrize(
  ("engine", "layer"),
  [("forward", "body.weight"), slow("per_sample", "head.weight")],
)
def test_cosines_and_their_weights(golden, engine, layer):
  (_, info), _ = step(golden, engine, layers=exact(layer), score="cosine")
  close_scores_and_weights(golden, info.scores, layer, "cos")


def close_scores_and_weights(golden, scores, layer, kind):
  close(scores, golden[f"score/{layer}/{kind}"], 1e-5)
  for temperature in TEMPERATURES:
    expected = golden[f"weights/{layer}/normed_{kind}/{temperature}"]
    close(gm.softmax(temperature)(scores), expected, 1e-5)


OPTIMIZERS = {
  "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-5),
  "sgd": lambda: optax.chain(
    optax.add_decayed_weights(1e-5), optax.sgd(1e-2, momentum=0.9)
  ),
}
METHOD = dict(layers=exact("head.weight"), weighting=gm.softmax(0.5))


@pytest.mark.parametrize(
  ("how", "optimizer", "scope"),
  [
    ("forward", "sgd", "layer_only"),
    ("transformation", "adamw", "all"),
    slow("forward", "adamw", "all"),
    slow("per_sample", "adamw", "layer_only"),
    slow("per_sample", "sgd", "all"),
    slow("transformation", "sgd", "layer_only"),
  ],
)
def test_twelve_steps(golden, how, optimizer, scope):
  params, reference = tree(golden, "params/"), tree(golden, "reference/")
  xs, ys = golden["traj/x"], golden["traj/y"]
  options = METHOD | {"scope": SCOPES[scope]}
  if how == "transformation":
    tx = gm.mimic(OPTIMIZERS[optimizer](), reference, **options)

    def loss_fn(params, example):
      return losses_fn(params, jax.tree.map(lambda x: x[None], example))[0]

    gradient = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))
    scores_fn = gm.mimic_scores(losses_fn, layers=METHOD["layers"])

    def gradient_and_weights(params, batch):
      scores = scores_fn(params, reference, batch).scores
      return gradient(params, batch), METHOD["weighting"](scores)

  else:
    tx = OPTIMIZERS[optimizer]()
    step_fn = gm.mimic_value_and_grad(losses_fn, engine=how, **options)

    def gradient_and_weights(params, batch):
      (_, info), grads = step_fn(params, reference, batch)
      return grads, info.weights

  @jax.jit
  def train_step(params, state, batch):
    grads, weights = gradient_and_weights(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, weights

  state = tx.init(params)
  weights = []
  # optax's own arithmetic mixes dtypes, which the strict tests forbid.
  with jax.numpy_dtype_promotion("standard"):
    for x, y in zip(xs, ys, strict=True):
      batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
      params, state, w = train_step(params, state, batch)
      weights.append(w)

  prefix = f"traj/{optimizer}/{scope}/"
  close(np.stack(weights), golden[prefix + "weights"], 1e-4)
  for name, value in tree(golden, prefix + "final/").items():
    close(params[name], value, 1e-4)
