"""The label-noise study, whole: every job of it, in an order that works.

python -m experiments.sweep --workdir=runs/cifar10 \
  --config=configs/sweep.py:study=cifar10,data_dir=<where cifar10 is prepared>

CIFAR-10: a small residual network is trained on the clean first half of the
training set. On the second half, under symmetric noise and the labels that
people gave (CIFAR-10N), heads on its frozen features (`probe_*`) and all of its
weights (`finetune_*`) are trained by every method, with settings tuned alike on
held-out samples under symmetric noise; then subsets, ablations, costs, and
`results`. Human noise comes with `labels=<a table with the columns id, worst,
random1 and aggre>`.

`study=efficientnet` is the same on all of the training set, with the published
weights of an EfficientNet-Lite0 (`backbone=<a .safetensors file or a name on
the hub>`) instead of that network: heads at 128 pixels, and in `outgrowing_*`
heads whose references know a part of the labels.

`study=layers` is configs/layers.py in all its settings, with the costs, and
`study=path` configs/path.py, with rounds in which the learner becomes the
reference, and scores that are some epochs old; both take `data_dir`, the latter
also `labels`.

`study=digits` is the label-noise study in minutes, on scikit-learn's
handwritten digits.
"""

from ml_collections import config_dict

from configs import base, label_noise

_ALL = (
  "sgd", "grad_mimic", "grad_mimic_outputs", "output_agreement", "influence",
  "influence_test_leak", "agra", "agra_skip", "grand", "rho", "rho_topk",
  "rho_as_published", "grad_match_separable", "grad_match_least_squares",
  "grad_match_omp", "random", "distillation",
)  # fmt: skip
# Less what shows a single point about one of the others.
_MOST = tuple(
  name
  for name in (*_ALL, "distillation_mixed")
  if name
  not in (
    "influence_test_leak",
    "agra_skip",
    "grad_match_least_squares",
    "grad_match_omp",
  )
)
_HUMAN = ("worst", "random1", "aggre")


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A sweep's `cells`, lines such as `name: job --config=...`.

  There `{other}` is the folder of another cell. Arguments are `study`,
  "digits", "cifar10", "efficientnet", "layers" or "path"; number of `seeds`;
  `data_dir`; a table of human `labels`; the `backbone` of efficientnet.

  Raises:
    ValueError: an unknown argument or study.
  """
  studies = {
    "digits": _digits,
    "cifar10": _cifar10,
    "efficientnet": _efficientnet,
    "layers": _layers,
    "path": _path,
  }
  values = base.parse_arg(
    arg,
    study=tuple(studies),
    seeds=0,
    data_dir="",
    labels="",
    backbone="hf://timm/tf_efficientnet_lite0.in1k",
  )
  config = config_dict.ConfigDict()
  config.cells = studies[values["study"]](values)
  config.run = True  # False: print the commands
  return config.lock()


def _cifar10(values):
  everywhere = {"data.name": "cifar10", **_prepared(values)}
  model = {
    "model.name": "resnet",
    "model.widths": (16, 32, 64),
    "model.patch_size": 2,
  }
  seeds, noises = values["seeds"] or 3, _noises(values)
  backbone = {
    **everywhere,
    **model,
    "seed": 100,
    "data.train_split": "train[:25000]",
    "data.flip": True,
    "num_epochs": 12,
    "optimizer.learning_rate": 5e-3,
    "optimizer.weight_decay": 1e-4,
  }
  half = "train[25000:]"
  heads = {
    **everywhere,
    "data.train_split": half,
    "data.image_size": 0,
    "model.pretrained": "{backbone}",
    "mimic.weighting": "ess_softmax",
    "mimic.fraction": 0.3,
    "optimizer.learning_rate": 1e-3,
    "probe.features": "{sweep}/features",
    "study.methods": _ALL,
  }
  tuned_on: dict[str, object] = {
    "data.train_split": "train[25000:45000]",
    "data.test_split": "train[45000:]",
    "probe.rates": (0.4, 0.5, 0.6),
    "study.seeds": (10, 11, 12),
    "study.tune.learning_rates": (1e-3, 3e-3, 1e-2),
    "study.tune.weighting_values": (0.1, 0.3, 0.5, 0.7),
  }
  probe = "configs/label_noise.py:dataset=cifar10,protocol=probe"
  cells = [_line("backbone", "train", "configs/classification.py", backbone)]
  cells.append(
    _line("probe_tuning", "tune", probe, heads | noises["symmetric"] | tuned_on)
  )
  for name, noise in noises.items():
    more: dict[str, object] = {
      "probe.rates": (0.3, 0.4, 0.5, 0.6, 0.7) if name == "symmetric" else (0,),
      "study.seeds": tuple(range(seeds)),
      "study.tuned": "{probe_tuning}/tuned.json",
    }
    cells.append(_line(f"probe_{name}", "study", probe, heads | noise | more))
  cells += _probe_ablations(probe, heads | noises["symmetric"], seeds)

  # Fine-tuning, on a fifth of the second half.
  network = {
    **everywhere,
    **model,
    "batch_size": 64,
    "num_epochs": 4,
    "data.train_split": "train[25000:30000]",
    "data.test_split": "test[:5000]",
    "data.image_size": 0,
    "model.pretrained": "{backbone}",
    "optimizer.learning_rate": 3e-3,
    "optimizer.schedule": "cosine",
    "mimic.layers": "head/kernel",
    "mimic.weighting": "ess_softmax",
    "mimic.fraction": 0.3,
    "checkpoint.every_epochs": 4,
    "study.methods": label_noise.METHODS,
    "study.seeds": tuple(range(seeds)),
    "study.references": "{sweep}/references",
  }
  tuned_on = {
    "data.test_split": "train[45000:48000]",
    "noise.rate": 0.4,
    "study.seeds": (10,),
    "study.tune.learning_rates": (1e-3, 3e-3),
    "study.tune.weighting_values": (0.3, 0.7),
    "study.tune.layers": (".",),  # all of them
  }
  full = "configs/label_noise.py:dataset=cifar10,protocol=finetune"
  cells.append(_line("finetune_tuning", "tune", full, network | tuned_on))
  network["study.tuned"] = "{finetune_tuning}/tuned.json"
  settings: dict[str, dict[str, object]] = {
    f"symmetric_{rate:g}": {"noise.rate": rate} for rate in (0.4, 0.5, 0.6)
  }
  settings |= {
    name: {**noises[name], "noise.rate": 0.0}
    for name in noises
    if name in _HUMAN
  }
  for name, noise in settings.items():
    more = {}
    if name == "symmetric_0.4":
      more["study.keep_fractions"] = (0.8, 0.7, 0.6, 0.5)
      more["study.keep_methods"] = ("grad_mimic", "rho")
    cells.append(
      _line(f"finetune_{name}", "study", full, network | noise | more)
    )
  cells += _finetune_ablations(full, network | {"noise.rate": 0.4})
  cells.append(
    _line(
      "costs",
      "benchmark",
      "configs/benchmark/methods.py:study=label_noise,dataset=cifar10",
      {
        **network,
        "noise.rate": 0.4,
        "study.methods": _ALL,
        "mimic.reference": "{finetune_symmetric_0.4}/seed0/reference",
      },
    )
  )
  return (*cells, _results("CIFAR-10", cells))


def _noises(values) -> dict[str, dict[str, object]]:
  """Fields of symmetric noise, and of people's where there is a table."""
  noises: dict[str, dict[str, object]] = {
    "symmetric": {"noise.kind": "symmetric"}
  }
  for column in _HUMAN if values["labels"] else ():
    noises[column] = {
      "noise.kind": "file",
      "noise.path": values["labels"],
      "noise.column": column,
    }
  return noises


