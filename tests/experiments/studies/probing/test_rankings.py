"""Rankings of suspicious samples, against brute force."""

import collections
import itertools

import numpy as np
import pytest

from configs import natural_errors
from experiments.data import noise
from experiments.studies.probing import features, rankings

CLASSES = ("cat", "dog", "frog")


def drawn(count=200, seed=0):
  """Probabilities that are mostly right, and labels of which some are wrong."""
  rng = np.random.default_rng(seed)
  truth = rng.integers(0, 3, count)
  logits = rng.normal(size=(count, 3)) + 3 * np.eye(3)[truth]
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  wrong = rng.random(count) < 0.15
  labels = np.where(wrong, (truth + 1) % 3, truth)
  return p.astype(np.float32), labels.astype(np.int32), wrong


def test_confident_learning_is_cleanlabs_and_leads_with_its_issues():
  # Where it is used: it is slow to import, and all processes read all tests.
  from cleanlab import filter as cleanlab_filter, rank as cleanlab_rank

  p, labels, _ = drawn()
  wide = p.astype(float) / p.astype(float).sum(axis=1, keepdims=True)
  found = rankings.rank(p, labels, {})
  issues = cleanlab_filter.find_label_issues(
    labels, wide, return_indices_ranked_by="self_confidence", n_jobs=1
  )
  assert 10 < len(issues) < 60
  order = rankings.lowest(found["confident_learning"], len(labels))
  np.testing.assert_array_equal(order[: len(issues)], issues)
  assert sorted(order) == list(range(len(labels)))
  rest = [wide[i, labels[i]] for i in order[len(issues) :]]
  assert rest == sorted(rest)
  # The loss alone is what cleanlab calls self-confidence.
  quality = cleanlab_rank.get_label_quality_scores(labels, wide)
  np.testing.assert_array_equal(
    rankings.lowest(found["out_of_sample_loss"], 50), np.argsort(quality)[:50]
  )
  others = np.where(np.eye(3, dtype=bool)[labels], -1, wide).max(axis=1)
  margin = (quality - others + 1) / 2
  np.testing.assert_allclose(found["normalized_margin"], margin, atol=1e-9)


def test_scores_that_are_not_finite_are_named():
  p, labels, _ = drawn(20)
  scores = np.zeros(20)
  scores[3] = np.nan
  with pytest.raises(ValueError, match="1 of 20 scores of rho are not finite"):
    rankings.rank(p, labels, {"rho": scores})


def test_majority_equals_counting():
  labels = np.array(list(itertools.product(range(4), repeat=3)))
  most, divided = rankings.majority(labels, 4)
  for row, label, tie in zip(labels, most, divided, strict=True):
    (first, votes), *others = collections.Counter(row).most_common()
    assert tie == any(count == votes for _, count in others)
    assert tie or label == first
  assert divided.sum() == 4 * 3 * 2  # all three differ


def test_measures_equal_counting_and_leave_out_what_is_not_known():
  _, _, wrong = drawn(40)
  rng = np.random.default_rng(1)
  known = rng.random(40) < 0.8
  truth = rankings.Truth(wrong & known, known)
  by_seed = [{"a": rng.normal(size=40) - wrong} for _ in range(3)]
  together = {"a": np.mean([x["a"] for x in by_seed], axis=0)}

  def auroc(values):
    pairs = [
      (values[i] < values[j]) + 0.5 * (values[i] == values[j])
      for i in np.flatnonzero(known & wrong)
      for j in np.flatnonzero(known & ~wrong)
    ]
    return np.mean(pairs)

  (row,) = rankings.measure(together, by_seed, truth, 10)
  assert row["auroc"] == pytest.approx(auroc(together["a"]))
  alone = [auroc(x["a"]) for x in by_seed]
  assert row["auroc_mean"] == pytest.approx(np.mean(alone))
  assert row["auroc_error"] == pytest.approx(np.std(alone, ddof=1) / np.sqrt(3))
  low = sorted(range(40), key=lambda i: together["a"][i])[:10]
  assert row["wrong_lowest"] == sum(truth.wrong[i] for i in low)
  assert row["unknown_lowest"] == sum(not known[i] for i in low)
  # Precision at every wrong sample, from the lowest on.
  order = [i for i in np.argsort(together["a"]) if known[i]]
  hits = [bool(wrong[i]) for i in order]
  precisions = [
    sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits) if hit
  ]
  assert row["average_precision"] == pytest.approx(np.mean(precisions))


