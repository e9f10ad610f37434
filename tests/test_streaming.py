"""The streaming engine against the dense one, and what engines refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradmimic_jax as gm

SIZE, FEATURES, CLASSES, WIDTH = 16, 5, 3, 8
MASK = np.arange(SIZE) % 5 != 1
WEIGHTINGS = {
  # The temperature is the step's: one compilation for a warm and a cold one.
  "softmax": gm.softmax(lambda step: jnp.array([0.05, 1e-3])[step]),
  "uniform": gm.uniform(),
  "ess": gm.ess_softmax(0.4),
  "top": gm.top_fraction(0.25),
  "positive": gm.positive(),
}


def losses_fn(params, batch):
  hidden = jnp.tanh(
    batch["x"] @ params["body"]["w"] + params["body"]["b"][None]
  )
  logits = hidden @ params["head"]["w"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def make_params(seed, width=WIDTH):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "body": {"w": normal(FEATURES, width), "b": normal(width)},
    "head": {"w": normal(width, CLASSES)},
  }


PARAMS, REFERENCE = make_params(0), make_params(1)
RNG = np.random.default_rng(2)
BATCH = {
  "x": RNG.normal(size=(SIZE, FEATURES)).astype(np.float32),
  "y": RNG.integers(0, CLASSES, SIZE).astype(np.int32),
}
SLOW = pytest.mark.slow
WARM, COLD = np.int32(0), np.int32(1)


@functools.cache
def compiled(weighting, microbatch_size, engine="per_sample", **kwargs):
  return jax.jit(
    gm.mimic_value_and_grad(
      losses_fn,
      weighting=WEIGHTINGS[weighting],
      engine=engine,
      microbatch_size=microbatch_size,
      **kwargs,
    )
  )


def run(
  weighting, microbatch_size, mask=MASK, batch=BATCH, step=WARM, **kwargs
):
  fn = compiled(weighting, microbatch_size, **kwargs)
  return fn(PARAMS, REFERENCE, batch, mask=mask, step=step)


def assert_close(actual, expected, tolerance=1e-5):
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    scale = max(np.nanmax(np.abs(b), initial=0), 1e-6)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
  "weighting",
  [
    name if name == "softmax" else pytest.param(name, marks=pytest.mark.slow)
    for name in WEIGHTINGS
  ],
)
def test_streaming_gives_the_full_batch_update(weighting):
  for mask in (MASK, MASK | True):
    for step in (WARM, COLD):
      assert_close(
        run(weighting, 3, mask, step=step),
        run(weighting, None, mask, step=step),
      )


@pytest.mark.parametrize(
  ("microbatch_size", "weighting"),
  [
    (1000, "softmax"),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in ((1, "softmax"), (1, "ess"), (8, "ess"))
    ),
  ],
)
def test_stream_sizes_from_one_sample_to_more_than_there_are(
  weighting, microbatch_size
):
  assert_close(run(weighting, microbatch_size), run(weighting, None))


@pytest.mark.parametrize(
  "weighting", ["softmax", pytest.param("positive", marks=pytest.mark.slow)]
)
def test_stream_leaves_outside_the_scope_get_the_plain_mean(weighting):
  options = {"layers": "head", "scope": "layers"}
  result = run(weighting, 3, **options)
  assert_close(result, run(weighting, None, **options))
  mean_loss = lambda p: jnp.mean(losses_fn(p, BATCH)[MASK])  # noqa: E731
  plain = jax.jit(jax.grad(mean_loss))(PARAMS)
  assert_close(result[1]["body"], plain["body"])


@pytest.mark.slow
def test_stream_takes_the_cosine_score():
  assert_close(
    run("softmax", 3, score="cosine"), run("softmax", None, score="cosine")
  )


@pytest.mark.parametrize("weighting", ["softmax", "ess"])
@pytest.mark.parametrize("row", [0, 7])
def test_stream_leaves_the_others_of_a_nan_sample_untouched(weighting, row):
  x = BATCH["x"].copy()
  x[row, 0] = np.nan
  broken = run(weighting, 3, MASK | True, BATCH | {"x": x})
  masked = run(weighting, 3, np.arange(SIZE) != row)
  assert np.isnan(broken[0][1].scores[row])
  assert_close(broken[1], masked[1], 1e-6)
  assert_close(broken[0][1].weights, masked[0][1].weights, 1e-6)


@pytest.mark.parametrize("weighting", ["softmax", "ess"])
def test_stream_of_padding_only_gives_zero(weighting):
  (loss, info), grads = run(weighting, 3, MASK & False)
  assert loss == 0
  np.testing.assert_array_equal(info.weights, 0)
  for leaf in jax.tree.leaves(grads):
    np.testing.assert_array_equal(leaf, 0)


def test_stream_finds_the_highest_score_wherever_it_is():
  # The peak comes last, first, or in between; the carry is rescaled or not.
  order = np.argsort(np.asarray(run("softmax", None)[0][1].scores))
  expected = run("softmax", None, MASK | True, step=COLD)[1]
  for rows in (order, order[::-1], np.roll(order, 5)):
    batch = jax.tree.map(lambda x, rows=rows: x[rows], BATCH)
    found = run("softmax", 3, MASK | True, batch, step=COLD)[1]
    assert_close(found, expected)


def test_stream_sums_bfloat16_gradients_in_float32():
  def cast(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)

  def linear(params, batch):
    return batch["x"].astype(jnp.bfloat16) @ params["w"]

  # 512 equal gradients of 1/512 each: a bfloat16 sum would stall at 1/2.
  batch = {"x": np.ones((512, 1), np.float32)}
  fn = gm.mimic_value_and_grad(
    linear, microbatch_size=4, weighting=gm.uniform()
  )
  (_, info), grads = jax.jit(fn)(
    cast({"w": np.ones(1)}), cast({"w": np.zeros(1)}), batch
  )
  assert info.scores.dtype == jnp.float32
  assert grads["w"].dtype == jnp.bfloat16
  assert float(grads["w"][0]) == 1


@pytest.mark.parametrize(
  "weighting", ["softmax", pytest.param("ess", marks=pytest.mark.slow)]
)
def test_stream_holds_one_microbatch_of_gradients(weighting):
  params, reference = make_params(0, 2000), make_params(1, 2000)

  def temporary(microbatch_size):
    fn = compiled(weighting, microbatch_size)
    lowered = fn.lower(params, reference, BATCH, mask=MASK, step=WARM)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporary(2) < 0.5 * temporary(None)


def test_scores_stream_too():
  kwargs = {"engine": "per_sample"}
  scores = gm.mimic_scores(losses_fn, microbatch_size=3, **kwargs)
  dense = gm.mimic_scores(losses_fn, **kwargs)
  assert_close(
    jax.jit(scores)(PARAMS, REFERENCE, BATCH, mask=MASK),
    jax.jit(dense)(PARAMS, REFERENCE, BATCH, mask=MASK),
  )


@pytest.mark.parametrize(
  ("options", "engine"),
  [
    ({}, "forward"),
    ({"score": "cosine"}, "per_sample"),
    ({"microbatch_size": 4}, "per_sample"),
    ({"engine": "per_sample"}, "per_sample"),
    ({"engine": "ghost", "microbatch_size": 4}, "ghost"),
    ({"engine": "forward", "score": "cosine"}, "forward"),
  ],
)
def test_auto_engine_is_told(options, engine):
  assert gm.mimic_value_and_grad(losses_fn, **options).engine == engine
  assert gm.mimic_scores(losses_fn, **options).engine == engine


@pytest.mark.parametrize("value", [0, -1])
def test_engine_refuses_a_microbatch_of_nothing(value):
  with pytest.raises(ValueError, match=r"microbatch_size is .* above 0"):
    gm.mimic_value_and_grad(losses_fn, microbatch_size=value)
  with pytest.raises(TypeError, match="expected an integer"):
    gm.mimic_value_and_grad(losses_fn, microbatch_size=2.0)


@pytest.mark.parametrize(
  "weighting",
  ["softmax", *(pytest.param(w, marks=SLOW) for w in ("ess", "uniform"))],
)
def test_ghost_in_microbatches_gives_the_same(weighting):
  for size in (3, 1000):
    found = run(weighting, size, engine="ghost")
    assert_close(found, run(weighting, None))


def test_forward_engine_refuses_microbatches():
  with pytest.raises(ValueError, match="engine='per_sample'"):
    gm.mimic_value_and_grad(losses_fn, engine="forward", microbatch_size=4)


@jax.custom_vjp
def backward_only(x):
  return x**2


backward_only.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


def custom(params, batch):
  return backward_only(losses_fn(params, batch))


def test_engine_that_takes_a_custom_vjp_is_named():
  with pytest.raises(TypeError, match="engine='per_sample'"):
    jax.eval_shape(gm.mimic_value_and_grad(custom), PARAMS, REFERENCE, BATCH)
  with pytest.raises(TypeError, match="engine='per_sample'"):
    gm.mimic_scores(custom)(PARAMS, REFERENCE, BATCH)


@pytest.mark.slow
def test_engines_that_take_a_custom_vjp_agree():
  def plain(params, batch):
    return losses_fn(params, batch) ** 2

  @jax.jit
  def all_of_them(*args):
    return [
      gm.mimic_value_and_grad(fn, **options)(*args)
      for fn, options in (
        (plain, {}),
        (custom, {"microbatch_size": 3}),
        (custom, {"engine": "ghost"}),
      )
    ]

  expected, *found = all_of_them(PARAMS, REFERENCE, BATCH)
  for one in found:
    assert_close(one, expected)


@pytest.mark.slow
def test_engines_take_rematerialised_losses():
  remat = jax.checkpoint(losses_fn)
  expected = run("softmax", None, MASK | True, step=WARM)
  for options in (
    {"engine": "forward"},
    {"microbatch_size": 4},
    {"engine": "ghost", "microbatch_size": 4},
  ):
    fn = gm.mimic_value_and_grad(
      remat, weighting=WEIGHTINGS["softmax"], **options
    )
    assert_close(jax.jit(fn)(PARAMS, REFERENCE, BATCH, step=WARM), expected)
  whole = gm.mimic_value_and_grad(remat, engine="ghost")
  with pytest.raises(ValueError, match=r"jax\.checkpoint.* microbatch_size"):
    whole(PARAMS, REFERENCE, BATCH)


ENGINES = {
  "forward": {"engine": "forward"},
  "per_sample": {"engine": "per_sample"},
  "stream": {"microbatch_size": 8},
  "ghost": {"engine": "ghost"},
  "ghost stream": {"engine": "ghost", "microbatch_size": 8},
}


@pytest.mark.parametrize(
  ("engine", "weighting"),
  [
    ("stream", "softmax"),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in (
        ("forward", "ess"),
        ("per_sample", "softmax"),
        ("stream", "ess"),
        ("ghost stream", "ess"),
        ("ghost", "softmax"),
      )
    ),
  ],
)
def test_engine_update_is_the_same_on_eight_devices(engine, weighting):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  everywhere = NamedSharding(mesh, PartitionSpec())
  fn = jax.jit(
    gm.mimic_value_and_grad(
      losses_fn, weighting=WEIGHTINGS[weighting], **ENGINES[engine]
    )
  )
  batch = jax.device_put(BATCH, rows)
  params, reference = jax.device_put((PARAMS, REFERENCE), everywhere)
  mask = jax.device_put(MASK, rows)
  lowered = fn.lower(params, reference, batch, mask=mask, step=WARM)
  compiled_fn = lowered.compile()
  # No device ever sees the whole batch.
  assert f"f32[{SIZE},{FEATURES}]" not in compiled_fn.as_text()
  assert_close(
    compiled_fn(params, reference, batch, mask=mask, step=WARM),
    run(weighting, None),
  )
