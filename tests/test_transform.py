"""The optax transformation: what it computes and how it composes."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

SIZE = 5
RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


SHAPES = {"body": {"w": (3, 4)}, "head": {"b": (2,), "w": (4, 2)}}


def tree(make):
  return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = tree(lambda shape: draw(*shape))
REFERENCE = tree(lambda shape: draw(*shape))
BATCH = {"x": draw(SIZE, 3), "y": draw(SIZE, 2)}
MASK = np.array([True, True, False, True, True])
HEAD = {"body": {"w": False}, "head": {"b": True, "w": True}}


def losses_fn(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["body"]["w"])
  outputs = hidden @ params["head"]["w"] + params["head"]["b"][None]
  return jnp.sum(jnp.square(outputs - batch["y"]), axis=-1)


@jax.jit
def per_sample(params, batch):
  def loss_fn(params, sample):
    return losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

  return jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)


@pytest.fixture(scope="module")
def grads():
  return jax.tree.map(np.asarray, per_sample(PARAMS, BATCH))


def close(actual, expected, tolerance=1e-5):
  """Relative to the largest entry of the tree."""
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * largest
    ),
    actual,
    expected,
  )


def same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def apply(tx, grads, state=None, params=PARAMS, **extra):
  """One update; optax's own arithmetic mixes dtypes."""
  with jax.numpy_dtype_promotion("standard"):
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, **extra)


def compiled(tx, grads, params=PARAMS, **extra):
  """The same, strictly, in one program: faster where shapes are new."""
  return jax.jit(tx.update)(grads, tx.init(params), params, **extra)


def shapes(tree):
  return jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)


@pytest.mark.parametrize(
  ("layers", "score", "scope"),
  [
    (None, "projection", "all"),
    (HEAD, "cosine", "all"),
    pytest.param(None, "cosine", "layers", marks=pytest.mark.slow),
    ("^head/", "projection", "layers"),
  ],
  ids=str,
)
def test_it_gives_what_mimic_value_and_grad_gives(grads, layers, score, scope):
  options = dict(
    layers=layers, score=score, scope=scope, weighting=gm.softmax(0.5)
  )
  tx = gm.reweight_by_mimic_score(REFERENCE, **options)
  fn = jax.jit(gm.mimic_value_and_grad(losses_fn, **options))
  for mask in (MASK | True, MASK):
    updates, state = apply(tx, grads, mask=None if mask.all() else mask)
    (_, info), expected = fn(PARAMS, REFERENCE, BATCH, mask=mask)
    close(updates, expected)
    close(state.distance, info.distance)
    close(state.effective_sample_size, info.effective_sample_size)
    assert state.nonfinite == 0


@pytest.mark.parametrize(
  "weighting",
  [
    gm.ess_softmax(0.4),
    gm.positive(),
    *(
      pytest.param(x, marks=pytest.mark.slow)
      for x in (gm.top_fraction(0.5), gm.uniform())
    ),
  ],
  ids=lambda weighting: type(weighting).__name__,
)
def test_every_weighting_gives_what_mimic_value_and_grad_gives(
  grads, weighting
):
  tx = gm.reweight_by_mimic_score(REFERENCE, weighting=weighting)
  fn = jax.jit(gm.mimic_value_and_grad(losses_fn, weighting=weighting))
  updates, _ = apply(tx, grads, mask=MASK)
  close(updates, fn(PARAMS, REFERENCE, BATCH, mask=MASK)[1], 1e-4)


def test_mimic_is_the_chain_with_the_optimizer(grads):
  updates, _ = apply(gm.mimic(optax.sgd(0.5), REFERENCE), grads)
  plain, _ = apply(gm.reweight_by_mimic_score(REFERENCE), grads)
  close(updates, jax.tree.map(lambda u: -0.5 * u, plain))


def test_training_goes_toward_the_reference():
  tx = gm.mimic(optax.sgd(0.01), REFERENCE, weighting=gm.ess_softmax(0.4))

  @jax.jit
  def step(params, state, batch):
    grads = per_sample(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.asarray, PARAMS)
  state = tx.init(params)
  targets = jnp.tanh(BATCH["x"] @ REFERENCE["body"]["w"])
  targets = targets @ REFERENCE["head"]["w"] + REFERENCE["head"]["b"][None]
  distances = []
  for _ in range(20):
    params, state = step(params, state, BATCH | {"y": targets})
    distances.append(float(state[0].distance))
  assert distances[-1] < distances[0]
  assert step._cache_size() == 1


