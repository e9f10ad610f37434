"""Files: what is written is what is read, and bad files are refused."""

import csv
import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradmimic_jax.selection import export, filters, select, uids


@pytest.fixture
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
  monkeypatch.setattr(export, "_ROWS", 17)
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
  monkeypatch.setattr(export, "_ROWS", 17)
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
