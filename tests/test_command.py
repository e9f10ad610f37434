"""The command: from tables to lists, and mistakes in one line."""

import csv
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradmimic_jax as gm
from gradmimic_jax.command import images as images_lib, labels, main, tables

N = 40
WRONG = np.arange(N) % 4 == 0
NAMES = np.array(["cat", "dog", "=fox()"])
LABELS = NAMES[np.arange(N) % 3]


def scores(n_steps=3):
  rng = np.random.default_rng(0)
  return rng.normal(np.where(WRONG, -2, 2), 0.4, (n_steps, N)).T.round(4)


def write_csv(path, header, rows):
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows(rows)
  return path


def wide(path, ids, **columns):
  """A table of three steps, with more columns before them."""
  header = ["uid", *columns, "s_0", "s_1", "s_2"]
  rows = zip(ids, *columns.values(), *scores().T, strict=True)
  return write_csv(path, header, rows)


def read_csv(path):
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


def run(capsys, *arguments):
  """The status, and the lines of both outputs."""
  try:
    status = main.run([str(argument) for argument in arguments])
  except SystemExit as stop:  # argparse
    status = stop.code
  done = capsys.readouterr()
  return status, done.out.splitlines(), done.err.splitlines()


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


# What comes of it.


def test_a_wide_table_becomes_lists_a_selection_and_a_page(folder, capsys):
  ids = [f"{i:03d}" for i in range(N)]  # which are no numbers
  wide("t.csv", ids, label=LABELS)
  status, lines, notes = run(
    capsys,
    *("curate", "t.csv", "--labels", "label", "--out", "out"),
    *("--title", "<b>T</b>"),
  )
  assert (status, len(lines), notes) == (0, 3, [])
  assert "of 40 samples look clean" in lines[0]
  assert lines[1:] == [
    "remove 10: out/remove.csv; keep 30: out/keep.csv",
    "look at out/report.html",
  ]
  selection = gm.export.read_parquet("out/selection.parquet")
  expected = gm.select(scores(), ids=ids)
  np.testing.assert_array_equal(selection.keep, ~WRONG)
  np.testing.assert_array_equal(selection.quality, expected.quality)
  removed, kept = read_csv("out/remove.csv"), read_csv("out/keep.csv")
  good = [ids[i] for i in np.flatnonzero(~WRONG)]
  assert [row["uid"] for row in kept] == good
  worst = np.argsort(expected.quality, kind="stable")[:10]
  assert [row["uid"] for row in removed] == [ids[i] for i in worst]
  # No spreadsheet runs what is in them.
  by_id = dict(zip(ids, LABELS, strict=True))
  for row in removed + kept:
    assert row["label"] == by_id[row["uid"]].replace("=", "'=")
  page = (folder / "out/report.html").read_text()
  assert "=fox()" in page
  assert "<b>T</b>" not in page
  about = json.loads((folder / "out/manifest.json").read_text())
  assert about["input"]["columns"] == ["s_0", "s_1", "s_2"]
  assert (about["samples"], about["removed"]) == (N, 10)

  # Once more is the same; another table is refused.
  before = (folder / "out/keep.csv").read_bytes()
  assert run(capsys, "curate", "t.csv", "--out", "out")[0] == 0
  assert (folder / "out/keep.csv").read_bytes() != before  # without labels
  wide("t.csv", ids[::-1], label=LABELS)
  status, _, (error,) = run(capsys, "curate", "t.csv", "--out", "out")
  assert status == 2
  assert "lies already" in error

  # The lists and the selection are filters, too.
  for name in ("remove.csv", "keep.csv"):
    status, (line,), _ = run(
      capsys,
      *("filter", "list", "--set", "all=out/selection.parquet"),
      *("--set", f"list=out/{name}", "--out", "f.npy"),
    )
    assert status == 0
    found = set(gm.export.read_npy("f.npy").tolist())
    assert found == (set(ids) - set(good) if "remove" in name else set(good))
    assert line.endswith("of 40 ids: f.npy")

  # Inspection tells that they are whole, and that one is not.
  files = ("report.html", "remove.csv", "keep.csv", "selection.parquet")
  for path in ("out", "out/manifest.json"):
    status, lines, _ = run(capsys, "inspect", path)
    assert (status, lines[1:]) == (
      0,
      [f"  {name}: whole" for name in files],
    )
  (folder / "out/keep.csv").write_text("id\n1\n")
  for path in ("out", "out/keep.csv"):
    status, lines, _ = run(capsys, "inspect", path)
    assert status == 1
    assert "damaged" in lines[-1]
    assert "changed since it was written" in lines[-1]


