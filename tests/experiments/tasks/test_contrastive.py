"""Contrastive losses, scores and gradients against dense float64 ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import gradmimic_jax as gm
from configs import contrastive as clip_config
from experiments import methods
from experiments.models import clip
from experiments.models.clip import Features
from experiments.tasks.contrastive import losses as contrastive
from experiments.training import steps

SIZE, EMBED, VOCABULARY, CONTEXT = 16, 6, 11, 5
IMAGE = (4, 4, 3)
RNG = np.random.default_rng(0)
BATCH = {
  "image": RNG.normal(size=(SIZE, *IMAGE)).astype(np.float32),
  "text": RNG.integers(0, VOCABULARY, (SIZE, CONTEXT)).astype(np.int32),
}
MASK = np.arange(SIZE) % 5 != 3
TEMPERATURE = 0.3


KINDS_AND_MASKS = pytest.mark.parametrize(
  ("kind", "masked"),
  [
    ("clip", True),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in (("clip", False), ("sigmoid", False), ("sigmoid", True))
    ),
  ],
)


def draw(seed, bias=-1.5):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.normal(size=(48, EMBED), scale=0.3).astype(np.float32),
    "text": rng.normal(size=(VOCABULARY, EMBED), scale=0.5).astype(np.float32),
    "logit_scale": np.float32(1.4),
    "logit_bias": np.float32(bias),
  }


PARAMS, REFERENCE = draw(1), draw(2)


def apply(params, images, tokens):
  """Two towers of one layer: what it takes to be contrastive."""

  def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  image = jnp.tanh(images.reshape(len(images), -1) @ params["image"])
  text = jnp.tanh(params["text"][tokens].sum(axis=1))
  return Features(
    unit(image), unit(text), params["logit_scale"], params["logit_bias"]
  )


def dense_losses(params, batch, mask, kind):
  """The definition, on the real pairs only; numpy or jax, any precision."""
  rows = np.flatnonzero(mask)
  image, text, log_scale, bias = apply(
    params, batch["image"][rows], batch["text"][rows]
  )
  logits = jnp.exp(log_scale) * image @ text.T
  if kind == "clip":
    images = -jnp.diag(jax.nn.log_softmax(logits, axis=1))
    texts = -jnp.diag(jax.nn.log_softmax(logits, axis=0))
    losses = (images + texts) / 2
  else:
    signs = 2 * jnp.eye(len(rows)) - 1
    losses = -jnp.log(jax.nn.sigmoid(signs * (logits + bias))).sum(axis=1)
  return jnp.zeros(len(mask)).at[rows].set(losses)


@functools.cache
def truth(kind, masked, layers=None):
  """Losses, scores, weights and reweighted gradient, dense in float64."""
  mask = MASK if masked else MASK | True
  with jax.enable_x64(True):
    params, reference, batch = jax.tree.map(
      lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
      (PARAMS, REFERENCE, BATCH),
    )
    fn = lambda p: dense_losses(p, batch, mask, kind)  # noqa: E731
    losses, rows = jax.jit(lambda p: (fn(p), jax.jacobian(fn)(p)))(params)
  losses, rows = jax.tree.map(np.asarray, (losses, rows))
  chosen = layers or list(params)
  gaps = {name: reference[name] - params[name] for name in chosen}
  distance = np.sqrt(sum(np.sum(gap**2) for gap in gaps.values()))
  scores = -sum(
    np.sum((rows[name] * gaps[name]).reshape(SIZE, -1), axis=1)
    for name in chosen
  )
  scores = scores / distance
  weights = np.where(mask, np.exp((scores - scores.max()) / TEMPERATURE), 0)
  weights /= weights.sum()
  grads = {
    name: np.tensordot(weights, row, axes=1) for name, row in rows.items()
  }
  return losses, scores, weights, grads


@functools.cache
def step(kind="clip", layers=None, sharding=None, **options):
  return jax.jit(
    gm.mimic_value_and_grad(
      contrastive.make_losses_fn(apply, kind, sharding=sharding),
      layers=layers,
      weighting=gm.softmax(TEMPERATURE),
      engine="forward",
      has_aux=True,
      **options,
    )
  )


def check(result, expected, mask):
  (loss, info), grads = result
  losses, scores, weights, wanted = expected
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
  close(info.losses, losses)
  close(info.scores, scores)
  close(info.weights, weights)
  close(loss, losses[mask].mean())
  for name, leaf in wanted.items():
    close(grads[name], leaf, err_msg=name)


@KINDS_AND_MASKS
def test_losses_scores_weights_and_gradient_are_the_dense_ones(kind, masked):
  mask = MASK if masked else MASK | True
  result = step(kind)(PARAMS, REFERENCE, BATCH | {"mask": mask}, mask=mask)
  check(result, truth(kind, masked), mask)


def test_mimic_layers_of_one_tower():
  batch = BATCH | {"mask": MASK}
  result = step(layers="^image$")(PARAMS, REFERENCE, batch, mask=MASK)
  check(result, truth("clip", True, ("image",)), MASK)


def mesh_of_eight():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  return rows, NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize(
  ("kind", "told"),
  [
    ("clip", True),
    *(
      pytest.param(*x, marks=pytest.mark.slow)
      for x in (("sigmoid", False), ("clip", False), ("sigmoid", True))
    ),
  ],
)
def test_eight_devices_hold_their_rows_and_give_the_same(kind, told):
  rows, everywhere = mesh_of_eight()
  fn = step(kind, sharding=rows if told else None)
  params, reference = jax.device_put((PARAMS, REFERENCE), everywhere)
  batch = jax.device_put(BATCH | {"mask": MASK}, rows)
  compiled = fn.lower(params, reference, batch, mask=batch["mask"]).compile()
  text = compiled.as_text()
  assert f"f32[{SIZE // 8},{SIZE}]" in text
  assert f"[{SIZE},{SIZE}]" not in text
  result = compiled(params, reference, batch, mask=batch["mask"])
  check(result, truth(kind, True), MASK)


@pytest.mark.parametrize(
  "kind", ["clip", pytest.param("sigmoid", marks=pytest.mark.slow)]
)
def test_a_pair_that_is_not_finite_is_nobodys_negative(kind):
  last = VOCABULARY - 1
  others = np.arange(SIZE) != 5
  tokens = np.where(BATCH["text"] == last, 0, BATCH["text"])
  tokens[5, 2] = last
  params = PARAMS | {"text": PARAMS["text"].copy()}
  params["text"][last] = np.nan
  params = jax.tree.map(jnp.asarray, params)
  batch = BATCH | {"text": tokens}
  losses_fn = jax.jit(contrastive.make_losses_fn(apply, kind))
  losses, hits = losses_fn(params, batch | {"mask": MASK | True})
  without, hits_without = losses_fn(params, batch | {"mask": others})
  assert np.isnan(losses[5])
  assert np.all(np.isfinite(without))
  np.testing.assert_array_equal(losses[others], without[others])
  np.testing.assert_array_equal(hits, hits_without)
  (_, info), grads = step(kind, "^image$")(params, REFERENCE, batch)
  assert np.isnan(info.scores[5])
  assert info.weights[5] == 0
  np.testing.assert_allclose(np.sum(info.weights), 1, rtol=1e-6)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))


def test_hits_are_images_whose_own_text_is_the_most_similar():
  features = jax.jit(apply)(PARAMS, BATCH["image"], BATCH["text"])
  similarities = np.array(features.image @ features.text.T)
  similarities[:, ~MASK] = -np.inf
  expected = MASK & (similarities.argmax(axis=1) == np.arange(SIZE))
  losses_fn = jax.jit(contrastive.make_losses_fn(apply))
  _, hits = losses_fn(PARAMS, BATCH | {"mask": MASK})
  assert 0 < expected.sum() < MASK.sum()
  np.testing.assert_array_equal(hits, expected)


def test_a_batch_of_padding_has_no_loss_and_no_gradient():
  mask = MASK & False
  batch = BATCH | {"mask": mask}
  for kind in contrastive.KINDS:
    (loss, info), grads = step(kind)(PARAMS, REFERENCE, batch, mask=mask)
    assert loss == 0
    np.testing.assert_array_equal(info.losses, 0)
    for leaf in jax.tree.leaves(grads):
      np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
  "options",
  [{"engine": "per_sample"}, {"engine": "ghost"}, {"microbatch_size": 4}],
)
def test_engines_that_show_one_pair_at_a_time_are_refused(options):
  fn = gm.mimic_value_and_grad(
    contrastive.make_losses_fn(apply), has_aux=True, **options
  )
  with pytest.raises(ValueError, match="use engine='forward'"):
    jax.eval_shape(fn, PARAMS, REFERENCE, BATCH)


def test_jobs_refuse_microbatches_of_pairs():
  config = clip_config.get_config().unlock().mimic
  config.microbatch_size = 4
  outputs = contrastive.make_outputs(apply)
  for name in ("sgd", "grad_mimic_weights"):
    with pytest.raises(
      ValueError, match=r"microbatch_size is 4.*expected None"
    ):
      steps.make_train_step(
        contrastive.make_losses_fn(apply),
        optax.sgd(1.0),
        methods.create(name, config),
        config,
        outputs,
      )


def test_the_sigmoid_loss_needs_a_bias_and_kinds_have_names():
  def without(*arguments):
    return apply(*arguments)._replace(logit_bias=None)

  losses_fn = contrastive.make_losses_fn(without, "sigmoid")
  with pytest.raises(ValueError, match=r"config\.model\.clip\.logit_bias"):
    losses_fn(PARAMS, BATCH)
  with pytest.raises(ValueError, match="'siglip'; expected one of clip, sigm"):
    contrastive.make_losses_fn(apply, "siglip")


def test_the_scale_stops_at_100_and_finds_the_way_back():
  losses_fn = contrastive.make_losses_fn(apply)

  @jax.jit
  @jax.value_and_grad
  def mean_loss(scale):
    return losses_fn(PARAMS | {"logit_scale": scale}, BATCH)[0].mean()

  at_100 = np.float32(contrastive.LARGEST_LOGIT_SCALE)
  value, slope = mean_loss(at_100)
  above, slope_above = mean_loss(at_100 + 2)
  np.testing.assert_allclose(above, value, rtol=1e-5)
  np.testing.assert_allclose(slope_above, slope, rtol=1e-4)
  assert slope > 0  # these pairs are random: no scale is too small

  tx = optax.chain(optax.sgd(10.0), contrastive.keep_logit_scale())
  params = PARAMS | {"logit_scale": np.float32(4.0)}
  for sign, end in ((-1.0, at_100), (1.0, 0.0)):
    grads = jax.tree.map(lambda x, sign=sign: sign * jnp.ones_like(x), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["image"], -10 * sign)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["logit_scale"], end, atol=1e-6)


def similarity_gradient(mask):
  """Minus the gradient of the mean KL over both ways, dense in float64."""
  rows = np.flatnonzero(mask)
  with jax.enable_x64(True):
    params, reference, image = jax.tree.map(
      lambda x: x.astype(np.float64), (PARAMS, REFERENCE, BATCH["image"][rows])
    )

    def distributions(params):
      features = apply(params, image, BATCH["text"][rows])
      logits = jnp.exp(features.logit_scale) * features.image @ features.text.T
      logits = logits + features.logit_bias
      return [jax.nn.log_softmax(x, axis=1) for x in (logits, logits.T)]

    def divergence(params):
      return sum(
        jnp.mean(jnp.sum(jnp.exp(r) * (r - f), axis=1)) / 2
        for r, f in zip(
          distributions(reference), distributions(params), strict=True
        )
      )

    grads = jax.jit(jax.grad(divergence))(params)
  return jax.tree.map(lambda x: -np.asarray(x), grads)


def reference_features():
  """Of another width than the learner's, with the same similarities."""
  features = jax.jit(apply)(REFERENCE, BATCH["image"], BATCH["text"])
  wider = np.linalg.qr(np.random.default_rng(4).normal(size=(9, 9)))[0][:EMBED]
  return features._replace(
    image=features.image @ wider.astype(np.float32),
    text=features.text @ wider.astype(np.float32),
  )


