"""Cross-fitting: heads scored against references of other samples' labels.

Each seed deals the training set into folds. A fold's reference is trained on
the other folds, its learner on the fold itself, from the same initialisation:
no score of a sample, and no probability, is by a reference that has seen the
sample's label. A cell is one fold's references, or one method's learners, of
all seeds; what is done stays done, and any number of processes may be given the
same command: they share the cells.
"""

import hashlib
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

import gradmimic_jax as gm
from configs import natural_errors
from experiments import methods
from experiments.data import noise, purposes
from experiments.runtime import claims, workdir as workdir_lib
from experiments.studies import plan
from experiments.studies.plan import REFERENCE
from experiments.studies.probing import (
  cells,
  features as features_lib,
  heads,
  lists,
  rankings,
  summary as grid_summary,
)
from experiments.tasks.classification import (
  data as data_lib,
  losses as classification,
)
from experiments.training import optimizer
from gradmimic_jax import _files

JOB = "cross_fitting"
CELLS = "cells"


class Cell(NamedTuple):
  """What one program trains: a fold's heads, one for each seed."""

  method: str  # or REFERENCE
  fold: int


def run_cross_fitting(
  config: config_dict.ConfigDict, workdir: Any
) -> dict[str, Any]:
  """Scores every sample out of sample; goes on where it was interrupted.

  The workdir gets an `.npz` file for each cell, then what `lists.write` tells
  of: a ledger, probabilities, lists of the lowest and `summary.json`, whose
  content is returned.

  Raises:
    ValueError: an unknown field or name, a workdir of another config, folds
      that the data are too few for, or a proxy that lacks samples or columns.
    FileNotFoundError: a data set, a backbone or a proxy that is not there.
    ModuleNotFoundError: cleanlab is not installed.
  """
  check(config)
  rankings.check_cleanlab()
  folder = workdir_lib.check(workdir, config, natural_errors, job=JOB)
  cache = pathlib.Path(config.probe.features or folder / "features")
  if config.probe.features is None:
    _claim(folder, config)  # its own folder of features is in it
  train, test = features_lib.load(config, cache)
  labels = draw_labels(config, train)
  truths = rankings.read_truths(config.cross, train, labels)
  study = _Study(config, folder, train, test, labels)
  _claim(folder, config)
  (folder / CELLS).mkdir(exist_ok=True)
  found = study.to_the_end()
  with claims.hold(folder / "report.claim"):
    return lists.write(config, folder, train, labels, truths, found)


def check(config: config_dict.ConfigDict) -> None:
  """Raises ValueError unless the config is one of a cross-fitting."""
  workdir_lib.check_fields(config, natural_errors)
  wanted = config.study.reference
  given = {
    "config.data.filter": config.data.filter,
    "config.mimic.reference": config.mimic.reference,
    "config.study.reference.model": wanted.model,
    "config.study.reference.train_split": wanted.train_split,
    "config.study.reference.test_leak": wanted.test_leak,
    "config.study.reference.noise_rate": wanted.noise_rate,
    "config.study.tuned": config.study.tuned,
    "config.probe.rates": config.probe.rates,
    "config.probe.weighting_values": config.probe.weighting_values,
  }
  for field, value in given.items():
    if value:
      raise ValueError(
        f"{field} is {value!r}, which a cross-fitting has no use for: its"
        " references are heads of its own, trained on the labels as they are"
        " given. Leave it out."
      )
  for field, count, least in (
    ("cross.folds", config.cross.folds, 2),
    ("cross.lowest", config.cross.lowest, 1),
    ("study.seeds", len(config.study.seeds), 1),
    ("num_epochs", config.num_epochs, 1),
    ("batch_size", config.batch_size, 1),
    ("eval_batch_size", config.eval_batch_size, 1),
  ):
    if count < least:
      raise ValueError(
        f"config.{field} has {count}; expected at least {least}."
      )
  if config.mimic.refresh_epochs != 1 or config.study.rounds != 1:
    raise ValueError(
      f"config.mimic.refresh_epochs is {config.mimic.refresh_epochs} and"
      f" config.study.rounds {config.study.rounds}; a cross-fitting scores each"
      " sample in every epoch, against a reference that is a head of its own:"
      " expected 1 and 1."
    )
  for name in methods_of(config):
    method = methods.create(name, config.mimic)
    has_scores = method is not None and method.score is not None
    if method is not None and method.averaged:
      raise ValueError(
        f"{name!r} weighs by averages over epochs, which a cross-fitting does"
        " not keep; expected grad_mimic or rho."
      )
    if not has_scores or not cells.has_reference(name, config):
      raise ValueError(
        f"config.method is {config.method!r} and config.study.methods"
        f" {tuple(config.study.methods)}; expected methods with scores that"
        f" look at a reference, such as 'grad_mimic' or 'rho', and {name!r} is"
        " none."
      )


def methods_of(config: config_dict.ConfigDict) -> list[str]:
  """The methods that learners are trained by, the ledger's own first."""
  return list(dict.fromkeys((config.method, *config.study.methods)))


