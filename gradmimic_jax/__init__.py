"""Grad-Mimic in JAX: which samples pull a model toward a better one.

Own loop: replace `jax.value_and_grad` by `mimic_value_and_grad`, or wrap the
optimizer with `mimic`. Data work: collect scores in a `ScoreLedger`, then
`select` what to keep.
"""

from gradmimic_jax import linear_head, matching, metrics
from gradmimic_jax._version import __version__
from gradmimic_jax.directions import (
  Direction,
  toward_clean_gradient,
  toward_outputs,
  toward_weights,
)
from gradmimic_jax.gradients import (
  MimicInfo,
  MimicScores,
  mimic_scores,
  mimic_value_and_grad,
)
from gradmimic_jax.independence import check_independence
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.reference import ReferenceReport, check_reference
from gradmimic_jax.reporting import report
from gradmimic_jax.scores import (
  excess_loss,
  output_agreement,
  random_score,
)
from gradmimic_jax.selection import (
  DatasetQuality,
  Decisions,
  Membership,
  RemovalCurve,
  Selection,
  class_table,
  dataset_quality,
  decisions,
  discover_members,
  export,
  filters,
  find_label_issues,
  label_quality_scores,
  read_decisions,
  removal_curve,
  select,
  subset,
)
from gradmimic_jax.transform import (
  ReweightByMimicScoreState,
  mimic,
  reweight_by_mimic_score,
)
from gradmimic_jax.weighting import (
  Weighting,
  effective_sample_size,
  ess_softmax,
  positive,
  proportional,
  softmax,
  top_fraction,
  uniform,
  warmup,
)
