"""Cross-fitting: no reference has seen the label that it judges."""

import json
import shutil
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import gradmimic_jax as gm
from configs import natural_errors, report, select
from experiments import models, study as study_command
from experiments.data import sources
from experiments.reporting import figures, page
from experiments.runtime import claims
from experiments.selection import files
from experiments.studies.probing import cross_fitting

SEEDS, FOLDS, EPOCHS, RATE = (0, 1), 3, 8, 0.2


@pytest.fixture
def make_cross(digits_dir):
  """`make_cross(**{"dotted.field": value})`: heads on the digits' pixels."""

  def make(**overrides):
    config = natural_errors.get_config("dataset=digits").unlock()
    config.update_from_flattened_dict(
      {
        "batch_size": 1024,  # a fold in one padded batch, for the reference too
        "num_epochs": EPOCHS,
        "data.data_dir": digits_dir,
        "study.seeds": SEEDS,
        "study.methods": (),
        "mimic.weighting": "softmax",
        "mimic.temperature": 1.0,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": RATE,
        "cross.folds": FOLDS,
        "cross.lowest": 3,
        **overrides,
      }
    )
    return config.lock()

  return make


@pytest.fixture(scope="module")
def made():
  return []


@pytest.fixture
def whole(make_cross, made, tmp_path_factory):
  """A finished cross-fitting: its config, folder and summary."""
  if not made:
    config, folder = make_cross(), tmp_path_factory.mktemp("cross") / "whole"
    made.append(
      (config, folder, cross_fitting.run_cross_fitting(config, folder))
    )
  return made[0]


def test_folds_share_every_class_evenly():
  rng = np.random.default_rng(0)
  for folds, count in ((2, 101), (3, 90), (5, 7)):
    labels = rng.integers(0, 4, count)
    found = cross_fitting.assign_folds(labels, folds, seed=3)
    for some in (found, *(found[labels == label] for label in set(labels))):
      sizes = np.bincount(some, minlength=folds)
      assert sizes.sum() == len(some)
      assert sizes.max() - sizes.min() <= 1
    again = cross_fitting.assign_folds(labels, folds, seed=3)
    np.testing.assert_array_equal(found, again)
  other = cross_fitting.assign_folds(labels, folds, seed=4)
  assert (other != found).any()


def softmax(logits):
  values = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return values / values.sum(axis=-1, keepdims=True)


def steps(start, inputs, labels, weigh):
  """SGD's heads in float64, one step an epoch; each before its step."""
  head, moments = [x.copy() for x in start], [0 * x for x in start]
  for _ in range(EPOCHS):
    yield [x.copy() for x in head]
    errors = softmax(inputs @ head[0] + head[1]) - np.eye(10)[labels]
    errors *= weigh(head, errors)[:, None]
    for i, grad in enumerate((inputs.T @ errors, errors.sum(axis=0))):
      moments[i] = grad + 1e-5 * head[i] + 0.9 * moments[i]
      head[i] -= RATE * moments[i]
  yield head


def test_equals_numpy_in_double_precision(whole):
  """Folds, references, their probabilities, and scores over the epochs."""
  config, folder, _ = whole
  data = sources.load("digits", "train", data_dir=config.data.data_dir)
  pixels = data.images.astype(float) / 255
  inputs = ((pixels - pixels.mean()) / pixels.std()).reshape(len(pixels), -1)
  with np.load(folder / "labels.npz") as arrays:
    labels = arrays["labels"]
  assert (labels != data.labels).mean() == pytest.approx(0.1, abs=1e-3)
  shape = len(SEEDS), len(labels)
  probabilities, scores = np.zeros((*shape, 10)), np.zeros((*shape, EPOCHS))
  for s, seed in enumerate(SEEDS):
    folds = cross_fitting.assign_folds(labels, FOLDS, seed)
    _, params = models.create(
      config.model, input_shape=(8, 8, 1), num_classes=10, seed=seed
    )
    start = [np.array(params["head"][x], float) for x in ("kernel", "bias")]
    for fold in range(FOLDS):
      own, others = folds == fold, folds != fold
      *_, reference = steps(
        start,
        inputs[others],
        labels[others],
        lambda head, errors: np.full(len(errors), 1 / len(errors)),
      )
      logits = inputs[own] @ reference[0] + reference[1]
      probabilities[s, own] = softmax(logits)
      found = []

      def weigh(head, errors, own=own, reference=reference, found=found):
        toward = reference[0] - head[0]
        along = inputs[own] @ (toward / np.linalg.norm(toward))
        found.append(-(along * errors).sum(axis=1))
        return softmax(found[-1] / config.mimic.temperature)

      list(steps(start, inputs[own], labels[own], weigh))
      scores[s, own] = np.stack(found, axis=1)
  ids, values = gm.ScoreLedger(folder / "ledger").matrix("score")
  np.testing.assert_array_equal(ids, np.arange(len(labels)))
  np.testing.assert_allclose(values, scores.mean(axis=0), atol=1e-4, rtol=1e-4)
  # The first step of a batch that is the whole fold is at the start.
  table = pq.read_table(folder / "samples.parquet").to_pydict()
  np.testing.assert_allclose(
    table["grad_mimic_at_start"], scores[..., 0].mean(axis=0), atol=1e-4
  )
  kept = np.load(folder / "probabilities.npy")
  np.testing.assert_allclose(kept, probabilities.mean(axis=0), atol=1e-5)


