"""Files: what is written is what is read, and bad files are refused."""

import csv
import dataclasses
import hashlib
import json
import os
import re
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from gradmimic_jax import _files
from gradmimic_jax.selection import (
  Selection,
  _selection_files as files_lib,
  export,
  filters,
  select,
  uids,
)


@pytest.fixture(scope="module")
def selection():
  rng = np.random.default_rng(0)
  scores = np.where(np.arange(60) < 40, 1, -1)[:, None] + rng.normal(
    0, 0.3, (60, 3)
  )
  scores[5] = np.nan
  scores[7, 1] = np.nan
  return select(scores, ids=rng.permutation(100)[:60])


def random_uids(n, seed=0):
  rng = np.random.default_rng(seed)
  text = [rng.bytes(16).hex() for _ in range(n)]
  return [*text, "0" * 32, "f" * 32, "0" * 16 + "f" * 16, "f" * 16 + "0" * 16]


# Uids.


def arrow_slice(text):
  return pa.array(["x", *text, "y"]).slice(1, len(text))


@pytest.mark.parametrize(
  "kind",
  [
    list,
    np.array,
    lambda text: np.array(text, object),
    lambda text: np.array(text, "U40"),
    pa.array,
    arrow_slice,
    lambda text: pa.chunked_array([text[:3], text[3:]]),
    lambda text: pa.array(text, pa.large_string()),
  ],
)
def test_uids_are_two_numbers(kind, monkeypatch):
  monkeypatch.setattr(uids, "_PIECE", 7)
  text = random_uids(20)
  pairs = uids.parse_uids(kind(text))
  assert pairs.dtype == np.dtype("u8,u8")
  assert pairs.tolist() == [(int(t[:16], 16), int(t[16:], 16)) for t in text]
  assert uids.format_uids(pairs).to_pylist() == text


@pytest.mark.parametrize(
  ("value", "error", "message"),
  [
    (["0" * 31], ValueError, r"uid\.zfill\(32\)"),
    (["0" * 32, "0" * 33], ValueError, "1 uids are not 32"),
    (["A" * 32], ValueError, "lower-case"),
    (["0" * 30 + " 1"], ValueError, "hexadecimal"),
    (["0" * 31 + "é"], ValueError, "hexadecimal"),
    (["0" * 31 + "\u0131"], ValueError, "hexadecimal"),
    ([""], ValueError, "the first is ''"),
    ([1, 2], TypeError, "dtype int64"),
    (np.array(["0" * 32, 5], object), TypeError, "not all strings"),
    (pa.array(["0" * 32, None]), ValueError, "1 uids are null"),
    (pa.array([1]), TypeError, "type int64"),
    ([["0" * 32]], ValueError, r"expected \[n\]"),
  ],
)
def test_uids_that_do_not_read(value, error, message):
  with pytest.raises(error, match=message):
    uids.parse_uids(value)


# DataComp.


def test_a_subset_file_is_what_datacomp_expects(tmp_path):
  text = random_uids(200)
  path = export.write_datacomp_subset(tmp_path / "s.npy", text)
  raw = np.load(path, allow_pickle=False)
  assert raw.dtype == np.dtype("u8,u8")
  assert raw.ndim == 1
  want = sorted((int(t[:16], 16), int(t[16:], 16)) for t in text)
  assert raw.tolist() == want
  # Found by halves, as its resharder does.
  for one in want[::17]:
    assert raw[np.searchsorted(raw, np.array(one, raw.dtype))].item() == one
  np.testing.assert_array_equal(export.read_datacomp_subset(path), raw)
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ["s.npy", "s.npy.json"]


def test_copies_are_refused_unless_meant(tmp_path):
  text = [*random_uids(5), "0" * 32]
  with pytest.raises(ValueError, match="1 uids repeat"):
    export.write_datacomp_subset(tmp_path / "s.npy", text)
  assert not list(tmp_path.iterdir())
  path = export.write_datacomp_subset(
    tmp_path / "s.npy", text, multiplicity=True
  )
  with pytest.raises(ValueError, match=r"s\.npy: 1 uids repeat"):
    export.read_datacomp_subset(path)
  assert len(export.read_datacomp_subset(path, multiplicity=True)) == 10


