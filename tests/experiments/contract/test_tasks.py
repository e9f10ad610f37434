"""What every task's jobs promise, asked of each of them."""

import json

import jax
import numpy as np
import processes
import pytest
import tiny

import gradmimic_jax as gm
from configs import score as score_config
from experiments import tasks
from experiments.runtime import checkpoint, distributed, locks, metrics
from experiments.training import scoring, trainer

METHODS = ("grad_mimic", "rho", "output_agreement", "random")


def test_every_task_is_asked():
  assert set(tiny.TASKS) == set(tasks.TASKS)


@pytest.fixture(scope="module", params=tiny.TASKS)
def task(request):
  return request.param


@pytest.fixture(scope="module")
def make(task, digits_dir):
  return lambda **fields: tiny.make(task, digits_dir, **fields)


@pytest.fixture(scope="module")
def reference(make, tmp_path_factory):
  """The folder of a finished run on clean data."""
  folder = tmp_path_factory.mktemp("reference") / "run"
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    trainer.train_and_evaluate(
      make(method="sgd", **{"noise.rate": 0.0}), folder
    )
  return str(folder)


@pytest.fixture(scope="module")
def whole(make, reference, tmp_path_factory):
  """A method's config, the folder of its finished run, and the result."""
  runs = {}

  def run(method):
    if method not in runs:
      config = make(method=method, **{"mimic.reference": reference})
      folder = tmp_path_factory.mktemp("whole") / method
      runs[method] = (
        config,
        folder,
        trainer.train_and_evaluate(config, folder),
      )
    return runs[method]

  return run


@pytest.fixture(scope="module")
def made(make):
  """The task itself."""
  return tasks.create(make(), distributed.Devices.alone())


def assert_same_run(like, one, other):
  """The same parameters, metrics and ledgers, bit for bit."""
  params = [checkpoint.load_params(folder, like) for folder in (one, other)]
  jax.tree.map(np.testing.assert_array_equal, *params)
  lines = [metrics.read_metrics(x / metrics.METRICS_FILE) for x in (one, other)]
  assert lines[0] == lines[1]
  ledgers = [x / trainer.LEDGER_FOLDER for x in (one, other)]
  assert ledgers[0].exists() == ledgers[1].exists()
  if ledgers[0].exists():
    tables = [gm.ScoreLedger(path).table() for path in ledgers]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
  ("method", "count"),
  [
    ("grad_mimic", 3),
    *(
      pytest.param(method, count, marks=pytest.mark.slow)
      for method in ("rho", "output_agreement", "random")
      for count in (0, 2, 5)
    ),
  ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
  whole, made, tmp_path, method, count
):
  config, folder, result = whole(method)
  with tiny.interrupted(count):
    trainer.train_and_evaluate(config, tmp_path / "run")
  assert tiny.checkpointed(tmp_path / "run") == list(range(2, count + 1, 2))
  again = trainer.train_and_evaluate(config, tmp_path / "run")
  assert {**again, "seconds": 0} == {**result, "seconds": 0}
  assert_same_run(made.params, folder, tmp_path / "run")


def test_a_finished_run_is_not_repeated(whole, monkeypatch):
  config, folder, result = whole("grad_mimic")
  monkeypatch.setattr(trainer.Run, "to_the_end", None)
  assert trainer.train_and_evaluate(config, folder) == result


def test_a_workdir_in_use_is_refused(whole, tmp_path):
  config, _, _ = whole("grad_mimic")
  with (
    locks.hold(tmp_path / "run"),
    pytest.raises(locks.InUseError, match="run"),
  ):
    trainer.train_and_evaluate(config, tmp_path / "run")


def test_a_workdir_of_another_config_is_refused(whole, make):
  _, folder, _ = whole("grad_mimic")
  other = make(method="sgd")
  with pytest.raises(ValueError, match=r"belongs to another config: method is"):
    trainer.train_and_evaluate(other, folder)


def test_microbatches_train_alike_or_are_refused(
  whole, make, made, reference, tmp_path
):
  fields = {"method": "grad_mimic", "mimic.reference": reference}
  config = make(**fields, **{"mimic.microbatch_size": 4})
  if made.outputs.coupled:
    with pytest.raises(ValueError, match=r"microbatch_size is 4.*batch mates"):
      trainer.train_and_evaluate(config, tmp_path / "run")
    return
  _, folder, _ = whole("grad_mimic")
  trainer.train_and_evaluate(config, tmp_path / "run")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    checkpoint.load_params(folder, made.params),
    checkpoint.load_params(tmp_path / "run", made.params),
  )


