"""Durations, in epochs, samples or steps: one family of fields for all."""

from typing import Any

from ml_collections import config_dict

UNITS = ("epochs", "samples", "steps")


def overrides(section: Any) -> dict[str, int]:
  """Returns the fields of a run's length, if a section sets any of them.

  Args:
    section: with `num_epochs`, `num_samples` and `num_steps`.

  Returns:
    `{"num_<unit>": value}` of all three; {} where all are 0.
  """
  found = {f"num_{unit}": section[f"num_{unit}"] for unit in UNITS}
  return found if any(found.values()) else {}


def steps(
  config: config_dict.ConfigDict,
  name: str,
  *,
  steps_per_epoch: int | None,
  needed: bool = True,
) -> int:
  """Converts a duration to steps.

  Args:
    config: a run's; `batch_size` and `<name>_epochs`, `<name>_samples` and
      `<name>_steps` are looked at, of which at most one is above 0.
    name: the part before the unit, such as "num" or "checkpoint.every".
    steps_per_epoch: None where the data has no end.
    needed: whether one of the three has to be set.

  Returns:
    The steps, 1 or more; 0 where none is set and none is needed.

  Raises:
    ValueError: none or several are set, one is negative, fewer samples than a
      batch, or epochs of data that has no end.
  """
  section, (*path, last) = config, name.split(".")
  for key in path:
    section = section[key]
  values = {unit: section[f"{last}_{unit}"] for unit in UNITS}
  fields = {unit: f"config.{name}_{unit}" for unit in UNITS}
  for unit, value in values.items():
    if value < 0:
      raise ValueError(
        f"{fields[unit]} is {value}; expected at least {int(needed)}."
      )
  given = [unit for unit, value in values.items() if value]
  if not given and not needed:
    return 0
  if not given:
    raise ValueError(
      f"{fields['epochs']} is 0; expected at least 1, of it or of"
      f" {fields['samples']} or {fields['steps']}."
    )
  if len(given) > 1:
    shown = " and ".join(f"{fields[unit]} is {values[unit]}" for unit in given)
    raise ValueError(f"{shown}; expected one of them, and the others 0.")
  unit = given[0]
  value = values[unit]
  if unit == "steps":
    return value
  if unit == "samples":
    if value < config.batch_size:
      raise ValueError(
        f"{fields[unit]} is {value}, less than one batch of"
        f" {config.batch_size}; expected that many at least."
      )
    return value // config.batch_size
  if steps_per_epoch is None:
    raise ValueError(
      f"{fields[unit]} is {value}, and the data is streamed, without an end:"
      f" set {fields['samples']} or {fields['steps']}, and this to 0."
    )
  return value * steps_per_epoch
