"""One update of a model, by however many processes this is one of.

A program for tests: every case's update, scores and shardings are written by
the first process, for comparison with those of other processes and devices.
"""

import functools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from ml_collections import config_dict

from configs import (
  classification as classification_config,
  contrastive as contrastive_config,
)
from experiments import methods, models
from experiments.models import clip
from experiments.runtime import checkpoint, distributed, sharding
from experiments.tasks.classification import losses as classification
from experiments.tasks.contrastive import (
  evaluation as clip_features,
  losses as contrastive,
)
from experiments.training import steps

BATCH = 16
CLASSES = 5


def classifier(simple):
  """A small transformer with arrays that are large enough to divide."""
  config = classification_config.get_config().unlock()
  config.model.name = "vit"
  config.model.vit.update(width=128, depth=1, heads=2, mlp_width=512)
  if simple:
    config.model.name, config.model.widths = "mlp", (512, 256)
  config.mimic.weighting = "softmax"
  config.mimic.temperature = 0.05
  apply, params = models.create(
    config.model, input_shape=(8, 8, 3), num_classes=CLASSES, seed=0
  )
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(BATCH, 8, 8, 3)).astype(np.float32),
    "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    "mask": np.arange(BATCH) < BATCH - 3,
  }
  losses_fn = classification.make_losses_fn(apply)
  outputs = classification.make_outputs(classification.make_outputs_fn(apply))
  return config, params, batch, losses_fn, outputs


def pairs(simple, rows):
  """A small CLIP."""
  config = contrastive_config.get_config().unlock()
  config.model.clip.update(
    image_width=128, image_depth=1, image_mlp_width=512, text_depth=1
  )
  config.mimic.layers = None
  config.mimic.weighting = "softmax"
  options = clip.options(config.model)
  rng = np.random.default_rng(0)
  length, words = options["context_length"], options["vocab_size"]
  batch = {
    "image": rng.integers(0, 255, (BATCH, 32, 32, 3)).astype(np.uint8),
    "text": rng.integers(1, words, (BATCH, length)).astype(np.int32),
    "mask": np.arange(BATCH) < BATCH - 3,
  }
  if simple:
    apply, params = towers(batch)
  else:
    apply, params = clip.create(config.model, input_shape=(32, 32, 3), seed=0)
  apply = clip_features.scaled(apply, config.data.mean, config.data.std)
  losses_fn = contrastive.make_losses_fn(apply, "clip", sharding=rows)
  outputs = contrastive.make_outputs(apply, sharding=rows)
  return config, params, batch, losses_fn, outputs


def towers(batch):
  """A pair of linear maps."""
  sizes = {"image": batch["image"][0].size, "text": batch["text"].shape[1]}
  params = {
    name: 0.01 * jax.random.normal(jax.random.key(size), (size, 32))
    for name, size in sizes.items()
  }

  def apply(params, images, tokens):
    sides = (
      x.reshape(len(x), -1).astype(params[name].dtype) @ params[name]
      for name, x in (("image", images), ("text", tokens))
    )
    return clip.Features(
      *(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in sides),
      params["logit_scale"],
      None,
    )

  return apply, {**params, "logit_scale": jnp.asarray(2.0, jnp.float32)}


