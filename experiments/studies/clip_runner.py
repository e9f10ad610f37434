"""CLIP's study: one reference, several methods, filters, what they are worth.

For each seed: a reference trained on true captions, from the learner's own
initialisation unless `config.study.reference` has it otherwise; every method on
the same mis-captioned pairs, those with scores at each of the layers and
weightings; and plain runs on what filters keep, of as many samples seen. A run
that is finished is not repeated, and any number of processes may be given the
same command: they share the runs.
"""

import functools
from typing import Any

from configs import contrastive as clip_config
from experiments.runtime import claims, distributed, workdir as workdir_lib
from experiments.selection import filters as clip_filters
from experiments.studies import (
  clip_summary as clip_study_report,
  runner as study,
)
from experiments.studies.clip_plan import FILTERS, REFERENCE, derived, runs_of
from experiments.training import trainer as clip_train


def run_study(config: Any, workdir: Any) -> dict[str, Any]:
  """Runs the study; goes on where an interrupted one stopped.

  Args:
    config: as `configs/contrastive.py` describes it.
    workdir: the study's folder. Gets a folder for each seed with a folder for
      each run and the filters' subset files in it, `summary.json`, a table,
      figures and a page about the first run with scores.

  Returns:
    What is in `summary.json`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
  """
  runs = runs_of(config)
  folder = workdir_lib.check(workdir, config, clip_config, job="study")
  if distributed.is_first():
    workdir_lib.claim(workdir, config, clip_config, job="study")
  distributed.meet()
  results = study.run_all(
    config, folder, runs, functools.partial(_train, runs=runs)
  )

  def report():
    with claims.hold(folder / "report.claim"):
      return clip_study_report.write(config, folder, runs, results)

  return distributed.by_first(report)


def _train(config, there, run, *, runs):
  overrides = dict(run.overrides)
  if run.filter:
    overrides["data.filter"] = distributed.by_first(
      lambda: str(_subset(config, there, run, runs))
    )
  elif REFERENCE in run.needs:
    overrides["mimic.reference"] = str(there.with_name(REFERENCE))
  return clip_train.train_and_evaluate(
    derived(config, run.seed, overrides), there
  )


def _subset(config, there, run, runs):
  """The file of what a filter keeps; all of a seed's are made at once."""
  folder = there.with_name(FILTERS)
  path = folder / clip_filters.file_of(run.filter)
  with claims.hold(folder.with_suffix(".claim")):
    if not path.exists():
      folder.mkdir(exist_ok=True)
      expressions = [
        other.filter
        for other in runs
        if other.filter and other.seed == run.seed
      ]
      mine = derived(
        config,
        run.seed,
        {"mimic.reference": str(there.with_name(REFERENCE))},
      )
      pool = clip_filters.load_pool(mine, there.with_name(run.needs[-1]))
      made = clip_filters.make(expressions, pool, seed=run.seed)
      clip_filters.write(folder, made, pool)
  return path


def main(config: Any, workdir: str) -> None:
  """Runs the study, then prints the table and where the figures are."""
  summary = run_study(config, workdir)
  print("\n" + clip_study_report.text(summary))
