"""The published label-noise study: six image sets, a ViT-B/16, rates .3 to .7.

Heads on a frozen backbone, all runs of a method in one program:

python -m experiments.study --workdir=runs/dtd \
  --config=configs/label_noise.py:dataset=dtd,protocol=probe \
  --config.model.pretrained=hf://google/vit-base-patch16-224-in21k

Fine-tuning of all weights, one run at a time, at one noise rate:

python -m experiments.study --workdir=runs/dtd_finetune \
  --config=configs/label_noise.py:dataset=dtd,protocol=finetune,rate=0.4 \
  --config.model.pretrained=hf://google/vit-base-patch16-224-in21k

Other weights, timm's among them, give their sizes, heads and norms themselves,
by the config.json beside them: --config.model.size=pretrained.

Sets, by their TFDS names, with their official splits: cifar10, cifar100, dtd,
stl10, oxford_flowers102, oxford_iiit_pet. Probing takes one pass of the
backbone over the images and their mirror images, and then minutes on 2 CPU
cores: about a millisecond for a step of 15 runs at 10 classes. Images are held
in memory at 224 pixels for that pass: 7.5 GB for 50,000 of them.

Huang et al., arXiv:2501.06708, section 4.1: AdamW at 1e-4, weight decay 1e-5,
batches of 32, 5 epochs (10 for the two smallest sets), no schedule, horizontal
flips; the mimic layer is the head's weight matrix.
"""

from ml_collections import config_dict

from configs import base, classification

# Splits and epochs of each set.
_SETS = {
  "cifar10": ("train", "test", 5),
  "cifar100": ("train", "test", 5),
  "dtd": ("train", "test", 10),  # the first of its ten official splits
  "stl10": ("train", "test", 5),
  "oxford_flowers102": ("train", "test", 10),
  "oxford_iiit_pet": ("train", "test", 5),
}
# The paper's.
METHODS = (
  "sgd", "grad_mimic", "influence", "agra", "grand", "rho",
  "grad_match_separable",
)  # fmt: skip


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A study's config; with `protocol=probe` it has a section `probe`.

  Arguments are `dataset` and `protocol`, as above; number of `seeds`; noise
  `rate`, for `protocol=finetune` only.

  Raises:
    ValueError: an unknown argument, data set or protocol.
  """
  values = base.parse_arg(
    arg,
    dataset=tuple(_SETS),
    protocol=("probe", "finetune"),
    seeds=3,
    rate=0.4,
  )
  train_split, test_split, epochs = _SETS[values["dataset"]]
  config = classification.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "batch_size": 32,
      "eval_batch_size": 128,
      "num_epochs": epochs,
      "data.name": values["dataset"],
      "data.train_split": train_split,
      "data.test_split": test_split,
      "data.image_size": 224,
      "data.flip": True,
      "model.name": "vit",
      "optimizer.name": "adamw",
      "optimizer.learning_rate": 1e-4,
      "optimizer.weight_decay": 1e-5,
      "optimizer.schedule": "constant",
      "mimic.layers": "head/kernel",
      "mimic.weighting": "softmax",
      "mimic.temperature": 0.03,  # the lowest that was published, and the best
      "study.seeds": tuple(range(values["seeds"])),
      "study.methods": METHODS,
      "study.retrain": False,
      "study.binarizers": ("weight", "threshold", "gmm", "kmeans", "auto"),
      "study.tune.learning_rates": (3e-5, 1e-4, 3e-4),
      "study.tune.weighting_values": (0.03, 0.1, 0.3, 1.0),
    }
  )
  config.model.vit = vit_b16()
  if values["protocol"] == "finetune":
    config.noise.rate = values["rate"]
    return config.lock()
  config.probe = probe()
  return config.lock()


def probe() -> config_dict.ConfigDict:
  """The fields of a grid of heads, beside those of classification."""
  config = config_dict.ConfigDict()
  # The grid: `study.methods` x `study.seeds` x these. `noise.rate` is not used;
  # a rate of 0 with noise that has a rate of its own takes that.
  config.rates = (0.3, 0.4, 0.5, 0.6, 0.7)
  # Of `mimic.temperature` with softmax weights, of `mimic.fraction` with
  # ess_softmax and top_fraction, of `mimic.mix` where that is the method's;
  # empty: the one that is set there.
  config.weighting_values = ()
  # References are trained on the true labels of these shares of the training
  # samples, drawn class by class, in as many steps as on all of them.
  config.reference_shares = (1.0,)
  # How images are scaled: as the "model" was trained, or to mean and standard
  # deviation .5 as "published".
  config.scaling = "model"
  # A folder of features, which studies may share; None: in the workdir.
  config.features = config_dict.placeholder(str)
  # How many runs one program trains at most, and a killed one loses.
  config.runs_per_cell = 64
  return config


def vit_b16() -> config_dict.ConfigDict:
  """A ViT-B/16; its pooling is that of the published weights."""
  config = classification.vit()
  config.patch_size = 16
  config.width = 768
  config.depth = 12
  config.heads = 12
  config.mlp_width = 3072
  config.pooling = "class_token"
  config.norm_epsilon = 1e-12  # Hugging Face's; timm and torchvision: 1e-6
  return config