def test_it_compiles_once_and_its_state_keeps_its_shapes(grads):
  tx = gm.mimic(optax.adam(1e-2), REFERENCE)
  with jax.numpy_dtype_promotion("standard"):
    update = jax.jit(tx.update)
    start = state = jax.jit(tx.init)(PARAMS)
    for _ in range(3):
      updates, state = update(grads, state, PARAMS)
    assert update._cache_size() == 1
    assert shapes(state) == shapes(start)
    assert shapes(updates) == shapes(PARAMS)
    # A shorter last batch changes nothing in the state.
    shorter = jax.tree.map(lambda g: g[:3], grads)
    _, state = update(shorter, state, PARAMS)
  assert shapes(state) == shapes(start)
  assert state[0].count == 4


def test_state_goes_through_a_checkpoint(grads):
  tx = gm.mimic(optax.sgd(0.1, momentum=0.9), REFERENCE, layers="head")
  _, state = apply(tx, grads)
  leaves, structure = jax.tree.flatten(state)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  stored = [np.asarray(leaf).copy() for leaf in leaves]
  fresh = jax.tree.structure(tx.init(PARAMS))
  assert fresh == structure
  restored = fresh.unflatten([jnp.asarray(leaf) for leaf in stored])
  same(apply(tx, grads, restored), apply(tx, grads, state))


def test_the_state_holds_the_mimic_layers_of_the_reference_only():
  state = gm.reweight_by_mimic_score(REFERENCE, layers="^head/w").init(PARAMS)
  assert isinstance(state.reference["body"]["w"], optax.MaskedNode)
  (leaf,) = jax.tree.leaves(state.reference)
  np.testing.assert_array_equal(leaf, REFERENCE["head"]["w"])


def test_the_reference_in_the_state_is_the_one_that_counts(grads):
  # A restored checkpoint brings its own reference.
  other = gm.reweight_by_mimic_score(tree(lambda shape: draw(*shape)))
  tx = gm.reweight_by_mimic_score(REFERENCE)
  same(apply(other, grads, tx.init(PARAMS)), apply(tx, grads))


def test_donating_the_state_leaves_the_users_reference_alive(grads):
  reference = jax.tree.map(jnp.asarray, REFERENCE)
  tx = gm.reweight_by_mimic_score(reference)
  state = tx.init(PARAMS)
  update = jax.jit(tx.update, donate_argnums=1)
  _, after = update(grads, state, PARAMS)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.reference))
  same(reference, REFERENCE)
  same(after.reference, REFERENCE)
  tx.init(PARAMS)


@pytest.mark.parametrize("score", ["projection", "cosine"])
def test_reference_equal_to_params_gives_the_plain_mean(grads, score):
  tx = gm.reweight_by_mimic_score(PARAMS, score=score)
  updates, state = apply(tx, grads)
  close(updates, jax.tree.map(lambda g: g.mean(axis=0), grads))
  assert state.distance == 0
  np.testing.assert_allclose(state.effective_sample_size, SIZE, rtol=1e-6)


def test_updates_have_the_dtypes_of_the_gradients(grads):
  def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)

  tx = gm.reweight_by_mimic_score(narrow(REFERENCE))
  updates, state = compiled(tx, narrow(grads), narrow(PARAMS))
  assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
  assert state.distance.dtype == jnp.float32
  expected, _ = apply(gm.reweight_by_mimic_score(REFERENCE), grads)
  close(jax.tree.map(lambda u: u.astype(jnp.float32), updates), expected, 5e-2)


# Composition with optax.


def test_extra_arguments_are_swallowed_and_handed_on(grads):
  seen = {}

  def update(updates, state, params=None, **extra):
    seen.update(extra)
    return updates, state

  spy = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  updates, _ = apply(gm.mimic(spy, REFERENCE), grads, value=1.0, key="any")
  assert seen == {"value": 1.0, "key": "any"}
  same(updates, apply(gm.reweight_by_mimic_score(REFERENCE), grads)[0])


def test_an_optimizer_without_extra_arguments_gets_none(grads):
  def update(updates, state, params=None):
    return updates, state

  plain = optax.GradientTransformation(
    lambda params: optax.EmptyState(), update
  )
  updates, _ = apply(gm.mimic(plain, REFERENCE), grads, mask=MASK, value=1.0)
  alone = gm.reweight_by_mimic_score(REFERENCE)
  same(updates, apply(alone, grads, mask=MASK)[0])


def test_in_a_named_chain(grads):
  tx = optax.named_chain(
    ("mimic", gm.reweight_by_mimic_score(REFERENCE)), ("sgd", optax.sgd(0.5))
  )
  updates, state = apply(tx, grads, mask=MASK)
  same(updates, apply(gm.mimic(optax.sgd(0.5), REFERENCE), grads, mask=MASK)[0])
  assert state["mimic"].count == 1


