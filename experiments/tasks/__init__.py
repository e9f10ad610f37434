"""Tasks, the kinds of learning: a folder for each, and one line here."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from experiments.runtime import distributed
from experiments.tasks.base import Task

_CLASSES = {
  "classification": "Classification",
  "contrastive": "Contrastive",
  "language": "Language",
}


class _Tasks(Mapping[str, type[Task]]):
  """The tasks by name; each is imported when it is asked for."""

  def __getitem__(self, name: str) -> type[Task]:
    module = importlib.import_module(f"{__name__}.{name}.task")
    return getattr(module, _CLASSES[name])

  def __contains__(self, name: object) -> bool:
    return name in _CLASSES

  def __iter__(self) -> Iterator[str]:
    return iter(_CLASSES)

  def __len__(self) -> int:
    return len(_CLASSES)


TASKS: Mapping[str, type[Task]] = _Tasks()


def get(config: Mapping[str, Any], where: str = "config") -> type[Task]:
  """Finds the task that `config.task` names.

  Args:
    config: a run's, or a study's.
    where: place of the field, for the error.

  Returns:
    Its class.

  Raises:
    ValueError: there is no such task.
  """
  name = config.get("task")
  if name not in TASKS:
    raise ValueError(
      f"{where} has the task {name!r}; expected one of {', '.join(TASKS)}."
    )
  return TASKS[str(name)]


def create(
  config: config_dict.ConfigDict,
  devices: distributed.Devices,
  *,
  direction: str | None = None,
) -> Task:
  """Creates the task of a run, with its data and its model.

  Args:
    config: the run's.
    devices: the devices to compute on.
    direction: of the run's method; None: it has none.

  Returns:
    The Task.

  Raises:
    ValueError: no such task, or a field that makes no sense.
    FileNotFoundError: data or weights that are not there.
  """
  return get(config)(config, devices, direction=direction)