@pytest.mark.parametrize(
  ("array", "message"),
  [
    (np.array([(1, 1), (0, 5)], "u8,u8"), "not sorted"),
    (np.array([(0, 5), (0, 1)], "u8,u8"), "not sorted"),
    (np.array([(0, 5)], "i8,i8"), "holds .*<i8"),
    (np.array([(0, 5)], ">u8,>u8"), "holds .*>u8"),
    (np.array([[0, 5]], "u8"), "holds uint64"),
    (np.array([[(0, 5)]], "u8,u8"), r"shape \(1, 1\)"),
  ],
)
def test_bad_subset_files_are_refused(tmp_path, array, message):
  np.save(tmp_path / "s.npy", array)
  with pytest.raises(ValueError, match=message):
    export.read_datacomp_subset(tmp_path / "s.npy")


def test_no_pickle_is_opened(tmp_path):
  np.save(tmp_path / "s.npy", np.array([{}]), allow_pickle=True)
  for read in (export.read_npy, export.read_datacomp_subset):
    with pytest.raises(ValueError, match="no NumPy file of plain values"):
      read(tmp_path / "s.npy")
  (tmp_path / "t.npy").write_bytes(b"not numpy")
  with pytest.raises(ValueError, match="no NumPy file"):
    export.read_npy(tmp_path / "t.npy")


def test_coverage_of_metadata(tmp_path):
  text = random_uids(50)
  for part in range(2):
    pq.write_table(
      pa.table({"uid": text[part * 20 : part * 20 + 25], "text": ["x"] * 25}),
      tmp_path / f"{part}.parquet",
    )
  subset = [*text[40:50], "1" * 32]
  want = (11, 45, 5, 6)
  assert export.coverage(subset, tmp_path) == want
  parts = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
  assert export.coverage(uids.parse_uids(subset), parts) == want
  assert export.coverage(subset, tmp_path).fraction == 5 / 11
  assert np.isnan(export.coverage([], tmp_path).fraction)
  with pytest.raises(ValueError, match="no column 'id'; it has"):
    export.coverage(subset, parts[0], column="id")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="has no Parquet files"):
    export.coverage(subset, tmp_path / "empty")


# Selections.


def test_parquet_gives_the_selection_back(selection, tmp_path, monkeypatch):
  monkeypatch.setattr(files_lib, "ROWS", 17)
  path = export.write_parquet(tmp_path / "s.parquet", selection)
  got = export.read_parquet(path)
  for field in dataclasses.fields(selection):
    before, after = (getattr(s, field.name) for s in (selection, got))
    if field.name == "diagnostics":
      assert after == json.loads(json.dumps(before))
    else:
      assert before.dtype == after.dtype
      np.testing.assert_array_equal(after, before)
  assert str(got) == str(selection)
  table = pq.read_table(path)
  assert table.column_names == [
    "id",
    "keep",
    "keep_probability",
    "quality",
    "votes",
  ]
  assert (
    table["quality"].null_count == table["keep_probability"].null_count == 1
  )