@pytest.mark.parametrize(
  "masked", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_toward_similarities_descends_both_divergences(masked):
  mask = MASK if masked else MASK | True
  found = jax.jit(contrastive.toward_similarities(apply))(
    PARAMS, reference_features(), BATCH, mask=mask
  )
  for name, expected in similarity_gradient(mask).items():
    np.testing.assert_allclose(
      found[name], expected, rtol=1e-4, atol=1e-6, err_msg=name
    )


@pytest.mark.slow
def test_scores_toward_similarities_on_eight_devices():
  rows, everywhere = mesh_of_eight()
  fn = step(direction=contrastive.toward_similarities(apply))
  batch = BATCH | {"mask": MASK}
  reference = reference_features()
  (_, expected), _ = fn(PARAMS, reference, batch, mask=MASK)
  per_pair = reference._replace(
    **jax.device_put({"image": reference.image, "text": reference.text}, rows),
    **jax.device_put(
      {
        "logit_scale": reference.logit_scale,
        "logit_bias": reference.logit_bias,
      },
      everywhere,
    ),
  )
  arguments = (
    jax.device_put(PARAMS, everywhere),
    per_pair,
    jax.device_put(batch, rows),
  )
  compiled = fn.lower(*arguments, mask=arguments[2]["mask"]).compile()
  text = compiled.as_text()
  assert f"[{SIZE},{SIZE}]" not in text
  assert f"[{2 * SIZE},{SIZE}]" not in text
  (_, info), _ = compiled(*arguments, mask=arguments[2]["mask"])
  np.testing.assert_allclose(info.scores, expected.scores, atol=1e-5)
  # The scores are what the definition says.
  direction = similarity_gradient(MASK)
  length = np.sqrt(sum(np.sum(x**2) for x in direction.values()))
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
      (PARAMS, BATCH),
    )
    _, slopes = jax.jit(
      lambda p, v: jax.jvp(
        lambda p: dense_losses(p, wide[1], MASK, "clip"), (p,), (v,)
      )
    )(wide[0], direction)
  slopes = np.asarray(slopes)
  np.testing.assert_allclose(info.scores, -slopes / length, atol=1e-5)
  np.testing.assert_allclose(info.distance, length, rtol=1e-4)


