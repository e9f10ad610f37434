"""The decoder and its next-token losses, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.models import decoder
from experiments.tasks.language import losses

PADDING, START, V, T = 6, 7, 8, 5


def config(**sizes):
  tiny = {"width": 8, "depth": 1, "heads": 2, "mlp_width": 8}
  return config_dict.ConfigDict({"decoder": tiny | sizes})


@pytest.fixture(scope="module")
def model():
  apply, params = decoder.create(
    config(), vocab_size=V, context_length=T, seed=0
  )
  # Far from uniform, so that a loss that forgets a token shows it.
  return jax.jit(apply), jax.tree.map(lambda x: 5 * np.asarray(x), params)


@pytest.fixture(scope="module")
def batch():
  """Sequences of 5, 3, 1 and 0 tokens."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(PADDING, size=(4, T + 1))
  tokens[:, 0] = START
  for row, length in enumerate((5, 3, 1, 0)):
    tokens[row, 1 + length :] = PADDING
  return {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.ones(4, bool)}


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def means(values, tokens):
  """Over each sequence's real targets, one by one."""
  found = []
  for row, sequence in zip(values, np.asarray(tokens)[:, 1:], strict=True):
    real = [v for v, token in zip(row, sequence, strict=True) if token != 6]
    found.append(sum(real) / len(real) if real else 0.0)
  return np.array(found)


def of_targets(values, tokens):
  at = np.asarray(tokens)[:, 1:, None]
  return np.take_along_axis(np.asarray(values), at, -1)[..., 0]


def test_a_loss_is_the_mean_over_the_real_tokens(model, batch):
  apply, params = model
  losses_fn = jax.jit(losses.make_losses_fn(apply, padding=PADDING))
  found, hits = losses_fn(params, batch)
  logits = np.asarray(apply(params, batch["tokens"][:, :-1]))
  tokens = batch["tokens"]
  expected = means(-of_targets(log_softmax(logits), tokens), tokens)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  right = logits.argmax(-1) == np.asarray(tokens)[:, 1:]
  np.testing.assert_allclose(hits, means(right * 1.0, tokens), rtol=1e-6)
  assert found[3] == hits[3] == 0  # nothing but padding


def test_a_later_token_changes_no_earlier_logits(model, batch):
  apply, params = model
  tokens = batch["tokens"][:1, :-1]
  before = np.asarray(apply(params, tokens))
  for place in range(T):
    changed = tokens.at[0, place].set((tokens[0, place] + 1) % V)
    after = np.asarray(apply(params, changed))
    np.testing.assert_array_equal(after[0, :place], before[0, :place])
    assert np.abs(after[0, place:] - before[0, place:]).max(-1).min() > 1e-4


def test_padding_never_counts(batch):
  """With logits that are the parameters, the gradient is written down."""
  logits = np.random.default_rng(3).normal(size=(4, T, V)).astype(np.float32)
  losses_fn = losses.make_losses_fn(lambda params, _: params, padding=PADDING)
  found = jax.jit(jax.grad(lambda x: losses_fn(x, batch)[0].sum()))(logits)
  targets = np.asarray(batch["tokens"])[:, 1:]
  real = targets != PADDING
  expected = np.exp(log_softmax(logits)) - np.eye(V)[targets]
  expected *= (real / np.maximum(real.sum(1, keepdims=True), 1))[..., None]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert not np.asarray(found)[~real].any()