def test_csv_gives_the_selection_back(selection, tmp_path, monkeypatch):
  monkeypatch.setattr(files_lib, "ROWS", 17)
  selection = dataclasses.replace(
    selection, ids=np.array([f'=1+"{i}",\n' for i in selection.ids])
  )
  path = export.write_csv(tmp_path / "s.csv", selection)
  got = export.read_csv(path)
  for name in ("ids", "keep", "keep_probability", "votes", "quality"):
    np.testing.assert_array_equal(getattr(got, name), getattr(selection, name))
  with open(path, newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 60
  assert rows[3]["id"] == "'" + selection.ids[3]  # no formula
  assert rows[3]["vote_2"] == str(selection.votes[3, 2])


def test_ids(tmp_path, selection):
  path = export.write_npy(tmp_path / "kept.npy", selection.kept_ids)
  np.testing.assert_array_equal(
    np.load(path, allow_pickle=False), np.sort(selection.kept_ids)
  )
  np.testing.assert_array_equal(
    export.read_npy(path), np.sort(selection.kept_ids)
  )
  export.write_npy(path, np.array(["b", "a"], object))
  assert export.read_npy(path).tolist() == ["a", "b"]


@pytest.mark.parametrize("kind", ["npy", "parquet", "csv", "datacomp_subset"])
def test_a_file_of_other_data_is_refused(selection, tmp_path, kind):
  what = {
    "npy": [1, 2],
    "datacomp_subset": random_uids(1),
    "parquet": selection,
    "csv": selection,
  }[kind]
  suffix = "npy" if kind == "datacomp_subset" else kind
  write, read = (getattr(export, f"{do}_{kind}") for do in ("write", "read"))
  path = write(
    tmp_path / f"f.{suffix}", what, fingerprints={"data": "digits-v1"}
  )
  read(path)
  read(path, fingerprints={"data": "digits-v1", "reference": "any"})
  with pytest.raises(ValueError, match="'digits-v1' in the one and 'cifar'"):
    read(path, fingerprints={"data": "cifar"})
  # Written again without, nothing is left of the old ones.
  write(path, what)
  read(path, fingerprints={"data": "cifar"})


def test_a_filter_brings_its_fingerprints(tmp_path):
  one = filters.Filter([3, 1], fingerprints={"data": "digits"})
  path = export.write_npy(tmp_path / "f.npy", one)
  with pytest.raises(ValueError, match="'digits'"):
    export.read_npy(path, fingerprints={"data": "cifar"})


def test_other_files_are_refused(tmp_path, selection):
  pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
  with pytest.raises(ValueError, match=r"no selection: its columns are \['a'"):
    export.read_parquet(tmp_path / "a.parquet")
  (tmp_path / "a.csv").write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match="has columns"):
    export.read_csv(tmp_path / "a.csv")
  with pytest.raises(ValueError, match=r"end with \.npy"):
    export.write_npy(tmp_path / "a.txt", [1])


def test_a_failed_write_leaves_what_was_there(tmp_path, selection):
  path = export.write_parquet(tmp_path / "s.parquet", selection)
  before = path.read_bytes()
  broken = dataclasses.replace(selection, quality=np.zeros(3))
  with pytest.raises(pa.ArrowException):
    export.write_parquet(path, broken)
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


# Ids: text stays text, integers stay integers.


def small_selection(ids, seed=0):
  rng = np.random.default_rng(seed)
  n = len(ids)
  return Selection(
    np.asarray(ids),
    rng.random(n) < 0.5,
    rng.random(n),
    rng.integers(-1, 2, (n, 2)).astype(np.int8),
    {},
    np.full(n, np.nan),
  )


TRICKY = (
  *("", " ", "  a ", "NA", "null", "nan", "None", "NULL", "N/A", "#N/A"),
  *("true", "FALSE", "1e5", "1E+05", "007", "0", "12", "-2", "+1", "1.0", ".5"),
  *("2020-01-01", "12:30", "0x1F", "1_000", "inf", "18446744073709551616"),
  *("=1+1", "=cmd|'/c calc'!A1", "@SUM(1)", "\t=1", "\r1", "\n1", " =1", "-"),
  *("'", "''", "'a", "'=1", "'-2", "' =1", "''=1", "\uff1d1", "\ufeff=1"),
  *('"', '""', '"a"', ",", "a,b", "a;b", "a\nb", "a\r\nb", "a\rb", "\\n"),
  *("é", "e\u0301", "日本", "😀", "\u2028", "\u200f", "a\x00b", "\x1b[31m"),
  *("x" * 5000, "file name.png", "../a", "http://a/b?c=d&e", "ﬀ", "İ"),
)


def generated_ids(seed):
  """Distinct strings [2 to 40] of all that files stumble over."""
  rng = np.random.default_rng(seed)
  signs = [*"'=+-@\t\r\n \"',;01e.aNé😀\\", "\ufeff", "\xa0", "\uff0b", "\x1f"]
  if seed % 3 == 0:
    signs = [*"0123456789-+.eE' "]  # numbers, all of them
  made = ["".join(rng.choice(signs, rng.integers(0, 7))) for _ in range(40)]
  made += rng.choice(TRICKY, 10).tolist() if seed % 2 else []
  return list(dict.fromkeys(made))[: rng.integers(2, 40)]


