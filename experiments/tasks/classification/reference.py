"""References of classification: weights, outputs, or other samples.

Outputs are computed once for every sample, kept beside the reference's
checkpoints, and shared by all runs with the same reference.
"""

import contextlib
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments import models
from experiments.data import purposes, sources, store, stream
from experiments.runtime import (
  cache,
  checkpoint,
  distributed,
  prefetch,
  workdir as workdir_lib,
)
from experiments.tasks.base import Reference, finished_run
from experiments.tasks.classification import inputs
from experiments.tasks.classification.data import (
  INPUT_FILE,
  Data,
  clean_positions,
  gather,
  open_images,
  reading,
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
    return _one_batch(data.train, labels, data.clean, data, devices)
  if direction == "test_gradient":
    labels = data.test.source.labels
    rows = clean_positions(
      labels,
      per_class=config.mimic.clean_per_class,
      num_classes=data.test.source.num_classes,
      seed=config.seed,
      split="test",
    )
    return _one_batch(data.test, labels, rows, data, devices)
  if direction == "noisy_gradient":
    return _independent_batches(config, data, devices)
  if data.augmentation.crop_scale is not None:
    raise ValueError(
      "config.data.crop is 'random_resized', and a reference's outputs are"
      " computed once for each image as it is; expected 'center', or a method"
      " that needs no outputs."
    )
  if config.mimic.outputs is not None:
    digest, outputs = _logged_outputs(config.mimic.outputs, data.train.source)
  else:
    digest, outputs = _load_run_outputs(
      finished_run(config), config, data.train, devices
    )
  return _from_outputs(digest, outputs, devices)


def _one_batch(images, labels, rows, data, devices):
  batch = gather(images, labels, rows)
  fingerprint = workdir_lib.fingerprint(
    "one batch",
    _digest(batch["image"]),
    _digest(batch["label"]),
    data.mean,
    data.std,
  )
  batch = jax.tree.map(jnp.asarray, devices.place_shared(batch))
  return Reference(fingerprint, None, lambda _: batch, constant=True)


def _independent_batches(config, data, devices):
  """Pairs each batch with another, drawn from all samples that are trained on.

  The other batch depends on the seed and on the batch: there is no state to
  save, and a run that goes on after an interruption sees the same ones.
  """
  labels, images = data.labels.labels, data.train
  rows = np.arange(len(labels)) if data.indices is None else data.indices
  size = min(config.batch_size, len(rows))
  # Where devices share its rows, each process reads its own.
  own, place = slice(None), devices.place_shared
  if size % devices.count == 0:
    number, count = devices.process
    part = size // count
    own, place = slice(number * part, (number + 1) * part), devices.put_own

  def for_batch(taken):
    index = taken.get("batch_index", taken["index"])
    drawn, mirrored = draw_other(
      config.seed, rows, size, index, "flipped" in taken
    )
    batch = {}
    if images.resident is not None:
      batch["row"] = drawn[own].astype(np.int32)
    else:  # an image that can't be used is black, as it is on the devices
      batch["image"], bad = images.read(drawn[own])
      images.bad.add(bad)
    batch["label"] = labels[drawn[own]].astype(np.int32)
    if mirrored is not None:
      batch["flipped"] = mirrored[own]
    return place(batch)

  fingerprint = workdir_lib.fingerprint(
    "independent batches",
    data.train.source.fingerprint,
    _digest(labels),
    _digest(rows),
    config.seed,
    size,
  )
  return Reference(fingerprint, None, for_batch)


def draw_other(
  seed: int, rows: np.ndarray, size: int, index: np.ndarray, flip: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """Draws the batch that comes with a batch, by the seed and that batch alone.

  Args:
    seed: the run's.
    rows: positions [M] of all samples that are trained on.
    size: samples to draw.
    index: positions of the batch's own samples, as planned.
    flip: whether images are mirrored at random, as the batch's are.

  Returns:
    Positions `[size]`, and which of them are mirrored; None without flips.
  """
  digest = hashlib.sha256(np.asarray(index, "<i4").tobytes()).digest()
  entropy = int.from_bytes(digest, "little")
  rng = np.random.default_rng((seed, purposes.INDEPENDENT, entropy))
  drawn = rng.choice(rows, size, replace=False)
  return drawn, rng.random(size) < 0.5 if flip else None


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


def _logged_outputs(path, source):
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
  shape = (len(source), source.num_classes)
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
  config: config_dict.ConfigDict, source: sources.Source
) -> np.ndarray | None:
  """Suggests the class that the reference takes each sample for.

  Args:
    config: of the run.
    source: the run's training images. Unless they are few, they are not decoded
      for this: outputs are taken where a run has kept them.

  Returns:
    Classes [N]; None where the run's reference is none that has outputs, or it
    is not there any more.
  """
  wanted = config.mimic
  if wanted.outputs is None and wanted.reference is None:
    return None
  try:
    if wanted.outputs is not None:
      _, outputs = _logged_outputs(wanted.outputs, source)
    else:
      images = open_images(config, source)
      _, outputs = _load_run_outputs(
        finished_run(config),
        config,
        images,
        distributed.Devices.alone(),
        compute=images.bytes <= store.CPU_BYTES,
      )
  except (FileNotFoundError, ValueError, TypeError) as error:
    logging.warning("the report suggests no labels: %s", error)
    return None
  if outputs.ndim == 3:
    outputs = outputs[0]
  return np.argmax(outputs, axis=-1).astype(np.int32)


def _load_run_outputs(where, config, images, devices, *, compute=True):
  """Loads or computes a finished run's outputs; also their fingerprint."""
  shown = _read_input(where, images)
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
    checkpoint.fingerprint(params),
    section,
    shown,
    images.source.fingerprint,
    vars(images.reader.transform),
    flip,
  )
  shape = (len(images.source), shown["num_classes"])
  file = where / f"outputs_{fingerprint}.npy"
  outputs = cache.read(file, (2, *shape) if flip else shape)
  if not devices.agree(outputs is not None):  # all processes compute, or none
    if not compute:
      raise FileNotFoundError(
        f"{where} keeps no outputs for these images ({file.name})."
      )
    # The reference sees images scaled as they were when it was trained.
    expand = inputs.make_expand(tuple(shown["mean"]), tuple(shown["std"]))
    outputs_fn = jax.jit(
      lambda known, images: apply(known[0], images, **known[1]),
      out_shardings=devices.whole,
    )
    known = params, variables
    outputs = _outputs(outputs_fn, expand, known, images, config, flip, devices)
    if devices.process[0] == 0:
      cache.write(file, outputs)
  return fingerprint, outputs


