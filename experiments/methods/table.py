"""Training methods: a name for each (direction, score, weighting).

| name                     | direction                 | score         |weights|
|--------------------------|---------------------------|---------------|-------|
| sgd                      | -                         | -             | -     |
| grad_mimic               | of the config             | of the config | w     |
| grad_mimic_weights       | the reference's weights   | of the config | w     |
| grad_mimic_outputs       | the reference's outputs   | of the config | w     |
| grad_mimic_adam          | weights, in Adam's metric | of the config | w     |
| grad_mimic_by_class      | the reference's weights   | less the      | w     |
|                          |                           | class's mean  |       |
| grad_mimic_averaged      | the reference's weights   | of the config,| w     |
|                          |                           | mean of epochs|       |
| influence                | clean gradient            | projection    | w     |
| influence_test_leak      | gradient of test samples  | projection    | w     |
| agra                     | gradient of another batch | cosine        | +     |
| agra_skip                | gradient of another batch | cosine        | + or 0|
| output_agreement         | the reference's outputs,  | in the space  | w     |
|                          | each sample its own       | of outputs    |       |
| rho                      | - (looks at the outputs)  | excess loss   | w     |
| rho_averaged             | - (looks at the outputs)  | excess loss,  | w     |
|                          |                           | mean of epochs|       |
| rho_topk                 | - (looks at the outputs)  | excess loss   | 10 %  |
| rho_as_published         | - (looks at the outputs)  | excess loss   | a     |
| grand                    | -                         | gradient norm | w     |
| grand_offline            | -                         | the same, of  | w     |
|                          |                           | other runs    |       |
| grad_match_separable     | minus the batch's mean    | matching      | p     |
| grad_match_least_squares | minus the batch's mean    | matching      | p     |
| grad_match_omp           | minus the batch's mean    | matching      | p     |
| random                   | -                         | random        | top   |
| distillation             | the reference's outputs   | -             | -     |
| distillation_mixed       | the same, and the labels  | -             | -     |

"Of the config": `config.mimic.direction` and `config.mimic.score`. Weights: w,
`config.mimic.weighting` after `config.mimic.warmup_steps` plain steps; +, equal
on positive scores (if there are none, on all samples; or 0: the step has no
gradient); 10 %, equal on that share; top, equal on `config.mimic.fraction`; p,
in proportion to the score; a, a softmax at `config.mimic.temperature` whose
weights take part in the gradient. What is mixed: `config.mimic.mix` of the
reference's outputs, the rest of the labels.

All of them see the same batches and use the same optimizer. Two are there to
show what a published number rests on: `influence_test_leak` goes by samples of
the very split that it is tested on, and `rho_as_published` weighs some samples
negatively, as the gradient of its weights is left in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gradmimic_jax as gm
from gradmimic_jax.scores import Score

# What `config.mimic.direction` may be, and `config.mimic.score`.
DIRECTIONS = ("weights", "outputs", "clean_gradient", "noisy_gradient")
SCORES = ("projection", "cosine")


class Method(NamedTuple):
  """The choices that tell one training method from another."""

  # One of DIRECTIONS, "test_gradient" or "offline_norms", and by that what a
  # step is given as its reference: weights, outputs for the batch, a batch that
  # is clean, independent or of the test split, or the norms [B] that other runs
  # found. None: no reference.
  direction: str | None
  # A score, or the name of one: of the task's `Outputs.scores`, or else of the
  # library's. None: no scores; steps go in the direction itself.
  score: str | Score | None
  weighting: gm.Weighting | None  # None where there is no score
  detached: bool = True  # False: the weights' own gradient takes part
  by_chance: bool = False  # True: scores that say nothing about the samples
  # Without a score: the share of the divergence from the reference's outputs in
  # what is descended; the rest is the loss by the labels.
  mix: float = 1.0
  # Where on the way to the reference's weights scores are measured, which are
  # averaged: 0 is the learner, 1 the reference.
  points: tuple[float, ...] = (0.0,)
  metric: str = ""  # "adam": of that optimizer's second moments
  by_class: bool = False  # less the mean of the scores of that label
  averaged: bool = False  # over a sample's scores in the epochs so far

  @property
  def is_measured_apart(self) -> bool:
    """True if scores take passes of their own before the step's."""
    return self.points != (0.0,) or bool(self.metric) or self.by_class


