"""What a selection must show on digits; `-s` prints what was measured."""

import functools
import json

import numpy as np
import pytest

import gradmimic_jax as gm
from configs import digits
from experiments.data import noise
from experiments.selection import runs as select_lib
from experiments.studies import plan, runner as study
from experiments.tasks.classification import data as data_lib
from experiments.training import trainer as train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]
BARS = {"f1": 0.95, "clean_fraction": 0.03, "calibration_error": 0.05}


RETRAINED = 0.5


@pytest.fixture(scope="module")
def studied(tmp_path_factory, digits_dir):
  """`studied(rate)`: a study of grad_mimic: its config, folder and summary.

  At one rate with two seeds and with runs on what was kept.
  """
  root = tmp_path_factory.mktemp("studies")

  @functools.cache
  def run(rate):
    seeds = 2 if rate == RETRAINED else 1
    config = digits.get_config(f"rate={rate},seeds={seeds}").unlock()
    config.data.data_dir = digits_dir
    config.mesh.data = 1  # of the eight virtual devices
    config.study.methods = ("grad_mimic",)
    config.study.retrain = rate == RETRAINED
    config.select.binarize, config.select.aggregate = "auto", "label_model"
    config = config.lock()
    return config, root / str(rate), study.run_study(config, root / str(rate))

  return run


def found_in(run):
  """The selection of a run's ledger, and which labels are wrong."""
  truth, _ = noise.load(run / data_lib.LABELS_FILE)
  ledger = select_lib.load_ledger(run)
  wrong = truth.is_noisy[ledger.matrix()[0]]
  return gm.select(ledger), gm.select(ledger, binarize="gmm"), wrong


@pytest.mark.parametrize("rate", [0.0, RETRAINED, 0.7])
def test_a_selection_finds_what_is_wrong(studied, rate):
  config, folder, _ = studied(rate)
  for seed in config.study.seeds:
    selection, by_gmm, wrong = found_in(folder / f"seed{seed}" / "grad_mimic")
    quality = gm.dataset_quality(selection)
    clean = 1 - wrong.mean()
    measured = {
      "rate": rate,
      "seed": seed,
      "clean": clean,
      "clean_fraction": quality.clean_fraction,
      "low": quality.low,
      "high": quality.high,
      "flagged": (~selection.keep).mean(),
      "f1": gm.metrics.f1(~selection.keep, wrong),
      "f1_gmm": gm.metrics.f1(~by_gmm.keep, wrong),
      "calibration_error": gm.metrics.calibration_error(
        selection.keep_probability, ~wrong
      ),
    }
    print(json.dumps({k: round(float(v), 4) for k, v in measured.items()}))
    assert abs(quality.clean_fraction - clean) <= BARS["clean_fraction"]
    assert quality.low <= clean <= quality.high
    assert measured["calibration_error"] <= BARS["calibration_error"]
    if rate == 0:
      assert measured["flagged"] <= 0.02
    else:
      assert measured["f1"] >= BARS["f1"]
      assert measured["f1_gmm"] >= BARS["f1"]


def test_what_is_kept_trains_as_well_as_what_is_clean(studied):
  config, root, summary = studied(RETRAINED)
  clean = []
  for seed in config.study.seeds:
    folder = root / f"seed{seed}"
    truth, _ = noise.load(folder / "grad_mimic" / data_lib.LABELS_FILE)
    file = gm.export.write_npy(
      folder / "clean.npy", np.flatnonzero(~truth.is_noisy)
    )
    only = plan.derived(
      config, seed=seed, method="sgd", **{"data.filter": str(file)}
    )
    clean.append(train.train_and_evaluate(only, folder / "clean"))
  kept, clean = (
    [run["test_accuracy"] for run in runs]
    for runs in (summary["runs"]["retrained_grad_mimic"], clean)
  )
  print(json.dumps({"kept": kept, "clean": clean}))
  assert np.mean(kept) >= np.mean(clean) - 0.01
