"""One command for all benchmarks, and their stopwatch."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import pytest

from configs import benchmark as configs, digits
from configs.benchmark import methods as methods_config
from experiments import benchmarks
from experiments.benchmarks import methods, timing
from experiments.runtime import workdir as workdir_lib
from experiments.studies import comparison, plan


@pytest.mark.parametrize(
  "name", [module.name for module in pkgutil.iter_modules(configs.__path__)]
)
def test_each_config_names_its_benchmark(name):
  config = importlib.import_module(f"configs.benchmark.{name}").get_config()
  assert config.benchmark == name
  assert config.is_locked
  module = benchmarks.load(config)
  assert f"{name}.json" == module.RESULT_FILE
  assert callable(module.measure)
  assert callable(module.table)


@pytest.mark.parametrize("name", ["abacus", None])
def test_a_benchmark_that_is_not_there_is_refused(name, tmp_path):
  config = digits.get_config().unlock()
  if name:
    config.benchmark = name
  with pytest.raises(ValueError, match=rf"is {name!r}; expected one of engine"):
    benchmarks.main(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_what_is_found_is_printed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(methods, "measure", lambda config, workdir: FOUND)
  benchmarks.main(methods_config.get_config(), tmp_path)
  shown = capsys.readouterr().out
  assert "| 32 | rho | 1.50 | - |" in shown
  assert str(tmp_path / "methods.json") in shown


def test_one_benchmark_of_several_processes(monkeypatch, tmp_path):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="single process"):
    benchmarks.main(methods_config.get_config(), tmp_path / "run")


FOUND = {
  "machine": {"device": "cpu"},
  "batches": {
    "32": {
      "sgd": {"time": 1.0, "flops": 1.0, "memory": 1.0, "milliseconds": 2.0},
      "rho": {"time": 1.5, "flops": None, "memory": None, "milliseconds": 3.0},
    }
  },
}


def test_costs_of_the_first_batch_size_are_read_back(tmp_path):
  file = tmp_path / methods.RESULT_FILE
  workdir_lib.write_json(file, FOUND)
  found = comparison.load_costs(file)
  assert found["batch_size"] == 32
  assert found["methods"] == FOUND["batches"]["32"]
  workdir_lib.write_json(file, FOUND | {"batches": {}})
  with pytest.raises(ValueError, match="has no batches"):
    comparison.load_costs(file)
  workdir_lib.write_json(file, {"methods": {}})
  with pytest.raises(ValueError, match="its machine is"):
    comparison.load_costs(file)


def test_costs_are_asked_for_by_a_study():
  config = methods_config.get_config("study=shapes,others=rho,ess=0.5+0.7")
  names = plan.plan_settings(config)
  assert {"grad_mimic_weights_all_ess0.5", "rho_ess0.7"} <= set(names)
  config = methods_config.get_config("study=label_noise,dataset=dtd")
  assert plan.plan_settings(config)["rho"] == {"method": "rho"}
  for arg in ("study=nonsense", "rate=0.4", "rate=0.4,study=digits"):
    with pytest.raises(ValueError, match="expected study=digits or"):
      methods_config.get_config(arg)


@pytest.mark.parametrize("size", [48, 0])
def test_a_batch_size_is_the_run_s_own_unless_costs_have_some(size):
  config = methods_config.get_config("study=shapes").unlock()
  config.data.train_size = 32
  config.study.cost_batch_sizes = (size,) if size else ()
  sized = methods._sized(config, size or config.batch_size)
  assert sized.batch_size == (size or config.batch_size)
  assert sized.data.train_size == (size or 32)


class Clock:
  """Time that passes only where a test lets it."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

  def step(self, duration, log=None, name=""):
    def run():
      self.now += duration
      if log is not None:
        log.append(name)
      return jnp.zeros(())

    return run


def test_a_call_is_a_part_of_several(monkeypatch):
  clock = Clock(monkeypatch)
  assert timing.seconds(clock.step(0.5), 4) == 0.5
  watch = timing.Watch()
  clock.now += 3
  assert (watch.lap(), watch.lap()) == (3, 0)


def test_steps_take_turns_until_there_are_enough_rounds(monkeypatch):
  clock, log = Clock(monkeypatch), []
  steps = {"a": clock.step(1.0, log, "a"), "b": clock.step(2.0, log, "b")}
  calls = {"a": 2, "b": 1}
  found = timing.rounds(steps, calls, least=2)
  assert found == [{"a": 1.0, "b": 2.0}] * 2
  assert "".join(log) == "aab" * 2
  assert len(timing.rounds(steps, calls, least=1, at_least_seconds=9)) == 3


@pytest.mark.parametrize("ahead", [0, 2, None])
def test_no_more_steps_are_under_way_than_may(ahead, monkeypatch):
  under_way, most = [], []

  def step():
    under_way.append(len(under_way))
    most.append(len(under_way))
    return jnp.zeros(())

  def wait(outputs):
    if not isinstance(outputs, list):  # the oldest one
      under_way.pop(0)

  monkeypatch.setattr(timing.jax, "block_until_ready", wait)
  timing.seconds(step, 6, ahead=ahead)
  assert max(most) == (6 if ahead is None else ahead + 1)


def test_a_train_step_goes_on_from_its_own_state():
  step = timing.TrainStep(lambda s, x: (s + x, 10 * s), 1, 2)
  assert [step(), step(), step()] == [10, 30, 50]


def test_ratios_of_what_is_not_known():
  assert timing.ratio(3, 2) == 1.5
  assert timing.ratio(None, 2) is None
  assert timing.ratio(3, 0) is None
