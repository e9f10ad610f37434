"""Bad input: what came, what was expected, what to do about it."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm

SIZE = 4
PARAMS = {
  "body": {"w": np.ones((3, 5), np.float32)},
  "head": {"b": np.zeros(2, np.float32), "w": np.ones((5, 2), np.float32)},
}
REFERENCE = jax.tree.map(lambda p: p + np.float32(0.5), PARAMS)
BATCH = {
  "x": np.ones((SIZE, 3), np.float32),
  "y": np.ones((SIZE, 2), np.float32),
}
GRADS = jax.tree.map(lambda p: np.ones((SIZE, *p.shape), np.float32), PARAMS)
PATHS = "body/w, head/b, head/w"


def losses_fn(params, batch):
  hidden = batch["x"] @ params["body"]["w"]
  outputs = hidden @ params["head"]["w"] + params["head"]["b"][None]
  return jnp.sum(jnp.square(outputs - batch["y"]), axis=-1)


def by_gradient(engine):
  """Calls the doors of one's own loop with a few things changed."""

  def call(*, params=PARAMS, reference=REFERENCE, batch=BATCH, mask=None, **kw):
    fn = gm.mimic_value_and_grad(
      kw.pop("losses_fn", losses_fn), **kw, engine=engine
    )
    return fn(params, reference, batch, mask=mask)

  return call


def by_scores(engine):
  def call(*, params=PARAMS, reference=REFERENCE, batch=BATCH, mask=None, **kw):
    fn = gm.mimic_scores(kw.pop("losses_fn", losses_fn), **kw, engine=engine)
    return fn(params, reference, batch, mask=mask)

  return call


def by_transform(
  *, params=PARAMS, reference=REFERENCE, grads=GRADS, mask=None, **kw
):
  tx = gm.reweight_by_mimic_score(reference, **kw)
  return tx.update(grads, tx.init(params), params, mask=mask)


LOOP = {
  f"{name} {engine}": by(engine)
  for name, by in (("gradient", by_gradient), ("scores", by_scores))
  for engine in ("forward", "per_sample")
}
DOORS = LOOP | {"transform": by_transform}
every_door = pytest.mark.parametrize("call", DOORS.values(), ids=DOORS)
own_loop = pytest.mark.parametrize("call", LOOP.values(), ids=LOOP)


def changed(tree, name, **leaves):
  return tree | {name: tree[name] | leaves}


@every_door
def test_good_input_is_taken(call):
  # Otherwise every other test here may fail for the wrong reason.
  jax.eval_shape(call)
  jax.eval_shape(lambda: call(mask=np.array([True, True, True, False])))


@every_door
def test_a_reference_of_another_shape_names_path_and_both_shapes(call):
  wrong = changed(REFERENCE, "head", w=np.ones((5, 7), np.float32))
  with pytest.raises(
    ValueError, match=r"reference.*'head/w'.*\(5, 7\).*\(5, 2\).*architecture"
  ):
    call(reference=wrong)


@every_door
def test_a_reference_that_lacks_a_leaf_names_it(call):
  wrong = {"body": REFERENCE["body"], "head": {"w": REFERENCE["head"]["w"]}}
  with pytest.raises(TypeError, match=r"reference lacks 'head/b'"):
    call(reference=wrong)


@every_door
def test_a_reference_with_another_leaf_names_it(call):
  wrong = changed(REFERENCE, "head", scale=np.ones(2, np.float32))
  with pytest.raises(TypeError, match=r"reference has 'head/scale', which"):
    call(reference=wrong)


@every_door
def test_a_reference_in_other_containers_names_both(call):
  wrong = REFERENCE | {"body": {"w": [REFERENCE["body"]["w"]]}}
  with pytest.raises(TypeError, match=r"lacks 'body/w' and has 'body/w/0'"):
    call(reference=wrong)


def test_two_leaves_of_one_path_in_other_containers_are_refused():
  leaf = np.ones(2, np.float32)
  params = {"a": {"b": leaf}, "a/b": leaf}
  other = collections.OrderedDict([("a/b", leaf), ("a", {"b": leaf})])
  with pytest.raises(TypeError, match=r"two leaves at 'a/b', in other contain"):
    gm.reweight_by_mimic_score(other).init(params)


def test_a_direction_of_another_shape_is_refused():
  def wrong(params, reference, batch):
    return changed(params, "head", b=params["head"]["b"][:1])

  for call in LOOP.values():
    with pytest.raises(
      ValueError, match=r"direction's tree.*'head/b'.*\(1,\).*\(2,\)"
    ):
      call(direction=wrong)


