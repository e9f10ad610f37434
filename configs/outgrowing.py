"""Does a learner outgrow its reference? Few true labels, many noisy ones.

References know the true labels of 1 to 100 % of the training samples; learners
see all samples, with noisy labels. In about a minute on 2 CPU cores:

python -m experiments.study --config=configs/outgrowing.py \
  --workdir=runs/outgrowing

and heads on the features of a published backbone, which are computed once, 25
minutes of a CPU core for CIFAR-10 at 128 pixels:

python -m experiments.study --workdir=runs/outgrowing_cifar10 \
  --config=configs/outgrowing.py:dataset=cifar10 \
  --config.model.pretrained=hf://timm/tf_efficientnet_lite0.in1k

Arguments are `dataset` ("digits": heads on their pixels), noise `rate`, and
number of `seeds`. The figure is accuracy_by_share_<rate>.png.

`protocol=finetune` trains all weights of that backbone, reference and learner,
on 2,500 of the images at 48 pixels. The reference knows the true labels of a
`share` of them. Compiling takes minutes a method, and three seeds take hours on
2 CPU cores. On a GPU they take minutes, with twice the images at 64 pixels:
results/outgrowing has the command.
"""

from ml_collections import config_dict

from configs import base, label_noise

METHODS = (
  "sgd",
  "grad_mimic",
  "rho",
  "output_agreement",
  "distillation",
  "distillation_mixed",
)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A grid of heads over shares of true labels, or a study of all weights.

  Raises:
    ValueError: an unknown argument, data set or protocol; all weights of
      digits' heads; a share that isn't above 0 and up to 1.
  """
  values = base.parse_arg(
    arg,
    dataset=("digits", "cifar10"),
    protocol=("probe", "finetune"),
    rate=0.5,
    share=0.1,
    seeds=0,
  )
  is_small = values["dataset"] == "digits"
  if values["protocol"] == "finetune":
    if is_small:
      raise ValueError(
        "protocol=finetune takes dataset=cifar10: digits have no backbone."
      )
    if not 0 < values["share"] <= 1:
      raise ValueError(
        f"config argument share={values['share']:g}; expected a number above 0"
        " and up to 1."
      )
    return _finetune(values)
  config = label_noise.get_config(
    f"dataset=cifar10,seeds={values['seeds'] or (3 if is_small else 5)}"
  ).unlock()
  config.update_from_flattened_dict(
    {
      "mimic.weighting": "ess_softmax",
      "mimic.fraction": 0.5,
      "optimizer.learning_rate": 1e-3,
      "probe.rates": (values["rate"],),
      "probe.reference_shares": (0.01, 0.02, 0.05, 0.1, 0.25, 1.0),
      "study.binarizers": ("auto",),
      "study.keep_methods": ("grad_mimic",),
      "study.methods": METHODS,
      # On what the scores keep, alone and with the labels that are known.
      "study.retrain": True,
      "study.tune.learning_rates": (3e-4, 1e-3, 3e-3),
      "study.tune.weighting_values": (0.3, 0.5, 0.7),
    }
  )
  fields = _digits() if is_small else _cifar10()
  config.update_from_flattened_dict(fields)
  return config.lock()


def _digits():
  return {
    "data.name": "digits",
    "data.image_size": 0,
    "data.flip": False,
    "model.name": "mlp",
    "model.widths": (),
    "num_epochs": 20,
    "optimizer.learning_rate": 3e-3,
    # Of 1,437 samples 1 % are one or two a class.
    "probe.reference_shares": (0.02, 0.05, 0.1, 0.25, 1.0),
  }


def _cifar10():
  return {
    "data.image_size": 128,
    "eval_batch_size": 64,
    "model.name": "efficientnet_lite0",
  }


def _finetune(values):
  config = label_noise.get_config(
    "dataset=cifar10,protocol=finetune,"
    f"seeds={values['seeds'] or 3},rate={values['rate']}"
  ).unlock()
  samples = 2500
  known = round(samples * values["share"])
  config.update_from_flattened_dict(
    {
      "num_epochs": 4,
      "eval_batch_size": 100,
      "eval_every_epochs": 4,
      "checkpoint.every_epochs": 4,
      "data.train_split": f"train[:{samples}]",
      "data.test_split": "test[:2000]",
      "data.image_size": 48,
      "model.name": "efficientnet_lite0",
      "mimic.layers": ".",  # with the head's alone it ends below SGD
      "mimic.weighting": "ess_softmax",
      "mimic.fraction": 0.5,
      # At 3e-4 the network dies: with frozen statistics nothing holds it.
      "optimizer.learning_rate": 5e-5,
      "optimizer.schedule": "cosine",
      "study.against": "rho",
      "study.methods": METHODS,
      "study.binarizers": ("auto",),
      "study.reference.train_split": f"train[:{known}]",
      # As many steps as on the whole would overfit few samples in no time.
      "study.reference.num_epochs": min(max(round(4 / values["share"]), 4), 12),
    }
  )
  return config.lock()
