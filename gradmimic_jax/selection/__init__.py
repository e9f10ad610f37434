"""Stage 2: from every sample's scores over the steps to a filter."""

from gradmimic_jax.selection.auto import auto
from gradmimic_jax.selection.binarize import Binarizer, Cut
from gradmimic_jax.selection.binarizers import BINARIZERS
from gradmimic_jax.selection.label_model import (
  LABEL_MODELS,
  KeepProbability,
  LabelModel,
)
from gradmimic_jax.selection.selection import Selection, select

__all__ = [
  "BINARIZERS",
  "LABEL_MODELS",
  "Binarizer",
  "Cut",
  "KeepProbability",
  "LabelModel",
  "Selection",
  "auto",
  "select",
]
