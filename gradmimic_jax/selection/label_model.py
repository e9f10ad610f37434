"""Label models: they turn a sample's T votes into one probability.

| name                      | voters differ | in how right they are            |
|---------------------------|---------------|----------------------------------|
| "majority"                | no            | a vote is a vote                 |
| "one_coin"                | yes           | as often on clean as on noisy    |
| "two_coin", "label_model" | yes           | apart for clean and for noisy    |
| "triplet"                 | yes           | as "one_coin", in closed form    |

All but the majority have these guarantees (the middle two unless told not to
temper):

- Votes that all agree are never contradicted.
- Of two samples with votes by the same voters, one that has a keep vote
  wherever the other has one is never the less probable.
- Copies of a vote count once. Votes of successive epochs are nearly copies;
  taken for independent ones they would make every sample look certain.
- Fewer than three voters say nothing about how good they are: it is the
  majority then, and the diagnostics say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gradmimic_jax.selection import voters as voters_lib


class KeepProbability(NamedTuple):
  """The outcome of a label model."""

  probability: np.ndarray  # [N], nan where a sample has no vote
  diagnostics: dict[str, Any]  # plain numbers and strings, by name


# votes int8 [N, T] (1 keep, 0 drop, -1 abstain) -> KeepProbability
LabelModel = Callable[[np.ndarray], KeepProbability]


def majority(votes: np.ndarray) -> KeepProbability:
  """The share of keep votes among a sample's votes.

  p_i = #keep_i / (#keep_i + #drop_i); abstentions don't count, and p_i is nan
  where all abstain.

  Args:
    votes: int8 [N, T], 1 keep, 0 drop, -1 abstain.

  Returns:
    KeepProbability(probability float64 [N], diagnostics {}).

  Example:
    >>> majority(np.array([[1, 0, 1], [0, -1, 1], [-1, -1, -1]])).probability
    array([0.66666667, 0.5       ,        nan])

  References:
    The plain ensemble of arXiv 2501.06708's second stage, in place of its
    weak-supervision label model.
  """
  keep = np.zeros(len(votes))
  cast = np.zeros(len(votes))
  for column in votes.T:  # one step at a time: N may be in the millions
    keep += column == 1
    cast += column >= 0
  probability = np.full(len(votes), np.nan)
  np.divide(keep, cast, out=probability, where=cast > 0)
  return KeepProbability(probability, {})


def one_coin(
  votes: np.ndarray, *, temper: bool = True, smoothing: float = 1.0
) -> KeepProbability:
  """Dawid and Skene's model, with one accuracy a voter.

  As `two_coin` with P(keep | clean) = P(drop | noisy): half as much to learn,
  for few samples or voters.

  Args:
    votes: int8 [N, T], 1 keep, 0 drop, -1 abstain.
    temper: Whether to weigh dependent votes down.
    smoothing: Pseudo-votes right and wrong that each voter starts with.

  Returns:
    KeepProbability; the names in the diagnostics are those of `two_coin`.

  Raises:
    ValueError: votes that aren't [N, T] or hold other values.

  Example:
    >>> votes = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]] * 9)
    >>> one_coin(votes).probability[:4] > 0.5
    array([ True,  True, False, False])

  References:
    Zhang et al., Spectral Methods Meet EM, https://arxiv.org/abs/1406.3824
  """
  return _dawid_skene(votes, 1, temper, smoothing)


def two_coin(
  votes: np.ndarray, *, temper: bool = True, smoothing: float = 1.0
) -> KeepProbability:
  """Dawid and Skene's model, by expectation maximisation.

  A sample is clean with probability c; voter t votes keep on a clean one with
  probability a_t, drop on a noisy one with probability b_t:

    logit p_i = logit c + w_i sum_t log(P(vote_it | clean) / P(vote_it | noisy))

  All are learned from the votes alone. w_i = 1 if votes are independent given
  the truth; tempered, it is the effective number of i's votes over their
  number, n_i / sum_ts rho_ts, which for one correlation rho among T voters is
  T_eff / T with T_eff = T / (1 + (T - 1) rho). Without tempering it is maximum
  likelihood (but for the smoothing).

  The diagnostics: `n_voters`, `effective_voters` (T_eff), `vote_correlation`
  (rho, the mean over pairs), `clean_fraction` (c), `converged`, `iterations`,
  `corrected` (samples whose votes all agreed and whose probability was on the
  other side), `split_votes` (as many keep as drop votes), `split_kept` (how
  many of these are kept), `note`; and lists over the steps, None where a step
  has no votes: `coverages` (votes among the samples), `agreements` (votes that
  are the decision), `accuracies`, `keep_accuracies`, `drop_accuracies` (c a_t +
  (1 - c) b_t, a_t, b_t).

  | edge case                      | behaviour                               |
  |--------------------------------|-----------------------------------------|
  | a sample without a vote        | nan                                     |
  | a step without votes           | left out                                |
  | fewer than three voters        | the majority; in `note`                 |
  | EM has not settled             | the last estimate; `converged`, `note`  |
  | a voter worse than chance      | counts for nothing (tempered)           |

  Args:
    votes: int8 [N, T], 1 keep, 0 drop, -1 abstain.
    temper: Whether to weigh dependent votes down.
    smoothing: Pseudo-votes right and wrong that each voter starts with.

  Returns:
    KeepProbability(probability float64 [N], diagnostics).

  Raises:
    ValueError: votes that aren't [N, T] or hold other values.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> clean = rng.random(2000) < 0.7
    >>> right = rng.random((2000, 4)) < [0.9, 0.8, 0.7, 0.6]
    >>> _, about = two_coin(np.where(right, clean[:, None], ~clean[:, None]))
    >>> print([f"{accuracy:.1f}" for accuracy in about["accuracies"]])
    ['0.9', '0.8', '0.7', '0.6']

  References:
    Dawid and Skene, Maximum Likelihood Estimation of Observer Error-Rates
    Using the EM Algorithm, 1979.
  """
  return _dawid_skene(votes, 2, temper, smoothing)


def triplet(
  votes: np.ndarray, *, temper: bool = True, smoothing: float = 1.0
) -> KeepProbability:
  """Weak supervision's closed form: accuracies from agreements by threes.

  The model is that of `one_coin`; a voter's accuracy is the median of what its
  agreement with any two others says.

  Args:
    votes: int8 [N, T], 1 keep, 0 drop, -1 abstain.
    temper: Whether to weigh dependent votes down.
    smoothing: Pseudo-votes right and wrong that each voter starts with.

  Returns:
    KeepProbability; the names in the diagnostics are those of `two_coin`.

  Raises:
    ValueError: votes that aren't [N, T] or hold other values.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> clean = rng.random(2000) < 0.7
    >>> right = rng.random((2000, 4)) < [0.9, 0.8, 0.7, 0.6]
    >>> _, about = triplet(np.where(right, clean[:, None], ~clean[:, None]))
    >>> print([f"{accuracy:.1f}" for accuracy in about["accuracies"]])
    ['0.9', '0.8', '0.7', '0.6']

  References:
    Fu et al., Fast and Three-rious: Speeding Up Weak Supervision with Triplet
    Methods, https://arxiv.org/abs/2002.11955
  """
  return _decided(
    votes,
    lambda ballots: voters_lib.fit_triplet(
      ballots, temper=temper, smoothing=smoothing
    ),
  )


LABEL_MODELS: dict[str, LabelModel] = {
  "majority": majority,
  "one_coin": one_coin,
  "two_coin": two_coin,
  "triplet": triplet,
  "label_model": two_coin,  # the recommended one
}


def make_label_model(name: Any) -> LabelModel:
  """Returns the label model of a name, or the given one.

  Args:
    name: a key of `LABEL_MODELS`, or a label model.

  Returns:
    A label model.

  Raises:
    TypeError: neither a name nor a function.
    ValueError: an unknown name.

  Example:
    >>> make_label_model("majority") is majority
    True
  """
  if callable(name):
    return name
  if not isinstance(name, str):
    raise TypeError(
      f"aggregate is {name!r}; expected one of {sorted(LABEL_MODELS)}, or a"
      " function votes [N, T] -> KeepProbability."
    )
  if name not in LABEL_MODELS:
    raise ValueError(
      f"aggregate is {name!r}; expected one of {sorted(LABEL_MODELS)}."
    )
  return LABEL_MODELS[name]


def agreeing(probability: np.ndarray, votes: np.ndarray) -> np.ndarray:
  """Corrects probabilities [N] that contradict votes [N, T] that all agree.

  A clean fraction near 0 or 1 can outweigh a few weak votes. The votes win: the
  sample goes just to their side of 1/2.
  """
  share = majority(votes).probability
  probability = np.where(
    share == 1, np.maximum(probability, np.nextafter(0.5, 1)), probability
  )
  return np.where(
    share == 0, np.minimum(probability, np.nextafter(0.5, 0)), probability
  )


def _dawid_skene(
  votes: np.ndarray, coins: int, temper: bool, smoothing: float
) -> KeepProbability:
  return _decided(
    votes,
    lambda ballots: voters_lib.fit_dawid_skene(
      ballots, coins=coins, temper=temper, smoothing=smoothing
    ),
  )


def _decided(
  votes: np.ndarray,
  fit: Callable[[voters_lib.Ballots], voters_lib.Voters],
) -> KeepProbability:
  """Fits a model of the voters and keeps the guarantees."""
  votes = np.asarray(votes)
  if votes.ndim != 2 or not np.isin(votes, (-1, 0, 1)).all():
    raise ValueError(
      f"votes has shape {votes.shape} and values {np.unique(votes)[:5]};"
      " expected [N, T], 1 keep, 0 drop, -1 abstain."
    )
  share = majority(votes).probability
  counts = (votes >= 0).sum(axis=0)
  voters, voted = np.flatnonzero(counts), ~np.isnan(share)
  n_voters = len(voters)
  if n_voters < 3:
    note = (
      f"{n_voters} voters: it takes three to tell how good each is; taken by"
      " majority"
    )
    nothing = voters_lib.Voters(
      *(np.full(n_voters, np.nan),) * 2,
      np.nan,
      np.full((n_voters, n_voters), np.nan),
      np.empty(0),
      True,
      0,
    )
    return KeepProbability(
      share, _about(votes, voters, nothing, share, share, note)
    )
  ballots = voters_lib.count_ballots(votes[np.ix_(voted, voters)])
  found = fit(ballots)
  free = np.full(len(votes), np.nan)
  free[voted] = (0.5 * (1 + np.tanh(0.5 * found.log_odds)))[ballots.row]
  probability = agreeing(free, votes)
  note = (
    "" if found.converged else f"not settled after {found.iterations} rounds"
  )
  return KeepProbability(
    probability, _about(votes, voters, found, free, probability, note)
  )


def _about(votes, voters, found, free, probability, note) -> dict[str, Any]:
  """Makes the diagnostics, all in numbers and strings that JSON has."""
  n_steps, n_voters = votes.shape[1], len(voters)
  keep = ~(probability < 0.5)
  share = majority(votes).probability
  coverages, agreements = [], []
  for column in votes.T:
    cast = column >= 0
    coverages.append(float(cast.mean()))
    agreements.append(
      float(((column == 1) == keep)[cast].mean()) if cast.any() else None
    )

  def by_step(values):
    every = np.full(n_steps, np.nan)
    every[voters] = values
    return [_number(value) for value in every]

  correlation, effective = np.nan, float(n_voters)
  if n_voters > 1:
    others = found.correlation.sum() - n_voters
    correlation = others / (n_voters * (n_voters - 1))
    effective = n_voters / (1 + (n_voters - 1) * np.clip(correlation, 0, 1))
  a, b, c = found.keep_accuracy, found.drop_accuracy, found.clean_fraction
  return {
    "n_voters": n_voters,
    "effective_voters": _number(effective),
    "vote_correlation": _number(correlation),
    "clean_fraction": _number(c),
    "converged": bool(found.converged),
    "iterations": int(found.iterations),
    "corrected": int((probability != free)[~np.isnan(free)].sum()),
    "split_votes": int((share == 0.5).sum()),
    "split_kept": int(keep[share == 0.5].sum()),
    "coverages": coverages,
    "agreements": agreements,
    "accuracies": by_step(c * a + (1 - c) * b),
    "keep_accuracies": by_step(a),
    "drop_accuracies": by_step(b),
    "note": note,
  }


def _number(value: float) -> float | None:
  return None if np.isnan(value) else float(value)