def agreement_by_definition(kind, mask):
  """Differences of the losses of logits on the way to the reference's."""
  rows = np.flatnonzero(mask)

  def logits_of(features):
    image, text = (np.float64(x)[rows] for x in features[:2])
    scale, bias = (np.float64(x) for x in features[2:])
    return np.exp(scale) * image @ text.T + bias

  def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

  ours = logits_of(apply(PARAMS, BATCH["image"], BATCH["text"]))
  theirs = logits_of(reference_features())
  own = np.eye(len(rows))
  found = []
  for f, r in ((ours, theirs), (ours.T, theirs.T)):
    slope = softmax(f) - own if kind == "clip" else 1 / (1 + np.exp(-f)) - own
    found.append(-(slope * (softmax(r) - softmax(f))).sum(axis=1))
  scores = np.zeros(len(mask))
  scores[rows] = np.mean(found, axis=0) if kind == "clip" else found[0]
  return scores


@KINDS_AND_MASKS
def test_agreement_is_each_pairs_slope_toward_the_reference(kind, masked):
  mask = MASK if masked else MASK | True
  outputs = contrastive.make_outputs(apply, kind)
  batch = BATCH | {"mask": mask}
  score = outputs.scores["output_agreement"]

  @jax.jit
  def scores(reference):
    losses, aux = outputs.losses_fn(PARAMS, batch)
    return score.fn(
      gm.scores.Measured(losses, aux=aux, batch=batch, reference=reference)
    )

  found = scores(reference_features())
  expected = agreement_by_definition(kind, mask)
  assert np.ptp(expected[mask]) > 0.1
  np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)