def read(path, **options):
  wanted = {"id_name": None, "scores": None, "others": [], **options}
  return tables.read_wide(tables.File(path), **wanted)


def test_long_tables_are_wide_ones(folder):
  ids = [f"{i:03d}" for i in range(N)]
  rows = [
    [ids[i], step, scores()[i, t]]
    for t, step in enumerate((0, 5, 10))
    for i in range(N)
    if (i, t) != (7, 1)
  ]
  rng = np.random.default_rng(1)
  rng.shuffle(rows)
  path = folder / "long.csv"
  write_csv(path, ["name", "step", "score"], rows)
  table = tables.read_long(tables.File(path), "name, step,score")
  assert table.steps == ["0", "5", "10"]
  assert table.ids.tolist() == list(dict.fromkeys(row[0] for row in rows))
  expected = scores()
  expected[7, 1] = np.nan
  places = [ids.index(one) for one in table.ids]
  np.testing.assert_array_equal(table.scores, expected[places])
  assert [rows[row][0] for row in table.rows] == table.ids.tolist()


def test_tables_of_all_kinds_say_the_same(folder):
  wide("t.csv", range(7, 7 + N), kind=LABELS)
  wanted = read(folder / "t.csv")
  assert wanted.ids.tolist() == list(range(7, 7 + N))
  assert wanted.steps == ["s_0", "s_1", "s_2"]
  assert wanted.notes == ["left out, as text: 'kind'"]
  np.testing.assert_array_equal(wanted.scores, scores())
  text = (folder / "t.csv").read_text()
  (folder / "t.tsv").write_text(text.replace(",", "\t"))
  lines = text.splitlines()
  quoted = ['"' + line.replace(",", '","') + '"' for line in lines]
  (folder / "quoted.csv").write_text("\ufeff" + "\r\n".join(quoted))
  frame = pa.table(
    {
      "uid": np.arange(7, 7 + N),
      "kind": LABELS.tolist(),
      **{f"s_{t}": scores()[:, t] for t in range(3)},
    }
  )
  pq.write_table(frame, folder / "t.parquet")
  (folder / "semi.csv").write_text(text.replace(",", ";"))
  for name in ("t.tsv", "quoted.csv", "semi.csv", "t.parquet"):
    found = read(folder / name)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    assert (found.steps, found.notes) == (wanted.steps, wanted.notes)


def test_columns_of_scores_are_named_or_fit_a_pattern(folder):
  wide("t.csv", range(N), count=np.arange(N) % 5)
  for text, names in (
    ("s_*", ["s_0", "s_1", "s_2"]),
    ("s_2, s_0", ["s_2", "s_0"]),
    ("count", ["count"]),
    ("count,s_[01]", ["count", "s_0", "s_1"]),
  ):
    assert read(folder / "t.csv", scores=text).steps == names


def test_the_index_that_pandas_writes_becomes_the_ids(folder):
  rows = [[f"x{i}", 0.5 * i - 3.1] for i in range(N)]
  write_csv("t.csv", ["", "score"], rows)
  found = read(folder / "t.csv")
  assert found.ids[:2].tolist() == ["x0", "x1"]
  write_csv("t.csv", ["score"], [row[1:] for row in rows])
  found = read(folder / "t.csv")
  assert found.ids.tolist() == list(range(N))
  assert found.notes[0].endswith("numbered by row, from 0")


