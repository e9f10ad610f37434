"""Every named method: what it weighs, and that it runs."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import gradmimic_jax as gm
from experiments import methods, models
from experiments.runtime import distributed
from experiments.studies.probing import heads
from experiments.tasks.classification import (
  data as data_lib,
  inputs,
  losses as classification,
  reference,
)
from experiments.training import grand, steps, trainer as train
from tests.experiments.data.source_case import see


def outputs_fn(params, batch):
  return batch["x"] @ params["w"]


def losses_fn(params, batch):
  logits = outputs_fn(params, batch)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["label"]
  )
  return losses, jnp.argmax(logits, axis=-1) == batch["label"]


OUTPUTS = classification.make_outputs(outputs_fn)


@pytest.fixture
def linear(make_config):
  """Two steps of plain descent on logits `x @ w`, by a method's name."""
  rng = np.random.default_rng(3)
  batch = {
    "x": jnp.float32(rng.normal(size=(10, 4))),
    "label": jnp.asarray(rng.integers(0, 3, 10), jnp.int32),
    "mask": jnp.arange(10) < 9,
  }
  start = rng.normal(size=(4, 3)).astype(np.float32)

  def run(name, given, batch=batch, **overrides):
    fields = {"mimic.weighting": "softmax", **overrides}
    config = make_config(**fields).mimic
    tx = optax.sgd(1.0)
    step = steps.make_train_step(
      losses_fn, tx, methods.create(name, config), config, OUTPUTS
    )
    state = steps.init_state({"w": jnp.array(start)}, tx)
    moves, outputs = [], []
    for _ in range(2):
      before = np.array(state.params["w"])
      state, output = step(state, given, batch)
      moves.append(np.asarray(state.params["w"]) - before)
      outputs.append(output)
    return moves, outputs

  def score(name, given, **overrides):
    config = make_config(**overrides).mimic
    method = methods.create(name, config)
    step = steps.make_score_step(losses_fn, method, config, OUTPUTS)
    return step({"w": jnp.array(start)}, given, batch)["score"]

  return types.SimpleNamespace(
    run=run,
    score=score,
    batch=batch,
    params={"w": jnp.asarray(start)},
    outputs=jnp.float32(rng.normal(size=(10, 3)) * 2),
  )


def kept(linear):
  """The batch without its padding."""
  return {k: v[:9] for k, v in linear.batch.items()}


@pytest.mark.slow
def test_rho_as_published_descends_through_its_weights(linear):
  # A sample whose reference outputs were never logged, and a padded one.
  outputs = linear.outputs.at[jnp.array([2, 9])].set(jnp.nan)
  moves, found = linear.run(
    "rho_as_published", outputs, **{"mimic.temperature": 0.7}
  )
  rows = np.delete(np.arange(9), 2)
  batch = jax.tree.map(lambda x: np.asarray(x)[rows], linear.batch)

  def total(params):
    losses, _ = losses_fn(params, batch)
    reference = optax.softmax_cross_entropy_with_integer_labels(
      outputs[rows], batch["label"]
    )
    return jnp.sum(jax.nn.softmax((losses - reference) / 0.7) * losses)

  right = jax.jit(jax.grad(total))(linear.params)["w"]
  np.testing.assert_allclose(moves[0], -right, atol=1e-5)
  weights = np.asarray(found[0].samples["weight"])
  assert weights.min() < 0
  assert weights[2] == weights[9] == 0
  assert weights.sum() == pytest.approx(1, abs=1e-5)
  assert np.isnan(found[0].samples["score"][2])
  assert found[0].samples["score"][9] == 0
  assert found[0].metrics["nonfinite"] == 1


