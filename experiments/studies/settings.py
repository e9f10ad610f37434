"""Settings that tuning found, in a file that studies read."""

import pathlib
from typing import Any

from ml_collections import config_dict

from experiments import methods
from gradmimic_jax import _files


def read(path: str | None) -> dict[str, dict[str, Any]]:
  """The settings in a file that `experiments.tune` wrote; {} for None.

  Returns:
    For each method that was tuned its config's fields, `{"dotted.field":
    value}`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is of another kind, or has a method that isn't there.
  """
  if path is None:
    return {}
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"config.study.tuned is {path!r}, and there is no such file; expected the"
      " tuned.json of experiments.tune."
    )
  try:
    found = _files.read_json(path)
    settings = {name: dict(entry["set"]) for name, entry in found.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"config.study.tuned is {path!r}, which can't be read as the tuned.json"
      f" of experiments.tune ({error})."
    ) from None
  for name in settings:
    if name not in methods.METHODS:
      raise ValueError(
        f"{path} has settings of {name!r}; there is no method of that name."
      )
  return settings


def fields_read(name: str, config: config_dict.ConfigDict) -> set[str]:
  """The names of the fields of `config.mimic` that a method looks at."""
  seen = set()

  class Recorder:
    def __getattr__(self, field):
      seen.add(field)
      return config[field]

  methods.create(name, Recorder())
  return seen
