"""Captions to token ids, as CLIP's text tower takes them.

A row is the start token, the caption's tokens, the end token and padding. A
long caption is cut so that the end token stays. The end token has the highest
id: the text tower looks for it there.
"""

import gzip
import html
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from experiments.runtime import hub, limits as limits_lib

TOKENIZER = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
OPENAI = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
PADDINGS = ("zero", "end")
# Names of start and end: by OpenAI and Hugging Face, and by OpenCLIP.
_ENDS = (
  ("<|startoftext|>", "<|endoftext|>"),
  ("<start_of_text>", "<end_of_text>"),
)
_OPENAI_SIZE = 49_408
# Words, contractions, single digits, and runs of anything else.
_PIECES = (
  r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # never white space
)
# Every word in the captions of `shapes`, in its prompts and its noise.
SHAPES_WORDS = (
  *(",", "a", "an", "and", "at", "background", "best", "black", "blue"),
  *("bottom", "brown", "buy", "circle", "circles", "click", "cross", "crosses"),
  *("cyan", "deal", "details", "diamond", "diamonds", "free", "gift", "gray"),
  *("green", "here", "home", "image", "in", "item", "left", "middle", "moon"),
  *("moons", "more", "new", "of", "offer", "on", "one", "online", "orange"),
  *("order", "page", "photo", "picture", "pink", "price", "purple", "red"),
  *("right", "ring", "rings", "sale", "shipping", "shop", "square", "squares"),
  *("star", "stars", "stock", "the", "three", "today", "top", "triangle"),
  *("triangles", "two", "view", "white", "with", "yellow"),
)


class Tokenizer:
  """Captions to ids of one length; made by this module's functions.

  Attributes:
    context_length: ids in a row.
    vocab_size: one more than the highest id.
    start: id of the first token of every row.
    end: id of the token after a caption's last.
    padding: the id that fills the rest.
  """

  def __init__(
    self,
    pieces: tokenizers.Tokenizer,
    ends: tuple[str, str],
    context_length: int,
    padding: str,
    name: str | os.PathLike = "the words",
  ):
    if context_length < 2:
      raise ValueError(
        f"context_length is {context_length}; expected 2 at least, for start"
        " and end."
      )
    if padding not in PADDINGS:
      raise ValueError(
        f"padding is {padding!r}; expected one of {', '.join(PADDINGS)}."
      )
    ids = pieces.get_vocab(with_added_tokens=True)
    self.start, self.end = (ids[name] for name in ends)
    self.vocab_size = max(ids.values()) + 1
    if self.end != self.vocab_size - 1:
      raise ValueError(
        f"{name}: the end token {ends[1]} has id {self.end} in a vocabulary of"
        f" {self.vocab_size}; expected the highest, by which CLIP finds it."
      )
    self.context_length = context_length
    self.padding = self.end if padding == "end" else 0
    pieces.no_truncation()
    pieces.no_padding()
    self._pieces = pieces

  def __call__(self, captions: Sequence[str]) -> np.ndarray:
    """Converts captions to token ids.

    HTML's entities are decoded. Start and end tokens that a caption itself
    spells are left out: a page must not say where it ends.

    Args:
      captions: n of them, of any length and with any characters.

    Returns:
      int32 `[n, context_length]`.

    Raises:
      TypeError: something that is no caption.
    """
    if isinstance(captions, (str, bytes)):
      raise TypeError(
        f"captions are a {type(captions).__name__}; expected a list of str."
      )
    texts = [_clean(number, text) for number, text in enumerate(captions)]
    rows = np.full((len(texts), self.context_length), self.padding, np.int32)
    found = self._pieces.encode_batch(texts, add_special_tokens=False)
    for row, encoding in zip(rows, found, strict=True):
      ids = [x for x in encoding.ids if x not in (self.start, self.end)]
      ids = [self.start, *ids[: self.context_length - 2], self.end]
      row[: len(ids)] = ids
    return rows

  def check_fits(self, *, vocab_size: int, context_length: int) -> None:
    """Raises ValueError unless a model of these sizes can read the ids."""
    if self.vocab_size > vocab_size:
      raise ValueError(
        f"the tokenizer has a vocabulary of {self.vocab_size} and the model one"
        f" of {vocab_size}; set config.model.clip.vocab_size={self.vocab_size}"
        " or more, or take the tokenizer that the model was trained with."
      )
    if self.context_length > context_length:
      raise ValueError(
        f"the tokenizer makes rows of {self.context_length} ids and the model"
        f" takes {context_length}; expected at most as many: set"
        f" config.model.clip.context_length={self.context_length}, or make"
        " shorter rows."
      )

  def __reduce__(self):
    # Loaders hand it to their worker processes; the library's own state is
    # plain JSON.
    return _restored, (self._pieces.to_str(), self.__dict__ | {"_pieces": None})


