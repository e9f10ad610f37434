"""What the loop costs beside its steps is measured on the loop itself."""

import json

import pytest

from configs.benchmark import loop as overhead_config
from experiments.benchmarks import loop as overhead
from experiments.runtime import metrics as writers


@pytest.fixture
def config(digits_dir):
  config = overhead_config.get_config("model=mlp").unlock()
  config.update_from_flattened_dict(
    {
      "data.data_dir": digits_dir,
      "mesh.data": 1,
      "model.widths": (16,),
      "checkpoint.keep": 1,
    }
  )
  return config.lock()


def test_every_round_is_measured(config, tmp_path):
  found = overhead.measure(config, tmp_path / "run", steps_a_round=4)
  assert json.loads((tmp_path / "run/overhead.json").read_text()) == found
  low, high = found["overhead_quartiles"]
  assert low <= found["overhead"] <= high
  # The loop does all that the steps do, and more.
  assert found["overhead"] > 0
  assert 0 < found["step_seconds"] < found["loop_seconds"]
  assert 0 <= found["data_wait"] < 1
  rows = writers.read_metrics(tmp_path / "run" / writers.METRICS_FILE)
  assert max(row["step"] for row in rows) == 40
  with pytest.raises(ValueError, match=r"was used before; expected a new one"):
    overhead.measure(config, tmp_path / "run", steps_a_round=4)


def test_a_loop_that_sleeps_has_that_overhead(config, tmp_path, monkeypatch):
  """Beside its steps: the same steps by themselves do not sleep."""
  take = overhead.train.Run.take
  seconds = 0.02

  def sleepy(self, step, read):
    overhead.time.sleep(seconds)
    return take(self, step, read)

  monkeypatch.setattr(overhead.train.Run, "take", sleepy)
  found = overhead.measure(config, tmp_path / "run", steps_a_round=4)
  assert found["loop_seconds"] > seconds
  assert found["step_seconds"] < found["loop_seconds"] - seconds / 2
  expected = found["loop_seconds"] / found["step_seconds"] - 1
  assert found["overhead"] == pytest.approx(expected, rel=0.5)


def test_a_model_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match=r"model='vit'; expected resnet or mlp"):
    overhead_config.get_config("model=vit")
