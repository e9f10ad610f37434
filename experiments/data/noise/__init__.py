"""Wrong labels and captions with known truth."""

from experiments.data.noise.labels import (
  KINDS,
  NoisyLabels,
  apply_noise,
  load,
  save,
)

__all__ = [
  "KINDS",
  "NoisyLabels",
  "apply_noise",
  "load",
  "save",
]
