"""What every task's jobs promise, asked of each of them."""

import json
import pathlib
import shutil

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

KILLED_BEFORE = 3  # a step; a checkpoint is at 2


def of_tasks(*some):
  """A test that asks these tasks by default, and the others if slow."""
  return pytest.mark.parametrize(
    "task",
    [
      pytest.param(x, marks=() if x in some else pytest.mark.slow)
      for x in tiny.TASKS
    ],
    indirect=True,
    scope="module",
  )


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
  """A method's config, the folder of its finished run, and the result.

  Beside the folder is what a kill would have left of it.
  """
  runs = {}

  def run(method, **fields):
    key = (method, *sorted(fields.items()))
    if key not in runs:
      config = make(method=method, **{"mimic.reference": reference}, **fields)
      folder = tmp_path_factory.mktemp("whole") / "run"
      with tiny.before_step(
        KILLED_BEFORE,
        lambda: tiny.killed(folder, folder.with_name("killed"), KILLED_BEFORE),
      ):
        result = trainer.train_and_evaluate(config, folder)
      runs[key] = (config, folder, result)
    return runs[key]

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


def test_a_killed_run_goes_on_bit_for_bit(whole, made, tmp_path):
  config, folder, result = whole("grad_mimic")
  shutil.copytree(folder.with_name("killed"), tmp_path / "run")
  again = trainer.train_and_evaluate(config, tmp_path / "run")
  assert {**again, "seconds": 0} == {**result, "seconds": 0}
  assert_same_run(made.params, folder, tmp_path / "run")


METHODS = [
  *(
    (task, method, {})
    for task in tiny.TASKS
    for method in ("rho", "output_agreement", "random")
  ),
  *(
    ("classification", method, fields)
    for method, fields in (
      ("grad_mimic_outputs", {"data.flip": True}),
      ("grad_mimic", {"mimic.direction": "clean_gradient"}),
      ("agra", {"data.flip": True}),
      ("grand_offline", {"mimic.grand_runs": 2}),
      ("distillation", {"data.flip": True}),
    )
  ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("task", "method", "fields"), METHODS, indirect=["task"], scope="module"
)
def test_an_interrupted_run_goes_on_bit_for_bit(
  whole, made, reference, tmp_path, method, fields
):
  """Whatever a method keeps: outputs, norms, batches, places in the data."""
  config, folder, result = whole(method, **fields)
  for count in (0, 2, 5):
    run = tmp_path / str(count)
    with tiny.interrupted(count):
      trainer.train_and_evaluate(config, run)
    assert checkpoint.steps(run) == list(range(2, count + 1, 2))
    # What is kept of the reference's outputs is computed anew on the way.
    for file in pathlib.Path(reference).glob("*.npy"):
      file.unlink()
    again = trainer.train_and_evaluate(config, run)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert_same_run(made.params, folder, run)


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
  other = make(method="grad_mimic", **{"optimizer.learning_rate": 0.5})
  with pytest.raises(
    ValueError,
    match=r"belongs to another config: .*learning_rate is \S+ there and 0\.5",
  ):
    trainer.train_and_evaluate(other, folder)


@of_tasks("classification", "contrastive")
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
  """Of every sample, at each of a run's checkpoints."""

  def config(self, folder, reference, **fields):
    config = score_config.get_config(f"learner={folder}").unlock()
    config.batch_size, config.flush_every = 16, 1
    config.mesh.data = 1
    config.mimic.reference = reference
    config.update(fields)
    return config.lock()

  @pytest.fixture(scope="class")
  def scored(self, whole, reference, tmp_path_factory):
    """The job's config, its folder, and what a kill would have left of it."""
    _, learner, _ = whole("grad_mimic")
    config = self.config(learner, reference)
    folder = tmp_path_factory.mktemp("scored") / "whole"
    append, done = gm.ScoreLedger.append, []

    def appending(*args, **fields):
      if len(done) == 4:
        shutil.copytree(folder, folder.with_name("killed"))
      done.append(None)
      return append(*args, **fields)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(gm.ScoreLedger, "append", appending)
      scoring.score_dataset(config, folder)
    return config, folder

  def scores_of(self, folder):
    ids, scores = gm.ScoreLedger(folder / "ledger").matrix()
    assert len(ids) == 48
    assert scores.shape == (48, 3)
    assert np.isfinite(scores).all()
    return scores

  def test_a_killed_pass_goes_on(self, scored):
    config, folder = scored
    killed = folder.with_name("killed")
    assert len(gm.ScoreLedger(killed / "ledger")) == 4 * 16
    self.scores_of(folder)
    scoring.score_dataset(config, killed)
    tables = [gm.ScoreLedger(x / "ledger").table() for x in (folder, killed)]
    assert tables[0].equals(tables[1])

  def test_output_agreement(self, whole, reference, tmp_path):
    _, learner, _ = whole("grad_mimic")
    config = self.config(learner, reference, method="output_agreement")
    result = scoring.score_dataset(config, tmp_path / "scores")
    assert (result["samples"], result["checkpoints"]) == (48, [2, 4, 6])
    self.scores_of(tmp_path / "scores")


@of_tasks("classification")
def test_two_processes_train_alike(task, whole, make, reference, tmp_path):
  """Of the same batches, up to the order of sums; the first one speaks."""
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
    " del sys.argv[-1]; cli.run(lambda _, w: trainer.main(c, w),"
    " processes=cli.SHARED)"
  )
  flags = [f"--workdir={tmp_path / 'run'}", "--config=configs/digits.py"]
  first, second = processes.finish(
    processes.start(["-c", code, *flags, str(file)], count=2)
  )
  again = json.loads((tmp_path / "run" / trainer.RESULT_FILE).read_text())
  assert again["fingerprint"] in first
  assert again["fingerprint"] not in second
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
