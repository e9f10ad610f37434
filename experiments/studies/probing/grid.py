"""Linear probing under label noise: a grid of heads on stored features.

Every method on every seed and noise rate. A cell of the grid is one method on
as many of its runs as one program takes; what is done stays done, and any
number of processes may be given the same command: they share the cells.
"""

import hashlib
import itertools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from configs import label_noise
from experiments import methods
from experiments.data import noise
from experiments.runtime import claims, terminal, workdir as workdir_lib
from experiments.studies import detection, opening, plan, settings
from experiments.studies.probing import (
  features as features_lib,
  heads,
  summary as grid_summary,
)
from experiments.tasks.classification import data as data_lib
from experiments.training import optimizer
from gradmimic_jax import _files

CELLS, SAMPLES = "cells", "samples"
REFERENCE = "reference"
# Methods whose fraction must be a number when jit traces.
_ONE_VALUE = ("grad_match_omp",)


class Cell(NamedTuple):
  """One method's runs that are one program: seeds x (rate, value)."""

  method: str  # or REFERENCE
  seeds: tuple[int, ...]
  points: tuple[tuple[float, float | None], ...]


class _Data(NamedTuple):
  """Both splits, with features where the programs want them."""

  train: features_lib.Features
  test: features_lib.Features
  images: jax.Array  # [V * N, D]
  test_images: jax.Array  # [M, D]


