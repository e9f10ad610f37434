"""Losses that are no matter of single samples, and keys that samples share."""

import functools
import gc
import weakref
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradmimic_jax as gm
from gradmimic_jax import _made_up

SIZE, FEATURES, CLASSES = 12, 6, 3
RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


PARAMS = {"w": normal(FEATURES, CLASSES), "b": normal(CLASSES)}
REFERENCE = jax.tree.map(lambda p: p + np.float32(0.1), PARAMS)
BATCH = {
  "x": normal(SIZE, FEATURES),
  "z": normal(SIZE, FEATURES),
  "y": (np.arange(SIZE) % CLASSES).astype(np.int32),
  "real": np.arange(SIZE) % 5 != 1,
}
KEY = jax.random.key(3)
# What an engine is taken for that shows one sample at a time.
OPTIONS = {
  "per_sample": {"engine": "per_sample"},
  "ghost": {"engine": "ghost"},
  "microbatches": {"microbatch_size": 5},
  "cosine": {"score": "cosine"},
  "norms": {"score": "gradient_norm"},
  "matching": {"score": gm.matching.omp(0.5)},
}


def logits_of(params, x):
  return jnp.tanh(x @ params["w"]) + params["b"][None]


def cross_entropy(logits, labels):
  rows = jnp.arange(labels.size)
  return -jax.nn.log_softmax(logits.astype(jnp.float32))[rows, labels]


def plain(params, batch):
  return cross_entropy(logits_of(params, batch["x"]), batch["y"])


def batch_norm(params, batch):
  hidden = batch["x"] @ params["w"]
  scale = jnp.sqrt(jnp.var(hidden, axis=0, keepdims=True) + 1e-5)
  hidden = (hidden - jnp.mean(hidden, axis=0, keepdims=True)) / scale
  return cross_entropy(hidden + params["b"][None], batch["y"])


def contrastive(params, batch):
  image, text = (logits_of(params, batch[name]) for name in "xz")
  return -jnp.diag(jax.nn.log_softmax(image @ text.T))


def dropped(logits, key):
  return jnp.where(jax.random.bernoulli(key, 0.9, logits.shape), logits, 0)


def own_key(params, batch):
  """Dropout with a key a sample: the convention."""
  logits = logits_of(params, batch["x"])
  return cross_entropy(jax.vmap(dropped)(logits, batch["key"]), batch["y"])


def shared_key(params, batch, key=KEY):
  logits = logits_of(params, jnp.tile(batch["x"], (1, 1)))
  return cross_entropy(dropped(logits, key), batch["y"])


def split_within(params, batch):
  keys = jax.random.split(KEY, len(batch["x"]))
  return own_key(params, batch | {"key": keys})


def deviation(params, batch):
  logits = logits_of(params, batch["x"])
  return jnp.sum(logits / jnp.std(logits, 0, ddof=1, keepdims=True), axis=1)


MATES = r"beside others.*engine='forward'; BatchNorm with"
COUPLED = {
  "BatchNorm": (batch_norm, MATES),
  "contrastive": (contrastive, MATES),
  "a standard deviation": (deviation, MATES),
  "bfloat16": (
    lambda p, b: narrow(p, b) * (1 + 0.1 * jnp.std(b["x"])),
    MATES,
  ),
  "the batch's size less one": (
    lambda p, b: plain(p, b) / (len(b["x"]) - 1),
    "how many samples there are",
  ),
  "centred": (lambda p, b: plain(p, b) - jnp.mean(plain(p, b)), MATES),
  "places": (
    lambda p, b: plain(p, b) * jnp.arange(len(b["x"]), dtype=float),
    "its place among them",
  ),
  "a hundredth of a mean": (
    lambda p, b: plain(p, b) + 1e-2 * jnp.mean(plain(p, b)),
    MATES,
  ),
  "the valid count": (
    lambda p, b: jnp.where(
      b["real"], plain(p, b) / jnp.sum(b["real"], dtype=float), 0
    ),
    MATES,
  ),
  "cumulative": (lambda p, b: jnp.cumsum(plain(p, b)), MATES),
  "the batch's size": (
    lambda p, b: plain(p, b) / len(b["x"]),
    "how many samples there are.*weights sum to 1",
  ),
  "a key of all": (
    shared_key,
    r"samples share.*jax\.random\.split\(key, B\).*vmap.*forward",
  ),
  "a key split within": (
    split_within,
    r"samples share.*jax\.random\.split\(key, B\).*vmap.*forward",
  ),
}


