"""Text, its windows, their noise and their batches."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from configs import language as language_config
from experiments.tasks.language import data, noise, texts, tokens

LONG = "the quick brown fox jumps over the lazy dog and {} more "


@pytest.fixture
def make_config(tmp_path):
  """A config whose text is 40 paragraphs of some 200 bytes."""
  file = tmp_path / "text.txt"
  file.write_text(
    "\n\n".join(f"{number} " + LONG.format(number) * 4 for number in range(40))
  )

  def make(**overrides):
    config = language_config.get_config().unlock()
    config.update_from_flattened_dict(
      {
        "data.path": str(file),
        "data.length": 32,
        "data.shortest": 8,
        "data.train_size": 0,
        "batch_size": 4,
        **overrides,
      }
    )
    return config.lock()

  return make


def write(folder, name, content):
  file = folder / name
  file.write_bytes(content.encode() if isinstance(content, str) else content)
  return file


@pytest.mark.parametrize(
  ("name", "content", "options", "expected"),
  [
    (
      "a.txt",
      "\ufeffa b\r\n\r\nc\n \n\nd\n",
      {},
      {"0": "a b", "1": "c", "2": "d"},
    ),
    ("a.txt", "a\n\nb", {"documents": "windows"}, {"0": "a\n\nb"}),
    (
      "a.jsonl",
      '{"text": "a\\u2028b"}\n\n{"text": ""}\n{"text": "\\ud800"}',
      {},
      {"0": "a\u2028b", "3": "?"},
    ),
    ("a.jsonl", '{"x": 1, "body": "a"}', {"field": "body"}, {"0": "a"}),
  ],
)
def test_files_are_read_into_documents(
  tmp_path, name, content, options, expected
):
  found = texts.read(write(tmp_path, name, content), **options)
  assert {part.name: part.text for part in found} == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_parquet_column_is_read_row_by_row(tmp_path, kind):
  file = tmp_path / "a.parquet"
  nested = pa.array([{"a": 1, "b": 2}] * 3)
  column = pa.array(["a", None, "b"], kind)
  parquet.write_table(pa.table({"n": nested, "body": column}), file)
  found = texts.read(file, field="body")
  assert found == [("0", "a"), ("2", "b")]


@pytest.mark.parametrize(
  ("name", "content", "options", "text"),
  [
    ("a.md", "a", {}, r"ends in '.md'; expected one of .txt, .jsonl, .parquet"),
    ("a.txt", "", {}, "a.txt holds no text"),
    ("a.txt", " \n\n\t", {}, "a.txt holds no text"),
    (
      "a.txt",
      "a",
      {"documents": "pages"},
      "'pages'; expected one of paragraphs",
    ),
    ("a.txt", b"ab\xff", {}, "a.txt is no UTF-8: byte 0xff at position 2"),
    ("a.txt", "abcd", {"most_bytes": 3}, "more than 3 bytes.*most_bytes"),
    ("a.jsonl", '{"text": "a"}\n{', {}, "line 2 of .*a.jsonl is no JSON"),
    ("a.jsonl", "[" * 150 + "]" * 150, {}, "line 1 of .* is no JSON: .*deep"),
    ("a.jsonl", '{"a": 1}', {}, r"no field 'text' \(there is \['a'\]\)"),
    ("a.jsonl", "7", {}, r"line 1 of .* has no field 'text'"),
    ("a.jsonl", '{"text": 7}', {}, "has a int in 'text'; expected text"),
    ("a.jsonl", '{"text": " "}', {}, "a.jsonl holds no text"),
    ("a.parquet", "PAR1", {}, "a.parquet can't be read as a Parquet file"),
  ],
)
def test_files_that_are_no_text_are_refused(
  tmp_path, name, content, options, text
):
  with pytest.raises(ValueError, match=text):
    texts.read(write(tmp_path, name, content), **options)


def test_a_missing_file_is_refused():
  with pytest.raises(FileNotFoundError, match=r"'no\.txt', and there is no"):
    texts.read("no.txt")


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"field": "text"}, r"columns \['body', 'n'\] and not one 'text'"),
    ({"field": "n"}, "column 'n' of .* holds int64 values; expected text"),
    ({"field": "body", "most_bytes": 999}, "more than 999 bytes of text"),
  ],
)
def test_columns_that_are_no_text_are_refused(tmp_path, options, text):
  file = tmp_path / "a.parquet"
  # Packed it is small: what counts is what comes out.
  parquet.write_table(pa.table({"body": ["a" * 1000], "n": [1]}), file)
  with pytest.raises(ValueError, match=text):
    texts.read(file, **options)


def test_a_parquet_file_that_lies_about_utf8_is_refused(tmp_path):
  file = tmp_path / "a.parquet"
  buffers = [
    None,
    pa.array([0, 2], pa.int32()).buffers()[1],
    pa.py_buffer(b"\xff\xfe"),
  ]
  column = pa.Array.from_buffers(pa.string(), 1, buffers)
  parquet.write_table(pa.table({"text": column}), file)
  with pytest.raises(ValueError, match="can't be read as a Parquet file"):
    texts.read(file)


def test_the_embedded_text_is_half_a_megabyte_of_prose():
  found = texts.embedded()
  assert sum(len(part.text) for part in found) > 500_000
  names = [part.name for part in found]
  assert len(set(names)) == len(names)
  paragraphs = [p for part in found for p in part.text.split("\n\n")]
  assert len(set(paragraphs)) == len(paragraphs)
  assert all(len(p.split()) >= 12 for p in paragraphs)
  whole = "".join(paragraphs)
  assert len(whole.encode("ascii", "ignore")) > 0.999 * len(whole)


def test_bytes_come_back_even_cut_in_two():
  tokenizer = tokens.Bytes()
  ids = tokenizer.encode("né")[:2]
  assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids.tolist()
  assert tokens.load("bytes").vocab_size == 258


def test_a_published_tokenizer_gets_ids_of_its_own_for_start_and_padding(
  tmp_path,
):
  vocabulary = {"<unk>": 0, "the": 1, "dog": 2}
  write(
    tmp_path,
    "tokenizer.json",
    json.dumps(
      {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
          "type": "WordLevel",
          "vocab": vocabulary,
          "unk_token": "<unk>",
        },
      }
    ),
  )
  tokenizer = tokens.load(str(tmp_path))
  assert tokenizer.encode("the dog barks").tolist() == [1, 2, 0]
  assert tokenizer.decode([1, 2]) == "the dog"
  assert (tokenizer.padding, tokenizer.start, tokenizer.vocab_size) == (3, 4, 5)
  with pytest.raises(ValueError, match="can't be read as a tokenizer"):
    tokens.load(str(write(tmp_path, "broken.json", "{")))


def test_windows_cover_documents_without_overlap():
  documents = [texts.Document("a", "abcdefgh"), texts.Document("b", "ij")]
  found, owners = data.cut(documents, tokens.Bytes(), length=3, shortest=2)
  assert found.ids.tolist() == ["a:0", "a:1", "a:2", "b:0"]
  assert owners.tolist() == [0, 0, 0, 1]
  assert found.tokens.tolist() == [
    [257, *b"abc"],
    [257, *b"def"],
    [257, *b"gh", 256],
    [257, *b"ij", 256],
  ]
  short, _ = data.cut(documents, tokens.Bytes(), length=3, shortest=3)
  assert short.ids.tolist() == ["a:0", "a:1"]
  with pytest.raises(ValueError, match="length is 3 and shortest 4"):
    data.cut(documents, tokens.Bytes(), length=3, shortest=4)


def test_a_document_is_held_out_whole_and_so_are_its_copies():
  documents = [
    texts.Document(str(number), f"{number % 50:03d}" * 4)
    for number in range(100)
  ]
  found, owners = data.cut(documents, tokens.Bytes(), length=4, shortest=4)
  held = data.split(found, owners, fraction=0.3, seed=0)
  assert 0.3 <= held.mean() <= 0.34
  by_document = held.reshape(100, 3)
  assert (by_document == by_document[:, :1]).all()
  np.testing.assert_array_equal(by_document[:50], by_document[50:])
  other = data.split(found, owners, fraction=0.3, seed=1)
  assert (held != other).any()
  with pytest.raises(ValueError, match="has 1 different documents"):
    data.split(found, np.zeros(300, int), fraction=0.3, seed=0)
  with pytest.raises(ValueError, match=r"held_out_fraction is 1\.0"):
    data.split(found, owners, fraction=1.0, seed=0)


def test_noise_is_what_it_says_and_where_it_says():
  clean = [LONG.format(number) for number in range(60)]
  options = {"rate": 0.5, "seed": 3, "characters": 40}
  noisy = noise.apply_noise(clean, **options)
  counts = dict(zip(*np.unique(noisy.kind, return_counts=True), strict=True))
  assert counts == {"": 30, "shuffled": 10, "code": 10, "boilerplate": 10}
  for text, before, kind in zip(noisy.texts, clean, noisy.kind, strict=True):
    assert (text == before) == (kind == "")
    if kind == "shuffled":
      assert sorted(text.split()) == sorted(before.split())
    elif kind != "":
      assert len(text) == 40
  again = noise.apply_noise(clean, **options)
  assert again.texts == noisy.texts
  other = noise.apply_noise(clean, **options | {"seed": 4})
  assert (other.kind != noisy.kind).any()


def test_what_can_not_be_shuffled_stays_clean():
  noisy = noise.apply_noise(
    ["one", "two two", ""], rate=1, seed=0, kinds=("shuffled",), characters=9
  )
  assert noisy.texts == ["one", "two two", ""]
  assert noisy.kind.tolist() == [""] * 3


def test_code_has_neither_docstrings_nor_comments(monkeypatch, tmp_path):
  write(tmp_path, "a.py", 'def f():\n  """Doc."""\n  return 1  # comment\n')
  monkeypatch.setattr(texts, "_library", lambda: [tmp_path / "a.py"])
  rng = np.random.default_rng(0)
  assert texts.code(1, 21, rng) == ["def f():\n    return 1"]
  assert texts.code(2, 8, rng) == ["def f():", "\n    ret"]
  with pytest.raises(ValueError, match="has 2 pieces of code of 8 characters"):
    texts.code(3, 8, rng)


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"rate": 1.5}, "config.noise.rate is 1.5; expected 0 to 1"),
    ({"kinds": ()}, r"config.noise.kinds is \(\); expected some of shuffled"),
    ({"kinds": ("french",)}, "expected some of shuffled, code, boilerplate"),
    ({"kinds": ("code", "code")}, "each once"),
    ({"seed": -1}, "is -1; expected 0 or more"),
  ],
)
def test_noise_that_is_out_of_range_is_refused(options, text):
  asked = {"rate": 0.5, "seed": 0, "characters": 8} | options
  with pytest.raises(ValueError, match=text):
    noise.apply_noise(["a b"], **asked)


def test_data_keep_the_truth_and_leak_nothing(make_config):
  clean = data.load(make_config(**{"noise.rate": 0.0}))
  noisy = data.load(make_config(**{"noise.rate": 0.5}))
  np.testing.assert_array_equal(clean.train.ids, noisy.train.ids)
  np.testing.assert_array_equal(clean.held_out.tokens, noisy.held_out.tokens)
  differs = (clean.train.tokens != noisy.train.tokens).any(axis=1)
  np.testing.assert_array_equal(differs, noisy.train.kind != "")
  assert 0.4 < differs.mean() <= 0.5
  assert (noisy.held_out.kind == "").all()
  documents = [
    {name.split(":")[0] for name in part.ids}
    for part in (noisy.train, noisy.held_out)
  ]
  assert all(documents)
  assert not documents[0] & documents[1]
  assert clean.fingerprint != noisy.fingerprint


def test_sizes_are_drawn_from_all_the_text(make_config):
  whole = data.load(make_config())
  part = data.load(make_config(**{"data.train_size": 20}))
  assert len(part.train.ids) == part.train_size == 20
  assert set(part.train.ids) < set(whole.train.ids)
  assert len({name.split(":")[0] for name in part.train.ids}) > 8


@pytest.mark.parametrize(
  ("overrides", "text"),
  [
    (
      {"data.shortest": 999, "data.length": 999},
      "makes 0 sequences of config.data.length=999 tokens",
    ),
    (
      {"data.documents": "windows", "batch_size": 10**6},
      "don't fill one batch",
    ),
    ({"data.filter": "no.npy"}, "config.data.filter is 'no.npy'"),
  ],
)
def test_data_that_do_not_suffice_are_refused(make_config, overrides, text):
  with pytest.raises((ValueError, FileNotFoundError), match=text):
    data.load(make_config(**overrides))


def test_a_filter_keeps_the_ids_it_names(make_config, tmp_path):
  whole = data.load(make_config())
  file = tmp_path / "keep.npy"
  np.save(file, whole.train.ids[[5, 1, 9, 30]])
  kept = data.load(make_config(**{"data.filter": str(file)}))
  batch = next(iter(kept.batches))
  assert sorted(batch["index"].tolist()) == [1, 5, 9, 30]
  assert kept.train_size == 4
  np.save(file, np.array(["other:0"]))
  with pytest.raises(ValueError, match=r"keeps none of the \d+ sequences"):
    data.load(make_config(**{"data.filter": str(file)}))


def test_batches_resume_anywhere_and_are_the_same_for_two_processes(
  make_config,
):
  train = data.load(make_config()).train

  def batches(process=(0, 1)):
    return iter(data.make_batches(train, batch_size=6, seed=1, process=process))

  steps = len(train.ids) // 6 + 2  # into the second epoch
  iterator, states, seen = batches(), [], []
  for _ in range(steps):
    states.append(json.loads(json.dumps(iterator.get_state())))
    seen.append(next(iterator))
  assert iterator.epoch == 1
  for step in (0, 3, steps - 1):
    other = batches()
    other.set_state(states[step])
    again = next(other)
    for key, expected in seen[step].items():
      np.testing.assert_array_equal(again[key], expected)
  halves = [batches((number, 2)) for number in range(2)]
  for expected in seen:
    parts = [next(half) for half in halves]
    for key in expected:
      np.testing.assert_array_equal(
        np.concatenate([part[key] for part in parts]), expected[key]
      )
  first = np.concatenate([batch["index"] for batch in seen[: steps - 2]])
  assert len(set(first)) == len(first)
  with pytest.raises(ValueError, match="one of other data or settings"):
    iter(data.make_batches(train, batch_size=6, seed=2)).set_state(states[0])


def test_an_evaluation_pads_its_last_batch(make_config):
  held_out = data.load(make_config()).held_out
  (*_, last) = data.make_batches(
    held_out, batch_size=4, seed=None, num_epochs=1, drop_last=False
  )
  left = len(held_out.ids) % 4 or 4
  assert last["mask"].tolist() == [place < left for place in range(4)]
  assert (last["tokens"][:, 0] == 257).all()
