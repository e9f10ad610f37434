"""Optimizers by name, as optax has them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.tasks.contrastive import losses as contrastive


def create(config: Any, *, total_steps: int) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`.

  Args:
    config: `name`, `learning_rate`, `schedule`, `weight_decay`.
    total_steps: of the run.

  Returns:
    An optax transformation over averaged gradients.

  Raises:
    ValueError: there is no optimizer, or no schedule, of that name.
  """
  rate = _learning_rate(config, total_steps)
  if config.name == "adamw":
    return optax.adamw(rate, weight_decay=config.weight_decay)
  if config.name == "sgd":
    return optax.chain(
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(rate, momentum=0.9),
    )
  raise ValueError(
    f"config.optimizer.name is {config.name!r}; expected 'adamw' or 'sgd'."
  )


def for_contrastive(
  config: Any, *, total_steps: int
) -> optax.GradientTransformation:
  """AdamW as CLIP's training has it; the logit scale stays in its bounds.

  Weights decay, gains, biases and all else of fewer than two axes don't.

  Args:
    config: `config.optimizer`: `learning_rate`, `schedule`, `warmup_steps`,
      `weight_decay`, `b1`, `b2` and `epsilon`.
    total_steps: of the run.

  Returns:
    An optax transformation over averaged gradients.

  Raises:
    ValueError: there is no schedule of that name.
  """
  return optax.chain(
    optax.adamw(
      _warmed_up(config, total_steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ),
    contrastive.keep_logit_scale(),
  )


def _warmed_up(config, total_steps) -> Callable[[jax.Array], jax.Array]:
  """A line up to the learning rate, and half a cosine down to 0, or none.

  The first step has 1 / warmup_steps of the rate, not 0: so do OpenCLIP's.
  """
  warmup = config.warmup_steps
  if config.schedule not in ("cosine", "constant"):
    raise ValueError(
      f"config.optimizer.schedule is {config.schedule!r}; expected 'cosine' or"
      " 'constant'."
    )

  def rate(step):
    share = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    if config.schedule == "cosine":
      done = jnp.maximum(step - warmup, 0) / max(total_steps - warmup, 1)
      share = jnp.where(step < warmup, share, (1 + jnp.cos(math.pi * done)) / 2)
    return config.learning_rate * share

  return rate


def _learning_rate(config, total_steps):
  if config.schedule == "constant":
    return optax.constant_schedule(config.learning_rate)
  if config.schedule == "cosine":
    return optax.cosine_decay_schedule(config.learning_rate, total_steps)
  raise ValueError(
    f"config.optimizer.schedule is {config.schedule!r}; expected 'cosine' or"
    " 'constant'."
  )