@every_door
def test_a_layer_pattern_that_matches_nothing_lists_the_paths(call):
  for layers, pattern in (
    ("haed", "haed"),
    (["head", "tail"], "tail"),
    (re.compile("^w$"), r"\^w\$"),
  ):
    with pytest.raises(
      ValueError, match=f"'{pattern}' matches no leaf.*{PATHS}"
    ):
      call(layers=layers)


@every_door
def test_layers_that_choose_nothing_list_the_paths(call):
  nothing = jax.tree.map(lambda _: False, PARAMS)
  for layers in ([], nothing, lambda path, leaf: leaf.ndim == 9):
    with pytest.raises(ValueError, match=f"chooses no leaf.*{PATHS}"):
      call(layers=layers)


@every_door
def test_layers_of_an_unknown_kind_are_refused(call):
  for layers in (3, {"head": True}, jax.tree.map(lambda _: 1, PARAMS)):
    with pytest.raises(TypeError, match=r"layers=.*expected None, a regular"):
      call(layers=layers)


@every_door
def test_a_layer_pattern_that_is_no_regular_expression_is_refused(call):
  with pytest.raises(ValueError, match=r"'head\[' is not a regular expression"):
    call(layers="head[")


@every_door
def test_an_unknown_score_names_the_known_ones(call):
  with pytest.raises(
    ValueError, match=r"score is 'dot'.*'projection', 'cosine'"
  ):
    call(score="dot")


def test_an_unknown_scope_names_the_known_ones():
  calls = [*(by_gradient(e) for e in ("forward", "auto")), by_transform]
  for call in calls:
    with pytest.raises(ValueError, match=r"scope is 'head'.*'all', 'layers'"):
      call(scope="head")


def test_an_unknown_engine_names_the_known_ones():
  for factory in (gm.mimic_value_and_grad, gm.mimic_scores):
    with pytest.raises(
      ValueError, match=r"engine is 'fast'.*'auto', 'forward', 'per_sample'"
    ):
      factory(losses_fn, engine="fast")


def test_factories_check_their_options_before_any_data_comes():
  with pytest.raises(ValueError, match="score is"):
    gm.mimic_value_and_grad(losses_fn, score="dot")
  with pytest.raises(ValueError, match="scope is"):
    gm.mimic_value_and_grad(losses_fn, scope="head")
  with pytest.raises(ValueError, match="scope is"):
    gm.mimic(optax.sgd(0.1), REFERENCE, scope="head")


@own_loop
def test_batch_leaves_of_different_sizes_are_listed(call):
  with pytest.raises(
    ValueError, match=r"different leading sizes \('x': 4, 'y': 3\)"
  ):
    call(batch=BATCH | {"y": BATCH["y"][:3]})


@own_loop
def test_a_scalar_batch_leaf_is_refused(call):
  for scalar in (0.5, np.float32(0.5), jnp.float32(0.5)):
    with pytest.raises(
      ValueError, match=r"'rate' is a scalar.*keyword argument"
    ):
      call(batch=BATCH | {"rate": scalar})


@own_loop
def test_an_empty_batch_is_refused(call):
  with pytest.raises(TypeError, match="batch has no array leaves"):
    call(batch={})
  with pytest.raises(ValueError, match="leading size 0"):
    call(batch=jax.tree.map(lambda x: x[:0], BATCH))


@every_door
def test_a_mask_of_the_wrong_length_is_refused(call):
  for mask in (np.ones(3, bool), np.ones((SIZE, 1), bool), np.array(True)):
    shape = re.escape(str(mask.shape))
    with pytest.raises(ValueError, match=rf"mask has shape {shape}.*\(4,\)"):
      call(mask=mask)


@every_door
def test_a_mask_of_the_wrong_dtype_is_refused(call):
  for dtype in ("int32", "float32"):
    with pytest.raises(TypeError, match=f"mask has dtype {dtype}.*bool"):
      call(mask=np.ones(SIZE, dtype))


@own_loop
def test_params_that_are_not_floating_point_are_named(call):
  integers = changed(PARAMS, "body", steps=np.zeros(3, np.int32))
  with pytest.raises(
    TypeError, match=r"params leaf 'body/steps' is of dtype int32.*floating"
  ):
    call(params=integers, reference=integers)
  python = changed(PARAMS, "body", scale=1.0)
  with pytest.raises(TypeError, match=r"'body/scale' is float.*floating"):
    call(params=python, reference=python)


@own_loop
def test_params_without_leaves_are_refused(call):
  with pytest.raises(TypeError, match="params has no array leaves"):
    call(params={}, reference={})