def assign_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
  """Deals samples into folds, each class and the whole as evenly as it goes.

  Args:
    labels: integers [N], as they are given.
    folds: how many, K.
    seed: of the draw.

  Returns:
    int32 [N] in 0 .. K - 1; sizes, of folds and of a class in them, differ by
    at most 1.

  Raises:
    ValueError: there are fewer samples than folds.

  Example:
    >>> np.bincount(assign_folds(np.array([0, 1, 1, 0, 1, 1, 0]), 2, seed=0))
    array([4, 3])
  """
  if len(labels) < folds:
    raise ValueError(
      f"config.cross.folds is {folds}, and there are {len(labels)} samples;"
      " expected no more folds than samples."
    )
  rng = np.random.default_rng((seed, purposes.PARTS))
  order = rng.permutation(len(labels))
  order = order[np.argsort(labels[order], kind="stable")]
  found = np.empty(len(labels), np.int32)
  found[order] = np.arange(len(labels)) % folds
  return found


def draw_labels(
  config: config_dict.ConfigDict, train: features_lib.Features
) -> noise.NoisyLabels:
  """The labels as they are given: published, or with noise for a trial."""
  return noise.apply_noise(
    train.labels,
    kind=config.noise.kind,
    rate=data_lib.noise_rate(config.noise),
    num_classes=train.num_classes,
    seed=config.noise.seed,
    class_names=train.class_names,
    ids=train.ids,
    partial=config.noise.partial,
    **{name: config.noise[name] for name in data_lib.NOISE_OPTIONS},
  )


def _claim(folder, config):
  """Claims the workdir for a config that names its own probabilities.

  By them a page suggests labels; `mimic.outputs` is no part of what it is.
  """
  copy = config.copy_and_resolve_references().unlock()
  copy.mimic.outputs = str(folder / lists.PROBABILITIES_FILE)
  workdir_lib.claim(folder, copy, natural_errors, job=JOB)