def test_its_state_is_found_by_name(grads):
  tx = optax.chain(gm.mimic(optax.sgd(0.1), REFERENCE), optax.scale(2.0))
  _, state = apply(tx, grads)
  assert optax.tree.get(state, "count") == 1
  assert optax.tree.get(state, "nonfinite") == 0
  size = optax.tree.get(state, "effective_sample_size")
  assert 1 <= size <= SIZE
  assert optax.tree.get(state, "distance") > 0
  same(optax.tree.get(state, "reference"), REFERENCE)
  raised = optax.tree.set(state, count=jnp.int32(7))
  assert optax.tree.get(raised, "count") == 7


def test_the_temperature_can_be_injected(grads):
  @optax.inject_hyperparams
  def factory(temperature):
    return gm.mimic(
      optax.sgd(0.1), REFERENCE, weighting=gm.softmax(temperature)
    )

  tx = factory(temperature=0.5)
  with jax.numpy_dtype_promotion("standard"):
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    updates, state = update(grads, state, PARAMS)
    state.hyperparams["temperature"] = jnp.float32(5)
    warmer, _ = update(grads, state, PARAMS)
  assert update._cache_size() == 1
  for actual, temperature in ((updates, 0.5), (warmer, 5.0)):
    expected = gm.mimic(
      optax.sgd(0.1), REFERENCE, weighting=gm.softmax(temperature)
    )
    close(actual, apply(expected, grads)[0])


def test_the_optimizer_inside_may_have_injected_hyperparameters(grads):
  inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
  tx = gm.mimic(inner, REFERENCE)
  updates, state = apply(tx, grads)
  close(updates, apply(gm.mimic(optax.adam(0.1), REFERENCE), grads)[0])
  state[1].hyperparams["learning_rate"] = jnp.float32(0)
  updates, _ = apply(tx, grads, state)
  assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_a_scheduled_temperature_follows_the_count(grads):
  schedule = optax.linear_schedule(4.0, 1.0, 3)
  tx = gm.reweight_by_mimic_score(REFERENCE, weighting=gm.softmax(schedule))
  state = None
  for count, temperature in enumerate((4.0, 3.0, 2.0, 1.0, 1.0)):
    updates, state = apply(tx, grads, state)
    assert state.count == count + 1
    fixed = gm.reweight_by_mimic_score(
      REFERENCE, weighting=gm.softmax(temperature)
    )
    close(updates, apply(fixed, grads)[0])


def test_map_params_reaches_the_reference_and_nothing_else():
  tx = gm.mimic(optax.sgd(0.1, momentum=0.9), REFERENCE)
  state = tx.init(PARAMS)
  doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
  same(doubled[0].reference, jax.tree.map(lambda r: 2 * r, REFERENCE))
  same(doubled[0]._replace(reference=None), state[0]._replace(reference=None))
  specs = tree(lambda shape: f"spec of {shape}")
  mapped = optax.tree.map_params(
    tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
  )
  assert mapped[0].reference == specs
  assert mapped[0].count is None


def test_map_params_with_a_masked_reference():
  tx = gm.reweight_by_mimic_score(REFERENCE, layers="^head/")
  state = tx.init(PARAMS)
  doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
  same(
    doubled.reference["head"],
    jax.tree.map(lambda r: 2 * r, REFERENCE["head"]),
  )
  # With a second tree optax asks for is_leaf, as for its own masked states.
  specs = tree(lambda shape: f"spec of {shape}")
  mapped = optax.tree.map_params(
    tx,
    lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
    state,
    specs,
    is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
  )
  assert mapped.reference == specs | {"body": {"w": optax.MaskedNode()}}


# Samples that don't count.


def test_a_masked_sample_changes_nothing(grads):
  tx = gm.reweight_by_mimic_score(REFERENCE)
  expected, _ = compiled(tx, jax.tree.map(lambda g: g[MASK], grads))
  for value in (0, 1e30, np.nan, np.inf):
    padded = jax.tree.map(np.copy, grads)
    jax.tree.map(lambda g, value=value: g.__setitem__(2, value), padded)
    updates, state = apply(tx, padded, mask=MASK)
    close(updates, expected)
    assert state.nonfinite == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["body", "head"])
