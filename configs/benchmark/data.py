"""Benchmark: the way of images from their files to the devices.

python -m experiments.benchmark --config=configs/benchmark/data.py \
  --workdir=runs/data

Makes JPEG files, reads and trains on them, and prints a table; leaves
`data.json`. It takes some ten minutes on 2 CPU cores and 1 GB of disk.
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The files, and what is made of them; locked.

  Args:
    arg: none.

  Returns:
    The config, locked.
  """
  base.parse_arg(arg)
  config = config_dict.ConfigDict()
  config.benchmark = "data"
  # How many files there are; peak memory is compared between the two.
  config.samples = (4_000, 16_000)
  config.height = 300  # of the files, in pixels
  config.width = 400
  config.quality = 90  # of the JPEG files
  config.image_size = 224  # as a model sees them
  config.batch_size = 64
  config.workers = 2  # threads
  config.rounds = 7  # in which two ways of reading take turns
  config.seed = 0
  return config.lock()
