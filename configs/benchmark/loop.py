"""Benchmark: the cost of the training loop beside its jitted steps.

python -m experiments.benchmark --config=configs/benchmark/loop.py \
  --workdir=runs/loop

Prints a table; leaves all that was found in `loop.json`. It measures the loop
around the digits' MLP as the study has it, with and without scores, and around
a small residual convnet at batch 256, on digits of 32 pixels; the CPU time of a
second seed's runs; and that of a process up to its first step, with an empty
and a full cache of programs. `:parts=mlp_sgd+seeds` measures some of these:
mlp_sgd, mlp_grad_mimic, convnet, seeds, start; and cifar10, the convnet on
CIFAR-10, which only runs if it is asked for, with a folder that has the set
prepared (`--config.data.data_dir`). On 2 CPU cores all of it takes fifteen
minutes; they should have nothing else to do.
"""

from typing import Any

from ml_collections import config_dict

from configs import base, digits

# Fields of the run that each part measures.
_CONVNET = {
  "method": "random",
  "batch_size": 256,
  "data.image_size": 32,
  "model.name": "resnet",
  "model.widths": (16, 32, 64),
  "model.patch_size": 2,
}
PARTS: dict[str, dict[str, Any]] = {
  "mlp_sgd": {"method": "sgd"},
  "mlp_grad_mimic": {"method": "grad_mimic"},
  "convnet": _CONVNET,
  "cifar10": {**_CONVNET, "data.name": "cifar10"},
  "seeds": {},
  "start": {},
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A training config, and the parts to measure.

  Args:
    arg: `parts`: some of PARTS, with a + between them.

  Returns:
    The config, locked.

  Raises:
    ValueError: an unknown argument.
  """
  every = "+".join(part for part in PARTS if part != "cifar10")
  parts = base.parse_arg(arg, parts=every)["parts"]
  config = digits.get_config().unlock()
  config.benchmark = "loop"
  config.parts = tuple(parts.split("+"))
  return config.lock()