def round_trips(folder, selection):
  """What the formats give back: ids of a selection, by format."""
  path = export.write_csv(folder / "s.csv", selection)
  yield "csv", export.read_csv(path)
  path.with_name("s.csv.json").unlink()  # copied without its manifest
  yield "csv alone", export.read_csv(path)
  path = export.write_parquet(folder / "s.parquet", selection)
  yield "parquet", export.read_parquet(path)


@pytest.mark.parametrize(
  "seed",
  [
    seed if seed < 6 else pytest.param(seed, marks=pytest.mark.slow)
    for seed in range(60)
  ],
)
def test_text_ids_come_back_as_text(tmp_path, seed):
  ids = list(TRICKY) if seed == 0 else generated_ids(seed)
  selection = small_selection(ids, seed)
  for name, got in round_trips(tmp_path, selection):
    assert got.ids.dtype.kind == "U", name
    assert got.ids.tolist() == ids, name
    np.testing.assert_array_equal(got.keep, selection.keep)
    np.testing.assert_array_equal(got.votes, selection.votes)
  path = export.write_npy(tmp_path / "k.npy", ids)
  got = export.read_npy(path)
  assert (got.dtype.kind, got.tolist()) == ("U", sorted(ids))
  # No cell of the file is a formula, also after a line's end inside a cell.
  with open(tmp_path / "s.csv", newline="") as file:
    cells = [row[0] for row in csv.reader(line for line in file)]
  assert len(cells) == len(ids) + 1
  for cell in cells:
    assert not re.match(r"\s*[=+@\-]|[\t\r\n]", cell), cell


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("prints", [None, {"data": "digits"}])
def test_csv_files_of_the_release_before(tmp_path, seed, prints):
  # Formulas were left as they are, and so was text that looks escaped.
  ids = generated_ids(seed) if seed else list(TRICKY)
  selection = small_selection(ids, seed)
  table = files_lib.to_table(selection, 0, len(ids))
  table = files_lib.to_flat_table(table)
  table = table.set_column(0, "id", pa.array(ids))
  pa.csv.write_csv(table, tmp_path / "s.csv")
  if prints:
    text = json.dumps({"fingerprints": prints})
    (tmp_path / "s.csv.json").write_text(text)
  got = export.read_csv(tmp_path / "s.csv", fingerprints=prints)
  assert (got.ids.dtype.kind, got.ids.tolist()) == ("U", ids)
  if prints:
    with pytest.raises(ValueError, match="'digits' in the one and 'cifar'"):
      export.read_csv(tmp_path / "s.csv", fingerprints={"data": "cifar"})


@pytest.mark.parametrize(
  "ids",
  [
    np.array([0]),
    np.array([5, 3, 2**62]),
    np.array([7, 1], np.int8),
    np.array([7, 1], np.uint16),
    np.array([2**64 - 1, 2**63, 0], np.uint64),
  ],
)
def test_integer_ids_come_back_as_integers(tmp_path, ids):
  for name, got in round_trips(tmp_path, small_selection(ids)):
    assert got.ids.dtype.kind in "iu", name
    assert got.ids.tolist() == ids.tolist(), name


def test_text_that_no_file_holds_is_refused(tmp_path):
  selection = small_selection(["a\udcff", "b"])
  for write, name in (
    (export.write_csv, "csv"),
    (export.write_parquet, "parquet"),
  ):
    with pytest.raises(ValueError, match="no Unicode, such as"):
      write(tmp_path / f"s.{name}", selection)
  assert not list(tmp_path.iterdir())


def test_ids_that_numpy_would_change_are_refused(tmp_path):
  for ids, error, message in (
    (["a\0", "b"], ValueError, "end with NUL"),
    (["a", 1], TypeError, "mixes values of int, str"),
    (["a", None], TypeError, "None may be missing"),
    (np.array(["a", np.nan], object), TypeError, "mixes values of float, str"),
    ([True, 5], TypeError, "mixes values of bool, int"),
  ):
    with pytest.raises(error, match=message):
      export.write_npy(tmp_path / "k.npy", ids)
    with pytest.raises(error, match=message):
      select([[1.0], [-1.0]], ids=ids)


# Tables of other tools.

HEADER = "id,keep,keep_probability,quality,vote_0\n"


def csv_of(folder, text, encoding="utf-8"):
  (folder / "s.csv").write_bytes(text.encode(encoding))
  return folder / "s.csv"


