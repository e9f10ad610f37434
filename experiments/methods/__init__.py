"""Methods by name: how each weighs a batch."""

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
