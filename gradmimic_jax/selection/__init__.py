"""Stage 2: from every sample's scores over the steps to a filter."""

from gradmimic_jax.selection import decisions, export, filters
from gradmimic_jax.selection.binarize import BINARIZERS, Binarizer, Cut
from gradmimic_jax.selection.decisions import Decisions, read_decisions
from gradmimic_jax.selection.issues import (
  Membership,
  discover_members,
  find_label_issues,
  label_quality_scores,
  subset,
)
from gradmimic_jax.selection.label_model import (
  LABEL_MODELS,
  KeepProbability,
  LabelModel,
)
from gradmimic_jax.selection.quality import (
  DatasetQuality,
  RemovalCurve,
  class_table,
  dataset_quality,
  removal_curve,
)
from gradmimic_jax.selection.selection import Selection, select

__all__ = [
  "BINARIZERS",
  "LABEL_MODELS",
  "Binarizer",
  "Cut",
  "DatasetQuality",
  "Decisions",
  "KeepProbability",
  "LabelModel",
  "Membership",
  "RemovalCurve",
  "Selection",
  "class_table",
  "dataset_quality",
  "decisions",
  "discover_members",
  "export",
  "filters",
  "find_label_issues",
  "label_quality_scores",
  "read_decisions",
  "removal_curve",
  "select",
  "subset",
]
