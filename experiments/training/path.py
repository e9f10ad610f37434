"""Weights by scores of other points than the step's own, or made otherwise.

With r the reference and v = r - p the way to it, the excess loss is the mimic
score integrated along that way (the fundamental theorem of calculus):

l(p) - l(r) = integral over a from 0 to 1 of <-grad l(p + a v), v> da

so that the mimic score, at a = 0, and the excess loss are the ends of one
family, and a few points in between are a rule of quadrature.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm
from experiments.methods import Method
from experiments.tasks.base import Outputs
from experiments.training import gradients
from gradmimic_jax import directions

# Of Adam: what keeps its steps finite.
_EPSILON = 1e-8


def make_path(
  losses_fn: Callable[..., Any],
  method: Method,
  config: Any,
  outputs: Outputs | None,
) -> gradients.Gradient:
  """Makes the gradient reweighted by scores that are measured beforehand.

  Args:
    losses_fn: as in `steps.make_train_step`, and so are the others.
    method: toward weights, with `points`, `metric` or `by_class`.
    config: `config.mimic`.
    outputs: the task's.

  Returns:
    The gradient. A pass for each of the method's points comes before its own.
  """
  options = gradients.make_options(losses_fn, method, config, outputs)
  # At the reference itself there is no way left, but that of the learner is.
  options["direction"] = lambda params, way, batch, **kwargs: way
  measure = gm.mimic_scores(**options)
  weighted = gradients.make_mimic(
    losses_fn, method._replace(score="given"), config, outputs
  )

  def gradient(state, reference, batch):
    target = directions.match_params(reference, state.params)
    variables = gradients.as_variables(gradients.get_statistics(state))
    way = gap = directions.gap(state.params, target)
    if method.metric == "adam":
      way = jax.tree.map(_scaled, gap, _second_moments(state))

    def score_at(point):
      params = jax.tree.map(
        lambda p, v: p + point * v.astype(p.dtype), state.params, gap
      )
      return measure(params, way, batch, mask=batch["mask"], **variables).scores

    scores = sum(map(score_at, method.points)) / len(method.points)
    if method.by_class:
      scores = _centred(scores, batch)
    return weighted(state, jax.lax.stop_gradient(scores), batch)

  return gradient


def _scaled(way, moments):
  """The way as a step of Adam's has it."""
  return way / (jnp.sqrt(moments) + _EPSILON)


def _second_moments(state):
  moments = optax.tree.get(state.opt_state, "nu")
  if moments is None:
    raise ValueError(
      "the method goes by Adam's second moments, and config.optimizer has none;"
      " expected config.optimizer.name='adamw'."
    )
  return moments


def _centred(scores, batch):
  """Scores less the mean of those in the batch that have the same label."""
  valid = batch["mask"] & jnp.isfinite(scores)
  alike = batch["label"][:, None] == batch["label"][None, :]
  alike = (alike & valid[None, :]).astype(scores.dtype)
  sums = alike @ jnp.where(valid, scores, 0)
  return scores - sums / jnp.maximum(jnp.sum(alike, axis=1), 1)
