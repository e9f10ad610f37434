"""The jobs of data work: score, select, report; and filters in training."""

import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import gradmimic_jax as gm
from configs import (
  report as report_config,
  score as score_config,
  select as select_config,
)
from experiments import (
  checkpoint,
  filters,
  models,
  report,
  score,
  select,
  train,
  workdir,
)
from experiments.data import noise, pipeline
from experiments.tasks import classification

ROOT = pathlib.Path(__file__).parents[2]
BATCH = 200  # 8 batches a pass, the last one padded


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture
def learner(make_config, runs):
  """A finished run on noisy labels, beside its reference."""
  clean = make_config(**{"noise.rate": 0.0})
  train.train_and_evaluate(clean, runs / "reference")
  train.train_and_evaluate(make_config(), runs / "learner")
  return runs / "learner"


@pytest.fixture
def score_job(learner, runs):
  """The config that scores with both checkpoints of the learner."""
  config = score_config.get_config(f"learner={learner}").unlock()
  config.mimic.reference = str(runs / "reference")
  config.batch_size, config.flush_every = BATCH, 3
  return config.lock()


@pytest.fixture
def scored(score_job, runs):
  folder = runs / "scored"
  score.score_dataset(score_job, folder)
  return folder


def test_scores_are_those_of_single_gradients(score_job, scored, learner, runs):
  ids, scores = gm.ScoreLedger(scored / "ledger").matrix()
  np.testing.assert_array_equal(ids, np.arange(1437))
  assert scores.shape == (1437, 2)
  assert np.isfinite(scores).all()
  run = score.learners_config(score_job)
  data = train.load_data(run)
  apply, params = models.create(
    run.model, input_shape=(8, 8, 1), num_classes=10, seed=run.seed
  )
  losses_fn = classification.make_losses_fn(apply)
  (batch,) = pipeline.eval_batches(
    data.train.images,
    data.labels.labels,
    batch_size=40,
    indices=np.arange(1397, 1437),
    mean=data.mean,
    std=data.std,
  )
  reference = checkpoint.load_params(runs / "reference", params)
  for epoch, step in enumerate(checkpoint.steps(learner)):
    theirs = checkpoint.load_params(learner, params, step=step)

    def loss_of_one(tree, sample):
      return losses_fn(tree, jax.tree.map(lambda x: x[None], sample))[0][0]

    rows = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0))(theirs, batch)
    rows, gap = (
      np.concatenate(
        [np.float64(leaf).reshape(n, -1) for leaf in jax.tree.leaves(tree)], 1
      )
      for tree, n in (
        (rows, 40),
        (jax.tree.map(lambda r, p: r - p, reference, theirs), 1),
      )
    )
    expected = -(rows @ gap[0]) / np.linalg.norm(gap)
    np.testing.assert_allclose(
      scores[1397:, epoch], expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
  "stop_at", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 13))]
)
def test_an_interrupted_pass_ends_with_the_same_ledger(
  score_job, scored, tmp_path, monkeypatch, stop_at
):
  class InterruptedPassError(Exception):
    pass

  whole = score._Pass._batches
  count = 0

  def batches(self, first):
    nonlocal count
    for batch in whole(self, first):
      if count == stop_at:
        raise InterruptedPassError
      count += 1
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(score._Pass, "_batches", batches)
    with pytest.raises(InterruptedPassError):
      score.score_dataset(score_job, tmp_path / "run")
  if stop_at >= 3:
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert progress["batches"] == {4: 3, 13: 12}[stop_at]
  score.score_dataset(score_job, tmp_path / "run")
  assert (
    gm.ScoreLedger(tmp_path / "run" / "ledger")
    .table()
    .equals(gm.ScoreLedger(scored / "ledger").table())
  )


@pytest.mark.slow
def test_a_killed_pass_ends_with_the_same_ledger(score_job, tmp_path):
  command = [
    sys.executable,
    "-m",
    "experiments.score",
    f"--config=configs/score.py:learner={score_job.learner}",
    f"--config.mimic.reference={score_job.mimic.reference}",
    "--config.batch_size=4",
    "--config.flush_every=5",
  ]
  quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
  subprocess.run([*command, f"--workdir={tmp_path}/whole"], check=True, **quiet)
  for flushes in (1, 30, 70):
    process = subprocess.Popen([*command, f"--workdir={tmp_path}/run"], **quiet)
    while process.poll() is None:
      files = list((tmp_path / "run" / "ledger").glob("*.parquet"))
      if len(files) >= flushes:
        break
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  subprocess.run([*command, f"--workdir={tmp_path}/run"], check=True, **quiet)
  one, other = (
    gm.ScoreLedger(tmp_path / name / "ledger").table()
    for name in ("whole", "run")
  )
  assert len(one) == 2 * 1437
  assert one.equals(other)


