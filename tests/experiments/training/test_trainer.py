"""The training loop: results, resuming, and what a workdir refuses."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import gradmimic_jax as gm
from experiments.runtime import metrics as writers
from experiments.tasks.classification import data as data_lib
from experiments.training import steps, trainer as train


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("reference")


@pytest.fixture
def reference(make_config, shared):
  """The workdir of a finished clean run."""
  config = make_config(**{"noise.rate": 0.0})
  train.train_and_evaluate(config, shared / "run")
  return str(shared / "run")


@pytest.fixture
def run(make_config, reference, shared):
  """The folder of a finished run by grad_mimic, and its result."""
  config = make_config(**{"method": "grad_mimic", "mimic.reference": reference})
  folder = shared / "mimic"
  return folder, train.train_and_evaluate(config, folder)


def test_a_run_leaves_what_it_promises(run):
  folder, result = run
  assert result["steps"] == 3 * 6
  assert 0.3 < result["test_accuracy"] <= 1
  assert result["nonfinite_samples"] == 0
  ids, scores = gm.ScoreLedger(folder / "ledger").matrix("score")
  np.testing.assert_array_equal(ids, np.arange(1437))
  assert scores.shape == (1437, 3)
  assert np.isfinite(scores).all()
  _, weights = gm.ScoreLedger(folder / "ledger").matrix("weight")
  # Six batches an epoch, the weights of each sum to one.
  np.testing.assert_allclose(weights.sum(axis=0), 6, rtol=1e-5)
  assert list((folder / "tensorboard").glob("events.*"))
  rows = writers.read_metrics(folder / "metrics.jsonl")
  assert sum("test_accuracy" in row for row in rows) == 4
  assert sum("train_loss" in row for row in rows) == 18


def test_a_filter_straight_from_a_ledger_knows_its_data(
  make_config, run, tmp_path
):
  folder, _ = run
  selection = gm.select(gm.ScoreLedger(folder / "ledger"), binarize="threshold")
  path = gm.export.write_parquet(tmp_path / "selection.parquet", selection)
  filtered = {"data.filter": str(path)}
  found = data_lib.load_data(make_config(**filtered)).indices
  np.testing.assert_array_equal(found, selection.kept_ids)
  with pytest.raises(ValueError, match=r"noise 0\.5 .* noise 0\.2"):
    data_lib.load_data(make_config(**{**filtered, "noise.rate": 0.2}))


@pytest.mark.slow
def test_another_reference_at_the_same_path_is_noticed(
  make_config, tmp_path, monkeypatch
):
  def teach(seed):
    config = make_config(num_epochs=1, seed=seed, **{"noise.rate": 0.0})
    train.train_and_evaluate(config, tmp_path / f"teacher{seed}")

  with tiny.nudged():
    teach(0)
    teach(1)
  (tmp_path / "teacher0").rename(tmp_path / "reference")
  config = make_config(
    **{
      "method": "grad_mimic",
      "mimic.reference": str(tmp_path / "reference"),
      "mimic.force": True,  # the other one's basin is foreign, too
      "num_epochs": 1,
    }
  )
  train.train_and_evaluate(config, tmp_path / "finished")
  (tmp_path / "reference").rename(tmp_path / "teacher0")
  (tmp_path / "teacher1").rename(tmp_path / "reference")
  with pytest.raises(ValueError, match="another reference"):
    train.train_and_evaluate(config, tmp_path / "finished")
  # Nor does an unfinished run go on toward it.
  (tmp_path / "finished" / "result.json").unlink()
  with pytest.raises(ValueError, match="was made with other inputs"):
    train.train_and_evaluate(config, tmp_path / "finished")


def test_an_unfinished_reference_is_refused(make_config, reference, tmp_path):
  shutil.copytree(reference, tmp_path / "reference")
  (tmp_path / "reference" / "result.json").unlink()
  for name in ("reference", "none"):
    config = make_config(
      **{"method": "grad_mimic", "mimic.reference": str(tmp_path / name)}
    )
    with pytest.raises(FileNotFoundError, match="no finished run"):
      train.train_and_evaluate(config, tmp_path / "run")


def test_a_plain_step_survives_a_broken_sample(make_config):
  def losses_fn(params, batch):
    # The second loss and its derivatives are infinite times zero.
    infinite = jnp.where(jnp.arange(3) == 1, jnp.inf, 1.0)
    return batch["x"] * params["w"] * infinite + params["b"], batch["x"] > 0

  tx = optax.sgd(1.0)
  batch = {"x": jnp.array([1.0, 0.0, 3.0]), "mask": jnp.ones(3, bool)}
  state = steps.init_state({"w": jnp.ones([]), "b": jnp.ones([])}, tx)
  step = steps.make_train_step(losses_fn, tx, None, make_config().mimic)
  state, output = step(state, None, batch)
  assert int(output.metrics["nonfinite"]) == 1
  assert float(output.metrics["loss"]) == pytest.approx((2 + 4) / 2)
  assert float(state.params["b"]) == 0  # exact: nothing broken reaches it
  assert float(state.params["w"]) == 1  # reached: left as it was


@pytest.mark.parametrize(
  "field", ["batch_size", "num_epochs", "checkpoint.every_epochs"]
)
def test_counts_of_zero_are_refused(make_config, tmp_path, field):
  with pytest.raises(ValueError, match=f"config.{field} is 0; expected at"):
    train.train_and_evaluate(make_config(**{field: 0}), tmp_path / "run")


def test_a_filter_that_is_not_there(make_config, tmp_path):
  config = make_config(**{"data.filter": str(tmp_path / "none.npy")})
  with pytest.raises(FileNotFoundError, match=r"a \.npy file"):
    train.train_and_evaluate(config, tmp_path / "run")


def test_a_damaged_config_file_is_named(make_config, tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is damaged"):
    train.train_and_evaluate(make_config(), tmp_path)


def test_a_folder_with_other_things_is_refused(make_config, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
    train.train_and_evaluate(make_config(), tmp_path)


def test_an_unknown_config_field_is_named(make_config, tmp_path):
  config = make_config().unlock()
  config.mimic.temprature = 0.1
  with pytest.raises(ValueError, match=r"unknown config field 'mimic\.tempra"):
    train.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("method", "grad_mimick", "expected one of sgd, grad_mimic.*agra"),
    ("method", "grad_mimic", "needs a reference"),
    ("model.name", "alexnet", "expected one of mlp, convnet"),
    ("optimizer.name", "lion", "expected 'adamw' or 'sgd'"),
    ("optimizer.schedule", "step", "expected 'cosine' or 'constant'"),
    ("noise.rate", 1.0, "noise rate"),
    ("data.name", "cifar10", "not prepared"),
  ],
)
def test_what_a_beginner_gets_wrong(
  make_config, tmp_path, field, value, message
):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train_and_evaluate(make_config(**{field: value}), tmp_path / "run")


def test_a_reference_of_another_architecture(make_config, tmp_path, reference):
  config = make_config(
    **{
      "method": "grad_mimic",
      "mimic.reference": reference,
      "model.widths": (16, 24),
    }
  )
  with pytest.raises(
    ValueError, match=r"body/1/bias has shape \(16,\) there, expected \(24,\)"
  ):
    train.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.slow
def test_the_convnet_trains(make_config, tmp_path):
  config = make_config(
    num_epochs=1,
    **{"model.name": "convnet", "model.widths": (8, 16), "noise.rate": 0.0},
  )
  result = train.train_and_evaluate(config, tmp_path / "run")
  assert np.isfinite(result["test_loss"])


def test_a_filter_trains_on_the_kept_samples_only(make_config, tmp_path):
  kept = np.arange(0, 1437, 3)
  np.save(tmp_path / "kept.npy", kept)
  config = make_config(
    num_epochs=1, **{"data.filter": str(tmp_path / "kept.npy")}
  )
  result = train.train_and_evaluate(config, tmp_path / "run")
  assert result["train_samples"] == len(kept)
  assert result["steps"] == 2


def test_metrics_of_an_interrupted_run_are_dropped(tmp_path):
  writer = writers.MetricsWriter(tmp_path, first_step=0)
  for step in range(4):
    writer.write(step, {"loss": float(step)})
  writer.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "lo')  # the kill came in the middle of a line
  writer = writers.MetricsWriter(tmp_path, first_step=2)
  writer.write(2, {"loss": 20.0})
  writer.close()
  rows = writers.read_metrics(tmp_path / "metrics.jsonl")
  assert rows == [
    {"step": 0, "loss": 0.0},
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 20.0},
  ]
  assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_images_are_resized_as_the_config_has_it(make_config):
  data = data_lib.load_data(make_config(**{"data.image_size": 4}))
  assert data.train.shape == (4, 4, 1)
  assert data.test.shape == (4, 4, 1)


def test_a_run_opens_with_what_it_will_do_and_ends_with_paths(
  make_config, tmp_path, capfd
):
  folder = tmp_path / "run"
  train.main(make_config(num_epochs=1), str(folder))
  out, told = capfd.readouterr()
  assert out.startswith("{")
  assert out.endswith("}\n")  # the result alone: another program may read it
  told = told.splitlines()
  assert told[0] == "train by sgd"
  text = "\n".join(told)
  for line in (
    r"  data     .+, [\d,]+ samples.*",
    r"  model    .+, [\d,]+ parameters",
    r"  devices  \d x .+",
    r"  length   6 steps of \d+ samples, 1 epoch of 6 steps",
    r"  look at  .+/run/metrics\.jsonl; or: tensorboard --logdir .+/run",
  ):
    assert re.search(f"^{line}$", text, re.M), (line, text)
  assert "compiling" in told
  assert any(line.startswith("step 6 of 6: test loss") for line in told)
  assert told[-1] == f"  {folder}/metrics.jsonl"
