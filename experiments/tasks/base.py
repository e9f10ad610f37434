"""What a task makes of a model's outputs: of logits, or of features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import gradmimic_jax as gm


class Outputs(NamedTuple):
  """The learner's and the reference's outputs, as a task sees them."""

  of: Callable[..., Any]  # (params, batch) -> the learner's outputs
  # (outputs, batch) -> losses [B] and hits [B]
  losses_and_hits: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  direction: gm.Direction  # toward the reference's outputs for the batch
  # (outputs, the reference's, batch) -> scores [B], each sample's on its own
  agreement: Callable[[Any, Any, Any], jax.Array]
