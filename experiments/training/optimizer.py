"""Optimizers by name, as optax has them."""

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from gradmimic_jax import layers

_SCHEDULES = ("cosine", "constant")
# Parameters that decay: all, or those of two axes and more; anything else is a
# regular expression.
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
    config: `name`, `learning_rate`, `schedule`, `warmup_steps`, `clip_norm`,
      `weight_decay` and `decaying`; `b1`, `b2` and `epsilon` of AdamW.
    total_steps: of the run.
    last: closes the chain, such as a transformation that bounds a parameter.

  Returns:
    An optax transformation over averaged gradients. Its `init` raises
    ValueError for a pattern of paths that matches nothing.

  Raises:
    ValueError: there is no optimizer or schedule of that name, or a number
      makes no sense.
  """
  rate = _learning_rate(config, total_steps)
  if config.clip_norm < 0:
    raise ValueError(
      f"config.optimizer.clip_norm is {config.clip_norm}; expected the largest"
      " norm of a step's gradient, or 0 for no limit."
    )
  mask = _decay_mask(config.decaying)
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
  parts = [tx]
  if config.clip_norm:
    parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
  if last is not None:
    parts.append(last)
  return optax.chain(*parts) if len(parts) > 1 else tx


def read_average(config: config_dict.ConfigDict) -> float:
  """Reads `config.optimizer.average`; raises ValueError if it is no decay."""
  if not 0 <= config.average < 1:
    raise ValueError(
      f"config.optimizer.average is {config.average}; expected a decay such as"
      " 0.999, of the average over about the last 1 / (1 - decay) steps; or 0"
      " for no average."
    )
  return config.average


def _decay_mask(decaying):
  """Makes optax's mask of the parameters that decay."""
  if decaying in _DECAYING:
    return _DECAYING[decaying]

  def matching(params):
    try:
      flags = layers.choose(decaying, params)
    except ValueError as error:
      raise ValueError(
        f"config.optimizer.decaying is {decaying!r}; expected 'all', 'matrices'"
        f" or a pattern of parameters' paths: {error}"
      ) from error
    return jax.tree.unflatten(jax.tree.structure(params), flags)

  return matching


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
