"""Which filters of image-text pairs to make of a run's scores.

python -m experiments.clip_filters --workdir=runs/datacomp_filters \
  --config=configs/clip_filters.py:run=runs/datacomp_small \
  --config.metadata=metadata/
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The fields there are, locked.

  Args:
    arg: `run`, the workdir of `experiments.clip_train` with scores.

  Returns:
    The config.
  """
  config = config_dict.ConfigDict()
  config.run = base.parse_arg(arg, run="")["run"]
  # DataComp's metadata: a Parquet file or a folder of them. Without it there
  # are no CLIP scores, no basic filtering, and the pool is what the run saw.
  config.metadata = config_dict.placeholder(str)
  config.clip_column = "clip_l14_similarity_score"
  # Percents of the pool, combined with - & | and parentheses.
  config.filters = (
    "mimic_top30",
    "mimic_top35",
    "mimic_top40",
    "clip_top30",
    "clip_top30 - mimic_bottom15",
    "clip_top30 - mimic_bottom20",
    "basic",
    "random30",
  )
  config.seed = 0  # of random ones
  return config.lock()
