"""Data frames in and out: whose scores they are is never guessed wrong."""

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

import gradmimic_jax as gm
from gradmimic_jax import _frames

SCORES = {"step_0": [0.1, -0.2, 0.3], "step_1": [0.5, -0.6, 0.7]}
MATRIX = np.array([[0.1, 0.5], [-0.2, -0.6], [0.3, 0.7]])


@pytest.fixture
def pd():
  return pytest.importorskip("pandas")


class Polars:
  """A frame of which nothing is known but its columns and Arrow's interface."""

  def __init__(self, table):
    self._table = table

  @property
  def columns(self):
    return self._table.column_names

  def __arrow_c_stream__(self, requested_schema=None):
    return self._table.__arrow_c_stream__(requested_schema)


def kinds(pd, columns):
  """The same frame by every maker."""
  table = pa.table(columns)
  yield pd.DataFrame(columns)
  yield table
  yield table.to_batches()[0]
  yield Polars(table)


def wrong_columns(pd):
  """Columns that are no scores, by what they are."""
  return {
    "integers": [5, 7, 9],
    "integers that repeat": [5, 5, 9],
    "ids of text": ["a", "b", "c"],
    "booleans": [True, True, False],
    "dates": pd.to_datetime(["2020-01-01"] * 3),
    "categories": pd.Categorical(["a", "b", "a"]),
    "id": [5.0, 7.0, 9.0],
    "Image_ID": [5.0, 7.0, 9.0],
    "label": [0.0, 1.0, 0.0],
    "true_label": [0.0, 1.0, 0.0],
    "Unnamed: 0": [0.0, 1.0, 2.0],
    "nullable integers": pd.array([5, None, 9], dtype="Int64"),
    "integers of Arrow": pd.array([5, 7, 9], dtype="int64[pyarrow]"),
  }


def test_a_column_that_is_no_scores_is_refused_by_name(pd):
  for name, values in wrong_columns(pd).items():
    frame = pd.DataFrame(SCORES).assign(**{name: values})
    for made in (frame, pa.Table.from_pandas(frame)):
      with pytest.raises(TypeError, match=rf"'{name}' .*none of scores"):
        _frames.read_scores(made, "scores")


def test_numbers_that_count_up_are_refused_whatever_their_name(pd):
  frame = pd.DataFrame({"s": np.linspace(-1, 1, 30), "n": np.arange(30.0)})
  with pytest.raises(TypeError, match=r"'n' \(double\) .*ids='n'"):
    gm.select(frame)
  frame["n"] += 0.5
  assert len(gm.select(frame, binarize="threshold")) == 30


def test_named_ids_and_the_index_become_the_ids(pd):
  table = {"key": ["x", "y", "z"], **SCORES}
  for frame in kinds(pd, table):
    with pytest.raises(TypeError, match=r"'key' .*say so: ids='key'"):
      gm.select(frame, binarize="threshold")
    found = gm.select(frame, ids="key", binarize="threshold")
    assert found.ids.tolist() == ["x", "y", "z"]
    assert found.keep.tolist() == [True, False, True]
    assert found.diagnostics["columns"] == list(SCORES)
  frame = pd.DataFrame(SCORES)
  for index, ids in (
    (None, [0, 1, 2]),
    (["x", "y", "z"], ["x", "y", "z"]),
    ([5, 3, 9], [5, 3, 9]),
    (range(1, 4), [1, 2, 3]),
    (pd.Categorical(["u", "v", "w"]), ["u", "v", "w"]),
  ):
    one = frame if index is None else frame.set_index(pd.Index(index))
    assert gm.select(one, binarize="threshold").ids.tolist() == ids
  assert gm.select(
    frame[frame.step_0 > 0], binarize="threshold"
  ).ids.tolist() == [0, 2]
  assert gm.select(frame, ids=[4, 5, 6], binarize="threshold").ids[0] == 4


def test_indices_that_are_no_ids_are_refused(pd):
  frame = pd.DataFrame(SCORES)
  for index in (
    pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"]),
    pd.MultiIndex.from_tuples([(0, 1), (0, 2), (1, 1)]),
    pd.Index([0.5, 1.5, 2.5]),
    pd.Index(["a", 1, None]),
  ):
    with pytest.raises(TypeError, match=r"whose index .*reset_index"):
      gm.select(frame.set_index(index))
  with pytest.raises(ValueError, match="ids repeat: 1 came 2 times"):
    gm.select(frame.set_index(pd.Index([1, 1, 2])))