def test_a_column_of_names_is_pointed_at(folder):
  rows = [["cat" if i % 2 else "dog", f"{i}.jpg", i - 3.5] for i in range(N)]
  write_csv("t.csv", ["kind", "file name", "score"], rows)
  found = read(folder / "t.csv")
  assert found.ids.tolist() == list(range(N))
  told = "from 0; if 'file name' names them: --id 'file name'"
  assert found.notes[-1].endswith(told)


def test_missing_scores_are_nan(folder):
  rows = [
    [i, "" if i else 0.5, ["NA", "nan", "Null", "1e-3"][i % 4]]
    for i in range(8)
  ]
  write_csv("t.csv", ["id", "a", "b"], rows)
  found = read(folder / "t.csv", scores="a,b").scores
  assert np.isfinite(found).sum() == 3
  np.testing.assert_array_equal(found[3], [np.nan, 1e-3])


def test_labels_come_from_files_by_id_or_in_order(folder):
  ids = np.array([3, 1, 2])
  (folder / "l.txt").write_text("a\nb\nc\n")
  np.save("l.npy", np.array([5, 6, 7]))
  write_csv("l.csv", ["id", "label"], [[1, "b"], [2, "c"], [3, "a"], [9, "z"]])
  pq.write_table(pa.table({"y": [5, 6, 7]}), "l.parquet")
  for name, expected in (
    ("l.txt", ["a", "b", "c"]),
    ("l.npy", [5, 6, 7]),
    ("l.csv", ["a", "b", "c"]),
    ("l.parquet", [5, 6, 7]),
  ):
    assert labels.read_labels(name, ids, None).tolist() == expected


def test_a_ledger_is_curated_with_zero_as_its_mark(folder, capsys):
  with gm.ScoreLedger("run/ledger", fingerprints={"data": "d"}) as ledger:
    for step, column in enumerate(scores().T):
      ledger.append(np.arange(N), column, step=step, epoch=step)
  np.save("labels.npy", np.arange(N) % 3)
  status, lines, _ = run(
    capsys,
    *("curate", "run/ledger", "--labels", "labels.npy", "--out", "out"),
  )
  assert status == 0
  assert lines[1].startswith("remove 10:")
  selection = gm.export.read_parquet("out/selection.parquet")
  assert selection.diagnostics["mark"] == 0
  assert selection.diagnostics["fingerprints"] == {"data": "d"}
  status, lines, _ = run(capsys, "inspect", "run/ledger")
  assert status == 0
  assert lines[1:3] == [
    "  data: d",
    "  120 rows: 40 samples with integer ids, 3 epochs (0 to 2), steps 0 to 2",
  ]
  (file,) = (folder / "run/ledger").glob("rows-*")
  content = bytearray(file.read_bytes())
  content[40] ^= 1
  file.write_bytes(content)
  status, lines, _ = run(capsys, "inspect", "run/ledger")
  assert status == 1
  assert "torn or garbled" in lines[-1]


# Images.


def save_images(folder, names, size=(6, 4)):
  image_lib = pytest.importorskip("PIL.Image")
  folder.mkdir(exist_ok=True)
  for i, name in enumerate(names):
    pixels = np.full((size[1], size[0], 3), 10 * i, np.uint8)
    (folder / name).parent.mkdir(exist_ok=True)
    image_lib.fromarray(pixels).save(folder / name)


