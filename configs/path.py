"""Is there anything ahead of RHO at the same reference?

The excess loss is the mimic score integrated along the way to the reference
(experiments/training/path.py), so RHO and Grad-Mimic are the ends of a family.
Points of the way in between, a direction in Adam's metric, scores less those
of the class, and averages over the epochs so far, all over all layers of a
network that is trained whole toward a reference of its own initialisation:

python -m experiments.study --config=configs/path.py --workdir=runs/path

`setting=digits`: an MLP, half of the labels wrong, the reference on a tenth of
the samples. `setting=symmetric` and `setting=human`: a convnet on 5,000 images
of CIFAR-10, the reference on 12,000; with --config.data.data_dir, and human
labels with --config.noise.path=<a table with the columns id and worst>.

Each method has three strengths of its weights; `held_out=true` judges them on
training images that no table is about, with other seeds.
"""

from ml_collections import config_dict

from configs import base, classification, directions

POINTS = ("0", "0.25", "0.5", "0.75", "0.2113+0.7887")  # Gauss-Legendre's two
METHODS = (
  "sgd",
  "rho",
  "rho_averaged",
  "grad_mimic",
  "grad_mimic_adam",
  "grad_mimic_averaged",
  "grad_mimic_by_class",
)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A study's config; `setting` as above, and number of `seeds`.

  Raises:
    ValueError: an unknown argument or setting.
  """
  values = base.parse_arg(
    arg, setting=("digits", "symmetric", "human"), seeds=5, held_out=False
  )
  first = 10 if values["held_out"] else 0
  if values["setting"] == "digits":
    config = classification.get_config().unlock()
    config.noise.rate = 0.5
    config.checkpoint.every_epochs = 50
    config.study.reference.train_split = "train[:10%]"
    config.study.reference.num_epochs = 200
    held_out = "train[:80%]", "train[80%:]"
  else:
    noise = values["setting"]
    config = directions.get_config(f"reference=own,noise={noise}").unlock()
    config.checkpoint.every_epochs = 6
    held_out = "train[:5000]", "train[45000:48000]"
  config.update_from_flattened_dict(
    {
      "mimic.weighting": "ess_softmax",
      "study.against": "rho_ess0.5",
      "study.methods": METHODS,
      "study.points": POINTS,
      "study.retrain": False,
      "study.seeds": tuple(range(first, first + values["seeds"])),
      "study.weightings": ("ess0.3", "ess0.5", "ess0.7"),
    }
  )
  if values["held_out"]:
    config.data.train_split, config.data.test_split = held_out
  return config.lock()