@pytest.mark.slow
def test_agra_goes_by_an_independent_batch(linear):
  rng = np.random.default_rng(9)
  other = {
    "x": jnp.float32(rng.normal(size=(7, 4))),
    "label": jnp.asarray(rng.integers(0, 3, 7), jnp.int32),
  }

  def gradients(batch):
    p = np.exp(batch["x"] @ linear.params["w"])
    p /= p.sum(axis=1, keepdims=True)
    errors = p - np.eye(3)[batch["label"]]
    return np.einsum("id,ic->idc", batch["x"], errors).reshape(len(p), -1)

  rows, toward = gradients(kept(linear)), gradients(other).mean(axis=0)
  cosines = rows @ toward
  cosines /= np.linalg.norm(rows, axis=1) * np.linalg.norm(toward)
  assert 0 < (cosines > 0).sum() < 9
  moves, outputs = linear.run("agra", other)
  np.testing.assert_allclose(
    outputs[0].samples["score"][:9], cosines, atol=1e-5
  )
  np.testing.assert_allclose(
    moves[0].ravel(), -rows[cosines > 0].mean(axis=0), atol=1e-5
  )


def test_output_agreement_by_hand(linear):
  # A sample whose reference outputs were never logged, and a padded one.
  outputs = linear.outputs.at[jnp.array([2, 9])].set(jnp.nan)
  moves, found = linear.run(
    "output_agreement", outputs, **{"mimic.temperature": 0.3}
  )
  rows = np.delete(np.arange(9), 2)
  x, labels = (np.asarray(linear.batch[key])[rows] for key in ("x", "label"))
  outputs = np.float64(outputs)[rows]

  def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

  p = softmax(x @ np.float64(linear.params["w"]))
  errors = p - np.eye(3)[labels]
  scores = -(errors * (softmax(outputs) - p)).sum(axis=1)
  weights = softmax(scores / 0.3)
  gradient = np.einsum("i,id,ic->dc", weights, x, errors)
  np.testing.assert_allclose(moves[0], -gradient, atol=1e-5)
  samples, metrics = found[0].samples, found[0].metrics
  np.testing.assert_allclose(samples["score"][rows], scores, atol=1e-5)
  np.testing.assert_allclose(samples["weight"][rows], weights, atol=1e-5)
  assert samples["weight"][2] == samples["weight"][9] == 0
  assert np.isnan(samples["score"][2])
  assert np.isnan(samples["loss"][2])
  assert samples["score"][9] == samples["loss"][9] == 0
  losses = -np.log(p[np.arange(8), labels])
  np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["effective_sample_size"], 1 / (weights**2).sum(), rtol=1e-5
  )
  assert metrics["nonfinite"] == 1


@pytest.fixture
def normed():
  """A model with a layer norm, whose copies XLA does not merge; a batch."""
  rng = np.random.default_rng(0)
  shapes = {"in": (16, 128), "out": (128, 10)}
  params = {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}
  batch = {
    "x": jnp.float32(rng.normal(size=(64, 16))),
    "label": jnp.asarray(rng.integers(0, 10, 64), jnp.int32),
    "mask": jnp.arange(64) < 60,
  }

  def outputs_fn(params, batch):
    hidden = batch["x"] @ params["in"]
    center = hidden - hidden.mean(axis=-1, keepdims=True)
    variance = jnp.square(center).mean(axis=-1, keepdims=True)
    return jnp.tanh(center * jax.lax.rsqrt(variance + 1e-6)) @ params["out"]

  return classification.make_outputs(outputs_fn), params, batch


def plain_losses(outputs):
  """Losses and hits, as jobs hand them over."""

  def losses_fn(params, batch):
    losses, aux = outputs.losses_fn(params, batch)
    return losses, aux.hits

  return losses_fn


def test_one_forward_pass_gives_losses_and_outputs(make_config, normed):
  outputs, params, batch = normed
  config = make_config(**{"mimic.weighting": "softmax"}).mimic
  tx = optax.sgd(1.0)

  def flops(name):
    method = methods.create(name, config)
    step = steps.make_train_step(
      plain_losses(outputs), tx, method, config, outputs
    )
    state = steps.init_state(params, tx)
    compiled = step.lower(state, jnp.zeros((64, 10)), batch).compile()
    return compiled.cost_analysis()["flops"]

  plain = flops("sgd")
  for name in ("output_agreement", "distillation"):
    assert flops(name) <= 1.05 * plain