def slow_if_in(names, cases):
  return [
    pytest.param(name, marks=pytest.mark.slow) if name in names else name
    for name in cases
  ]


# What others of them show, too.
MORE_COUPLED = (
  "a standard deviation",
  "bfloat16",
  "the valid count",
  "a key of all",
  "centred",
)


@pytest.mark.parametrize("name", slow_if_in(MORE_COUPLED, COUPLED))
def test_what_is_no_matter_of_single_samples_is_refused(name):
  losses_fn, message = COUPLED[name]
  with pytest.raises(ValueError, match=message) as caught:
    gm.check_independence(losses_fn, PARAMS, BATCH)
  assert "check_independence=False" in str(caught.value)


@pytest.mark.parametrize(
  ("door", "option"),
  [
    # Each door, and each option at one of them.
    (door, option)
    if (n + i) % 2
    else pytest.param(door, option, marks=pytest.mark.slow)
    for i, door in enumerate((gm.mimic_value_and_grad, gm.mimic_scores))
    for n, option in enumerate(OPTIONS)
  ],
)
def test_every_door_to_the_per_sample_engine_refuses_it(door, option):
  arguments = PARAMS, REFERENCE, BATCH
  fn = door(batch_norm, **OPTIONS[option])
  with pytest.raises(ValueError, match=MATES):
    jax.eval_shape(fn, *arguments)  # tracers, as under jit
  unchecked = door(batch_norm, **OPTIONS[option], check_independence=False)
  jax.eval_shape(unchecked, *arguments)
  forward = {"engine": "forward"} | OPTIONS[option]
  if option not in ("per_sample", "ghost", "microbatches"):
    jax.eval_shape(door(batch_norm, **forward), *arguments)


def test_concrete_arrays_are_refused_too():
  with pytest.raises(ValueError, match=MATES):
    gm.mimic_scores(batch_norm, engine="per_sample")(PARAMS, REFERENCE, BATCH)


def test_parameters_that_are_all_zero_hide_nothing():
  # A head that starts at 0 gives every sample the loss log(3).
  zeros = jax.tree.map(np.zeros_like, PARAMS)
  with pytest.raises(ValueError, match=MATES):
    gm.check_independence(batch_norm, zeros, BATCH)


def transformations(call):
  """Ways to come by tracers."""
  return {
    "jit": lambda w: jax.jit(call)(w),
    "grad": lambda w: jax.grad(lambda w: call(w).sum())(w),
    "vmap": lambda w: jax.vmap(call)(w[None]),
    "scan": lambda w: jax.lax.map(call, w[None]),
    "remat": lambda w: jax.jit(jax.checkpoint(call))(w),
  }


@pytest.mark.parametrize(
  "how",
  slow_if_in(
    ("jit", "grad", "remat"), ("vmap", "scan", "jit", "grad", "remat")
  ),
)
def test_closed_over_tracers_hide_nothing(how):
  def losses(centred):
    def call(w):
      def losses_fn(params, batch, *, bias):
        logits = logits_of(params | {"w": w}, batch["x"]) + bias[None]
        mean = jnp.mean(logits, axis=0, keepdims=True) if centred else 0.0
        return cross_entropy(logits - mean, batch["y"])

      fn = gm.mimic_scores(losses_fn, layers="b", score="gradient_norm")
      return jnp.sum(fn(PARAMS, REFERENCE, BATCH, bias=w[0]).losses) * w

    return transformations(call)[how]

  with pytest.raises(ValueError, match=MATES):
    losses(True)(PARAMS["w"])
  jax.eval_shape(losses(False), PARAMS["w"])