def test_a_pass_needs_a_learner_and_scores(score_job, tmp_path):
  with pytest.raises(FileNotFoundError, match="expected the workdir of a run"):
    score.score_dataset(score_config.get_config(), tmp_path / "run")
  config = score_job.copy_and_resolve_references().unlock()
  config.method = "sgd"
  with pytest.raises(ValueError, match="gives no scores"):
    score.score_dataset(config.lock(), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_from_a_ledger_to_a_filter_to_training(
  scored, make_config, tmp_path, caplog
):
  config = select_config.get_config(f"run={scored}").unlock()
  config.select.binarize = "gmm"  # "auto" finds that they are too much alike
  manifest = select.select_run(config, tmp_path / "filter")
  selection = gm.select(
    gm.ScoreLedger(scored / "ledger"), binarize="gmm", aggregate="label_model"
  )
  assert 0.5 < selection.kept_fraction < 0.7
  assert manifest["kept"] == selection.keep.sum()
  assert json.loads((tmp_path / "filter" / "manifest.json").read_text()) == (
    manifest
  )
  kept = set(selection.kept_ids.tolist())
  for name in manifest["sha256"]:
    path = str(tmp_path / "filter" / name)
    indices = train.load_data(make_config(**{"data.filter": path})).indices
    assert set(indices.tolist()) == kept
    assert len(indices) == len(kept)
  assert "not in" not in caplog.text


def test_files_of_other_runs_are_refused(scored, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(scored, run)
  own = select.fingerprints_of(run)
  assert own == gm.ScoreLedger(run / "ledger").fingerprints

  def refused(name, *words):
    with pytest.raises(ValueError, match=name) as caught:
      select.fingerprints_of(run)
    assert all(word in str(caught.value) for word in words)
    shutil.copy(scored / name, run / name)

  labels, ids = noise.load(run / "labels.npz")
  others = noise.apply_noise(
    labels.clean_labels, rate=0.5, num_classes=10, seed=9
  )
  noise.save(run / "labels.npz", others, ids)
  refused("labels.npz", own["labels"].split()[-1])
  for name, change in (
    ("run.json", {"seed": 5}),
    ("config.json", {"batch_size": 7}),
    ("result.json", {"fingerprints": {**own, "learner": "0" * 16}}),
  ):
    found = workdir.read_json(run / name)
    workdir.write_json(run / name, found | change, sealed=True)
    refused(name)
  assert select.fingerprints_of(run) == own


class TestFilters:
  """Filters in `config.data.filter`."""

  def indices(self, make_config, path, **options):
    return train.load_data(
      make_config(**{"data.filter": str(path), **options})
    ).indices

  def test_missing_ids_are_counted(self, make_config, tmp_path, caplog):
    gm.export.write_npy(tmp_path / "a.npy", [3, 5, 1436, 1437, 9000])
    with caplog.at_level(logging.WARNING, logger="absl"):
      found = self.indices(make_config, tmp_path / "a.npy")
    assert found.tolist() == [3, 5, 1436]
    assert "2 of the 5 ids" in caplog.text

  def test_the_sets_own_ids(self, make_config, tmp_path):
    ids = np.array(["train_00007", "train_00002", "elsewhere"])
    scores = np.array([[1.0], [2.0], [-1.0]])
    gm.export.write_csv(
      tmp_path / "a.csv", gm.select(scores, ids=ids, binarize="threshold")
    )
    assert self.indices(make_config, tmp_path / "a.csv").tolist() == [2, 7]

  def test_other_data_are_refused_by_name(self, make_config, tmp_path):
    config = make_config()
    data = train.load_data(config)
    prints = filters.fingerprints(config, data.train, data.labels)
    gm.export.write_npy(tmp_path / "a.npy", [1, 2], fingerprints=prints)
    assert self.indices(make_config, tmp_path / "a.npy").tolist() == [1, 2]
    # Other wrong labels, and other samples.
    with pytest.raises(ValueError, match=r"symmetric noise 0\.5 .*noise 0\.2"):
      self.indices(make_config, tmp_path / "a.npy", **{"noise.rate": 0.2})
    with pytest.raises(
      ValueError, match=r"'digits train \w+' in the one and 'digits test \w+'"
    ):
      self.indices(
        make_config, tmp_path / "a.npy", **{"data.train_split": "test"}
      )

  def test_what_is_no_filter(self, make_config, tmp_path):
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.npy").write_text("1")
    np.save(tmp_path / "c.npy", np.array([5000]))
    np.save(tmp_path / "d.npy", np.zeros((2, 2), np.int64))
    for name, match in (
      ("a.txt", r"ends with one of \.npy"),
      ("b.npy", "no NumPy file"),
      ("c.npy", "keeps none of the 1437 samples"),
      ("d.npy", r"shape \(2, 2\)"),
    ):
      with pytest.raises(ValueError, match=match):
        self.indices(make_config, tmp_path / name)


def test_the_page_of_a_run(scored, tmp_path):
  config = report_config.get_config(f"run={scored}").unlock()
  config.select.binarize = "gmm"
  path = report.report_run(config, tmp_path / "page")
  found = json.loads(path.with_suffix(".json").read_text())
  assert found["title"] == "digits train, symmetric noise 0.5"
  assert found["fingerprints"]["dataset"].startswith("digits train ")
  assert found["truth"]["f1"] > 0.5
  # The reference was trained on the true labels: it suggests many of them.
  counts = np.array(found["matrix"]["counts"])
  assert counts.sum() == 1437
  assert len(found["histograms"]) == 2
  assert path.read_text().count("<img") == 72
  config = report_config.get_config(f"run={tmp_path}")
  with pytest.raises(FileNotFoundError, match="there is no ledger in it"):
    report.report_run(config, tmp_path / "other")
