"""Label-noise study on scikit-learn's 1,797 handwritten digits.

  python -m experiments.study --config=configs/digits.py --workdir=runs/digits

Arguments after a colon: `:rate=0.6,seeds=1,model=convnet`. Three seeds take
about a minute on 2 CPU cores.
"""

from ml_collections import config_dict

from configs import base, classification


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """An MLP with two hidden layers of 256, or a small convnet; noisy labels.

  Arguments are `rate` of label noise, number of `seeds`, `model` name.
  """
  values = base.parse_arg(arg, rate=0.5, seeds=3, model="mlp")
  config = classification.get_config().unlock()
  config.noise.rate = values["rate"]
  # A run takes seconds: no need to save forty times.
  config.checkpoint.every_epochs = 10
  config.study.seeds = tuple(range(values["seeds"]))
  config.model.name = values["model"]
  if values["model"] == "convnet":
    config.model.widths = (32, 64)
  return config.lock()