def test_wrong_names_are_refused(pd):
  frame = pd.DataFrame(SCORES)
  with pytest.raises(ValueError, match=r"no column 'uid'; its columns"):
    gm.select(frame, ids="uid")
  with pytest.raises(TypeError, match="scores is no data frame"):
    gm.select(MATRIX, ids="uid")
  with pytest.raises(TypeError, match="scores is no data frame"):
    gm.find_label_issues(MATRIX, "label")
  with pytest.raises(ValueError, match="expected columns of scores besides"):
    gm.select(pd.DataFrame({"id": ["a"]}), ids="id")
  doubled = pa.Table.from_arrays([pa.array([0.1]), pa.array([0.2])], ["a", "a"])
  with pytest.raises(ValueError, match="2 columns 'a'"):
    gm.select(doubled)

  class Unknown:
    def __dataframe__(self):
      raise NotImplementedError

  with pytest.raises(TypeError, match="that can't be looked into"):
    gm.select(Unknown())


def test_frames_give_what_arrays_give(pd):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(60, 2))
  columns = {"s 0": scores[:, 0], "s 1": scores[:, 1]}
  labels = ["a", "b", "b"] * 20
  options = {"binarize": "threshold"}
  least = {"min_examples_per_class": 30, **options}
  balanced = {"class_balanced": True, **options}
  expected = gm.find_label_issues(scores, labels, **least)
  assert 0 < expected.sum() < gm.find_label_issues(scores, **options).sum()
  quality = gm.label_quality_scores(scores, **options)
  best = gm.subset(scores, 6, labels=labels, **balanced)
  for frame in kinds(pd, columns):
    found = gm.label_quality_scores(frame, **options)
    np.testing.assert_array_equal(found, quality)
  for frame in kinds(pd, {"label_of": labels, **columns}):
    found = gm.find_label_issues(frame, "label_of", **least)
    np.testing.assert_array_equal(found, expected)
    found = gm.subset(frame, 6, labels="label_of", **balanced)
    np.testing.assert_array_equal(found, best)


def test_missing_numbers_are_nan_and_float32_stays(pd):
  frame = pd.DataFrame({"a": pd.array([1.0, None], dtype="Float32")})
  found = _frames.read_scores(frame, "scores").values
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, [[1.0], [np.nan]])


def test_a_report_takes_the_frame_that_was_selected_from(pd, tmp_path):
  frame = pd.DataFrame({"key": ["x", "y", "z"], **SCORES, "more": ["a"] * 3})
  kept = frame.drop(columns="more")
  selection = gm.select(kept, ids="key", binarize="threshold")
  page = gm.report(frame, selection, tmp_path / "r.html").read_bytes()
  array = gm.select(MATRIX, ids=["x", "y", "z"], binarize="threshold")
  assert page == gm.report(MATRIX, array, tmp_path / "s.html").read_bytes()
  with pytest.raises(TypeError, match=r"ledger is a pandas.*none of scores"):
    gm.report(frame, array, tmp_path / "r.html")


def test_a_report_takes_facts_about_samples_from_a_frame(pd, tmp_path):
  facts = {
    "labels": ["cat", "dog", "cat"],
    "suggested": ["cat", "cat", "cat"],
    "captions": ["one", "two", "three"],
  }
  ids = ["x", "y", "z"]
  selection = gm.select(MATRIX, ids=ids, binarize="threshold")

  def page_of(dataset, columns=None):
    path = tmp_path / "r.html"
    gm.report(MATRIX, selection, path, dataset=dataset, columns=columns)
    return path.with_suffix(".json").read_text()

  expected = page_of({"ids": ids, **facts})
  assert '"suggested":"cat"' in expected
  named = {"id": ids, "label": facts["labels"], "caption": facts["captions"]}
  named |= {"suggested": facts["suggested"], **SCORES}
  for frame in kinds(pd, named):
    assert page_of(frame) == expected
  frame = pd.DataFrame(facts, index=ids).assign(images=[{1}, {2}, {3}])
  assert page_of(frame) == expected
  frame = frame.rename(columns={"labels": "given"})
  own = {"labels": "given"}
  assert page_of(frame, own) == page_of({"ids": ids, **facts}, own)
  with pytest.raises(ValueError, match="dataset has no column 'given'"):
    page_of(pd.DataFrame({"id": ids, "other": [1, 2, 3]}), own)
  with pytest.raises(ValueError, match=r"columns \['a'\]; expected some"):
    page_of(pd.DataFrame({"a": [1, 2, 3]}, index=ids))