def _efficientnet(values):
  seeds, noises = tuple(range(values["seeds"] or 5)), _noises(values)
  everywhere = {"data.name": "cifar10", **_prepared(values)}
  heads = {
    **everywhere,
    "data.image_size": 128,
    "eval_batch_size": 64,
    "model.name": "efficientnet_lite0",
    "model.pretrained": values["backbone"],
    "mimic.weighting": "ess_softmax",
    "mimic.fraction": 0.5,
    "optimizer.learning_rate": 3e-4,
    "probe.features": "{sweep}/features",
    "study.seeds": seeds,
  }
  held_out: dict[str, object] = {
    "data.train_split": "train[:40000]",
    "data.test_split": "train[40000:]",
    "study.seeds": (10, 11),
    "study.tune.learning_rates": (1e-4, 3e-4, 1e-3),
    "study.tune.weighting_values": (0.3, 0.5, 0.7),
  }
  probe = "configs/label_noise.py:dataset=cifar10,protocol=probe"
  outgrowing = "configs/outgrowing.py:dataset=cifar10"
  # The first one computes the features that all of the others take.
  clean: dict[str, object] = {"study.methods": ("sgd",), "probe.rates": (0.0,)}
  cells = [_line("clean", "study", probe, heads | clean)]
  cells.append(
    _line(
      "outgrowing_tuning",
      "tune",
      outgrowing,
      {
        **heads,
        **held_out,
        "study.retrain": False,
        "probe.reference_shares": (0.025, 0.1),
      },
    )
  )
  for name in ("symmetric", "worst"):
    if name not in noises:
      continue
    more: dict[str, object] = {
      "probe.rates": (0.5,) if name == "symmetric" else (0,),
      "study.tuned": "{outgrowing_tuning}/tuned.json",
    }
    fields = heads | noises[name] | more
    cells.append(_line(f"outgrowing_{name}", "study", outgrowing, fields))
  weights = {"model.pretrained": values["backbone"], **_prepared(values)}
  finetune = f"{outgrowing},protocol=finetune"
  cells.append(_line("outgrowing_finetune", "study", finetune, weights))
  cells.append(
    _line(
      "probe_tuning",
      "tune",
      probe,
      {**heads, **held_out, "study.methods": _MOST, "probe.rates": (0.5,)},
    )
  )
  for name, noise in noises.items():
    rates = (0.3, 0.4, 0.5, 0.6, 0.7) if name == "symmetric" else (0,)
    more = {
      "probe.rates": rates,
      "study.methods": _MOST,
      "study.tuned": "{probe_tuning}/tuned.json",
    }
    cells.append(_line(f"probe_{name}", "study", probe, heads | noise | more))
  published: dict[str, object] = {
    "probe.rates": (0.4, 0.5, 0.6),
    "optimizer.learning_rate": 1e-4,
    "mimic.weighting": "softmax",
    "mimic.temperature": 0.03,
    "study.methods": label_noise.METHODS,
  }
  cells.append(_line("published", "study", probe, heads | published))
  cells += _probe_ablations(probe, heads, len(seeds), steps=1563)
  return (*cells, _results("CIFAR-10, EfficientNet-Lite0", cells))


