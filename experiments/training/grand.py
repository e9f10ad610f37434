"""GraNd as first published: gradient norms averaged over many short runs."""

import functools
import math
import pathlib

import jax
import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import models
from experiments.data import stream
from experiments.models import initial
from experiments.runtime import (
  cache,
  checkpoint,
  distributed,
  prefetch,
  workdir as workdir_lib,
)
from experiments.tasks.base import Reference
from experiments.tasks.classification import inputs, losses as classification
from experiments.tasks.classification.data import Data
from experiments.training import optimizer, steps

_FIRST_SEED = 1000  # of the runs' initialisations, away from the learner's


def load(
  config: config_dict.ConfigDict,
  data: Data,
  folder: pathlib.Path | None,
  devices: distributed.Devices,
) -> Reference:
  """Loads the norms `[B]` of a batch's samples, as a step's reference.

  They are computed when the first step asks for them, which a finished run
  never does, in each process by itself.

  Args:
    config: the run's.
    data: the run's.
    folder: keeps the norms; None keeps nothing.
    devices: the run's.

  Returns:
    The Reference.

  Raises:
    ValueError: as `offline_norms`.
  """
  digest = fingerprint(config, data)

  @functools.cache
  def norms():
    if folder is None:
      return offline_norms(config, data)
    file = folder / f"norms_{digest}.npy"
    found = cache.read(file, (len(data.labels.labels),))
    if found is None:
      found = offline_norms(config, data)
      if devices.process[0] == 0:
        cache.write(file, found)
    return found

  def for_batch(batch):
    return devices.put_own(norms()[np.maximum(batch["index"], 0)])

  return Reference(digest, None, for_batch)


def offline_norms(config: config_dict.ConfigDict, data: Data) -> np.ndarray:
  """Computes every training sample's mean gradient norm over runs of their own.

  `mean_r ||grad l_i(params_r)||` over the mimic layers, with `params_r` from
  `config.mimic.grand_epochs` epochs of plain training on the same noisy labels,
  each r with another initialisation.

  Args:
    config: the run's; `config.mimic` has `grand_runs`, `grand_epochs` and
      `layers`.
    data: as the task's `load_data` gave it.

  Returns:
    Norms, float32 `[N]`; NaN where one is not finite, and for samples that are
    not trained on.

  Raises:
    ValueError: no run at all, or a negative number of epochs.
  """
  runs, epochs = _counts(config)
  labels = data.labels.labels
  rows = np.arange(len(labels)) if data.indices is None else data.indices
  total_steps = epochs * stream.steps_per_epoch(len(rows), config.batch_size)
  tx = optimizer.create(config.optimizer, total_steps=max(total_steps, 1))
  made = []
  for run in range(runs):
    seed = _FIRST_SEED + config.seed * runs + run
    apply, params = initial.for_data(config.model, data, seed=seed)
    made.append((seed, params, apply.statistics))
  # One compilation for all: the runs differ in their parameters only.
  losses_fn = classification.make_losses_fn(apply)
  outputs = classification.make_outputs(
    classification.make_outputs_fn(apply), apply
  )
  train_step = steps.make_train_step(losses_fn, tx, None, config.mimic, outputs)
  norms_fn = jax.jit(
    gm.mimic_scores(
      lambda params, batch, **variables: losses_fn(params, batch, **variables)[
        0
      ],
      layers=config.mimic.layers,
      score="gradient_norm",
    )
  )
  expand = jax.jit(inputs.make_expand(data.mean, data.std))

  def seen(batch):
    shown = {key: batch[key] for key in inputs.SEEN if key in batch}
    return expand(shown, data.train.resident)

  total = np.zeros(len(rows))
  for seed, params, statistics in made:
    model_state = steps.make_model_state(outputs, statistics, seed)
    state = steps.init_state(params, tx, model_state)
    if epochs:
      batches = stream.train_batches(
        data.train,
        labels,
        batch_size=config.batch_size,
        seed=seed,
        num_epochs=epochs,
        indices=data.indices,
        augmentation=data.augmentation,
      )
      state = _train(state, train_step, map(seen, batches))
    params, variables = steps.evaluated(state)
    batches = stream.eval_batches(
      data.train,
      labels,
      # Each sample has a gradient of its own: no more at once than in a step.
      batch_size=min(config.batch_size, config.eval_batch_size),
      indices=rows,
    )
    found = prefetch.bounded(
      norms_fn(params, None, seen(batch), **variables).scores
      for batch in batches
    )
    total += np.concatenate(jax.device_get(list(found)))[: len(rows)]
  norms = np.full(len(labels), math.nan, np.float32)
  norms[rows] = total / runs
  return norms


def _train(state, train_step, batches):
  """Trains on batches, of which at most two are on the devices."""

  def outputs():
    nonlocal state
    for batch in batches:
      state, output = train_step(state, None, batch)
      yield output.metrics

  for _ in prefetch.bounded(outputs()):
    pass
  return state


def fingerprint(config: config_dict.ConfigDict, data: Data) -> str:
  """Computes sixteen hex digits of all that `offline_norms` depends on.

  Args:
    config: the run's.
    data: as the task's `load_data` gave it.

  Returns:
    The fingerprint, without any training.

  Raises:
    ValueError: as `offline_norms`.
  """
  fields = workdir_lib.as_dict(config)
  started = None
  if fields["model"].pop("pretrained") is not None:  # a path; contents count
    _, params = initial.for_data(config.model, data, seed=_FIRST_SEED)
    started = checkpoint.fingerprint(params)
  return workdir_lib.fingerprint(
    "offline norms",
    _FIRST_SEED,
    _counts(config),
    fields["mimic"]["layers"],
    fields["model"] | models.fingerprints(config.model),
    started,
    fields["optimizer"],
    min(config.batch_size, config.eval_batch_size),
    stream.fingerprint(
      data.train.source.fingerprint,
      data.labels.labels,
      batch_size=config.batch_size,
      seed=config.seed,
      indices=data.indices,
      augmentation=data.augmentation,
      transform=data.train.reader.transform,
      mean=data.mean,
      std=data.std,
    ),
  )


def _counts(config):
  """Returns the number of runs, and of epochs in each."""
  runs, epochs = config.mimic.grand_runs, config.mimic.grand_epochs
  if runs < 1 or epochs < 0:
    raise ValueError(
      f"config.mimic has grand_runs {runs} and grand_epochs {epochs}; expected"
      " at least 1 and 0."
    )
  return runs, epochs
