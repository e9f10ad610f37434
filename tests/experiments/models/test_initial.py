"""Runs that start from weights that are there already."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import classification
from experiments import models, tasks
from experiments.models import initial
from experiments.runtime import checkpoint, distributed, sharding
from experiments.studies import runner as study, tables
from experiments.tasks.classification import data as data_lib
from experiments.training import grand, trainer as train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("backbone")


@pytest.fixture
def backbone(make_config, folder):
  """The workdir of a finished run, on fewer samples than the learner's."""
  config = make_config(
    num_epochs=1,
    seed=7,
    **{"noise.rate": 0.0, "data.train_split": "train[:300]"},
  )
  train.train_and_evaluate(config, folder / "run")
  return folder / "run"


@pytest.mark.slow
def test_a_run_starts_from_another_ones_body(make_config, backbone, tmp_path):
  fresh, config = (
    make_config(**{"model.pretrained": source})
    for source in (None, str(backbone))
  )
  plain = train.Run(fresh, tmp_path)
  data = data_lib.load_data(config)
  run = train.Run(config, tmp_path)
  theirs = checkpoint.load_params(backbone, run.state.params)
  jax.tree.map(
    np.testing.assert_array_equal, run.state.params["body"], theirs["body"]
  )
  new = plain.state.params["head"]
  jax.tree.map(np.testing.assert_array_equal, run.state.params["head"], new)
  assert np.abs(theirs["head"]["kernel"] - new["kernel"]).max() > 0.01
  # Images are scaled as those were that the body was trained on.
  shown = json.loads((backbone / "input.json").read_text())
  assert (data.mean, data.std) == (shown["mean"], shown["std"])
  assert data.mean != data_lib.load_data(fresh).mean
  # It belongs to the weights, wherever they lie.
  assert run.fingerprint != plain.fingerprint
  shutil.copytree(backbone, tmp_path / "copy")
  moved = make_config(**{"model.pretrained": str(tmp_path / "copy")})
  again = train.Run(moved, tmp_path)
  assert again.fingerprint == run.fingerprint
  again = grand.fingerprint(moved, data)
  assert again == grand.fingerprint(config, data)
  assert again != grand.fingerprint(fresh, data)


@pytest.mark.slow
def test_a_study_from_a_backbone(make_config, backbone, tmp_path):
  config = make_config(
    **{
      "model.pretrained": str(backbone),
      "noise.rate": 0.4,
      "data.image_size": 8,
      "study.methods": ("grad_mimic",),
      "study.retrain": False,
    }
  )
  summary = study.run_study(config, tmp_path / "study")
  assert len(summary["runs"]) == 2
  # Nothing to compare with.
  assert "saved_loss" not in summary["rows"][-1]
  assert "steps saved" not in tables.markdown(summary)
  assert summary["detection"]["grad_mimic"][0]["auroc"] > 0.8
  # Other weights at the same place are noticed; the same elsewhere are fine.
  shutil.copytree(backbone, tmp_path / "copy")
  with config.unlocked():
    config.model.pretrained = str(tmp_path / "copy")
  assert study.run_study(config, tmp_path / "study") == summary
  with config.unlocked():
    config.model.pretrained = None
  with pytest.raises(ValueError, match="another reference, filter, backbone"):
    study.run_study(config, tmp_path / "study")


def test_a_reference_of_another_architecture_starts_anew(make_config):
  fields = {"model.pretrained": "somewhere"}
  make = tasks.get(make_config()).reference_overrides
  assert "model.pretrained" not in make(make_config(**fields), 0)
  other = make_config(**fields, **{"study.reference.widths": (24,)})
  assert (
    tasks.get(other).reference_overrides(other, 0)["model.pretrained"] is None
  )


@pytest.mark.slow
def test_a_backbone_that_does_not_fit(make_config, backbone, tmp_path):
  def start(**fields):
    config = make_config(**fields)
    return train.Run(config, tmp_path)

  source = {"model.pretrained": str(backbone)}
  with pytest.raises(ValueError, match=r"\(16, 16\).* expected .*\(16, 8\)"):
    start(**source, **{"model.widths": (16, 8)})
  with pytest.raises(ValueError, match=r"images \(8, 8, 1\); expected"):
    start(**source, **{"data.image_size": 4})
  weights = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"w": np.zeros(2, np.float32)}, weights)
  config = make_config(**{"model.pretrained": str(weights)})
  with pytest.raises(ValueError, match=r"'mlp'; expected the workdir.*'vit'"):
    initial.create(config.model, input_shape=(8, 8, 1), num_classes=3, seed=0)
  unfinished = tmp_path / "unfinished"
  unfinished.mkdir()
  (unfinished / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match="no finished run in"):
    start(**{"model.pretrained": str(unfinished)})
  with pytest.raises(FileNotFoundError, match="no file or folder"):
    start(**{"model.pretrained": str(tmp_path / "none")})


@pytest.mark.slow  # a transformer is made
def test_published_weights(request, tmp_path):
  data = request.path.parents[2] / "data"
  start = "weights/"
  with np.load(data / "vit_huggingface.npz", allow_pickle=False) as golden:
    weights = {
      key.removeprefix(start): golden[key]
      for key in golden.files
      if key.startswith(start)
    }
    images, logits = golden["images"], golden["logits"]
  file = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(weights, file)
  config = classification.get_config().unlock().model
  config.name, config.pretrained = "vit", str(file)
  config.vit.update(
    {
      "patch_size": 4,
      "width": 24,
      "depth": 2,
      "heads": 3,
      "mlp_width": 40,
      "pooling": "class_token",
      "norm_epsilon": 1e-12,
    }
  )
  make = {"input_shape": images.shape[1:], "num_classes": logits.shape[1]}
  apply, params = initial.create(config, seed=3, **make)
  _, fresh = models.create(config, seed=3, **make)
  jax.tree.map(np.testing.assert_array_equal, params["head"], fresh["head"])
  # Straight to where they are to be, on each device its own part.
  mesh = distributed.Devices({"data": 1, "fsdp": 8}, batch_size=8).mesh
  shardings = sharding.make_param_shardings(params, mesh, least_size=8)
  _, divided = initial.create(
    config, seed=3, place=lambda tree: jax.device_put(tree, shardings), **make
  )
  assert jax.tree.map(lambda leaf: leaf.sharding, divided) == shardings
  assert any(spec.spec for spec in jax.tree.leaves(shardings))
  jax.tree.map(np.testing.assert_array_equal, divided, params)
  # The rest is the public model: under its head, its logits.
  head = {
    "kernel": jnp.asarray(weights["classifier.weight"].T),
    "bias": jnp.asarray(weights["classifier.bias"]),
  }
  found = jax.jit(apply)({**params, "head": head}, jnp.asarray(images))
  np.testing.assert_allclose(found, logits, atol=1e-5)
  mean, std = initial.scaling(str(file))
  assert len(mean) == len(std) == 3
