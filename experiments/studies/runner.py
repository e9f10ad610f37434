"""Makes the runs of a study, shared by all processes that are at it.

A run that is finished is not repeated, and any number of jobs may be given the
same command: they share the runs. The processes of one job share every run.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import tasks
from experiments.data.pairs import datacomp
from experiments.runtime import (
  claims,
  distributed,
  identity,
  locks,
  terminal,
  workdir as workdir_lib,
)
from experiments.selection import cuts
from experiments.studies import (
  opening,
  plan,
  records as records_lib,
  summary,
  tables,
)
from experiments.training import trainer

_JOB = "study"


def run_study(
  config: config_dict.ConfigDict,
  workdir: Any,
  *,
  note: terminal.Note | None = None,
) -> dict[str, Any]:
  """Runs the study; goes on where an interrupted one stopped.

  The workdir gets a folder for each seed with a folder for each run in it,
  tables, figures, the page of a method with scores, and `summary.json`, whose
  content is returned. `note` prints what it will do; None: nothing does.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set that is not there.
  """
  runs = plan.plan_runs(config)
  fields = tasks.get(config).configs
  folder = workdir_lib.check(workdir, config, fields, job=_JOB)
  if distributed.is_first():
    workdir_lib.claim(workdir, config, fields, job=_JOB)
  distributed.meet()
  if note is not None:
    note(opening.study("study", config, folder, runs))
  results = run_all(config, folder, runs)

  def report():
    with claims.hold(folder / "report.claim"):
      return summary.write(records_lib.Records(config, folder, runs, results))

  return distributed.by_first(report)


def run_all(
  config: config_dict.ConfigDict, folder: pathlib.Path, runs: Sequence[plan.Run]
) -> dict[str, list[dict[str, Any]]]:
  """Makes the runs, with all other jobs that are at it.

  Each of the runs comes after those that it needs. Returns `{name: results}`,
  those of a name in the order of the runs.
  """
  for run in runs:
    (folder / f"seed{run.seed}").mkdir(exist_ok=True)
  records = records_lib.Records(config, folder, runs)
  finished: set[tuple[int, str]] = set()

  def attempt(run):
    if any((run.seed, name) not in finished for name in run.needs):
      return None
    result = _attempt(records, run)
    if result is not None:
      finished.add((run.seed, run.name))
    return result

  results: dict[str, list[dict[str, Any]]] = {}
  for run, result in zip(runs, claims.share(runs, attempt), strict=True):
    results.setdefault(run.name, []).append(result)
  return results


def _attempt(records, run):
  """The run's result, unless another job is at it."""
  finished, claim = False, None
  if distributed.is_first():
    result_file = records.path(run.seed, run.name) / trainer.RESULT_FILE
    finished = result_file.exists()
    claim = None if finished else claims.take(records.beside(run, ".claim"))
  # The first process claims the run for all of its job.
  finished, claimed = distributed.from_first(
    np.array([finished, claim is not None])
  )
  if not finished and not claimed:
    return None
  try:
    note = " (already there)" if finished else ""
    print(f"seed {run.seed}: {run.name}{note}", flush=True)
    return _train(records, run)
  except locks.InUseError:
    return None  # by whoever had claimed it, and was thought to be gone
  finally:
    if claim is not None:
      claim.release()


def _train(records, run):
  overrides = dict(run.overrides)
  if run.is_on_a_part:
    overrides["data.filter"] = distributed.by_first(
      lambda: str(_make_filter(records, run))
    )
  elif run.reference in run.needs:
    reference = records.path(run.seed, run.reference)
    overrides["mimic.reference"] = str(reference)
  config = plan.make_config(records.config, run._replace(overrides=overrides))
  folder = records.path(run.seed, run.name)
  if run.name == plan.REFERENCE and config.study.references is not None:
    return _train_shared(config, folder)
  return trainer.train_and_evaluate(config, folder)


def _train_shared(config, folder):
  """Trains the reference once for all studies that name the same folder."""
  config = config.copy_and_resolve_references().unlock()
  # Nothing of what is done with it is its own.
  config.mimic = tasks.get(config).configs.get_config().mimic
  config.lock()
  name = workdir_lib.fingerprint(
    identity.pick_fields(
      workdir_lib.flatten(config), trainer.JOB, elsewhere=True
    )
  )
  shared = pathlib.Path(config.study.references) / name
  shared.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if distributed.is_first():
      claim = shared.with_name(f"{name}.claim")
      stack.enter_context(claims.hold(claim))
    distributed.meet()
    result = trainer.train_and_evaluate(config, shared)
  if distributed.is_first() and not folder.exists():
    folder.symlink_to(shared.resolve(), target_is_directory=True)
  distributed.meet()
  return result


def _make_filter(records, run):
  """The file of the samples that a run on a part of the data keeps."""
  file = records.filter_file(run)
  if run.filter:
    _make_filters(records, run, file)
  elif run.keep is None:
    summary.select(records, run.seed, run.chosen_by)
  elif not file.exists():
    gm.export.write_filter(file, _choose(records, run))
  return file


def _make_filters(records, run, file):
  """Makes all filters of a seed at once."""
  with claims.hold(file.parent.with_suffix(".claim")):
    if file.exists():
      return
    file.parent.mkdir(exist_ok=True)
    mimic = cuts.mean_scores(records.path(run.seed, run.needs[-1]))
    truth, clip = records.load_truth(run.seed), None
    if records.task.reference_score is not None:
      ids, values = records.score_by_reference(run.seed)
      clip = cuts.Scores(datacomp.as_ids(ids), values)
    ids = mimic.ids if truth is None else datacomp.as_ids(truth.ids)
    pool = cuts.Pool(ids, mimic, clip)
    expressions = [
      other.filter
      for other in records.runs
      if other.filter and other.seed == run.seed
    ]
    made = cuts.make(expressions, pool, seed=run.seed)
    cuts.write(file.parent, made, pool)


def _choose(records, run):
  """The ids of the share that a run keeps: by scores, or by chance."""
  if not run.chosen_by:
    truth = records.load_truth(run.seed)
    if truth is None:
      raise ValueError(
        "config.study.keep_fractions needs to know all samples that there are,"
        f" and of {records.config.task} data nobody does; leave it empty."
      )
    ids = truth.ids
    rng = np.random.default_rng(run.seed)
    return ids[rng.choice(len(ids), round(run.keep * len(ids)), replace=False)]
  ledger = records.load_ledger(run.seed, run.chosen_by)
  selection = gm.select(ledger)
  if np.isnan(selection.keep_probability).all():
    # "auto" abstains where scores tell nothing; ranks there are all the same.
    selection = gm.select(ledger, binarize="top_fraction", fraction=run.keep)
  return gm.subset(selection, run.keep)


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Says what it will do, runs it, and prints the table and where all is."""
  summary = run_study(config, workdir, note=terminal.note)
  print("\n" + tables.text(summary))
