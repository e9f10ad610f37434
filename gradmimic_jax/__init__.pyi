# The public names: what `__init__.py` hands out, and what type checkers see.
from . import (
  cleanlab as cleanlab,
  linear_head as linear_head,
  matching as matching,
  metrics as metrics,
  nnx as nnx,
  plots as plots,
)
from ._version import __version__ as __version__
from .directions import (
  Direction as Direction,
  toward_clean_gradient as toward_clean_gradient,
  toward_outputs as toward_outputs,
  toward_weights as toward_weights,
)
from .gradients import (
  MimicInfo as MimicInfo,
  MimicScores as MimicScores,
  mimic_scores as mimic_scores,
  mimic_value_and_grad as mimic_value_and_grad,
)
from .independence import check_independence as check_independence
from .ledger import ScoreLedger as ScoreLedger
from .microbatches import (
  MicrobatchSizes as MicrobatchSizes,
  choose_microbatch_size as choose_microbatch_size,
)
from .reference import (
  ReferenceReport as ReferenceReport,
  check_reference as check_reference,
)
from .reporting import report as report
from .scores import (
  excess_loss as excess_loss,
  output_agreement as output_agreement,
  random_score as random_score,
)
from .selection import (
  DatasetQuality as DatasetQuality,
  Decisions as Decisions,
  Membership as Membership,
  RemovalCurve as RemovalCurve,
  Selection as Selection,
  class_table as class_table,
  dataset_quality as dataset_quality,
  decisions as decisions,
  discover_members as discover_members,
  export as export,
  filters as filters,
  find_label_issues as find_label_issues,
  label_quality_scores as label_quality_scores,
  read_decisions as read_decisions,
  removal_curve as removal_curve,
  select as select,
  subset as subset,
)
from .transform import (
  ReweightByMimicScoreState as ReweightByMimicScoreState,
  mimic as mimic,
  reweight_by_mimic_score as reweight_by_mimic_score,
)
from .weighting import (
  Weighting as Weighting,
  effective_sample_size as effective_sample_size,
  ess_softmax as ess_softmax,
  positive as positive,
  proportional as proportional,
  softmax as softmax,
  top_fraction as top_fraction,
  uniform as uniform,
  warmup as warmup,
)