def _grad_mimic(
  config: Any, direction: str | None = None, **more: Any
) -> Method:
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
  points = more.pop("points", None) or tuple(config.points)
  if not points or not all(0 <= point <= 1 for point in points):
    raise ValueError(
      f"config.mimic.points is {points}; expected numbers from 0, the learner,"
      " to 1, the reference."
    )
  method = Method(
    direction, config.score, weighting(config), points=points, **more
  )
  if method.is_measured_apart and direction != "weights":
    raise ValueError(
      f"config.mimic.points is {points} with the direction {direction!r};"
      " expected 'weights', as only these have a way to go, or points=(0.0,)."
    )
  return method


def _weighted(direction: str | None, score: str) -> Callable[[Any], Method]:
  return lambda config: Method(direction, score, weighting(config))


def _matching(score: Callable[[Any], Score]) -> Callable[[Any], Method]:
  return lambda config: Method(None, score(config), gm.proportional())


# None is a plain step: no direction, no scores, the batch mean.
METHODS: dict[str, Callable[[Any], Method] | None] = {
  "sgd": None,
  "grad_mimic": _grad_mimic,
  "grad_mimic_weights": functools.partial(_grad_mimic, direction="weights"),
  "grad_mimic_outputs": functools.partial(
    _grad_mimic, direction="outputs", points=(0.0,)
  ),
  "grad_mimic_adam": functools.partial(
    _grad_mimic, direction="weights", points=(0.0,), metric="adam"
  ),
  "grad_mimic_by_class": functools.partial(
    _grad_mimic, direction="weights", points=(0.0,), by_class=True
  ),
  "grad_mimic_averaged": functools.partial(
    _grad_mimic, direction="weights", points=(0.0,), averaged=True
  ),
  "influence": _weighted("clean_gradient", "projection"),
  "influence_test_leak": _weighted("test_gradient", "projection"),
  "agra": lambda config: Method(
    "noisy_gradient", "cosine", gm.positive(otherwise="uniform")
  ),
  "agra_skip": lambda config: Method(
    "noisy_gradient", "cosine", gm.positive(otherwise="skip")
  ),
  "output_agreement": _weighted("outputs", "output_agreement"),
  "rho": _weighted("outputs", "excess_loss"),
  "rho_averaged": lambda config: Method(
    "outputs", "excess_loss", weighting(config), averaged=True
  ),
  "rho_topk": lambda config: Method(
    "outputs", "excess_loss", gm.top_fraction(0.1)
  ),
  "rho_as_published": lambda config: Method(
    "outputs", "excess_loss", gm.softmax(config.temperature), detached=False
  ),
  "grand": _weighted(None, "gradient_norm"),
  "grand_offline": _weighted("offline_norms", "given"),
  "grad_match_separable": _matching(lambda config: gm.matching.separable()),
  "grad_match_least_squares": _matching(
    lambda config: gm.matching.least_squares(ridge=config.ridge)
  ),
  "grad_match_omp": _matching(
    lambda config: gm.matching.omp(config.fraction, ridge=config.ridge)
  ),
  "random": lambda config: Method(
    None, gm.random_score(), gm.top_fraction(config.fraction), by_chance=True
  ),
  "distillation": lambda config: Method("outputs", None, None),
  "distillation_mixed": lambda config: Method(
    "outputs", None, None, mix=config.mix
  ),
}


def create(name: str, config: Any) -> Method | None:
  """The method of that name, by `config.mimic`; None for a plain step.

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
    "proportional": gm.proportional,
    "uniform": gm.uniform,
  }
  if config.weighting not in known:
    raise ValueError(
      f"config.mimic.weighting is {config.weighting!r}; expected one of"
      f" {', '.join(known)}."
    )
  chosen = known[config.weighting]()
  if not config.warmup_steps:
    return chosen
  return gm.warmup(chosen, steps=config.warmup_steps)


def tells_samples_apart(method: Method | None) -> bool:
  """True if the method's scores say anything about the samples."""
  return (
    method is not None and method.score is not None and not method.by_chance
  )


def reads_layers(method: Method | None) -> bool:
  """True if its scores depend on `config.mimic.layers`."""
  score = method and method.score
  # A name that the library doesn't know is of a task: it looks at outputs.
  kind = gm.scores.SCORES.get(score) if isinstance(score, str) else score
  return kind is not None and kind.needs_gradients
