"""Text to token ids and back: bytes, or a published tokenizer."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tokenizers

from experiments.data.pairs import tokenizer as tokenizer_lib

BYTES = "bytes"


class Tokenizer(Protocol):
  """The part of a tokenizer that the task uses.

  Attributes:
    vocab_size: number of ids, V, start and padding among them.
    padding: the id after a sequence's end.
    start: the id before its first token.
    characters: number of characters that always suffice for a token.
  """

  vocab_size: int
  padding: int
  start: int
  characters: int

  def encode(self, text: str) -> np.ndarray:
    """Converts a text to ids, int32 `[n]`, without start and padding."""

  def decode(self, ids: Sequence[int]) -> str:
    """Converts ids to text."""


class Bytes:
  """UTF-8's bytes, then padding (256) and start (257).

  Example:
    >>> Bytes().encode("né").tolist()
    [110, 195, 169]
  """

  vocab_size = 258
  padding = 256
  start = 257
  characters = 1

  def encode(self, text: str) -> np.ndarray:
    """Converts a text to its bytes, int32 `[n]`."""
    raw = text.encode("utf-8", "surrogateescape")
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    """Converts bytes to text; keeps half a character, as `encode` takes it."""
    raw = np.asarray(ids, np.uint8).tobytes()
    return raw.decode("utf-8", "surrogateescape")


class Published:
  """A published tokenizer, with ids for padding and start above its own."""

  # Long words and runs of spaces are one token.
  characters = 16

  def __init__(self, pieces: tokenizers.Tokenizer):
    pieces.no_truncation()
    pieces.no_padding()
    self._pieces = pieces
    ids = pieces.get_vocab(with_added_tokens=True).values()
    self.padding = max(ids) + 1
    self.start = self.padding + 1
    self.vocab_size = self.padding + 2

  def encode(self, text: str) -> np.ndarray:
    """Converts a text to ids, int32 `[n]`."""
    found = self._pieces.encode(text, add_special_tokens=False)
    return np.asarray(found.ids, np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    """Converts ids to text, as far as the tokenizer keeps it."""
    return self._pieces.decode([int(x) for x in ids])


def load(source: str) -> Tokenizer:
  """Loads the tokenizer that `config.data.tokenizer` names.

  Args:
    source: "bytes", or a source of `experiments.data.pairs.tokenizer.load`: a
      `tokenizer.json`, its folder, or "hf://owner/name".

  Returns:
    The tokenizer.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file can't be read.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.
  """
  if source == BYTES:
    return Bytes()
  return Published(tokenizer_lib.read(source))