def tokens_fn(params, batch):
  """One loss a sequence, over its own valid tokens."""
  logits = jnp.cumsum(params["w"][batch["tokens"]], axis=1)
  chosen = jax.nn.log_softmax(logits)[:, :, 0]
  counted = batch["counted"].astype(logits.dtype)
  return -jnp.sum(chosen * counted, axis=1) / jnp.sum(counted, axis=1)


def running(params, batch, *, mean, variance):
  hidden = batch["x"] @ params["w"]
  hidden = (hidden - mean[None]) / jnp.sqrt(variance[None] + 1e-5)
  return cross_entropy(hidden, batch["y"])


def narrow(params, batch):
  """The same layer six times over in bfloat16."""
  w = params["w"].astype(jnp.bfloat16)
  h = batch["x"].astype(jnp.bfloat16)
  for _ in range(6):
    h = jax.nn.standardize(jnp.tanh(h @ w) @ w.T + h)
  return cross_entropy(h, batch["y"])


def cancelling(params, batch):
  """A small loss, of large numbers that rounding has moved."""
  large = 1e4 * logits_of(params, batch["x"])
  return jnp.max(large, axis=1) - jnp.mean(large, axis=1) * 0.999 - large[:, 0]


def printing(params, batch):
  def layer(hidden, _):
    jax.debug.callback(lambda x: CALLS.append("callback"), hidden.sum())
    return jnp.tanh(hidden), None

  hidden, _ = jax.lax.scan(layer, logits_of(params, batch["x"]), length=2)
  return cross_entropy(hidden, batch["y"])


CALLS: list[str] = []
TOKENS = {
  "tokens": RNG.integers(0, FEATURES, size=(SIZE, 7)),
  "counted": np.ones((SIZE, 7), bool),
}
STATE = {"mean": jnp.zeros(CLASSES), "variance": jnp.ones(CLASSES)}
INDEPENDENT = {
  "plain": (plain, BATCH, {}),
  "masked": (lambda p, b: jnp.where(b["real"], plain(p, b), 0), BATCH, {}),
  "sequences": (tokens_fn, TOKENS, {}),
  "BatchNorm with running averages": (running, BATCH, STATE),
  "typed keys": (own_key, BATCH | {"key": jax.random.split(KEY, SIZE)}, {}),
  "uint32 keys": (
    own_key,
    BATCH | {"key": jax.random.split(jax.random.PRNGKey(3), SIZE)},
    {},
  ),
  "keys of another kind": (
    own_key,
    BATCH | {"key": jax.random.split(jax.random.key(3, impl="rbg"), SIZE)},
    {},
  ),
  "a key that is not used": (
    lambda p, b, *, key: plain(p, b),
    BATCH,
    {"key": KEY},
  ),
  "noise that is the same for all": (
    lambda p, b, *, key: plain(p, b) * (1 + jax.random.uniform(key)),
    BATCH,
    {"key": KEY},
  ),
  "bfloat16": (narrow, BATCH, {}),
  "cancelling": (cancelling, BATCH, {}),
  "logarithms": (
    lambda p, b: plain(p, b) * jnp.log(b["real"].astype(float) + 0.5),
    BATCH,
    {},
  ),
  "callbacks": (printing, BATCH, {}),
  "one size of batch": (
    lambda p, b: plain(p, b) if len(b["x"]) in (1, SIZE) else None,
    BATCH,
    {},
  ),
  "its own copy of the batch's loss": (
    jax.jit(jax.checkpoint(lambda p, b: plain(p, b) ** 2)),
    BATCH,
    {},
  ),
}


