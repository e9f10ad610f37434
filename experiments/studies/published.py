"""Numbers that the paper reports, in `results/published.json`."""

import functools
import pathlib
from typing import Any

from experiments.runtime import workdir as workdir_lib

FILE = pathlib.Path(__file__).parents[2] / "results" / "published.json"
RATES = (0.4, 0.5, 0.6)  # of noise, at which there are numbers


@functools.cache
def load() -> dict[str, Any]:
  """The file's content; {} where an installation lacks it."""
  return workdir_lib.read_json(FILE, {}) if FILE.exists() else {}


def find(table: str, dataset: str, name: str, rate: float) -> float | None:
  """Finds a published number in [0, 1]; None if there is none at that rate.

  Tables are "heads" and "finetuned", of test accuracy by method, and "f1", by
  binariser; data sets have their TFDS names.
  """
  values = load().get(table, {}).get(dataset, {}).get(name)
  if values is None or rate not in RATES:
    return None
  return round(values[RATES.index(rate)] / 100, 4)