@pytest.mark.slow
def test_output_agreement_of_some_layers_is_the_librarys(make_config, normed):
  outputs, params, batch = normed
  losses_fn = plain_losses(outputs)
  theirs = jnp.float32(np.random.default_rng(1).normal(size=(64, 10)))
  config = make_config(
    **{"mimic.layers": "^out$", "mimic.scope": "layers"}
  ).mimic
  tx = optax.sgd(1.0)
  method = methods.create("output_agreement", config)
  step = steps.make_train_step(losses_fn, tx, method, config, outputs)
  state = steps.init_state(jax.tree.map(jnp.copy, params), tx)
  state, output = step(state, theirs, batch)
  scores = gm.scores.agreement(
    lambda logits: classification.label_losses(logits, batch),
    outputs.of(params, batch),
    theirs,
  )
  (loss, info), grads = gm.mimic_value_and_grad(
    losses_fn,
    layers="^out$",
    scope="layers",
    score="given",
    weighting=method.weighting,
    has_aux=True,
  )(params, scores, batch, mask=batch["mask"])
  found = (output.metrics["loss"], output.samples, state.params)
  samples = {
    "score": info.scores,
    "weight": info.weights,
    "loss": info.losses,
  }
  moved = jax.tree.map(lambda p, g: p - g, params, grads)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves((loss, samples, moved)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["output_agreement", "random", "rho", "grad_mimic"]
)
def test_steps_in_microbatches_are_the_same_steps(linear, name):
  given = linear.outputs
  if name == "grad_mimic":
    given = {"w": linear.params["w"] + 1}
  options = {"mimic.microbatch_size": 4, "mimic.temperature": 0.3}
  parts = linear.run(name, given, **options)
  options["mimic.microbatch_size"] = None
  whole = linear.run(name, given, **options)
  if name != "random":
    scores = linear.score(name, given, **{"mimic.microbatch_size": 4})
    np.testing.assert_allclose(
      scores, whole[1][0].samples["score"], rtol=1e-4, atol=1e-5
    )
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_closed_form_skips_a_broken_step_and_counts_it(make_config):
  """As the general loop does: features that overflow, then sound ones."""
  config = make_config().mimic
  head = heads.create(4, 3, [0])
  tx = optax.adam(0.1)
  make = jax.jit(heads.make_epoch(head, tx, "grand", config))
  features = jnp.stack([jnp.full([1, 4], jnp.inf), jnp.ones([1, 4])])
  states = heads.init_states(head, tx, 1)
  before = jax.device_get(states)
  labels = jnp.zeros([1, 1, 2], jnp.int32)
  given = heads.Given(labels, None, None)

  def epoch(rows):
    index = np.array(rows).reshape(1, -1, 1)
    batches = heads.Batches(index, index, np.ones_like(index, bool), None, None)
    return make(states, given, features[:, 0], batches)

  after, metrics, _ = epoch([0, 0])
  jax.tree.map(
    np.testing.assert_array_equal,
    (before.params, before.opt_state),
    (after.params, after.opt_state),
  )
  assert int(after.step[0, 0]) == 2
  assert int(metrics["skipped"][0, 0]) == int(metrics["nonfinite"][0, 0]) == 2
  after, metrics, _ = epoch([1, 0])
  assert int(metrics["skipped"][0, 0]) == 1
  assert (
    after.params["head"]["kernel"] != before.params["head"]["kernel"]
  ).any()
  assert np.isfinite(after.params["head"]["kernel"]).all()


