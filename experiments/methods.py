"""Training methods: a name for each (direction, score, weighting)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gradmimic_jax as gm


class Method(NamedTuple):
  """What tells one training method from another."""

  direction: gm.Direction
  score: str
  weighting: gm.Weighting


def _grad_mimic(config: Any) -> Method:
  return Method(gm.toward_weights(), config.score, weighting(config))


# None is a plain step: no direction, no scores, the batch mean.
METHODS: dict[str, Callable[[Any], Method] | None] = {
  "sgd": None,
  "grad_mimic": _grad_mimic,
}


def create(name: str, config: Any) -> Method | None:
  """The method of that name.

  Args:
    name: `config.method`.
    config: `config.mimic`.

  Returns:
    The method, or None for a plain step.

  Raises:
    ValueError: there is no method, or no weighting, of that name.
  """
  if name not in METHODS:
    raise ValueError(
      f"config.method is {name!r}; expected one of {', '.join(METHODS)}."
    )
  make = METHODS[name]
  return None if make is None else make(config)


def weighting(config: Any) -> gm.Weighting:
  """The weighting that `config.mimic` names."""
  known = {
    "softmax": lambda: gm.softmax(config.temperature),
    "ess_softmax": lambda: gm.ess_softmax(config.fraction),
    "top_fraction": lambda: gm.top_fraction(config.fraction),
    "positive": gm.positive,
    "uniform": gm.uniform,
  }
  if config.weighting not in known:
    raise ValueError(
      f"config.mimic.weighting is {config.weighting!r}; expected one of"
      f" {', '.join(known)}."
    )
  return known[config.weighting]()
