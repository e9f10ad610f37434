"""Benchmark: verdicts of `gm.check_reference` on both kinds of reference.

python -m experiments.benchmark --workdir=runs/check_reference \
  --config=configs/benchmark/check_reference.py:data=digits

Prints a table; leaves `check_reference.json`, a figure and a folder for each
run that it trains: 18 of them, some minutes on 2 CPU cores.
`data=cifar10` takes a prepared CIFAR-10 (`--config.data.data_dir=...`).
"""

from ml_collections import config_dict

from configs import base, classification

# For each set of data: the fields that differ from the defaults.
_DATA = {
  "digits": {"num_epochs": 30},
  "cifar10": {
    "num_epochs": 6,
    "data.name": "cifar10",
    "data.train_split": "train[:8000]",
    "data.test_split": "test[:2000]",
    "model.name": "convnet",
    "model.widths": (64, 128),
    "model.patch_size": 2,
    "batch_size": 64,
    "optimizer.learning_rate": 3e-3,
  },
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A training run's fields, and which runs to compare; `data` as above.

  Raises:
    ValueError: an unknown argument or data.
  """
  data = base.parse_arg(arg, data=tuple(_DATA))["data"]
  config = classification.get_config().unlock()
  config.benchmark = "check_reference"
  config.check_reference = config_dict.ConfigDict()
  wanted = config.check_reference
  wanted.seeds = (0, 1, 2)
  wanted.rates = (0.0, 0.2, 0.4, 0.6)  # of the learners' label noise
  wanted.foreign = 1000  # added to the seed of foreign references
  # Learners are checked at initialisation and after so many epochs; poor
  # references are those of the first epoch.
  wanted.epochs = (0, 1, 3, 30) if data == "digits" else (0, 1, 3, 6)
  wanted.samples = 512  # of the learner's training data, in each check
  config.update_from_flattened_dict(_DATA[data])
  return config.lock()
