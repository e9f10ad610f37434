"""From a ledger to a filter.

python -m experiments.select --config=configs/select.py:run=runs/scores \
  --workdir=runs/filter
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """Whose ledger, and how to select; locked.

  Args:
    arg: `run`: the workdir of `train`, of one method of a `study`, or of
      `score`.

  Returns:
    The config, locked.
  """
  config = config_dict.ConfigDict()
  config.run = base.parse_arg(arg, run="")["run"]
  config.select = base.get_config("").select
  config.select.binarize = "auto"
  config.select.aggregate = "label_model"
  return config.lock()
