"""The jobs of data work: score, select, report; and filters in training."""

import contextlib
import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pairs_case
import pytest
import tiny

import gradmimic_jax as gm
from configs import (
  language,
  report as report_config,
  score as score_config,
  select as select_config,
)
from experiments import tasks
from experiments.data import filters, noise
from experiments.data.pairs import shard_samples
from experiments.reporting import page as report
from experiments.runtime import checkpoint, distributed, tables, workdir
from experiments.selection import cuts, files as select, runs
from experiments.tasks.classification import data as data_lib
from experiments.tasks.contrastive import data as pairs_lib
from experiments.training import scoring as score, trainer as train
from gradmimic_jax.selection.uids import parse_uids

ROOT = pathlib.Path(__file__).parents[3]
SHAPES, SHARDS = (
  pytest.param(x, marks=pytest.mark.slow) for x in ("shapes", "shards")
)
DATA = ("digits", SHAPES, SHARDS)
every_data = pytest.mark.parametrize("scored", DATA, indirect=True)


class Scored(NamedTuple):
  """A pass over one of the data sets, with all that it took."""

  data: str
  config: Any  # of runs: `config(**fields)`
  learner: pathlib.Path
  reference: pathlib.Path
  job: Any  # the config of `score`
  folder: pathlib.Path
  ids: np.ndarray  # of all samples, ascending


@pytest.fixture(scope="module")
def make_scored(tmp_path_factory, digits_dir):
  """`make_scored(data, make_config)`: a finished pass; made once."""
  made: dict[str, Scored] = {}
  root = tmp_path_factory.mktemp("runs")
  shards = pairs_case.write_shards(tmp_path_factory.mktemp("shards"))

  def on_shards(**fields):
    fields = {"method": "sgd", "num_samples": 64, **fields}
    return pairs_case.on_shards(shards, **fields)

  def run(name, config):
    train.train_and_evaluate(config, root / name)
    return root / name

  def make(data, make_config):
    if data in made:
      return made[data]
    if data == "digits":
      config, batch, ids = make_config, 200, np.arange(1437)
      reference = run("reference", config(**{"noise.rate": 0.0}))
    else:
      configs = {"shapes": pairs_case.on_shapes, "shards": on_shards}
      config, batch = configs.pop(data), 20
      # A run on other data may be a reference: each is the other's.
      ((name, other),) = configs.items()
      with tiny.nudged():
        reference = run(name, other())
      pairs = pairs_case.shapes.load("train", size=96, seed=0, image_size=16)
      ids = np.sort(np.delete(pairs.uids, 0))  # the first is broken
      if data == "shapes":
        ids = np.sort(pairs_lib.train_pairs(config()).uids)
    # What scores of its checkpoints are is asked of the other two.
    steps = tiny.nudged if data == "shards" else contextlib.nullcontext
    with steps():
      learner = run(data, config())
    job = score_config.get_config(f"learner={learner}").unlock()
    job.mimic.reference = str(reference)
    job.batch_size, job.flush_every, job.mesh.data = batch, 3, 1
    folder = root / f"{data}_scored"
    score.score_dataset(job.lock(), folder)
    made[data] = Scored(data, config, learner, reference, job, folder, ids)
    return made[data]

  return make


@pytest.fixture
def scored(request, make_config, make_scored):
  return make_scored(getattr(request, "param", "digits"), make_config)


@every_data
def test_a_pass_scores_all_samples_with_each_checkpoint(scored):
  ids, scores = gm.ScoreLedger(scored.folder / "ledger").matrix()
  np.testing.assert_array_equal(ids, scored.ids)
  assert scores.shape == (len(ids), len(checkpoint.steps(scored.learner)))
  assert np.isfinite(scores).all()
  result = json.loads((scored.folder / "result.json").read_text())
  assert result["samples"] == len(ids)


