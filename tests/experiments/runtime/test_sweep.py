"""Jobs that build on each other: tuning, shared references, tables, costs."""

import json
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest

import gradmimic_jax as gm
from configs import compare as results_config, sweep as sweep_config
from experiments import tasks
from experiments.benchmarks import methods as costs
from experiments.data import noise
from experiments.runtime import preemption, sweep, tables
from experiments.studies import (
  comparison as results,
  plan,
  published,
  runner,
  settings as tuning,
  tuning as tune,
)
from experiments.tasks.classification import data as data_lib
from experiments.training import trainer as train


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_cells_there_are_make_a_sweep(name):
  labels = ",labels=table.csv" if name == "cifar10" else ""
  cells = sweep.parse(sweep_config.get_config(f"study={name}{labels}").cells)
  names = [cell.name for cell in cells]
  assert names[0] == "backbone"
  assert names[-1] == "results"
  # What is measured is in the tables.
  measured = {n for n in names if n.startswith(("probe_", "finetune_"))}
  assert measured <= set(cells[-1].needs)
  assert ("probe_worst" in names) == bool(labels)


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (("no colon",), "expected 'name: job --config"),
    (("a: fly --config=x",), "'fly'; expected one of train"),
    (("a: train --config=x", "a: train --config=x"), "'a' twice"),
    (("a: train --config={b}",), "needs 'b', which does not come before"),
  ],
)
def test_cells_that_make_no_sweep(lines, message):
  with pytest.raises(ValueError, match=message):
    sweep.parse(lines)


def sweep_of(*lines):
  config = sweep_config.get_config().unlock()
  config.cells = lines
  return config.lock()


def test_commands_are_printed_and_nothing_runs(tmp_path, capsys):
  config = sweep_of(
    "a: train --config=configs/digits.py",
    'b: study --config=configs/digits.py "--config.mimic.outputs={a}/x y.npy"',
  ).unlock()
  config.run = False
  sweep.run_sweep(config.lock(), tmp_path / "sweep")
  first, second = capsys.readouterr().out.splitlines()
  folder = tmp_path / "sweep"
  assert first == (
    f"python -m experiments.train --workdir={folder}/a"
    " --config=configs/digits.py"
  )
  assert f"'--config.mimic.outputs={folder}/a/x y.npy'" in second
  assert not folder.exists()


def test_a_failed_cell_is_told_and_run_again(tmp_path, monkeypatch):
  folder = tmp_path / "sweep"
  line = "a: train --config=configs/digits.py"
  fails = "import sys; sys.exit('error: no field data.nam')"
  monkeypatch.setattr(sweep, "_arguments", lambda *_: ["-S", "-c", fails])
  with pytest.raises(ChildProcessError, match=r"a failed: error: no field"):
    sweep.run_sweep(sweep_of(f"{line} --config.data.nam=cifar10"), folder)
  assert "Traceback" not in (folder / "a.log").read_text()
  assert not (folder / "a.json").exists()
  # What a sound job takes for itself is not asked here.
  monkeypatch.setattr(sweep, "_arguments", lambda *_: ["-S", "-c", ""])
  for _ in range(2):
    sweep.run_sweep(sweep_of(line), folder)
    monkeypatch.setattr(sweep, "_run", None)  # can't be called
  assert json.loads((folder / "a.json").read_text())["seconds"] >= 0


LEAVING = """
import pathlib, signal, sys
def leave(*_):
  pathlib.Path(sys.argv[1]).write_text("saved")
  sys.exit()
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1]).touch()
signal.pause()
"""


def test_a_sweep_that_is_asked_to_leave_asks_its_job(tmp_path):
  """And waits until that has saved."""
  file = tmp_path / "saved"

  def ask(*_):
    raise preemption.PreemptedError("asked")

  def when_started():
    while not file.exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  before = signal.signal(signal.SIGTERM, ask)
  try:
    threading.Thread(target=when_started).start()
    with pytest.raises(preemption.PreemptedError):
      sweep._run([sys.executable, "-c", LEAVING, str(file)], tmp_path / "log")
  finally:
    signal.signal(signal.SIGTERM, before)
  assert file.read_text() == "saved"


def test_a_cell_that_was_asked_to_leave_is_not_done(tmp_path, monkeypatch):
  """Though a job that leaves has status 0 where nobody asks for another."""
  monkeypatch.setattr(sweep, "_arguments", lambda *_: ["-c", LEFT])
  folder = tmp_path / "sweep"
  with pytest.raises(preemption.PreemptedError, match="a was asked to leave"):
    sweep.run_sweep(sweep_of("a: train --config=x"), folder)
  assert not (folder / "a.json").exists()
  assert not (folder / "a.claim").exists()


