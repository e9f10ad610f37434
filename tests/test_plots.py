"""Plots say what the numbers say, on the axes that are given."""

import numpy as np
import pytest

import gradmimic_jax as gm


@pytest.fixture
def ax():
  mpl = pytest.importorskip("matplotlib")
  mpl.use("agg")
  plt = pytest.importorskip("matplotlib.pyplot")
  figure, axes = plt.subplots()
  yield axes
  plt.close(figure)


def lines_of(ax):
  return {line.get_label(): line for line in ax.get_lines()}


def texts_of(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


def test_scores_by_group_are_medians_and_quantiles(ax):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(50, 3))
  scores[0, 0] = np.nan
  groups = np.array(["a", "$b"])[rng.integers(0, 2, 50)]
  assert gm.plots.scores_by_group(scores, groups, names={"a": "A"}, ax=ax) is ax
  for label, group in (("A", "a"), ("$b", "$b")):
    rows = scores[groups == group]
    drawn = lines_of(ax)[label].get_ydata()
    np.testing.assert_allclose(drawn, np.nanmedian(rows, axis=0))
  band = ax.collections[0].get_paths()[0].vertices[:, 1]
  rows = scores[groups == "$b"]  # the first by name
  np.testing.assert_allclose(band.min(), np.quantile(rows, 0.1, axis=0).min())
  ax.figure.savefig("/dev/null", format="png")  # a "$" is no formula


def test_scores_of_a_ledger_are_at_its_epochs(ax, tmp_path):
  with gm.ScoreLedger(tmp_path) as ledger:
    ledger.append([3, 1], [0.5, -1.0], step=4, epoch=2)
  gm.plots.scores_by_group(ledger, [True, False], ax=ax)
  assert lines_of(ax)["True"].get_xdata().tolist() == [2]
  assert lines_of(ax)["True"].get_ydata().tolist() == [-1.0]
  assert ax.get_xlabel() == "epoch"


def test_a_removal_curve_has_its_recommendation(ax):
  selection = gm.select([[-2.0], [1.0], [-1.0]], binarize="threshold")
  curve = gm.removal_curve(selection)
  gm.plots.removal_curve(selection, ax=ax)
  lines = lines_of(ax)
  np.testing.assert_array_equal(lines["recall"].get_ydata(), curve.recall)
  np.testing.assert_array_equal(lines["precision"].get_xdata(), curve.removed)
  assert "recommended: 2" in texts_of(ax)


def test_intervals_are_a_row_each(ax):
  one = gm.DatasetQuality(0.7, 0.6, 0.8, 0.95, 0.7, 100, 0)
  two = one._replace(clean_fraction=0.9, low=0.85, high=1.0)
  gm.plots.quality_interval({"a": one, "b": two}, truth={"b": 0.88}, ax=ax)
  ends = [c.get_segments()[0][:, 0].tolist() for c in ax.collections]
  assert ends == [[0.6, 0.8], [0.85, 1.0]]
  assert [line.get_xdata()[0] for line in ax.get_lines()] == [0.7, 0.9, 0.88]
  assert ax.yaxis_inverted()
  with pytest.raises(ValueError, match="no quality came"):
    gm.plots.quality_interval({}, ax=ax)


def test_learning_curves_say_how_many_steps_are_saved(ax):
  x = [0, 10, 20, 40]
  curves = {
    "sgd": [(x, [0.1, 0.2, 0.3, 0.5]), (x, [0.1, 0.3, 0.3, 0.5])],
    "fast": [(x, [0.1, 0.6, 0.6, 0.6])],
    "slow": [(x, [0.1, 0.1, 0.1, 0.1])],
  }
  gm.plots.learning_curves(curves, baseline="sgd", higher_is_better=True, ax=ax)
  assert texts_of(ax) == [
    "sgd (mean of 2)",
    "fast (saves 80% of the steps)",
    "slow (never as good)",
  ]
  np.testing.assert_allclose(
    lines_of(ax)["sgd (mean of 2)"].get_ydata()[1], 0.25
  )
  for wrong, match in (
    ({}, "no curves"),
    ({"a": [([0], [1]), ([1], [1])]}, "different x"),
  ):
    with pytest.raises(ValueError, match=match):
      gm.plots.learning_curves(wrong, ax=ax)
  with pytest.raises(ValueError, match="expected one of"):
    gm.plots.learning_curves(curves, baseline="x", ax=ax)


def test_shapes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"expected \[N, T\] and \[N\]"):
    gm.plots.scores_by_group([[1.0]], [1, 2])
  with pytest.raises(ValueError, match="share is 2"):
    gm.plots.scores_by_group([[1.0]], [1], share=2)
