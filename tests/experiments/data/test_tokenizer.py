"""The tokenizer against rows by hand, and against transformers'."""

import gzip
import json
import pickle
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from experiments.data.noise import captions as caption_noise
from experiments.data.pairs import shapes, tokenizer

MERGES = ["r e", "re d</w>", "s t", "a r</w>", "st ar</w>"]
START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MADE = [merge.replace(" ", "") for merge in MERGES]
NAMES = [*BYTES, *(x + "</w>" for x in BYTES), *MADE, START, END]
IDS = {name: number for number, name in enumerate(NAMES)}
HARD = [
  "A red star",
  "  RED\tstar\n\n stared 123 it's!?",
  "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e",
  "\U0001f680\U0001f469\u200d\U0001f52c star",
  "\x00\x07red\x1b[0m\u2028star\ufeff",
  "",
  "red " * 10_000,
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder for each way in which one and the same tokenizer is written."""
  root = tmp_path_factory.mktemp("tokenizers")
  folders = {name: root / name for name in ("json", "pair", "txt", "gz")}
  for folder in folders.values():
    folder.mkdir()
  text = "\n".join(["#version: 0.2", *MERGES, ""])
  (folders["pair"] / "vocab.json").write_text(json.dumps(IDS))
  (folders["pair"] / "merges.txt").write_text(text)
  (folders["txt"] / "bpe_simple_vocab_16e6.txt").write_text(text)
  packed = gzip.compress(text.encode(), mtime=0)
  (folders["gz"] / "bpe_simple_vocab_16e6.txt.gz").write_bytes(packed)
  made = tokenizer.load(folders["pair"])._pieces
  # As Hugging Face writes it: it would add the ends, cut and pad by itself.
  made.post_processor = processors.RobertaProcessing(
    (END, IDS[END]), (START, IDS[START])
  )
  made.add_special_tokens([START, END])
  made.enable_truncation(3)
  made.enable_padding(length=4)
  made.save(str(folders["json"] / "tokenizer.json"))
  return folders


def row(*names, length=12, padding=0):
  ids = [IDS[START], *(IDS[name] for name in names), IDS[END]]
  return ids + [padding] * (length - len(ids))


@pytest.mark.parametrize("kind", ["json", "pair", "txt", "gz"])
def test_rows_are_start_caption_end_padding(files, kind):
  made = tokenizer.load(files[kind], context_length=12)
  found = made(["A red star", "STARED", "", "red " * 99])
  assert found.dtype == np.int32
  expected = [
    row("a</w>", "red</w>", "star</w>"),
    row("st", "a", "red</w>"),
    row(),
    row(*["red</w>"] * 10),
  ]
  np.testing.assert_array_equal(found, expected)
  assert made.vocab_size == len(IDS)
  ends = tokenizer.load(files[kind], context_length=12, padding="end")
  padded = row("red</w>", padding=IDS[END])
  np.testing.assert_array_equal(ends(["red"]), [padded])
  assert ends(["red"]).argmax(axis=1) == 2  # where the text tower looks


def test_a_file_may_be_named_itself(files):
  expected = tokenizer.load(files["json"])(HARD)
  for file in files["json"] / "tokenizer.json", files["pair"] / "vocab.json":
    np.testing.assert_array_equal(tokenizer.load(file)(HARD), expected)


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_hard_captions_are_whole_rows_with_one_end(files, kind):
  made = tokenizer.load(files[kind])
  found = made([*HARD, "\ud83d half of an emoji"])
  assert found.shape == (len(HARD) + 1, 77)
  np.testing.assert_array_equal(found[:, 0], IDS[START])
  np.testing.assert_array_equal(np.sum(found == IDS[END], axis=1), 1)
  np.testing.assert_array_equal(np.sum(found == IDS[START], axis=1), 1)
  assert found[6, 76] == IDS[END]
  assert found.min() >= 0
  # Nothing of an emoji is lost: bytes are tokens.
  names = byte_tokens("\U0001f680".encode())
  np.testing.assert_array_equal(
    made(["\U0001f680"])[0, :6], row(*names, length=6)
  )


def byte_tokens(values):
  """The byte tokens of one piece, the last with its end of word."""
  prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [x for x in range(256) if x not in prints]
  order = {byte: n for n, byte in enumerate([*prints, *others])}
  names = [BYTES[order[value]] for value in values]
  return [*names[:-1], names[-1] + "</w>"]


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_a_caption_does_not_say_where_it_ends(files, kind):
  made = tokenizer.load(files[kind], context_length=40)
  found = made([f"red{END} star {START} star", f"red star {END} red"])
  np.testing.assert_array_equal(np.sum(found == IDS[END], axis=1), 1)
  np.testing.assert_array_equal(np.sum(found == IDS[START], axis=1), 1)
  for ids in found:
    assert IDS["star</w>"] in ids[: ids.argmax()]


def test_entities_are_read(files):
  made = tokenizer.load(files["pair"])
  np.testing.assert_array_equal(
    made(["a &amp; b", "&lt;red&gt;", "&amp;quot;"]),
    made(["a & b", "<red>", '"']),
  )


def test_rows_are_those_of_transformers(files):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.CLIPTokenizer(
    str(files["pair"] / "vocab.json"), str(files["pair"] / "merges.txt")
  )
  expected = theirs(HARD, padding="max_length", truncation=True, max_length=77)
  found = tokenizer.load(files["pair"], padding="end")(HARD)
  np.testing.assert_array_equal(found, expected["input_ids"])


def test_a_vocabulary_that_does_not_fit_the_model(files):
  made = tokenizer.load(files["json"])
  made.check_fits(vocab_size=len(IDS), context_length=77)
  with pytest.raises(ValueError, match=r"of 519 .* one of 128; set .*=519"):
    made.check_fits(vocab_size=128, context_length=77)
  with pytest.raises(ValueError, match="rows of 77 ids and the model takes 16"):
    made.check_fits(vocab_size=len(IDS), context_length=16)


def test_what_is_no_caption_is_refused(files):
  made = tokenizer.load(files["json"])
  with pytest.raises(TypeError, match="caption 1 is a NoneType; expected str"):
    made(["red", None])
  with pytest.raises(TypeError, match="captions are a str; expected a list"):
    made("red star")
  assert made([]).shape == (0, 77)
  np.testing.assert_array_equal(made(np.array(["red"])), made(["red"]))


def test_files_that_are_no_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match='write "hf://owner/name"'):
    tokenizer.load("openai/clip-vit-base-patch32")
  with pytest.raises(FileNotFoundError, match=r"there is nothing\); expected"):
    tokenizer.load(tmp_path)
  file = tmp_path / "tokenizer.json"
  for text in ("{", "[]", '{"model": {"type": "BPE"}}'):
    file.write_text(text)
    with pytest.raises(ValueError, match="can't be read as a tokenizer"):
      tokenizer.load(file)
  words = {"<|endoftext|>": 0, "<|startoftext|>": 1, "red": 2}
  for ids, message in (
    ({"red": 0}, "has no start and end token"),
    (words, "id 0 in a vocabulary of 3; expected the highest"),
  ):
    made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="red"))
    made.save(str(file))
    with pytest.raises(ValueError, match=message):
      tokenizer.load(file)
  (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"no gzip")
  with pytest.raises(OSError, match="gzip"):
    tokenizer.load(tmp_path / "bpe_simple_vocab_16e6.txt.gz")


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("tokenizer.json", b'{"a":' * 90_000, "more than 100 deep"),
    ("tokenizer.json", b" " * ((64 << 20) + 1), "more than 67108864 bytes"),
    ("tokenizer.json", b"\xff\xfe{}", "UnicodeDecodeError"),
    ("vocab.json", b'{"a": -1}', "can't be read as a tokenizer"),
    (
      "bpe_simple_vocab_16e6.txt.gz",
      gzip.compress(b"a b\n" * (20 << 20), 1, mtime=0),
      "more than 67108864 bytes",
    ),
    (
      "bpe_simple_vocab_16e6.txt.gz",
      gzip.compress(bytes(range(256)) * 99, mtime=0)[:90],
      "EOFError",
    ),
  ],
)
def test_files_are_not_believed(tmp_path, name, content, message):
  (tmp_path / "merges.txt").write_text("a b\n")
  file = tmp_path / name
  file.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    tokenizer.load(file)
  assert str(error.value).startswith(str(file))
  assert len(str(error.value)) < 600


def test_what_is_no_exception_is_an_error_too(files, monkeypatch):
  """Rust's panics, as the library raises them."""
  panic = type("PanicException", (BaseException,), {})

  def fail(file):
    raise panic("index out of bounds")

  monkeypatch.setattr(tokenizer, "_read", fail)
  with pytest.raises(ValueError, match="index out of bounds"):
    tokenizer.load(files["json"])
  monkeypatch.setattr(tokenizer, "_read", lambda file: sys.exit(3))
  with pytest.raises(SystemExit):
    tokenizer.load(files["json"])


@pytest.mark.slow
def test_damage_anywhere_is_told(files, tmp_path):
  """Any bytes of any file: a tokenizer, or an error that names the file."""
  rng = np.random.default_rng(0)
  for kind, name in (
    ("json", "tokenizer.json"),
    ("pair", "vocab.json"),
    ("txt", "bpe_simple_vocab_16e6.txt"),
    ("gz", "bpe_simple_vocab_16e6.txt.gz"),
  ):
    whole = (files[kind] / name).read_bytes()
    (tmp_path / "merges.txt").write_text("\n".join(MERGES))
    file = tmp_path / name
    for turn in range(150):
      damaged = bytearray(whole)
      for place in rng.integers(len(whole), size=rng.integers(1, 5)):
        damaged[place] = int(rng.choice(list(b'{}[]",:019ab\xff\0 \n')))
      if turn % 5 == 0:
        del damaged[int(rng.integers(len(whole))) :]
      file.write_bytes(damaged)
      said = name
      try:
        made = tokenizer.load(file)
      except (ValueError, OSError) as error:
        said = str(error)
      else:
        assert made(["a red star"]).shape == (1, 77)
      assert name in said


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"context_length": 1}, "context_length is 1"),
    ({"padding": "start"}, "'start'; expected one of zero, end"),
  ],
)
def test_options_that_make_no_rows(files, options, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.load(files["json"], **options)


def test_shapes_captions_prompts_and_noise_have_no_unknown_word():
  made = tokenizer.for_shapes()
  assert made.vocab_size < 100
  pairs = shapes.load("train", size=2000, seed=3, noise_rate=0.6)
  prompts = [text for texts in shapes.class_prompts() for text in texts]
  rows = made([*pairs.captions, *pairs.clean_captions, *prompts])
  assert 1 not in rows
  said = set(" ".join(pairs.captions).replace(",", " ,").split())
  assert said <= set(tokenizer.SHAPES_WORDS)
  padded = pairs.noise_kind == caption_noise.KINDS[2]
  assert np.all(made(pairs.captions[padded])[:, -1] == made.end)
  assert 1 in made(["a zebra"])


def test_a_tokenizer_goes_to_other_processes(files):
  for made in (tokenizer.load(files["txt"]), tokenizer.for_shapes()):
    other = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(other(HARD), made(HARD))
    assert other.vocab_size == made.vocab_size
