"""One reference, several methods on the same noisy labels, then selection.

For each seed: a reference trained on clean labels, from the learner's own
initialisation unless `config.study.reference` has it otherwise; every method on
the same noisy labels; and from the scores of those that have any, a selection
and models retrained on what it keeps. A run that is finished is not repeated,
and any number of jobs may be given the same command: they share the runs. The
processes of one job share every run.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import gradmimic_jax as gm
from configs import base
from experiments import methods, tasks
from experiments.data import sources
from experiments.runtime import (
  claims,
  distributed,
  durations,
  identity,
  locks,
  workdir as workdir_lib,
)
from experiments.selection import runs as select_lib
from experiments.studies import (
  detection,
  settings as tuning,
  summary as study_report,
)
from experiments.tasks.classification import data as data_lib
from experiments.training import trainer as train

REFERENCE = "reference"


class Run(NamedTuple):
  """One run of a study."""

  seed: int
  name: str  # of the run, and of its folder
  overrides: dict[str, Any]  # what its config has otherwise than the study's
  needs: tuple[str, ...] = ()  # runs of the same seed that must be finished
  # Of a run on a part of the data: whose scores choose (None: chance), and the
  # share that is kept (None: what the method's selection keeps).
  chosen_by: str | None = None
  keep: float | None = None


def run_study(config: Any, workdir: Any) -> dict[str, Any]:
  """Runs the study; goes on where an interrupted one stopped.

  Args:
    config: any task's; `config.study` names the seeds, the methods and how the
      reference differs from the learner.
    workdir: the study's folder. Gets a folder for each seed with a folder for
      each run in it, `summary.json`, tables, figures and the report of the
      first method with scores.

  Returns:
    What is in `summary.json`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set that is not there.
  """
  runs = runs_of(config)
  fields = tasks.get(config).configs
  folder = workdir_lib.check(workdir, config, fields, job="study")
  if distributed.is_first():
    workdir_lib.claim(workdir, config, fields, job="study")
  distributed.meet()
  results = run_all(config, folder, runs)

  def report():
    with claims.hold(folder / "report.claim"):
      return study_report.write(
        config,
        folder,
        results,
        {run.name: (run.chosen_by, run.keep) for run in runs},
      )

  return distributed.by_first(report)


def run_all(
  config: Any,
  folder: pathlib.Path,
  runs: list[Any],
  train_run: Callable[[Any, pathlib.Path, Any], dict[str, Any]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """Makes the runs, with all other jobs that are at it.

  Args:
    config: the study's.
    folder: to make the runs' folders in.
    runs: each after those that it needs.
    train_run: `(config, folder of the run, run) -> result`; None: `train`'s.

  Returns:
    `{name: results}`, those of a name in the order of the runs.
  """
  for run in runs:
    (folder / f"seed{run.seed}").mkdir(exist_ok=True)
  finished: set[tuple[int, str]] = set()

  def attempt(run):
    if any((run.seed, name) not in finished for name in run.needs):
      return None
    result = _attempt(config, folder, run, train_run or _train)
    if result is not None:
      finished.add((run.seed, run.name))
    return result

  results: dict[str, list[dict[str, Any]]] = {}
  for run, result in zip(runs, claims.share(runs, attempt), strict=True):
    results.setdefault(run.name, []).append(result)
  return results


def runs_of(config: Any) -> list[Run]:
  """All runs of the study, each after those that it needs.

  Args:
    config: the study's.

  Returns:
    The runs.

  Raises:
    ValueError: no seeds or methods, or a name that is not there.
  """
  study = config.study
  if not study.seeds or not study.methods:
    raise ValueError(
      f"config.study has seeds {study.seeds} and methods {study.methods};"
      " expected at least one of each."
    )
  for method in study.methods:
    _check_method(method, config)  # before hours go into the others
  for fraction in study.keep_fractions:
    if not 0 < fraction < 1:
      raise ValueError(
        f"config.study.keep_fractions has {fraction}; expected numbers above 0"
        " and below 1."
      )
  detection.check(config)
  tuned = tuning.read(study.tuned)
  runs = []
  for seed in study.seeds:
    needs: tuple[str, ...] = ()
    if needs_reference(config):
      runs.append(Run(seed, REFERENCE, reference_overrides(config, seed)))
      needs = (REFERENCE,)
    scored = []
    for name in study.methods:
      method = methods.create(name, config.mimic)
      overrides = {"method": name, **tuned.get(name, {})}
      runs.append(Run(seed, name, overrides, needs))
      if methods.tells_samples_apart(method):
        scored.append(name)
    plain = {"method": "sgd", **tuned.get("sgd", {})}
    for name in scored if study.retrain else ():
      runs.append(Run(seed, f"retrained_{name}", plain, (name,), name))
    choosing = [
      name for name in scored if name in (study.keep_methods or scored)
    ]
    for keep in study.keep_fractions:
      for name in (*choosing, None):
        title = f"keep_{keep:g}_{name or 'random'}"
        needs = (name,) if name else ()
        runs.append(Run(seed, title, plain, needs, name, keep))
  return runs


def _attempt(config, folder, run, train_run):
  """The run's result, unless another job is at it."""
  there = folder / f"seed{run.seed}" / run.name
  finished, claim = False, None
  if distributed.is_first():
    finished = (there / train.RESULT_FILE).exists()
    claim = None if finished else claims.take(_beside(there, ".claim"))
  # The first process claims the run for all of its job.
  finished, claimed = distributed.from_first(
    np.array([finished, claim is not None])
  )
  if not finished and not claimed:
    return None
  try:
    note = " (already there)" if finished else ""
    print(f"seed {run.seed}: {run.name}{note}", flush=True)
    return train_run(config, there, run)
  except locks.InUseError:
    return None  # by whoever had claimed it, and was thought to be gone
  finally:
    if claim is not None:
      claim.release()