@own_loop
def test_a_scalar_loss_is_refused(call):
  with pytest.raises(
    ValueError, match=r"losses_fn returned shape \(\).*Drop the mean or sum"
  ):
    call(losses_fn=lambda params, batch: jnp.mean(losses_fn(params, batch)))


@own_loop
def test_losses_of_another_shape_are_refused(call):
  with pytest.raises(ValueError, match=r"losses_fn returned shape \(\d, 1\)"):
    call(losses_fn=lambda p, batch: losses_fn(p, batch)[:, None])


@own_loop
def test_integer_losses_are_refused(call):
  with pytest.raises(TypeError, match=r"losses_fn returned dtype int32"):
    call(losses_fn=lambda p, batch: jnp.zeros(batch["x"].shape[0], jnp.int32))


@own_loop
def test_losses_with_an_unannounced_aux_are_refused(call):
  with pytest.raises(TypeError, match=r"losses_fn returned a tuple"):
    call(losses_fn=lambda p, batch: (losses_fn(p, batch), {}))


def test_mimic_scores_advises_an_option_that_it_has():
  def with_aux(params, batch):
    return losses_fn(params, batch), {}

  with pytest.raises(TypeError, match="Pass has_aux=True if it returns"):
    gm.mimic_scores(with_aux)(PARAMS, REFERENCE, BATCH)
  gm.mimic_scores(with_aux, has_aux=True)(PARAMS, REFERENCE, BATCH)


def test_has_aux_without_a_pair_is_refused():
  for engine in ("forward", "per_sample"):
    with pytest.raises(TypeError, match=r"no \(losses, aux\) pair"):
      by_gradient(engine)(has_aux=True)


def test_a_schedule_without_a_step_says_to_pass_it():
  weighting = gm.softmax(optax.linear_schedule(1.0, 0.1, 10))
  for engine in ("forward", "per_sample"):
    with pytest.raises(ValueError, match=r"no step came; pass step="):
      by_gradient(engine)(weighting=weighting)


@pytest.mark.parametrize("call", [by_gradient("forward"), by_transform])
def test_a_weighting_of_the_wrong_shape_is_refused(call):
  with pytest.raises(ValueError, match=r"weighting returned shape \(\)"):
    call(weighting=lambda scores, mask, step: jnp.mean(scores))


# Per-sample gradients.


def test_averaged_gradients_are_refused_with_the_way_out():
  averaged = jax.tree.map(lambda g: g.mean(axis=0), GRADS)
  with pytest.raises(
    ValueError,
    match=r"'body/w' has shape \(3, 5\).*averaged.*\(B,\) \+ \(3, 5\).*"
    r"jax\.vmap\(jax\.grad\(loss_fn\)",
  ):
    by_transform(grads=averaged)


def test_one_averaged_leaf_among_many_is_refused():
  # Its leading size happens to be B.
  params = changed(PARAMS, "head", b=np.zeros((SIZE, 2), np.float32))
  grads = changed(GRADS, "head", b=np.zeros((SIZE, 2), np.float32))
  with pytest.raises(ValueError, match=r"'head/b'.*averaged"):
    by_transform(params=params, reference=params, grads=grads)


def test_gradients_of_another_shape_are_refused():
  wrong = changed(GRADS, "head", w=np.ones((SIZE, 2, 5), np.float32))
  with pytest.raises(
    ValueError, match=r"'head/w' has shape \(4, 2, 5\).*\(B,\) \+ \(5, 2\)"
  ):
    by_transform(grads=wrong)


def test_gradients_of_different_batches_are_refused():
  wrong = changed(GRADS, "head", w=GRADS["head"]["w"][:3])
  with pytest.raises(
    ValueError, match=r"'head/w' has 3 samples and 'body/w' has 4"
  ):
    by_transform(grads=wrong)


def test_gradients_of_some_params_only_are_refused():
  with pytest.raises(TypeError, match=r"differ at 'body/w'.*layers="):
    by_transform(grads={"head": GRADS["head"], "body": {}})


def test_gradients_of_no_samples_are_refused():
  with pytest.raises(ValueError, match=r"0 samples"):
    by_transform(grads=jax.tree.map(lambda g: g[:0], GRADS))


def test_an_update_without_params_is_refused():
  tx = gm.mimic(optax.sgd(0.1), REFERENCE)
  with pytest.raises(ValueError, match=r"no params.*update\(updates, state,"):
    tx.update(GRADS, tx.init(PARAMS))


@every_door
def test_errors_come_at_trace_time_too(call):
  # Shapes are known under jit; nothing waits for values.
  with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
    jax.eval_shape(lambda mask: call(mask=mask), np.ones(3, bool))
