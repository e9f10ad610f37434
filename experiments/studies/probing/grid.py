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
from experiments.selection import files
from experiments.studies import opening, plan, settings
from experiments.studies.plan import REFERENCE
from experiments.studies.probing import (
  features as features_lib,
  heads,
  summary as grid_summary,
)
from experiments.studies.probing.cells import (
  ONE_VALUE,
  Cell,
  cells_of,
  check,
)
from experiments.tasks.classification import data as data_lib
from experiments.training import memory as memory_lib, optimizer
from gradmimic_jax import _files

CELLS, SAMPLES = "cells", "samples"


class _Data(NamedTuple):
  """Both splits, with features where the programs want them."""

  train: features_lib.Features
  test: features_lib.Features
  images: jax.Array  # [V * N, D]
  test_images: jax.Array  # [M, D]


def run_grid(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Trains the whole grid; goes on where an interrupted one stopped.

  The workdir gets a JSON file for each cell, an `.npz` file for each run (its
  head, labels, and the scores, weights and losses of all samples in each epoch;
  an epoch that measures no scores has the last ones), tables, figures and
  `summary.json`, whose content is returned.

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


def _claim(folder, config):
  workdir_lib.claim(folder, config, label_noise, job="grid")


class _Grid:
  """The cells that are to be done, and how one is."""

  def __init__(
    self, config: config_dict.ConfigDict, folder: pathlib.Path, data: _Data
  ):
    self.config, self.folder, self.data = config, folder, data
    self.num_samples = len(data.train.labels)
    self.batches: dict[Any, list[heads.Batches]] = {}
    self.tuned = settings.read(config.study.tuned)
    self.programs: dict[str, Any] = {}  # of the settings that were trained
    self.cells = cells_of(config)
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
    if not all(self._result(other) for other in self._needed(cell)):
      return None

    def work():
      print(
        f"{cell.name}: seeds {', '.join(map(str, cell.seeds))},"
        f" {len(cell.seeds) * len(cell.points)} runs"
        + (f", reference on {cell.share:.1%}" if cell.share else ""),
        flush=True,
      )
      result = self._train(cell)
      grid_summary.detections(self.config, self.folder / SAMPLES, result)
      workdir_lib.write_json(self._file(cell), result)
      return result

    return claims.do_once(
      self._file(cell).with_suffix(".claim"), lambda: self._result(cell), work
    )

  def _needed(self, cell) -> list[Cell]:
    """The cells that come before it: references, or whose scores choose."""
    if cell.retrained:
      return [cell._replace(retrained=False, with_clean=False)]
    return [
      other
      for other in self.cells
      if other.method == REFERENCE != cell.method
      and other.share == cell.share
      and set(other.seeds) & set(cell.seeds)
    ]

  def _file(self, cell) -> pathlib.Path:
    """Named after all that its result depends on."""
    labels = "" if cell.method == REFERENCE else self._labels_digest(cell)
    parts = [self.base, cell, labels]
    if cell.method != REFERENCE and cell.trained_by in self.tuned:
      parts.append(self.tuned[cell.trained_by])
    if cell.retrained:
      parts += [
        self._file(*self._needed(cell)).stem,
        self.config.select.to_dict(),
      ]
    fingerprint = workdir_lib.fingerprint(*parts)
    return self.folder / CELLS / f"{cell.name}_{fingerprint}.json"

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
    is_reference, name = cell.method == REFERENCE, cell.trained_by
    fields = {} if is_reference else dict(self.tuned.get(name, {}))
    values, given_values = [value for _, value in cell.points], None
    field = heads.value_field(name, self.config.mimic)
    if name in ONE_VALUE and values[0] is not None:
      fields[f"mimic.{field}"] = values[0]
    elif field is not None and values[0] is not None:
      given_values = jnp.tile(jnp.asarray(values), (len(cell.seeds), 1))
    wanted = self.config.study.reference
    seeds, epochs = list(cell.seeds), self.config.num_epochs
    if is_reference:
      seeds = [seed + wanted.seed_offset for seed in seeds]
      epochs = wanted.num_epochs or epochs
    configs = [plan.derived(self.config, seed=s, **fields) for s in seeds]
    shared, train = configs[0], self.data.train  # but for seeds, all are alike
    method = methods.create(name, shared.mimic)
    noisy, kept = self._draw_labels(cell), None
    if cell.retrained:
      noisy, kept = self._choose(cell, noisy)
    indices = [
      self._known(seed, cell.share)
      if is_reference and cell.share < 1
      else self._indices(method, config)
      for seed, config in zip(cell.seeds, configs, strict=True)
    ]
    head = heads.create(self.data.images.shape[1], train.num_classes, seeds)
    rows = self.num_samples if indices[0] is None else len(indices[0])
    as_all = is_reference or indices[0] is None
    steps = -(-(self.num_samples if as_all else rows) // self.config.batch_size)
    total = epochs * steps
    tx = optimizer.create(shared.optimizer, total_steps=total)
    memory = memory_lib.make_plan(
      shared.mimic, method, samples=self.num_samples, steps_per_epoch=steps
    )
    states = heads.init_states(head, tx, len(cell.points), memory)
    given = heads.Given(
      jnp.asarray(np.stack([[n.labels for n in row] for row in noisy])),
      given_values,
      self._reference(method, cell, configs),
      kept,
    )
    schedules = [
      self._schedule(config, method, some, epochs, steps)
      for config, some in zip(configs, indices, strict=True)
    ]
    # Cells that differ in their data alone take one program.
    setting = workdir_lib.fingerprint(name, fields, total)
    measuring, between, evaluate = self.programs.setdefault(
      setting,
      (
        *(
          jax.jit(
            heads.make_epoch(
              head, tx, name, shared.mimic, memory, measures=measures
            ),
            donate_argnums=0,
          )
          for measures in (True, False)
        ),
        jax.jit(heads.make_evaluate(head)),
      ),
    )
    test_labels = jnp.asarray(self.data.test.labels)
    curves: dict[str, list[np.ndarray]] = {}
    samples: dict[str, np.ndarray] = {}
    seconds = []
    for epoch in range(epochs + 1):
      found = evaluate(states.params, self.data.test_images, test_labels)
      for key, value in found.items():
        curves.setdefault(f"test_{key}", []).append(np.asarray(value))
      if epoch == epochs:
        break
      parts = [schedule[epoch] for schedule in schedules]
      batches = jax.tree.map(lambda *xs: np.stack(xs), *parts)
      measures = memory is None or memory.measures(epoch * steps)
      program = measuring if measures else between
      arguments = states, given, self.data.images, batches
      if epoch == 0:
        program.lower(*arguments).compile()
      before = time.monotonic()
      states, metrics, by_step = jax.block_until_ready(program(*arguments))
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
          "train_samples": rows if kept is None else int(kept[s, k].sum()),
          "samples": file,
          "curves": {
            key: [float(x[s, k]) for x in points]
            for key, points in curves.items()
          },
        }
      )
    return {
      "method": cell.name,
      "share": cell.share,
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

  def _known(self, seed, share) -> np.ndarray:
    """Positions of the samples whose true labels a reference has."""
    return data_lib.draw_share(self.data.train.labels, share=share, seed=seed)

  def _choose(self, cell, noisy):
    """Labels, and bool [S, K, N]: those that the cell's selections keep."""
    (scorer,) = self._needed(cell)
    files_of = [
      self.folder / SAMPLES / r["samples"] for r in self._runs(scorer)
    ]
    kept = np.zeros((len(cell.seeds), len(cell.points), self.num_samples), bool)
    for (s, k), file in zip(np.ndindex(kept.shape[:2]), files_of, strict=True):
      with grid_summary.samples(file) as arrays:
        scores = arrays["score"]
      seen = ~np.isnan(scores).all(axis=1)
      kept[s, k, seen] = files.select(self.config.select, scores[seen]).keep
      if cell.with_clean:
        known, was = self._known(cell.seeds[s], cell.share), noisy[s][k]
        kept[s, k, known] = True
        labels = was.labels.copy()
        labels[known] = was.clean_labels[known]
        noisy[s][k] = was._replace(labels=labels)
    return noisy, kept

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
      heads_of = self._trained_references(cell)
      return {"head": jax.tree.map(lambda *xs: np.stack(xs), *heads_of)}
    split, images, name = self.data.train, self.data.images, "train"
    if direction == "test_gradient":
      split, images, name = self.data.test, self.data.test_images, "test"
    elif direction != "clean_gradient":
      return None
    rows = np.stack([self._clean(config, split, name) for config in configs])
    return {"image": images[rows], "label": jnp.asarray(split.labels[rows])}

  def _runs(self, cell) -> list[dict[str, Any]]:
    """The runs of a cell that is finished."""
    result = self._result(cell)
    if result is None:  # it was there when this began
      raise ValueError(
        f"{self._file(cell)} is gone or damaged; give the same command again,"
        " which makes it anew."
      )
    return result["runs"]

  def _trained_references(self, cell):
    """The references' heads, in the order of the cell's seeds."""
    found = {}
    for run in itertools.chain.from_iterable(
      map(self._runs, self._needed(cell))
    ):
      with grid_summary.samples(
        self.folder / SAMPLES / run["samples"]
      ) as arrays:
        found[run["seed"]] = {x: arrays[x] for x in ("bias", "kernel")}
    return [found[seed] for seed in cell.seeds]

  def _schedule(self, config, method, indices, epochs, steps):
    """The batches of each epoch of a run, made once for all methods."""
    other = method is not None and method.direction == "noisy_gradient"
    rows = self.num_samples if indices is None else len(indices)
    chosen = None if indices is None else indices.tobytes()
    key = config.seed, other, chosen, epochs
    if key not in self.batches:
      copy = config.copy_and_resolve_references().unlock()
      own = -(-rows // config.batch_size)
      copy.num_epochs = -(-epochs * steps // own)
      made = list(
        heads.batches(
          copy, method, num_samples=self.num_samples, indices=indices
        )
      )
      self.batches[key] = (
        made if own == steps else heads.cut(made, epochs, steps)
      )
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
