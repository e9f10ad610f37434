"""Folders of finished jobs, for `experiments.compare` to put together."""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """No folders yet: name those that there are. Takes no argument."""
  base.parse_arg(arg)
  config = config_dict.ConfigDict()
  config.title = "Label noise"
  # Workdirs of experiments.study: grids of heads, and studies.
  config.probe = ()
  config.finetune = ()
  # Workdirs of experiments.tune, and of the benchmark of methods.
  config.tuning = ()
  config.costs = config_dict.placeholder(str)
  # Others beside these, as "label=folder", whose methods get a row a label.
  config.ablations = ()
  # Whose scores the tables of detection and quality are of.
  config.method = "grad_mimic"
  return config.lock()
