"""Data frames: what else is in them is never read as scores."""

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

import gradmimic_jax as gm
from gradmimic_jax.selection._frames import refuse_frames

SCORES = {"step_0": [0.1, -0.2, 0.3], "step_1": [0.5, -0.6, 0.7]}


@pytest.fixture
def pd():
  return pytest.importorskip("pandas")


def frames(pd):
  """Frames by what is wrong with them."""
  frame = pd.DataFrame(SCORES)
  return {
    "integers": frame.assign(number=[5, 7, 9]),
    "ids of text": frame.assign(name_of=["a", "b", "c"]),
    "booleans": frame.assign(seen=True),
    "dates": frame.assign(when=pd.to_datetime(["2020-01-01"] * 3)),
    "categories": frame.assign(kind=pd.Categorical(["a", "b", "a"])),
    "float ids": frame.assign(id=[5.0, 7.0, 9.0]),
    "image_id": frame.assign(Image_ID=[5.0, 7.0, 9.0]),
    "labels": frame.assign(label=[0.0, 1.0, 0.0]),
    "an index that came back": frame.assign(**{"Unnamed: 0": [0.0, 1.0, 2.0]}),
    "nullable integers": frame.assign(n=pd.array([5, None, 9], dtype="Int64")),
    "Arrow's integers": frame.assign(n=[5, 7, 9]).convert_dtypes(
      dtype_backend="pyarrow"
    ),
    "a text index": frame.set_index(pd.Index(["a", "b", "c"])),
    "some rows": frame[frame.step_0 > 0],
    "later rows": frame.iloc[1:],
    "other order": frame.sort_values("step_0"),
    "backwards": frame.iloc[::-1],
    "a named index": frame.rename_axis("id"),
    "two levels": frame.set_index(
      pd.MultiIndex.from_tuples([(0, 1), (0, 2), (1, 1)])
    ),
    "columns of two levels": frame.set_axis(
      pd.MultiIndex.from_tuples([("s", 0), ("id", "")]), axis=1
    ),
  }


def test_pandas_frames_with_more_than_scores_are_refused(pd):
  for frame in frames(pd).values():
    with pytest.raises(TypeError, match=r"scores is a pandas.*to_numpy\(\)"):
      refuse_frames(frame, "scores")


def test_the_error_says_how_to_hand_it_over(pd):
  frame = pd.DataFrame({"id": ["x", "y", "z"], **SCORES})
  with pytest.raises(TypeError, match=r'column \'id\' .*ids=frame\["id"\]'):
    refuse_frames(frame, "scores")
  found = gm.select(frame[list(SCORES)].to_numpy(), ids=frame["id"])
  assert found.ids.tolist() == ["x", "y", "z"]
  indexed = frame.set_index("id")
  with pytest.raises(TypeError, match=r"ids=frame\.index"):
    refuse_frames(indexed, "scores")
  found = gm.select(indexed[list(SCORES)].to_numpy(), ids=indexed.index)
  assert found.ids.tolist() == ["x", "y", "z"]


def test_frames_of_nothing_but_scores_pass(pd):
  frame = pd.DataFrame(SCORES)
  for one in (
    frame,
    frame.astype("float32"),
    frame.astype("Float64"),
    pd.DataFrame(np.ones((3, 2))),
    frame.head(2),
    frame.sort_values("step_0").reset_index(drop=True),
    pa.table(SCORES),
    pa.RecordBatch.from_pydict(SCORES),
  ):
    refuse_frames(one, "scores")


def test_arrow_tables_with_more_than_scores_are_refused(pd):
  for more in (
    {"n": [5, 7, 9]},
    {"n": ["a", "b", "c"]},
    {"uid": [5.0, 7.0, 9.0]},
    {"n": [True, False, True]},
    {"n": pa.array([None, None, None])},
  ):
    for made in (
      pa.table(SCORES | more),
      pa.RecordBatch.from_pydict(SCORES | more),
    ):
      with pytest.raises(TypeError, match=r"pyarrow.*select\(columns\)"):
        refuse_frames(made, "scores")
  # An index that Arrow took along.
  frame = pd.DataFrame(SCORES, index=pd.Index([5.0, 7.0, 9.0]))
  with pytest.raises(TypeError, match="__index_level_0__"):
    refuse_frames(pa.Table.from_pandas(frame), "scores")


class Polars:
  """What polars' DataFrame has of what is looked at."""

  def __init__(self, **columns):
    self.columns = list(columns)
    self.dtypes = list(columns.values())  # whose texts are looked at

  def __dataframe__(self):
    raise NotImplementedError

  def iter_rows(self):
    raise NotImplementedError


class Unknown:
  """A frame of a kind that nobody knows."""

  def __dataframe__(self):
    raise NotImplementedError


def test_other_frames():
  refuse_frames(Polars(a="Float64", b="Float32"), "scores")
  for other in ({"b": "Int64"}, {"b": "String"}, {"id": "Float64"}):
    with pytest.raises(
      TypeError, match=r"Polars .*frame\.select\(columns\)\.to_numpy\(\)"
    ):
      refuse_frames(Polars(a="Float64", **other), "scores")
  with pytest.raises(TypeError, match="that can't be looked into"):
    refuse_frames(Unknown(), "scores")


def test_what_is_no_frame_passes(pd):
  for value in (
    np.ones((2, 2)),
    jnp.ones((2, 2)),
    [[1.0], [2.0]],
    ((1.0,), (2.0,)),
    pd.Series([1.0, 2.0]),
    pa.array([1.0]),
    None,
    3,
  ):
    refuse_frames(value, "scores")


def test_a_report_refuses_them(pd, tmp_path):
  scores = np.array([[1.0, 2.0], [-1.0, -2.0], [3.0, 1.0]])
  selection = gm.select(scores, binarize="threshold")
  frame = pd.DataFrame({"id": [5, 7, 9], "score": scores[:, 0]})
  with pytest.raises(TypeError, match=r"ledger is a pandas.*column 'id'"):
    gm.report(frame, selection, tmp_path / "r.html")
  gm.report(pd.DataFrame(scores), selection, tmp_path / "r.html")
