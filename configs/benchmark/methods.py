"""Benchmark: time and memory of a training step, of each method of a study.

python -m experiments.benchmark --workdir=runs/methods \
  --config=configs/benchmark/methods.py:study=label_noise,dataset=cifar10 \
  --config.mimic.reference=<workdir of a finished run>

Prints a table; leaves `methods.json`. `study` names the config of a study:
digits, label_noise (all weights are trained), shapes or layers. What follows is
for that config:
`:study=shapes,layers=image_last_mlp+all,others=output_agreement`.
Steps are compared at each of `study.cost_batch_sizes`: of shapes 256 and 1,024,
of the others that of the study. Each takes two seconds, and what it takes to
compile; the machine should have nothing else to do.
"""

from ml_collections import config_dict

from configs import digits, label_noise, layers, shapes

# A study's config, and what comes before the arguments for it.
_STUDIES = {
  "digits": (digits, ""),
  "label_noise": (label_noise, "protocol=finetune,"),
  "shapes": (shapes, ""),
  "layers": (layers, ""),
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The config of a `study`, which comes first, with the arguments for it.

  Raises:
    ValueError: an unknown argument or study.
  """
  first, _, rest = (arg or "study=digits").partition(",")
  key, _, name = first.partition("=")
  if key != "study" or name not in _STUDIES:
    raise ValueError(
      f"config argument {first!r}; expected study={' or study='.join(_STUDIES)}"
      " first."
    )
  study, beginning = _STUDIES[name]
  config = study.get_config(beginning + rest).unlock()
  config.benchmark = "methods"
  return config.lock()
