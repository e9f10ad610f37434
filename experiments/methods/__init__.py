"""How a method weighs a batch: a table of methods."""

from experiments.methods.table import (
  DIRECTIONS,
  METHODS,
  OUTPUT_AGREEMENT,
  RANDOM,
  SCORES,
  Method,
  create,
  reads_layers,
  weighting,
)

__all__ = [
  "DIRECTIONS",
  "METHODS",
  "OUTPUT_AGREEMENT",
  "RANDOM",
  "SCORES",
  "Method",
  "create",
  "reads_layers",
  "weighting",
]
