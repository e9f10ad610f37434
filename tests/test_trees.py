"""Trees as they come: in other containers, callable, with text in them."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm
from gradmimic_jax import layers

ONE, TWO = np.float32([1, -2]), np.float32([3, 0.5])
BATCH = np.float32([[1, 2], [0, -1], [2, 1]])
Pair = collections.namedtuple("Pair", ["b", "a"])


def losses_fn(params, batch):
  first, second = (
    params if isinstance(params, (list, tuple)) else (params["a"], params["b"])
  )
  return jnp.tanh(batch @ first) * 2 + (batch**2) @ second


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
  w: jax.Array
  b: jax.Array

  def __call__(self, x):
    return x * self.w + self.b


NET = Net(jnp.zeros(2), jnp.ones(3))


take = jax.jit(gm.mimic_value_and_grad(losses_fn))
SAME = [ONE, TWO], [TWO, ONE + 1]


def update(params, reference):
  tx = gm.mimic(optax.sgd(1.0), reference)
  rows = jax.tree.map(lambda x: np.stack([x, -x]), params)
  return tx.update(rows, tx.init(params), params)[0]


@pytest.fixture(scope="module")
def expected():
  """A step, a check and an update where both are lists."""
  return (
    take(*SAME, BATCH),
    gm.check_reference(losses_fn, *SAME, BATCH),
    update(*SAME),
  )


@pytest.mark.parametrize(
  ("params", "reference"),
  [
    ([ONE, TWO], (TWO, ONE + 1)),
    # Ordered by insertion: leaves are matched by path, not by place.
    (
      {"a": ONE, "b": TWO},
      collections.OrderedDict([("b", ONE + 1), ("a", TWO)]),
    ),
    (
      collections.OrderedDict([("b", TWO), ("a", ONE)]),
      {"a": TWO, "b": ONE + 1},
    ),
    ({"a": ONE, "b": TWO}, Pair(a=TWO, b=ONE + 1)),
  ],
)
def test_a_reference_in_other_containers_is_taken(params, reference, expected):
  ((_, plain), wanted), checked, like = expected
  ordered = isinstance(params, list)
  (_, info), grads = take(params, reference, BATCH)
  np.testing.assert_array_equal(info.scores, plain.scores)
  found = grads if ordered else [grads["a"], grads["b"]]
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  report = gm.check_reference(losses_fn, params, reference, BATCH)
  np.testing.assert_array_equal(report.path_losses, checked.path_losses)
  # Sums go over leaves, whose order differs.
  assert report.weight_cosine == pytest.approx(checked.weight_cosine, rel=1e-5)
  updates = update(params, reference)
  found = updates if ordered else [updates["a"], updates["b"]]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, like
  )


def test_a_state_restored_in_other_containers_is_matched_by_path():
  params = collections.OrderedDict([("b", ONE), ("a", TWO)])
  rows = jax.tree.map(lambda x: np.stack([x, -x]), params)
  tx = gm.reweight_by_mimic_score({"a": ONE, "b": TWO})
  state = tx.init(params)
  restored = state._replace(reference=dict(state.reference))
  for chosen in (None, "a"):
    tx = gm.reweight_by_mimic_score({"a": ONE, "b": TWO}, layers=chosen)
    state = tx.init(params)
    restored = state._replace(
      reference={key: state.reference[key] for key in ("a", "b")}
    )
    expected, _ = tx.update(rows, state, params)
    updates, _ = tx.update(rows, restored, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_flax_variables_are_their_values():
  nnx = pytest.importorskip("flax.nnx")
  state = nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
  plain = nnx.to_pure_dict(state)
  moved = jax.tree.map(lambda x: x + 1, state)

  def losses(params, batch):
    return (batch @ params["kernel"] + params["bias"][None])[:, 0]

  take = jax.jit(gm.mimic_value_and_grad(losses))
  (_, info), _ = take(plain, moved, BATCH)
  (_, expected), _ = take(plain, nnx.to_pure_dict(moved), BATCH)
  np.testing.assert_array_equal(info.scores, expected.scores)


def test_other_paths_are_named():
  take = gm.mimic_value_and_grad(losses_fn)
  with pytest.raises(TypeError, match="lacks '0', '1' and has 'a', 'b'"):
    take([ONE, TWO], {"a": ONE, "b": TWO}, BATCH)


def test_a_callable_tree_of_bools_is_a_tree():
  assert layers.choose(Net(True, False), NET) == [True, False]
  assert layers.choose(Net(np.bool_(False), True), NET) == [False, True]
  with pytest.raises(TypeError, match="tree of bools"):
    layers.choose(Net(True, (False, True)), NET)


class Chooser:
  def __call__(self, path, leaf):
    return path == "b"


def by_name(name, path, leaf):
  return path == name


@pytest.mark.parametrize(
  "predicate",
  [
    lambda path, leaf: path == "b",
    functools.partial(by_name, "b"),
    jax.tree_util.Partial(functools.partial(by_name, "b")),
    Chooser(),
    Chooser().__call__,
  ],
)
def test_other_callables_are_predicates(predicate):
  assert layers.choose(predicate, NET) == [False, True]


def test_a_tree_of_bools_may_be_in_other_containers():
  ordered = collections.OrderedDict([("b", True), ("a", False)])
  assert layers.choose(ordered, {"a": ONE, "b": TWO}) == [False, True]
  assert layers.choose((True, False), [ONE, TWO]) == [True, False]


TEXTS = {
  "text": np.array(["a", "b", "c"]),
  "bytes": np.array([b"a", b"b", b"c"]),
  "objects": np.array(["a", 1, None], object),
  "dates": np.array(["2020-01-01"] * 3, "datetime64[D]"),
  "python": "abc",
  "list": ["a", "b", "c"],
  "record": np.zeros(3, [("x", np.float32)]),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_and_objects_in_a_batch_are_refused_by_name(kind):
  def losses(params, batch):
    return losses_fn(params, batch["x"])

  params, reference = [ONE, TWO], [TWO, ONE]
  batch = {"x": BATCH, "more": {"uid": TEXTS[kind]}}
  for call in (
    gm.mimic_value_and_grad(losses),
    gm.mimic_scores(losses, microbatch_size=2),
    functools.partial(gm.check_reference, losses),
  ):
    with pytest.raises(
      TypeError, match=r"batch leaf 'more/uid.* out of the ba"
    ):
      call(params, reference, batch)
    with pytest.raises(TypeError, match="mask is "):
      call(params, reference, {"x": BATCH}, mask=TEXTS[kind])
  clean = gm.toward_clean_gradient(losses)
  with pytest.raises(TypeError, match="'more/uid"):
    clean(params, batch, None)


def test_nothing_and_text_as_an_argument_are_passed_by():
  def losses(params, batch, *, names, mode):
    assert names.shape == (2,)
    assert mode == "train"
    return losses_fn(params, batch["x"])

  batch = {"x": BATCH, "uid": None}
  more = {"names": np.array(["a", "b"]), "mode": "train"}
  models = [ONE, TWO], [TWO, ONE]
  gm.mimic_value_and_grad(losses)(*models, batch, **more)
  gm.check_reference(losses, *models, batch, **more)


ENGINES = {
  name: jax.jit(gm.mimic_value_and_grad(losses_fn, **options))
  for name, options in {
    "forward": {"engine": "forward"},
    "per_sample": {"engine": "per_sample"},
    "stream": {"microbatch_size": 2},
    "ess": {"microbatch_size": 2, "weighting": gm.ess_softmax(0.5)},
  }.items()
}


@pytest.mark.parametrize(
  "engine",
  [
    name if name != "stream" else pytest.param(name, marks=pytest.mark.slow)
    for name in ENGINES
  ],
)
@pytest.mark.parametrize("broken", ["params", "reference"])
def test_nan_parameters_give_nan(engine, broken):
  trees = {"params": [ONE, TWO], "reference": [TWO, ONE]}
  trees[broken] = [trees[broken][0] * np.float32(np.nan), trees[broken][1]]
  take = ENGINES[engine]
  all_of_them = np.ones(3, bool)
  (loss, info), grads = take(*trees.values(), BATCH, mask=all_of_them)
  assert np.isnan(loss)
  assert all(np.isnan(leaf).all() for leaf in grads)
  np.testing.assert_array_equal(info.weights, 0)
  (loss, _), grads = take(*trees.values(), BATCH, mask=np.zeros(3, bool))
  assert loss == 0
  assert not any(leaf.any() for leaf in grads)
  with pytest.raises(ValueError, match="params and the reference"):
    gm.check_reference(losses_fn, *trees.values(), BATCH)


def test_a_direction_as_long_as_numbers_go_is_one():
  reference = [np.full(2, 3e38, np.float32), np.full(2, 3e38, np.float32)]
  params = [np.zeros(2, np.float32)] * 2
  for scale in (1, 1e-38, 1e-30):
    smaller = [x * np.float32(scale) for x in reference]
    found = jax.jit(gm.mimic_scores(losses_fn))(params, smaller, BATCH)
    expected = gm.mimic_scores(losses_fn)(
      params, [np.ones_like(ONE)] * 2, BATCH
    )
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
