"""Estimates about voters from their votes: how good and how dependent.

Samples that were voted on alike can't be told apart, so everything here works
on the distinct rows of votes and how often each occurs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_STEPS_PER_WEIGHT = 5
_LEAST_VOTERS = 3


class Ballots(NamedTuple):
  """The distinct rows of votes."""

  keep: np.ndarray  # float64 [P, T], 1 where the vote is keep
  drop: np.ndarray  # float64 [P, T], 1 where the vote is drop
  size: np.ndarray  # float64 [P], how many samples voted so
  row: np.ndarray  # int [N], each sample's row among the P


class Voters(NamedTuple):
  """Estimates about T voters and the samples."""

  keep_accuracy: np.ndarray  # [T], P(votes keep | clean and voting)
  drop_accuracy: np.ndarray  # [T], P(votes drop | noisy and voting)
  clean_fraction: float
  correlation: np.ndarray  # [T, T], of votes on samples of the same kind
  log_odds: np.ndarray  # [P], of a distinct row's samples being clean
  converged: bool
  iterations: int


def count_ballots(votes: np.ndarray) -> Ballots:
  """Counts the distinct rows of votes.

  Args:
    votes: int8 [N, T], 1 keep, 0 drop, -1 abstain.

  Returns:
    Ballots of P <= N rows.
  """
  votes = np.ascontiguousarray(votes, np.int8)
  # One opaque item a row sorts faster than a row of numbers.
  rows = votes.view(np.dtype((np.void, votes.shape[1])))[:, 0]
  _, first, row, count = np.unique(
    rows, return_index=True, return_inverse=True, return_counts=True
  )
  distinct = votes[first]
  return Ballots(
    (distinct == 1).astype(np.float64),
    (distinct == 0).astype(np.float64),
    count.astype(np.float64),
    row.reshape(-1),
  )


def fit_dawid_skene(
  ballots: Ballots,
  *,
  coins: int,
  temper: bool = True,
  smoothing: float = 1.0,
  tolerance: float = 1e-6,
  max_iterations: int = 500,
) -> Voters:
  """Expectation maximisation of the Dawid-Skene model.

  A sample is clean with probability c; voter t votes keep on a clean one with
  probability a_t and drop on a noisy one with probability b_t. In turn

    l_i = logit c + w_i sum_t log(P(vote_it | clean) / P(vote_it | noisy))
    c, a_t, b_t = shares under q_i = sigmoid(l_i), with `smoothing` pseudo-votes
      on either side

  starting at q_i = the share of keep votes. w_i = 1 is maximum likelihood;
  tempered, w_i = n_i / sum of the correlations among i's n_i votes, so that
  copies of a vote count once. The correlations are those of
  `estimate_correlation` under the estimates of maximum likelihood; if they
  leave three voters or more, both are brought up to date until they have
  settled.

  A tempered fit also ignores what would let a keep vote speak for drop.

  Args:
    ballots: The votes, each sample with at least one.
    coins: 2, or 1 for a_t = b_t.
    temper: Whether to weigh dependent votes down.
    smoothing: Pseudo-votes, >= 0.
    tolerance: Largest change of a probability a_t, b_t or c at the end.
    max_iterations: At most so many E-steps, over all fits.

  Returns:
    The estimates; `converged` says whether they had settled.

  References:
    Dawid and Skene, Maximum Likelihood Estimation of Observer Error-Rates
    Using the EM Algorithm, 1979.
  """
  clean = ballots.keep.sum(axis=1) / (ballots.keep + ballots.drop).sum(axis=1)
  even = np.ones(len(clean))
  rates = _rates(ballots, clean, coins, smoothing)
  iterations, settled = 0, False

  def climb(rates, weight, correlated):
    """Rounds until settled; weights are brought up to date if `correlated`."""
    nonlocal iterations
    settled = False
    while not settled and iterations < max_iterations:
      log_odds = _log_odds(ballots, rates, weight, monotone=temper)
      clean = _sigmoid(log_odds)
      before, rates = rates, _rates(ballots, clean, coins, smoothing)
      settled = _distance(before, rates) <= tolerance
      iterations += 1
      # Dependence is estimated now and then: it costs T times as much.
      if correlated and (settled or iterations % _STEPS_PER_WEIGHT == 0):
        correlation = estimate_correlation(ballots, clean, *rates[:2])
        if _effective(correlation) < _LEAST_VOTERS:
          return None
        new = _weights(ballots, correlation)
        settled = settled and float(np.abs(new - weight).max()) < 1e-4
        weight = new
    return rates, weight, settled

  rates, weight, settled = climb(rates, even, False)
  if temper:
    clean = _sigmoid(_log_odds(ballots, rates, even, monotone=True))
    correlation = estimate_correlation(ballots, clean, *rates[:2])
    weight = _weights(ballots, correlation)
    # Dependent votes look better than they are, so that weights belong into
    # the rounds. But it takes three voters to tell how good each is: if no
    # more are left, rounds of so weak votes would unlearn what is known.
    if _effective(correlation) >= _LEAST_VOTERS:
      found = climb(rates, weight, True)
      if found is not None:
        rates, weight, settled = found
  # Once more, so that probabilities and estimates belong together.
  log_odds = _log_odds(ballots, rates, weight, monotone=temper)
  correlation = estimate_correlation(ballots, _sigmoid(log_odds), *rates[:2])
  a, b, c = rates
  return Voters(a, b, float(c), correlation, log_odds, settled, iterations)


def _effective(correlation: np.ndarray) -> float:
  """Computes the number of independent voters that these are worth."""
  n = len(correlation)
  return n * n / float(np.clip(correlation.sum(), n, n * n))


def _distance(before, after) -> float:
  return max(
    float(np.abs(x - y).max()) for x, y in zip(before, after, strict=True)
  )


def fit_triplet(
  ballots: Ballots,
  *,
  temper: bool = True,
  smoothing: float = 1.0,
  max_iterations: int = 100,
) -> Voters:
  """Accuracies in closed form, from how often voters agree two by two.

  With votes v and truth y in {-1, 1}, and a voter t right with probability
  (1 + e_t) / 2 whatever the truth, independent votes have E[v_t v_s] = e_t e_s,
  so that for any two others

    e_t^2 = E[v_t v_s] E[v_t v_u] / E[v_s v_u],   E[v_t] = e_t (2 c - 1)

  The median over all pairs (s, u) is taken, and e_t >= 0: voters are believed
  to be right more often than not. The clean fraction c follows by least
  squares. Nothing is iterated, except for the correlations if tempered.

  Args:
    ballots: The votes, each sample with at least one; at least three voters.
    temper: Whether to weigh dependent votes down, as in `fit_dawid_skene`.
    smoothing: Pseudo-votes on either side of each estimate, >= 0.
    max_iterations: At most so many rounds of tempering.

  Returns:
    The estimates. A voter in no triplet (it shares samples with none, or only
    with voters who agree as often as not) is given 1/2, which is no weight.

  References:
    Fu et al., Fast and Three-rious: Speeding Up Weak Supervision with Triplet
    Methods, https://arxiv.org/abs/2002.11955
  """
  sign = ballots.keep - ballots.drop
  cast = ballots.keep + ballots.drop
  both = cast.T @ (cast * ballots.size[:, None])
  agree = sign.T @ (sign * ballots.size[:, None])
  moment = np.divide(agree, both, out=np.zeros_like(agree), where=both > 0)
  votes = np.diag(both)
  edge = np.array([_median_edge(moment, t) for t in range(len(moment))])
  accuracy = _share(votes * (1 + edge) / 2, votes * (1 - edge) / 2, smoothing)
  edge = 2 * accuracy - 1
  mean = ballots.size @ sign / votes
  total = votes @ edge**2
  tilt = votes @ (edge * mean) / total if total > 0 else 0.0
  samples = ballots.size.sum()
  share = (1 + np.clip(tilt, -1, 1)) / 2
  c = (share * samples + smoothing) / (samples + 2 * smoothing)

  clean = ballots.keep.sum(axis=1) / cast.sum(axis=1)
  weight = np.ones(len(clean))
  iterations, settled = 0, False
  while not settled and iterations < max_iterations:
    correlation = estimate_correlation(ballots, clean, accuracy, accuracy)
    new = _weights(ballots, correlation) if temper else weight
    settled = iterations > 0 and float(np.abs(new - weight).max()) < 1e-3
    weight = new
    log_odds = _log_odds(
      ballots, (accuracy, accuracy, c), weight, monotone=True
    )
    clean = _sigmoid(log_odds)
    iterations += 1
  return Voters(
    accuracy, accuracy, float(c), correlation, log_odds, settled, iterations
  )


def _median_edge(moment, t):
  """The median of e_t over all pairs of others; 0 where there is none."""
  others = np.delete(np.arange(len(moment)), t)
  first, second = np.triu_indices(len(others), k=1)
  first, second = others[first], others[second]
  below = moment[first, second]
  above = moment[t, first] * moment[t, second]
  used = (below != 0) & (above != 0)
  if not used.any():
    return 0.0
  squares = np.abs(above[used] / below[used])
  return float(np.sqrt(min(np.median(squares), 1.0)))


def estimate_correlation(
  ballots: Ballots,
  clean: np.ndarray,
  keep_accuracy: np.ndarray,
  drop_accuracy: np.ndarray,
) -> np.ndarray:
  """Estimates the correlation of votes beyond what clean and noisy explain.

  With x_it = 1 for keep and m_t(z) the voter's expectation for samples of kind
  z, C_ts = mean over the samples on which both vote of
  E_z [(x_it - m_t(z)) (x_is - m_s(z))], z drawn by the given probabilities, and
  the correlation is C_ts / sqrt(C_tt C_ss). It is 0 in expectation if the votes
  are independent given z and the estimates are right, and 1 for copies.

  Args:
    ballots: The votes.
    clean: Probability that a distinct row's samples are clean [P].
    keep_accuracy: a_t, [T].
    drop_accuracy: b_t, [T].

  Returns:
    The correlations [T, T]; 0 for two who never vote on the same sample.
  """
  cast = ballots.keep + ballots.drop
  total = np.zeros((cast.shape[1],) * 2)
  kinds = ((keep_accuracy, clean), (1 - drop_accuracy, 1 - clean))
  for mean, share in kinds:
    residual = cast * (ballots.keep - mean)
    total += residual.T @ (residual * (share * ballots.size)[:, None])
  both = cast.T @ (cast * ballots.size[:, None])
  covariance = np.divide(total, both, out=np.zeros_like(total), where=both > 0)
  scale = np.sqrt(np.diag(covariance))
  scale = np.outer(scale, scale)
  correlation = np.divide(
    covariance, scale, out=np.zeros_like(total), where=scale > 1e-15
  )
  np.fill_diagonal(correlation, 1.0)
  return np.clip(correlation, -1, 1)


def _weights(ballots, correlation):
  """Returns a vote's weight by row [P]: n / (sum of n votes' correlations)."""
  cast = ballots.keep + ballots.drop
  n = cast.sum(axis=1)
  return n / np.clip(((cast @ correlation) * cast).sum(axis=1), n, n * n)


def _rates(ballots, clean, coins, smoothing):
  q = clean * ballots.size
  r = (1 - clean) * ballots.size
  right_keep, wrong_keep = q @ ballots.keep, r @ ballots.keep
  right_drop, wrong_drop = r @ ballots.drop, q @ ballots.drop
  c = (q.sum() + smoothing) / (ballots.size.sum() + 2 * smoothing)
  if coins == 1:
    right, wrong = right_keep + right_drop, wrong_keep + wrong_drop
    a = _share(right, wrong, smoothing)
    return a, a, c
  return (
    _share(right_keep, wrong_drop, smoothing),
    _share(right_drop, wrong_keep, smoothing),
    c,
  )


def _share(right, wrong, smoothing):
  share = (right + smoothing) / np.maximum(
    right + wrong + 2 * smoothing, 1e-300
  )
  return np.clip(share, 1e-10, 1 - 1e-10)


def _log_odds(ballots, rates, weight, monotone):
  a, b, c = rates
  keep = np.log(a) - np.log1p(-b)
  drop = np.log1p(-a) - np.log(b)
  if monotone:
    keep, drop = np.maximum(keep, 0), np.minimum(drop, 0)
  c = np.clip(c, 1e-10, 1 - 1e-10)
  return (
    np.log(c)
    - np.log1p(-c)
    + weight * (ballots.keep @ keep + ballots.drop @ drop)
  )


def _sigmoid(x):
  return 0.5 * (1 + np.tanh(0.5 * x))
