"""The issue type in a real Datalab."""

import numpy as np
import pytest

import gradmimic_jax as gm
from gradmimic_jax import cleanlab

N = 300


def datalab():
  """Imported where it is used: it is heavy, and all workers collect this."""
  return pytest.importorskip(
    "cleanlab.datalab.datalab",
    reason="needs cleanlab: pip install 'gradmimic_jax[cleanlab]'",
  )


@pytest.fixture(scope="module", autouse=True)
def registered():
  datalab()
  return cleanlab.register()


@pytest.fixture(scope="module")
def found():
  """Scores [N, T], which of them are bad, labels."""
  rng = np.random.default_rng(0)
  bad = rng.permutation(N) < 100
  scores = np.where(bad[:, None], -1.0, 1.0) + rng.normal(0, 0.4, (N, 4))
  return scores, bad, np.array(["cat", "dog", "owl"])[rng.integers(0, 3, N)]


def lab_of(labels, scores, **options):
  lab = datalab().Datalab(
    data={"label": labels.tolist()}, label_name="label", verbosity=0
  )
  lab.find_issues(issue_types={"grad_mimic": {"scores": scores, **options}})
  return lab


@pytest.fixture(scope="module")
def lab(found):
  return lab_of(found[2], found[0])


def test_a_lab_has_the_selections_answers(found, lab):
  scores, bad, labels = found
  selection = gm.select(scores)
  issues = lab.get_issues("grad_mimic")
  assert issues.columns.tolist() == [
    "is_grad_mimic_issue",
    "grad_mimic_score",
    "grad_mimic_keep_probability",
  ]
  flags, quality, probability = issues.to_numpy(object).T
  np.testing.assert_array_equal(
    flags.astype(bool), gm.find_label_issues(scores)
  )
  np.testing.assert_array_equal(
    quality.astype(float), gm.label_quality_scores(scores)
  )
  np.testing.assert_array_equal(
    probability.astype(float), selection.keep_probability
  )
  assert gm.metrics.f1(flags.astype(bool), bad) > 0.95
  (summary,) = lab.get_issue_summary("grad_mimic").to_dict("records")
  quality = gm.dataset_quality(selection)
  assert summary["score"] == quality.clean_fraction
  assert lab.get_issue_summary()["num_issues"].tolist() == [flags.sum()]
  info = lab.get_info("grad_mimic")
  assert (info["low"], info["high"]) == (quality.low, quality.high)
  assert info["remove"] == flags.sum()
  assert info["classes"]["Class Name"].tolist() == (
    gm.class_table(selection, labels)["Class Name"].to_pylist()
  )


def test_options_are_those_of_select(found):
  scores, _, labels = found
  lab = lab_of(labels, scores, binarize="top_fraction", fraction=0.9)
  assert lab.get_issues("grad_mimic")["is_grad_mimic_issue"].mean() < 0.2


def test_the_report_shows_the_worst(found, lab, capsys):
  lab.report(verbosity=2)
  printed = capsys.readouterr().out
  assert "grad_mimic issues" in printed
  assert "Class Name" in printed
  worst = gm.find_label_issues(found[0], return_indices_ranked_by="quality")[0]
  assert f"\n{worst} " in printed


def test_a_saved_lab_comes_back(lab, tmp_path):
  lab.save(str(tmp_path / "lab"))
  again = datalab().Datalab.load(str(tmp_path / "lab"))
  assert again.get_issues("grad_mimic").equals(lab.get_issues("grad_mimic"))


def test_a_ledgers_ids_are_rows(found, tmp_path):
  scores, _, labels = found
  seen = np.flatnonzero(np.arange(N) % 7)
  with gm.ScoreLedger(tmp_path / "ledger") as ledger:
    for step, column in enumerate(scores.T):
      ledger.append(seen[::-1], column[seen[::-1]], step=step, epoch=step)
  selection = gm.select(ledger, aggregate="majority")
  for given, options in ((ledger, {"aggregate": "majority"}), (selection, {})):
    lab = lab_of(labels, given, **options)
    assert lab.get_info("grad_mimic")["unvoted"] == 43
    issues = lab.get_issues("grad_mimic")
    flags = issues["is_grad_mimic_issue"].to_numpy()
    np.testing.assert_array_equal(np.flatnonzero(flags), selection.dropped_ids)
    unseen = np.isnan(issues["grad_mimic_score"].to_numpy())
    np.testing.assert_array_equal(unseen, np.arange(N) % 7 == 0)