def _read_input(where, images):
  file = where / INPUT_FILE
  if not file.exists():
    raise FileNotFoundError(
      f"there is no {INPUT_FILE} in {where}, which config.mimic.reference"
      " names: give that run's own command again, which adds it."
    )
  shown = workdir_lib.read_input(where, checked=False)
  ours = {
    "shape": list(images.shape),
    "num_classes": images.source.num_classes,
  }
  theirs = {key: shown[key] for key in ours}
  if theirs != ours:
    raise ValueError(
      f"the reference in {where} was made for {theirs} ({INPUT_FILE}) and the"
      f" learner's data is {ours}; expected the same image shape and number of"
      " classes."
    )
  return workdir_lib.read_input(where)


def _outputs(apply, expand, known, images, config, flip, devices):
  """Computes outputs [N, C], or [2, N, C] with those of mirrored images."""
  expand = jax.jit(expand)

  def compute(batch):
    seen = expand(batch, images.resident)["image"]
    views = [seen, seen[:, :, ::-1]] if flip else [seen]
    return [apply(known, view) for view in views]

  batches = stream.eval_batches(
    images,
    np.zeros(len(images.source), np.int32),
    batch_size=devices.divided(config.eval_batch_size),
    **reading(config, devices),
  )
  with contextlib.closing(batches):
    parts = [
      *prefetch.bounded(
        compute(
          devices.put_own(
            {key: batch[key] for key in ("image", "row") if key in batch}
          )
        )
        for batch in batches
      )
    ]
  parts = jax.device_get(parts)
  views = [np.concatenate(view) for view in zip(*parts, strict=True)]
  outputs = np.stack(views)[:, : len(images.source)].astype(np.float32)
  return outputs if flip else outputs[0]


def _digest(outputs):
  digest = hashlib.sha256(repr(outputs.shape).encode())
  digest.update(outputs.tobytes())
  return digest.hexdigest()[:16]