@pytest.mark.slow
def test_scores_are_the_sequences_own_gradients_along_the_way(model, batch):
  apply, params = model
  losses_fn = losses.make_losses_fn(apply, padding=PADDING)
  rng = np.random.default_rng(4)
  reference = jax.tree.map(
    lambda x: x + rng.normal(scale=0.1, size=x.shape).astype(x.dtype), params
  )
  fn = gm.mimic_value_and_grad(losses_fn, has_aux=True)
  (_, info), grads = jax.jit(fn)(params, reference, batch, mask=batch["mask"])

  def alone(params, tokens):
    return losses_fn(params, {"tokens": tokens[None]})[0][0]

  own = jax.jit(jax.vmap(jax.grad(alone), (None, 0)))(params, batch["tokens"])
  own, gap, grads = (
    [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    for tree in (
      own,
      jax.tree.map(np.subtract, reference, params),
      grads,
    )
  )
  length = sum((leaf**2).sum() for leaf in gap) ** 0.5
  scores = -sum(
    np.tensordot(g, leaf, leaf.ndim) for g, leaf in zip(own, gap, strict=True)
  )
  np.testing.assert_allclose(info.scores, scores / length, atol=1e-5)
  weights = np.exp(scores / length)
  weights /= weights.sum()
  np.testing.assert_allclose(info.weights, weights, rtol=1e-4)
  for found, leaf in zip(grads, own, strict=True):
    np.testing.assert_allclose(
      found, np.tensordot(weights, leaf, 1), rtol=1e-3, atol=1e-5
    )


def test_agreement_and_divergence_are_means_over_real_tokens(model, batch):
  apply, params = model
  tokens = batch["tokens"]
  logits = apply(params, tokens[:, :-1])
  reference = jnp.asarray(
    np.random.default_rng(1).normal(size=logits.shape), jnp.float32
  )
  agreement = jax.jit(losses.agreement, static_argnums=3)
  divergences = jax.jit(losses.divergences, static_argnums=3)
  ours, theirs = log_softmax(logits), log_softmax(reference)
  toward = np.exp(theirs) - np.exp(ours)
  own = np.eye(V)[np.asarray(tokens)[:, 1:]] - np.exp(ours)
  np.testing.assert_allclose(
    agreement(logits, reference, batch, PADDING),
    means((own * toward).sum(-1), tokens),
    atol=1e-5,
  )
  np.testing.assert_allclose(
    divergences(reference, logits, batch, PADDING),
    means((np.exp(theirs) * (theirs - ours)).sum(-1), tokens),
    atol=1e-5,
  )
  broken = reference.at[1, 0, 0].set(jnp.nan)
  for found in (
    agreement(logits, broken, batch, PADDING),
    divergences(broken, logits, batch, PADDING),
  ):
    assert np.isnan(found).tolist() == [False, True, False, False]


def test_the_direction_leads_down_the_divergence_of_all_real_tokens(batch):
  """With logits that are the parameters, the gradient is written down."""
  params = {"logits": jnp.zeros((4, T, V))}
  direction = losses.toward_next_tokens(
    lambda params, _: params["logits"], padding=PADDING
  )
  reference = np.random.default_rng(2).normal(size=(4, T, V))
  reference[1, 4, 0] = np.inf
  reference = reference.astype(np.float32)
  mask = jnp.array([True, True, True, False])
  found = jax.jit(direction)(params, reference, batch, mask=mask)["logits"]
  real = np.asarray(batch["tokens"])[:, 1:] != PADDING
  real[1] = real[3] = False  # not finite, and outside the mask
  reference = np.where(real[..., None], reference, 0)
  expected = np.exp(log_softmax(reference)) - 1 / V
  expected = expected * real[..., None] / real.sum()
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("reference", "kind", "text"),
  [
    ({}, TypeError, "is a dict"),
    (np.zeros((4, T + 1, V)), ValueError, r"\(4, 6, 8\); expected \[4, 5, V\]"),
    (np.zeros(4), ValueError, r"shape \(4,\)"),
  ],
)
def test_other_references_are_refused(batch, reference, kind, text):
  with pytest.raises(kind, match=text):
    losses.check_logits(reference, batch)


def test_a_tied_head_is_the_embedding(batch):
  tied = config(tied=True, activation="quick_gelu")
  tied.dtype = "bfloat16"
  apply, params = decoder.create(
    tied,
    vocab_size=V,
    context_length=T,
    seed=0,
  )
  assert "head" not in params
  logits = jax.eval_shape(apply, params, batch["tokens"][:, :-1])
  assert (logits.shape, logits.dtype) == ((4, T, V), jnp.float32)


@pytest.mark.parametrize(
  ("sizes", "text"),
  [
    ({"heads": 3}, "width is 8 and heads is 3"),
    ({"activation": "relu"}, "'relu'; expected one of gelu, quick_gelu"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, text):
  with pytest.raises(ValueError, match=text):
    decoder.create(config(**sizes), vocab_size=V, context_length=T, seed=0)


def test_sequences_that_are_too_long_are_refused(model):
  apply, params = model
  with pytest.raises(ValueError, match="6 tokens long; expected at most 5"):
    jax.eval_shape(apply, params, jnp.zeros((1, T + 1), jnp.int32))
