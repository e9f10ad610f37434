"""Training methods: a name for each (direction, score, weighting).

| name               | direction                    | score               |
|--------------------|------------------------------|---------------------|
| sgd                | -                            | -                   |
| grad_mimic         | config.mimic.direction       | config.mimic.score  |
| grad_mimic_weights | the reference's weights      | config.mimic.score  |
| grad_mimic_outputs | the reference's outputs      | config.mimic.score  |
| rho                | - (looks at the outputs)     | excess loss         |
| grand              | -                            | gradient norm       |
| distillation       | the reference's outputs      | -                   |

All of them see the same batches and use the same optimizer. The weighting of
those with a score is `config.mimic.weighting`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gradmimic_jax as gm

# What `config.mimic.direction` may be, and `config.mimic.score`.
DIRECTIONS = ("weights", "outputs", "clean_gradient")
SCORES = ("projection", "cosine")


class Method(NamedTuple):
  """What tells one training method from another."""

  # One of DIRECTIONS, and by that what a step is given as its reference:
  # weights, outputs for the batch, or a clean batch. None: no reference.
  direction: str | None
  score: str | None  # None: no scores; steps go in the direction itself
  weighting: gm.Weighting | None  # None where there is no score


def _grad_mimic(config: Any, direction: str | None = None) -> Method:
  direction = direction or config.direction
  if direction not in DIRECTIONS:
    raise ValueError(
      f"config.mimic.direction is {direction!r}; expected one of"
      f" {', '.join(DIRECTIONS)}."
    )
  if config.score not in SCORES:
    raise ValueError(
      f"config.mimic.score is {config.score!r}; expected one of"
      f" {', '.join(SCORES)} (excess loss and gradient norm are methods of"
      " their own: rho and grand)."
    )
  return Method(direction, config.score, weighting(config))


def _rho(config: Any) -> Method:
  return Method("outputs", "excess_loss", weighting(config))


def _grand(config: Any) -> Method:
  return Method(None, "gradient_norm", weighting(config))


def _distillation(config: Any) -> Method:
  del config
  return Method("outputs", None, None)


# None is a plain step: no direction, no scores, the batch mean.
METHODS: dict[str, Callable[[Any], Method] | None] = {
  "sgd": None,
  "grad_mimic": _grad_mimic,
  "grad_mimic_weights": functools.partial(_grad_mimic, direction="weights"),
  "grad_mimic_outputs": functools.partial(_grad_mimic, direction="outputs"),
  "rho": _rho,
  "grand": _grand,
  "distillation": _distillation,
}


def create(name: str, config: Any) -> Method | None:
  """The method of that name.

  Args:
    name: `config.method`.
    config: `config.mimic`.

  Returns:
    The method, or None for a plain step.

  Raises:
    ValueError: there is no method, direction, score or weighting of that name.
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
