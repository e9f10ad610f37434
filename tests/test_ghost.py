"""The ghost engine on whatever losses_fn may do with its parameters.

The truth is the per-sample engine in float64, which other tests hold against
gradients by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradmimic_jax as gm

SIZE, WIDTH, TOKENS, BLOCKS = 5, 6, 4, 3


@pytest.fixture(autouse=True)
def as_users_have_it():
  """Lets losses promote ranks and dtypes, as most users' do."""
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def drawn(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape) / 2


def cross_entropy(logits, labels):
  chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def tokens(seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.integers(0, 7, size=(SIZE, TOKENS))}


def features():
  return {"x": drawn(1, SIZE, WIDTH), "i": np.arange(SIZE) % 3}


BLOCK_PARAMS = {
  "embed": drawn(2, 7, WIDTH),
  "start": drawn(3, WIDTH),
  "scale": drawn(4, BLOCKS, WIDTH),
  "up": drawn(5, BLOCKS, WIDTH, 2 * WIDTH),
  "bias": drawn(6, BLOCKS, 2 * WIDTH),
  "down": drawn(7, BLOCKS, 2 * WIDTH, WIDTH),
  "shared": drawn(8, WIDTH, WIDTH),
}


def block(params, hidden, layer):
  """Parameters of its own, and some that all blocks share."""
  attention = jax.nn.softmax(hidden @ jnp.swapaxes(hidden, -1, -2))
  hidden = hidden + attention @ (hidden * layer["scale"]) @ params["shared"]
  return hidden + jnp.tanh(hidden @ layer["up"] + layer["bias"]) @ layer["down"]


def looped(params, batch, *, step=block, **options):
  """A decoder with a tied head, whose blocks are a loop's turns."""
  hidden = params["embed"][batch["x"]].at[:, 0].add(params["start"])
  layers = {name: params[name] for name in ("scale", "up", "bias", "down")}

  def turn(hidden, layer):
    return step(params, hidden, layer), jnp.sum(layer["scale"]) * params[
      "start"
    ]

  hidden, sums = jax.lax.scan(turn, hidden, layers, **options)
  losses = cross_entropy(hidden @ params["embed"].T, batch["x"])
  return losses.mean(axis=-1) + jnp.sum(sums)


def loops_in_loops(params, batch):
  def inner(hidden, pair):
    layer, number = pair
    return jnp.tanh(hidden * layer + params["shared"][0] * number), None

  def outer(carry, pair):
    hidden, summed = carry
    hidden = hidden @ params["shared"]
    hidden, _ = jax.lax.scan(
      inner, hidden, (pair[0], jnp.arange(2.0)), reverse=True
    )
    return (hidden, summed + jnp.sum(hidden, axis=-1)), pair[1]

  start = jnp.broadcast_to(params["start"], (len(batch["x"]), WIDTH))
  layers = params["up"][:, :2, :WIDTH], params["scale"]
  hidden = start + batch["x"], jnp.zeros(len(batch["x"]))
  (hidden, summed), scales = jax.lax.scan(outer, hidden, layers)
  return jnp.sum(hidden**2, axis=-1) + summed * jnp.sum(scales)


@jax.custom_jvp
def forward_rule(x, scale):
  return jnp.tanh(x * scale)


@forward_rule.defjvp
def _(primals, tangents):
  (x, scale), (dx, dscale) = primals, tangents
  out = forward_rule(x, scale)
  return out, (1 - out**2) * (dx * scale + x * dscale)


@jax.custom_vjp
def backward_rule(x, scale):
  return jnp.sin(x * scale)


def _pull(saved, delta):
  x, scale = saved
  delta = delta * jnp.cos(x * scale)
  return delta * scale, jnp.sum(delta * x, axis=0)


backward_rule.defvjp(lambda x, s: (jnp.sin(x * s), (x, s)), _pull)


def odd(params, batch):
  """Uses that no rule foresees."""
  x, start = batch["x"], params["start"]
  shared = params["shared"] / jnp.linalg.norm(params["shared"], axis=0)
  hidden = x @ (shared * params["scale"][0]) + x @ params["shared"].T
  hidden = (jnp.abs(hidden) + 1) ** jnp.abs(start)
  hidden = forward_rule(jnp.tanh(hidden), params["scale"][1])
  hidden = backward_rule(hidden, params["scale"][2])
  hidden = hidden + params["bias"][batch["i"]][:, :WIDTH]
  hidden = jax.lax.cond(
    jnp.sum(start) > 0, lambda h: h * start, lambda h: h - start, hidden
  )
  hidden = jnp.where(hidden > start, hidden, params["embed"][0])
  hidden = jnp.sort(hidden * params["embed"][1], axis=-1)
  level = jnp.interp(
    hidden[:, 0], jnp.linspace(-1, 1, WIDTH), params["up"][0, 0, :WIDTH]
  )
  return jnp.sum(hidden**2, -1) + level + 0.1 * jnp.sum(params["down"] ** 2)