def update(task, method, engine, devices, folder, simple):
  """One step of plain SGD toward a reference that is read from a checkpoint.

  At a rate so high that the update is not lost in the parameters' rounding.
  """
  if task == "classes":
    made = classifier(simple)
  else:
    made = pairs(simple, devices.rows)
  config, params, batch, losses_fn, outputs = made
  config.mimic.engine = engine
  if jax.config.jax_enable_x64:
    params, batch = (
      jax.tree.map(
        lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree
      )
      for tree in (params, batch)
    )
  params = devices.place(params)
  tx = optax.sgd(1e3)
  state = devices.compute(functools.partial(steps.init_state, tx=tx), params)
  before = jax.tree.map(jnp.copy, state.params)
  chosen = methods.create(method, config.mimic)
  reference = None
  if chosen is not None:
    reference = read_reference(params, folder / f"reference_{task}")
  step = steps.make_train_step(
    losses_fn,
    tx,
    chosen,
    config.mimic,
    outputs,
    out_shardings=steps.make_shardings(state, devices.mesh),
  )
  number, count = devices.process
  part = BATCH // count
  own = slice(number * part, (number + 1) * part)
  batch = devices.put({key: rows[own] for key, rows in batch.items()})
  wanted = jax.tree.map(lambda leaf: leaf.sharding, state)
  state, output = step(state, reference, batch)
  for leaf, to in zip(
    jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(to, leaf.ndim)
  change = jax.tree.map(lambda a, b: a - b, state.params, before)
  found = {"update": change, "metrics": output.metrics, **output.samples}
  return flat(whole(found)), held(state.params), held(reference)


def read_reference(params, workdir):
  """What `make_reference` left, read into the shardings of params."""
  found = checkpoint.load_params(workdir, params)
  return jax.tree.map(lambda x, like: x.astype(like.dtype), found, params)


def make_reference(task, folder, simple):
  """Parameters some way off, in a checkpoint as runs leave them."""
  if (folder / f"reference_{task}").exists():
    return
  made = classifier(simple) if task == "classes" else pairs(simple, None)
  params = made[1]
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = structure.unflatten(
    [
      leaf + 0.02 * jax.random.normal(key, leaf.shape)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
  )
  state = steps.init_state(moved, optax.sgd(1.0))
  saver = checkpoint.Checkpointer(
    folder / f"reference_{task}", keep=1, fingerprint=""
  )
  saver.save(1, state, Nowhere())
  saver.close()


class Nowhere:
  """An iterator of no data."""

  def get_state(self):
    """Nothing."""
    return {}


def held(tree):
  """Bytes of large arrays that this process holds, and that there are."""
  large = [
    leaf for leaf in jax.tree.leaves(tree) if leaf.size >= sharding.LEAST_SIZE
  ]
  here = sum(
    shard.data.nbytes for leaf in large for shard in leaf.addressable_shards
  )
  return [here, sum(leaf.nbytes for leaf in large)]


def whole(tree):
  """NumPy arrays, in every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def flat(tree):
  """Arrays by their paths."""
  return {
    re.sub(r"\W+", "/", jax.tree_util.keystr(path)): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def main(arguments):
  """`{"cases": [[task, method, engine, fsdp], ...], ...}`, flags.

  With `simple`, linear maps take the place of transformers.
  """
  wanted = json.loads(arguments[0])
  flags = dict(text.lstrip("-").split("=") for text in arguments[1:])
  numbers = {name: int(flags[name]) for name in flags if name != "coordinator"}
  distributed.start(coordinator=flags.get("coordinator"), **numbers)
  folder = pathlib.Path(wanted["folder"])
  simple = wanted["simple"]
  results, bytes_held = {}, {}
  for task, method, engine, fsdp in wanted["cases"]:
    if jax.device_count() == 1:
      make_reference(task, folder, simple)
    devices = distributed.Devices(
      config_dict.ConfigDict({"data": -1, "fsdp": fsdp}), batch_size=BATCH
    )
    name = f"{task} {method} {engine} {fsdp}"
    arrays, learner, reference = update(
      task, method, engine, devices, folder, simple
    )
    results |= {f"{name}|{key}": value for key, value in arrays.items()}
    bytes_held[name] = {"learner": learner, "reference": reference}
  if distributed.is_first():
    np.savez(folder / f"{wanted['name']}.npz", **results)
  file = folder / f"{wanted['name']}_{jax.process_index()}.json"
  file.write_text(json.dumps(bytes_held))


if __name__ == "__main__":
  main(sys.argv[1:])
