"""The study of every task: from a config to the tables, and what it refuses."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
import tiny
from pairs_case import on_shapes

import gradmimic_jax as gm
from configs import digits
from experiments import tasks
from experiments.data.pairs import datacomp
from experiments.selection import cuts
from experiments.studies import plan, records, runner, summary, tables
from experiments.tasks import base
from experiments.training import trainer

_FILTERS = {"contrastive": "clip_top90 - mimic_bottom20"}


@pytest.fixture(
  scope="module",
  params=[
    "classification",
    *(pytest.param(x, marks=pytest.mark.slow) for x in tiny.TASKS[1:]),
  ],
)
def study(request, digits_dir, tmp_path_factory):
  """A finished study: its summary, config and folder."""
  expression = _FILTERS.get(request.param, "mimic_top70 & random90")
  config = tiny.make(
    request.param,
    digits_dir,
    **{
      "noise.rate": 0.4,
      "mimic.force": True,
      "study.seeds": (0,),
      "study.methods": ("sgd", "grad_mimic_weights"),
      "study.retrain": request.param == "classification",
      "study.filters": (expression,),
    },
  )
  folder = tmp_path_factory.mktemp("study") / "study"
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return runner.run_study(config, folder), config, folder


def scored_name(found):
  return next(name for name in found["runs"] if name.startswith("grad_mimic"))


class TestStudy:
  def test_measures_what_it_promises(self, study):
    found, config, folder = study
    rows = {row["method"]: row for row in found["rows"]}
    scored = scored_name(found)
    assert list(rows)[:3] == ["reference", "sgd", scored]
    assert ("retrained_" + scored in rows) == config.study.retrain
    assert rows["sgd"]["gain"] == 0
    # The last of what was measured is where the baseline ends.
    assert 0 <= rows["sgd"]["saved_loss"] < 1
    assert rows["sgd"]["auroc"] is None
    assert rows["sgd"]["clean_share"] == pytest.approx(0.6, abs=0.02)
    assert found["noise_rate"] == pytest.approx(0.4, abs=0.02)
    several = {"classification": 0, "contrastive": 3, "language": 2}
    assert len(found["kinds"]) == several[config.task]
    for field in ("auroc", *(f"auroc_{kind}" for kind in found["kinds"])):
      assert 0 <= rows[scored][field] <= 1
    (entry,) = found["detection"][scored]
    assert entry["clean_fraction"] == pytest.approx(0.6, abs=0.05)
    assert 0 < entry["kept_fraction"] <= 1
    # Only the task whose reference scores pairs has a row of its own for that.
    own = set(found["detection"]) - set(rows)
    assert own == {tasks.get(config).reference_score} - {None}
    assert list(found["reference_checks"]) == [scored]
    assert json.loads((folder / "summary.json").read_text()) == found
    table = (folder / "results.md").read_text()
    assert all(f"| {name} " in table for name in rows)
    assert table in tables.text(found)
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + len(
      rows
    )
    for path in found["figures"]:
      assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")

  def test_the_page_is_about_the_scores(self, study):
    found, config, _ = study
    page = pathlib.Path(found["report"]).read_text()
    assert "Remove" in page
    assert scored_name(found) in page
    if config.task == "contrastive":
      assert "[padded]" in page
      assert "data:image/png;base64," in page

  def test_filters_are_files_of_the_pool(self, study):
    found, config, folder = study
    there = records.Records(config, folder, plan.plan_runs(config))
    run = next(run for run in there.runs if run.filter)
    row = next(row for row in found["rows"] if row["filter"])
    truth = there.load_truth(0)
    assert len(truth.ids) == 48
    manifest = json.loads(
      there.filter_file(run).with_name("manifest.json").read_text()
    )
    about = manifest["filters"][run.filter]
    assert manifest["pool"] == 48
    assert about["kept"] == row[found["size"]]
    ids = datacomp.as_ids(truth.ids)
    read = gm.export.read_npy
    if ids.dtype.names:
      read = gm.export.read_datacomp_subset
    kept = np.isin(ids, read(there.filter_file(run)))
    assert kept.sum() == about["kept"]
    share = (~truth.is_wrong)[kept].mean()
    assert row["clean_share"] == pytest.approx(share)

  @pytest.mark.slow  # the contract asks single runs; all tables are made anew
  def test_is_not_repeated_wherever_it_lies(self, study, tmp_path, monkeypatch):
    found, config, folder = study
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr(trainer.Run, "to_the_end", None)
    try:
      again = runner.run_study(config, tmp_path / "moved")
    finally:
      (tmp_path / "moved").rename(folder)
    assert again["runs"] == found["runs"]
    assert again["rows"] == found["rows"]

  def test_mean_scores_are_the_ledgers(self, study):
    found, _, folder = study
    run = folder / "seed0" / scored_name(found)
    means = cuts.mean_scores(run)
    by_id = {}
    for row in gm.ScoreLedger(run / "ledger").table().to_pylist():
      by_id.setdefault(row["id"], []).append(row["score"])
    assert sum(map(len, by_id.values())) == found["samples_seen"]
    np.testing.assert_array_equal(means.ids, datacomp.as_ids(sorted(by_id)))
    np.testing.assert_allclose(
      means.values, [np.mean(by_id[i]) for i in sorted(by_id)], rtol=1e-6
    )


def test_a_method_that_is_not_there_stops_a_study_at_once(
  make_config, tmp_path
):
  config = make_config(**{"study.methods": ("sgd", "grad_mimick")})
  with pytest.raises(ValueError, match="expected one of sgd, grad_mimic"):
    runner.run_study(config, tmp_path / "study")
  assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"study.seeds": ()}, "expected at least one of each"),
    ({"study.filters": ("clip_top30",)}, "there are no scores for it"),
    ({"study.keep_fractions": (0.0,)}, "above 0 and below 1"),
    ({"study.keep_fractions": (1.0,)}, "above 0 and below 1"),
    ({"study.keep_fractions": (80,)}, "above 0 and below 1"),
    ({"study.rounds": 0}, "expected at least 1"),
    ({"study.rounds": 2, "mimic.outputs": "logits.npy"}, "one of the two"),
    ({"mimic.refresh_epochs": 0}, "expected at least 1"),
  ],
)
def test_what_a_study_refuses(make_config, overrides, message):
  with pytest.raises(ValueError, match=message):
    plan.plan_runs(make_config(**overrides))


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"study.methods": ("grad_mimic_weights",)}, "'sgd' to compare with"),
    ({"study.methods": ("sgd", "grand")}, "config.study.methods has 'grand'"),
    ({"study.weightings": ("ess",)}, r"expected such as ess0\.5"),
    ({"study.filters": ("mimic_best30",)}, "expected names such as mimic_top"),
    (
      {"study.filters": ("random30",), "study.methods": ("sgd",)},
      "needs the scores of a run",
    ),
    ({"study.reference.width": 32}, "makes it another model"),
    ({"data.name": "shards"}, "to know which captions are wrong"),
  ],
)
def test_what_a_study_of_pairs_refuses(overrides, message):
  with pytest.raises(ValueError, match=message):
    plan.plan_runs(on_shapes(**overrides))


def test_a_rounds_reference_is_the_learner_before_it(make_config):
  config = make_config(
    **{
      "study.methods": ("sgd", "grad_mimic", "rho"),
      "study.seeds": (4,),
      "study.rounds": 3,
      "study.retrain": False,
    }
  )
  made = {run.name: run for run in plan.plan_runs(config)}
  assert list(made) == [
    plan.REFERENCE,
    "sgd",
    "grad_mimic",
    "grad_mimic_round2",
    "grad_mimic_round3",
    "rho",
    "rho_round2",
    "rho_round3",
  ]
  assert made["sgd"].needs == ()
  assert made["rho"].reference == plan.REFERENCE
  for name, before in (
    ("grad_mimic_round2", "grad_mimic"),
    ("rho_round3", "rho_round2"),
  ):
    assert made[name].reference == before
    assert made[name].needs == (before,)
    assert made[name].overrides["method"] == name.split("_round")[0]


def test_a_later_round_is_no_headline():
  row = {"auroc": 0.9, "reached_loss": 3, "runs": 3}
  rows = [
    {"method": "rho", "saved_loss": 0.4, **row},
    {"method": "rho_round2", "saved_loss": 0.6, **row},
  ]
  assert summary.find_best(rows) == "rho"
  assert summary.find_best(rows[1:]) is None


def test_a_studys_settings(make_config):
  arg = (
    "layers=all+image_last_mlp,direction=weights+outputs,ess=0.3,"
    "temperature=0.05,others=output_agreement+rho"
  )
  names = list(plan.plan_settings(on_shapes(arg)))
  assert len(names) == 1 + 2 * 2 * 2 + 2 * 2
  assert "grad_mimic_outputs_image_last_mlp_temperature0.05" in names
  # Neither looks at layers.
  assert names[-3::2] == [
    "output_agreement_temperature0.05",
    "rho_temperature0.05",
  ]
  larger = on_shapes("reference=larger,direction=outputs")
  reference, *_ = plan.plan_runs(larger)
  assert reference.overrides["model.clip.image_width"] == 128
  assert reference.overrides["seed"] == 1000
  # Methods that have weightings of their own are run once.
  config = make_config(
    **{
      "study.methods": ("sgd", "rho", "rho_topk", "random"),
      "study.weightings": ("ess0.3", "top0.5"),
    }
  )
  assert list(plan.plan_settings(config)) == [
    *("sgd", "rho_ess0.3", "rho_top0.5", "rho_topk", "random")
  ]


@pytest.mark.parametrize(
  ("values", "target", "expected"),
  [
    ([5.0, 4.0, 2.0], 3.0, 15.0),
    ([5.0, 4.0, 2.0], 1.0, None),
    ([5.0, 2.0, 5.0], 2.0, 10.0),  # the first time counts
    ([1.0, 2.0, 3.0], 2.0, 0.0),
    ([math.nan, 1.0, 1.0], 2.0, 10.0),
    ([math.nan] * 3, 2.0, None),
  ],
)
def test_steps_to_a_loss(values, target, expected):
  assert gm.metrics.steps_to([0, 10, 20], values, target) == expected


@pytest.mark.slow
def test_a_study_of_resized_images(make_config, tmp_path):
  """What is kept is of the images that were trained on, at their size."""
  config = make_config(
    num_epochs=1, **{"data.image_size": 6, "study.methods": ("grad_mimic",)}
  )
  found = runner.run_study(config, tmp_path / "study")
  (kept,) = found["runs"]["retrained_grad_mimic"]
  assert 0 < kept["train_samples"] < 1437


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_numbers_on_digits(tmp_path, digits_dir):
  config = digits.get_config("rate=0.6").unlock()
  config.data.data_dir = digits_dir
  config.mesh.data = 1  # of the eight virtual devices
  config.study.methods, config.study.retrain = ("sgd", "grad_mimic"), False
  found = runner.run_study(config.lock(), tmp_path / "study")

  def mean(entries, key):
    return sum(entry[key] for entry in entries) / len(entries)

  runs, detected = found["runs"], found["detection"]["grad_mimic"]
  assert mean(runs["sgd"], "test_accuracy") == pytest.approx(0.7, abs=0.05)
  assert mean(runs["grad_mimic"], "test_accuracy") >= 0.95
  assert mean(detected, "auroc") >= 0.99
  assert mean(detected, "f1") >= 0.95


@pytest.mark.parametrize(
  ("ids", "other"),
  [
    ([7, 2, 5], 9),
    (["b", "c", "a"], "zz"),
    ([f"{n:032x}" for n in range(3)], "f" * 32),
  ],
)
def test_the_truth_is_found_by_ids(ids, other):
  truth = base.Truth(np.array(ids), np.array(["", "code", "swapped"]))
  assert list(truth.kinds_of(np.array([ids[2], ids[0]]))) == ["swapped", ""]
  assert list(truth.is_wrong) == [False, True, True]
  with pytest.raises(ValueError, match="1 of 1 ids are not among the 3"):
    truth.kinds_of(np.array([other]))