def _probe_ablations(probe, fields, seeds, steps=782):
  """Temperature, quality of the reference, first epoch: heads at noise .4.

  `steps` are those of an epoch.
  """
  fields = {
    **fields,
    "probe.rates": (0.4,),
    "study.methods": ("sgd", "grad_mimic", "rho"),
    "study.seeds": tuple(range(seeds)),
  }
  temperatures = {
    "mimic.weighting": "softmax",
    "probe.weighting_values": (0.03, 0.1, 0.3, 1.0, 3.0),
    "study.methods": ("grad_mimic",),
  }
  variants = {
    "temperature": temperatures,
    "cosine": {"mimic.score": "cosine", "study.methods": ("grad_mimic",)},
    "reference_seed": {"study.reference.seed_offset": 1000},
    "reference_1_epoch": {"study.reference.num_epochs": 1},
    "reference_noise_0.2": {"study.reference.noise_rate": 0.2},
    "reference_noise_0.4": {"study.reference.noise_rate": 0.4},
    "scores_every_2_epochs": {"mimic.refresh_epochs": 2},
    "scores_of_epoch_1": {"mimic.refresh_epochs": 5},
    "start_epoch_1": {"mimic.warmup_steps": steps},
    "start_epoch_3": {"mimic.warmup_steps": 3 * steps},
  }
  return [
    _line(f"ablation_{name}", "study", probe, fields | variant)
    for name, variant in variants.items()
  ]


def _finetune_ablations(full, fields):
  """Ablations of the method when all weights move, at noise .4."""
  ours = {"study.methods": ("grad_mimic",)}
  # As published, and otherwise; at one rate and fraction.
  untuned = {k: v for k, v in fields.items() if k != "study.tuned"}
  untuned |= {"mimic.fraction": 0.7, **ours}
  leak = {
    "study.methods": ("grad_mimic", "rho"),
    "study.reference.test_leak": True,
  }
  every = {"mimic.layers": "."}
  variants = {
    "head_only": untuned | {"mimic.layers": "head/kernel"},
    "all_layers": untuned | every,
    "all_layers_cosine": untuned | every | {"mimic.score": "cosine"},
    "reference_of_test_split": fields | leak,
  }
  return [
    _line(f"finetune_ablation_{name}", "study", full, variant)
    for name, variant in variants.items()
  ]


