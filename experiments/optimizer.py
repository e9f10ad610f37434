"""Optimizers by name, as optax has them."""

from typing import Any

import optax


def create(config: Any) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`.

  Args:
    config: `name`, `learning_rate`, `weight_decay`.

  Returns:
    An optax transformation over averaged gradients.

  Raises:
    ValueError: there is no optimizer of that name.
  """
  if config.name == "adamw":
    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
  if config.name == "sgd":
    return optax.chain(
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(config.learning_rate, momentum=0.9),
    )
  raise ValueError(
    f"config.optimizer.name is {config.name!r}; expected 'adamw' or 'sgd'."
  )