def test_what_it_leaves(whole):
  config, folder, summary = whole
  assert json.loads((folder / "summary.json").read_text()) == summary
  table = pq.read_table(folder / "samples.parquet").to_pydict()
  data = sources.load("digits", "train", data_dir=config.data.data_dir)
  with np.load(folder / "labels.npz") as arrays:
    labels, wrong = arrays["labels"], arrays["labels"] != data.labels
  probabilities = np.load(folder / "probabilities.npy")
  assert table["id"] == data.ids.tolist()
  assert table["given"] == [str(label) for label in labels]
  assert table["suggested"] == [str(c) for c in probabilities.argmax(axis=1)]
  _, scores = gm.ScoreLedger(folder / "ledger").matrix("score")
  np.testing.assert_allclose(
    table["grad_mimic"], scores.mean(axis=1), rtol=1e-5, atol=1e-6
  )
  worst = np.argsort(table["grad_mimic"])[:3]
  lines = (folder / "lowest_grad_mimic.csv").read_text().splitlines()
  assert [line.split(",")[1] for line in lines[1:]] == list(data.ids[worst])
  file = folder / "lowest_confident_learning.csv"
  assert file.with_suffix(".png").exists()
  for line in file.read_text().splitlines()[1:]:
    _, sample, given, suggested, value = line.split(",")
    at = table["id"].index(sample)
    assert (given, suggested) == (table["given"][at], table["suggested"][at])
    assert float(value) == pytest.approx(probabilities[at, int(given)])
  rows = {row["ranking"]: row for row in summary["rows"]}
  assert {row["truth"] for row in summary["rows"]} == {"noise"}
  assert rows["grad_mimic"]["auroc"] == pytest.approx(
    gm.metrics.auroc(-np.array(table["grad_mimic"]), wrong)
  )
  assert rows["grad_mimic"]["auroc"] > 0.9
  assert rows["grad_mimic"]["wrong_lowest"] == wrong[worst].sum()
  assert summary["shared"]["grad_mimic"] == 3
  # Of each seed's own probabilities; folds differ, and so do their numbers.
  accuracy, error = summary["out_of_sample_accuracy"]
  assert 0.5 < accuracy < 0.9
  assert error > 0
  table = (folder / "results.md").read_text()
  assert f"{rows['grad_mimic']['auroc']:.4f}" in table


def content(folder):
  """All that a cross-fitting leaves, but for times and places."""
  found = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.suffix in (".csv", ".md", ".npy", ".npz", ".parquet")
    and "ledger" not in path.parts
    and "features" not in path.parts
  }
  summary = json.loads((folder / "summary.json").read_text())
  del summary["seconds"], summary["files"]
  ledger = gm.ScoreLedger(folder / "ledger")
  for field in ("score", "weight", "loss"):
    found[field] = ledger.matrix(field)[1].tobytes()
  return found, summary


class KilledError(Exception):
  """As if the process had been killed there."""


def killed_after(monkeypatch, owner, name, count):
  """Lets so many calls of a method pass; then the process is gone."""
  real, calls = getattr(owner, name), []

  def method(*args, **kwargs):
    calls.append(1)
    if len(calls) > count:
      raise KilledError
    return real(*args, **kwargs)

  monkeypatch.setattr(owner, name, method)


