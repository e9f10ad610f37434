"""Methods by name: how each weighs a batch."""

from experiments.methods.table import (
  DIRECTIONS,
  METHODS,
  Method,
  create,
  reads_layers,
  tells_samples_apart,
)

__all__ = [
  "DIRECTIONS",
  "METHODS",
  "Method",
  "create",
  "reads_layers",
  "tells_samples_apart",
]