def samples(ids=("a", "b", "c", "d")):
  labels = np.array([0, 1, 2, 2], np.int32)
  train = features.Features(
    np.zeros((1, 4, 2), np.float32), labels, np.array(ids), 3, CLASSES, "x"
  )
  same = np.zeros(4, bool)
  return train, noise.NoisyLabels(labels, labels, same, 0.0)


def people(tmp_path, text, **fields):
  """`config.cross` with a table of labels by people."""
  file = tmp_path / "people.csv"
  file.write_text(text)
  config = natural_errors.get_config("dataset=digits").cross
  config.update(
    {"proxy": str(file), "proxy_columns": ("x", "y", "z"), **fields}
  )
  return config


def test_people_are_compared_with_the_given_labels_where_they_agree(tmp_path):
  config = people(
    tmp_path, "name,z,y,x\nd,2,2,0\nz,0,0,0\na,0,1,1\nb,0,1,2\nc,2,2,2\n",
    proxy_id_column="name",
  )  # fmt: skip
  found = rankings.read_truths(config, *samples())
  assert list(found) == ["people"]
  assert found["people"].known.tolist() == [True, False, True, True]
  assert found["people"].wrong.tolist() == [True, False, False, False]
  # Names of classes are as good as numbers.
  config = people(tmp_path, "id,x,y,z\n" + "".join(
    f"{name},cat,cat,dog\n" for name in "abcd"
  ))  # fmt: skip
  found = rankings.read_truths(config, *samples())
  assert found["people"].wrong.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
  ("text", "fields", "message"),
  [
    (
      "id,x,y,z\na,0,0,0\nb,1,1,1\nc,2,2,2\n",
      {},
      "no label in column 'x' for 1 of 4 samples, such as 'd'",
    ),
    (
      "id,x,y,z\na,0,0,0\nb,1,1,\nc,2,2,2\nd,2,2,2\n",
      {},
      "no label in column 'z' for 1 of 4 samples, such as 'b'",
    ),
    (
      "id,x,y\na,0,0\nb,1,1\nc,2,2\nd,2,2\n",
      {},
      r"config\.cross\.proxy: .*people\.csv has the columns \['id', 'x', 'y'\]"
      ".* column 'z'",
    ),
    (
      "name,x,y,z\na,0,0,0\n",
      {},
      r"columns \['name', 'x', 'y', 'z'\], and id_column is 'id'",
    ),
    (
      "id,x,y,z\ntrain_1,0,0,0\n",
      {},
      r"none of the 4 samples' ids \(such as 'a'\).*\(such as 'train_1'\)",
    ),
    (
      "id,x,y,z\na,7,0,0\n",
      {},
      r"column 'x' of .* holds 7 \.\. 7; expected class numbers",
    ),
    ("id,x\na,0\n", {"proxy_columns": ()}, "proxy_columns is empty"),
    (
      "id,x,y,z\n" + "".join(f"{name},0,1,2\n" for name in "abcd"),
      {},
      "no majority for any sample in the columns x, y, z",
    ),
  ],
)
def test_a_proxy_that_says_too_little_is_named(tmp_path, text, fields, message):
  config = people(tmp_path, text, **fields)
  with pytest.raises(ValueError, match=message):
    rankings.read_truths(config, *samples())


def test_noise_that_was_added_is_a_truth_of_its_own():
  train, labels = samples()
  changed = np.array([0, 0, 2, 2], np.int32)
  noisy = noise.NoisyLabels(
    changed, labels.labels, changed != labels.labels, 0.25
  )
  config = natural_errors.get_config("dataset=digits").cross
  assert rankings.read_truths(config, train, labels) == {}
  found = rankings.read_truths(config, train, noisy)["noise"]
  assert found.wrong.tolist() == [False, True, False, False]
  assert found.known.all()
