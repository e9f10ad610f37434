"""What is the price of the mimic layers, and what do they buy?

Grad-Mimic on the last k of K blocks, beside SGD, which sees the same batches:

python -m experiments.study --config=configs/layers.py --workdir=runs/layers
python -m experiments.benchmark --workdir=runs/layers_cost \
  --config=configs/benchmark/methods.py:study=layers

The first gives steps saved, accuracy and AUROC, the second time, FLOPs and
memory of a step. `setting` is "language" (a decoder of four blocks), "shapes"
(CLIP, three blocks for images and two for text) or "cifar10" (a convnet on
5,000 images, with --config.data.data_dir). `python -m experiments.sweep
--config=configs/sweep.py:study=layers` runs all six.
"""

from ml_collections import config_dict

from configs import base, directions, language, shapes

# The head alone, one block more at a time, everything.
_LAYERS = {
  "language": (
    "head/",
    "head/|blocks/3",
    "head/|blocks/[23]",
    "head/|blocks/[123]",
    ".",
  ),
  "shapes": (
    "projection",
    "projection|image/blocks/2|text/blocks/1",
    "projection|image/blocks/[12]|text/blocks/[01]",
    ".",
  ),
  "cifar10": ("head/", "head/|(stages|norms)/1", "."),
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A study's config; `setting` as above, and number of `seeds`.

  Raises:
    ValueError: an unknown argument or setting.
  """
  values = base.parse_arg(arg, setting=tuple(_LAYERS), seeds=3)
  setting, seeds = values["setting"], values["seeds"]
  if setting == "language":
    config = language.get_config(f"seeds={seeds}").unlock()
    config.model.decoder.depth = 4
  elif setting == "shapes":
    config = shapes.get_config(f"seeds={seeds}").unlock()
  else:
    config = directions.get_config(f"reference=own,seeds={seeds}").unlock()
  config.study.methods = ("sgd", "grad_mimic")
  config.study.layers = _LAYERS[setting]
  return config.lock()
