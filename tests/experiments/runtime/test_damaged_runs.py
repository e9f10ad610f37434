"""Damages of all files of a finished run, and the next job on it.

A job gives what it would have given, or one line that names the file. With the
count and the failures:

  pytest -m slow -s tests/experiments/runtime/test_damaged_runs.py
"""

import contextlib
import json
import pathlib
import shutil
from typing import NamedTuple

import damages as damages_lib
import jax
import numpy as np
import pytest

import gradmimic_jax as gm
from configs import (
  digits,
  report as report_config,
  score as score_config,
  select as select_config,
)
from experiments.reporting import page as report
from experiments.runtime import checkpoint, metrics as writers
from experiments.selection import files as select
from experiments.training import scoring as score, steps, trainer as train

FOLDER = "a folder in its place"
NEWEST, BEFORE = "checkpoints/9/", "checkpoints/6/"


class Case(NamedTuple):
  """One damage of one file, and the job that comes next."""

  file: str  # below the run's folder
  damage: damages_lib.Case
  job: str

  def __str__(self):
    return f"{self.job}: {self.file} {self.damage.what}"


class House:
  """Two finished runs and a pass of scores, and jobs on copies of one."""

  def __init__(self, folder, data_dir):
    self.folder, self.data_dir = folder, data_dir
    self.config = self._config()
    self.run, self.other = folder / "run", folder / "other"
    train.train_and_evaluate(self.config, self.run)
    other = self._config(seed=1, **{"noise.seed": 3, "noise.rate": 0.3})
    train.train_and_evaluate(other, self.other)
    for name in ("run", "other"):
      job = self._score_config(folder / name)
      score.score_dataset(job, folder / f"{name}_scored")
    self.right = {
      job: getattr(self, job)(self._copy(job, job))
      for job in ("again", "resume", "learner", "select", "report", "rescore")
    }

  def _config(self, **fields):
    config = digits.get_config("seeds=1").unlock()
    config.update_from_flattened_dict(
      {
        "data.data_dir": self.data_dir,
        "mesh.data": 1,
        "num_epochs": 3,
        "batch_size": 512,
        "model.widths": (8,),
        "checkpoint.every_epochs": 1,
        "method": "random",
        **fields,
      }
    )
    return config.lock()

  def _score_config(self, learner):
    config = score_config.get_config(f"learner={learner}").unlock()
    config.update_from_flattened_dict(
      {"batch_size": 512, "flush_every": 2, "method": "grand", "mesh.data": 1}
    )
    return config.lock()

  def _copy(self, job, name):
    """The run whose files a job is given, as it was."""
    made = self.folder / "copies" / name
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(made)
    source = self.run
    if job == "rescore":
      source = self.folder / "run_scored"
    return pathlib.Path(shutil.copytree(source, made))

  # The jobs: each gives what is to be the same as ever.

  def again(self, run):
    result = train.train_and_evaluate(self.config, run)
    return {k: v for k, v in result.items() if k != "seconds"}

  def resume(self, run):
    (run / train.RESULT_FILE).unlink(missing_ok=True)
    result = self.again(run)
    return {
      "result": result,
      "rows": gm.ScoreLedger(run / train.LEDGER_FOLDER).table().to_pydict(),
      "metrics": writers.read_metrics(run / writers.METRICS_FILE),
      "checkpoints": checkpoint.steps(run),
      "params": params_of(run),
    }

  def learner(self, run):
    made = run.with_name(f"{run.name}_scored")
    shutil.rmtree(made, ignore_errors=True)
    result = score.score_dataset(self._score_config(run), made)
    table = gm.ScoreLedger(made / "ledger").table()
    without = {k: v for k, v in result.items() if k != "run"}  # its paths
    return {"result": without, "rows": table.to_pydict()}

  def rescore(self, folder):
    result = score.score_dataset(self._score_config(self.run), folder)
    table = gm.ScoreLedger(folder / "ledger").table()
    return {"result": result, "rows": table.to_pydict()}

  def select(self, run):
    config = select_config.get_config(f"run={run}").unlock()
    config.select.binarize = "threshold"
    made = run.with_name(f"{run.name}_selected")
    shutil.rmtree(made, ignore_errors=True)
    found = select.select_run(config.lock(), made)
    return {k: found[k] for k in ("samples", "kept", "fingerprints")}

  def report(self, run):
    config = report_config.get_config(f"run={run}").unlock()
    config.select.binarize = "threshold"
    config.gallery = 1
    made = run.with_name(f"{run.name}_page")
    shutil.rmtree(made, ignore_errors=True)
    page = report.report_run(config.lock(), made)
    found = json.loads(page.with_suffix(".json").read_text())
    found["run"] = {
      k: v
      for k, v in found.get("run", {}).items()
      # What is of the result is left out where a run has none.
      if k not in ("folder", "page written", "noise rate")
    }
    return found

  def cases(self, seed):
    """Everything that can happen, in an order that is drawn."""
    found = []
    for job in self.right:
      root = self._root(job)
      for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and path.stat().st_size and job in jobs_of(name):
          found += [
            Case(name, damage, job) for damage in self._damages(job, name, seed)
          ]
    rng = np.random.default_rng(seed)
    return [found[i] for i in rng.permutation(len(found))]

  def _root(self, job):
    return self.folder / "run_scored" if job == "rescore" else self.run

  def _damages(self, job, name, seed):
    """Some of a file's damages: of each sort one, of bits two."""
    root = self._root(job)
    content = (root / name).read_bytes()
    twin = self.folder / root.name.replace("run", "other") / name
    if not twin.is_file() and name.startswith("ledger/rows-"):
      twin = sorted((root / "ledger").glob("rows-*"))[-1]
      twin = twin if twin.name != pathlib.Path(name).name else root / RESULT
    every = damages_lib.damages(
      content,
      sibling=twin.read_bytes() if twin.is_file() else None,
      others={"garbage": bytes(range(256)) * 3},
      cuts=1,
      flips=24,
      removed=True,
      seed=seed,
    )
    sorts = {}
    for damage in every:
      sorts.setdefault(damage.what.split()[0], []).append(damage)
    rng = np.random.default_rng([seed, len(name)])
    if "checkpoints/" in name:  # many files, all of which are hashed alike
      kept = rng.permutation(list(sorts))[:2]
      sorts = {k: v for k, v in sorts.items() if k in ("bit", *kept)}
    for sort, some in sorts.items():
      count = 2 if sort == "bit" else 1
      for i in rng.permutation(len(some))[:count]:
        if some[i].content != content:
          yield some[i]
    yield damages_lib.Case(FOLDER, None)

  def outcome(self, case):
    """What is wrong with how the job takes it; "" if nothing is."""
    run = self._copy(case.job, "damaged")
    path = run / case.file
    path.unlink()
    if case.damage.what == FOLDER:
      path.mkdir()
    elif case.damage.content is not None:
      path.write_bytes(case.damage.content)
    try:
      found = getattr(self, case.job)(run)
    except (ValueError, TypeError, OSError, ImportError) as error:
      # What `cli.run` prints.
      text = str(error)
      if "\n" in text.strip():
        return f"{case}: several lines: {text!r}"
      names = [path.name, f"{path.parent.name}/{path.name}"]
      if "checkpoints/" in case.file:
        names.append("/".join(case.file.split("/")[:2]))
      if not any(name in text for name in names):
        return f"{case}: no file's name: {text}"
      return ""
    except Exception as error:
      return f"{case}: {type(error).__name__}: {error}"
    if not same(found, self.right[case.job]):
      return f"{case}: another result"
    return ""


