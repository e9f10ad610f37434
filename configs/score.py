"""One pass over a data set with a run's checkpoints: a ledger of scores.

python -m experiments.score --config=configs/score.py:learner=runs/learner \
  --config.mimic.reference=runs/reference --workdir=runs/scores
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """Whose checkpoints, of the run `learner`, and which data they score."""
  config = config_dict.ConfigDict()
  config.learner = base.parse_arg(arg, learner="")["learner"]
  # Of which steps; empty takes all checkpoints that the run has kept. Each is
  # an epoch of the ledger.
  config.steps = config_dict.placeholder(tuple)
  # The split to score; None is the one that the learner was trained on. Data,
  # label noise and model are the learner's.
  config.split = config_dict.placeholder(str)
  config.data_dir = config_dict.placeholder(str)  # None: the learner's
  config.method = "grad_mimic"
  config.mimic = base.get_config("").mimic
  config.batch_size = 512
  config.mesh = base.get_config("").mesh
  config.flush_every = 64  # batches; so many at most are scored twice
  return config.lock()
