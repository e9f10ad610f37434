"""Toward a reference's weights or its outputs, against RHO and distillation.

python -m experiments.study --workdir=runs/directions \
  --config=configs/directions.py:reference=foreign,noise=symmetric \
  --config.data.data_dir=<where cifar10 is prepared>

A small convnet on 5,000 images of CIFAR-10 with noisy labels, three seeds,
about six minutes on 2 CPU cores. References, by the argument:

  own      the learner's own initialisation, 12,000 clean images
  foreign  another initialisation, the same images
  poor     another initialisation, 2,000 clean images
  mlp      another architecture, 12,000 clean images

`noise=human` takes the labels that people gave (CIFAR-10N, its worst column):
add `--config.noise.path=<a table with the columns id and worst>`.
"""

from ml_collections import config_dict

from configs import base, classification

_METHODS = (
  "sgd",
  "rho",
  "distillation",
  "grad_mimic_weights",
  "grad_mimic_outputs",
  "output_agreement",
)
_REFERENCES = {
  "foreign": {"train_split": "train[:12000]", "seed_offset": 1000},
  "own": {"train_split": "train[:12000]"},
  "poor": {"train_split": "train[:2000]", "seed_offset": 1000},
  "mlp": {
    "train_split": "train[:12000]",
    "seed_offset": 1000,
    "model": "mlp",
    "widths": (512, 512),
  },
}
_NOISES: dict[str, dict[str, object]] = {
  "symmetric": {"noise.rate": 0.4},
  "human": {"noise.kind": "file", "noise.column": "worst"},
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A study's config; `reference` and `noise` as above, and number of `seeds`.

  Raises:
    ValueError: an unknown argument, reference or noise.
  """
  values = base.parse_arg(
    arg, reference=tuple(_REFERENCES), noise=tuple(_NOISES), seeds=3
  )
  config = classification.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "batch_size": 64,
      "num_epochs": 6,
      "data.name": "cifar10",
      "data.train_split": "train[:5000]",
      "data.test_split": "test[:3000]",
      "model.name": "convnet",
      "model.widths": (64, 128),
      "model.patch_size": 2,
      "optimizer.learning_rate": 3e-3,
      "optimizer.weight_decay": 1e-4,
      "mimic.fraction": 0.5,
      "mimic.force": True,  # foreign references are what is studied
      "select.binarize": "kmeans",
      "study.retrain": False,
      "study.seeds": tuple(range(values["seeds"])),
      "study.methods": _METHODS,
      **_NOISES[values["noise"]],
    }
  )
  config.study.reference.update(_REFERENCES[values["reference"]])
  if values["reference"] == "mlp":
    # Weights of another architecture have no direction.
    config.study.methods = tuple(m for m in _METHODS if "weights" not in m)
  return config.lock()