@pytest.mark.parametrize("scored", ["digits", SHAPES], indirect=True)
def test_scores_are_those_of_single_gradients(scored):
  """Of the last rows, whose batch is padded; pairs have their batch mates."""
  _, scores = gm.ScoreLedger(scored.folder / "ledger").matrix()
  run = score.learners_config(scored.job)
  devices = distributed.Devices(scored.job.mesh, batch_size=run.batch_size)
  task = tasks.get(run).create_for_scoring(run, devices, scored.learner)
  *_, last = task.passes()
  rows = task.take(last)
  real = np.flatnonzero(rows.real)[-3:]
  at = np.searchsorted(scored.ids, rows.ids[real])

  @jax.jit
  @jax.jacrev
  def gradients(params):
    seen = rows.seen
    if task.expand is not None:
      seen = task.expand(seen, task.resident)
    return task.losses_fn(params, seen)[0][real]

  def flat(tree, *lead):
    leaves = jax.tree.leaves(tree)
    return np.concatenate(
      [np.float64(x).reshape(*lead, -1) for x in leaves], -1
    )

  reference = flat(checkpoint.load_params(scored.reference, task.params))
  for epoch, step in enumerate(checkpoint.steps(scored.learner)):
    params = checkpoint.load_params(scored.learner, task.params, step=step)
    grads = flat(gradients(params), len(real))
    gap = reference - flat(params)
    np.testing.assert_allclose(
      scores[at, epoch],
      -grads @ gap / np.linalg.norm(gap),
      rtol=1e-3,
      atol=2e-5,
    )


@pytest.mark.slow  # the contract of tasks kills a pass
@pytest.mark.parametrize("stop_at", [1, 5])
@pytest.mark.parametrize("scored", ["shards"], indirect=True)
def test_an_interrupted_pass_ends_with_the_same_ledger(
  scored, tmp_path, monkeypatch, stop_at
):
  class InterruptedPassError(Exception):
    pass

  task = tasks.get(score.learners_config(scored.job))
  whole = task.passes
  count = 0

  def passes(self, first=0):
    nonlocal count
    for batch in whole(self, first):
      if count == stop_at:
        raise InterruptedPassError
      count += 1
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(task, "passes", passes)
    with pytest.raises(InterruptedPassError):
      score.score_dataset(scored.job, tmp_path / "run")
  if stop_at >= 3:
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert 3 <= progress["batches"] <= stop_at
  score.score_dataset(scored.job, tmp_path / "run")
  assert (
    gm.ScoreLedger(tmp_path / "run" / "ledger")
    .table()
    .equals(gm.ScoreLedger(scored.folder / "ledger").table())
  )


@pytest.mark.slow
def test_a_killed_pass_ends_with_the_same_ledger(scored, tmp_path):
  command = [
    sys.executable,
    "-m",
    "experiments.score",
    f"--config=configs/score.py:learner={scored.learner}",
    f"--config.mimic.reference={scored.reference}",
    "--config.batch_size=4",
    "--config.flush_every=5",
  ]
  quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
  subprocess.run([*command, f"--workdir={tmp_path}/whole"], check=True, **quiet)
  for flushes in (1, 50):
    process = subprocess.Popen([*command, f"--workdir={tmp_path}/run"], **quiet)
    while process.poll() is None:
      written = list((tmp_path / "run" / "ledger").glob("*.parquet"))
      if len(written) >= flushes:
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