class TestScoring:
  def config(self, folder, reference, **fields):
    config = score_config.get_config(f"learner={folder}").unlock()
    config.batch_size, config.flush_every = 16, 1
    config.mesh.data = 1
    config.mimic.reference = reference
    config.update(fields)
    return config.lock()

  @pytest.mark.parametrize("method", ["grad_mimic", "output_agreement"])
  def test_every_sample_has_a_score_at_each_checkpoint(
    self, whole, reference, tmp_path, method
  ):
    _, folder, _ = whole("grad_mimic")
    config = self.config(folder, reference, method=method)
    result = scoring.score_dataset(config, tmp_path / "scores")
    ids, scores = gm.ScoreLedger(tmp_path / "scores" / "ledger").matrix()
    assert len(ids) == result["samples"] == 48
    assert scores.shape == (48, len(result["checkpoints"]))
    assert np.isfinite(scores).all()

  def test_an_interrupted_pass_goes_on(
    self, whole, reference, tmp_path, monkeypatch
  ):
    _, folder, _ = whole("grad_mimic")
    config = self.config(folder, reference)
    scoring.score_dataset(config, tmp_path / "whole")
    append, done = gm.ScoreLedger.append, []

    def stopping(*args, **fields):
      if len(done) == 4:
        raise KeyboardInterrupt
      done.append(None)
      return append(*args, **fields)

    with monkeypatch.context() as patch:
      patch.setattr(gm.ScoreLedger, "append", stopping)
      with pytest.raises(KeyboardInterrupt):
        scoring.score_dataset(config, tmp_path / "run")
    scoring.score_dataset(config, tmp_path / "run")
    tables = [
      gm.ScoreLedger(tmp_path / name / "ledger").table()
      for name in ("whole", "run")
    ]
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_two_processes_train_alike(task, whole, make, reference, tmp_path):
  """Of the same batches, up to the order of sums."""
  _, folder, result = whole("grad_mimic")
  config = make(
    **{"method": "grad_mimic", "mimic.reference": reference, "mesh.data": 2}
  )
  file = tmp_path / "config.json"
  file.write_text(config.to_json())
  code = (
    "import json, sys; from ml_collections import config_dict;"
    " from experiments.runtime import cli; from experiments.training import"
    " trainer; c = config_dict.ConfigDict(json.load(open(sys.argv[-1])));"
    " del sys.argv[-1];"
    " cli.run(lambda _, w: trainer.train_and_evaluate(c, w),"
    " processes=cli.SHARED)"
  )
  flags = [f"--workdir={tmp_path / 'run'}", "--config=configs/digits.py"]
  processes.finish(processes.start(["-c", code, *flags, str(file)], count=2))
  again = json.loads((tmp_path / "run" / trainer.RESULT_FILE).read_text())
  headline = tasks.TASKS[task].headline.loss
  assert again[headline] == pytest.approx(result[headline], rel=1e-4)
  ids, scores = gm.ScoreLedger(tmp_path / "run" / "ledger").matrix()
  mine, alone = gm.ScoreLedger(folder / "ledger").matrix()
  np.testing.assert_array_equal(ids, mine)
  np.testing.assert_allclose(scores, alone, rtol=1e-3, atol=1e-5)


def test_the_reference_is_asked_for_by_name(make, tmp_path):
  with pytest.raises(ValueError, match="needs a reference"):
    trainer.train_and_evaluate(make(method="grad_mimic"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_devices_that_do_not_divide_a_batch_are_refused(make, tmp_path):
  with pytest.raises(ValueError, match="16 on 3 devices"):
    trainer.train_and_evaluate(make(**{"mesh.data": 3}), tmp_path / "run")


def test_a_task_that_is_not_there(make):
  config = make().copy_and_resolve_references().unlock()
  config.task = "origami"
  with pytest.raises(ValueError, match="has the task 'origami'; expected one"):
    tasks.create(config, distributed.Devices.alone())
