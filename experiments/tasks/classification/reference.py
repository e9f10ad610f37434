"""References of classification: weights, outputs, or other samples.

Outputs are computed once for every sample, kept beside the reference's
checkpoints, and shared by all runs with the same reference.
"""

import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments import models
from experiments.data import pipeline, streams
from experiments.runtime import (
  cache,
  checkpoint,
  distributed,
  prefetch,
  workdir as workdir_lib,
)
from experiments.tasks.base import Reference, finished_run
from experiments.tasks.classification.data import (
  INPUT_FILE,
  Data,
  clean_positions,
)
from gradmimic_jax import _files


def load(
  config: config_dict.ConfigDict,
  direction: str,
  params: Any,
  data: Data,
  devices: distributed.Devices | None = None,
) -> Reference:
  """Loads the reference, or the other samples, that a direction asks for.

  Args:
    config: the run's.
    direction: "weights", "outputs", "clean_gradient", "test_gradient" or
      "noisy_gradient".
    params: the learner's; None where no weights are needed.
    data: the run's.
    devices: the run's; None: `Devices.alone()`.

  Returns:
    A Reference. Its `for_batch(batch)` looks at `index`, at `flipped` and,
    of several processes, at `batch_index`; an index of -1 is padding. Outputs
    are `[B, C]` float32 for a batch.

  Raises:
    ValueError: a reference of another architecture (where weights are looked
      at), of other images or classes, or outputs of the wrong shape.
    TypeError: outputs that are not floating point.
    FileNotFoundError: a reference that is not there.
  """
  devices = devices or distributed.Devices.alone()
  if direction == "weights":
    weights = checkpoint.load_params(finished_run(config), params)
    return Reference(
      checkpoint.fingerprint(weights), weights, lambda _: weights
    )
  if direction == "clean_gradient":
    labels = data.labels.clean_labels
    return _one_batch(data.train.images, labels, data.clean, data, devices)
  if direction == "test_gradient":
    rows = clean_positions(
      data.test.labels,
      per_class=config.mimic.clean_per_class,
      num_classes=data.test.num_classes,
      seed=config.seed,
      split="test",
    )
    return _one_batch(data.test.images, data.test.labels, rows, data, devices)
  if direction == "noisy_gradient":
    return _independent_batches(config, data, devices)
  if config.mimic.outputs is not None:
    digest, outputs = _logged_outputs(config.mimic.outputs, data)
  else:
    digest, outputs = _load_run_outputs(
      finished_run(config), config, data, devices
    )
  return _from_outputs(digest, outputs, devices)


def _gather(images, labels, rows, data):
  """Gathers images and labels of rows, scaled as the learner sees them."""
  (batch,) = pipeline.eval_batches(
    images,
    labels,
    batch_size=len(rows),
    indices=rows,
    mean=data.mean,
    std=data.std,
  )
  return {key: batch[key] for key in ("image", "label")}


def _one_batch(images, labels, rows, data, devices):
  batch = _gather(images, labels, rows, data)
  fingerprint = checkpoint.fingerprint(batch)
  batch = jax.tree.map(jnp.asarray, devices.place_shared(batch))
  return Reference(fingerprint, None, lambda _: batch, constant=True)


def _independent_batches(config, data, devices):
  """Pairs each batch with another, drawn from all samples that are trained on.

  The other batch depends on the seed and on the batch: there is no state to
  save, and a run that goes on after an interruption sees the same ones.
  """
  labels = data.labels.labels
  rows = np.arange(len(labels)) if data.indices is None else data.indices
  size = min(config.batch_size, len(rows))
  place = devices.place_shared

  def for_batch(taken):
    index = taken.get("batch_index", taken["index"])
    digest = hashlib.sha256(np.asarray(index, "<i4").tobytes()).digest()
    entropy = int.from_bytes(digest, "little")
    rng = np.random.default_rng((config.seed, streams.INDEPENDENT, entropy))
    drawn = rng.choice(rows, size, replace=False)
    batch = _gather(data.train.images, labels, drawn, data)
    if "flipped" in taken:  # mirrored at random, as the batch is
      mirrored = rng.random(size) < 0.5
      batch["image"][mirrored] = batch["image"][mirrored][:, :, ::-1]
    return place(batch)

  fingerprint = workdir_lib.fingerprint(
    "independent batches",
    data.train.fingerprint,
    _digest(labels),
    _digest(rows),
    config.seed,
    size,
  )
  return Reference(fingerprint, None, for_batch)


def _from_outputs(fingerprint, outputs, devices):
  put = devices.put_own

  def for_batch(batch):
    flipped = batch.get("flipped")
    # Padding gets a real row, as its image does.
    rows = np.maximum(batch["index"], 0)
    if outputs.ndim == 2:
      return put(outputs[rows])
    if flipped is None:
      return put(outputs[0, rows])
    return put(outputs[flipped.astype(int), rows])

  return Reference(fingerprint, None, for_batch)