def test_ids_that_are_text_are_found(found, tmp_path):
  scores, _, labels = found
  names = np.array([f"{i:03d}" for i in range(N)])  # text, not numbers
  order = np.random.default_rng(1).permutation(N)
  with gm.ScoreLedger(tmp_path / "ledger") as ledger:
    for step, column in enumerate(scores.T):
      some = order[:-20]
      ledger.append(names[some], column[some], step=step, epoch=step)
  lab = lab_of(labels, ledger, ids=names)
  flags = lab.get_issues("grad_mimic")["is_grad_mimic_issue"].to_numpy()
  dropped = gm.select(ledger).dropped_ids
  assert sorted(names[flags]) == sorted(dropped)
  assert lab.get_info("grad_mimic")["unvoted"] == 20
  # An array's rows are the lab's, and its ids are those of `select`.
  lab = lab_of(labels, scores, ids=names)
  flags = lab.get_issues("grad_mimic")["is_grad_mimic_issue"].to_numpy()
  np.testing.assert_array_equal(flags, gm.find_label_issues(scores))


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    (np.arange(N), "3 of 3 samples are not among ids, the first is '000'"),
    (np.array([str(i) for i in range(N)]), "3 of 3 samples"),
    (["000"] * N, "300 values, 1 of them distinct"),
    (["000", "001", "002"], "3 values"),
    (["000", 1, *map(str, range(2, N))], "mixes values of int, str"),
  ],
)
def test_ids_of_other_rows(registered, ids, message):
  lab = datalab().Datalab(data={"text": ["a"] * N}, verbosity=0)
  selection = gm.select(np.ones((3, 1)), ids=["000", "001", "002"])
  with pytest.raises((ValueError, TypeError), match=message):
    registered(datalab=lab).find_issues(scores=selection, ids=ids)


def test_a_frame_with_ids_is_no_scores(registered):
  pd = pytest.importorskip("pandas")
  lab = datalab().Datalab(data={"text": ["a"] * 2}, verbosity=0)
  frame = pd.DataFrame({"id": [5, 7], "score": [0.1, -0.2]})
  with pytest.raises(TypeError, match="column 'id'"):
    registered(datalab=lab).find_issues(scores=frame)


def test_without_labels_or_votes(found):
  lab = datalab().Datalab(data={"text": ["a"] * N}, verbosity=0)
  lab.find_issues(issue_types={"grad_mimic": {"scores": found[0][:, :2]}})
  assert "classes" not in lab.get_info("grad_mimic")
  lab = datalab().Datalab(data={"text": ["a"] * N}, verbosity=0)
  lab.find_issues(issue_types={"grad_mimic": {"scores": np.ones((N, 2))}})
  assert not lab.get_issues("grad_mimic")["is_grad_mimic_issue"].any()
  assert np.isnan(lab.get_issue_summary("grad_mimic")["score"].item())


@pytest.mark.parametrize(
  ("scores", "message"),
  [
    (np.ones((N - 1, 2)), "299 rows, but the lab's data 300"),
    ([[1.0], [2.0]], "2 rows, but the lab's data 300"),
    (gm.select(np.ones((1, 1)), ids=[N]), "rows 0 to 299 as ids"),
    (gm.select(np.ones((1, 1)), ids=["a"]), "rows 0 to 299 as ids"),
    (np.ones(N), "expected \\[N, T\\]"),
  ],
)
def test_scores_of_other_samples(found, registered, scores, message, capsys):
  lab = datalab().Datalab(data={"text": ["a"] * N}, verbosity=0)
  with pytest.raises(ValueError, match=message):
    registered(datalab=lab).find_issues(scores=scores)
  lab.find_issues(issue_types={"grad_mimic": {"scores": scores}})
  assert "Error in grad_mimic" in capsys.readouterr().out


def test_it_is_registered_once(registered, capsys):
  assert cleanlab.register() is registered
  assert cleanlab.register(task="regression") is not registered
  assert not capsys.readouterr().out
  lab = datalab().Datalab(data={"a": [1]}, verbosity=0)
  assert "grad_mimic" in lab.list_possible_issue_types()
  with pytest.raises(ValueError, match="Invalid task"):
    cleanlab.register(task="regresion")