@pytest.mark.parametrize(
  ("drop", "keep"),
  [
    ("0", "1"),
    ("0.0", "1.0"),
    ("FALSE", "TRUE"),
    ("False", "True"),
    ("F", "T"),
    ("f", "t"),
    ("no", "yes"),
    ("n", " Y"),
    ('"False"', '"True"'),
    ("0", "true"),
  ],
)
def test_keep_as_others_write_it(tmp_path, drop, keep):
  rows = f"10,{drop},0.0,0.0,0\n11,{keep},1.0,NA,1\n12,{keep},,nan,-1\n"
  got = export.read_csv(csv_of(tmp_path, HEADER + rows))
  assert got.keep.dtype == bool
  assert got.kept_ids.tolist() == [11, 12]
  np.testing.assert_array_equal(got.keep_probability, [0, 1, np.nan])


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ("", "it has no rows"),
    ("1,maybe,1,1,1\n", "keep holds 'maybe'; expected true or false"),
    ("1,2,1,1,1\n", "keep holds 2.0"),
    ("1,-1,1,1,1\n", "keep holds -1"),
    ("1,,1,1,1\n2,true,1,1,1\n", "keep holds ''"),
    ("1,NA,1,1,1\n", "keep holds 'NA'"),
    ("1,true,2,1,1\n", "keep_probability holds 2; expected 0 to 1"),
    ("1,true,1,-0.1,1\n", "quality holds -0.1"),
    ('1,true,"0,9",1,1\n', "keep_probability: "),
    ("1,true,1,1,2\n", "a vote is 2.0; expected 1, 0 or -1"),
    ("1,true,1,1,0.5\n", "a vote is 0.5"),
    ("1,true,1,1,\n", "a vote is nan"),
    ("1,true,1,1,256\n", "a vote is 256"),
    ("1,true,1,1\n", "Expected 5 columns, got 4"),
    ("1,true,1,1,1\n1,true,1,1,1\n", "the id 1 comes 2 times"),
    ("10.0,true,1,1,1\n11.0,true,1,1,1\n", "ids such as '10.0' are numbers"),
    ("1.2E+11,true,1,1,1\n5,true,1,1,1\n", "ids such as '1.2E.11' are"),
    ("-5,true,1,1,1\n", "ids such as '-5' are numbers"),
    (" 5,true,1,1,1\n", "ids such as ' 5' are numbers"),
    (",true,1,1,1\n5,true,1,1,1\n", "ids are missing"),
    ("1;true;1;1;1\n", "Expected 5 columns, got 1"),
  ],
)
def test_tables_that_do_not_read(tmp_path, rows, message):
  path = csv_of(tmp_path, HEADER + rows)
  with pytest.raises(ValueError, match=message) as caught:
    export.read_csv(path)
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "text",
  [
    "," + HEADER + "0,a,true,1,1,1\n",  # pandas' index, or R's row names
    HEADER.replace(",", ";") + "a;true;1;1;1\n",
    HEADER.replace("vote_0", "vote_1") + "a,true,1,1,1\n",
    HEADER.replace("quality", "id") + "a,true,1,1,1\n",
  ],
)
def test_other_columns_are_named(tmp_path, text):
  with pytest.raises(ValueError, match=r"s\.csv .*it has columns \["):
    export.read_csv(csv_of(tmp_path, text))


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
  # A mark at the beginning, CRLF, capital letters, a column of notes.
  text = HEADER.replace("\n", ",note\n") + "'-2,TRUE,1,1,1,ok\n''a,FALSE,,,0,\n"
  path = csv_of(tmp_path, text.replace("\n", "\r\n"), "utf-8-sig")
  got = export.read_csv(path)
  assert got.ids.tolist() == ["-2", "'a"]
  assert got.kept_ids.tolist() == ["-2"]
  with pytest.raises(ValueError, match=r"s\.csv is damaged or no table"):
    export.read_csv(csv_of(tmp_path, text, "utf-16"))


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
  "quoting",
  [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL],
)
def test_tables_that_pandas_saved_again(tmp_path, seed, quoting):
  pd = pytest.importorskip("pandas")
  ids = generated_ids(seed) if seed else list(TRICKY)
  ids = [*ids, "some text"]  # so that not all are numbers
  if quoting == csv.QUOTE_MINIMAL:  # Python leaves a CR without quotes
    ids = [name for name in ids if "\r" not in name]
  selection = small_selection(ids, seed)
  path = export.write_csv(tmp_path / "s.csv", selection)
  frame = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
  frame.to_csv(tmp_path / "again.csv", index=False, quoting=quoting)
  got = export.read_csv(tmp_path / "again.csv")
  assert (got.ids.dtype.kind, got.ids.tolist()) == ("U", ids)
  np.testing.assert_array_equal(got.keep, selection.keep)
  np.testing.assert_array_equal(got.votes, selection.votes)
  # In its place, it is not what was written.
  (tmp_path / "again.csv").replace(path)
  with pytest.raises(ValueError, match=r"s\.csv is not what was written"):
    export.read_csv(path)


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
@pytest.mark.parametrize(
  "kind", [bool, np.int8, np.int64, np.float64, "strings"]
)
def test_parquet_of_other_tools(tmp_path, selection, kind, lists):
  keep = selection.keep
  votes = selection.votes.astype(np.int64)
  table = pa.table(
    {
      "votes": pa.array(votes.tolist(), lists(pa.int64())),
      "id": pa.array(selection.ids.astype(np.int32)),
      "keep": np.where(keep, "yes", "no")
      if kind == "strings"
      else (keep.astype(kind)),
      "keep_probability": selection.keep_probability,
      "quality": pa.nulls(len(keep)),
      "note": ["x"] * len(keep),
    }
  )
  pq.write_table(table, tmp_path / "s.parquet")
  got = export.read_parquet(tmp_path / "s.parquet")
  assert got.keep.dtype == bool
  np.testing.assert_array_equal(got.kept_ids, selection.kept_ids)
  np.testing.assert_array_equal(got.votes, selection.votes)
  assert got.votes.dtype == np.int8
  assert np.isnan(got.quality).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"keep": [0, 2]}, "keep holds 2"),
    ({"keep": pa.array([True, None])}, "row 2 has no keep"),
    ({"keep": [0.0, np.nan]}, "keep holds nan"),
    ({"id": pa.array(["a", None])}, "row 2 has no id"),
    ({"id": [1.0, 2.0]}, "id is of double"),
    ({"id": [True, False]}, "id is of bool"),
    ({"id": [-1, 2]}, "an id is -1"),
    ({"id": ["a", "a"]}, "the id 'a' comes 2 times"),
    ({"id": ["a\0", "b"]}, "end with NUL"),
    ({"votes": [[1], [1, 0]]}, r"lists of the lengths \[1, 2\]"),
    ({"votes": [[1], [3]]}, "a vote is 3"),
    ({"votes": [1, 0]}, "votes is of int64"),
    ({"votes": pa.array([[], []], pa.list_(pa.int8()))}, "0 columns of votes"),
    ({"keep_probability": [0.5, 7.0]}, "keep_probability holds 7"),
    ({"quality": [b"x", b"y"]}, "quality is of binary"),
  ],
)
def test_parquet_that_does_not_read(tmp_path, change, message):
  columns = {
    "id": ["a", "b"],
    "keep": [True, False],
    "keep_probability": [0.9, 0.1],
    "quality": [0.9, 0.1],
    "votes": [[1], [0]],
  }
  path = tmp_path / "s.parquet"
  pq.write_table(pa.table(columns | change), path)
  with pytest.raises(ValueError, match=message) as caught:
    export.read_parquet(path)
  assert str(path) in str(caught.value)