def test_a_nonfinite_sample_is_counted_and_left_out(grads, name, value):
  # In or outside of the mimic layers: its update would be as bad.
  tx = gm.reweight_by_mimic_score(REFERENCE, layers="^head/", scope="layers")
  broken = jax.tree.map(np.copy, grads)
  broken[name]["w"][3, 1, 1] = value
  broken[name]["w"][2] = value
  updates, state = apply(tx, broken, mask=MASK)
  expected, _ = apply(tx, grads, mask=MASK & (np.arange(SIZE) != 3))
  same(updates, expected)
  assert state.nonfinite == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_overflows_is_counted_and_left_out(sign):
  params, reference = {"w": np.zeros(9, "f4")}, {"w": np.ones(9, "f4")}
  # Every gradient is finite; the last one's inner product isn't.
  slopes = np.array([1, 2, sign * 3e38], np.float32)
  grads = {"w": np.repeat(slopes[:, None], 9, axis=1)}
  tx = gm.reweight_by_mimic_score(reference)
  mask = np.array([True, True, False])
  updates, state = compiled(tx, grads, params, mask=mask | True)
  expected, _ = compiled(tx, grads, params, mask=mask)
  same(updates, expected)
  assert np.all(np.isfinite(updates["w"]))
  assert state.nonfinite == 1


def test_nothing_left_gives_nan_updates_and_padding_zeros(grads):
  tx = gm.reweight_by_mimic_score(REFERENCE)
  broken = jax.tree.map(lambda g: np.full_like(g, np.nan), grads)
  for case, mask, fill in ((grads, MASK & False, 0), (broken, None, np.nan)):
    updates, state = apply(tx, case, mask=mask)
    same(updates, jax.tree.map(lambda x, f=fill: np.full_like(x, f), PARAMS))
    assert state.effective_sample_size == 0


def test_one_sample_is_its_own_update(grads):
  one = jax.tree.map(lambda g: g[:1], grads)
  updates, state = compiled(gm.reweight_by_mimic_score(REFERENCE), one)
  close(updates, jax.tree.map(lambda g: g[0], one), 1e-6)
  assert state.effective_sample_size == 1


def test_gradients_in_containers_of_another_order_are_not_mixed_up():
  # An OrderedDict flattens in its own order, a dict in the order of its keys.
  params = {"a": np.zeros(2, "f4"), "b": np.zeros(2, "f4")}
  reference = {"a": np.ones(2, "f4"), "b": np.ones(2, "f4")}
  tx = gm.reweight_by_mimic_score(reference, layers="a")
  turned = collections.OrderedDict(b=draw(3, 2), a=draw(3, 2))
  with pytest.raises(TypeError, match="gradients"):
    apply(tx, turned, params=params)


# Misuse, as the docstring tells of it.


@pytest.mark.parametrize("reference", ["whole", "masked"])
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_layers_are_not_chosen_from_outside(grads, wrapper, reference):
  """What the wrapper hides would pass through as `[B, *p]`."""
  if reference == "whole":
    tx = gm.reweight_by_mimic_score(REFERENCE)
  else:
    tx = gm.reweight_by_mimic_score(
      REFERENCE | {"body": {"w": optax.MaskedNode()}}
    )
  if wrapper == "masked":
    tx = optax.masked(tx, HEAD)
  else:
    labels = jax.tree.map(lambda head: "mimic" if head else "frozen", HEAD)
    tx = optax.partition({"mimic": tx, "frozen": optax.set_to_zero()}, labels)
  with pytest.raises(TypeError, match=r"layers="):
    apply(tx, grads)


def test_apply_if_finite_around_it_is_refused(grads):
  # By jax: the rejected update has other shapes than the applied one.
  tx = optax.apply_if_finite(gm.mimic(optax.sgd(0.1), REFERENCE), 3)
  with pytest.raises(TypeError):
    apply(tx, grads)


def test_it_is_refused_twice_in_a_chain(grads):
  once = gm.reweight_by_mimic_score(REFERENCE)
  with pytest.raises(ValueError, match=r"averaged.*first in the chain"):
    apply(optax.chain(once, once), grads)


def test_clipping_before_it_goes_through_and_clips_the_whole_batch(grads):
  # optax lets it through: the norm is taken over all samples together, so
  # every gradient shrinks by the same factor. Clip after instead.
  tx = optax.chain(
    optax.clip_by_global_norm(1e-2), gm.reweight_by_mimic_score(REFERENCE)
  )
  updates, _ = apply(tx, grads)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  scaled = jax.tree.map(lambda g: g * np.float32(1e-2 / norm), grads)
  close(updates, apply(gm.reweight_by_mimic_score(REFERENCE), scaled)[0])


@pytest.mark.slow
def test_adam_before_it_goes_through_and_keeps_moments_of_every_sample(grads):
  # optax lets it through unless rank promotion raises: moments are broadcast
  # to [B, *p], mixing the samples of one batch with those of the next.
  tx = optax.chain(optax.scale_by_adam(), gm.reweight_by_mimic_score(REFERENCE))
  with pytest.raises(ValueError, match="rank_promotion"):
    apply(tx, grads)
  with jax.numpy_rank_promotion("allow"):
    updates, state = apply(tx, grads)
  assert shapes(updates) == shapes(PARAMS)
  assert state[0].mu["body"]["w"].shape == (SIZE, 3, 4)