def test_a_ledger_takes_frames(pd, tmp_path):
  columns = {"id": ["x", "y"], "score": [0.5, -1.0], "loss": [1.0, 2.0]}
  for i, frame in enumerate(kinds(pd, columns)):
    with gm.ScoreLedger(tmp_path / str(i)) as ledger:
      ledger.append(frame, step=0, epoch=0)
    assert ledger.table().select(list(columns)).to_pydict() == columns
    assert ledger.table()["weight"].null_count == 2
  ledger = gm.ScoreLedger(tmp_path / "index")
  ledger.append(pd.DataFrame({"score": [0.5]}, index=[7]), step=0, epoch=0)
  assert ledger.matrix()[0].tolist() == [7]
  for frame, match in (
    (pd.DataFrame({"score": [0.5]}), "neither a column id nor an index"),
    (pd.DataFrame({"id": [1]}), "expected id, score"),
    (pd.DataFrame({"id": [1], "score": [0.5], "x": 1}), "expected id, score"),
  ):
    with pytest.raises(ValueError, match=match):
      ledger.append(frame, step=0, epoch=0)
  with pytest.raises(TypeError, match="came twice"):
    ledger.append(frame, [0.5], step=0, epoch=0)


def test_what_is_no_frame_passes(pd):
  for value in (
    np.ones((2, 2)),
    jnp.ones((2, 2)),
    [[1.0], [2.0]],
    ((1.0,), (2.0,)),
    {"columns": 1},
    pd.Series([1.0, 2.0]),
    pa.array([1.0]),
    None,
    3,
  ):
    assert not _frames.is_frame(value)


def found_things():
  """What has tables, with the columns and rows of each."""
  ids = ["<b>a</b>", "b", "c"]
  selection = gm.select(MATRIX, ids=ids, binarize="threshold")
  votes = ["vote_0", "vote_1"]
  uids = gm.export.parse_uids(["0" * 31 + "a"])
  return (
    (selection, ["id", "keep", "keep_probability", "quality", *votes], 3),
    (gm.removal_curve(selection), ["removed", "precision", "recall"], 3),
    (gm.dataset_quality(selection), list(gm.DatasetQuality._fields), 1),
    (gm.discover_members(selection), ["id"], 2),
    (gm.filters.of_selection(selection, "<i>"), ["id"], 2),
    (gm.filters.Filter(uids), ["id"], 1),
  )


def test_findings_become_tables_and_pages_of_notebooks(pd):
  for value, columns, n_rows in found_things():
    table = value.to_arrow()
    assert (table.column_names, len(table)) == (columns, n_rows)
    frame = value.to_pandas()
    index = [frame.index.name] if frame.index.name else []
    assert [*index, *frame.columns] == columns
    page = value._repr_html_()
    assert "<b>" not in page
    assert "<i>" not in page
    assert len(repr(value)) < 200
  selection = found_things()[0][0]
  joined = pd.DataFrame({"x": [1, 2]}, index=["c", "b"]).join(
    selection.to_pandas()
  )
  assert joined.keep.tolist() == [True, False]


def test_long_tables_show_their_first_rows():
  many = gm.select(np.tile(MATRIX, (40, 20)), binarize="threshold")
  page = many._repr_html_()
  assert page.count("<tr>") == 11
  assert "110 more rows, 32 more columns" in page


@pytest.mark.slow
def test_polars_and_duckdb_frames(tmp_path):
  polars = pytest.importorskip("polars")
  duckdb = pytest.importorskip("duckdb")
  frame = polars.DataFrame({"uid": ["x", "y", "z"], **SCORES})
  relation = duckdb.sql("select * from frame")
  for one in (frame, relation, frame.lazy().collect()):
    with pytest.raises(TypeError, match="ids='uid'"):
      gm.select(one)
    found = gm.select(one, ids="uid", binarize="threshold")
    assert found.ids.tolist() == ["x", "y", "z"]
    assert polars.DataFrame(found.to_arrow()).shape == (3, 6)
  ledger = gm.ScoreLedger(tmp_path)
  ledger.append(frame["uid"], frame["step_0"], step=0, epoch=0)
  ledger.append(frame.select(id="uid", score="step_1"), step=1, epoch=1)
  np.testing.assert_allclose(ledger.matrix()[1], MATRIX, rtol=1e-6)