@pytest.mark.parametrize(
  ("names", "ids", "columns", "how"),
  [
    (["a.png", "b.jpg", "c.png"], ["a", "b", "c"], {}, "by id"),
    (["x/a.png", "b.png", "c.png"], ["x/a.png", "b.png", "c.png"], {}, "by id"),
    (["007.png", "8.png", "000.png"], [7, 8, 0], {}, "by number"),
    (
      ["p.png", "q.png", "r.png"],
      [1, 2, 3],
      {"note": ["u", "v", "w"], "file": ["p.png", "q.png", "r.png"]},
      "by column 'file'",
    ),
    (
      ["p.png", "q.png", "r.png"],
      [1, 2, 3],
      {"file": ["C:\\d\\p.png", "/data/q.png", "r.png"]},
      "by the names in column 'file'",
    ),
    (["p.png", "q.png", "r.png"], [0, 1, 2], {}, "in the order of their names"),
  ],
)
def test_images_are_found(folder, names, ids, columns, how):
  save_images(folder / "im", names)
  found, said = images_lib.in_folder(
    folder / "im",
    np.array(ids),
    list(columns),
    lambda name: np.array(columns[name]),
  )
  assert said == how
  assert [
    path.relative_to(folder / "im").as_posix() for path in found.paths
  ] == names
  for i in range(3):
    assert found[i].shape == (4, 6, 3)
    assert abs(int(found[i][0, 0, 0]) - 10 * i) < 4  # JPEG is not exact


