"""On meshes as `jax.make_mesh` makes them, and inside `jax.shard_map`.

The truth is the step of the unsharded arrays, and how `jax.value_and_grad`
divides what it gives.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import gradmimic_jax as gm

SIZE, FEATURES, WIDTH, CLASSES = 16, 4, 8, 4
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


def outputs_fn(params, batch):
  def whole(leaf):  # what is divided along the batch's axis is put together
    sharding = jax.typeof(leaf).sharding
    if "fsdp" not in jax.tree.leaves(tuple(sharding.spec)):
      return leaf
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, P()))

  params = jax.tree.map(whole, params)
  hidden = jnp.tanh(batch["x"] @ params["body"] + params["bias"][None])
  return hidden @ params["head"]


def losses_fn(params, batch):
  return optax.softmax_cross_entropy_with_integer_labels(
    outputs_fn(params, batch), batch["y"]
  )


def with_aux(params, batch):
  outputs = outputs_fn(params, batch)
  return losses_fn(params, batch), {"hits": outputs.argmax(-1) == batch["y"]}


def label_losses(outputs, batch):
  return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])


def with_outputs(params, batch):
  outputs = outputs_fn(params, batch)
  return label_losses(outputs, batch), outputs


def make_params(seed):
  rng = np.random.default_rng(seed)
  shapes = {
    "body": (FEATURES, WIDTH),
    "bias": (WIDTH,),
    "head": (WIDTH, CLASSES),
  }
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def make_data():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(SIZE, FEATURES)).astype(np.float32)
  x[3, 1] = np.nan
  rows = {
    "batch": {"x": x, "y": rng.integers(0, CLASSES, SIZE).astype(np.int32)},
    "mask": np.arange(SIZE) % 5 != 1,
    "baseline": rng.normal(size=SIZE).astype(np.float32),
    "logits": rng.normal(size=(SIZE, CLASSES)).astype(np.float32),
  }
  return {"params": make_params(0), "reference": make_params(1), **rows}


DATA = make_data()
# Mesh, kinds of its axes, axes of the rows, and of parameters' axes.
LAYOUTS = {
  "rows": ({"data": 8}, (EXPLICIT,), "data", {}),
  "rows over two axes": (
    {"data": 4, "model": 2},
    (EXPLICIT, EXPLICIT),
    ("data", "model"),
    {},
  ),
  "tensor parallel": (
    {"data": 4, "model": 2},
    (EXPLICIT, EXPLICIT),
    "data",
    {"body": P(None, "model"), "bias": P("model")},
  ),
  "fsdp": (
    {"data": 2, "fsdp": 4},
    (EXPLICIT, EXPLICIT),
    ("data", "fsdp"),
    {"body": P(None, "fsdp"), "bias": P("fsdp"), "head": P("fsdp", None)},
  ),
  "explicit and auto": (
    {"data": 4, "model": 2},
    (EXPLICIT, AUTO),
    ("data", "model"),
    {"body": P(None, "model")},
  ),
  "auto and explicit": (
    {"data": 4, "model": 2},
    (AUTO, EXPLICIT),
    "data",
    {"body": P(None, "model"), "bias": P("model")},
  ),
  "parameters only": (
    {"data": 4, "model": 2},
    (EXPLICIT, EXPLICIT),
    None,
    {"body": P(None, "model"), "bias": P("model")},
  ),
}


@functools.cache
def placed(layout):
  """The mesh, and the data on it."""
  axes, kinds, rows, params = LAYOUTS[layout]
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), kinds)

  def put(leaf, spec):
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  models = {
    name: {
      key: put(leaf, params.get(key, P())) for key, leaf in DATA[name].items()
    }
    for name in ("params", "reference")
  }
  others = {name: DATA[name] for name in DATA if name not in models}
  return mesh, models | jax.tree.map(lambda leaf: put(leaf, P(rows)), others)


def step(reference="reference", fn=losses_fn, **options):
  take = gm.mimic_value_and_grad(fn, **options)

  def run(data):
    return take(
      data["params"],
      data[reference],
      data["batch"],
      mask=data["mask"],
      step=jnp.int32(3),
    )

  return run


def transformed(data, **options):
  tx = gm.mimic(optax.sgd(0.1, momentum=0.9), data["reference"], **options)
  # One gradient a row, of parameters that are not divided along rows' axes.
  shape = jax.typeof(data["params"]["body"]).sharding
  whole = data["params"]
  if "fsdp" in shape.mesh.axis_names:
    everywhere = NamedSharding(shape.mesh, P())
    whole = jax.sharding.reshard(whole, everywhere)

  def loss_fn(params, sample):
    return losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

  rows = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(whole, data["batch"])
  state = tx.init(data["params"])
  return tx.update(rows, state, data["params"], mask=data["mask"])[0]


def linear_head(data):
  features = data["batch"]["x"]
  errors = gm.linear_head.errors(data["logits"], data["batch"]["y"])
  direction = (jnp.eye(FEATURES), jnp.arange(4.0))
  scores = [
    gm.linear_head.scores(
      features, errors, score=score, direction=direction, mask=data["mask"]
    )
    for score in ("projection", "cosine", gm.matching.separable())
  ]
  weights = gm.ess_softmax(0.3)(
    jnp.where(jnp.isnan(scores[0]), 0, scores[0]), data["mask"]
  )
  valid = jnp.isfinite(scores[0])
  weights = jnp.where(valid, weights, 0)
  return scores, gm.linear_head.gradient(features, errors, weights)


def agreement(data):
  def losses_of(outputs):
    return optax.softmax_cross_entropy_with_integer_labels(
      outputs, data["batch"]["y"]
    )

  return gm.scores.agreement(losses_of, data["logits"], data["logits"][:, ::-1])


ESS = gm.ess_softmax(0.3)
CASES = {
  "forward": step(engine="forward", fn=with_aux, has_aux=True),
  "forward ess": step(engine="forward", weighting=ESS, layers="head"),
  "per sample": step(engine="per_sample", fn=with_aux, has_aux=True),
  "per sample top": step(
    engine="per_sample", weighting=gm.top_fraction(0.3), scope="layers"
  ),
  "stream": step(microbatch_size=8, fn=with_aux, has_aux=True),
  "stream of odd microbatches": step(microbatch_size=6),
  "stream of small microbatches": step(microbatch_size=4, score="cosine"),
  "stream in two passes": step(microbatch_size=8, weighting=ESS),
  "stream of plain means": step(
    microbatch_size=8,
    weighting=gm.warmup(gm.positive(), steps=9),
    layers="head",
    scope="layers",
  ),
  "ghost": step(engine="ghost", fn=with_aux, has_aux=True),
  "ghost of the head": step(engine="ghost", layers="head", scope="layers"),
  "ghost stream": step(engine="ghost", microbatch_size=8),
  "proportional": step(weighting=gm.proportional()),
  "cosine": step(score="cosine"),
  "cosine forward": step(score="cosine", engine="forward"),
  "gradient norm": step(score="gradient_norm"),
  "excess loss": step("baseline", score="excess_loss"),
  "given": step("baseline", score="given", microbatch_size=8),
  "matching": step(score=gm.matching.omp(0.3)),
  "matching forward": step(score=gm.matching.least_squares(), engine="forward"),
  "toward outputs": step(
    "logits", direction=gm.toward_outputs(outputs_fn), microbatch_size=8
  ),
  **{
    f"output agreement {name}": step(
      "logits",
      fn=with_outputs,
      has_aux=True,
      score=gm.output_agreement(label_losses),
      **options,
    )
    for name, options in (("forward", {}), ("stream", {"microbatch_size": 8}))
  },
  "random": step(score=gm.random_score(), microbatch_size=8),
  "toward a clean gradient": step(
    "batch", direction=gm.toward_clean_gradient(losses_fn)
  ),
  "scores": lambda data: gm.mimic_scores(losses_fn)(
    data["params"], data["reference"], data["batch"], mask=data["mask"]
  ),
  "transformation": transformed,
  "transformation by name": functools.partial(
    transformed, weighting="ess_softmax", fraction=0.3, score="cosine"
  ),
  "linear head": linear_head,
  "agreement": agreement,
}


@functools.cache
def expected(case):
  return jax.jit(CASES[case])(DATA)


def assert_close(actual, wanted):
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = max(np.nanmax(np.abs(b), initial=0), 1e-6)
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale)


def specs(tree):
  """Of each leaf, without what says nothing."""

  def spec(leaf):
    found = [*leaf.sharding.spec]
    while found and found[-1] is None:
      found.pop()
    return tuple(found)

  return jax.tree.map(spec, tree)


def assert_divided(case, result, data):
  """As `jax.value_and_grad` would."""
  if case.startswith("transformation"):
    assert specs(result) == specs(data["params"])
  elif isinstance(result, tuple) and isinstance(result[1], dict):
    (loss, info), grads = result
    assert specs(grads) == specs(data["params"])
    found = loss, info.scores, info.weights, info.losses
    rows = specs(data["mask"])
    assert [specs(x) for x in found] == [(), rows, rows, rows]


# What divides in a way of its own; the others as they do in the first layout.
OF_FSDP = ("forward", "stream", "matching", "transformation", "linear head")


@pytest.mark.parametrize(
  ("layout", "case"),
  [
    (layout, case)
    if layout == ("fsdp" if case in OF_FSDP else "rows over two axes")
    else pytest.param(layout, case, marks=pytest.mark.slow)
    for layout in LAYOUTS
    for case in CASES
  ],
)
def test_what_comes_out_is_divided_as_what_came_in(layout, case):
  # Whether shapes, types and divisions fit shows without compiling.
  _, data = placed(layout)
  result = jax.eval_shape(CASES[case], data)
  if AUTO not in LAYOUTS[layout][1]:
    assert_divided(case, result, data)


def test_numbers_are_those_of_one_device():
  _, data = placed("rows over two axes")
  result = jax.jit(CASES["forward ess"])(data)
  assert_close(result, expected("forward ess"))
  assert_divided("forward ess", result, data)


# Every case in one of the layouts, and in that which divides most some.
PAIRS = dict.fromkeys(
  [*zip(itertools.cycle(LAYOUTS), CASES), *(("fsdp", x) for x in OF_FSDP)]
)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_all_numbers_are_those_of_one_device(layout, case):
  mesh, data = placed(layout)
  assert_close(jax.jit(CASES[case])(data), expected(case))
  if layout == "explicit and auto" or (layout == "fsdp" and case in OF_FSDP):
    with jax.set_mesh(mesh):
      assert_close(jax.jit(CASES[case])(data), expected(case))


@pytest.mark.slow
def test_reference_is_checked_on_a_mesh():
  def check(data):
    return gm.check_reference(
      losses_fn,
      data["params"],
      data["reference"],
      data["batch"],
      mask=data["mask"],
    )

  wanted = check(DATA)
  found = check(placed("fsdp")[1])
  assert found.verdict == wanted.verdict
  np.testing.assert_allclose(found.path_losses, wanted.path_losses, 1e-5)
  assert abs(found.weight_cosine - wanted.weight_cosine) < 1e-5


@pytest.mark.parametrize(
  "case",
  ["stream", pytest.param("stream in two passes", marks=pytest.mark.slow)],
)
def test_stream_sums_gradients_over_devices_once_a_step(case):
  _, data = placed("rows")
  text = jax.jit(CASES[case]).lower(data).compile().as_text()
  summed = [
    line
    for line in text.splitlines()
    if " all-reduce(" in line and f"{FEATURES},{WIDTH}]" in line
  ]
  assert summed
  assert not [line for line in summed if "while/body" in line]


def in_parts(case, check, axes):
  """A step in `jax.shard_map` over two devices' halves of the batch."""
  mesh = jax.make_mesh((2, 4), ("data", "model"), (AUTO, AUTO))
  names = ("batch", "mask", "baseline", "logits")
  rows = {name: P("data") for name in names}
  fixed = {name: P() for name in ("params", "reference")}

  def local(data):
    (_, info), grads = CASES[case](data)
    return info.scores, info.weights, grads

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=({**rows, **fixed},),
    out_specs=(P("data"), P("data"), P()),
    check_vma=check,
    axis_names=axes,
  )