MORE_INDEPENDENT = (
  "masked",
  "logarithms",
  "uint32 keys",
  "keys of another kind",
  "noise that is the same for all",
  "sequences",
)


@pytest.mark.parametrize(
  ("name", "traced"),
  [
    *((name, False) for name in INDEPENDENT if name not in MORE_INDEPENDENT),
    ("uint32 keys", True),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        *((name, False) for name in MORE_INDEPENDENT),
        ("BatchNorm with running averages", True),
        ("noise that is the same for all", True),
      )
    ),
  ],
)
def test_what_is_a_matter_of_single_samples_is_taken(name, traced):
  losses_fn, batch, kwargs = INDEPENDENT[name]
  # Warnings are errors: it was compared.
  check = functools.partial(gm.check_independence, losses_fn)
  if traced:
    jax.eval_shape(check, PARAMS, batch, **kwargs)
  else:
    check(PARAMS, batch, **kwargs)
  assert not CALLS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["typed keys", "uint32 keys"])
def test_a_key_a_sample_gives_all_engines_the_same_losses(name):
  losses_fn, batch, _ = INDEPENDENT[name]

  @jax.jit
  def run(batch):
    return [
      gm.mimic_value_and_grad(losses_fn, **options)(PARAMS, REFERENCE, batch)
      for options in (
        {"engine": "forward"},
        {"engine": "per_sample"},
        {"microbatch_size": 5},  # does not divide 12
      )
    ]

  forward, *others = run(batch)
  expected = [
    own_key(PARAMS, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))[0]
    for i in range(3)
  ]
  np.testing.assert_allclose(forward[0][1].losses[:3], expected, rtol=1e-5)
  for (_, info), _ in others:
    np.testing.assert_allclose(info.losses, forward[0][1].losses, rtol=1e-5)
    np.testing.assert_allclose(info.scores, forward[0][1].scores, rtol=1e-4)


# aux.


class Model(nn.Module):
  average: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=self.average)(nn.Dense(5)(x))
    return nn.Dense(CLASSES)(x)


def flax_losses(model, params, batch, *, state):
  variables = {"params": params, "batch_stats": state}
  logits, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
  return cross_entropy(logits, batch["y"]), new["batch_stats"]


def test_the_forward_engine_trains_batch_norm_and_hands_on_its_state():
  with jax.numpy_rank_promotion("allow"):
    model = Model()
    variables = jax.jit(model.init)(KEY, BATCH["x"])
    params, state = variables["params"], variables["batch_stats"]
    losses_fn = functools.partial(flax_losses, model)
    arguments = params, params, BATCH
    fn = gm.mimic_value_and_grad(losses_fn, has_aux=True, engine="forward")
    (_, info), _ = jax.jit(fn)(*arguments, state=state)
    expected = jax.jit(losses_fn)(params, BATCH, state=state)[1]
    assert jax.tree.structure(info.aux) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (info.aux, expected)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5)
    for options in ({"microbatch_size": 4}, {"score": "cosine"}):
      fn = gm.mimic_value_and_grad(losses_fn, has_aux=True, **options)
      with pytest.raises(ValueError, match=MATES):
        jax.eval_shape(fn, *arguments, state=state)


def test_state_in_aux_is_refused_with_its_leaf_and_shape():
  model = Model(average=True)
  with jax.numpy_rank_promotion("allow"):
    variables = jax.jit(model.init)(KEY, BATCH["x"])
    params, state = variables["params"], variables["batch_stats"]
    losses_fn = functools.partial(flax_losses, model)
    for checked in (True, False):
      fn = gm.mimic_value_and_grad(
        losses_fn,
        has_aux=True,
        engine="per_sample",
        check_independence=checked,
      )
      with pytest.raises(
        ValueError, match=r"'BatchNorm_0/mean'.*\(5,\).*engine='forward'"
      ):
        jax.eval_shape(fn, params, params, BATCH, state=state)


