"""Benchmark: the cost of the training loop beside its jitted steps.

python -m experiments.benchmark --config=configs/benchmark/loop.py \
  --workdir=runs/loop

Prints what it found; leaves that in `loop.json`, and the files of a run.
Arguments after a colon: `:model=mlp` measures the digits' MLP as the study has
it; the default is the small residual convnet at batch 256, on digits of 32
pixels. Fields of another data set may follow, such as
`--config.data.name=cifar10`. On 2 CPU cores it takes eight minutes, the MLP
one; they should have nothing else to do.
"""

from ml_collections import config_dict

from configs import base, digits


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A config whose method has scores, and needs no reference; `model` as above.

  Raises:
    ValueError: an unknown argument or model.
  """
  model = base.parse_arg(arg, model=("resnet", "mlp"))["model"]
  config = digits.get_config().unlock()
  config.benchmark = "loop"
  config.method = "random"
  if model == "resnet":
    config.batch_size = 256
    config.data.image_size = 32
    config.model.name = "resnet"
    config.model.widths = (16, 32, 64)
    config.model.patch_size = 2
  return config.lock()
