"""CLIP's jobs: training on shapes and shards, the study, filters, costs."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pairs_case
import processes
import pytest
from pairs_case import make, on_shapes, on_shards

import gradmimic_jax as gm
from configs import datacomp
from experiments.benchmarks import clip_methods as clip_costs
from experiments.data.pairs import shapes
from experiments.runtime import (
  checkpoint,
  metrics as writers,
  workdir as workdir_lib,
)
from experiments.selection import filters as clip_filters
from experiments.studies import (
  clip_plan as clip_study_runs,
  clip_records as clip_study_measures,
  clip_runner as clip_study,
  clip_summary as clip_study_report,
)
from experiments.training import optimizer, steps, trainer as clip_train
from gradmimic_jax.selection.uids import parse_uids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Four shards of 24 pairs; one image is no image."""
  return pairs_case.write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
  """The workdir of a finished run on the shards."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    where = tmp_path_factory.mktemp("teacher") / "run"
    clip_train.train_and_evaluate(on_shards(folder, method="sgd"), where)
  return where


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  """A finished study, its config and its folder."""
  config = on_shapes(**{"study.filters": ("clip_top90 - mimic_bottom20",)})
  folder = tmp_path_factory.mktemp("study") / "study"
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    return clip_study.run_study(config, folder), config, folder


class TestStudy:
  def test_measures_what_it_promises(self, study):
    summary, _, folder = study
    assert list(summary["runs"]) == [
      "reference",
      "sgd",
      "grad_mimic_weights_all_ess0.7",
      "kept_clip_top90_less_mimic_bottom20",
    ]
    rows = {row["run"]: row for row in summary["rows"]}
    assert rows["sgd"]["gain"] == 0
    # The last of what was measured is where the baseline ends.
    assert 0 <= rows["sgd"]["saved_loss"] < 1
    scored = rows["grad_mimic_weights_all_ess0.7"]
    for kind in ("", "_swapped", "_truncated", "_padded"):
      assert 0 <= scored[f"auroc{kind}"] <= 1
    assert rows["sgd"]["auroc"] is None
    kept = rows["kept_clip_top90_less_mimic_bottom20"]
    assert 34 <= kept["train_pairs"] <= 44  # of 48: 44 but for up to 9 or 10
    assert 0.5 < kept["clean_share"] <= 1
    verdicts = summary["reference_checks"]
    assert list(verdicts) == ["grad_mimic_weights_all_ess0.7"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "grad_mimic_weights_all" in clip_study_report.text(summary)
    for path in summary["figures"]:
      assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")

  def test_the_page_shows_the_pairs(self, study):
    page = pathlib.Path(study[0]["report"]).read_text()
    assert "[padded]" in page
    assert "data:image/png;base64," in page

  def test_filters_are_subset_files_of_the_pool(self, study):
    _, config, folder = study
    pool = parse_uids(clip_study_report._truth(config, 0).uids)
    there = folder / "seed0" / "filters"
    (expression,) = config.study.filters
    file = clip_filters.file_of(expression)
    kept = gm.export.read_datacomp_subset(there / file)
    assert np.isin(kept, pool).all()
    manifest = json.loads((there / "manifest.json").read_text())
    assert manifest["pool"] == 48
    assert manifest["filters"][expression] == {"kept": len(kept), "file": file}

  def test_is_not_repeated(self, study, monkeypatch):
    summary, config, folder = study
    monkeypatch.setattr(clip_train.Run, "to_the_end", None)
    again = clip_study.run_study(config, folder)
    assert again["runs"] == summary["runs"]

  def test_mean_scores_are_the_ledgers(self, study):
    _, _, folder = study
    run = folder / "seed0" / "grad_mimic_weights_all_ess0.7"
    found = clip_filters.mean_scores(run)
    table = gm.ScoreLedger(run / "ledger").table().to_pylist()
    by_uid = {}
    for row in table:
      by_uid.setdefault(row["id"], []).append(row["score"])
    assert len(table) == 64  # every sample seen
    np.testing.assert_array_equal(found.ids, parse_uids(sorted(by_uid)))
    np.testing.assert_allclose(
      found.values, [np.mean(by_uid[uid]) for uid in sorted(by_uid)], rtol=1e-6
    )


@pytest.fixture(scope="module")
def scored(folder, teacher, tmp_path_factory):
  """A finished run with scores on every other pair: config, folder, result."""
  where = tmp_path_factory.mktemp("scored")
  uids = shapes.load("train", size=96, seed=0, image_size=16).uids
  kept = gm.export.write_datacomp_subset(where / "kept.npy", uids[::2])
  config = on_shards(
    folder,
    **{
      "mimic.reference": str(teacher),
      "data.filter": str(kept),
      "num_samples": 64,
    },
  )
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    result = clip_train.train_and_evaluate(config, where / "run")
  return config, where / "run", result


class TestShards:
  def test_datacomps_config_runs(self, scored):
    _, run, result = scored
    assert result["steps"] == 4
    assert math.isfinite(result["held_out_loss"])
    assert result["shards"]["filtered"] > 0
    ids, scores = gm.ScoreLedger(run / "ledger").matrix()
    uids = shapes.load("train", size=96, seed=0, image_size=16).uids
    assert np.isin(ids, uids[::2]).all()
    # All sound pairs in the first pass; the batch at the turn counts for it.
    np.testing.assert_array_equal(np.isfinite(scores).sum(axis=0), [47, 16])

  def test_an_interrupted_run_goes_on_bit_for_bit(
    self, scored, tmp_path, monkeypatch
  ):
    """With the place in the shards restored."""
    config, whole, result = scored
    make_step = steps.make_train_step

    def make_interrupted(*args, **options):
      step, done = make_step(*args, **options), []

      def stopping(*args):
        if len(done) == 3:
          raise KeyboardInterrupt
        done.append(None)
        return step(*args)

      return stopping

    with monkeypatch.context() as patch:
      patch.setattr(steps, "make_train_step", make_interrupted)
      with pytest.raises(KeyboardInterrupt):
        clip_train.train_and_evaluate(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [2]
    again = clip_train.train_and_evaluate(config, tmp_path / "run")
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    one, other = (
      gm.ScoreLedger(run / "ledger").table()
      for run in (whole, tmp_path / "run")
    )
    assert one.equals(other)
    rows = [
      writers.read_metrics(run / writers.METRICS_FILE)
      for run in (whole, tmp_path / "run")
    ]
    assert rows[0] == rows[1]

  def test_broken_samples_are_counted(self, folder, tmp_path):
    config = on_shards(folder, **{"data.max_broken_share": 0.0})
    with pytest.raises(ValueError, match=r"samples that were looked at are"):
      # The held-out pairs are read whole, and there one is broken.
      clip_train.train_and_evaluate(
        make(
          config,
          **{
            "method": "sgd",
            "data.shards": (str(folder),),
            "data.held_out_shards": (str(folder / "00000000.tar"),),
            "data.held_out_size": 24,
            "data.max_broken_share": 0.0,
          },
        ),
        tmp_path / "run",
      )


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"method": "agra"}, r"config\.method is 'agra'; expected one of sgd"),
    ({"num_samples": 15}, "less than one batch"),
    ({"mesh.data": 9}, r"config\.mesh is data=9, fsdp=1, and there are 8"),
    ({"mesh.data": 3}, "batch_size is 16 on 3 devices"),
    ({"data.name": "laion"}, "expected one of shapes, shards"),
    ({"data.name": "shards"}, r"config\.data\.shards is empty"),
    ({"model.clip.vocab_size": 40}, "set config.model.clip.vocab_size="),
    ({"method": "grad_mimic_weights"}, "published weights, or use experi"),
    ({"eval_batch_size": 32}, r"held-out pairs and config\.eval_batch_size"),
    (
      {"eval_every_steps": 0},
      r"config\.eval_every_epochs is 0; expected at least 1",
    ),
  ],
)
def test_what_a_beginner_gets_wrong(tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    clip_train.train_and_evaluate(on_shapes(**overrides), tmp_path / "run")
  assert not (tmp_path / "run").exists()


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
def test_what_a_study_refuses(overrides, message):
  with pytest.raises(ValueError, match=message):
    clip_study_runs.runs_of(on_shapes(**overrides))


def test_a_studys_settings():
  config = on_shapes(
    "layers=all+image_last_mlp,direction=weights+outputs,ess=0.3,"
    "temperature=0.05,others=output_agreement+rho"
  )
  names = list(clip_study_runs.settings_of(config))
  assert len(names) == 1 + 2 * 2 * 2 + 2 * 2
  assert "grad_mimic_outputs_image_last_mlp_temperature0.05" in names
  # Neither looks at layers.
  assert names[-3::2] == [
    "output_agreement_temperature0.05",
    "rho_temperature0.05",
  ]
  larger = on_shapes("reference=larger,direction=outputs")
  reference, *_ = clip_study_runs.runs_of(larger)
  assert reference.overrides["model.clip.image_width"] == 128
  assert reference.overrides["seed"] == 1000


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
  found = clip_study_measures.steps_to([0, 10, 20], values, target)
  assert found == expected


def test_the_optimizer_is_openclips():
  """Warm-up and cosine at DataComp's numbers; what decays and what doesn't."""
  config = datacomp.get_config("scale=small").optimizer
  rate = optimizer._warmed_up(config, 3125)
  for step in (0, 1, 250, 499, 500, 501, 1800, 3124):
    expected = 5e-4 * (step + 1) / 500
    if step >= 500:
      done = (step - 500) / (3125 - 500)
      expected = 0.5 * (1 + math.cos(math.pi * done)) * 5e-4
    assert float(rate(jnp.asarray(step))) == pytest.approx(expected, rel=1e-5)
  params = {
    "kernel": jnp.ones((2, 2)),
    "bias": jnp.ones(2),
    "logit_scale": jnp.ones([]),
  }
  tx = optimizer.create(config, total_steps=3125)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -5e-4 / 500 * 0.2, rtol=1e-5)
  assert not updates["bias"].any()
  assert not updates["logit_scale"].any()


@pytest.mark.slow
def test_devices_share_a_batch(tmp_path):
  """The same run on eight devices; its step is compiled once."""
  reference = on_shapes(**{"noise.rate": 0.0})
  clip_train.train_and_evaluate(reference, tmp_path / "reference")
  found = {}
  for count in (1, 8):
    config = on_shapes(
      **{
        "mesh.data": count,
        "method": "grad_mimic_outputs",
        "mimic.reference": str(tmp_path / "reference"),
      }
    )
    found[count] = clip_train.train_and_evaluate(config, tmp_path / f"{count}")
  assert found[1]["fingerprint"] == found[8]["fingerprint"]
  for name in ("held_out_loss", "zero_shot_accuracy@1"):
    assert found[1][name] == pytest.approx(found[8][name], rel=1e-3)
  one, eight = (
    gm.ScoreLedger(tmp_path / str(count) / "ledger").matrix()[1]
    for count in (1, 8)
  )
  np.testing.assert_allclose(one, eight, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "fsdp"), [("grad_mimic_weights", 4), ("grad_mimic_outputs", 1)]
)
def test_processes_share_a_batch(tmp_path, method, fsdp):
  """Two processes of two devices each do what one process does."""
  wide = {"model.clip.image_mlp_width": 4096}  # enough to be divided
  reference = on_shapes(**{"noise.rate": 0.0, **wide})
  clip_train.train_and_evaluate(reference, tmp_path / "reference")
  config = on_shapes(
    **{
      "mesh.data": -1,
      "mesh.fsdp": fsdp,
      "method": method,
      "mimic.force": True,
      "mimic.reference": str(tmp_path / "reference"),
      **wide,
    }
  )
  flags = [
    f"--config.{name}={value}"
    for name, value in workdir_lib.flatten(config).items()
    if value is not None
  ]
  started = processes.start(
    [
      *("-m", "experiments.train", "--config=configs/contrastive.py"),
      *(f"--workdir={tmp_path / 'run'}", *flags),
    ],
    count=2,
    devices=2,
  )
  processes.finish(started)
  alone = clip_train.train_and_evaluate(
    make(config, **{"mesh.data": 1, "mesh.fsdp": 1}), tmp_path / "alone"
  )
  together = json.loads((tmp_path / "run" / "result.json").read_text())
  assert together["fingerprint"] == alone["fingerprint"]
  for name in ("held_out_loss", "zero_shot_accuracy@1"):
    assert together[name] == pytest.approx(alone[name], rel=1e-3)
  found = [
    clip_filters.mean_scores(tmp_path / name) for name in ("alone", "run")
  ]
  np.testing.assert_array_equal(found[0].ids, found[1].ids)
  np.testing.assert_allclose(
    found[0].values, found[1].values, rtol=1e-2, atol=1e-4
  )


@pytest.mark.slow
def test_a_foreign_reference_is_flagged(tmp_path):
  learned = {
    "num_samples": 60 * 64,
    "batch_size": 64,
    "eval_every_steps": 60,
    "data.train_size": 640,
    "checkpoint.every_steps": 60,
  }
  reference = on_shapes(**{**learned, "seed": 1000, "noise.rate": 0.0})
  clip_train.train_and_evaluate(reference, tmp_path / "reference")
  config = on_shapes(
    **{
      **learned,
      "method": "grad_mimic_weights",
      "mimic.reference": str(tmp_path / "reference"),
    }
  )
  with pytest.raises(ValueError, match=r"foreign basin.*grad_mimic_outputs"):
    clip_train.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.slow
def test_costs_are_of_all_settings(study, tmp_path, monkeypatch):
  _, config, folder = study
  monkeypatch.setattr(clip_costs.costs, "_ROUNDS", 2)
  config = make(
    config,
    **{
      "mimic.reference": str(folder / "seed0" / "reference"),
      "study.cost_batch_sizes": (16, 32),
    },
  )
  found = clip_costs.measure(config, tmp_path / "costs")
  assert list(found["batches"]) == ["16", "32"]
  for entries in found["batches"].values():
    assert entries["sgd"]["time"] == 1
    assert entries["grad_mimic_weights_all_ess0.7"]["memory"] > 0.5