@pytest.mark.parametrize(
  ("aux", "message"),
  [
    (lambda p, b: {"norm": jnp.sum(p["w"])}, r"aux leaf 'norm'.*\(\)"),
    # With batches of one it looks like a sample's.
    (
      lambda p, b: {"norm": jnp.sum(p["w"])[None]},
      r"'norm'.*\(1,\) for one of",
    ),
    (lambda p, b: p["b"], r"aux leaf 'aux' of losses_fn has shape \(3,\)"),
    (
      lambda p, b: {"share": jax.nn.softmax(logits_of(p, b["x"]), axis=0)},
      r"aux leaf 'share'.*beside others",
    ),
  ],
)
def test_aux_that_is_not_of_samples_is_refused(aux, message):
  def losses_fn(params, batch):
    return plain(params, batch), aux(params, batch)

  fn = gm.mimic_value_and_grad(losses_fn, has_aux=True, engine="per_sample")
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(fn, PARAMS, REFERENCE, BATCH)


# What it costs.


def test_it_is_not_in_the_program():
  texts = [
    str(jax.make_jaxpr(fn)(PARAMS, REFERENCE, BATCH))
    for fn in (
      gm.mimic_value_and_grad(plain, microbatch_size=4, check_independence=flag)
      for flag in (True, False)
    )
  ]
  assert texts[0] == texts[1]


def counted(losses_fn):
  """losses_fn, and how often its lines have run, `[]`."""
  runs = np.zeros([])

  def call(params, batch, **kwargs):
    runs[...] += 1
    return losses_fn(params, batch, **kwargs)

  return call, runs


class Learner:
  """A bound method is another object wherever it is looked up."""

  def __init__(self, losses_fn):
    self.losses_fn = losses_fn

  def losses(self, params, batch, **kwargs):
    return self.losses_fn(params, batch, **kwargs)


class Factor(NamedTuple):
  """Containers are made anew where a tree is taken apart."""

  value: float

  def __rmul__(self, other):
    return other * self.value


KEPT = Factor(2.0)


def test_it_is_done_once():
  call, runs = counted(plain)
  learner = Learner(call)

  def check(losses_fn, batch=BATCH, **kwargs):
    before = float(runs)
    gm.check_independence(losses_fn, PARAMS, batch, **kwargs)
    return runs > before + 1  # the errors of its own take one

  short = jax.tree.map(lambda x: x[:7], BATCH)
  for made in (
    lambda: call,
    lambda: learner.losses,
    lambda: lambda p, b: call(p, b),
    lambda: functools.partial(call, **{}),
    lambda: jax.jit(lambda p, b: call(p, b)),
  ):
    assert check(made())
    assert not check(made())
    assert not check(made(), short)  # the last batch of an epoch
  assert check(call, BATCH | {"z": np.repeat(BATCH["z"], 2, axis=-1)})

  def scaled(params, batch, *, factor, train):
    return call(params, batch) * factor

  assert check(scaled, factor=1.0, train=True)
  assert not check(scaled, factor=2.0, train=True)
  assert check(scaled, factor=2.0, train=False)
  assert check(scaled, factor=1, train=False)
  assert not check(scaled, factor=2, train=False)
  assert check(scaled, factor=KEPT, train=False)
  assert not check(scaled, factor=KEPT, train=False)


def test_nothing_is_kept_alive():
  class Array:
    scale = 1.0

  held = Array()
  gone = weakref.ref(held)
  losses_fn = functools.partial(lambda held, p, b: plain(p, b), held)
  gm.check_independence(losses_fn, PARAMS, BATCH)
  del losses_fn, held
  gc.collect()
  assert gone() is None


