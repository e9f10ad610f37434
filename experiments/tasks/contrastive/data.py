"""Data of image-text runs: drawn shapes, or streamed shards."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.data import filters, sources
from experiments.data.pairs import (
  in_memory as image_text,
  shapes,
  shard_samples,
  shards,
  tokenizer as tokenizers,
)
from experiments.models import clip
from experiments.runtime import workdir as workdir_lib
from gradmimic_jax.selection.uids import parse_uids

NAMES = ("shapes", "shards")
SHAPES = "shapes"
# Prompts for a class of a TFDS set.
TEMPLATES = (
  "a photo of a {}.",
  "a picture of a {}.",
  "a close-up photo of a {}.",
  "a photo of the {}.",
  "a photo of one {}.",
  "a blurry photo of a {}.",
  "a drawing of a {}.",
)


class ZeroShot(NamedTuple):
  """Images, and the texts of their classes."""

  images: np.ndarray  # uint8 [M, S, S, 3]
  labels: np.ndarray  # integers [M]
  prompts: np.ndarray  # tokens [C, T, L]


class Memory(NamedTuple):
  """All training pairs, filter or not, where they are in memory."""

  images: np.ndarray  # uint8 [N, S, S, 3]
  text: np.ndarray  # tokens [N, L]
  truth: shapes.Shapes


class Data(NamedTuple):
  """Training and evaluation data of a run."""

  batches: Any  # a grain data set of training batches
  first: Callable[[], dict[str, np.ndarray]]  # reads the first one alone
  one_pass: Callable[[], Any]  # all pairs, each once and in order
  fingerprint: str  # of those, the same in all processes
  held_out: tuple[np.ndarray, np.ndarray] | None  # images, tokens: clean pairs
  zero_shot: ZeroShot | None
  memory: Memory | None
  train_pairs: int | None  # their number; None: unknown


def load(config: config_dict.ConfigDict) -> Data:
  """Loads training, held-out and zero-shot data by the config.

  Args:
    config: as `configs/contrastive.py` describes it.

  Returns:
    The Data.

  Raises:
    ValueError: an unknown name, a filter of other data, a tokenizer or a batch
      size that doesn't fit.
    FileNotFoundError: shards or a data set that are not there.
  """
  if config.data.name not in NAMES:
    raise ValueError(
      f"config.data.name is {config.data.name!r}; expected one of"
      f" {', '.join(NAMES)}."
    )
  processes = jax.process_count()
  if config.batch_size % processes:
    raise ValueError(
      f"config.batch_size is {config.batch_size} in {processes} processes;"
      " expected a multiple of their number."
    )
  if config.data.filter is not None:
    filters.check_manifest(config.data.filter)
  tokenize = load_tokenizer(config)
  if config.data.name == SHAPES:
    return _load_shapes(config, tokenize)
  return _load_shards(config, tokenize)


def load_tokenizer(config: config_dict.ConfigDict) -> tokenizers.Tokenizer:
  """Loads the tokenizer that `config.data` names, for the config's model.

  Args:
    config: as `configs/contrastive.py` describes it.

  Returns:
    The tokenizer.

  Raises:
    ValueError: its vocabulary doesn't fit the model.
    FileNotFoundError: it is not there.
  """
  sizes = clip.options(config.model)
  length = {"context_length": sizes["context_length"]}
  if config.data.tokenizer == SHAPES:
    found = tokenizers.for_shapes(**length)
  else:
    found = tokenizers.load(config.data.tokenizer, **length)
  found.check_fits(vocab_size=sizes["vocab_size"], **length)
  return found


def train_pairs(config: config_dict.ConfigDict) -> shapes.Shapes:
  """Draws the training pairs of `shapes`, mis-captioned by the config."""
  return _shapes(config, "train", config.data.train_size, config.noise.rate)


def fingerprints(pairs: shapes.Shapes) -> dict[str, str]:
  """Describes the pairs that a filter belongs to, in words and hashes."""
  return {"dataset": f"{SHAPES} {pairs.fingerprint[:16]}"}


def pool(config: config_dict.ConfigDict) -> Memory:
  """Draws the training pairs, with tokens as the model reads them."""
  pairs = train_pairs(config)
  return Memory(pairs.images, load_tokenizer(config)(_texts(pairs)), pairs)


def _shapes(config, split, size, rate=0.0):
  return shapes.load(
    split,
    size=size,
    seed=config.data.seed,
    image_size=config.data.image_size,
    noise_rate=rate,
    noise_kinds=tuple(config.noise.kinds),
    context_length=clip.options(config.model)["context_length"],
  )


def _texts(pairs):
  return pairs.captions.tolist()


def _load_shapes(config, tokenize):
  memory = pool(config)
  uids = memory.truth.uids
  indices = None
  if config.data.filter is not None:
    indices = _positions(config.data.filter, memory.truth)

  def pairs(process, **order):
    return image_text.Pairs(
      memory.images,
      memory.text,
      uids,
      batch_size=config.batch_size // jax.process_count(),
      process_index=process,
      process_count=jax.process_count(),
      **order,
    )

  def batches(process):
    return pairs(process, seed=config.seed, indices=indices, drop_last=True)

  held_out = _shapes(config, "held_out", config.data.held_out_size)
  images = _shapes(config, "zero_shot", config.data.zero_shot_size)
  return Data(
    batches(jax.process_index()),
    lambda: _read_first(batches(jax.process_index())),
    lambda: pairs(jax.process_index(), seed=None, num_epochs=1),
    batches(0).fingerprint,
    (held_out.images, tokenize(_texts(held_out))),
    ZeroShot(
      images.images, images.labels, _prompts(shapes.class_prompts(), tokenize)
    ),
    memory,
    len(uids) if indices is None else len(indices),
  )


def _positions(path, pairs):
  """Finds the uids of a filter among all; missing ones are no loss."""
  read = shard_samples.kept_uids(path, fingerprints=fingerprints(pairs))
  keep, uids = gm.filters.Filter(read, path), pairs.uids
  applied = keep.apply(parse_uids(uids))
  if not applied.kept:
    raise ValueError(
      f"config.data.filter {path!r} keeps none of the {len(uids)} pairs: its"
      f" {len(keep)} uids are of other data."
    )
  return np.flatnonzero(applied.mask)


def _load_shards(config, tokenize):
  section = config.data
  if not section.shards:
    raise ValueError(
      "config.data.shards is empty; expected paths, folders or patterns, such"
      " as --config.data.shards=\"('small/{00000000..00001287}.tar',)\"."
    )
  common = {
    "tokenizer": tokenize,
    "image_size": section.image_size,
    "uid_source": section.uid_source,
    "parts": shard_samples.Parts(**section.parts),
    "max_broken_share": section.max_broken_share,
    "num_threads": section.num_threads,
  }

  def stream(process, **options):
    return shards.ShardStream(
      section.shards,
      batch_size=config.batch_size // jax.process_count(),
      window=section.window,
      process_index=process,
      process_count=jax.process_count(),
      readers=section.readers,
      **options,
      **common,
    )

  def batches(process):
    return stream(process, seed=config.seed, keep=section.filter)

  held_out = None
  if section.held_out_shards:
    held_out = _first(
      shards.ShardStream(
        section.held_out_shards,
        batch_size=config.eval_batch_size,
        seed=None,
        num_epochs=1,
        **common,
      ),
      section.held_out_size,
    )
  zero_shot = None
  if section.zero_shot is not None:
    zero_shot = _load_tfds(section, tokenize)
  return Data(
    batches(jax.process_index()),
    # No process is started for one batch.
    lambda: _read_first(batches(jax.process_index()).split()[0]),
    lambda: stream(jax.process_index(), seed=None, num_epochs=1),
    workdir_lib.fingerprint(
      batches(0).fingerprint,
      None if held_out is None else held_out[1].tolist(),
    ),
    held_out,
    zero_shot,
    None,
    None,
  )


def _read_first(batches):
  iterator = iter(batches)
  batch = next(iterator)
  iterator.close()
  return batch


def _first(stream, count):
  """Reads the first pairs of a stream: images and tokens."""
  images: list[np.ndarray] = []
  text: list[np.ndarray] = []
  iterator = iter(stream)
  while sum(map(len, images)) < count:
    batch = next(iterator, None)
    if batch is None:
      break
    images.append(batch["image"][batch["mask"]])
    text.append(batch["text"][batch["mask"]])
  iterator.close()
  found = sum(map(len, images))
  if found < count:
    logging.warning(
      "config.data.held_out_shards have %d pairs, fewer than"
      " config.data.held_out_size=%d: evaluation goes by those.",
      found,
      count,
    )
  return np.concatenate(images)[:count], np.concatenate(text)[:count]


def _load_tfds(section, tokenize):
  found = sources.load(
    section.zero_shot,
    section.zero_shot_split,
    data_dir=section.data_dir,
    size=section.image_size,
  )
  # Spread over the split, in which samples may be sorted by class.
  count = min(section.zero_shot_size, len(found.labels))
  rows = np.linspace(0, len(found.labels) - 1, count).astype(int)
  names = [name.replace("_", " ") for name in found.class_names]
  prompts = [[text.format(name) for text in TEMPLATES] for name in names]
  return ZeroShot(
    found.images[rows], found.labels[rows], _prompts(prompts, tokenize)
  )


def _prompts(
  prompts: Sequence[Sequence[str]], tokenize: Callable[..., np.ndarray]
) -> np.ndarray:
  """Tokenizes prompts: [C, T, L]."""
  flat = tokenize([text for texts in prompts for text in texts])
  return flat.reshape(len(prompts), len(prompts[0]), -1)