def _digits(values):
  seeds = values["seeds"] or 2
  everywhere = {"data.name": "digits", "study.seeds": tuple(range(seeds))}
  if values["data_dir"]:
    everywhere["data.data_dir"] = values["data_dir"]
  model = {"model.name": "convnet", "model.widths": (16, 32)}
  backbone = {
    **everywhere,
    **model,
    "seed": 100,
    "data.train_split": "train[:700]",
    "num_epochs": 15,
    "optimizer.learning_rate": 5e-3,
  }
  common_fields = {
    **everywhere,
    "data.train_split": "train[700:]",
    "data.image_size": 0,
    "data.flip": False,
    "model.pretrained": "{backbone}",
    "mimic.weighting": "ess_softmax",
    "mimic.fraction": 0.3,
    "study.methods": _ALL,
    "optimizer.learning_rate": 1e-2,
  }
  probe = "configs/label_noise.py:protocol=probe"
  full = "configs/label_noise.py:protocol=finetune,rate=0.4"
  network = {
    **common_fields,
    **model,
    "batch_size": 64,
    "optimizer.learning_rate": 3e-3,
    "optimizer.schedule": "cosine",
    "mimic.layers": "head/kernel",
    "checkpoint.every_epochs": 5,
    "study.seeds": (0,),
  }
  tuned_on = {
    "data.train_split": "train[700:1200]",
    "data.test_split": "train[1200:]",
    "study.seeds": (10,),
    "study.tune.learning_rates": (3e-3, 1e-2, 3e-2),
    "study.tune.weighting_values": (0.2, 0.4, 0.7),
  }
  cells = [
    _line("backbone", "train", "configs/classification.py", backbone),
    _line("probe_tuning", "tune", probe, common_fields | tuned_on),
    _line(
      "probe_symmetric",
      "study",
      probe,
      {**common_fields, "study.tuned": "{probe_tuning}/tuned.json"},
    ),
    _line(
      "finetune_symmetric_0.4",
      "study",
      full,
      {
        **network,
        "study.keep_fractions": (0.8, 0.5),
        "study.methods": label_noise.METHODS,
      },
    ),
    _line(
      "costs",
      "benchmark",
      "configs/benchmark/methods.py:study=label_noise,rate=0.4",
      {
        **network,
        "mimic.reference": "{finetune_symmetric_0.4}/seed0/reference",
      },
    ),
  ]
  return (*cells, _results("Digits", cells))


def _layers(values):
  seeds = values["seeds"] or 3
  cells = []
  for setting in ("language", "shapes", "cifar10"):
    fields = _prepared(values) if setting == "cifar10" else {}
    arg = f"setting={setting},seeds={seeds}"
    config = f"configs/layers.py:{arg}"
    cells.append(_line(setting, "study", config, fields))
    fields = fields | {"mimic.reference": f"{{{setting}}}/seed0/reference"}
    config = f"configs/benchmark/methods.py:study=layers,{arg}"
    cells.append(_line(f"{setting}_cost", "benchmark", config, fields))
  return tuple(cells)


def _path(values):
  seeds, cells = values["seeds"] or 5, []
  for setting in ("digits", "symmetric", "human"):
    fields = _prepared(values) if setting != "digits" else {}
    if setting == "human":
      if not values["labels"]:
        continue
      fields = {**fields, "noise.path": values["labels"]}
    for name, more in (
      ("tuning", "seeds=2,held_out=true"),
      ("", f"seeds={seeds}"),
    ):
      config = f"configs/path.py:setting={setting},{more}"
      cells.append(
        _line("_".join(filter(None, (setting, name))), "study", config, fields)
      )
  plain: dict[str, object] = {
    "study.methods": ("sgd", "rho", "grad_mimic"),
    "study.points": (),
    "study.weightings": ("ess0.5",),
    "study.references": "{sweep}/references",
  }
  variants = {"digits_rounds": {"study.rounds": 4}} | {
    f"digits_refresh_{epochs}": {"mimic.refresh_epochs": epochs}
    for epochs in (2, 5, 20, 200)
  }
  config = f"configs/path.py:seeds={seeds}"
  for name, fields in variants.items():
    cells.append(_line(name, "study", config, plain | fields))
  return tuple(cells)


def _prepared(values):
  return {"data.data_dir": values["data_dir"]} if values["data_dir"] else {}


def _results(title, cells):
  """The cell that puts the others together."""
  names = [line.partition(":")[0] for line in cells]

  def folders(beginning, but=("_tuning", "_ablation")):
    return tuple(
      f"{{{name}}}"
      for name in names
      if name.startswith(beginning) and not any(part in name for part in but)
    )

  ablations = tuple(
    f"{name.partition('ablation_')[2]}={{{name}}}"
    for name in names
    if "ablation_" in name
  )
  return _line(
    "results",
    "compare",
    "configs/compare.py",
    {
      "title": f"{title} under label noise",
      "probe": folders("probe_"),
      "finetune": folders("finetune_"),
      "tuning": tuple(f"{{{name}}}" for name in names if "_tuning" in name),
      **({"costs": "{costs}"} if "costs" in names else {}),
      "ablations": ablations,
    },
  )


def _line(name, job, config, fields):
  flags = [f'"--config.{field}={value}"' for field, value in fields.items()]
  return " ".join([f"{name}: {job} --config={config}", *flags])
