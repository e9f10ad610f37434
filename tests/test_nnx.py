"""NNX modules: what nnx.value_and_grad does, with weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gradmimic_jax as gm


class Model(nnx.Module):
  def __init__(self, seed, *, stateful=True):
    rngs = nnx.Rngs(seed)
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs) if stateful else None
    self.drop = nnx.Dropout(0.5, rngs=rngs) if stateful else None
    self.last = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    x = self.first(x)
    if self.norm is not None:
      x = self.drop(self.norm(x))
    return self.last(jax.nn.relu(x))


def losses_fn(model, batch):
  logits = model(batch["x"])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 3)).astype(np.float32)
  return {"x": jnp.asarray(x), "y": jnp.asarray([0, 1, 1, 0, 1, 0])}


def assert_same(a, b, **close):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_allclose(x, y, **close)


def test_uniform_weights_are_nnx_value_and_grad(batch):
  """Loss, gradient, BatchNorm's statistics and Dropout's counts, two steps."""
  ours, theirs, reference = Model(0), Model(0), Model(1)
  step = gm.nnx.mimic_value_and_grad(losses_fn, weighting=gm.uniform())

  @nnx.jit
  def our_step(model, optimizer, reference, batch):
    (loss, _), grads = step(model, reference, batch)
    optimizer.update(model, grads)
    return loss, grads

  @nnx.jit
  def their_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(lambda m: losses_fn(m, batch).mean())(
      model
    )
    optimizer.update(model, grads)
    return loss, grads

  untouched = nnx.state(Model(1))
  a = nnx.Optimizer(ours, optax.sgd(0.1, momentum=0.5), wrt=nnx.Param)
  b = nnx.Optimizer(theirs, optax.sgd(0.1, momentum=0.5), wrt=nnx.Param)
  start = nnx.state(Model(0))
  for _ in range(2):
    got = our_step(ours, a, reference, batch)
    assert_same(got, their_step(theirs, b, batch), rtol=1e-4, atol=1e-6)
  assert_same(nnx.state(ours), nnx.state(theirs), rtol=1e-3, atol=1e-5)
  assert int(ours.drop.rngs.count.get_value()) == 2
  assert not np.allclose(ours.norm.mean.get_value(), start["norm"]["mean"][...])
  assert_same(nnx.state(reference), untouched)


@pytest.mark.slow
def test_scores_and_weighted_gradients_are_those_of_the_tree(batch):
  model, reference = Model(0, stateful=False), Model(1, stateful=False)
  graph, params = nnx.split(model)

  def of_tree(params, batch):
    state = jax.tree.map(lambda x: x, nnx.state(model))
    nnx.replace_by_pure_dict(state, params)
    return losses_fn(nnx.merge(graph, state), batch)

  options = {"layers": "last/.*", "weighting": gm.softmax(0.1)}
  (loss, info), grads = jax.jit(gm.mimic_value_and_grad(of_tree, **options))(
    nnx.to_pure_dict(params),
    nnx.to_pure_dict(nnx.state(reference)),
    batch,
  )
  # Nothing changes in this module, so that single samples can be looked at.
  options |= {"engine": "per_sample", "check_independence": False}
  fn = nnx.jit(gm.nnx.mimic_value_and_grad(losses_fn, **options))
  (our_loss, ours), our_grads = fn(model, reference, batch)
  assert isinstance(our_grads, nnx.State)
  assert_same(
    (our_loss, ours[:3], nnx.to_pure_dict(our_grads)),
    (loss, info[:3], grads),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.slow
def test_scores_leave_the_module_as_it_is(batch):
  model = Model(0)
  reference = Model(1)
  found = nnx.jit(gm.nnx.mimic_scores(losses_fn))(model, reference, batch)
  fn = nnx.jit(gm.nnx.mimic_value_and_grad(losses_fn))
  (_, info), _ = fn(Model(0), reference, batch)
  assert_same(found.scores, info.scores, rtol=1e-5, atol=1e-6)
  assert_same(nnx.state(model), nnx.state(Model(0)))


@pytest.mark.slow
def test_an_aux_of_ones_own_comes_back(batch):
  def with_aux(model, batch):
    logits = model(batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses, {"logits": logits}

  model = Model(0)
  fn = nnx.jit(gm.nnx.mimic_value_and_grad(with_aux, has_aux=True))
  (_, info), _ = fn(model, Model(1), batch)
  assert info.aux["logits"].shape == (6, 2)
  assert int(model.drop.rngs.count.get_value()) == 1


@pytest.mark.slow
def test_a_reference_is_checked_as_that_of_a_tree_is(batch):
  model = Model(0, stateful=False)
  graph, params = nnx.split(model)

  def of_tree(params, batch):
    return losses_fn(nnx.merge(graph, params), batch)

  for reference in (Model(0, stateful=False), Model(1, stateful=False)):
    ours = gm.nnx.check_reference(losses_fn, model, reference, batch)
    theirs = gm.check_reference(of_tree, params, nnx.state(reference), batch)
    assert ours.verdict == theirs.verdict
    np.testing.assert_allclose(ours.path_losses, theirs.path_losses, rtol=1e-5)


@pytest.mark.slow
def test_a_check_leaves_statistics_and_keys_as_they_are(batch):
  model, reference = Model(0), Model(1)
  assert gm.nnx.check_reference(losses_fn, model, reference, batch).num_samples
  assert_same(nnx.state(model), nnx.state(Model(0)))
  assert_same(nnx.state(reference), nnx.state(Model(1)))


def test_a_module_among_functions_of_trees_is_told_where_to_go(batch):
  for fn in (gm.mimic_value_and_grad(losses_fn), gm.mimic_scores(losses_fn)):
    with pytest.raises(TypeError, match=r"names in gm\.nnx, which see to"):
      fn(Model(0), Model(1), batch)
  with pytest.raises(TypeError, match=r"names in gm\.nnx, which see to"):
    gm.check_reference(losses_fn, Model(0), Model(1), batch)


def test_what_can_not_be_is_refused(batch):
  fn = gm.nnx.mimic_value_and_grad(losses_fn)
  with pytest.raises(TypeError, match=r"expected an nnx\.Module"):
    fn({"w": 1.0}, Model(0), batch)
  by_one = nnx.jit(gm.nnx.mimic_value_and_grad(losses_fn, microbatch_size=2))
  with pytest.raises(ValueError, match="engine='forward'"):
    by_one(Model(0), Model(1), batch)

  def grows(model, batch):
    model.more = nnx.BatchStat(jnp.zeros(()))
    return losses_fn(model, batch)

  growing = nnx.jit(gm.nnx.mimic_value_and_grad(grows))
  with pytest.raises(ValueError, match="adds variables"):
    growing(Model(0), Model(1), batch)