@pytest.mark.parametrize(
  "name", [pytest.param("agra", marks=pytest.mark.slow), "agra_skip"]
)
def test_agra_where_no_sample_agrees(linear, name):
  """The other batch's label is the least likely, the batch's the likeliest."""
  x = jnp.broadcast_to(linear.batch["x"][:1], (10, 4))
  order = jnp.argsort((x @ linear.params["w"])[0])
  batch = {"x": x, "mask": linear.batch["mask"]}
  batch["label"] = jnp.full(10, order[0])
  other = {"x": -x, "label": batch["label"]}
  moves, outputs = linear.run(name, other, batch)
  assert (outputs[0].samples["score"][:9] < 0).all()
  assert (moves[0] == 0).all() == (name == "agra_skip")


def test_random_takes_a_share_by_the_step(linear):
  _, outputs = linear.run("random", None)
  chosen = [np.asarray(o.samples["weight"]) for o in outputs]
  for weights in chosen:
    np.testing.assert_allclose(np.sort(weights)[-3:], 1 / 3, rtol=1e-6)
    assert np.count_nonzero(weights) == 3  # 0.3 of nine
    assert weights[9] == 0
  assert (chosen[0] != chosen[1]).any()


@pytest.mark.slow
def test_rho_topk_takes_the_highest_tenth(linear):
  _, outputs = linear.run("rho_topk", linear.outputs)
  scores = np.asarray(outputs[0].samples["score"])[:9]
  np.testing.assert_array_equal(
    outputs[0].samples["weight"], np.arange(10) == scores.argmax()
  )


def test_the_table_has_every_method():
  first = [line.split("|")[1].strip() for line in table()]
  assert [name for name in first if name] == list(methods.METHODS)


def table():
  lines = [x for x in methods.table.__doc__.splitlines() if x.startswith("|")]
  return lines[2:]


