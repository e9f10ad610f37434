"""Label models: what turns a sample's T votes into one probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class KeepProbability(NamedTuple):
  """What a label model says."""

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


LABEL_MODELS: dict[str, LabelModel] = {"majority": majority}


def make_label_model(name: Any) -> LabelModel:
  """The label model of a name, or the given one.

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