def _train(config, there, run):
  overrides = dict(run.overrides)
  if REFERENCE in run.needs:
    overrides["mimic.reference"] = str(there.with_name(REFERENCE))
  if run.chosen_by or run.keep:
    overrides["data.filter"] = distributed.by_first(
      lambda: str(_filter(config, there, run))
    )
  if run.name == REFERENCE and config.study.references is not None:
    return _shared_reference(config, there, run)
  # Its seed is the run's, unless it says otherwise.
  run_config = derived(config, **{"seed": run.seed, **overrides})
  return train.train_and_evaluate(run_config, there)


def _shared_reference(config, there, run):
  """Trained once for all studies that name the same folder."""
  run_config = derived(config, **{"seed": run.seed, **run.overrides}).unlock()
  # Nothing of what is done with it is its own.
  run_config.mimic = base.get_config("").mimic
  run_config.lock()
  name = workdir_lib.fingerprint(
    identity.pick_fields(
      workdir_lib.flatten(run_config), train.JOB, elsewhere=True
    )
  )
  shared = pathlib.Path(config.study.references) / name
  shared.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if distributed.is_first():
      stack.enter_context(claims.hold(_beside(shared, ".claim")))
    distributed.meet()
    result = train.train_and_evaluate(run_config, shared)
  if distributed.is_first() and not there.exists():
    there.symlink_to(shared.resolve(), target_is_directory=True)
  distributed.meet()
  return result


def _filter(config, there, run):
  """The file of the samples that a run on a part of the data keeps."""
  if run.keep is None:
    return study_report.select(config, there.with_name(run.chosen_by))
  path = _beside(there, ".npy")
  if path.exists():
    return path
  if run.chosen_by:
    ledger = select_lib.load_ledger(there.with_name(run.chosen_by))
    selection = gm.select(ledger)
    if np.isnan(selection.keep_probability).all():
      # "auto" abstains where scores tell nothing; ranks there are all the same.
      selection = gm.select(ledger, binarize="top_fraction", fraction=run.keep)
    kept = gm.subset(selection, run.keep)
  else:
    split = sources.of_config(config.data, config.data.train_split)
    size = len(split.labels)
    kept = np.random.default_rng(run.seed).choice(
      size, round(run.keep * size), replace=False
    )
  gm.export.write_npy(path, kept)
  return path


def _beside(there, ending):
  """A file beside a folder, whose name may have dots in it."""
  return there.with_name(there.name + ending)


def _check_method(name, config):
  method = methods.create(name, config.mimic)
  other = reference_overrides(config, 0)
  if method is None or method.direction != "weights":
    return
  for field, value in config.model.items():
    theirs = other.get(f"model.{field}", value)
    # Where the weights come from may differ: it is their shapes that must not.
    if theirs != value and field != "pretrained":
      raise ValueError(
        f"config.study.methods has {name!r}, which goes toward the reference's"
        " weights, and config.study.reference gives the reference"
        f" model.{field} {theirs!r}, the learner's is {value!r}; expected the"
        " same architecture, or methods that look at outputs only."
      )


def needs_reference(config: Any) -> bool:
  """Whether any method looks at a reference that is to be trained."""
  directions = {
    method.direction
    for method in (
      methods.create(name, config.mimic) for name in config.study.methods
    )
    if method is not None
  }
  logged = config.mimic.outputs is not None
  return "weights" in directions or ("outputs" in directions and not logged)


def reference_overrides(config: Any, seed: int) -> dict[str, Any]:
  """What the reference's config has otherwise than the learner's."""
  wanted = config.study.reference
  # Another architecture has no use for the learner's weights.
  own = {"model.pretrained": None} if wanted.model or wanted.widths else {}
  fields = {
    "model.name": wanted.model,
    "model.widths": tuple(wanted.widths),
    "data.train_split": config.data.test_split
    if wanted.test_leak
    else wanted.train_split,
  }
  return {
    "seed": seed + wanted.seed_offset,
    "method": "sgd",
    "noise.kind": "symmetric",
    "noise.rate": wanted.noise_rate,
    **durations.overrides(wanted),
    **{f"noise.{name}": None for name in data_lib.NOISE_OPTIONS},
    **{field: value for field, value in fields.items() if value},
    **own,
  }


def derived(config: Any, **overrides: Any) -> Any:
  """A copy of the config with some fields changed; noise follows the seed."""
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict(
    {"noise.seed": overrides["seed"], **overrides}
  )
  return copy.lock()


def main(config: Any, workdir: str) -> None:
  """Runs the study, then prints the table and where the figures are."""
  summary = run_study(config, workdir)
  print("\n" + study_report.text(summary))