# Checksums, and what headers claim.


def test_a_file_goes_with_its_own_manifest_only(tmp_path):
  paths = [
    export.write_npy(tmp_path / f"{n}.npy", [n, 5], fingerprints={"n": str(n)})
    for n in (1, 2)
  ]
  one, two = (path.with_name(path.name + ".json") for path in paths)
  mine = one.read_bytes()
  one.write_bytes(two.read_bytes())
  with pytest.raises(ValueError, match=r"1\.npy is not what was written"):
    export.read_npy(paths[0])
  one.write_text('{"fingerprints": {"n": "1"}}')  # of the release before
  assert export.read_npy(paths[0]).tolist() == [1, 5]
  with pytest.raises(ValueError, match="different inputs"):
    export.read_npy(paths[0], fingerprints={"n": "2"})
  one.write_bytes(mine.replace(b'"1"', b'"2"'))
  with pytest.raises(ValueError, match=r"1\.npy\.json is damaged"):
    export.read_npy(paths[0])
  one.write_bytes(mine.replace(b'"version": 2', b'"version": 3'))
  with pytest.raises(ValueError, match=r"of version 3; .* reads up to 2"):
    export.read_npy(paths[0])
  one.unlink()  # as other tools leave their files
  assert export.read_npy(paths[0]).tolist() == [1, 5]