def test_a_function_that_comes_after_another_is_compared_for_itself():
  # The same code with something else closed over, at the same address even.
  def made(transform):
    return lambda params, batch: transform(plain(params, batch))

  gm.check_independence(made(jnp.square), PARAMS, BATCH)
  with pytest.raises(ValueError, match=MATES):
    gm.check_independence(made(jnp.sort), PARAMS, BATCH)

  def along(axis):
    return lambda p, b: jnp.sum(jnp.cumsum(b["x"] @ p["w"], axis=axis), axis=1)

  gm.check_independence(along(1), PARAMS, BATCH)
  with pytest.raises(ValueError, match=MATES):
    gm.check_independence(along(0), PARAMS, BATCH)


# Where it can't be done.


def not_finite(params, batch):
  return plain(params, batch) + jnp.log(-jnp.sum(params["w"] ** 2))


def with_effects(params, batch):
  shape = jax.ShapeDtypeStruct((), np.float32)
  return plain(params, batch) * io_callback(CALLS.append, shape, params["b"][0])


@pytest.mark.parametrize(
  ("losses_fn", "why"),
  [(not_finite, "not finite"), (with_effects, "side effects")],
)
def test_a_function_that_is_not_compared_is_told(losses_fn, why):
  with pytest.warns(
    UserWarning, match=f"not compared.*{why}.*engine='forward'"
  ):
    gm.check_independence(losses_fn, PARAMS, BATCH)
  gm.check_independence(losses_fn, PARAMS, BATCH)  # once
  assert not CALLS


def test_a_model_that_is_too_large_to_make_up_is_told():
  huge = {"w": jax.ShapeDtypeStruct((2**16, 2**15), np.float32)}
  x = jax.ShapeDtypeStruct((SIZE, 2**16), np.float32)
  with pytest.warns(UserWarning, match="have 8.0 GiB.*up to 4 are made up"):
    gm.check_independence(lambda p, x: jnp.sum(x @ p["w"], axis=1), huge, x)


def test_where_made_up_numbers_give_nan_real_ones_are_looked_at():
  def losses_fn(params, batch):
    return plain(params, batch) + jnp.where(batch["x"][:, 0] < 5, jnp.nan, 0)

  def centred(params, batch):
    losses = losses_fn(params, batch)
    return losses - jnp.mean(losses)

  batch = BATCH | {"x": np.abs(BATCH["x"]) + np.float32(5)}
  gm.check_independence(losses_fn, PARAMS, batch)
  with pytest.raises(ValueError, match=MATES):
    gm.check_independence(centred, PARAMS, batch)


def test_an_error_of_losses_fn_comes_as_it_is():
  def losses_fn(params, batch):
    raise KeyError("nothing of that name")

  fn = gm.mimic_value_and_grad(losses_fn, microbatch_size=2)
  with pytest.raises(KeyError, match="nothing of that name"):
    fn(PARAMS, REFERENCE, BATCH)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_works_under_a_mesh(kind):
  mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  batch = jax.device_put(BATCH, rows)
  params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))

  def constrained(params, batch):
    logits = logits_of(params, batch["x"])
    if kind == AxisType.Auto and len(logits) > 1:
      logits = jax.lax.with_sharding_constraint(logits, rows)
    return jnp.sum(logits, axis=1)

  def centred(params, batch):
    losses = constrained(params, batch)
    return losses - jnp.mean(losses)

  with jax.set_mesh(mesh):
    jax.jit(lambda *args: gm.check_independence(constrained, *args))(
      params, batch
    )
    with pytest.raises(ValueError, match=MATES):
      jax.jit(lambda *args: gm.check_independence(centred, *args))(
        params, batch
      )


def test_made_up_numbers_are_of_the_dtype_asked_for():
  rng = np.random.default_rng(0)
  for dtype in ("bfloat16", "float8_e4m3fn", "float64", "complex64", "int4"):
    leaf = jax.ShapeDtypeStruct((3, 2), jnp.dtype(dtype))
    for make in (_made_up.parameter, _made_up.feature):
      made = make(leaf, rng, True)
      assert made.dtype == leaf.dtype
      assert made.shape == leaf.shape