def test_images_that_are_missing_or_damaged_are_told(folder):
  save_images(folder / "im", ["0.png", "1.png", "2.png"], size=(2000, 10))
  (folder / "im/1.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
  found, _ = images_lib.in_folder(
    folder / "im", np.array([0, 1, 2, 3]), [], lambda name: name
  )
  assert found[0].shape[:2] == (3, 512)
  with pytest.raises((ValueError, OSError), match=r"1\.png"):
    found[1]
  with pytest.raises(ValueError, match="no image was found"):
    found[3]


def test_an_image_of_too_many_pixels_is_not_decoded(folder, monkeypatch):
  image_lib = pytest.importorskip("PIL.Image")
  save_images(folder / "im", ["0.png"], size=(100, 100))
  monkeypatch.setattr(image_lib, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises((image_lib.DecompressionBombError, Warning)):
    images_lib.decode(folder / "im/0.png")


# Filters.


def test_filters_combine_by_their_pool(folder, capsys):
  write_csv("short.csv", ["id", "words"], [[i, 2] for i in range(0, 10)])
  rows = [[0, "keep", "", "person"], [1, "remove", "", "selection"]]
  write_csv("decided.csv", ["id", "decision", "label", "by"], rows)
  write_csv("changes.csv", ["id", "decision"], [row[:2] for row in rows])
  np.save("mask.npy", np.arange(N) < 30)
  selection = gm.select(scores(), binarize="threshold")
  gm.export.write_parquet("s.parquet", selection)
  kept = set(np.flatnonzero(~WRONG).tolist())
  for expression, expected in (
    ("mimic & ~short", kept - set(range(10))),
    ("mimic & mask", kept & set(range(30))),
    ("decided", set(range(N)) - {1}),
  ):
    status, (line,), notes = run(
      capsys,
      *("filter", expression, "--set", "mimic=s.parquet"),
      *("--set", "short=short.csv", "--set", "mask=mask.npy"),
      *("--set", "decided=decided.csv", "--out", "f.csv", "--pool", "mask.npy"),
    )
    assert (status, notes) == (0, [])
    assert gm.export.read_filter("f.csv").ids.tolist() == sorted(expected)
    assert line.endswith(f" {len(expected)} of 40 ids: f.csv")
  status, _, _ = run(
    capsys,
    *("filter", "changes", "--set", "mimic=s.parquet"),
    *("--set", "changes=changes.csv", "--out", "f.csv"),
  )
  assert set(gm.export.read_filter("f.csv").ids) == (kept | {0}) - {1}
  _, lines, _ = run(capsys, "inspect", "decided.csv")
  assert "1 keep, 1 remove, 0 relabel; 1 by a person" in lines[0]
  _, lines, _ = run(capsys, "inspect", "f.csv")
  assert lines == [
    "f.csv: a filter of 30 ids, 0 to 39",
    "  whole: its checksum is right",
  ]
  (folder / "f.csv").write_text("id\n1\n")
  assert run(capsys, "inspect", "f.csv")[0] == 1


def test_ids_of_other_samples_are_left_out_with_a_note(folder, capsys):
  write_csv("short.csv", ["id"], [[1], [99]])
  np.save("all.npy", np.arange(N))
  status, _, (note,) = run(
    capsys,
    *("filter", "~short", "--set", "short=short.csv", "--pool", "all.npy"),
    *("--out", "f.npy"),
  )
  assert status == 0
  assert "1 of the 2 ids of 'short' are none of the 40" in note
  assert len(gm.export.read_npy("f.npy")) == N - 1


def test_uids_become_a_datacomp_subset(folder, capsys):
  uids = [f"{i:032x}" for i in (5, 3)]
  write_csv("u.csv", ["uid"], [[uid] for uid in uids])
  status, (line,), _ = run(
    capsys, "filter", "a", "--set", "a=u.csv", "--out", "f.npy"
  )
  assert status == 0
  assert "2 uids, as a DataComp subset" in line
  pairs = gm.export.read_datacomp_subset("f.npy")
  assert gm.export.format_uids(pairs).to_pylist() == sorted(uids)
  _, lines, _ = run(capsys, "inspect", "f.npy")
  assert lines[0] == "f.npy: a DataComp subset of 2 uids"
  assert "whole" in lines[-1]


def test_inspection_of_what_it_does_not_know(folder, capsys):
  np.save("mask.npy", np.array([True, False]))
  (folder / "x.json").write_text('{"a": 1}')
  pq.write_table(pa.table({"a": [1]}), "t.parquet")
  for name, text in (
    ("mask.npy", "a mask of 2 samples, 1 of them True"),
    ("x.json", "JSON with 'a'"),
    ("t.parquet", "a table of 1 rows with the columns 'a'"),
  ):
    status, lines, _ = run(capsys, "inspect", name)
    assert status == 0
    assert text in lines[0]
    assert "can't be told" in lines[-1]
  (folder / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
  status, lines, _ = run(capsys, "inspect", "bad.npy")
  assert (status, "damaged" in lines[-1]) == (1, True)


# Mistakes.

_CURATE = ("curate", "t.csv", "--out", "out")
MISTAKES = {
  "no such file": (
    ("curate", "x.csv", "--out", "out"),
    "there is no such file",
  ),
  "another kind of file": (
    ("curate", "t.xlsx", "--out", "out"),
    "expected a table, one of .csv",
  ),
  "an empty file": (("curate", "empty.csv", "--out", "out"), "is empty"),
  "no rows": (("curate", "header.csv", "--out", "out"), "it has no rows"),
  "a folder that is no ledger": (
    ("curate", "images", "--out", "out"),
    "no ledger's",
  ),
  "a folder of tables": (
    ("curate", ".", "--out", "out"),
    "Give a file in it, such as",
  ),
  "no such column of ids": (
    (*_CURATE, "--id", "udi"),
    "no such column; did you mean 'uid'?",
  ),
  "no such column of scores": (
    (*_CURATE, "--scores", "s_0,s_9"),
    "no such column; did you mean",
  ),
  "a pattern that fits nothing": (
    (*_CURATE, "--scores", "step_*"),
    "which no column fits",
  ),
  "ids that repeat": (
    ("curate", "long.csv", "--out", "out"),
    "--long id,step,score",
  ),
  "long with too few columns": (
    ("curate", "long.csv", "--long", "id,step", "--out", "out"),
    "expected the names of three columns",
  ),
  "a sample twice in a step": (
    ("curate", "twice.csv", "--long", "id,step,score", "--out", "out"),
    "2 scores of step",
  ),
  "long and wide": (
    (
      "curate",
      "long.csv",
      "--long",
      "id,step,score",
      "--id",
      "id",
      "--out",
      "o",
    ),
    "leave --id and --scores out",
  ),
  "ids and steps swapped": (
    ("curate", "long.csv", "--long", "step,score,id", "--out", "out"),
    "are they swapped",
  ),
  "scores as text": (
    (*_CURATE, "--scores", "kind"),
    "holds text, such as 'cat' in row 1",
  ),
  "a text among the scores": (
    ("curate", "oops.csv", "--out", "out"),
    "holds text, such as 'oops' in row 3",
  ),
  "decimal commas": (
    ("curate", "commas.tsv", "--out", "out"),
    "write 0.5, not 0,5",
  ),
  "no scores": (("curate", "none.csv", "--out", "out"), "no column of scores"),
  "nothing but nan": (
    (*("curate", "nan.csv"), "--scores", "a", "--out", "out"),
    "no finite number",
  ),
  "an id among the scores": (
    ("curate", "row.csv", "--out", "out"),
    "column 'number' looks like ids or counts",
  ),
  "two columns of ids": (
    ("curate", "two.csv", "--out", "out"),
    "say which: --id image_id",
  ),
  "two columns of one name": (
    ("curate", "double.csv", "--out", "out"),
    "2 columns 'a'",
  ),
  "labels of another length": (
    (*_CURATE, "--labels", "labels.npy"),
    "has 3 labels, and there are 40 samples",
  ),
  "labels from nowhere": (
    (*_CURATE, "--labels", "lable"),
    "neither a column of t.csv nor a file",
  ),
  "labels of other samples": (
    (*_CURATE, "--labels", "labels.csv"),
    "has no label for 39 of 40 samples",
  ),
  "images from nowhere": (
    (*_CURATE, "--images", "imgs"),
    "neither a folder nor a column",
  ),
  "a folder without images": ((*_CURATE, "--images", "."), "has no images"),
  "images of other samples": (
    (*_CURATE, "--images", "images"),
    "none of the 1 images",
  ),
  "a column that has no images": (
    (*_CURATE, "--images", "kind"),
    "none of the 40 files of that column is there",
  ),
  "an output that is a file": (
    ("curate", "t.csv", "--out", "t.csv"),
    "which is a file",
  ),
  "an output that can't be written": (
    ("curate", "t.csv", "--out", "t.csv/out"),
    "nothing can be written",
  ),
  "an output of another job": (
    ("curate", "t.csv", "--out", "other"),
    "another job's lies already",
  ),
  "no output": (("curate", "t.csv"), "required: --out"),
  "an unknown flag": ((*_CURATE, "--ids", "uid"), "unrecognized arguments"),
  "a ledger with columns": (
    ("curate", "ledger", "--id", "uid", "--out", "out"),
    "which brings its own ids",
  ),
  "no command": ((), "usage"),
  "an expression that doesn't read": (
    ("filter", "a &", "--set", "a=t.csv", "--out", "f.npy"),
    "expected a name, ~ or (",
  ),
  "a name without a file": (
    ("filter", "b", "--set", "a=t.csv", "--out", "f.npy"),
    "names 'b'; expected one of ['a']",
  ),
  "a set without a name": (
    ("filter", "a", "--set", "t.csv", "--out", "f.npy"),
    "--set short=short.csv",
  ),
  "not without a pool": (
    ("filter", "~a", "--set", "a=t.csv", "--out", "f.npy"),
    "has no pool",
  ),
  "an output of another kind": (
    ("filter", "a", "--set", "a=t.csv", "--out", "f.txt"),
    "end with .npy or .csv",
  ),
  "a table without ids": (
    ("filter", "a", "--set", "a=none.csv", "--out", "f.npy"),
    "expected one of ids, named id",
  ),
  "other samples altogether": (
    ("filter", "a", "--set=a=t.csv", "--pool", "far.npy", "--out", "f.npy"),
    "Are they of another data set?",
  ),
  "inspecting nothing": (("inspect", "nowhere"), "there is no such file"),
  "inspecting a picture": (("inspect", "t.xlsx"), "is none of .npy"),
}


@pytest.fixture(scope="module")
def with_mistakes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mistakes")
  wide(folder / "t.csv", range(N), kind=LABELS)
  (folder / "t.xlsx").write_bytes(b"PK")
  (folder / "empty.csv").write_bytes(b"")
  (folder / "header.csv").write_text("id,a\n")
  rows = [[i, t, 0.1 * i - t] for t in range(3) for i in range(N)]
  write_csv(folder / "long.csv", ["id", "step", "score"], rows)
  write_csv(folder / "twice.csv", ["id", "step", "score"], [*rows, rows[3]])
  oops = [[i, "oops" if i == 2 else 0.5 * i] for i in range(N)]
  write_csv(folder / "oops.csv", ["id", "a"], oops)
  (folder / "commas.tsv").write_text("id\ta\n1\t0,5\n2\t0,7\n")
  write_csv(folder / "none.csv", ["a", "b"], [["x", "y"]] * 3)
  write_csv(folder / "nan.csv", ["id", "a"], [[1, "nan"], [2, ""]])
  numbered = [[f"x{i}", i, 0.5 * i] for i in range(N)]
  write_csv(folder / "row.csv", ["id", "number", "a"], numbered)
  two = [[i, i, 0.5] for i in range(3)]
  write_csv(folder / "two.csv", ["image_id", "user_id", "a"], two)
  write_csv(folder / "double.csv", ["id", "a", "a"], two)
  np.save(folder / "labels.npy", np.arange(3))
  np.save(folder / "far.npy", np.arange(1000, 1010))
  write_csv(folder / "labels.csv", ["id", "label"], [[0, "a"], [77, "b"]])
  (folder / "images").mkdir()
  (folder / "images" / "zebra.png").write_bytes(b"")
  (folder / "other").mkdir()
  (folder / "other/manifest.json").write_text('{"samples": 3}')
  with gm.ScoreLedger(folder / "ledger") as ledger:
    ledger.append([1], [0.5], step=0, epoch=0)
  return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(
  with_mistakes, monkeypatch, capsys, name
):
  monkeypatch.chdir(with_mistakes)
  arguments, message = MISTAKES[name]
  before = sorted(with_mistakes.rglob("*"))
  if name == "a folder without images":
    monkeypatch.setattr(images_lib, "SUFFIXES", (".tiff",))
  status, lines, errors = run(capsys, *arguments)
  assert status == 2
  assert lines == []
  assert message in errors[0]
  assert len(errors) == 1 or name == "no command"
  assert sorted(with_mistakes.rglob("*")) == before


def test_help_and_inspection_do_not_wait_for_jax(folder):
  np.save("ids.npy", np.arange(3))
  code = (
    "import sys\n"
    "from gradmimic_jax.command import main\n"
    "for arguments in (['--help'], ['curate', '--help'], ['curate']):\n"
    "  try: main.run(arguments)\n"
    "  except SystemExit: pass\n"
    "light = {'jax', 'numpy', 'pyarrow', 'sklearn'} & set(sys.modules)\n"
    "main.run(['inspect', 'ids.npy'])\n"
    "main.run(['curate', 'nowhere.csv', '--out', 'o'])\n"
    "print(sorted(light), 'jax' in sys.modules, 'sklearn' in sys.modules)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.splitlines()[-1] == "[] False False"


@pytest.mark.slow
def test_the_docs_python_runs_as_printed(folder):
  pytest.importorskip("pandas")
  page = pathlib.Path(__file__).parents[1] / "docs" / "command.md"
  (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  header = ["image_id", "label", *(f"step_{t}" for t in range(5))]
  rows = zip([f"{i:05d}" for i in range(N)], LABELS, *scores(5).T, strict=True)
  write_csv("scores.csv", header, rows)
  names: dict = {}
  exec(block, names)
  assert names["frame"].loc["00004", ["label", "keep"]].tolist() == [
    "dog",
    False,
  ]