def load(
  source: str | os.PathLike,
  *,
  context_length: int = 77,
  padding: str = "zero",
) -> Tokenizer:
  """Loads a published tokenizer.

  Args:
    source: a `tokenizer.json`; OpenAI's `bpe_simple_vocab_16e6.txt`, also with
      `.gz`; a `vocab.json` with `merges.txt` beside it; a folder with any of
      these; or `"hf://owner/name"`, whose `tokenizer.json` alone is fetched, or
      taken from the cache, with huggingface_hub.
    context_length: ids in a row.
    padding: `"zero"` (OpenAI, OpenCLIP), or `"end"` (Hugging Face). The text
      tower sees no difference.

  Returns:
    The tokenizer. Captions are not mended first as ftfy does it.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file can't be read, or is no tokenizer of CLIP's kind.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.
  """
  file = _find(source)
  pieces = _readable(file)
  there = pieces.get_vocab(with_added_tokens=True)
  for ends in _ENDS:
    if all(name in there for name in ends):
      return Tokenizer(pieces, ends, context_length, padding, file)
  raise ValueError(
    f"{file} has no start and end token; expected"
    f" {' or '.join(' and '.join(ends) for ends in _ENDS)}, as CLIP's"
    " tokenizers have them."
  )


def read(source: str | os.PathLike) -> tokenizers.Tokenizer:
  """Loads a published tokenizer of any kind, for the `tokenizers` package.

  Args:
    source: as `load` takes it.

  Returns:
    The tokenizer.

  Raises:
    FileNotFoundError, ValueError, ImportError, OSError: as `load`.
  """
  return _readable(_find(source))


def make_word_tokenizer(
  words: Iterable[str], *, context_length: int = 77
) -> Tokenizer:
  """Makes a tokenizer whose tokens are whole words, in lower case.

  Args:
    words: its vocabulary; a word with punctuation in it is several. All other
      words become one unknown token.
    context_length: ids in a row.

  Returns:
    The tokenizer: padding is 0, unknown 1, then the words in their order, start
    and end.

  Example:
    >>> make_word_tokenizer(["red", "star"], context_length=6)(["A red star"])
    array([[4, 1, 2, 3, 5, 0]], dtype=int32)
  """
  names = ["<pad>", "<unk>", *dict.fromkeys(words), *_ENDS[0]]
  ids = {name: number for number, name in enumerate(names)}
  pieces = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
  pieces.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Lowercase()]
  )
  pieces.pre_tokenizer = pre_tokenizers.Whitespace()
  return Tokenizer(pieces, _ENDS[0], context_length, "zero")


def for_shapes(*, context_length: int = 77) -> Tokenizer:
  """Makes the tokenizer for captions of `shapes`: fewer than 100 words."""
  return make_word_tokenizer(SHAPES_WORDS, context_length=context_length)


