"""CLIP's jobs: training on shapes and shards, filters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pairs_case
import pytest
import tiny
from pairs_case import make, on_shapes, on_shards

import gradmimic_jax as gm
from configs import datacomp
from experiments import tasks
from experiments.data.pairs import shapes
from experiments.runtime import checkpoint, distributed
from experiments.training import optimizer, trainer as clip_train


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
    with tiny.nudged():
      clip_train.train_and_evaluate(on_shards(folder, method="sgd"), where)
  return where


@pytest.fixture(scope="module")
def scored(folder, teacher, tmp_path_factory):
  """A finished run with scores on every other pair: config, folder, result.

  Beside the folder is what a kill would have left of it.
  """
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
    tiny.before_step(3, lambda: tiny.kill(where / "run", where / "killed", 3)),
  ):
    result = clip_train.train_and_evaluate(config, where / "run")
  return config, where / "run", result


class TestShards:
  @pytest.mark.slow
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

  @pytest.mark.slow
  def test_a_killed_run_goes_on_bit_for_bit(self, scored):
    """With the place in the shards restored."""
    config, whole, result = scored
    run = whole.with_name("killed")
    assert checkpoint.steps(run) == [2]
    again = clip_train.train_and_evaluate(config, run)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    task = tasks.create(config, distributed.Devices.alone())
    tiny.assert_same_run(whole, run, task.params)

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


def test_the_optimizer_is_openclips():
  """Warm-up and cosine at DataComp's numbers; what decays and what doesn't."""
  config = datacomp.get_config("scale=small").optimizer
  rate = jax.jit(optimizer._learning_rate(config, 3125))
  for step in (0, 1, 250, 499, 500, 501, 1800, 3124):
    expected = 5e-4 * (step + 1) / 500
    if step >= 500:
      done = (step - 500) / (3125 - 500)
      expected = 0.5 * (1 + math.cos(math.pi * done)) * 5e-4
    assert float(rate(step)) == pytest.approx(expected, rel=1e-5)
  params = {
    "kernel": jnp.ones((2, 2)),
    "bias": jnp.ones(2),
    "logit_scale": jnp.ones([]),
  }
  tx = optimizer.create(config, total_steps=3125)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -5e-4 / 500 * 0.2, rtol=1e-5)
  assert not updates["bias"].any()
  assert not updates["logit_scale"].any()


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
