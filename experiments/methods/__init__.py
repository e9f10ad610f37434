"""How a method weighs a batch: a table of methods."""

from experiments.methods.table import (
  DIRECTIONS,
  METHODS,
  SCORES,
  Method,
  create,
  reads_layers,
  tells_samples_apart,
  weighting,
)

__all__ = [
  "DIRECTIONS",
  "METHODS",
  "SCORES",
  "Method",
  "create",
  "reads_layers",
  "tells_samples_apart",
  "weighting",
]
