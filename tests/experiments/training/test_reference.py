"""References: outputs and their cache, clean samples, the methods on them."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradmimic_jax as gm
from experiments import methods, models, tasks
from experiments.data import noise
from experiments.runtime import cache, checkpoint
from experiments.studies import plan, runner as study
from experiments.tasks.classification import (
  data as data_lib,
  losses as classification,
  reference,
)
from experiments.training import steps, trainer as train
from tests.experiments.data.source_case import see

LOADED = methods.Method("outputs", None, None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("reference")


@pytest.fixture
def studied(make_config):
  """A study whose reference has another seed, architecture and split."""
  return make_config(
    num_epochs=4,
    batch_size=100,
    **{
      "checkpoint.every_epochs": 4,
      "data.flip": True,
      "study.methods": ("rho", "distillation"),
      "study.retrain": False,
      "study.reference.seed_offset": 1000,
      "study.reference.widths": (24,),
      "study.reference.num_epochs": 12,
      "study.reference.train_split": "train[:700]",
    },
  )


@pytest.fixture
def teacher(studied, shared):
  """The finished run of that reference."""
  config = plan.derived(
    studied, **tasks.get(studied).reference_overrides(studied, 0)
  )
  folder = shared / "seed0" / "reference"
  train.train_and_evaluate(config, folder)
  return folder


def load(config):
  return reference.load(
    config, LOADED.direction, None, data_lib.load_data(config)
  )


def load_from(config, teacher):
  config = config.copy_and_resolve_references().unlock()
  config.mimic.reference = str(teacher)
  return load(config.lock())


def cached(teacher):
  return sorted(teacher.glob("outputs_*.npy"))


def expected_outputs(teacher, config, *, mirrored=False):
  """The teacher's logits, put together from what its own job was made of."""
  own = json.loads((teacher / "config.json").read_text())
  split = config.copy_and_resolve_references().unlock()
  split.data.train_split = own["data"]["train_split"]
  split.model.widths = tuple(own["model"]["widths"])
  seen = data_lib.load_data(split.lock()).train
  pixels, _ = seen.reader.read(range(len(seen.source)))
  images = data_lib.load_data(config).train
  shown = see(images, [pixels.mean() / 255], [pixels.std() / 255])
  if mirrored:
    shown = shown[:, :, ::-1]
  apply, like = models.create(
    split.model, input_shape=images.shape, num_classes=10, seed=0
  )
  params = checkpoint.load_params(teacher, like)
  size = config.eval_batch_size
  padding = np.zeros((-len(shown) % size, *images.shape), np.float32)
  parts = np.concatenate([shown, padding]).reshape(-1, size, *images.shape)
  return np.concatenate([jax.jit(apply)(params, part) for part in parts])[
    : len(shown)
  ]