LEFT = (
  "import os, sys; sys.exit(int(os.environ['GRADMIMIC_STATUS_OF_SIGTERM']))"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("references")


@pytest.fixture
def make_study(make_config, shared):
  def make(**overrides):
    return make_config(
      **{
        "num_epochs": 2,
        "study.methods": ("sgd", "grad_mimic"),
        "study.retrain": False,
        "study.references": str(shared),
        "study.binarizers": ("gmm", "weight"),
        "study.tune.learning_rates": (1e-4, 1e-2),
        "study.tune.weighting_values": (0.9,),
        **overrides,
      }
    )

  return make


@pytest.mark.slow
def test_tuning_tries_all_and_a_study_takes_the_best(make_study, tmp_path):
  config = make_study(**{"data.train_split": "train[:1000]"})
  best = tune.tune(config, tmp_path / "tuning")
  assert best["sgd"]["settings"] == 2
  assert best["grad_mimic"]["settings"] == 2
  tried = (tmp_path / "tuning" / tune.TABLE_FILE).read_text().splitlines()
  accuracies = [
    float(line.split(",")[2]) for line in tried[1:] if line.startswith("sgd")
  ]
  assert best["sgd"]["accuracy"] == max(accuracies)

  path = str(tmp_path / "tuning" / tune.TUNED_FILE)
  chosen = plan.plan_runs(make_study(**{"study.tuned": path}))
  (ours,) = [run for run in chosen if run.name == "grad_mimic"]
  assert ours.overrides == {"method": "grad_mimic", **best["grad_mimic"]["set"]}


def test_tuned_settings_that_are_none(make_study, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tuned\.json of"):
    tuning.read(str(tmp_path / "tuned.json"))
  (tmp_path / "tuned.json").write_text('{"sgdd": {"set": {}}}')
  with pytest.raises(ValueError, match="no method of that name"):
    tuning.read(str(tmp_path / "tuned.json"))
  (tmp_path / "tuned.json").write_text("[1]")
  with pytest.raises(ValueError, match="can't be read"):
    tuning.read(str(tmp_path / "tuned.json"))
  with pytest.raises(ValueError, match="learning_rates is empty"):
    tune.tune(
      make_study(**{"study.tune.learning_rates": ()}), tmp_path / "tuning"
    )


@pytest.mark.slow
def test_studies_share_a_reference_and_their_tables(
  make_study, shared, tmp_path, monkeypatch
):
  """Two noise rates, subsets, costs; and one page about all of it."""
  folders = []
  for rate in (0.2, 0.5):
    config = make_study(
      **{
        "noise.rate": rate,
        "study.keep_fractions": (0.5,) if rate == 0.5 else (),
        "mimic.fraction": 0.5 + rate / 10,  # nothing of the reference's
      }
    )
    folders.append(str(tmp_path / f"study{rate}"))
    summary = runner.run_study(config, folders[-1])
  assert len([p for p in shared.iterdir() if p.is_dir()]) >= 1
  first, second = (f"{folder}/seed0/reference" for folder in folders)
  assert (tmp_path / first).resolve() == (tmp_path / second).resolve()
  rows = {row["method"]: row for row in summary["rows"]}
  half = rows["keep_0.5_grad_mimic"]
  assert (half["chosen_by"], half["keep"]) == ("grad_mimic", 0.5)
  assert abs(half["train_samples"] - 1437 / 2) <= 1
  kept = np.load(f"{folders[-1]}/seed0/keep_0.5_grad_mimic.npy")
  ids, scores = gm.ScoreLedger(
    f"{folders[-1]}/seed0/grad_mimic/{train.LEDGER_FOLDER}"
  ).matrix("score")
  labels, _ = noise.load(
    tmp_path / folders[-1] / "seed0" / "grad_mimic" / data_lib.LABELS_FILE
  )
  assert labels.is_noisy[kept].mean() < 0.3  # by chance it is .5
  assert set(kept) <= set(ids)
  assert scores.shape == (1437, 2)
  assert rows["grad_mimic"]["auroc"] > 0.8
  assert rows["grad_mimic"]["f1_gmm"] > 0.6

  monkeypatch.setattr(costs, "_ROUNDS", 2)
  sizes = (128, 256)
  config = make_study(
    **{"mimic.reference": first, "study.cost_batch_sizes": sizes}
  ).unlock()
  config.benchmark = "methods"
  costs.measure(config.lock(), tmp_path / "costs")
  measured = results.load_costs(tmp_path / "costs" / costs.RESULT_FILE)
  assert measured["batch_size"] == sizes[0]
  assert measured["methods"]["sgd"]["time"] == pytest.approx(1)
  assert measured["methods"]["grad_mimic"]["memory"] > 0

  config = results_config.get_config().unlock()
  config.finetune = tuple(folders)
  config.costs = str(tmp_path / "costs")
  config.ablations = (f"half={folders[1]}",)
  page = results.write(config.lock(), tmp_path / "results").read_text()
  accuracy = tables.accuracy(rows["grad_mimic"])
  assert page.count(accuracy) >= 2  # in the table, and among the ablations
  assert "| symmetric 0.50 | grad_mimic |" in page  # of the subsets
  (correlation,) = re.findall(r"r with the noise \|  \| (\S+)", page)
  assert float(correlation) == pytest.approx(-1)  # of two points


def test_published_numbers():
  assert published.find("heads", "cifar10", "grad_mimic", 0.5) == 0.9392
  assert published.find("heads", "cifar10", "reference", 0.5) == 0.9418
  assert published.find("heads", "cifar10", "rho", 0.5) is None
  assert published.find("heads", "digits", "sgd", 0.5) is None
  assert published.find("finetuned", "cifar100", "grad_mimic", 0.6) == 0.2402
  assert published.find("finetuned", "cifar10", "sgd", 0.6) is None
  assert published.find("f1", "dtd", "gmm", 0.6) == 0.96
  assert published.find("f1", "dtd", "gmm", 0.55) is None


def test_results_of_nothing(tmp_path):
  config = results_config.get_config()
  with pytest.raises(ValueError, match="at least one folder"):
    results.write(config, tmp_path)
  config = config.unlock()
  config.probe = (str(tmp_path),)
  with pytest.raises(FileNotFoundError, match="a job that has finished"):
    results.write(config.lock(), tmp_path)


def test_a_reference_of_the_test_split_is_asked_for_by_name(make_study):
  config = make_study(**{"study.reference.test_leak": True})
  make = tasks.get(config).reference_overrides
  overrides = make(config, 0)
  assert overrides["data.train_split"] == "test"
  config = make_study(**{"study.reference.noise_rate": 0.25})
  assert make(config, 0)["noise.rate"] == 0.25