def test_a_checksum_is_that_of_the_file(tmp_path, selection):
  path = export.write_npy(tmp_path / "k.npy", [1, 2])
  about = json.loads((tmp_path / "k.npy.json").read_text())
  assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  path = export.write_parquet(tmp_path / "s.parquet", selection)
  whole = path.read_bytes()
  footer = pq.read_metadata(path).metadata
  about = json.loads(footer[b"gradmimic_selection"])
  stated = about["gradmimic_sha256"].encode()
  assert whole.count(stated) == 1
  blank = whole.replace(stated, b"0" * 64)
  assert hashlib.sha256(blank).hexdigest().encode() == stated
  # Another tool may write it again, or take what it likes of it.
  table = pq.read_table(path)
  for other in (table.slice(0, 9), table.replace_schema_metadata(None)):
    pq.write_table(other, path)
    got = export.read_parquet(path)
    assert got.ids.tolist() == selection.ids[: len(other)].tolist()
    np.testing.assert_array_equal(got.keep, selection.keep[: len(other)])


def test_a_parquet_file_of_the_release_before(tmp_path, selection):
  table = files_lib.to_table(selection, 0, 60)
  about = {"version": 1, "diagnostics": {"a": 1}, "fingerprints": {"d": "x"}}
  for change, message in (
    ({}, None),
    ({"version": 2}, "its checksum is gone"),
    ({"version": 3}, "of version 3"),
    ({"fingerprints": None}, "it has no fingerprints"),
    ({"diagnostics": []}, "it has no diagnostics"),
  ):
    metadata = {"gradmimic_selection": json.dumps(about | change)}
    path = tmp_path / "s.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path)
    if message is None:
      assert export.read_parquet(path).diagnostics == {"a": 1}
      continue
    with pytest.raises(ValueError, match=message):
      export.read_parquet(path)


def test_rows_that_are_not_there_take_no_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(files_lib, "_MAX_ROWS", 10)
  n = 50_000
  columns = {
    "id": np.zeros(n, np.int64),
    "keep": np.zeros(n, bool),
    "keep_probability": np.zeros(n),
    "quality": np.zeros(n),
    "votes": pa.FixedSizeListArray.from_arrays(np.zeros(n, np.int8), 1),
  }
  path = tmp_path / "s.parquet"
  pq.write_table(pa.table(columns), path, compression="zstd")
  assert path.stat().st_size < n / 10
  with pytest.raises(ValueError, match=r"s\.parquet .*claims 50,000 rows in"):
    export.read_parquet(path)


def npy_of(header, data=b""):
  text = header.encode().ljust(117) + b"\n"
  return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "doesn't begin as"),
    (b"\x93NUMPY", "EOF"),
    (b"\x93NUMPY\x01\0\xff\xff", "its header doesn't read"),
    (b"\x93NUMPY\x03\0" + bytes(80), r"version \(3, 0\)"),
    (
      npy_of("{'descr': '<i8', 'fortran_order': False, 'shape': (10**12,)}"),
      "its header doesn't read",
    ),
    (
      npy_of(
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}"
      ),
      "takes 8,000,000,000,000 bytes",
    ),
    (
      npy_of("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}"),
      r"claims shape \(-1,\)",
    ),
    (
      npy_of(
        "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,)}"
      ),
      "it holds <U0",
    ),
    (
      npy_of(
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"x" * 8
      ),
      "it holds object",
    ),
    (
      npy_of(
        "{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", b"\xff" * 4
      ),
      "no Unicode",
    ),
    (
      npy_of("{'descr': '<i8', 'fortran_order': False, 'shape': ()}", bytes(8)),
      r"shape \(\); expected \[n\]",
    ),
    (
      npy_of(
        "{'descr': '|b1', 'fortran_order': False, 'shape': (2,)}", b"\1\0"
      ),
      "dtype bool",
    ),
    (npy_of("(" * 100), "its header doesn't read"),
    (npy_of("[" * 117), "its header doesn't read"),
  ],
)
def test_npy_files_whose_headers_lie(tmp_path, content, message):
  (tmp_path / "k.npy").write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    export.read_npy(tmp_path / "k.npy")
  text = str(caught.value)
  assert "k.npy" in text
  assert "\n" not in text
  assert "pickle" not in text
  assert "trust" not in text