@pytest.mark.parametrize(
  ("scored", "fields", "match"),
  [
    ("digits", {"method": "sgd"}, "gives no scores"),
    ("digits", {"flush_every": 0}, "flush_every is 0; expected at"),
    *(
      pytest.param("shards", *x, marks=pytest.mark.slow)
      for x in (
        ({"method": "grand"}, "'grand'; expected one of sgd"),
        ({"split": "test"}, "the data of .* has no splits"),
      )
    ),
  ],
  indirect=["scored"],
)
def test_what_a_pass_refuses(scored, fields, match, tmp_path):
  config = scored.job.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=match):
    score.score_dataset(config.lock(), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_pass_asks_for_a_learner(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected the workdir of a"):
    score.score_dataset(score_config.get_config(), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@every_data
def test_from_a_ledger_to_a_filter_to_training(scored, tmp_path, caplog):
  config = select_config.get_config(f"run={scored.folder}").unlock()
  config.select.binarize = "gmm"  # "auto" finds that they are too much alike
  if scored.data != "digits":
    config.select.binarize = "threshold"
  manifest = select.select_run(config, tmp_path / "filter")
  ledger = gm.ScoreLedger(scored.folder / "ledger")
  options = {"threshold": 0.0} if scored.data != "digits" else {}
  selection = gm.select(
    ledger,
    binarize=config.select.binarize,
    aggregate="label_model",
    **options,
  )
  assert 0.1 < selection.kept_fraction < 0.95
  assert manifest["kept"] == selection.keep.sum()
  stored = (tmp_path / "filter" / "manifest.json").read_text()
  assert json.loads(stored) == manifest
  for name in manifest["sha256"]:
    path = str(tmp_path / "filter" / name)
    if scored.data == "digits":
      run = scored.config(**{"data.filter": path})
      found = data_lib.load_data(run).indices
      wanted = selection.kept_ids
    else:
      found = shard_samples.kept_uids(path)
      wanted = parse_uids(selection.kept_ids)
      run = scored.config(**{"data.filter": path, "batch_size": 2})
      count = pairs_lib.load(run).train_pairs
      assert count == (len(wanted) if scored.data == "shapes" else None)
    np.testing.assert_array_equal(found, wanted)
  assert "not in" not in caplog.text
  if scored.data == "shapes":
    other = scored.config(**{"data.filter": path, "noise.rate": 0.1})
    with pytest.raises(ValueError, match=r"'dataset' is 'shapes .* in the"):
      pairs_lib.load(other)
  # The workdir is now one of this selection.
  config.select.aggregate = "majority"
  with pytest.raises(ValueError, match=r"select\.aggregate is 'label_m"):
    select.select_run(config, tmp_path / "filter")


@every_data
def test_filters_by_expression(scored, tmp_path):
  config = select_config.get_config(f"run={scored.folder}").unlock()
  config.filters = ("mimic_top30 - mimic_bottom15", "random30", "mimic_top50")
  manifest = select.select_run(config.lock(), tmp_path / "filters")
  n = len(scored.ids)
  assert manifest["pool"] == manifest["scored"] == n
  assert manifest["filters"]["random30"]["kept"] == int(0.3 * n) + 1
  for name, about in manifest["filters"].items():
    path = tmp_path / "filters" / about["file"]
    filters.check_manifest(path)
    read = gm.export.read_datacomp_subset
    if scored.data == "digits":
      read = gm.export.read_npy
    assert len(read(path)) == about["kept"], name
  # Ids of the one file that is sure of its content: of the best half.
  _, scores = gm.ScoreLedger(scored.folder / "ledger").matrix()
  mean = scores.astype(np.float64).mean(axis=1)
  best = scored.ids[mean >= np.sort(mean)[::-1][int(0.5 * n)]]
  wanted = best if scored.data == "digits" else parse_uids(best)
  np.testing.assert_array_equal(read(path), wanted)
  assert len(manifest["overlaps"]) == 3
  config = select_config.get_config(f"run={scored.folder}").unlock()
  config.metadata = str(tmp_path)
  with pytest.raises(ValueError, match=r"config\.filters, which would look"):
    select.select_run(config, tmp_path / "other")


@pytest.fixture(scope="module")
def two_filters(tmp_path_factory):
  """The files of two selections of one data set, each with its manifest."""
  rng = np.random.default_rng(0)
  folders = []
  for name in ("one", "two"):
    folder = tmp_path_factory.mktemp(name)
    selection = gm.select(
      rng.normal(size=(50, 3)), binarize="threshold", aggregate="majority"
    )
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


def test_filters_keep_what_datacomps_rules_keep():
  rng = np.random.default_rng(0)
  uids = parse_uids([f"{n:032x}" for n in range(100)])
  mimic, clip = (rng.permutation(np.arange(100.0)) for _ in range(2))
  pool = cuts.Pool(
    uids,
    cuts.Scores(uids, mimic),
    cuts.Scores(uids, clip),
  )
  expression = "clip_top30 - mimic_bottom20"
  made = cuts.make([expression, "random30"], pool, seed=0)
  wanted = uids[(clip >= 69) & (mimic >= 20)]  # int(.3 N) + 1 of the first
  np.testing.assert_array_equal(made[expression].ids, wanted)
  assert len(made["random30"]) == 31
  assert cuts.file_of(expression) == ("clip_top30_less_mimic_bottom20.npy")
  with pytest.raises(ValueError, match="needs DataComp's metadata"):
    cuts.make(["basic"], pool, seed=0)
  # Two filters that would be one file.
  alike = [
    "(clip_top30 - mimic_top20) & random30",
    "clip_top30 - (mimic_top20 & random30)",
  ]
  with pytest.raises(ValueError, match="would both be written to"):
    cuts.make(alike, pool, seed=0)


@pytest.mark.parametrize("scored", ["digits", SHAPES], indirect=True)
def test_files_of_other_runs_are_refused(scored, tmp_path):
  run, whole = tmp_path / "run", scored.folder
  shutil.copytree(whole, run)
  own = runs.load_fingerprints(run)
  assert own == gm.ScoreLedger(run / "ledger").fingerprints

  def refused(name, *words):
    with pytest.raises(ValueError, match=name) as caught:
      runs.load_fingerprints(run)
    assert all(word in str(caught.value) for word in words)
    shutil.copy(whole / name, run / name)

  if scored.data == "digits":
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
  assert runs.load_fingerprints(run) == own


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
    data.name = "digits"
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
    prints = filters.fingerprints(config, data.train.source, data.labels)
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


@every_data
def test_the_page_of_a_run(scored, tmp_path):
  config = report_config.get_config(f"run={scored.folder}").unlock()
  config.select.binarize = "gmm" if scored.data == "digits" else "threshold"
  path = report.report_run(config, tmp_path / "page")
  found = json.loads(path.with_suffix(".json").read_text())
  assert len(found["histograms"]) == 2
  assert found["run"]["scored by"] == "python -m experiments.score"
  images = path.read_text().count("<img")
  if scored.data == "digits":
    assert found["title"] == "digits train, symmetric noise 0.5"
    assert found["fingerprints"]["dataset"].startswith("digits train ")
    assert found["truth"]["f1"] > 0.5
    # The reference was trained on the true labels: it suggests many of them.
    assert np.sum(found["matrix"]["counts"]) == 1437
    assert images == 72
  elif scored.data == "shapes":
    assert found["title"] == "shapes, 0.292 of the pairs mis-captioned"
    assert found["fingerprints"]["dataset"].startswith("shapes ")
    assert "[clean] " in path.read_text()
    assert images >= 48
  else:
    assert "in shards" in found["run"]["images and captions"]
    assert not images


def test_a_page_needs_a_ledger(tmp_path):
  config = report_config.get_config(f"run={tmp_path}")
  with pytest.raises(FileNotFoundError, match="there is no ledger in it"):
    report.report_run(config, tmp_path / "other")


def test_a_run_of_an_earlier_release_is_told_so(scored, tmp_path):
  old = tmp_path / "old"
  shutil.copytree(scored.learner, old)
  found = workdir.read_json(old / "config.json")
  del found["job"], found["task"]
  workdir.write_json(old / "config.json", found, sealed=True)
  config = scored.job.copy_and_resolve_references().unlock()
  config.learner = str(old)
  for again in (
    lambda: train.train_and_evaluate(scored.config(), old),
    lambda: score.score_dataset(config, tmp_path / "scores"),
  ):
    with pytest.raises(ValueError, match=r"made by an earlier release.*--work"):
      again()


def test_a_page_of_text_shows_it(tmp_path):
  config = language.get_config().unlock()
  config.update_from_flattened_dict(
    {"data.train_size": 40, "data.held_out_size": 8}
  )
  task = tasks.get(config)
  samples = task.load_samples(config, tmp_path, {})
  truth = task.load_truth(config, tmp_path)
  np.testing.assert_array_equal(samples.dataset["ids"], truth.ids)
  for caption, kind in zip(
    samples.dataset["captions"], truth.kinds, strict=True
  ):
    assert caption.startswith(f"[{kind or 'clean'}] ")
    assert len(caption.encode()) > 20
