"""What every task's jobs promise, asked of each of them."""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny

import gradmimic_jax as gm
from configs import score as score_config
from experiments import tasks
from experiments.runtime import checkpoint, distributed, locks
from experiments.training import (
  calls,
  reference_check,
  scoring,
  trainer,
)

KILLED_BEFORE = 3  # a step; a checkpoint is at 2


CHECK = trainer.Run.check_reference


@pytest.fixture(autouse=True)
def checked_once(monkeypatch):
  """The check of references is a program that takes seconds to compile.

  By default it is made for one task; a slow test makes it for all.
  """
  monkeypatch.setattr(
    trainer.Run,
    "check_reference",
    lambda run: CHECK(run) if run.config.task == "classification" else None,
  )


def by_default(*some):
  """A test that asks these tasks by default, and the others if slow."""
  return pytest.mark.parametrize(
    "task",
    [
      pytest.param(x, marks=() if x in some else pytest.mark.slow)
      for x in tiny.TASKS
    ],
  )


every_task = by_default(*tiny.TASKS)
# A step of a decoder or of two towers takes seconds to compile. By default all
# tasks' runs are put together (`Runs.reference`), and one's are trained; the
# tests of DataComp's config, of shards' scores and of sequences' losses make
# steps of the others.
small_model = by_default("classification")


def test_every_task_is_asked():
  assert set(tiny.TASKS) == set(tasks.TASKS)


class Runs:
  """Finished runs, each trained once, and what kills leave of them."""

  def __init__(self, folder, digits_dir):
    self.folder, self.digits_dir = folder, digits_dir
    self.reference = functools.cache(self._reference)
    self.made = functools.cache(self._made)
    self._whole = {}
    self._names = itertools.count()

  def config(self, task, **fields):
    return tiny.make(task, self.digits_dir, **fields)

  def _reference(self, task):
    """The folder of a run of one step, which no program is compiled for."""
    folder = self.folder / task / "reference"
    fields = {"noise.rate": 0.0, "num_steps": 1, "checkpoint.every_steps": 1}
    config = self.config(task, method="sgd", **fields)
    with tiny.nudged():
      trainer.train_and_evaluate(config, folder)
    return str(folder)

  def _made(self, task):
    """The task itself."""
    return tasks.create(self.config(task), distributed.Devices.alone())

  def toward_reference(self, task, method="grad_mimic", **fields):
    fields["mimic.reference"] = self.reference(task)
    return self.config(task, method=method, **fields)

  def whole(self, task, method="grad_mimic", **fields):
    """The config, the folder and the result of a run.

    Beside the folder is what a kill would have left of it.
    """
    config = self.toward_reference(task, method, **fields)
    key = config.to_json()
    if key not in self._whole:
      folder = self.folder / task / str(next(self._names)) / "run"
      left = folder.with_name("killed")
      with tiny.before_step(
        KILLED_BEFORE, lambda: tiny.kill(folder, left, KILLED_BEFORE)
      ) as made:
        result = trainer.train_and_evaluate(config, folder)
      self._whole[key] = (config, folder, result, made)
    return self._whole[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_dir):
  return Runs(tmp_path_factory.mktemp("runs"), digits_dir)


@small_model
def test_a_killed_run_goes_on_bit_for_bit(runs, task, tmp_path, monkeypatch):
  config, folder, result, ((_, make_call),) = runs.whole(task)
  shutil.copytree(folder.with_name("killed"), tmp_path / "run")

  def again(state, *args):
    # Of new arrays, as before: those of a checkpoint are on a certain device,
    # which is another program. The slow test compiles it.
    return call.function(
      jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state), *args
    )

  call = make_call(2, False)
  monkeypatch.setattr(
    calls,
    "make",
    lambda *_, **options: calls.Made(
      None, None, lambda *_: call._replace(function=again)
    ),
  )
  monkeypatch.setattr(calls, "choose_length", lambda *_, **options: 2)
  found = trainer.train_and_evaluate(config, tmp_path / "run")
  assert {**found, "seconds": 0} == {**result, "seconds": 0}
  tiny.assert_same_run(folder, tmp_path / "run", runs.made(task).params)


