"""The content of a study's folder, and the truth about its data."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import tasks
from experiments.data.pairs import datacomp
from experiments.runtime import metrics, workdir as workdir_lib
from experiments.selection import cuts, files, runs as runs_lib
from experiments.studies import plan
from experiments.tasks.base import Samples, Truth
from experiments.training import reference_check, trainer

SUMMARY_FILE, TABLE_FILE = "summary.json", "results.csv"
MARKDOWN_FILE = "results.md"
FILTERS = "filters"  # the folder of a seed's filters


class Records:
  """A study's runs, on the disk.

  Attributes:
    config: the study's.
    task: its class.
    folder: the study's.
    runs: all of the study's.
    results: by name, what the runs came to, in the order of the seeds; {}
      before they are made.
    kinds: of noise that are told apart; () where there is but one.
  """

  def __init__(
    self,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    runs: Sequence[plan.Run],
    results: dict[str, list[dict[str, Any]]] | None = None,
  ):
    """Reads nothing yet."""
    self.config, self.folder, self.runs = config, folder, runs
    self.results = results or {}
    self.task = tasks.get(config)
    kinds = self.task.noise_kinds(config)
    self.kinds = kinds if len(kinds) > 1 else ()
    self.load_truth = functools.cache(self._load_truth)
    self.load_samples = functools.cache(self._load_samples)

  @property
  def seeds(self) -> list[int]:
    """The study's seeds."""
    return list(self.config.study.seeds)

  def path(self, seed: int, name: str) -> pathlib.Path:
    """The folder of a run."""
    return self.folder / f"seed{seed}" / name

  def beside(self, run: plan.Run, ending: str) -> pathlib.Path:
    """A file beside a run's folder, whose name may have dots in it."""
    return self.path(run.seed, run.name + ending)

  def _load_truth(self, seed: int) -> Truth | None:
    """The truth about a seed's data, once a learner has begun; None: unknown.

    All learners of a seed are given the same data.
    """
    for run in self.runs:
      folder = self.path(seed, run.name)
      if run.seed == seed and run.name != plan.REFERENCE and folder.is_dir():
        config = plan.make_config(self.config, run)
        return self.task.load_truth(config, folder)
    return None

  def _load_samples(self, seed: int) -> Samples:
    """Loads what a page shows of a seed's samples, of the first scored run."""
    folder = self.path(seed, self.scored[0])
    config = runs_lib.load_config(folder)
    prints = runs_lib.load_fingerprints(folder)
    return self.task.load_samples(config, folder, prints)

  @functools.cached_property
  def scored(self) -> list[str]:
    """The names of runs that have left scores."""
    names = dict.fromkeys(run.name for run in self.runs)
    return [
      name
      for name in names
      if (self.path(self.seeds[0], name) / trainer.LEDGER_FOLDER).is_dir()
    ]

  def filter_file(self, run: plan.Run) -> pathlib.Path | None:
    """Returns the file of the samples that a run trains on; None for all."""
    if run.filter:
      return self.path(run.seed, FILTERS) / cuts.file_of(run.filter)
    if run.keep is not None:
      return self.beside(run, ".npy")
    if run.chosen_by:
      return self.path(run.seed, run.chosen_by) / files.KEPT_FILE
    return None

  def clean_share(self, run: plan.Run) -> float | None:
    """The share of right samples among those that a run was given."""
    truth, file = self.load_truth(run.seed), self.filter_file(run)
    if truth is None:
      return None
    right, ids = ~truth.is_wrong, datacomp.as_ids(truth.ids)
    if file is not None:
      read = gm.export.read_npy
      if ids.dtype.names:  # uids
        read = gm.export.read_datacomp_subset
      right = right[np.isin(ids, read(file))]
    return float(right.mean())

  def score_by_reference(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and the scores of a seed's samples by the reference alone."""
    reference = {"mimic.reference": str(self.path(seed, plan.REFERENCE))}
    config = plan.derived(self.config, seed=seed, **reference)
    return self.task.score_by_reference(config)

  def load_ledger(self, seed: int, name: str) -> gm.ScoreLedger:
    """The ledger of a run."""
    return runs_lib.load_ledger(self.path(seed, name))

  def load_curve(
    self, seed: int, name: str, field: str
  ) -> tuple[list[int], list[float]]:
    """A metric of a run: the steps at which it was measured, and what was."""
    rows = metrics.read_metrics(self.path(seed, name) / metrics.METRICS_FILE)
    rows = [row for row in rows if field in row]
    return [row["step"] for row in rows], [row[field] for row in rows]

  def load_verdicts(self) -> dict[str, list[str]]:
    """By name, what the check of the reference said, in the order of seeds."""
    found: dict[str, list[str]] = {}
    for name in self.results:
      for seed in self.seeds:
        file = self.path(seed, name) / reference_check.FILE
        if file.exists():
          verdict = workdir_lib.read_json(file, {"verdict": str})["verdict"]
          found.setdefault(name, []).append(verdict)
    return found

  def load_overlaps(self) -> list[dict[str, Any]]:
    """Reads the overlaps of the first seed's filters."""
    file = self.path(self.seeds[0], FILTERS) / cuts.MANIFEST_FILE
    if not file.exists():
      return []
    return workdir_lib.read_json(file, {"overlaps": list})["overlaps"]