def test_a_pair_without_finite_features_has_no_agreement_and_costs_none():
  mask = np.arange(SIZE) != 2
  features = jax.jit(apply)(PARAMS, BATCH["image"], BATCH["text"])
  reference = reference_features()
  reference = reference._replace(text=reference.text.at[2].set(jnp.nan))
  found = jax.jit(contrastive.agreement)(features, reference, BATCH)
  assert np.isnan(found[2])
  np.testing.assert_allclose(
    found[mask], agreement_by_definition("clip", mask)[mask], atol=1e-5
  )


def test_a_step_by_agreement_weighs_the_dense_gradient():
  config = ConfigDict(
    {
      "weighting": "softmax",
      "temperature": TEMPERATURE,
      "warmup_steps": 0,
      "scope": "all",
      "layers": None,
      "engine": "forward",
      "microbatch_size": None,
      "check_independence": True,
    }
  )
  train_step = steps.make_train_step(
    contrastive.make_losses_fn(apply),
    (tx := optax.sgd(1.0)),
    methods.create("output_agreement", config),
    config,
    contrastive.make_outputs(apply),
  )
  batch = BATCH | {"mask": MASK}
  state = steps.init_state(jax.tree.map(jnp.array, PARAMS), tx)
  state, output = train_step(state, reference_features(), batch)
  scores = agreement_by_definition("clip", MASK)
  weights = np.where(MASK, np.exp(scores / TEMPERATURE), 0)
  weights /= weights.sum()
  np.testing.assert_allclose(output.samples["score"], scores, atol=1e-5)
  np.testing.assert_allclose(output.samples["weight"], weights, atol=1e-5)
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
      (PARAMS, BATCH),
    )
    grads = jax.jit(
      jax.grad(lambda p: weights @ dense_losses(p, wide[1], MASK, "clip"))
    )(wide[0])
  for name, grad in jax.tree.map(np.asarray, grads).items():
    np.testing.assert_allclose(
      state.params[name], PARAMS[name] - grad, atol=1e-5, err_msg=name
    )


