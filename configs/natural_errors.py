"""Errors in the labels that a data set was published with, by cross-fitting.

The training set is dealt into folds. A head that learns on one fold is scored
against a reference that was trained on the other folds, so that no reference
has seen the labels that it judges:

python -m experiments.study --config=configs/natural_errors.py \
  --workdir=runs/natural_errors --config.model.pretrained=<.safetensors file>

The lowest-scored samples are then listed beside those of cleanlab's confident
learning and of the loss, both by the references' probabilities. Where a table
has other labels by people, each list is compared with their majority:

  --config.cross.proxy=labels.csv

The workdir is a run's folder, too: `experiments.select` and
`experiments.report` take it as their `run`.

The backbone is timm's tf_efficientnet_lite0 at 128 pixels; heads on the digits'
pixels, of which one in ten is given a wrong label, take half a minute:

python -m experiments.study --workdir=runs/digits_errors \
  --config=configs/natural_errors.py:dataset=digits
"""

from ml_collections import config_dict

from configs import base, label_noise


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config of a cross-fitting, with a section `cross`.

  Arguments are `dataset`, a set of `configs/label_noise.py` or "digits"; number
  of `seeds`.

  Raises:
    ValueError: an unknown argument or data set.
  """
  values = base.parse_arg(arg, dataset="cifar10", seeds=3)
  digits = values["dataset"] == "digits"
  dataset = "cifar10" if digits else values["dataset"]
  config = label_noise.get_config(
    f"dataset={dataset},protocol=probe,seeds={values['seeds']}"
  ).unlock()
  config.update_from_flattened_dict(
    {
      "data.image_size": 128,
      "model.name": "efficientnet_lite0",
      # The method whose scores the ledger is of, and others beside it.
      "method": "grad_mimic",
      "study.methods": ("grad_mimic", "rho"),
      "mimic.weighting": "ess_softmax",
      "mimic.fraction": 0.5,
      # By the references' loss on CIFAR-10's samples that they hadn't seen.
      "optimizer.learning_rate": 3e-4,
      "probe.rates": (),
    }
  )
  if digits:
    config.update_from_flattened_dict(
      {
        "data.name": "digits",
        "data.image_size": 0,
        "data.flip": False,
        "model.name": "mlp",
        "model.widths": (),
        "noise.rate": 0.1,
        "num_epochs": 10,
        "optimizer.learning_rate": 1e-3,
      }
    )
  config.cross = cross()
  return config.lock()


def cross() -> config_dict.ConfigDict:
  """The fields of a cross-fitting, beside those of a grid of heads."""
  config = config_dict.ConfigDict()
  config.folds = 2
  config.lowest = 100  # samples on each list
  # Labels by people: a .csv or .parquet table, its columns of labels, and that
  # of ids. Where their majority differs from the label that a sample was given,
  # that counts as wrong; samples on which they are divided don't count.
  config.proxy = config_dict.placeholder(str)
  config.proxy_columns = ("random1", "random2", "random3")
  config.proxy_id_column = "id"
  return config