@pytest.mark.parametrize(
  "case",
  [
    "forward",
    "per sample top",
    "ghost stream",
    "matching",
    "stream of odd microbatches",
    *(
      pytest.param(x, marks=pytest.mark.slow)
      for x in ("cosine forward", "ghost", "stream in two passes")
    ),
  ],
)
def test_local_steps_are_traced_in_shard_map(case):
  jax.eval_shape(in_parts(case, True, {"data"}), DATA)


@pytest.mark.parametrize(
  "case",
  ["cosine forward", "ghost stream", "stream in two passes"],
)
@pytest.mark.slow
def test_local_steps_are_those_of_each_part(case):
  scores, weights, grads = jax.jit(in_parts(case, True, {"data"}))(DATA)
  halves = []
  for start in (0, 8):

    def half(leaf, start=start):
      return leaf[start : start + 8]

    data = {
      name: tree
      if name in ("params", "reference")
      else jax.tree.map(half, tree)
      for name, tree in DATA.items()
    }
    halves.append(jax.jit(CASES[case])(data))
  assert_close(scores, np.concatenate([x[0][1].scores for x in halves]))
  assert_close(weights, np.concatenate([x[0][1].weights for x in halves]))
  # Parameters that all devices share get the sum of the devices' gradients, as
  # those of jax.value_and_grad do.
  assert_close(grads, jax.tree.map(jnp.add, halves[0][1], halves[1][1]))