def dropout(params, batch):
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (WIDTH,)))
  hidden = jnp.where(keep(batch["key"]), batch["x"], 0) @ params["shared"]
  return jnp.sum(jnp.tanh(hidden + params["start"]) ** 2, axis=-1)


def convolved(params, batch):
  kernel = params["up"].reshape(3, 3, 2, 2 * WIDTH)[..., :WIDTH]
  image = batch["x"][:, None, :, None] * jnp.ones((1, 4, 1, 2))
  found = jax.lax.conv_general_dilated(
    image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  found = jax.nn.relu(found + params["start"]) * params["scale"][0]
  return cross_entropy(found.mean(axis=(1, 2)), batch["i"])


CASES = {
  "loop": (looped, tokens),
  "loop unrolled": (functools.partial(looped, unroll=2), tokens),
  "loops in loops": (loops_in_loops, features),
  "odd": (odd, features),
  "dropout": (
    dropout,
    lambda: features() | {"key": jax.random.split(jax.random.key(0), SIZE)},
  ),
  "convolution": (convolved, features),
}
LAYERS = {"all": None, "some": ["^up$", "^start$"]}


def run(losses_fn, batch, layers, engine, **options):
  fn = gm.mimic_value_and_grad(
    losses_fn,
    layers=LAYERS[layers],
    scope="all" if layers == "all" else "layers",
    weighting=gm.softmax(0.5),
    engine=engine,
    **options,
  )
  rng = np.random.default_rng(9)
  reference = jax.tree.map(
    lambda p: p + 0.1 * rng.normal(size=p.shape), BLOCK_PARAMS
  )
  (_, info), grads = jax.jit(fn)(BLOCK_PARAMS, reference, batch)
  return [info.scores, info.weights, *jax.tree.leaves(grads)]


def assert_close(actual, wanted, tolerance=1e-10):
  for a, b in zip(actual, wanted, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max())
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("case", "layers"),
  [
    ("loop", "all"),
    ("odd", "all"),
    ("loop unrolled", "some"),
    ("loops in loops", "some"),
    ("odd", "some"),
    ("dropout", "all"),
    ("convolution", "some"),
  ],
)
def test_scores_and_gradients_are_those_of_single_samples(case, layers):
  losses_fn, make_batch = CASES[case]
  with jax.enable_x64(True):
    batch = make_batch()
    wanted = run(losses_fn, batch, layers, "per_sample")
    assert np.ptp(wanted[0]) > 1e-3
    assert_close(run(losses_fn, batch, layers, "ghost"), wanted)


@pytest.mark.slow
def test_checkpoints_are_taken_in_microbatches():
  losses_fn = functools.partial(looped, step=jax.checkpoint(block))
  with jax.enable_x64(True):
    wanted = run(looped, tokens(), "all", "per_sample")
    found = run(losses_fn, tokens(), "all", "ghost", microbatch_size=2)
    assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"jax\.checkpoint"):
      run(losses_fn, tokens(), "all", "ghost")


def test_a_third_more_flops_than_a_plain_step_at_most():
  """Of a wide MLP, whose products outweigh all else."""
  width = 128
  params = {"first": drawn(1, width, width), "second": drawn(2, width, width)}
  params = jax.tree.map(jnp.float32, params)
  batch = {"x": jnp.float32(drawn(3, 32, 4, width))}

  def losses_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return jnp.sum((hidden @ params["second"]) ** 2, axis=(1, 2))

  def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

  def ratio(engine):
    fn = gm.mimic_value_and_grad(
      losses_fn, engine=engine, check_independence=False
    )
    ours = flops(fn, params, params, batch)
    return ours / flops(jax.value_and_grad(mean_loss), params, batch)

  def mean_loss(params, batch):
    return jnp.mean(losses_fn(params, batch))

  # Five products in a plain step (nothing goes back to the data); two more, and
  # as the forward engine's three: what the first layer moves goes on.
  assert 1.35 < ratio("ghost") < 1.45
  assert 1.55 < ratio("forward") < 1.65


@pytest.mark.parametrize(
  "score", ["cosine", "gradient_norm", gm.matching.omp(0.5)]
)
def test_scores_of_single_gradients_are_refused(score):
  with pytest.raises(ValueError, match="engine='ghost', which has no sample's"):
    gm.mimic_value_and_grad(odd, score=score, engine="ghost")
  with pytest.raises(ValueError, match="expected engine='auto'"):
    gm.mimic_scores(odd, score=score, engine="ghost")


def test_aux_that_is_not_of_samples_is_refused():
  def losses_fn(params, batch):
    return dropout(params, batch), jnp.sum(params["start"])

  batch = CASES["dropout"][1]()
  fn = gm.mimic_value_and_grad(losses_fn, has_aux=True, engine="ghost")
  params = jax.tree.map(jnp.float32, BLOCK_PARAMS)
  with pytest.raises(ValueError, match="leading axis"):
    jax.eval_shape(fn, params, params, batch)