RESULT = train.RESULT_FILE


def jobs_of(name):
  """The jobs that may look at a run's file."""
  if name.startswith(NEWEST):
    return ("resume", "learner")
  if name.startswith(BEFORE):
    return ("learner",)
  if name.startswith(("tensorboard/", "checkpoints/")):
    return ("resume",)
  if name.startswith("ledger/"):
    return ("again", "resume", "select", "rescore")
  if name == writers.METRICS_FILE:
    return ("again", "resume")
  if name == "input.json":
    return ("again", "resume", "learner")
  if name == "labels.npz":
    return ("resume", "select", "report", "rescore")
  return ("again", "resume", "learner", "select", "report", "rescore")


def params_of(run):
  with checkpoint.ocp.CheckpointManager(
    run / checkpoint.FOLDER, item_names=("state",)
  ) as manager:
    state = manager.restore(
      manager.latest_step(),
      args=checkpoint.ocp.args.Composite(
        state=checkpoint.ocp.args.StandardRestore()
      ),
    ).state
  return jax.device_get(state)


def same(a, b):
  """Bit for bit."""
  leaves, structure = jax.tree.flatten(a)
  others, theirs = jax.tree.flatten(b)
  return structure == theirs and all(
    np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f")
    for x, y in zip(leaves, others, strict=True)
  )


@pytest.fixture(scope="module")
def house(tmp_path_factory, digits_dir):
  """All its runs are of one model, and share a step that is compiled once."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    pytest.MonkeyPatch.context() as patch,
  ):
    for name in ("make_train_step", "make_score_step"):
      patch.setattr(steps, name, made_once(getattr(steps, name)))
    yield House(tmp_path_factory.mktemp("house"), digits_dir)


def made_once(make):
  made = []

  def make_once(*args, **options):
    if not made:
      made.append(make(*args, **options))
    return made[0]

  return make_once


@pytest.mark.slow
def test_damages_of_all_files_and_the_next_job(house):
  cases = house.cases(seed=0)[:40]  # some of them, drawn
  assert len(cases) == 40
  failures = [wrong for case in cases if (wrong := house.outcome(case))]
  print(f"{len(cases)} damaged runs, {len(failures)} failures", *failures)
  assert not failures, "\n".join(failures)