# With the step before which each is interrupted.
METHODS = [
  ("language", "rho", {}, 0),
  ("classification", "random", {}, 5),
  *(
    ("classification", method, fields, 3)
    for method, fields in (
      ("grad_mimic_outputs", {"data.flip": True}),
      (
        "grad_mimic",
        {
          "mimic.direction": "clean_gradient",
          "mimic.clean_per_class": 1,
          "data.train_split": "train[:200]",
        },
      ),
      ("grad_mimic_averaged", {"mimic.refresh_epochs": 2}),
      # Without steps of its own runs, which would be counted as this one's.
      ("grand_offline", {"mimic.grand_runs": 2, "mimic.grand_epochs": 0}),
    )
  ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method", "fields", "count"), METHODS)
def test_an_interrupted_run_goes_on_bit_for_bit(
  runs, tmp_path, task, method, fields, count
):
  """Whatever a method keeps: outputs, norms, batches, places in the data."""
  config, folder, result, _ = runs.whole(task, method, **fields)
  with tiny.interrupted(count):
    trainer.train_and_evaluate(config, tmp_path)
  assert checkpoint.steps(tmp_path) == list(range(2, count + 1, 2))
  # What is kept of the reference's outputs is computed anew on the way.
  for file in pathlib.Path(runs.reference(task)).glob("*.npy"):
    file.unlink()
  again = trainer.train_and_evaluate(config, tmp_path)
  assert {**again, "seconds": 0} == {**result, "seconds": 0}
  tiny.assert_same_run(folder, tmp_path, runs.made(task).params)


@pytest.fixture
def begin(runs, task, monkeypatch):
  """`begin(config, folder) -> report`: checks the reference; trains nothing."""

  def stop(run, *_):
    raise KeyboardInterrupt

  runs.toward_reference(task)  # trains that one, whole
  monkeypatch.setattr(trainer.Run, "check_reference", CHECK)
  monkeypatch.setattr(trainer.Run, "to_the_end", stop)

  def begin(config, folder):
    with pytest.raises(KeyboardInterrupt):
      trainer.train_and_evaluate(config, folder)
    return json.loads((folder / reference_check.FILE).read_text())

  return begin


@small_model
def test_the_check_of_the_reference_is_recorded(runs, task, begin, tmp_path):
  config = runs.toward_reference(task)
  report = begin(config, tmp_path / "run")
  assert report["verdict"] != "foreign basin"
  assert report["num_samples"] == config.mimic.check_samples
  none = runs.toward_reference(task, **{"mimic.check_samples": 0})
  with pytest.raises(ValueError, match="check_samples is 0"):
    trainer.train_and_evaluate(none, tmp_path / "none")


@small_model
def test_a_foreign_reference_stops_a_run_until_it_is_forced(
  runs, task, begin, tmp_path, monkeypatch
):
  """Also one that was found foreign in a run that was forced."""
  check = gm.check_reference

  def checking(*args, **options):
    report = check(*args, **options)
    return dataclasses.replace(report, verdict="foreign basin")

  monkeypatch.setattr(gm, "check_reference", checking)
  config = runs.toward_reference(task)
  with pytest.raises(ValueError, match=r"foreign basin.*mimic\.force"):
    trainer.train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  forced = runs.toward_reference(task, **{"mimic.force": True})
  report = begin(forced, tmp_path / "run")
  assert report["verdict"] == "foreign basin"
  with pytest.raises(ValueError, match=r"foreign basin.*mimic\.force"):
    trainer.train_and_evaluate(config, tmp_path / "run")


@small_model
def test_a_finished_run_is_not_repeated(runs, task, monkeypatch):
  config, folder, result, _ = runs.whole(task)
  monkeypatch.setattr(trainer.Run, "to_the_end", None)
  assert trainer.train_and_evaluate(config, folder) == result


@by_default("classification", "language")
def test_a_workdir_in_use_is_refused(runs, task, tmp_path, monkeypatch):
  """Before data are read."""
  config = runs.toward_reference(task)
  monkeypatch.setattr(trainer, "Run", None)
  with (
    locks.hold(tmp_path / "run"),
    pytest.raises(locks.InUseError, match="run is in use"),
  ):
    trainer.train_and_evaluate(config, tmp_path / "run")


@small_model
def test_a_workdir_of_another_config_is_refused(runs, task):
  _, folder, _, _ = runs.whole(task)
  other = runs.toward_reference(task, **{"optimizer.learning_rate": 0.5})
  with pytest.raises(
    ValueError,
    match=r"belongs to another config: .*learning_rate is \S+ there and 0\.5",
  ):
    trainer.train_and_evaluate(other, folder)


# By default the tests of methods and of contrastive losses ask single steps; of
# classification those are enough.
@pytest.mark.slow
@pytest.mark.parametrize("task", ["contrastive", "language"])
def test_microbatches_train_alike_or_are_refused(runs, task, tmp_path):
  config = runs.toward_reference(task, **{"mimic.microbatch_size": 4})
  made = runs.made(task)
  if made.outputs.coupled:
    with pytest.raises(ValueError, match=r"microbatch_size is 4.*batch mates"):
      trainer.train_and_evaluate(config, tmp_path / "run")
    return
  _, folder, _, _ = runs.whole(task)
  trainer.train_and_evaluate(config, tmp_path / "run")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    checkpoint.load_params(folder, made.params),
    checkpoint.load_params(tmp_path / "run", made.params),
  )


def score_of(runs, task, **fields):
  """The config of a pass over the data with a run's checkpoints."""
  _, learner, _, _ = runs.whole(task)
  config = score_config.get_config(f"learner={learner}").unlock()
  config.batch_size, config.flush_every = 16, 1
  config.mesh.data = 1
  config.mimic.reference = runs.reference(task)
  config.update(fields)
  return config.lock()


def assert_scored(folder, result):
  """Every sample has a score at each checkpoint."""
  ids, scores = gm.ScoreLedger(folder / "ledger").matrix()
  assert len(ids) == result["samples"] == 48
  assert result["checkpoints"] == [2, 4, 6]
  assert scores.shape == (48, 3)
  assert np.isfinite(scores).all()


@small_model
def test_a_killed_pass_of_scores_goes_on(runs, task, tmp_path, monkeypatch):
  config = score_of(runs, task)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  append, done = gm.ScoreLedger.append, []

  def appending(*args, **fields):
    if len(done) == 4:
      shutil.copytree(whole, killed)
    done.append(None)
    return append(*args, **fields)

  with monkeypatch.context() as patch:
    patch.setattr(gm.ScoreLedger, "append", appending)
    assert_scored(whole, scoring.score_dataset(config, whole))
  assert len(gm.ScoreLedger(killed / "ledger")) == 4 * 16
  scoring.score_dataset(config, killed)
  tables = [gm.ScoreLedger(x / "ledger").table() for x in (whole, killed)]
  assert tables[0].equals(tables[1])


@small_model
def test_scores_are_of_any_method_that_has_some(runs, task, tmp_path):
  config = score_of(runs, task, method="output_agreement")
  assert_scored(tmp_path, scoring.score_dataset(config, tmp_path))


# Classification's are asked on images of all residences, and with parts of the
# parameters in each of several processes; so are steps on pairs, whose batches
# are asked there, too (`runtime/test_distributed`).
@pytest.mark.slow
@pytest.mark.parametrize("task", ["language"])
def test_two_processes_train_alike(runs, task, tmp_path):
  """Of the same batches, up to the order of sums; the first one speaks."""
  _, folder, result, _ = runs.whole(task)
  config = runs.toward_reference(task, **{"mesh.data": 2})
  file = tmp_path / "config.json"
  file.write_text(config.to_json())
  code = (
    "import json, sys; from ml_collections import config_dict;"
    " from experiments.runtime import cli; from experiments.training import"
    " trainer; c = config_dict.ConfigDict(json.load(open(sys.argv.pop(1))));"
    " trainer.Run.check_reference = lambda run: None;"
    " cli.run(lambda _, w: trainer.main(c, w),"
    " processes=cli.SHARED)"
  )
  flags = [f"--workdir={tmp_path / 'run'}", "--config=configs/digits.py"]
  first, second = processes.finish(
    processes.start(["-c", code, str(file), *flags], count=2)
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


@every_task
def test_the_reference_is_asked_for_by_name(runs, task, tmp_path):
  config = runs.config(task, method="grad_mimic")
  with pytest.raises(ValueError, match="needs a reference"):
    trainer.train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@every_task
def test_devices_that_do_not_divide_a_batch_are_refused(runs, task, tmp_path):
  config = runs.config(task, **{"mesh.data": 3})
  with pytest.raises(ValueError, match="16 on 3 devices"):
    trainer.train_and_evaluate(config, tmp_path / "run")


def test_a_task_that_is_not_there(runs):
  config = runs.config("language").copy_and_resolve_references().unlock()
  config.task = "origami"
  with pytest.raises(ValueError, match="has the task 'origami'; expected one"):
    tasks.create(config, distributed.Devices.alone())