class TestOutputs:
  @pytest.mark.slow
  def test_each_row_is_the_output_for_the_image_as_it_was_shown(
    self, make_config, teacher
  ):
    config = make_config(**{"data.flip": True, "mimic.reference": str(teacher)})
    upright = expected_outputs(teacher, config)
    turned = expected_outputs(teacher, config, mirrored=True)
    index = np.array([3, 1436, 0, -1], np.int32)
    flipped = np.array([True, False, True, True])
    rows = load(config).for_batch({"index": index, "flipped": flipped})
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[0], turned[3])
    np.testing.assert_array_equal(rows[1], upright[1436])
    np.testing.assert_array_equal(rows[2], turned[0])
    assert np.isfinite(rows[3]).all()  # padding
    assert np.abs(upright[3] - turned[3]).max() > 1e-3

  def test_without_flips_there_is_one_row_a_sample(self, make_config, teacher):
    config = make_config(**{"mimic.reference": str(teacher)})
    index = np.arange(1437)
    np.testing.assert_array_equal(
      load(config).for_batch({"index": index}),
      expected_outputs(teacher, config),
    )

  def test_outputs_are_computed_once(self, make_config, teacher, monkeypatch):
    config = make_config(**{"mimic.reference": str(teacher)})
    index = np.arange(1437)
    first = load(config)
    with monkeypatch.context() as patch:
      patch.setattr(reference, "_outputs", None)  # can't be called
      second = load(config)
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(
      first.for_batch({"index": index}), second.for_batch({"index": index})
    )

  def test_other_images_and_flips_have_outputs_of_their_own(
    self, make_config, teacher
  ):
    where = {"mimic.reference": str(teacher)}
    prints = {
      load(make_config(**where, **other)).fingerprint
      for other in (
        {},
        {"data.flip": True},
        {"data.train_split": "train[:400]"},
      )
    }
    assert len(prints) == 3
    assert {file.stem.removeprefix("outputs_") for file in cached(teacher)} >= (
      prints
    )

  @pytest.mark.parametrize(
    "harm",
    [
      "bit",
      "foreign",
      *(pytest.param(x, marks=pytest.mark.slow) for x in ("cut", "no_sum")),
    ],
  )
  def test_damaged_outputs_are_computed_again(self, make_config, teacher, harm):
    config = make_config(**{"mimic.reference": str(teacher)})
    right = load(config)
    file = teacher / f"outputs_{right.fingerprint}.npy"
    content = bytearray(file.read_bytes())
    if harm == "bit":
      content[-3] ^= 1
      file.write_bytes(content)
    elif harm == "cut":
      file.write_bytes(content[: len(content) // 2])
    elif harm == "foreign":
      np.save(file, np.zeros((1437, 10), np.float32))
    else:
      file.with_suffix(".sha256").unlink()
    again = load(config)
    assert bytes(file.read_bytes()) == bytes(
      cache.as_npy(right.for_batch({"index": np.arange(1437)}))
    )
    np.testing.assert_array_equal(
      again.for_batch({"index": np.arange(1437)}),
      right.for_batch({"index": np.arange(1437)}),
    )
    assert not list(teacher.glob("*.tmp"))

  def test_a_reference_of_other_classes_is_refused(
    self, make_config, teacher, tmp_path
  ):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "result.json"):
      (other / name).write_bytes((teacher / name).read_bytes())
    config = make_config(**{"mimic.reference": str(other)})
    with pytest.raises(FileNotFoundError, match="command again, which adds it"):
      load(config)
    shown = json.loads((teacher / "input.json").read_text())
    (other / "input.json").write_text(json.dumps({**shown, "num_classes": 7}))
    with pytest.raises(ValueError, match="same image shape and number of cla"):
      load(config)


class TestLoggedOutputs:
  @pytest.fixture
  def logged(self, make_config, tmp_path):
    def make(outputs, **overrides):
      np.save(tmp_path / "logged.npy", outputs)
      return make_config(
        **{"mimic.outputs": str(tmp_path / "logged.npy"), **overrides}
      )

    return make

  def test_they_stand_in_for_a_run(self, logged):
    outputs = np.random.default_rng(0).normal(size=(1437, 10))
    given = load(logged(outputs))
    index = np.array([5, -1])
    rows = given.for_batch({"index": index, "flipped": np.array([True, False])})
    np.testing.assert_array_equal(rows[0], outputs[5].astype(np.float32))
    assert load(logged(outputs)).fingerprint == given.fingerprint
    assert load(logged(outputs + 1)).fingerprint != given.fingerprint
    both = load(logged(np.stack([outputs, -outputs])))
    rows = both.for_batch({"index": index, "flipped": np.array([True, False])})
    np.testing.assert_array_equal(rows[0], -outputs[5].astype(np.float32))

  def test_wrong_ones_are_refused(self, logged, make_config, tmp_path):
    with pytest.raises(ValueError, match=r"shape \(1437, 9\); expected \(14"):
      load(logged(np.zeros((1437, 9))))
    with pytest.raises(TypeError, match="dtype int64; expected floating"):
      load(logged(np.zeros((1437, 10), np.int64)))
    with pytest.raises(ValueError, match="can't be read"):
      load(logged(np.array([{"an": "object"}], object)))
    with pytest.raises(FileNotFoundError, match="logits"):
      load(make_config(**{"mimic.outputs": str(tmp_path / "none.npy")}))


class TestCleanSamples:
  def test_so_many_of_each_class_by_the_seed(self):
    labels = np.random.default_rng(0).integers(0, 4, 60)
    options = {"per_class": 3, "num_classes": 4}
    one = reference.clean_positions(labels, seed=0, **options)
    np.testing.assert_array_equal(np.bincount(labels[one]), [3] * 4)
    same = reference.clean_positions(labels, seed=0, **options)
    np.testing.assert_array_equal(one, same)
    other = reference.clean_positions(labels, seed=1, **options)
    assert not np.array_equal(one, other)

  @pytest.mark.parametrize(
    ("per_class", "message"), [(0, "at least 1"), (4, "class 1 has 2 train")]
  )
  def test_a_class_that_is_too_small(self, per_class, message):
    with pytest.raises(ValueError, match=message):
      reference.clean_positions(
        np.array([0, 0, 0, 0, 0, 1, 1]),
        per_class=per_class,
        num_classes=2,
        seed=0,
      )

  def test_they_are_not_trained_on(self, make_config, tmp_path):
    config = make_config(
      method="grad_mimic",
      **{"mimic.direction": "clean_gradient", "mimic.clean_per_class": 4},
    )
    data = data_lib.load_data(config, needs_clean=True)
    run = train.Run(config, tmp_path)
    shown = [next(run.batches) for _ in range(run.task.steps_per_epoch)]
    index = np.concatenate([batch["index"] for batch in shown])
    np.testing.assert_array_equal(
      np.sort(index[index >= 0]), np.delete(np.arange(1437), data.clean)
    )
    # Half of the labels are wrong; those of the clean batch are not.
    batch = run.reference.for_batch({"index": shown[0]["index"]})
    np.testing.assert_array_equal(
      batch["label"], data.train.source.labels[data.clean]
    )
    assert data.labels.is_noisy[data.clean].any()

  def test_a_filter_and_clean_samples_together(self, make_config, tmp_path):
    np.save(tmp_path / "kept.npy", np.arange(0, 1437, 2))
    config = make_config(
      method="grad_mimic",
      **{
        "mimic.direction": "clean_gradient",
        "data.filter": str(tmp_path / "kept.npy"),
      },
    )
    data = data_lib.load_data(config, needs_clean=True)
    assert set(data.indices) == set(range(0, 1437, 2)) - set(data.clean)

  @pytest.mark.slow
  def test_they_find_mislabelled_samples(self, make_config, tmp_path):
    config = make_config(
      num_epochs=20,
      method="grad_mimic",
      **{
        "mimic.direction": "clean_gradient",
        "mimic.clean_per_class": 10,
        "checkpoint.every_epochs": 20,
      },
    )
    train.train_and_evaluate(config, tmp_path / "run")
    ids, scores = gm.ScoreLedger(tmp_path / "run" / "ledger").matrix("score")
    wrong = data_lib.load_data(config, needs_clean=True).labels.is_noisy[ids]
    found = gm.metrics.detection(scores.mean(axis=1), ~wrong, wrong)
    assert found.auroc > 0.8


def linear_step(
  method, make_config, weights, reference_outputs, batch, **fields
):
  """One step of plain descent on logits `x @ w`, and its output."""

  def outputs_fn(params, batch):
    return batch["x"] @ params["w"]

  def losses_fn(params, batch):
    logits = outputs_fn(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return losses, jnp.argmax(logits, axis=-1) == batch["label"]

  tx = optax.sgd(1.0)
  config = make_config(**{"mimic.weighting": "softmax", **fields}).mimic
  outputs = classification.make_outputs(outputs_fn)
  step = steps.make_train_step(
    losses_fn, tx, methods.create(method, config), config, outputs
  )
  state = steps.init_state({"w": jnp.asarray(weights, jnp.float32)}, tx)
  state, output = step(state, jnp.float32(reference_outputs), batch)
  return state.params["w"] - weights, output


@pytest.fixture
def linear():
  rng = np.random.default_rng(3)
  x, outputs = rng.normal(size=(6, 4)), rng.normal(size=(6, 3)) * 2
  return types.SimpleNamespace(
    x=x,
    outputs=outputs,
    weights=rng.normal(size=(4, 3)),
    label=np.array([0, 2, 1, 1, 0, 2]),
  )


def log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_distillation_descends_the_mean_divergence(linear, make_config):
  outputs = linear.outputs.copy()
  outputs[1, 2] = np.nan  # never logged: left out
  batch = {
    "x": jnp.float32(linear.x),
    "label": jnp.asarray(linear.label),
    "mask": jnp.arange(6) < 5,
  }
  moved, output = linear_step(
    "distillation", make_config, linear.weights, outputs, batch
  )
  kept = [0, 2, 3, 4]
  ours = log_softmax(linear.x[kept] @ linear.weights)
  theirs = log_softmax(outputs[kept])
  # The derivative of the divergence by the logits is the gap of the softmaxes.
  gaps = np.exp(ours) - np.exp(theirs)
  np.testing.assert_allclose(moved, -linear.x[kept].T @ gaps / 4, atol=1e-6)
  divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()
  assert float(output.metrics["divergence"]) == pytest.approx(divergence, 1e-5)
  assert int(output.metrics["nonfinite"]) == 1
  assert output.samples == {}


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_mixed_distillation_descends_both(linear, make_config, mix):
  batch = {
    "x": jnp.float32(linear.x),
    "label": jnp.asarray(linear.label),
    "mask": jnp.ones(6, bool),
  }
  moved, output = linear_step(
    "distillation_mixed",
    make_config,
    linear.weights,
    linear.outputs,
    batch,
    **{"mimic.mix": mix},
  )
  ours, theirs = log_softmax(linear.x @ linear.weights), linear.outputs
  goal = mix * np.exp(log_softmax(theirs)) + (1 - mix) * np.eye(3)[linear.label]
  gaps = np.exp(ours) - goal
  np.testing.assert_allclose(moved, -linear.x.T @ gaps / 6, atol=1e-6)
  assert ("objective" in output.metrics) == (mix < 1)


def test_rho_weights_by_the_loss_that_the_reference_does_not_share(
  linear, make_config
):
  batch = {
    "x": jnp.float32(linear.x),
    "label": jnp.asarray(linear.label),
    "mask": jnp.ones(6, bool),
  }
  moved, output = linear_step(
    "rho", make_config, linear.weights, linear.outputs, batch
  )
  rows = np.arange(6)
  ours = log_softmax(linear.x @ linear.weights)
  excess = log_softmax(linear.outputs)[rows, linear.label]
  excess = excess - ours[rows, linear.label]
  weights = np.exp(excess) / np.exp(excess).sum()
  np.testing.assert_allclose(output.samples["score"], excess, atol=1e-5)
  np.testing.assert_allclose(output.samples["weight"], weights, atol=1e-5)
  gaps = np.exp(ours) - np.eye(3)[linear.label]
  np.testing.assert_allclose(
    moved, -linear.x.T @ (weights[:, None] * gaps), atol=1e-5
  )


class TestRuns:
  """Toward references that have little in common with the learner."""

  def test_weights_of_another_architecture_are_refused_at_once(
    self, make_config, tmp_path
  ):
    config = make_config(
      **{
        "study.methods": ("rho", "grad_mimic_weights"),
        "study.reference.widths": (24,),
      }
    )
    with pytest.raises(ValueError, match=r"model\.widths \(24,\), the learner"):
      study.run_study(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()

  @pytest.mark.slow
  def test_a_study_with_a_foreign_reference(self, studied, teacher, shared):
    runs = study.run_all(
      studied,
      shared,
      [run for run in plan.plan_runs(studied) if run.seed == 0],
    )
    assert list(runs) == ["reference", "rho", "distillation"]
    (reference_run,), (rho,), (distilled,) = runs.values()
    assert reference_run["train_samples"] == 700
    assert reference_run["steps"] == 12 * 7
    assert reference_run["noise_rate"] == 0
    for run in (rho, distilled):
      assert run["noise_rate"] == pytest.approx(0.5, abs=1e-3)
      assert run["nonfinite_samples"] == 0
    # Half of its labels are wrong, and it looks at none of them.
    assert distilled["test_accuracy"] > 0.6
    found = shared / "seed0" / "rho"
    ids, scores = gm.ScoreLedger(found / train.LEDGER_FOLDER).matrix("score")
    labels, _ = noise.load(found / data_lib.LABELS_FILE)
    assert (
      gm.metrics.detection(
        np.nanmean(scores, axis=1),
        np.ones(len(ids), bool),
        labels.is_noisy[ids],
      ).auroc
      > 0.8
    )
    # Distillation keeps no scores, and there is nothing to select from.
    assert not (shared / "seed0" / "distillation" / "ledger").exists()
    # All that asked for the outputs shared one file.
    flipped = load_from(studied, teacher).fingerprint
    assert teacher / f"outputs_{flipped}.npy" in cached(teacher)

  def test_a_seed_offset_gives_another_initialisation(
    self, make_config, tmp_path
  ):
    started = []
    for offset in (0, 1000):
      config = make_config(**{"study.reference.seed_offset": offset})
      config = plan.derived(
        config, **tasks.get(config).reference_overrides(config, 3)
      )
      run = train.Run(config, tmp_path)
      started.append(checkpoint.fingerprint(run.state.params))
    config = plan.derived(make_config(), seed=3)
    learner = train.Run(config, tmp_path)
    assert checkpoint.fingerprint(learner.state.params) == started[0]
    assert started[0] != started[1]


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("mimic.direction", "weight", "expected one of weights, outputs, clean"),
    ("mimic.score", "excess_loss", "are methods of their own: rho and grand"),
  ],
)
def test_names_that_are_not_there(make_config, field, value, message):
  config = make_config(**{field: value})
  with pytest.raises(ValueError, match=message):
    methods.create("grad_mimic", config.mimic)