def run_grid(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Trains the whole grid; goes on where an interrupted one stopped.

  The workdir gets a JSON file for each cell, an `.npz` file for each run (its
  head, labels, and the scores, weights and losses of all samples in each
  epoch), tables, figures and `summary.json`, whose content is returned.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set or a backbone that is not there.
  """
  check(config)
  folder = workdir_lib.check(workdir, config, label_noise, job="grid")
  cache = pathlib.Path(config.probe.features or folder / "features")
  if config.probe.features is None:
    _claim(folder, config)  # its own folder of features is in it
  train, test = features_lib.load(config, cache)
  images = jnp.asarray(train.values.reshape(-1, train.values.shape[-1]))
  data = _Data(train, test, images, jnp.asarray(test.values[0]))
  grid = _Grid(config, folder, data)
  _claim(folder, config)
  for name in (CELLS, SAMPLES):
    (folder / name).mkdir(exist_ok=True)
  results = grid.to_the_end()
  with claims.hold(folder / "report.claim"):
    return grid_summary.write(config, folder, results)


def check(config: config_dict.ConfigDict) -> None:
  """Raises ValueError unless the grid can be run."""
  workdir_lib.check_fields(config, label_noise)
  wanted = config.study.reference
  given = {
    "config.data.filter": config.data.filter,
    "config.mimic.reference": config.mimic.reference,
    "config.mimic.outputs": config.mimic.outputs,
    "config.study.reference.model": wanted.model,
    "config.study.reference.train_split": wanted.train_split,
    "config.study.reference.test_leak": wanted.test_leak,
    "config.study.keep_fractions": config.study.keep_fractions,
  }
  for field, value in given.items():
    if value:
      raise ValueError(
        f"{field} is {value!r}, which a grid of heads has no use for: its"
        " reference is a head of its own. Leave it out, or use"
        " protocol=finetune."
      )
  for field, count in (
    ("study.seeds", len(config.study.seeds)),
    ("study.methods", len(config.study.methods)),
    ("probe.rates", len(config.probe.rates)),
    ("probe.runs_per_cell", config.probe.runs_per_cell),
    ("num_epochs", config.num_epochs),
    ("batch_size", config.batch_size),
    ("eval_batch_size", config.eval_batch_size),
  ):
    if count < 1:
      raise ValueError(f"config.{field} has {count}; expected at least 1.")
  for name in config.study.methods:
    methods.create(name, config.mimic)
    if name == "grand_offline":
      raise ValueError(
        "config.study.methods has 'grand_offline', which needs runs of its own;"
        " use protocol=finetune for it, or take 'grand'."
      )
  detection.check(config)
  for name, fields in settings.read(config.study.tuned).items():
    field = f"mimic.{heads.value_field(config.mimic)}"
    if config.probe.weighting_values and field in fields:
      raise ValueError(
        f"config.study.tuned sets {field} of {name}, and"
        " config.probe.weighting_values has several; give one of the two."
      )


def _claim(folder, config):
  workdir_lib.claim(folder, config, label_noise, job="grid")


def cells_of(config: config_dict.ConfigDict) -> list[Cell]:
  """Makes the grid's cells, the reference's first."""
  rates = tuple(config.probe.rates)
  most = config.probe.runs_per_cell
  made = []
  for name in (REFERENCE, *config.study.methods):
    values: list[float | None] = [None]
    if name != REFERENCE and heads.reads_value(name, config.mimic):
      values = sorted(config.probe.weighting_values) or values
    # One value's rates stand together.
    groups = [[(rate, value) for rate in rates] for value in values]
    if name == REFERENCE:
      groups = [[(0.0, None)]]
    elif name not in _ONE_VALUE:
      groups = [list(itertools.chain(*groups))]
    for group in groups:
      for some in _chunks(group, most):
        for seeds in _chunks(config.study.seeds, max(1, most // len(some))):
          made.append(Cell(name, tuple(seeds), tuple(some)))
  return made


def _chunks(items, size):
  items = list(items)
  for start in range(0, len(items), size):
    yield items[start : start + size]


class _Grid:
  """The cells that are to be done, and how one is."""

  def __init__(
    self, config: config_dict.ConfigDict, folder: pathlib.Path, data: _Data
  ):
    self.config, self.folder, self.data = config, folder, data
    self.num_samples = len(data.train.labels)
    self.batches: dict[Any, list[heads.Batches]] = {}
    self.tuned = settings.read(config.study.tuned)
    self.needs_reference = {REFERENCE: False}
    for name in config.study.methods:
      method = methods.create(name, config.mimic)
      self.needs_reference[name] = method is not None and (
        method.direction in ("weights", "outputs")
      )
    self.cells = [
      cell
      for cell in cells_of(config)
      if cell.method != REFERENCE or any(self.needs_reference.values())
    ]
    # Before hours go into the others: the noise of every run can be drawn.
    for cell in self.cells:
      if cell.method != REFERENCE:
        self._draw_labels(cell)
    self.base = workdir_lib.fingerprint(
      workdir_lib.config_fingerprint(config, "grid"),
      data.train.fingerprint,
      data.test.fingerprint,
    )

  def to_the_end(self) -> list[dict[str, Any]]:
    """Every cell's result, done here or by another process."""
    return claims.share(
      self.cells, lambda cell: self._result(cell) or self._try(cell)
    )

  def _try(self, cell) -> dict[str, Any] | None:
    """The cell's result, unless another process is at it, or it must wait."""
    if self.needs_reference[cell.method] and not all(
      self._result(other) for other in self._references(cell.seeds)
    ):
      return None
    claim = claims.take(self._file(cell).with_suffix(".claim"))
    if claim is None:
      return None
    try:
      result = self._result(cell)
      if result is None:
        print(
          f"{cell.method}: seeds {', '.join(map(str, cell.seeds))},"
          f" {len(cell.seeds) * len(cell.points)} runs",
          flush=True,
        )
        result = self._train(cell)
        grid_summary.detections(self.config, self.folder / SAMPLES, result)
        workdir_lib.write_json(self._file(cell), result)
      return result
    finally:
      claim.release()

  def _references(self, seeds):
    """The cells of the references of these seeds."""
    return [
      cell
      for cell in self.cells
      if cell.method == REFERENCE and set(cell.seeds) & set(seeds)
    ]

  def _file(self, cell) -> pathlib.Path:
    """Named after all that its result depends on."""
    labels = "" if cell.method == REFERENCE else self._labels_digest(cell)
    parts = [self.base, cell, labels]
    if cell.method in self.tuned:
      parts.append(self.tuned[cell.method])
    fingerprint = workdir_lib.fingerprint(*parts)
    return self.folder / CELLS / f"{cell.method}_{fingerprint}.json"

  def _result(self, cell) -> dict[str, Any] | None:
    """Reads the result of a cell; None if it isn't finished."""
    file = self._file(cell)
    if not file.exists():
      return None
    try:
      return workdir_lib.read_json(file, {"runs": list})
    except ValueError as error:
      logging.warning("%s; it is run again.", error)
      return None

  def _labels(self, seed, rate) -> noise.NoisyLabels:
    """The labels of a run; noise follows the seed, as in a study."""
    config, train = self.config.noise, self.data.train
    kind = noise.KINDS.get(config.kind)
    own = rate == 0 and kind is not None and kind.rate != "needed"
    return noise.apply_noise(
      train.labels,
      kind=config.kind,
      rate=None if own else rate,
      num_classes=train.num_classes,
      seed=seed,
      class_names=train.class_names,
      ids=train.ids,
      partial=config.partial,
      **{
        name: config[name]
        for name in ("mapping", "matrix", "path", "column", "id_column")
      },
    )

  def _draw_labels(self, cell) -> list[list[noise.NoisyLabels]]:
    """The labels of a cell's runs, by seed and point."""
    if cell.method != REFERENCE:
      return [
        [self._labels(seed, rate) for rate, _ in cell.points]
        for seed in cell.seeds
      ]
    train, wanted = self.data.train, self.config.study.reference
    return [
      [
        noise.apply_noise(  # as `Task.reference_overrides` has it
          train.labels,
          kind="symmetric",
          rate=wanted.noise_rate,
          num_classes=train.num_classes,
          seed=seed + wanted.seed_offset,
        )
      ]
      for seed in cell.seeds
    ]

  def _labels_digest(self, cell):
    """Changes where a table or a matrix on disk does."""
    if self.config.noise.kind not in ("file", "confusion"):
      return ""
    digest = hashlib.sha256()
    for labels in itertools.chain.from_iterable(self._draw_labels(cell)):
      digest.update(labels.labels.tobytes())
    return digest.hexdigest()

  def _train(self, cell) -> dict[str, Any]:
    started = time.monotonic()
    is_reference = cell.method == REFERENCE
    name = "sgd" if is_reference else cell.method
    fields = {} if is_reference else dict(self.tuned.get(name, {}))
    values, given_values = [value for _, value in cell.points], None
    if name in _ONE_VALUE and values[0] is not None:
      fields[f"mimic.{heads.value_field(self.config.mimic)}"] = values[0]
    elif values[0] is not None:
      given_values = jnp.tile(jnp.asarray(values), (len(cell.seeds), 1))
    wanted = self.config.study.reference
    seeds, epochs = list(cell.seeds), self.config.num_epochs
    if is_reference:
      seeds = [seed + wanted.seed_offset for seed in seeds]
      epochs = wanted.num_epochs or epochs
    configs = [plan.derived(self.config, seed=s, **fields) for s in seeds]
    shared, train = configs[0], self.data.train  # but for seeds, all are alike
    method = methods.create(name, shared.mimic)
    noisy = self._draw_labels(cell)
    indices = [self._indices(method, config) for config in configs]
    head = heads.create(self.data.images.shape[1], train.num_classes, seeds)
    rows = self.num_samples if indices[0] is None else len(indices[0])
    total = epochs * -(-rows // self.config.batch_size)
    tx = optimizer.create(shared.optimizer, total_steps=total)
    states = heads.init_states(head, tx, len(cell.points))
    given = heads.Given(
      jnp.asarray(np.stack([[n.labels for n in row] for row in noisy])),
      given_values,
      self._reference(method, cell, configs),
    )
    schedules = [
      self._schedule(config, method, some, epochs)
      for config, some in zip(configs, indices, strict=True)
    ]
    epoch_fn = heads.make_epoch(head, tx, name, shared.mimic)
    program = jax.jit(epoch_fn, donate_argnums=0)
    evaluate = jax.jit(heads.make_evaluate(head))
    test_labels = jnp.asarray(self.data.test.labels)
    curves: dict[str, list[np.ndarray]] = {}
    samples: dict[str, np.ndarray] = {}
    seconds, compiled = [], None
    for epoch in range(epochs + 1):
      found = evaluate(states.params, self.data.test_images, test_labels)
      for key, value in found.items():
        curves.setdefault(f"test_{key}", []).append(np.asarray(value))
      if epoch == epochs:
        break
      parts = [schedule[epoch] for schedule in schedules]
      batches = jax.tree.map(lambda *xs: np.stack(xs), *parts)
      arguments = states, given, self.data.images, batches
      if compiled is None:
        compiled = program.lower(*arguments).compile()
      before = time.monotonic()
      states, metrics, by_step = jax.block_until_ready(compiled(*arguments))
      seconds.append(time.monotonic() - before)
      for key, value in metrics.items():
        curves.setdefault(f"train_{key}", []).append(np.asarray(value))
      _collect(samples, by_step, batches, epoch, epochs, self.num_samples)
    shape = len(seeds), len(cell.points)
    runs = []
    params = jax.device_get(states.params)["head"]
    stem = self._file(cell).stem
    for s, k in np.ndindex(*shape):
      (rate, value), labels = cell.points[k], noisy[s][k]
      file = f"{stem}_seed{cell.seeds[s]}_{k}.npz"
      _write_arrays(
        self.folder / SAMPLES / file,
        labels=labels.labels,
        clean_labels=labels.clean_labels,
        kernel=params["kernel"][s, k],
        bias=params["bias"][s, k],
        **{field: array[s, k] for field, array in samples.items()},
      )
      runs.append(
        {
          "seed": cell.seeds[s],
          "rate": rate,
          "value": value,
          "noise_rate": labels.rate,
          "train_samples": rows,
          "samples": file,
          "curves": {
            key: [float(x[s, k]) for x in points]
            for key, points in curves.items()
          },
        }
      )
    return {
      "method": cell.method,
      "runs": runs,
      "steps": total,
      "seconds": round(time.monotonic() - started, 2),
      # Of one run's step, in the fastest epoch: others may use the machine.
      "seconds_per_step": min(seconds) * epochs / total / (shape[0] * shape[1]),
      "runs_at_once": shape[0] * shape[1],
      "machine": workdir_lib.machine(),
    }

  def _indices(self, method, config) -> np.ndarray | None:
    """Positions to train on, as the general loop has them; None: all."""
    if method is None or method.direction != "clean_gradient":
      return None
    return np.setdiff1d(
      np.arange(self.num_samples), self._clean(config, self.data.train, "train")
    )

  def _clean(self, config, split, name):
    return data_lib.clean_positions(
      split.labels,
      per_class=config.mimic.clean_per_class,
      num_classes=split.num_classes,
      seed=config.seed,
      split=name,
    )

  def _reference(self, method, cell, configs):
    """Loads the reference, an entry for each seed; None if there is none."""
    direction = method and method.direction
    if direction in ("weights", "outputs"):
      heads_of = self._trained_references(cell.seeds)
      return {"head": jax.tree.map(lambda *xs: np.stack(xs), *heads_of)}
    split, images, name = self.data.train, self.data.images, "train"
    if direction == "test_gradient":
      split, images, name = self.data.test, self.data.test_images, "test"
    elif direction != "clean_gradient":
      return None
    rows = np.stack([self._clean(config, split, name) for config in configs])
    return {"image": images[rows], "label": jnp.asarray(split.labels[rows])}

  def _trained_references(self, seeds):
    """The references' heads, in the order of the seeds."""
    found = {}
    for cell in self._references(seeds):
      result = self._result(cell)
      if result is None:  # it was there when this began
        raise ValueError(
          f"{self._file(cell)} is gone or damaged; give the same command again,"
          " which makes it anew."
        )
      for run in result["runs"]:
        file = self.folder / SAMPLES / run["samples"]
        with grid_summary.samples(file) as arrays:
          found[run["seed"]] = {
            name: arrays[name] for name in ("bias", "kernel")
          }
    return [found[seed] for seed in seeds]

  def _schedule(self, config, method, indices, epochs) -> list[heads.Batches]:
    """The batches of each epoch of a run, made once for all methods."""
    other = method is not None and method.direction == "noisy_gradient"
    key = config.seed, other, indices is None, epochs
    if key not in self.batches:
      copy = config.copy_and_resolve_references().unlock()
      copy.num_epochs = epochs
      made = heads.batches(
        copy, method, num_samples=self.num_samples, indices=indices
      )
      self.batches[key] = list(made)
    return self.batches[key]


def _collect(samples, by_step, batches, epoch, epochs, num_samples):
  """Sorts an epoch's `[T, S, K, B]` into `[S, K, N, epochs]`; NaN: not seen."""
  for field, values in by_step.items():
    values = np.asarray(values)
    if field not in samples:
      shape = (*values.shape[1:3], num_samples, epochs)
      samples[field] = np.full(shape, np.nan, np.float32)
    for s in range(values.shape[1]):
      real = batches.mask[s]
      where = batches.sample[s][real]
      for k in range(values.shape[2]):
        samples[field][s, k, where, epoch] = values[:, s, k][real]


def _write_arrays(path, **arrays):
  """Not compressed: that takes longer than the run itself."""
  with _files.replacing(path) as content:
    np.savez(content, **arrays)


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Runs the grid, then prints the table and where the results are."""
  if jax.process_count() > 1:  # they share the cells as jobs of their own
    raise ValueError(
      "this job is one for a single process; expected no --distributed and no"
      " --coordinator"
    )
  check(config)
  terminal.note(opening.grid(config, workdir, cells_of(config)))
  summary = run_grid(config, workdir)
  print("\n" + grid_summary.markdown(summary))
  for path in summary["files"]:
    print(f"  {path}")
