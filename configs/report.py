"""From a run to a page.

python -m experiments.report --config=configs/report.py:run=runs/scores \
  --workdir=runs/report
"""

from ml_collections import config_dict

from configs import base, select


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """How much to show of a `run` of `train`, `score` or a study."""
  config = config_dict.ConfigDict()
  config.run = base.parse_arg(arg, run="")["run"]
  config.select = select.get_config().select
  # A selection.parquet; None is the run's own, or one by `select`.
  config.selection = config_dict.placeholder(str)
  config.title = config_dict.placeholder(str)
  config.gallery = 24  # samples each of the worst, borderline and best
  config.max_bytes = 5_000_000
  return config.lock()
