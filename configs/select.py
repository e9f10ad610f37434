"""From a ledger to a selection, or to filters.

python -m experiments.select --config=configs/select.py:run=runs/scores \
  --workdir=runs/filter

With `filters=true` those that were published are made in its place, of mimic
scores and, with DataComp's metadata, of CLIP scores and basic filtering:

python -m experiments.select --workdir=runs/datacomp_filters \
  --config=configs/select.py:run=runs/datacomp_small,filters=true \
  --config.metadata=metadata/
"""

from ml_collections import config_dict

from configs import base

# Those that were published.
_FILTERS = (
  "mimic_top30",
  "mimic_top35",
  "mimic_top40",
  "clip_top30",
  "clip_top30 - mimic_bottom15",
  "clip_top30 - mimic_bottom20",
  "basic",
  "random30",
)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """How to select from the ledger of a `run`, of `train`, `score` or a study.

  With `filters=true` the published filters are made.
  """
  config = config_dict.ConfigDict()
  values = base.parse_arg(arg, run="", filters=False)
  config.run = values["run"]
  config.select = base.get_config("").select
  config.select.binarize = "auto"
  config.select.aggregate = "label_model"
  # Of scores' means, in place of a selection: percents of the pool, combined
  # with - & | and parentheses, such as ("mimic_top30 & basic", "random30").
  config.filters = _FILTERS if values["filters"] else ()
  # DataComp's metadata: a Parquet file or a folder of them. Without it there
  # are no CLIP scores, no basic filtering, and the pool is what was scored.
  config.metadata = config_dict.placeholder(str)
  config.clip_column = "clip_l14_similarity_score"
  config.seed = 0  # of random filters
  return config.lock()
