"""Optimizers by name, as optax has them."""

from typing import Any

import optax


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


def _learning_rate(config, total_steps):
  if config.schedule == "constant":
    return optax.constant_schedule(config.learning_rate)
  if config.schedule == "cosine":
    return optax.cosine_decay_schedule(config.learning_rate, total_steps)
  raise ValueError(
    f"config.optimizer.schedule is {config.schedule!r}; expected 'cosine' or"
    " 'constant'."
  )