def _logged_outputs(path, data):
  """Reads a user's file of outputs; also its fingerprint."""
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"config.mimic.outputs is {path!r}, and there is no such file; expected a"
      " .npy file of the reference's logits [N, C]."
    )
  try:
    outputs = _files.read_npy(path)
  except ValueError as error:
    raise ValueError(
      f"config.mimic.outputs {path!r} can't be read ({error}); expected a .npy"
      " file of the reference's logits [N, C]."
    ) from error
  shape = (len(data.train.labels), data.train.num_classes)
  found = getattr(outputs, "shape", "(several arrays)")  # of an .npz file
  if found not in (shape, (2, *shape)):
    raise ValueError(
      f"config.mimic.outputs {path!r} has shape {found}; expected {shape}, the"
      " logits of every sample of config.data.train_split in its order, or"
      f" {(2, *shape)}, followed by those of the mirrored images."
    )
  if outputs.dtype.kind != "f":
    raise TypeError(
      f"config.mimic.outputs {path!r} has dtype {outputs.dtype}; expected"
      " floating-point logits, not classes or probabilities in integers."
    )
  outputs = outputs.astype(np.float32)
  return _digest(outputs), outputs


def suggest_labels(
  config: config_dict.ConfigDict, data: Data
) -> np.ndarray | None:
  """Suggests the class that the reference takes each sample for.

  Args:
    config: of the run.
    data: of the run.

  Returns:
    Classes [N]; None where the run's reference is none that has outputs, or it
    is not there any more.
  """
  if config.mimic.outputs is None and config.mimic.reference is None:
    return None
  try:
    reference = load(config, "outputs", None, data)
  except (FileNotFoundError, ValueError, TypeError) as error:
    logging.warning("the report suggests no labels: %s", error)
    return None
  outputs = reference.for_batch({"index": np.arange(len(data.train.labels))})
  return np.argmax(outputs, axis=-1).astype(np.int32)


def _load_run_outputs(where, config, data, devices):
  """Loads or computes a finished run's outputs; also their fingerprint."""
  shown = _read_input(where, data)
  section = workdir_lib.read_model(where)
  if "pretrained" in section:
    section["pretrained"] = None  # a path; the parameters are what counts
  apply, like = models.create(
    config_dict.ConfigDict(section),
    input_shape=tuple(shown["shape"]),
    num_classes=shown["num_classes"],
    seed=0,
  )
  params = checkpoint.load_params(where, devices.place(like))
  variables = {}
  if apply.about:
    variables["statistics"] = checkpoint.load_statistics(
      where, devices.place(apply.statistics)
    )
  section |= models.fingerprints(config_dict.ConfigDict(section))
  flip = bool(config.data.flip)
  fingerprint = workdir_lib.fingerprint(
    checkpoint.fingerprint(params), section, shown, data.train.fingerprint, flip
  )
  shape = (len(data.train.images), shown["num_classes"])
  file = where / f"outputs_{fingerprint}.npy"
  outputs = cache.read(file, (2, *shape) if flip else shape)
  if not devices.agree(outputs is not None):  # all processes compute, or none
    outputs_fn = jax.jit(
      lambda known, images: apply(known[0], images, **known[1]),
      out_shardings=devices.whole,
    )
    known = params, variables
    images = data.train.images
    # The reference sees images scaled as they were when it was trained.
    scaling = {"mean": shown["mean"], "std": shown["std"]}
    outputs = _outputs(outputs_fn, known, images, config, scaling, devices)
    if flip:
      mirrored = images[:, :, ::-1]
      mirrored = _outputs(outputs_fn, known, mirrored, config, scaling, devices)
      outputs = np.stack([outputs, mirrored])
    if devices.process[0] == 0:
      cache.write(file, outputs)
  return fingerprint, outputs


def _read_input(where, data):
  file = where / INPUT_FILE
  if not file.exists():
    raise FileNotFoundError(
      f"there is no {INPUT_FILE} in {where}, which config.mimic.reference"
      " names: give that run's own command again, which adds it."
    )
  shown = workdir_lib.read_input(where, checked=False)
  ours = {
    "shape": list(data.train.images.shape[1:]),
    "num_classes": data.train.num_classes,
  }
  theirs = {key: shown[key] for key in ours}
  if theirs != ours:
    raise ValueError(
      f"the reference in {where} was made for {theirs} ({INPUT_FILE}) and the"
      f" learner's data is {ours}; expected the same image shape and number of"
      " classes."
    )
  return workdir_lib.read_input(where)


def _outputs(apply, params, images, config, scaling, devices):
  batches = pipeline.eval_batches(
    images,
    np.zeros(len(images), np.int32),
    batch_size=devices.divided(config.eval_batch_size),
    process=devices.process,
    **scaling,
  )
  put = devices.put_own
  # Fetched at once: fetching batch by batch would make each wait.
  parts = [
    *prefetch.bounded(apply(params, put(batch["image"])) for batch in batches)
  ]
  return np.concatenate(jax.device_get(parts))[: len(images)].astype(np.float32)


def _digest(outputs):
  digest = hashlib.sha256(repr(outputs.shape).encode())
  digest.update(outputs.tobytes())
  return digest.hexdigest()[:16]
