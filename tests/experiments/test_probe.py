"""A grid of heads: the general loop's numbers, and work that is shared."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

import gradmimic_jax as gm
from configs import label_noise
from experiments import checkpoint, claims, heads, models, probe, study, train

ROOT = pathlib.Path(__file__).parents[2]
RATE = 0.4


@pytest.fixture
def make_grid(digits_dir):
  """`make_grid(**{"dotted.field": value})`: heads on the digits' pixels."""

  def make(**overrides):
    config = label_noise.get_config("seeds=2").unlock()
    config.update_from_flattened_dict(
      {
        "batch_size": 256,  # the last of six batches is padded
        "num_epochs": 2,
        "eval_batch_size": 512,
        "data.data_dir": digits_dir,
        "data.image_size": 0,
        "data.name": "digits",
        "mimic.temperature": 0.5,
        "model.name": "mlp",
        "model.widths": (),
        "optimizer.learning_rate": 1e-2,
        "probe.binarizers": ("threshold",),
        "probe.rates": (0.2, RATE),
        "study.methods": ("sgd", "grad_mimic", "rho"),
        **overrides,
      }
    )
    return config.lock()

  return make


def general(config, seed, **overrides):
  """The config of the general loop's run for one run of the grid."""
  copy = study.derived(config, seed=seed, **overrides).unlock()
  del copy.probe
  copy.checkpoint.every_epochs = 100
  return copy.lock()


def samples_of(folder, method, seed, rate):
  """A run's arrays, and what the cell tells of it."""
  for file in (folder / "cells").glob(f"{method}_*.json"):
    cell = json.loads(file.read_text())
    for run in cell["runs"]:
      if cell["method"] == method and (run["seed"], run["rate"]) == (
        seed,
        rate,
      ):
        return np.load(folder / "samples" / run["samples"]), run
  raise AssertionError(f"no run of {method}")


def assert_equals_the_general_loop(grid, folder, tmp_path, names):
  seed = 1
  reference = tmp_path / "reference"
  overrides = study.reference_overrides(grid, seed)
  train.train_and_evaluate(general(grid, **overrides), reference)
  for method in names:
    config = general(
      grid,
      seed,
      method=method,
      **{"noise.rate": RATE, "mimic.reference": str(reference)},
    )
    result = train.train_and_evaluate(config, tmp_path / method)
    arrays, run = samples_of(folder, method, seed, RATE)
    _, like = models.create(
      config.model, input_shape=(8, 8, 1), num_classes=10, seed=0
    )
    params = checkpoint.load_params(tmp_path / method, like)["head"]
    for name in ("kernel", "bias"):
      np.testing.assert_allclose(
        arrays[name], params[name], atol=1e-5, rtol=0, err_msg=method
      )
    curves = run["curves"]
    assert curves["test_accuracy"][-1] == pytest.approx(result["test_accuracy"])
    assert curves["test_loss"][-1] == pytest.approx(
      result["test_loss"], rel=1e-5
    )
    if method == "sgd":
      assert "score" not in arrays
      continue
    ledger = gm.ScoreLedger(tmp_path / method / train.LEDGER_FOLDER)
    for field in ("score", "weight", "loss"):
      ids, values = ledger.matrix(field)
      np.testing.assert_allclose(
        arrays[field][ids], values, atol=1e-4, rtol=1e-4, err_msg=method
      )
    unseen = np.setdiff1d(np.arange(len(arrays["score"])), ids)
    assert np.isnan(arrays["score"][unseen]).all()


def test_equals_the_general_loop(make_grid, tmp_path):
  grid, folder = make_grid(), tmp_path / "grid"
  probe.run_grid(grid, folder)
  assert_equals_the_general_loop(
    grid, folder, tmp_path, ("sgd", "grad_mimic", "rho")
  )


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["head/kernel", None])
def test_every_method_equals_the_general_loop(make_grid, tmp_path, layers):
  names = (
    "grad_mimic_outputs",
    "influence",
    "influence_test_leak",
    "agra",
    "agra_skip",
    "rho_topk",
    "rho_as_published",
    "grand",
    "grad_match_separable",
    "grad_match_least_squares",
    "grad_match_omp",
    "random",
    "distillation",
  )
  grid = make_grid(**{"study.methods": names, "mimic.layers": layers})
  folder = tmp_path / "grid"
  probe.run_grid(grid, folder)
  assert_equals_the_general_loop(
    grid, folder, tmp_path, [name for name in names if name != "distillation"]
  )