def _find(source):
  if str(source).startswith("hf://"):
    # Flax with it, which processes that read data have no need of.

    return hub.find(source, (TOKENIZER,), ())
  path = pathlib.Path(source)
  if not path.is_dir():
    if path.is_file():
      return path
    raise FileNotFoundError(
      f"no file or folder {path}; to fetch a tokenizer from the Hugging Face"
      ' Hub, write "hf://owner/name".'
    )
  for name in (TOKENIZER, VOCABULARY, *OPENAI):
    if (path / name).is_file():
      return path / name
  there = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
  raise FileNotFoundError(
    f"no tokenizer in {path} (there is {there}); expected {TOKENIZER},"
    f" {VOCABULARY} with {MERGES}, or {OPENAI[0]}."
  )


def _readable(file):
  """Reads the tokenizer in a file; raises as `load`."""
  try:
    return _read(file)
  except gzip.BadGzipFile as error:
    raise gzip.BadGzipFile(f"{file} can't be read as gzip: {error}.") from error
  except (OSError, MemoryError):
    raise
  except BaseException as error:  # the library raises Exception itself
    # Where its own code expected no such input, it raises no Exception at all.
    if not isinstance(error, Exception) and (
      type(error).__name__ != "PanicException"
    ):
      raise
    raise ValueError(
      f"{file} can't be read as a tokenizer: {type(error).__name__}:"
      f" {str(error)[:300]}."
    ) from error


def _read(file):
  if file.name.endswith((".txt", ".txt.gz")):
    lines = _lines(file)
    most = _OPENAI_SIZE - 2 * 256 - 2
    merges = [tuple(line.split()) for line in lines[1 : most + 1]]
    # One character for each byte; OpenAI's vocabulary has them in this order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [
      *alphabet,
      *(letter + "</w>" for letter in alphabet),
      *("".join(merge) for merge in merges),
      *_ENDS[0],
    ]
    return _bpe({name: number for number, name in enumerate(names)}, merges)
  most = limits_lib.DEFAULT.tokenizer_bytes
  content = limits_lib.parse_json(_content(file, open), most=most)
  if not isinstance(content, dict):
    raise ValueError(f"it holds no fields but {type(content).__name__}")
  if "model" in content and isinstance(content["model"], dict):
    return tokenizers.Tokenizer.from_str(json.dumps(content))
  lines = _lines(file.with_name(MERGES))
  merges = [
    tuple(line.split()) for line in lines if not line.startswith("#version")
  ]
  return _bpe(content, merges)


def _lines(file):
  opened = gzip.open if file.name.endswith(".gz") else open
  # Not splitlines: a merge may be of characters that it takes for an end.
  return [line for line in _content(file, opened).split("\n") if line.strip()]


def _content(file, opened):
  """Reads a file's text, unless it is larger than the limit; gzip may grow."""
  most = limits_lib.DEFAULT.tokenizer_bytes
  with opened(file, "rb") as packed:
    content = packed.read(most + 1)
  if len(content) > most:
    raise ValueError(f"it has more than {most} bytes")
  return content.decode().replace("\r\n", "\n")


def _bpe(vocabulary, merges):
  """Makes OpenAI's byte pair encoding, in lower case."""
  pieces = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=merges,
      continuing_subword_prefix="",
      end_of_word_suffix="</w>",
    )
  )
  pieces.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(Regex(r"\s+"), " "),
      normalizers.Lowercase(),
    ]
  )
  pieces.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  return pieces


def _clean(number, text):
  if not isinstance(text, str):
    raise TypeError(
      f"caption {number} is a {type(text).__name__}; expected str."
    )
  # Half of a surrogate pair is no character, and can't be encoded.
  text = text.encode("utf-8", "replace").decode("utf-8")
  return html.unescape(html.unescape(text))


def _restored(pieces, fields):
  """Rebuilds a tokenizer from the parts of `Tokenizer.__reduce__`."""
  tokenizer = Tokenizer.__new__(Tokenizer)
  tokenizer.__dict__.update(fields)
  tokenizer._pieces = tokenizers.Tokenizer.from_str(pieces)
  return tokenizer
