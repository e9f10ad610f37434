"""Decisions of a page: what the file says is what the selection becomes."""

import csv
import dataclasses

import numpy as np
import pytest

import gradmimic_jax as gm


@pytest.fixture
def selection():
  scores = np.array([[1.0], [-1.0], [2.0], [-2.0], [3.0]])
  return gm.select(scores, binarize="threshold")


def written(tmp_path, text, name="d.csv"):
  path = tmp_path / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_a_person_overrules_the_scores(selection, tmp_path):
  path = written(
    tmp_path, "id,decision,label\n1,keep,\n0,remove,\n3,relabel,7\n"
  )
  decisions = gm.read_decisions(path)
  changed = decisions.apply(selection)
  assert changed.keep.tolist() == [False, True, True, True, True]
  assert selection.keep.tolist() == [True, False, True, False, True]
  about = changed.diagnostics["decisions"]
  assert (about["to_keep"], about["to_remove"], about["relabelled"]) == (
    2,
    1,
    1,
  )
  assert changed.diagnostics["n_kept"] == 4
  labels = decisions.relabel(selection.ids, np.zeros(5, np.int32))
  assert labels.tolist() == [0, 0, 0, 7, 0]
  assert labels.dtype == np.int32
  # It is a selection like any other: files keep it.
  kept = gm.export.read_parquet(
    gm.export.write_parquet(tmp_path / "s.parquet", changed)
  )
  assert kept.keep.tolist() == changed.keep.tolist()
  assert "1 relabel" in repr(decisions)


def test_names_of_classes_become_labels(tmp_path):
  path = written(tmp_path, 'id,decision,label\n"b",relabel,"a longer name"\n')
  decisions = gm.read_decisions(path)
  labels = decisions.relabel(["a", "b"], ["x", "y"])
  assert labels.tolist() == ["x", "a longer name"]
  names = ["x", "a longer name"]
  assert decisions.relabel(["a", "b"], [0, 0], class_names=names)[1] == 1
  with pytest.raises(ValueError, match="'a longer name'; expected an integer"):
    decisions.relabel(["a", "b"], [0, 0])


def test_a_whole_file_is_a_filter_and_changes_are_none(tmp_path):
  whole = written(
    tmp_path,
    '"id","decision","label","by"\n4,keep,,person\n1,relabel,2,person\n'
    "3,remove,,selection\n",
  )
  decisions = gm.read_decisions(whole)
  assert decisions.by_person.tolist() == [True, True, False]
  assert not decisions.unsure
  kept = gm.filters.of_decisions(decisions, range(6))
  assert kept.ids.tolist() == [0, 2, 4, 5]
  assert (~kept).ids.tolist() == [1, 3]
  named = {"mine": decisions, "short": [0, 1]}
  ids = gm.filters.compose("mine - short", named, pool=range(6))
  assert ids.tolist() == [2, 4, 5]
  with pytest.raises(ValueError, match=r"'mine' is <Decisions .*give pool="):
    gm.filters.compose("mine - short", named)
  changes = gm.read_decisions(written(tmp_path, "id,decision\n1,remove\n"))
  with pytest.raises(ValueError, match="lists changes to a selection"):
    gm.filters.of_decisions(changes, range(6))
  assert changes.unsure  # "1" may have been text


def test_a_page_without_removals_keeps_all(selection, tmp_path):
  path = written(tmp_path, '"id","decision","label","by"\n')
  decisions = gm.read_decisions(path)
  assert gm.filters.of_decisions(decisions, ["a", "b"]).ids.tolist() == [
    "a",
    "b",
  ]
  assert decisions.apply(selection).keep.tolist() == selection.keep.tolist()


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_another_tool_may_save_it_again(tmp_path, quoting):
  """Against Python's own csv, with what spreadsheets would run or break."""
  ids = ["=1+1", "007", 'a"b', "c,d", "e\nf", "'g", "\u05d0", " -h"]
  path = tmp_path / "d.csv"
  with open(path, "w", newline="") as file:
    rows = csv.writer(file, quoting=quoting)
    rows.writerow(["id", "decision", "label", "by"])
    for one in ids:
      rows.writerow([gm.export.harmless(one), "Remove ", "", "person"])
  decisions = gm.read_decisions(path)
  assert decisions.ids.tolist() == ids
  assert gm.filters.of_decisions(decisions, [*ids, "rest"]).ids.tolist() == [
    "rest"
  ]


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "it is empty"),
    ("id,keep\n1,true\n", r"columns \['id', 'keep'\]"),
    ("id,decision\n1,maybe\n", "row 1 has the decision 'maybe'"),
    ("id,decision\n1,keep\n1,remove\n", "1 comes 2 times"),
    ("id,decision\n1,relabel\n", "relabels a sample without a label"),
    ("id,decision,by\n1,keep,robot\n", "the by 'robot'"),
    ("id,decision\n1.5,keep\n", "1.5"),
    (b"id,decision\n\xff,keep\n", "damaged"),
    ('id,decision\n"1,keep\n', "Expected 2 columns"),
  ],
)
def test_what_is_no_table_of_decisions_is_refused(tmp_path, text, words):
  path = written(tmp_path, text)
  with pytest.raises(ValueError, match=words) as caught:
    gm.read_decisions(path)
  assert str(path) in str(caught.value)


def test_decisions_on_other_data_are_refused(selection, tmp_path):
  path = written(tmp_path, "id,decision\n1,keep\n99,remove\n")
  decisions = gm.read_decisions(path)
  with pytest.raises(ValueError, match=r"1 of the 2 ids .* first is 99"):
    decisions.apply(selection)
  named = dataclasses.replace(selection, ids=np.array(list("abcde")))
  with pytest.raises(ValueError, match="in different ways"):
    decisions.apply(named)
