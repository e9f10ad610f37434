"""Scores: a sample's agreement with the direction, raw, high = good.

A score is computed from two numbers a sample, both over the mimic layers only:
the descent `<-g_i, v> / ||v||` along the unit direction and, where the score
asks for it, the gradient norm `||g_i||`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gradmimic_jax import _validate


@dataclasses.dataclass(frozen=True)
class Score:
  """How descents and gradient norms become scores.

  Attributes:
    name: what `score=` calls it.
    fn: `(descents [B], gradient norms [B] or None) -> scores [B]`.
    needs_norms: whether `fn` looks at the gradient norms.
  """

  name: str
  fn: Callable[[jax.Array, jax.Array | None], jax.Array]
  needs_norms: bool


def _projection(descents, norms):
  del norms
  return descents


def _cosine(descents, norms):
  # A zero gradient agrees with no direction: its cosine is 0, not 0 / 0.
  return jnp.where(norms == 0, 0, descents / jnp.where(norms == 0, 1, norms))


SCORES = {
  score.name: score
  for score in (
    Score("projection", _projection, needs_norms=False),
    Score("cosine", _cosine, needs_norms=True),
  )
}


def get(name: str) -> Score:
  """The score of that name.

  `"projection"`: `m_i = <-g_i, v> / ||v||`, unbounded, in units of loss per
  unit of parameter distance. `"cosine"`: `m_i = <-g_i, v> / (||g_i|| ||v||)`,
  in [-1, 1].

  Args:
    name: `"projection"` or `"cosine"`.

  Returns:
    The Score.

  Raises:
    ValueError: there is no score of that name.

  Example:
    >>> get("cosine").needs_norms
    True

  References:
    Huang et al., `arXiv:2501.06708 <https://arxiv.org/abs/2501.06708>`_,
    section 3.
  """
  _validate.choice("score", name, SCORES)
  return SCORES[name]