def test_arrays_of_other_tools(tmp_path):
  for array in (
    np.array([3, 1, 2], ">i4"),
    np.array([3, 1, 2], np.uint8),
    np.asfortranarray([3, 1, 2]),
  ):
    np.save(tmp_path / "k.npy", array)
    assert export.read_npy(tmp_path / "k.npy").tolist() == [1, 2, 3]
  np.save(tmp_path / "k.npy", np.array(["b", "a"], ">U5"))
  assert export.read_npy(tmp_path / "k.npy").tolist() == ["a", "b"]
  np.savez(tmp_path / "k.npz", a=np.arange(3))
  (tmp_path / "k.npz").replace(tmp_path / "k.npy")
  with pytest.raises(ValueError, match=r"an archive of several, \.npz"):
    export.read_npy(tmp_path / "k.npy")


def test_subset_files_without_a_header(tmp_path):
  pairs = uids.parse_uids(sorted(random_uids(30)))
  path = tmp_path / "s.npy"
  pairs.tofile(path)  # as np.memmap has it
  np.testing.assert_array_equal(export.read_datacomp_subset(path), pairs)
  whole = path.read_bytes()
  export.write_datacomp_subset(tmp_path / "t.npy", pairs)
  header = (tmp_path / "t.npy").read_bytes()
  for content, message in (
    (b"", "doesn't begin as"),
    (whole[:-1], "doesn't begin as"),
    (whole[16:] + whole[:16], "not sorted"),
    (whole + whole[-16:], "1 uids repeat"),
    (b"sixteen letters." * 2, "doesn't begin as"),
    (b"\x92" + header[1:], "doesn't begin as"),
    (b"PK\x03\x04" + bytes(12), "several"),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
      export.read_datacomp_subset(path)
    assert "s.npy" in str(caught.value)
  assert export.format_uids(pairs).to_pylist() == sorted(random_uids(30))


def test_json_that_is_deep_or_long(tmp_path):
  path = export.write_npy(tmp_path / "k.npy", [1, 2])
  for text, message in (
    ("[" * 10**5, "RecursionError"),
    ('{"a":' * 70 + "1" + "}" * 70, "deeper than 64"),
    (" " * (2 << 20), "expected at most 1,048,576"),
    ('{"a": ' + "1" * 5000 + "}", "digits"),
    ("", "Expecting value"),
    ("null", "a NoneType where a dict belongs"),
    ('{"fingerprints": null}', r"has \['fingerprints'\]"),
    ('{"fingerprints": {"a": 1}}', r"has \['fingerprints'\]"),
    ("\udcff", "utf-8"),
  ):
    beside = tmp_path / "k.npy.json"
    beside.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
      export.read_npy(path)
    assert "k.npy.json" in str(caught.value)


def test_temporary_files_follow_no_link_and_leave_nothing(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  name = "0" * 32
  (tmp_path / f".k.npy.{name}.tmp").symlink_to(victim)
  old = tmp_path / f".k.npy.{'1' * 32}.tmp"
  old.write_text("left by a killed writer")
  os.utime(old, (0, 0))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_files.uuid, "uuid4", lambda: uuid.UUID(hex=name))
    with pytest.raises(FileExistsError):
      export.write_npy(tmp_path / "k.npy", [1])
  assert victim.read_text() == "precious"
  export.write_npy(tmp_path / "k.npy", [1])
  assert not old.exists()
  assert export.read_npy(tmp_path / "k.npy").tolist() == [1]