class TestIndependentBatches:
  def make(self, make_config, **overrides):
    config = make_config(method="agra", batch_size=40, **overrides)
    data = data_lib.load_data(config)
    method = methods.create("agra", config.mimic)
    return data, reference.load(config, method.direction, None, data)

  def seen(self, given, data, taken):
    """The batch that comes with a batch, as a step sees it."""
    expand = jax.jit(inputs.make_expand(data.mean, data.std))
    return jax.device_get(expand(given.for_batch(taken), data.train.resident))

  def test_they_depend_on_the_batch_and_the_seed_alone(self, make_config):
    index = np.arange(40, dtype=np.int32)
    data, one = self.make(make_config)
    _, same = self.make(make_config)
    batch = self.seen(one, data, {"index": index})
    assert one.fingerprint == same.fingerprint
    jax.tree.map(
      np.testing.assert_array_equal,
      batch,
      self.seen(same, data, {"index": index}),
    )
    _, other = self.make(make_config, seed=5)
    assert one.fingerprint != other.fingerprint
    padded = np.where(index < 39, index, -1)
    for found in (
      self.seen(other, data, {"index": index}),
      self.seen(one, data, {"index": padded}),
    ):
      assert found["image"].shape == (40, 8, 8, 1)
      assert (found["image"] != batch["image"]).any()
    # Labels are those that are trained on, half of them wrong.
    rows = rows_of(batch["image"], data)
    np.testing.assert_array_equal(batch["label"], data.labels.labels[rows])
    assert data.labels.is_noisy[rows].any()
    assert len(set(rows)) == 40

  def test_they_are_mirrored_as_the_batch_is(self, make_config):
    index = np.arange(40, dtype=np.int32)
    data, given = self.make(make_config)
    taken = {"index": index}
    plain = self.seen(given, data, taken)["image"]
    batch = self.seen(given, data, taken | {"flipped": np.zeros(40, bool)})
    turned = (batch["image"] == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    upright = (batch["image"] == plain).all(axis=(1, 2, 3))
    assert (turned | upright).all()
    assert 5 < turned.sum() < 35

  def test_they_come_from_what_is_trained_on(self, make_config, tmp_path):
    np.save(tmp_path / "kept.npy", np.arange(100, 130))
    data, given = self.make(
      make_config, **{"data.filter": str(tmp_path / "kept.npy")}
    )
    batch = self.seen(given, data, {"index": np.arange(40)})
    rows = rows_of(batch["image"], data)
    np.testing.assert_array_equal(np.sort(rows), np.arange(100, 130))


def rows_of(images, data):
  """Which train images these are."""
  everything = see(data.train, data.mean, data.std)
  equal = everything[None] == np.asarray(images)[:, None]
  return equal.all(axis=(2, 3, 4)).argmax(axis=1)


def test_samples_of_the_test_split_are_there_by_name_only(make_config):
  config = make_config(
    method="influence_test_leak", **{"mimic.clean_per_class": 2}
  )
  data = data_lib.load_data(config)
  assert data.clean is None
  method = methods.create(config.method, config.mimic)
  batch = reference.load(config, method.direction, None, data).for_batch({})
  np.testing.assert_array_equal(np.bincount(batch["label"]), [2] * 10)
  shown, _ = data.test.reader.read(range(len(data.test.source)))
  for image, label in zip(batch["image"], batch["label"], strict=True):
    equal = (shown == np.asarray(image)).all(axis=(1, 2, 3))
    assert label in data.test.source.labels[equal]
  with pytest.raises(ValueError, match=r"direction is 'test_gradient'"):
    methods.create(
      "grad_mimic", make_config(**{"mimic.direction": "test_gradient"}).mimic
    )


def test_short_runs_have_at_most_two_batches_on_the_devices(monkeypatch):
  started, waited = [], []
  monkeypatch.setattr(jax, "block_until_ready", waited.append)

  def step(state, _, batch):
    started.append(batch)
    assert len(started) - len(waited) <= 2
    return state + batch, types.SimpleNamespace(metrics=batch)

  assert grand._train(0, step, range(9)) == sum(range(9))
  assert waited == list(range(8))


class TestOfflineNorms:
  def make(self, make_config, **overrides):
    """A linear model on 30 samples: its norms have a closed form."""
    fields = {
      "model.widths": (),
      "mimic.grand_runs": 2,
      "mimic.grand_epochs": 0,
      "data.train_split": "train[:30]",
      "batch_size": 16,
      **overrides,
    }
    config = make_config(method="grand_offline", **fields)
    return config, data_lib.load_data(config)

  @pytest.mark.slow
  def test_they_are_means_over_initialisations(self, make_config):
    config, data = self.make(make_config)
    norms = grand.offline_norms(config, data)
    shown = see(data.train, data.mean, data.std)
    right = []
    for seed in (1000, 1001):
      apply, params = models.create(
        config.model, input_shape=(8, 8, 1), num_classes=10, seed=seed
      )
      assert len(jax.tree.leaves(params)) == 2
      errors = gm.linear_head.errors(apply(params, shown), data.labels.labels)
      features = shown.reshape(30, -1)
      right.append(gm.linear_head.gradient_norms(features, errors))
    assert np.abs(right[0] - right[1]).max() > 0.1
    np.testing.assert_allclose(norms, np.mean(right, axis=0), rtol=1e-4)
    given = grand.load(config, data, None, distributed.Devices.alone())
    index = np.array([7, -1, 2])
    np.testing.assert_array_equal(
      given.for_batch({"index": index}), norms[[7, 0, 2]]
    )

  @pytest.mark.slow
  def test_training_counts_and_so_does_the_seed(self, make_config):
    found = [
      grand.offline_norms(*self.make(make_config, **fields))
      for fields in ({}, {"mimic.grand_epochs": 2}, {"seed": 1})
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-2
    assert np.abs(found[0] - found[2]).max() > 1e-2

  def test_they_are_computed_once_and_not_before_a_step(
    self, make_config, tmp_path, monkeypatch
  ):
    def load(**overrides):
      config, data = self.make(make_config, **overrides)
      alone = distributed.Devices.alone()
      return grand.load(config, data, tmp_path, alone)

    with monkeypatch.context() as patch:
      patch.setattr(grand, "offline_norms", None)  # can't be called
      given = load()
      others = ({"seed": 1}, {"mimic.grand_epochs": 2}, {"noise.rate": 0.1})
      prints = {load(**fields).fingerprint for fields in ({}, *others)}
      assert len(prints) == 4
    index = np.arange(30)
    norms = given.for_batch({"index": index})
    assert (norms > 0).all()
    with monkeypatch.context() as patch:
      patch.setattr(grand, "offline_norms", None)
      again = load()
      np.testing.assert_array_equal(again.for_batch({"index": index}), norms)
    assert again.fingerprint == given.fingerprint
    file = tmp_path / f"norms_{given.fingerprint}.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with monkeypatch.context() as patch:
      patch.setattr(grand, "offline_norms", lambda *_: 2 * norms)
      damaged = load().for_batch({"index": index})
    np.testing.assert_array_equal(damaged, 2 * norms)

  @pytest.mark.slow
  def test_a_finished_run_is_not_repeated(
    self, make_config, tmp_path, monkeypatch
  ):
    config, _ = self.make(make_config)
    result = train.train_and_evaluate(config, tmp_path / "run")
    monkeypatch.setattr(grand, "offline_norms", None)
    assert train.train_and_evaluate(config, tmp_path / "run") == result

  def test_no_runs_are_refused(self, make_config):
    with pytest.raises(ValueError, match="grand_runs 0"):
      grand.offline_norms(*self.make(make_config, **{"mimic.grand_runs": 0}))


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
  file = tmp_path_factory.mktemp("outputs") / "logged.npy"
  np.save(file, np.random.default_rng(0).normal(size=(80, 10)))
  return str(file)


class TestRuns:
  # The others are asked more by `studies/test_probing.py`, where each equals
  # the general loop; here one of each kind is asked of a hidden layer.
  @pytest.mark.slow
  @pytest.mark.parametrize(
    "name",
    [
      *("grad_mimic_weights", "grad_mimic_adam", "grad_mimic_outputs"),
      *("grand_offline", "grad_match_omp", "agra_skip", "rho_topk", "sgd"),
    ],
  )
  def test_two_steps_on_digits(self, make_config, tmp_path, logged, name):
    fields = {
      "model.widths": (8,),
      "data.train_split": "train[:80]",
      "batch_size": 48,
      "num_epochs": 1,
      "mimic.outputs": logged,
      "mimic.clean_per_class": 1,
      "mimic.grand_runs": 2,
    }
    if name.startswith("grad_mimic") and name != "grad_mimic_outputs":
      clean = make_config(**fields, **{"noise.rate": 0.0})
      reference = pathlib.Path(logged).with_name("reference")  # trained once
      with tiny.nudged():
        train.train_and_evaluate(clean, reference)
      fields["mimic.reference"] = str(reference)
      fields["mimic.force"] = True  # it is no guide
    config = make_config(method=name, **fields)
    result = train.train_and_evaluate(config, tmp_path / "run")
    assert result["steps"] == 2
    assert np.isfinite(result["test_loss"])
    assert result["nonfinite_samples"] == 0
    method = methods.create(name, config.mimic)
    if method is None or method.score is None:
      return
    ledger = gm.ScoreLedger(tmp_path / "run" / "ledger")
    _, scores = ledger.matrix("score")
    assert scores.shape == (result["train_samples"], 1)
    assert np.isfinite(scores).all()
    totals = ledger.matrix("weight")[1].sum()
    if name == "agra_skip":
      assert totals == pytest.approx(round(totals), abs=1e-4)
    else:
      assert totals == pytest.approx(2, abs=1e-4)
