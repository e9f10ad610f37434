"""All engines against each other and against dense float64 gradients."""

import functools
import itertools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradmimic_jax as gm

ENGINES = ("forward", "per_sample", "ghost")
SCORES = ("projection", "cosine")
SCOPES = ("all", "layers")
SIZE = 6
CLASSES = 3
# A temperature at which no weight of the models below is close to 0 or 1.
TEMPERATURE = 0.7


def cross_entropy(logits, labels):
  # In float32 or wider, as mixed-precision training does it.
  if logits.dtype == jnp.bfloat16:
    logits = logits.astype(jnp.float32)
  chosen = jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)
  return -jnp.sum(jax.nn.log_softmax(logits) * chosen, axis=-1)


def dense(layer, x):
  bias = layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
  return x @ layer["kernel"] + bias


def mlp_logits(params, batch):
  x = batch["x"].astype(params["first"]["kernel"].dtype)
  x = jnp.tanh(dense(params["first"], x))
  x = jnp.tanh(dense(params["block"], x))
  return dense(params["head"], x)


def mlp(params, batch):
  return cross_entropy(mlp_logits(params, batch), batch["y"])


def convnet(params, batch):
  x = batch["x"]
  for name in ("first", "block"):
    x = jax.lax.conv_general_dilated(
      x,
      params[name]["kernel"],
      window_strides=(2, 2),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jnp.tanh(x + params[name]["bias"][None, None, None])
  return cross_entropy(dense(params["head"], x.mean(axis=(1, 2))), batch["y"])


def transformer(params, batch):
  x = params["first"]["embedding"][batch["x"]]
  x = x + params["first"]["position"][None]
  block = params["block"]
  normed = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
  heads = jnp.einsum("btd,dshe->sbhte", normed, block["qkv"])
  query, key, value = heads[0], heads[1], heads[2]
  attention = jax.nn.softmax(jnp.einsum("bhte,bhse->bhts", query, key))
  mixed = jnp.einsum("bhts,bhse->bthe", attention, value)
  x = x + jnp.einsum("bthe,hed->btd", mixed, block["out"])
  x = x + jnp.tanh(dense(block, jax.nn.standardize(x, axis=-1, epsilon=1e-5)))
  return cross_entropy(dense(params["head"], x.mean(axis=1)), batch["y"])


def layer(*shape):
  return {"kernel": shape, "bias": shape[-1:]}


SHAPES = {
  "mlp": {"first": layer(5, 7), "block": layer(7, 6), "head": layer(6, 3)},
  "convnet": {
    "first": layer(3, 3, 2, 4),
    "block": layer(3, 3, 4, 5),
    "head": layer(5, 3),
  },
  "transformer": {
    "first": {"embedding": (9, 8), "position": (4, 8)},
    "block": layer(8, 8) | {"qkv": (8, 3, 2, 4), "out": (2, 4, 8)},
    "head": layer(8, 3),
  },
}
MODELS = {"mlp": mlp, "convnet": convnet, "transformer": transformer}
CHOICES = {
  "everything": lambda params: None,
  "head": lambda params: "^head/",
  "head kernel": lambda params: re.compile("^head/kernel$"),
  "last block": lambda params: "^block/",
  "list": lambda params: ["^first/", "bias$"],
  "predicate": lambda params: lambda path, leaf: leaf.ndim > 1,
  "bool tree": lambda params: jax.tree_util.tree_map_with_path(
    lambda path, leaf: path[0].key != "head", params
  ),
}
# What each choice means, spelled out a second time.
MEANINGS = {
  "everything": lambda path, leaf: True,
  "head": lambda path, leaf: path[0] == "head",
  "head kernel": lambda path, leaf: path == ("head", "kernel"),
  "last block": lambda path, leaf: path[0] == "block",
  "list": lambda path, leaf: path[0] == "first" or path[1] == "bias",
  "predicate": lambda path, leaf: leaf.ndim > 1,
  "bool tree": lambda path, leaf: path[0] != "head",
}
MASK = np.array([True, False, True, True, False, True])


class Task(typing.NamedTuple):
  losses_fn: typing.Any
  params: typing.Any
  reference: typing.Any
  batch: typing.Any


@functools.cache
def task(model, size=SIZE):
  rng = np.random.default_rng(0)

  def draw(shape):
    scale = np.sqrt(1 / np.prod(shape[:-1])) if len(shape) > 1 else 0.1
    return (rng.normal(size=shape) * scale).astype(np.float32)

  def is_shape(x):
    return isinstance(x, tuple)

  params = jax.tree.map(draw, SHAPES[model], is_leaf=is_shape)
  reference = jax.tree.map(lambda p: p + 0.5 * draw(p.shape), params)
  inputs = {
    "mlp": lambda: rng.normal(size=(size, 5)).astype(np.float32),
    "convnet": lambda: rng.normal(size=(size, 6, 6, 2)).astype(np.float32),
    "transformer": lambda: rng.integers(0, 9, size=(size, 4)),
  }[model]()
  if inputs.dtype != np.float32:
    inputs = inputs.astype(np.int32)
  batch = {"x": inputs, "y": (np.arange(size) % CLASSES).astype(np.int32)}
  return Task(MODELS[model], params, reference, batch)


def flat(tree):
  """Leaves in float64 by path."""
  return {
    tuple(key.key for key in path): np.asarray(leaf, np.float64)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def dense_float64(losses_fn, params, batch):
  """Losses [B] and gradients {path: [B, *p]}, one sample after the other."""

  def wide(tree):
    return jax.tree.map(
      lambda x: (
        np.asarray(x, np.float64)
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        else np.asarray(x)
      ),
      tree,
    )

  losses, grads = [], []
  params, batch = wide(params), wide(batch)
  with jax.enable_x64(True):
    one = jax.jit(
      jax.value_and_grad(lambda params, sample: losses_fn(params, sample)[0])
    )
    for i in range(len(batch["y"])):
      sample = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
      loss, grad = one(params, sample)
      assert loss.dtype == np.float64
      losses.append(float(loss))
      grads.append(flat(grad))
  return np.array(losses), {
    path: np.stack([grad[path] for grad in grads]) for path in grads[0]
  }


def by_hand(task, rows, losses, chosen, score, scope, mask):
  """The method in NumPy float64, straight from its definition."""
  ours, theirs = flat(task.params), flat(task.reference)
  mimic = [path for path in ours if chosen(path, ours[path])]
  assert mimic
  direction = {path: theirs[path] - ours[path] for path in mimic}
  distance = np.sqrt(sum(np.sum(v**2) for v in direction.values()))
  scores = np.zeros(len(losses))
  squares = np.zeros(len(losses))
  for path, v in direction.items():
    flattened = rows[path].reshape(len(losses), -1)
    scores -= flattened @ v.ravel() / distance
    squares += np.sum(flattened**2, axis=1)
  if score == "cosine":
    scores = scores / np.sqrt(squares)
  weights = np.where(mask, np.exp(scores / TEMPERATURE), 0)
  weights /= weights.sum()
  plain = mask / mask.sum()
  grads = {
    path: np.tensordot(
      weights if scope == "all" or path in mimic else plain, row, axes=1
    )
    for path, row in rows.items()
  }
  return {
    "loss": np.sum(plain * losses),
    "scores": np.where(mask, scores, 0),
    "losses": np.where(mask, losses, 0),
    "weights": weights,
    "distance": distance,
    "effective_sample_size": 1 / np.sum(weights**2),
    "grads": grads,
  }


def close(actual, expected, tolerance):
  """Relative to the largest entry."""
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
  )


def close_trees(actual, expected, tolerance):
  """Each leaf relative to the largest entry of the whole tree."""
  assert actual.keys() == expected.keys()
  largest = max(np.abs(leaf).max() for leaf in expected.values())
  for path, leaf in expected.items():
    assert actual[path].shape == leaf.shape
    np.testing.assert_allclose(
      actual[path], leaf, rtol=0, atol=tolerance * largest, err_msg=str(path)
    )


# Every choice, score and scope, and every pair of scores and scopes. What is
# chosen is no engine's matter: a choice more is asked of one of them.
FEW = [
  ("everything", "projection", "all"),
  ("head", "projection", "layers"),
  ("last block", "cosine", "all"),
]
MORE = {
  "forward": [
    ("head kernel", "projection", "all"),
    ("list", "projection", "layers"),
  ],
  "per_sample": [
    ("head", "cosine", "layers"),
    ("predicate", "projection", "all"),
  ],
  "ghost": [("bool tree", "projection", "layers")],
}


def options(model, exhaustive, engine):
  """What is asked of a model; most of the MLP, which compiles fastest."""
  if exhaustive:
    if model == "mlp":
      asked = [*itertools.product(CHOICES, SCORES, SCOPES)]
    else:
      each = zip(
        CHOICES, itertools.repeat("projection"), itertools.cycle(SCOPES)
      )
      asked = [*dict.fromkeys([*FEW, *each])]
  else:
    asked = FEW + (MORE[engine] if model == "mlp" else [])
  # The ghost engine has no gradient whose norm a cosine could take.
  return [x for x in asked if engine != "ghost" or x[1] == "projection"]


@functools.cache
def everything(model, engine, exhaustive):
  """All options of a model and engine, in one compilation."""
  losses_fn, params, reference, batch = task(model)
  asked = options(model, exhaustive, engine)

  @jax.jit
  def run(params, reference, batch, mask):
    results = []
    for choice, score, scope in asked:
      fn = gm.mimic_value_and_grad(
        losses_fn,
        layers=CHOICES[choice](params),
        score=score,
        scope=scope,
        weighting=gm.softmax(TEMPERATURE),
        engine=engine,
      )
      results.append(fn(params, reference, batch, mask=mask))
    return results

  return {
    masked: dict(
      zip(
        asked,
        run(params, reference, batch, MASK if masked else MASK | True),
        strict=True,
      )
    )
    for masked in (False, True)
  }


def asked_of_mlp(
  engine, choice="everything", score="projection", scope="all", *, masked=False
):
  option = choice, score, scope
  exhaustive = option not in options("mlp", False, engine)
  return everything("mlp", engine, exhaustive)[masked][option]


@functools.cache
def truth(model):
  return dense_float64(*task(model)[:2], task(model).batch)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
  ("model", "exhaustive"),
  [
    ("mlp", False),
    *(pytest.param(model, True, marks=pytest.mark.slow) for model in MODELS),
  ],
)
def test_engines_agree_with_dense_float64(model, exhaustive, engine, masked):
  losses, rows = truth(model)
  mask = MASK if masked else MASK | True
  for option in options(model, exhaustive, engine):
    choice, score, scope = option
    expected = by_hand(
      task(model), rows, losses, MEANINGS[choice], score, scope, mask
    )
    (loss, info), grads = everything(model, engine, exhaustive)[masked][option]
    close(loss, expected["loss"], 1e-5)
    for name in info._fields[:-1]:
      close(getattr(info, name), expected[name], 1e-5)
    assert info.aux is None
    close_trees(flat(grads), expected["grads"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnet", "transformer"])
def test_engines_agree_with_each_other(model):
  forward, per_sample = (
    jax.tree.leaves(everything(model, engine, True))
    for engine in ("forward", "per_sample")
  )
  for a, b in zip(forward, per_sample, strict=True):
    close(a, np.asarray(b, np.float64), 1e-5)


@functools.cache
def compiled(losses_fn, engine, **kwargs):
  """One compilation for all the tests that ask the same; NumPy's arrays."""
  kwargs = {"weighting": gm.softmax(TEMPERATURE)} | kwargs
  fn = jax.jit(gm.mimic_value_and_grad(losses_fn, engine=engine, **kwargs))
  return lambda *args, **more: jax.device_get(fn(*args, **more))


each_engine_and_score = pytest.mark.parametrize(
  ("engine", "score"),
  [
    ("forward", "projection"),
    ("per_sample", "cosine"),
    ("ghost", "projection"),
    pytest.param("forward", "cosine", marks=pytest.mark.slow),
    pytest.param("per_sample", "projection", marks=pytest.mark.slow),
  ],
)


most_engines = pytest.mark.parametrize(
  "engine",
  [
    "forward",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("per_sample", "ghost")),
  ],
)


@most_engines
def test_no_mask_means_all_samples(engine):
  losses_fn, *arguments = task("mlp")
  fn = compiled(losses_fn, engine)
  jax.tree.map(
    np.testing.assert_array_equal,
    fn(*arguments),
    fn(*arguments, mask=MASK | True),
  )


@each_engine_and_score
def test_mimic_scores_are_the_scores_of_mimic_value_and_grad(engine, score):
  losses_fn, *arguments = task("mlp")
  fn = gm.mimic_scores(losses_fn, layers="^head/", score=score, engine=engine)
  scores = jax.jit(fn)(*arguments, mask=MASK)
  _, info = asked_of_mlp(engine, "head", score, "layers", masked=True)[0]
  for name in scores._fields:
    close(getattr(scores, name), np.asarray(getattr(info, name)), 1e-6)


@pytest.mark.parametrize(
  ("score", "engine"), [("projection", "forward"), ("cosine", "per_sample")]
)
def test_auto_is_the_documented_engine(score, engine):
  losses_fn, *arguments = task("mlp")
  auto = gm.mimic_value_and_grad(losses_fn, score=score)
  named = gm.mimic_value_and_grad(losses_fn, score=score, engine=engine)
  assert str(jax.make_jaxpr(auto)(*arguments)) == str(
    jax.make_jaxpr(named)(*arguments)
  )


@most_engines
def test_aux_comes_back_for_every_sample(engine):
  losses_fn, params, reference, batch = task("mlp")

  def with_aux(params, batch):
    logits = mlp_logits(params, batch)
    right = jnp.argmax(logits, axis=-1) == batch["y"]
    return losses_fn(params, batch), {"logits": logits, "more": (right,)}

  fn = compiled(with_aux, engine, has_aux=True)
  (loss, info), grads = fn(params, reference, batch)
  logits = np.asarray(jax.jit(mlp_logits)(params, batch))
  close(info.aux["logits"], logits, 1e-6)
  np.testing.assert_array_equal(
    info.aux["more"][0], np.argmax(logits, axis=-1) == batch["y"]
  )
  assert info.aux["more"][0].shape == (SIZE,)
  without = asked_of_mlp(engine)
  close(loss, np.asarray(without[0][0]), 1e-6)
  close_trees(flat(grads), flat(without[1]), 1e-6)


@most_engines
def test_keyword_arguments_reach_the_losses_and_the_direction(engine):
  losses_fn, params, reference, batch = task("mlp")

  def scaled(params, batch, *, factor, sign):
    return losses_fn(params, batch) * factor * sign

  def turned(params, reference, batch, *, factor, sign):
    assert factor is not None
    return jax.tree.map(lambda p, r: sign * (r - p), params, reference)

  fn = jax.jit(
    gm.mimic_value_and_grad(
      scaled,
      engine=engine,
      direction=turned,
      weighting=gm.softmax(3 * TEMPERATURE),
    )
  )
  # The sign is in the loss and in the direction: it cancels in the scores.
  (loss, info), grads = fn(
    params, reference, batch, factor=jnp.float32(3), sign=jnp.float32(-1)
  )
  plain = asked_of_mlp(engine)
  close(loss, -3 * np.asarray(plain[0][0]), 1e-5)
  close(info.scores, 3 * np.asarray(plain[0][1].scores), 1e-5)
  close(info.weights, np.asarray(plain[0][1].weights), 1e-5)
  close_trees(
    flat(grads), {path: -3 * g for path, g in flat(plain[1]).items()}, 1e-5
  )


@each_engine_and_score
def test_bfloat16_params_agree_with_float64_to_2e_2(engine, score):
  narrow = jax.tree.map(
    lambda p: jnp.asarray(p, jnp.bfloat16), task("mlp")[1:3]
  )
  rounded = Task(mlp, *narrow, task("mlp").batch)
  fn = compiled(mlp, engine, score=score)
  (loss, info), grads = fn(*rounded[1:])
  losses, rows = dense_float64(mlp, rounded.params, rounded.batch)
  expected = by_hand(
    rounded, rows, losses, MEANINGS["everything"], score, "all", MASK | True
  )
  assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
  assert loss.dtype == jnp.float32
  close(loss, expected["loss"], 2e-2)
  for name in info._fields[:-1]:
    assert getattr(info, name).dtype == jnp.float32
    close(getattr(info, name), expected[name], 2e-2)
  close_trees(flat(grads), expected["grads"], 2e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_have_the_dtypes_of_params(engine):
  _, params, reference, batch = task("mlp")
  mixed = params | {
    "block": jax.tree.map(
      lambda p: jnp.asarray(p, jnp.bfloat16), params["block"]
    )
  }

  def losses_fn(params, batch):
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return mlp(wide, batch)

  fn = gm.mimic_value_and_grad(
    losses_fn, engine=engine, scope="layers", layers="^head/|^block/kernel$"
  )
  _, grads = jax.eval_shape(fn, mixed, reference, batch)
  assert jax.tree.map(lambda g: (g.shape, g.dtype), grads) == jax.tree.map(
    lambda p: (p.shape, p.dtype), mixed
  )


# Ways for a sample to break from finite features, by its id or its trigger.
NAN_PICKED, NAN_FACTOR, LOG_OF_ZERO, NORM_OF_ZERO = 1, 2, 3, 4
BREAKING = {
  "nan picked": NAN_PICKED,
  "nan factor": NAN_FACTOR,
  "log of zero": LOG_OF_ZERO,
  "norm of zero": NORM_OF_ZERO,
}
TRIGGERS = {"id": np.int32, "trigger": np.float32}


def breakable(params, batch):
  """The MLP's loss, and what breaks the samples whose id asks for it."""
  breaks = {
    how: (batch["id"] == how) | (batch["trigger"] == how)
    for how in BREAKING.values()
  }
  zero, one, nan = np.float32(0), np.float32(1), np.float32(np.nan)
  losses = mlp(params, batch) * jnp.where(breaks[NAN_FACTOR], nan, one)
  # log(0 * p) is -inf from finite inputs; its gradient is 0 * inf.
  seen = jnp.where(breaks[LOG_OF_ZERO], zero, one)
  losses -= jnp.log(seen * jnp.exp(params["head"]["bias"][:1]))
  # A finite loss whose gradient is not: the norm has none at zero.
  seen = jnp.where(breaks[NORM_OF_ZERO], zero, one)
  losses += jnp.linalg.norm(mlp_logits(params, batch) * seen[:, None], axis=-1)
  return jnp.where(breaks[NAN_PICKED], nan, losses)


def run_breakable(engine, mask, **changes):
  """A step over the batch with some leaves changed; compiled once."""
  _, params, reference, batch = task("mlp")
  harmless = {
    "id": np.zeros(SIZE, np.int32),
    "trigger": np.zeros(SIZE, np.float32),
  }
  batch = batch | harmless | changes
  return compiled(breakable, engine)(params, reference, batch, mask=mask)


def others_as_if_masked(actual, masked, row):
  """All numbers the same, bit for bit, but NaN for the broken sample."""
  (loss, info), grads = actual
  (masked_loss, masked_info), masked_grads = masked
  np.testing.assert_array_equal(loss, masked_loss)
  np.testing.assert_array_equal(info.weights, masked_info.weights)
  assert info.weights[row] == 0
  np.testing.assert_allclose(info.weights.sum(), 1, rtol=1e-6)
  for field in ("scores", "losses"):
    ours = np.asarray(getattr(info, field))
    assert np.isnan(ours[row])
    theirs = np.asarray(getattr(masked_info, field))
    np.testing.assert_array_equal(np.delete(ours, row), np.delete(theirs, row))
  for leaf, expected in zip(
    jax.tree.leaves(grads), jax.tree.leaves(masked_grads), strict=True
  ):
    assert np.all(np.isfinite(expected))
    np.testing.assert_array_equal(leaf, expected)


def without(row):
  return np.arange(SIZE) != row


@pytest.mark.parametrize("engine", ENGINES)
def test_broken_features_leave_the_other_samples_untouched(engine):
  for row, value in itertools.product([0, 4], [np.nan, np.inf, -np.inf]):
    x = task("mlp").batch["x"].copy()
    x[row, 2] = value
    others_as_if_masked(
      run_breakable(engine, MASK | True, x=x),
      run_breakable(engine, without(row)),
      row,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_broken_features_in_padding_do_not_matter(engine):
  x = np.where(MASK[:, None], task("mlp").batch["x"], np.float32(np.nan))
  jax.tree.map(
    np.testing.assert_array_equal,
    run_breakable(engine, MASK, x=x),
    run_breakable(engine, MASK),
  )


@pytest.mark.parametrize("how", BREAKING.values(), ids=BREAKING)
@pytest.mark.parametrize("leaf", TRIGGERS)
def test_per_sample_leaves_the_others_of_a_broken_loss_untouched(how, leaf):
  broken = np.where(without(1), 0, how).astype(TRIGGERS[leaf])
  others_as_if_masked(
    run_breakable("per_sample", MASK | True, **{leaf: broken}),
    run_breakable("per_sample", without(1)),
    1,
  )


def assert_equal_or_zero(actual, expected):
  """Every entry is exact, or 0 because the broken sample has reached it."""
  for leaf, other in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    reached = leaf == 0
    np.testing.assert_array_equal(leaf[~reached], other[~reached])


@pytest.mark.parametrize("how", BREAKING.values(), ids=BREAKING)
def test_forward_zeroes_only_what_a_broken_loss_has_reached(how):
  # A `[B]` feature that is finite, so that nothing can mend it beforehand.
  broken = np.where(without(1), 0, how).astype(TRIGGERS["id"])
  (loss, info), grads = run_breakable("forward", MASK | True, id=broken)
  (_, as_masked), exact = run_breakable("forward", without(1))
  np.testing.assert_array_equal(info.weights, as_masked.weights)
  assert np.isnan(info.scores[1])
  assert np.isfinite(loss)
  assert_equal_or_zero(grads, exact)


@pytest.mark.parametrize("how", BREAKING.values(), ids=BREAKING)
@pytest.mark.parametrize("leaf", TRIGGERS)
def test_per_sample_ignores_padding_with_a_broken_loss(how, leaf):
  broken = np.where(MASK, 0, how).astype(TRIGGERS[leaf])
  jax.tree.map(
    np.testing.assert_array_equal,
    run_breakable("per_sample", MASK, **{leaf: broken}),
    run_breakable("per_sample", MASK),
  )


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_that_has_no_derivative_keeps_the_gradient_finite(engine):
  def losses_fn(params, batch):
    unit = batch["x"] / jnp.linalg.norm(batch["x"], axis=1, keepdims=True)
    return (unit @ params["w"] + params["b"]) ** 2

  x = np.array([[3, 4], [1, 2], [0, 0]], np.float32)
  params = {"w": np.ones(2, np.float32), "b": np.float32(1)}
  reference = {"w": np.zeros(2, np.float32), "b": np.float32(0)}
  fn = compiled(losses_fn, engine)
  mask = np.array([True, True, False])
  (loss, info), grads = fn(params, reference, {"x": x}, mask=mask)
  (expected_loss, expected), exact = fn(params, reference, {"x": x[:2]})
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  np.testing.assert_allclose(info.weights[:2], expected.weights, rtol=1e-6)
  if engine == "per_sample":
    close_trees(flat(grads), flat(exact), 1e-6)
  else:
    for leaf in jax.tree.leaves(grads):
      assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_score_that_overflows_costs_only_its_own_sample(engine):
  def losses_fn(params, batch):
    return batch["slope"] * jnp.sum(params["w"])

  # Every gradient is finite; the last one's inner product isn't.
  slope = np.array([1, 2, -3e38], np.float32)
  params = {"w": np.zeros(9, np.float32)}
  reference = {"w": np.ones(9, np.float32)}
  fn = compiled(losses_fn, engine)
  everyone = np.array([True, True, True])
  (_, info), grads = fn(params, reference, {"slope": slope}, mask=everyone)
  (_, expected), clean = fn(
    params, reference, {"slope": slope}, mask=np.array([True, True, False])
  )
  np.testing.assert_array_equal(info.weights, expected.weights)
  np.testing.assert_array_equal(grads["w"], clean["w"])
  assert np.all(np.isfinite(grads["w"]))
  assert np.isnan(info.scores[2])


def no_gradient(result, expected):
  (loss, info), grads = result
  np.testing.assert_array_equal(loss, expected)
  np.testing.assert_array_equal(info.weights, 0)
  assert info.effective_sample_size == 0
  for leaf in jax.tree.leaves(grads):
    np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_masked_gives_zero_loss_and_gradient(engine):
  result = run_breakable(engine, MASK & False)
  no_gradient(result, 0)
  np.testing.assert_array_equal(result[0][1].scores, 0)
  np.testing.assert_array_equal(result[0][1].losses, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_broken_gives_nan_loss_and_gradient(engine):
  broken = np.full((SIZE, 5), np.nan, np.float32)
  for mask in (MASK | True, MASK):
    result = run_breakable(engine, mask, x=broken)
    no_gradient(result, np.nan)
    np.testing.assert_array_equal(np.isnan(result[0][1].scores), mask)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_only_real_sample_broken_gives_nan_loss_and_gradient(engine):
  first = np.arange(SIZE) == 0
  x = np.where(first[:, None], np.float32(np.nan), task("mlp").batch["x"])
  no_gradient(run_breakable(engine, first, x=x), np.nan)


# The cosine's own 0 / 0 once; a program more for the other engine is slow.
@pytest.mark.parametrize(
  ("engine", "score"),
  [
    ("forward", "projection"),
    ("per_sample", "projection"),
    ("per_sample", "cosine"),
    pytest.param("forward", "cosine", marks=pytest.mark.slow),
  ],
)
def test_reference_equal_to_params_gives_uniform_weights(engine, score):
  losses_fn, params, _, batch = task("mlp")
  fn = compiled(losses_fn, engine, score=score)
  (loss, info), grads = fn(params, params, batch)
  np.testing.assert_array_equal(info.scores, 0)
  assert info.distance == 0
  close(info.weights, np.full(SIZE, 1 / SIZE), 1e-6)
  losses, rows = truth("mlp")
  close(loss, losses.mean(), 1e-5)
  close_trees(
    flat(grads), {path: row.mean(axis=0) for path, row in rows.items()}, 1e-5
  )


@most_engines
def test_a_batch_of_one_gives_its_own_gradient(engine):
  losses_fn, params, reference, batch = task("mlp")
  one = jax.tree.map(lambda x: x[:1], batch)
  (loss, info), grads = compiled(losses_fn, engine)(params, reference, one)
  losses, rows = truth("mlp")
  close(loss, losses[0], 1e-5)
  np.testing.assert_array_equal(info.weights, [1])
  assert info.effective_sample_size == 1
  close_trees(flat(grads), {path: row[0] for path, row in rows.items()}, 1e-5)


def contrastive(params, batch):
  """Every loss depends on all samples of the batch."""
  image = jnp.tanh(batch["image"] @ params["image"])
  text = jnp.tanh(batch["text"] @ params["text"])
  return -jnp.diag(jax.nn.log_softmax(image @ text.T, axis=-1))


def test_forward_is_exact_for_losses_that_couple_the_batch():
  rng = np.random.default_rng(3)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  params = {"image": draw(4, 3), "text": draw(5, 3)}
  reference = {"image": draw(4, 3), "text": draw(5, 3)}
  batch = {"image": draw(SIZE, 4), "text": draw(SIZE, 5)}
  wide = jax.tree.map(lambda x: x.astype(np.float64), (params, batch))
  with jax.enable_x64(True):
    losses = np.asarray(jax.jit(contrastive)(*wide))
    rows = flat(jax.jit(jax.jacobian(contrastive))(*wide))
  coupled = Task(contrastive, params, reference, batch)
  for score in SCORES:
    expected = by_hand(
      coupled, rows, losses, MEANINGS["everything"], score, "all", MASK
    )
    fn = compiled(contrastive, "forward", score=score)
    (loss, info), grads = fn(params, reference, batch, mask=MASK)
    close(loss, expected["loss"], 1e-5)
    close(info.scores, expected["scores"], 1e-5)
    close(info.weights, expected["weights"], 1e-5)
    close_trees(flat(grads), expected["grads"], 1e-5)


@most_engines
def test_it_compiles_once_for_each_shape(engine):
  def losses_fn(params, x):
    return jnp.square(x @ params)

  fn = jax.jit(gm.mimic_value_and_grad(losses_fn, engine=engine))
  params, reference, x = np.float32([1, 2]), np.float32([3, 1]), np.eye(6, 2)
  for factor in np.float32([1, 2, 3]):
    fn(params, reference, factor * x.astype("f4"), mask=MASK)
    fn(reference, params, factor * x.astype("f4"), mask=~MASK)
  assert fn._cache_size() == 1
  fn(params, reference, x[:4].astype("f4"), mask=MASK[:4])
  assert fn._cache_size() == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_no_gradient_flows_through_the_weights(engine):
  def losses_fn(params, batch):
    return jnp.square(batch["x"] * params["w"] - 1)

  fn = gm.mimic_value_and_grad(losses_fn, engine=engine)
  batch = {"x": np.array([1, 2, 3], np.float32)}

  def first_weight(params, reference):
    return fn(params, reference, batch)[0][1].weights[0]

  slopes = jax.jit(jax.jacfwd(first_weight, argnums=(0, 1)))(
    {"w": jnp.float32(0.2)}, {"w": jnp.float32(0.7)}
  )
  np.testing.assert_array_equal(jax.tree.leaves(slopes), 0)


def test_a_scheduled_temperature_follows_the_step():
  losses_fn, *arguments = task("mlp")

  def schedule(step):
    return jnp.where(step < 2, 0.3, TEMPERATURE)

  fn = compiled(losses_fn, "per_sample", weighting=gm.softmax(schedule))
  (_, info), _ = fn(*arguments, step=5)
  late = asked_of_mlp("per_sample")
  close(info.weights, np.asarray(late[0][1].weights), 1e-6)
  (_, info), _ = fn(*arguments, step=1)
  close(info.weights, np.asarray(gm.softmax(0.3)(info.scores)), 1e-6)
