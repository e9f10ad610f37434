"""Benchmark: the cost of selection on millions of samples.

python -m experiments.benchmark --config=configs/benchmark/selection.py \
  --workdir=runs/selection

Prints a table; leaves `selection.json` and figures. It takes some minutes on 2
CPU cores, which should have nothing else to do, and up to 4 GB of memory and
disk.
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The numbers of samples, and the selection; takes no argument."""
  base.parse_arg(arg)
  config = config_dict.ConfigDict()
  config.benchmark = "selection"
  config.samples = (1_000_000, 2_000_000, 5_000_000, 10_000_000)
  config.steps = 5  # each sees every sample
  config.batch_size = 65_536  # rows an append
  config.noise_rate = 0.3
  config.seed = 0
  config.select = config_dict.ConfigDict()
  config.select.binarize = "gmm"
  config.select.aggregate = "label_model"
  return config.lock()
