"""Finished runs, as later jobs read them: ledger, config and data."""

import pathlib
from typing import Any

import gradmimic_jax as gm
from experiments import tasks
from experiments.runtime import workdir as workdir_lib
from experiments.training import opening, scoring, trainer


def load_ledger(run: pathlib.Path) -> gm.ScoreLedger:
  """Opens the ledger in a run's folder.

  Raises:
    FileNotFoundError: there is none.
  """
  if not (run / trainer.LEDGER_FOLDER).is_dir():
    raise FileNotFoundError(
      f"config.run is {str(run)!r}, and there is no {trainer.LEDGER_FOLDER} in"
      " it; expected the workdir of experiments.score, or of a run of a method"
      " with scores."
    )
  return gm.ScoreLedger(run / trainer.LEDGER_FOLDER)


def describe(run: pathlib.Path) -> str:
  """Describes the scores in a run's folder, for people.

  Raises:
    FileNotFoundError: there are none.
    ValueError: its config is damaged, or of an earlier release.
  """
  ledger, config = load_ledger(run), load_config(run)
  epochs = len(ledger.epochs)
  return (
    f"{run / trainer.LEDGER_FOLDER}: {opening.describe_data(config)}, by"
    f" {config.method}, {epochs} epoch{'' if epochs == 1 else 's'}"
  )


def is_scored(run: pathlib.Path) -> bool:
  """True for a folder of `score`, False for one of `train`."""
  return (run / scoring.RUN_FILE).exists()


def load_config(run: pathlib.Path) -> Any:
  """Reads the config whose data the ledger of `train` or `score` is of.

  It has every field of its task; of `score` it is the learner's, as it was
  scored.

  Raises:
    FileNotFoundError: it is no run's folder.
    ValueError: a file in it is damaged, or of an earlier release.
  """
  if is_scored(run):
    file = run / scoring.RUN_FILE
    section = workdir_lib.read_json(file, {})
    scoring.check_run(run, section)
    return scoring.complete(section, file)
  file = run / workdir_lib.CONFIG_FILE
  if not file.exists():
    raise FileNotFoundError(f"{run} is no run's folder: it has no config.json.")
  return scoring.complete(workdir_lib.read_config(run), file)


def load_fingerprints(run: pathlib.Path) -> dict[str, str]:
  """Reads what a filter of a run's ledger belongs to.

  That is the ledger's own fingerprints, and those of data set and labels.

  Raises:
    ValueError: the files in the folder are damaged, or not of one run.
    FileNotFoundError: one of them, or the data set, is not there.
  """
  own = load_ledger(run).fingerprints
  config = load_config(run)
  job = scoring.JOB if is_scored(run) else trainer.JOB
  workdir_lib.check_config(run, job, own)
  for name, theirs in workdir_lib.of_result(run).items():
    if own.get(name, theirs) != theirs:
      raise ValueError(
        f"{run / workdir_lib.RESULT_FILE} is of another run: its fingerprint"
        f" {name!r} is {theirs!r}, and the ledger's beside it {own[name]!r}."
        " Restore the one that doesn't belong there."
      )
  found = tasks.get(config).load_fingerprints(config, run, own)
  for name, value in found.items():
    if own.get(name, value) != value:
      raise ValueError(
        f"{run / workdir_lib.CONFIG_FILE} is of another run, or the data set"
        f" has changed: its {name} is {value!r}, the ledger's {own[name]!r}."
      )
  return {**own, **found}
