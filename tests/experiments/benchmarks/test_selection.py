"""The benchmark of millions of samples, on thousands."""

import json

import pytest

from configs.benchmark import selection as selection_config
from experiments.benchmarks import selection


@pytest.fixture
def config():
  config = selection_config.get_config().unlock()
  config.samples, config.batch_size, config.steps = (2000, 4000), 300, 3
  return config.lock()


def test_one_size_leaves_nothing_behind(config, tmp_path):
  asked = config.to_dict() | {"samples": 3000}
  del asked["benchmark"]
  found = selection.measure_one(tmp_path, **asked)
  assert found["seconds"] == pytest.approx(
    sum(found[s] for s in selection.STAGES)
  )
  assert found["f1"] > 0.95  # a step by itself errs on 5 %
  assert 3000 * 3 * 4 < found["ledger_gb"] * 1e9 < 3000 * 3 * 28
  assert found["peak_gb"] > 0.05
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_size_once(config, tmp_path, monkeypatch):
  results = selection.measure(config, tmp_path / "run")
  assert list(results["sizes"]) == ["2000", "4000"]
  stored = json.loads((tmp_path / "run" / "selection.json").read_text())
  assert stored == results
  for name in ("selection_time.png", "selection_memory.png"):
    assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
  assert len(selection.table(config, results).splitlines()) == 3
  monkeypatch.setattr(
    selection.subprocess, "run", None
  )  # nothing is left to do
  assert selection.measure(config, tmp_path / "run") == results


@pytest.mark.parametrize(
  ("field", "value"), [("samples", (5, 0)), ("steps", 0), ("batch_size", -1)]
)
def test_what_can_not_be_measured(config, tmp_path, field, value):
  config = config.copy_and_resolve_references().unlock()
  config[field] = value
  with pytest.raises(ValueError, match=rf"config.{field} is .*at least 1"):
    selection.measure(config.lock(), tmp_path / "run")
  assert not (tmp_path / "run").exists()
