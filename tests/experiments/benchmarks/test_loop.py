"""What the loop costs beside its steps is measured on the loop itself."""

import json
import time

import pytest

from configs.benchmark import loop as loop_config
from experiments.benchmarks import loop
from experiments.runtime import metrics as writers


@pytest.fixture
def config(digits_dir):
  config = loop_config.get_config("parts=mlp_sgd").unlock()
  config.update_from_flattened_dict(
    {
      "data.data_dir": digits_dir,
      "mesh.data": 1,
      "model.widths": (16,),
      "checkpoint.keep": 1,
      "steps_per_call": 2,
    }
  )
  return config.lock()


@pytest.mark.slow
def test_every_round_of_a_loop_that_sleeps(config, tmp_path, monkeypatch):
  """Beside its steps: the same steps by themselves do not sleep."""
  take, pause = loop.trainer.Run.take, 0.02

  def sleepy(self, step, read):
    time.sleep(pause * len(read.epochs))
    return take(self, step, read)

  monkeypatch.setattr(loop.trainer.Run, "take", sleepy)
  folder = tmp_path / "run"
  results = loop.measure(config, folder, steps_a_round=4)
  assert json.loads((folder / loop.RESULT_FILE).read_text()) == results
  found = results["mlp_sgd"]
  low, high = found["overhead_quartiles"]
  assert low <= found["overhead"] <= high
  assert found["steps_per_call"] == 2
  assert found["loop_seconds"] > pause
  assert 0 < found["step_seconds"] < found["loop_seconds"] - pause / 2
  assert 0 < found["main_thread_seconds"] < found["loop_seconds"]
  expected = found["loop_seconds"] / found["step_seconds"] - 1
  assert found["overhead"] == pytest.approx(expected, rel=0.5)
  assert 0 <= found["data_wait"] < 1
  assert f"{1 + found['overhead']:.2f}" in loop.table(config, results)
  file = folder / "mlp_sgd" / "run" / writers.METRICS_FILE
  rows = writers.read_metrics(file)
  assert max(row["step"] for row in rows) == 40
  with pytest.raises(ValueError, match=r"was used before; expected a new one"):
    loop.measure(config, folder, steps_a_round=4)


def test_a_part_that_is_not_there_is_refused(tmp_path):
  config = loop_config.get_config("parts=vit")
  with pytest.raises(ValueError, match=r"parts has 'vit'; expected some of"):
    loop.measure(config, tmp_path)
