"""The jobs of data work: score, select, report; and filters in training."""

import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest

import gradmimic_jax as gm
from configs import (
  report as report_config,
  score as score_config,
  select as select_config,
)
from experiments import models
from experiments.data import filters, noise, pipeline
from experiments.reporting import page as report, tables
from experiments.runtime import checkpoint, workdir
from experiments.selection import files as select
from experiments.tasks.classification import (
  data as data_lib,
  losses as classification,
)
from experiments.training import scoring as score, trainer as train

ROOT = pathlib.Path(__file__).parents[3]
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
  data = data_lib.load_data(run)
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
    indices = data_lib.load_data(make_config(**{"data.filter": path})).indices
    assert set(indices.tolist()) == kept
    assert len(indices) == len(kept)
  assert "not in" not in caplog.text


@pytest.fixture(scope="module")
def two_filters(tmp_path_factory):
  """The files of two selections of one data set, each with its manifest."""
  rng = np.random.default_rng(0)
  folders = []
  for name in ("one", "two"):
    folder = tmp_path_factory.mktemp(name)
    selection = gm.select(rng.normal(size=(50, 3)), binarize="threshold")
    select.write(folder, selection, {"dataset": "digits"})
    folders.append(folder)
  return folders


@pytest.mark.parametrize(
  "name", [select.KEPT_FILE, select.SELECTION_FILE, select.CSV_FILE]
)
def test_another_filters_file_in_its_place_is_named(two_filters, name):
  # Whole, with its own checksum beside it, and of the same data.
  one, two = two_filters
  filters.check_manifest(one / name)
  names = [n for n in (name, name + ".json") if (one / n).exists()]
  before = [(one / n).read_bytes() for n in names]
  for n in names:
    (one / n).write_bytes((two / n).read_bytes())
  with pytest.raises(ValueError, match=rf"{name} is not the file that .*one"):
    filters.check_manifest(one / name)
  for n, content in zip(names, before, strict=True):
    (one / n).write_bytes(content)


def test_manifests_of_filters(two_filters, tmp_path):
  path = tmp_path / select.KEPT_FILE
  path.write_bytes((two_filters[0] / path.name).read_bytes())
  manifest = tmp_path / select.MANIFEST_FILE
  filters.check_manifest(path)  # there is none
  for text in ("{}", '{"sha256": 3}', '{"sha256": {"other.npy": "0"}}'):
    manifest.write_text(text)  # of something else
    filters.check_manifest(path)
  for text in ("", "[]", "[" * 10**5, '{"sha256": '):
    manifest.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
      filters.check_manifest(path)


def test_tables_have_no_formulas():
  rows = [
    {"name": "=1+1", "-x": -0.5, "n": np.float32(-2), "none": None},
    {"name": pathlib.PurePosixPath("@a"), "-x": "'b", "ok": True},
  ]
  assert tables.csv_text(rows).splitlines() == [
    "name,'-x,n,none,ok",
    "'=1+1,-0.5,-2.0,,",
    "'@a,''b,,,True",
  ]


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
    return data_lib.load_data(
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

  def test_integers_that_may_be_ids_of_text(self, make_config, tmp_path):
    # The set's ids are "000", "002", ...: a spreadsheet makes 2 of "002".
    data = mock.Mock(
      ids=np.array([f"{2 * i:03d}" for i in range(9)]),
      labels=np.zeros(9, np.int32),
      fingerprint="f" * 32,
    )
    labels = mock.Mock(labels=np.zeros(9, np.int32), rate=0.0)
    rows = "id,keep,keep_probability,quality,vote_0\n2,TRUE,1,1,1\n"

    def read(text):
      (tmp_path / "a.csv").write_text(text)
      path = str(tmp_path / "a.csv")
      return filters.read(path, make_config(), data, labels).tolist()

    with pytest.raises(ValueError, match=r"a\.csv.* such as '000', as another"):
      read(rows)
    assert read(rows.replace("\n2,", '\n"002",')) == [1]
    assert read(rows.replace("\n2,", "\n002,")) == [1]
    data.ids = np.char.add("x", data.ids)
    assert read(rows) == [2]
    gm.export.write_csv(
      tmp_path / "a.csv", gm.select([[1.0], [-1.0]], binarize="threshold")
    )
    data.ids = np.char.replace(data.ids, "x", "")
    path = str(tmp_path / "a.csv")
    assert filters.read(path, make_config(), data, labels).tolist() == [0]

  def test_other_data_are_refused_by_name(self, make_config, tmp_path):
    config = make_config()
    data = data_lib.load_data(config)
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