def test_a_reference_that_is_no_features_of_this_batch_is_refused():
  direction = contrastive.toward_similarities(apply)
  with pytest.raises(TypeError, match=r"is a dict; expected .* Features"):
    direction(PARAMS, REFERENCE, BATCH)
  few = jax.tree.map(lambda x: x[:3] if x.ndim else x, reference_features())
  with pytest.raises(ValueError, match=r"shape \(3, 9\); expected \[16, D\]"):
    direction(PARAMS, few, BATCH)
  with pytest.raises(ValueError, match="text features are none"):
    direction(PARAMS, reference_features()._replace(text=None), BATCH)


def dots(fn, *arguments):
  """How many matrix products a function is made of."""

  def count(jaxpr):
    return sum(
      (eqn.primitive.name == "dot_general")
      + sum(map(count, core.jaxprs_in_params(eqn.params)))
      for eqn in jaxpr.eqns
    )

  return count(jax.make_jaxpr(fn)(*arguments).jaxpr)


def more_dots_than_forward(name, depth, remat=False):
  """Of the scores with those mimic layers, in towers of that depth."""
  fields = {"image_depth": depth, "text_depth": depth, "remat": remat}
  config = ConfigDict({"size": "tiny", "clip": fields})
  kept = []

  def create():
    model, params = clip.create(config, input_shape=(16, 16, 3), seed=0)
    kept.append(model)
    return params

  params = jax.eval_shape(create)
  losses_fn = contrastive.make_losses_fn(kept[0])
  batch = {
    "image": jnp.ones((4, 16, 16, 3)),
    "text": jnp.ones((4, 8), jnp.int32),
  }
  fn = gm.mimic_scores(
    lambda params, batch: losses_fn(params, batch)[0],
    layers=clip.mimic_layers(name, params),
    engine="forward",
  )
  return dots(fn, params, params, batch) - dots(losses_fn, params, batch)


@pytest.mark.parametrize(
  ("name", "depth", "remat", "more"),
  [
    # Tangents of fc1's and fc2's kernel and of fc2's input, of the projection
    # and of the similarities.
    ("image_last_mlp", 1, False, 5),
    pytest.param("image_last_mlp", 2, False, 5, marks=pytest.mark.slow),
    pytest.param("image_last_mlp", 2, True, 5, marks=pytest.mark.slow),
    ("text_last_mlp", 2, False, 5),
    pytest.param("both_last_mlp", 1, False, 10, marks=pytest.mark.slow),
  ],
)
def test_a_tangent_flows_from_the_mimic_layer_upward_only(
  name, depth, remat, more
):
  """Not through the other tower, nor the blocks below, however many."""
  assert more_dots_than_forward(name, depth, remat) == more


def test_tangents_of_all_layers_are_as_many_as_all_products_and_more():
  assert more_dots_than_forward("all", 1) > 25


@pytest.mark.slow  # with the other loss, by `runtime/test_distributed`
@pytest.mark.parametrize("kind", ["sigmoid"])
def test_clip_itself_is_the_same_on_eight_devices(kind):
  """No device sees another's tokens or patches; features meet, and no more."""
  size, width = 24, 40
  fields = {
    "image_depth": 1,
    "text_depth": 1,
    "image_width": width,
    "text_width": width,
    "logit_bias": -3.0,
  }
  config = ConfigDict({"size": "tiny", "clip": fields})
  model, params = clip.create(config, input_shape=(16, 16, 3), seed=0)
  _, reference = clip.create(config, input_shape=(16, 16, 3), seed=1)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(size, 16, 16, 3)).astype(np.float32),
    "text": rng.integers(0, 128, (size, 9)).astype(np.int32),
    "mask": np.arange(size) % 7 != 2,
  }
  fn = jax.jit(
    gm.mimic_value_and_grad(
      contrastive.make_losses_fn(model, kind),
      layers=clip.mimic_layers("both_last_mlp", params),
      weighting=gm.softmax(TEMPERATURE),
      engine="forward",
      has_aux=True,
    )
  )
  rows, everywhere = mesh_of_eight()
  arguments = (
    *jax.device_put((params, reference), everywhere),
    jax.device_put(batch, rows),
  )
  compiled = fn.lower(*arguments, mask=arguments[2]["mask"]).compile()
  text = compiled.as_text()
  for tokens in (5, 9):  # of an image and of a text
    assert f"[{size // 8},{tokens},{width}]" in text
    assert f"[{size},{tokens},{width}]" not in text
  assert f"[{size},{size}]" not in text
  found = compiled(*arguments, mask=arguments[2]["mask"])
  expected = fn(params, reference, batch, mask=batch["mask"])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(b).max()))
    ),
    found,
    expected,
  )
