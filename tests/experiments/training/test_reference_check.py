"""The check of a reference before the first step, in runs and in studies."""

import json

import jax
import pytest

from configs import classification
from experiments.studies import runner as study
from experiments.training import reference_check, trainer as train

# The contract of tasks has the check recorded, a run stopped, and one forced.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def references(tmp_path_factory, digits_dir):
  """Finished runs of the learner's own seed and of another."""
  folder = tmp_path_factory.mktemp("references")

  def config(**overrides):
    fields = classification.get_config().unlock()
    fields.update_from_flattened_dict(
      {
        "data.data_dir": digits_dir,
        "mesh.data": 1,  # of the eight virtual devices
        "num_epochs": 4,
        "model.widths": (32, 32),
        "optimizer.learning_rate": 1e-2,
        **overrides,
      }
    )
    return fields.lock()

  # The fixture that does this for tests comes after a module's.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    for seed in (0, 1000):
      train.train_and_evaluate(config(seed=seed), folder / str(seed))
  return config, folder


def mimic(references, seed, **overrides):
  config, folder = references
  fields = {"method": "grad_mimic", "mimic.reference": str(folder / str(seed))}
  return config(**{**fields, "noise.rate": 0.4, "num_epochs": 1, **overrides})


def begin(config, folder):
  """Starts a run, which stops before its first step."""

  def stop(run, *_):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.Run, "to_the_end", stop)
    with pytest.raises(KeyboardInterrupt):
      train.train_and_evaluate(config, folder)


def test_a_reference_of_the_own_seed_is_ok_and_recorded(references, tmp_path):
  begin(mimic(references, 0), tmp_path / "run")
  report = json.loads((tmp_path / "run" / reference_check.FILE).read_text())
  assert report["verdict"] == "ok"
  assert report["num_samples"] == 256
  assert len(report["path"]) == len(report["path_losses"])
  # Another one in the same workdir is checked for itself.
  with pytest.raises(ValueError, match="foreign basin"):
    train.train_and_evaluate(mimic(references, 1000), tmp_path / "run")


def test_a_foreign_reference_stops_a_run_until_it_is_mended(
  references, tmp_path
):
  with pytest.raises(ValueError, match=r"foreign basin.*grad_mimic_outputs"):
    train.train_and_evaluate(mimic(references, 1000), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  # What the message advises works in the same workdir.
  mended = mimic(references, 1000, method="grad_mimic_outputs")
  begin(mended, tmp_path / "run")
  assert not (tmp_path / "run" / reference_check.FILE).exists()


def test_force_goes_on_with_a_foreign_reference(references, tmp_path):
  forced = mimic(references, 1000, **{"mimic.force": True})
  begin(forced, tmp_path / "run")
  with pytest.raises(ValueError, match="foreign basin"):
    train.train_and_evaluate(mimic(references, 1000), tmp_path / "run")
  report = json.loads((tmp_path / "run" / reference_check.FILE).read_text())
  assert report["verdict"] == "foreign basin"


def test_a_study_stops_too_and_its_advice_works_there(make_config, tmp_path):
  fields = {
    "noise.rate": 0.4,
    "study.reference.seed_offset": 1000,
    "study.retrain": False,
  }

  def run(**changes):
    config = make_config(**fields, **changes)
    return study.run_study(config, tmp_path / "study")

  with pytest.raises(ValueError, match="foreign basin"):
    run(**{"study.methods": ("grad_mimic",)})
  reference = tmp_path / "study" / "seed0" / "reference" / "result.json"
  made = reference.stat().st_mtime_ns
  run(**{"study.methods": ("grad_mimic_outputs",)})
  assert reference.stat().st_mtime_ns == made
