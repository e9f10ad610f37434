"""The reference, as a training step receives it."""

import pathlib

from ml_collections import config_dict

from experiments.methods import Method
from experiments.tasks import Task
from experiments.tasks.base import Reference
from experiments.training import grand


def load(
  config: config_dict.ConfigDict,
  method: Method | None,
  task: Task,
  folder: pathlib.Path | None = None,
) -> Reference | None:
  """Loads the reference that a method asks for.

  Args:
    config: the run's.
    method: the run's, or None.
    task: the run's.
    folder: the run's, which keeps results that take long; None keeps nothing.

  Returns:
    A Reference, or None for a method that needs none.

  Raises:
    ValueError: no reference, or one that doesn't fit.
    TypeError: outputs that are not floating point.
    FileNotFoundError: a reference that is not there.
  """
  if method is None or method.direction is None:
    return None
  if method.direction == "offline_norms":
    return grand.load(config, task.data, folder, task.devices)
  return task.load_reference(method.direction)
