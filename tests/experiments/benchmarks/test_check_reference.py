"""The check of references, checked on digits."""

import pytest

from configs.benchmark import check_reference as check_reference_config
from experiments.benchmarks import check_reference


@pytest.mark.slow
def test_basins_are_told_apart_on_digits(tmp_path, digits_dir):
  config = check_reference_config.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "data.data_dir": digits_dir,
      "mesh.data": 1,  # of the eight virtual devices
      "num_epochs": 4,
      "check_reference.seeds": (0,),
      "check_reference.epochs": (0, 4),
      "check_reference.rates": (0.0, 0.6),
    }
  )
  results = check_reference.measure(config.lock(), tmp_path / "run")
  assert len(results["checks"]) == 16
  assert results["errors"] == []
  assert (tmp_path / "run" / "check_reference.png").exists()
  # Whatever is there already is not trained again, and says the same.
  again = check_reference.measure(config, tmp_path / "run")
  assert again["checks"] == results["checks"]
