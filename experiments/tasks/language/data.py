"""Data of language models: windows of documents."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from experiments.data import filters, purposes, rows as rows_lib
from experiments.tasks.language import (
  noise as noise_lib,
  texts as texts_lib,
  tokens as tokens_lib,
)


class Sequences(NamedTuple):
  """Sequences of tokens, and their kinds."""

  tokens: np.ndarray  # int32 [N, T + 1]: start, tokens, padding
  ids: np.ndarray  # str [N], the document's name and the window's number
  kind: np.ndarray  # str [N], one of noise.KINDS, or noise.CLEAN


class Data(NamedTuple):
  """Training and evaluation data of a run."""

  batches: rows_lib.Rows  # a grain data set: tokens, uid, index, mask
  fingerprint: str  # of those, the same in all processes
  train: Sequences  # all of them, filter or not
  held_out: Sequences  # clean, of other documents
  tokenizer: tokens_lib.Tokenizer
  train_size: int  # number of sequences to train on


def load(config: config_dict.ConfigDict) -> Data:
  """Loads training and held-out sequences by the config.

  Args:
    config: `data` (`path`, `field`, `documents`, `most_bytes`, `tokenizer`,
      `length`, `shortest`, `held_out_fraction`, `train_size`, `held_out_size`,
      `seed`, `filter`), `noise` (`rate`, `kinds`, `seed`), `batch_size` and
      `seed`.

  Returns:
    The Data.

  Raises:
    FileNotFoundError: a file that is not there.
    ValueError: a file that can't be read, too little text, a value out of
      range, or a filter of other data.
  """
  processes = jax.process_count()
  if config.batch_size % processes:
    raise ValueError(
      f"config.batch_size is {config.batch_size} in {processes} processes;"
      " expected a multiple of their number."
    )
  tokenizer, train, held_out = _sequences(
    json.dumps(config.data.to_dict() | {"filter": None}, sort_keys=True),
    json.dumps(config.noise.to_dict(), sort_keys=True),
  )
  indices = None
  if config.data.filter is not None:
    indices = np.flatnonzero(
      filters.apply(config.data.filter, train.ids, noun="sequences").mask
    )
  batches = make_batches(
    train,
    batch_size=config.batch_size,
    seed=config.seed,
    indices=indices,
    process=(jax.process_index(), processes),
  )
  held = hashlib.sha256(held_out.tokens.tobytes()).hexdigest()
  return Data(
    batches,
    f"{batches.fingerprint}-{held[:16]}",
    train,
    held_out,
    tokenizer,
    len(train.ids) if indices is None else len(indices),
  )


def make_batches(
  sequences: Sequences,
  *,
  batch_size: int,
  seed: int | None,
  indices: np.ndarray | None = None,
  num_epochs: int | None = None,
  drop_last: bool = True,
  process: tuple[int, int] = (0, 1),
) -> rows_lib.Rows:
  """Makes batches of sequences, as a grain data set.

  Args:
    sequences: all there are, [N].
    batch_size: rows in a batch of all processes.
    seed: of the order, which is a fresh one each epoch; None keeps it.
    indices: positions [M] of the sequences to go over; None takes all.
    num_epochs: number of epochs; None goes on for ever.
    drop_last: whether to leave out an epoch's last batch if rows don't fill it.
    process: this process's number, and the number of processes.

  Returns:
    A data set of this process's rows: "tokens" int32 [B, T + 1], "uid", "index"
    and "mask". Its iterator has `get_state` and `set_state`.

  Raises:
    ValueError: a value out of range, or no batch at all.
  """
  number, count = process
  return rows_lib.Rows(
    {"tokens": sequences.tokens},
    sequences.ids,
    batch_size=batch_size // count,
    seed=seed,
    num_epochs=num_epochs,
    indices=indices,
    drop_last=drop_last,
    process_index=number,
    process_count=count,
  )


def cut(
  documents: Sequence[texts_lib.Document],
  tokenizer: tokens_lib.Tokenizer,
  *,
  length: int,
  shortest: int,
) -> tuple[Sequences, np.ndarray]:
  """Cuts documents into windows that don't overlap.

  Args:
    documents: in any number.
    tokenizer: makes tokens of them.
    length: tokens in a window, T.
    shortest: a document's end is left out if it has fewer tokens.

  Returns:
    The windows [N], and the position of the document of each.

  Raises:
    ValueError: a value out of range.
  """
  if length < 2 or not 1 <= shortest <= length:
    raise ValueError(
      f"config.data.length is {length} and shortest {shortest}; expected a"
      " length of at least 2, and a shortest from 1 to that."
    )
  rows, ids, owners = [], [], []
  for owner, document in enumerate(documents):
    tokens = tokenizer.encode(document.text)
    for number, start in enumerate(range(0, len(tokens), length)):
      window = tokens[start : start + length]
      if len(window) >= shortest:
        rows.append(pad(window, tokenizer, length))
        ids.append(f"{document.name}:{number}")
        owners.append(owner)
  tokens = np.array(rows, np.int32).reshape(-1, length + 1)
  kind = np.full(len(ids), noise_lib.CLEAN)
  return Sequences(tokens, np.array(ids, np.str_), kind), np.array(owners, int)


def pad(
  tokens: np.ndarray, tokenizer: tokens_lib.Tokenizer, length: int
) -> np.ndarray:
  """Makes a row of start, `length` tokens and padding: int32 `[length + 1]`."""
  row = np.full(length + 1, tokenizer.padding, np.int32)
  row[0] = tokenizer.start
  row[1 : 1 + len(tokens)] = tokens[:length]
  return row


def split(
  sequences: Sequences,
  owners: np.ndarray,
  *,
  fraction: float,
  seed: int,
) -> np.ndarray:
  """Draws the sequences that are held out: whole documents.

  Documents go by a hash of seed and tokens, so those with the same text go
  together.

  Args:
    sequences: all there are, [N].
    owners: integers [N], the document of each.
    fraction: of the sequences that are held out, at least; in (0, 1).
    seed: of the draw.

  Returns:
    Bool [N], True for those that are held out.

  Raises:
    ValueError: a fraction out of range, or a single text.
  """
  if not 0 < fraction < 1:
    raise ValueError(
      f"config.data.held_out_fraction is {fraction}; expected more than 0 and"
      " less than 1."
    )
  key = repr((seed, purposes.HELD_OUT)).encode()
  _, starts = np.unique(owners, return_index=True)
  parts = np.split(sequences.tokens, np.sort(starts)[1:])
  digests = np.array(
    [
      hashlib.blake2b(part.tobytes(), key=key[:64]).hexdigest()
      for part in parts
    ]
  )
  sizes = np.array([len(part) for part in parts])
  names, inverse = np.unique(digests, return_inverse=True)
  held = np.cumsum(np.bincount(inverse, weights=sizes))
  last = int(np.searchsorted(held, fraction * sizes.sum()))
  if last + 1 >= len(names):
    raise ValueError(
      f"the text has {len(names)} different documents, of which {last + 1} hold"
      f" out config.data.held_out_fraction={fraction} of it; expected one that"
      " is left to train on: take more text, or (of a .txt file) set"
      " config.data.documents='windows'."
    )
  return np.repeat(inverse <= last, sizes)


@functools.lru_cache(maxsize=2)
def _sequences(section, noise):
  """Makes tokenizer, training and held-out sequences; cached for studies."""
  section, noise = json.loads(section), json.loads(noise)
  tokenizer = tokens_lib.load(section["tokenizer"])
  if section["path"] is None:
    documents: Sequence[texts_lib.Document] = texts_lib.embedded()
  else:
    documents = texts_lib.read(
      section["path"],
      field=section["field"],
      documents=section["documents"],
      most_bytes=section["most_bytes"],
    )
  length = section["length"]
  where = section["path"] or "the text that ships with Python"
  found, owners = cut(
    documents, tokenizer, length=length, shortest=section["shortest"]
  )
  if len(found.ids) < 2:
    raise ValueError(
      f"{where} makes {len(found.ids)} sequences of config.data.length={length}"
      " tokens; expected two at least: take more text, or lower length or"
      " shortest."
    )
  if section["path"] and section["documents"] == "windows":
    owners = np.arange(len(owners))
  held = split(
    found,
    owners,
    fraction=section["held_out_fraction"],
    seed=section["seed"],
  )
  rng = np.random.default_rng((section["seed"], purposes.HELD_OUT))
  train = _some(found, ~held, section["train_size"], rng)
  held_out = _some(found, held, section["held_out_size"], rng)
  noisy = noise_lib.apply_noise(
    [
      tokenizer.decode(row[row != tokenizer.padding][1:])
      for row in train.tokens
    ],
    rate=noise["rate"],
    seed=noise["seed"],
    kinds=tuple(noise["kinds"]),
    characters=tokenizer.characters * length,
  )
  tokens = train.tokens.copy()
  for row in np.flatnonzero(noisy.kind != noise_lib.CLEAN):
    tokens[row] = pad(tokenizer.encode(noisy.texts[row]), tokenizer, length)
  return tokenizer, Sequences(tokens, train.ids, noisy.kind), held_out


def _some(sequences, chosen, size, rng):
  """Draws at most `size` of the chosen sequences; 0 takes all."""
  rows = np.flatnonzero(chosen)
  if 0 < size < len(rows):
    rows = np.sort(rng.permutation(rows)[:size])
  return Sequences(*(array[rows] for array in sequences))
