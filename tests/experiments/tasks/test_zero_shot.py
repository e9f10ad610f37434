"""Zero-shot classification and retrieval against going through all orders."""

import itertools

import numpy as np
import pytest

from experiments.tasks.contrastive import zero_shot

RNG = np.random.default_rng(0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ranked(similarities):
  """All orders, most similar first, in which ties may be listed."""
  groups = [
    [i for i, x in enumerate(similarities) if x == value]
    for value in sorted(set(similarities), reverse=True)
  ]
  for orders in itertools.product(*map(itertools.permutations, groups)):
    yield list(itertools.chain(*orders))


def by_hand(similarities, own, k):
  """The mean over rows of the share of orders with a hit."""
  return np.mean(
    [
      np.mean([bool(mine & set(order[:k])) for order in ranked(row)])
      for row, mine in zip(similarities, own, strict=True)
    ]
  )


def test_the_mean_of_templates_is_one_of_directions():
  features = RNG.normal(size=(4, 3, 5)) * RNG.uniform(0.1, 9, size=(4, 3, 1))
  found = zero_shot.class_embeddings(features)
  for row, texts in zip(found, features, strict=True):
    mean = sum(text / np.sqrt(np.sum(text**2)) for text in texts)
    np.testing.assert_allclose(row, mean / np.sqrt(mean @ mean), atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_accuracy_is_that_of_all_orders(ties):
  images, classes = RNG.normal(size=(40, 4)), RNG.normal(size=(6, 4))
  if ties:
    classes[[1, 4]], classes[5] = classes[0], classes[2]
  labels = RNG.integers(0, 6, 40)
  found = zero_shot.accuracy(images, classes, labels, ks=(1, 2, 4, 9))
  # Halves in two columns that are equal stay equal in float64.
  similarities = np.round(unit(images) @ unit(classes).T, 6)
  for k in (1, 2, 4, 9):
    expected = by_hand(similarities, [{label} for label in labels], k)
    assert found[f"accuracy@{k}"] == pytest.approx(expected, abs=1e-6)
  assert 0 < found["accuracy@1"] < found["accuracy@2"] < 1
  assert found["accuracy@9"] == 1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("several", [False, True], ids=["pairs", "several"])
def test_retrieval_is_that_of_all_orders(several, ties, monkeypatch):
  monkeypatch.setattr(zero_shot, "_ROWS", 3)
  owners = np.array([0, 1, 2, 3, 4, 5, 6])
  if several:
    owners = np.array([4, 0, 1, 1, 2, 3, 3, 5])
  images = RNG.normal(size=(owners.max() + 1, 3))
  texts = images[owners] + RNG.normal(size=(len(owners), 3))
  if ties:
    texts[3] = texts[2] = texts[0]
  found = zero_shot.retrieval(
    images, texts, image_of_text=owners if several else None, ks=[1, 2]
  )
  similarities = np.round(unit(images) @ unit(texts).T, 6)
  own_texts = [
    set(np.flatnonzero(owners == image)) for image in range(len(images))
  ]
  for k in (1, 2):
    there = by_hand(similarities, own_texts, k)
    back = by_hand(similarities.T, [{image} for image in owners], k)
    assert found[f"image_to_text@{k}"] == pytest.approx(there, abs=1e-6)
    assert found[f"text_to_image@{k}"] == pytest.approx(back, abs=1e-6)


def test_a_model_that_says_the_same_of_everything_scores_as_chance_does():
  same = np.ones((50, 8))
  found = zero_shot.retrieval(same, same)
  assert found == pytest.approx(
    {
      "image_to_text@1": 1 / 50,
      "image_to_text@5": 5 / 50,
      "text_to_image@1": 1 / 50,
      "text_to_image@5": 5 / 50,
    }
  )
  labels = np.arange(50) % 10
  found = zero_shot.accuracy(same, same[:10], labels, ks=[1])
  assert found == {"accuracy@1": pytest.approx(0.1)}


X = np.ones((3, 2))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: zero_shot.class_embeddings(X), r"\(3, 2\); expected \[C, T, D\]"),
    (lambda: zero_shot.accuracy(X, X[:, :1], [0, 0, 0]), r"\[N, 2\]"),
    (lambda: zero_shot.accuracy(X, X, [0, 0, 3]), r"to 3; .*\[0, 3\)"),
    (lambda: zero_shot.accuracy(X, X, [0.0, 0, 1]), "float64"),
    (lambda: zero_shot.accuracy(X, X, [0, 0]), r"expected \[3\]"),
    (lambda: zero_shot.accuracy(X, X, [0, 0, 0], ks=[0]), r"ks is \[0\]"),
    (lambda: zero_shot.retrieval(0 * X, X), r"3 of .* first is \[0\]"),
    (lambda: zero_shot.retrieval(X, X[:2]), "3 images and 2 texts"),
    (
      lambda: zero_shot.retrieval(X, X, image_of_text=[0, 0, 2]),
      "1 images have no text, the first is 1",
    ),
  ],
)
def test_what_does_not_fit_is_said(call, message):
  with pytest.raises(ValueError, match=message):
    call()
