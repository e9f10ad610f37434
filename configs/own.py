"""Your own images or features with labels, as they are: no noise is added.

  python -m experiments.train --workdir=runs/photos \
    --config=configs/own.py:model=convnet --config.data.name=folder:photos

`data.name` may be "folder:...", "parquet:...", "npz:...", "features:..." or
"webdataset:...", or a prepared TFDS set; docs/data_and_model.md has them all.
A set without splits of its own is cut: `data.train_split` and `test_split`.
"""

from ml_collections import config_dict

from configs import base, classification


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A small convnet, or an MLP with two hidden layers.

  Arguments are `model` name and number of `epochs`.
  """
  values = base.parse_arg(arg, model=("convnet", "mlp"), epochs=20)
  config = classification.get_config().unlock()
  config.num_epochs = values["epochs"]
  config.model.name = values["model"]
  config.model.widths = (32, 64) if values["model"] == "convnet" else (256, 256)
  config.checkpoint.every_epochs = 5
  # Of files without splits. Folders are cut by a hash of the path: at random.
  config.data.train_split = "all[:80%]"
  config.data.test_split = "all[80%:]"
  return config.lock()