@pytest.fixture
def undrawn(monkeypatch):
  """Contact sheets take longer to draw than heads to train."""
  monkeypatch.setattr(figures, "contact_sheet", lambda *given, **_: given[2])


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_killed_and_resumed_equals_uninterrupted(
  whole, tmp_path, monkeypatch, capsys
):
  config, folder, _ = whole
  copy = tmp_path / "whole"
  # In the second learner, and while the ledger is written.
  for owner, name, count in (
    (cross_fitting._Study, "_train", 4),
    (gm.ScoreLedger, "append", 1),
  ):
    with monkeypatch.context() as patch:
      killed_after(patch, owner, name, count)
      with pytest.raises(KilledError):
        cross_fitting.run_cross_fitting(config, copy)
  cross_fitting.run_cross_fitting(config, copy)
  assert content(copy) == content(folder)
  began = capsys.readouterr().out.splitlines()
  # The cell in flight was begun twice, and no other.
  times = [began.count(line) for line in dict.fromkeys(began)]
  assert times == [1, 1, 1, 1, 2, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_damaged_cells_and_lost_claims_are_made_good(whole, tmp_path, capsys):
  config, folder, _ = whole
  copy = tmp_path / "whole"
  shutil.copytree(folder, copy)
  (cell,) = (copy / "cells").glob("grad_mimic_fold1_*.npz")
  before = cell.read_bytes()
  cell.write_bytes(before[:2000] + b"x" + before[2001:])
  about = {"host": claims._host(), "pid": 2**22 + 1, "token": "x"}
  cell.with_suffix(".claim").write_text(json.dumps(about))
  capsys.readouterr()
  cross_fitting.run_cross_fitting(config, copy)
  assert capsys.readouterr().out.splitlines() == [
    "grad_mimic: fold 2 of 3, seeds 0, 1"
  ]
  assert cell.read_bytes() == before
  assert not list((copy / "cells").glob("*.claim*"))


@pytest.mark.slow
def test_is_a_run_that_select_and_report_read(whole, tmp_path):
  _, folder, _ = whole
  manifest = files.select_run(
    select.get_config(f"run={folder}"), tmp_path / "selection"
  )
  assert 0 < manifest["kept"] < manifest["samples"] == 1437
  config = report.get_config(f"run={folder}").unlock()
  config.gallery = 3
  text = page.report_run(config.lock(), tmp_path / "page").read_text()
  table = pq.read_table(folder / "samples.parquet").to_pydict()
  worst = int(np.argmin(table["grad_mimic"]))
  # With the label that the references would give it.
  assert table["id"][worst] in text
  assert table["suggested"][worst] != table["given"][worst]
  assert "suggested" in text


def test_a_study_with_a_section_cross_is_one(make_cross, tmp_path, monkeypatch):
  """And no job of several processes."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="one for a single process"):
    study_command.main(make_cross(), tmp_path / "cross")
  monkeypatch.setattr(cross_fitting, "main", lambda *given: given)
  assert study_command.main(make_cross(), tmp_path / "cross") is None


def test_another_config_is_refused(whole, make_cross):
  _, folder, _ = whole
  with pytest.raises(ValueError, match=r"another config: cross\.folds is 3"):
    cross_fitting.run_cross_fitting(make_cross(**{"cross.folds": 2}), folder)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"cross.folds": 1}, r"config\.cross\.folds has 1; expected at least 2"),
    ({"cross.folds": 2000}, "there are 1437 samples"),
    ({"study.seeds": ()}, "study.seeds has 0"),
    ({"method": "sgd"}, "'sgd' is none"),
    ({"study.methods": ("rho", "grand")}, "'grand' is none"),
    ({"study.methods": ("distillation",)}, "'distillation' is none"),
    ({"mimic.direction": "clean_gradient"}, "'grad_mimic' is none"),
    ({"probe.rates": (0.4,)}, r"probe\.rates is .* has no use for"),
    ({"mimic.reference": "run"}, r"mimic\.reference is 'run'"),
    ({"mimic.refresh_epochs": 2}, "expected 1 and 1"),
    ({"study.rounds": 2}, "expected 1 and 1"),
    ({"study.methods": ("rho_averaged",)}, "by averages over epochs"),
    ({"cross.proxy": "people.csv"}, r"config\.cross\.proxy: there is no"),
  ],
)
def test_a_cross_fitting_that_cannot_be(
  make_cross, tmp_path, overrides, message
):
  config = make_cross(**overrides)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    cross_fitting.run_cross_fitting(config, tmp_path / "cross")
  assert not list(tmp_path.rglob("cells"))


def test_without_cleanlab_it_says_what_to_install(
  make_cross, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
  with pytest.raises(ModuleNotFoundError, match=r"gradmimic_jax\[cleanlab\]"):
    cross_fitting.run_cross_fitting(make_cross(), tmp_path / "cross")
  assert not list(tmp_path.rglob("*"))