class _Study:
  """The cells that are to be done, and how one is."""

  def __init__(
    self,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    train: features_lib.Features,
    test: features_lib.Features,
    labels: noise.NoisyLabels,
  ):
    self.config, self.folder = config, folder
    self.train, self.test, self.labels = train, test, labels
    self.seeds = list(config.study.seeds)
    self.methods = methods_of(config)
    self.folds = np.stack(
      [assign_folds(labels.labels, config.cross.folds, s) for s in self.seeds]
    )
    self.cells = [
      Cell(name, fold)
      for name in (REFERENCE, *self.methods)
      for fold in range(config.cross.folds)
    ]
    self.base = workdir_lib.fingerprint(
      workdir_lib.config_fingerprint(config, JOB),
      train.fingerprint,
      test.fingerprint,
      hashlib.sha256(labels.labels.tobytes()).hexdigest(),
    )
    self.programs: dict[Any, Any] = {}
    width = train.values.shape[-1]
    self.images = jnp.asarray(train.values.reshape(-1, width))

  def to_the_end(self) -> lists.Found:
    """Every cell, done here or by another process; and all of them together."""
    started = time.monotonic()
    results = dict(
      zip(self.cells, claims.share(self.cells, self._attempt), strict=True)
    )
    references = [
      results[Cell(REFERENCE, fold)] for fold in range(self.config.cross.folds)
    ]
    samples = {
      name: {
        field: self._merge(results, name, field)
        for field in ("score", "weight", "loss")
      }
      for name in self.methods
    }
    probabilities, scores = self._by_references(references)
    return lists.Found(
      probabilities,
      samples,
      scores,
      np.stack([found["test_accuracy"] for found in references], axis=1),
      self.base,
      round(time.monotonic() - started, 1),
    )

  def _attempt(self, cell) -> dict[str, np.ndarray] | None:
    """The cell's arrays, unless another process is at it, or it must wait."""
    found = self._result(cell)
    if found is not None:
      return found
    reference = None
    if cell.method != REFERENCE:
      reference = self._result(Cell(REFERENCE, cell.fold))
      if reference is None:
        return None

    def work():
      print(
        f"{cell.method}: fold {cell.fold + 1} of {self.config.cross.folds},"
        f" seeds {', '.join(map(str, self.seeds))}",
        flush=True,
      )
      found = self._train(cell, reference)
      with _files.replacing(self._file(cell)) as content:
        np.savez(content, allow_pickle=False, **found)
      return found

    return claims.do_once(
      self._file(cell).with_suffix(".claim"), lambda: self._result(cell), work
    )

  def _file(self, cell) -> pathlib.Path:
    """Named after all that its result depends on."""
    fingerprint = workdir_lib.fingerprint(self.base, cell)
    name = f"{cell.method}_fold{cell.fold}_{fingerprint}.npz"
    return self.folder / CELLS / name

  def _result(self, cell) -> dict[str, np.ndarray] | None:
    """Reads the arrays of a cell; None if it isn't finished."""
    try:
      with grid_summary.samples(self._file(cell)) as arrays:
        return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
      return None
    except ValueError as error:
      logging.warning("%s It is trained again.", error)
      return None

  def _train(self, cell, reference) -> dict[str, np.ndarray]:
    config, count = self.config, len(self.train.labels)
    is_reference = cell.method == REFERENCE
    wanted = config.study.reference
    epochs, shift = config.num_epochs, 0
    if is_reference:
      epochs, shift = wanted.num_epochs or epochs, wanted.seed_offset
    rows = [
      np.flatnonzero((folds == cell.fold) != is_reference)
      for folds in self.folds
    ]
    seeds = [seed + shift for seed in self.seeds]
    name = "sgd" if is_reference else cell.method
    head = heads.create(self.images.shape[1], self.train.num_classes, seeds)
    total = epochs * -(-len(rows[0]) // config.batch_size)
    tx = optimizer.create(config.optimizer, total_steps=total)
    states = heads.init_states(head, tx, 1)
    given = heads.Given(
      jnp.asarray(np.tile(self.labels.labels, (len(seeds), 1, 1))),
      None,
      reference
      and {"head": {field: reference[field] for field in ("bias", "kernel")}},
    )
    schedules = [
      heads.batches(
        plan.derived(config, seed=seed, num_epochs=epochs),
        None,
        num_samples=count,
        indices=some,
      )
      for seed, some in zip(seeds, rows, strict=True)
    ]
    key = name, is_reference, total
    if key not in self.programs:  # folds of one size share it
      epoch_fn = heads.make_epoch(head, tx, name, config.mimic)
      self.programs[key] = jax.jit(epoch_fn, donate_argnums=0)
    by_epoch = []
    for parts in zip(*schedules, strict=True):
      batches = jax.tree.map(lambda *xs: np.stack(xs), *parts)
      states, _, by_step = self.programs[key](
        states, given, self.images, batches
      )
      by_epoch.append(_by_sample(by_step, batches, count))
    if not is_reference:
      return jax.tree.map(lambda *xs: np.stack(xs, axis=-1), *by_epoch)
    evaluated = jax.jit(heads.make_evaluate(head))(
      states.params,
      jnp.asarray(self.test.values[0]),
      jnp.asarray(self.test.labels),
    )
    params = jax.device_get(states.params)["head"]
    return {
      "test_accuracy": np.asarray(evaluated["accuracy"])[:, 0],
      **{field: params[field][:, 0] for field in ("bias", "kernel")},
    }

  def _merge(self, results, method, field):
    """Puts the folds' `[S, N, T]` together, each sample's by its own fold."""
    found = None
    for fold in range(self.config.cross.folds):
      part = results[Cell(method, fold)][field]
      own = self.folds[..., None] == fold
      found = part if found is None else np.where(own, part, found)
    return found

  def _by_references(self, references):
    """What the references that haven't seen a sample say of it.

    Returns:
      Probabilities `[S, N, C]`, and mimic scores `[S, N]` of the heads that
      they started from, before a learner has learned anything; of the images
      as they are and mirrored, means.
    """
    probabilities = np.empty(
      (*self.folds.shape, self.train.num_classes), np.float32
    )
    scores = np.empty(self.folds.shape, np.float32)
    head = heads.create(
      self.images.shape[1], self.train.num_classes, self.seeds
    )
    losses_fn = classification.make_losses_fn(head.apply)
    score = jax.jit(
      gm.mimic_scores(
        losses_fn,
        layers=self.config.mimic.layers,
        score=self.config.mimic.score,
        has_aux=True,
        check_independence=False,  # what depends on batch mates is no head
      )
    )
    for fold, reference in enumerate(references):
      for s, folds in enumerate(self.folds):
        rows = np.flatnonzero(folds == fold)
        start = jax.tree.map(lambda x, s=s: x[s], head.params)
        end = {"head": {x: reference[x][s] for x in ("bias", "kernel")}}
        views = []
        for values in self.train.values:
          batch = {"image": values[rows], "label": self.labels.labels[rows]}
          p = jax.nn.softmax(head.apply(end, batch["image"]))
          views.append((p, score(start, end, batch).scores))
        probabilities[s, rows], scores[s, rows] = (
          np.mean(x, axis=0) for x in zip(*views, strict=True)
        )
    return probabilities, scores


def _by_sample(by_step, batches, count):
  """Sorts an epoch's `[T, S, 1, B]` into `[S, N]`; NaN: not seen."""
  found = {}
  for field, values in by_step.items():
    values = np.asarray(values)[:, :, 0]
    found[field] = np.full((values.shape[1], count), np.nan, np.float32)
    for s, real in enumerate(batches.mask):
      found[field][s, batches.sample[s][real]] = values[:, s][real]
  return found


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Runs the cross-fitting, then prints the tables and where the lists are."""
  if jax.process_count() > 1:  # they share the cells as jobs of their own
    raise ValueError(
      "this job is one for a single process; expected no --distributed and no"
      " --coordinator"
    )
  summary = run_cross_fitting(config, workdir)
  print("\n" + lists.markdown(summary))
  for path in summary["files"]:
    print(f"  {path}")
