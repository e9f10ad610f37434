"""Optimizers by name, as optax has them."""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

_SCHEDULES = ("cosine", "constant")
# Parameters that decay: all, or those of two axes and more.
_DECAYING = {
  "all": None,
  "matrices": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
}


def create(
  config: config_dict.ConfigDict,
  *,
  total_steps: int,
  last: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
  """Creates the optimizer of `config.optimizer`.

  Args:
    config: `name`, `learning_rate`, `schedule`, `warmup_steps`, `weight_decay`
      and `decaying`; `b1`, `b2` and `epsilon` of AdamW.
    total_steps: of the run.
    last: closes the chain, such as a transformation that bounds a parameter.

  Returns:
    An optax transformation over averaged gradients.

  Raises:
    ValueError: there is no optimizer, schedule or choice of that name.
  """
  rate = _learning_rate(config, total_steps)
  if config.decaying not in _DECAYING:
    raise ValueError(
      f"config.optimizer.decaying is {config.decaying!r}; expected one of"
      f" {', '.join(_DECAYING)}."
    )
  mask = _DECAYING[config.decaying]
  if config.name == "adamw":
    tx = optax.adamw(
      rate,
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=mask,
    )
  elif config.name == "sgd":
    tx = optax.chain(
      optax.add_decayed_weights(config.weight_decay, mask=mask),
      optax.sgd(rate, momentum=0.9),
    )
  else:
    raise ValueError(
      f"config.optimizer.name is {config.name!r}; expected 'adamw' or 'sgd'."
    )
  return tx if last is None else optax.chain(tx, last)


def _learning_rate(config, total_steps):
  """Makes a line up to the learning rate, then half a cosine to 0, or none.

  The first step has 1 / warmup_steps of the rate, not 0, as in OpenCLIP.
  """
  if config.schedule not in _SCHEDULES:
    raise ValueError(
      f"config.optimizer.schedule is {config.schedule!r}; expected 'cosine' or"
      " 'constant'."
    )
  warmup = config.warmup_steps
  if not warmup and config.schedule == "cosine":
    return optax.cosine_decay_schedule(config.learning_rate, total_steps)
  if not warmup:
    return optax.constant_schedule(config.learning_rate)

  def rate(step):
    share = jnp.minimum((step + 1) / warmup, 1.0)
    if config.schedule == "cosine":
      done = jnp.maximum(step - warmup, 0) / max(total_steps - warmup, 1)
      share = jnp.where(step < warmup, share, (1 + jnp.cos(math.pi * done)) / 2)
    return config.learning_rate * share

  return rate
