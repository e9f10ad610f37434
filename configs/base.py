"""Every field there is, with its default. The other configs start from here.

A field that is not here is refused, on the command line and in code.
"""

from ml_collections import config_dict


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The defaults, locked."""
  parse_arg(arg)
  config = config_dict.ConfigDict()

  # Initialisation and batch order. Runs of one seed start from the same
  # parameters: that puts a reference into the learner's own basin.
  config.seed = 0
  config.batch_size = 128
  config.eval_batch_size = 512
  config.num_epochs = 50
  add_running(config)

  config.data = config_dict.ConfigDict()
  # Any prepared TFDS image-classification set; "digits" prepares itself.
  config.data.name = "digits"
  config.data.data_dir = config_dict.placeholder(str)
  config.data.train_split = "train"
  config.data.test_split = "test"
  # Pixels that both sides of every image are resized to; 0: as they are.
  config.data.image_size = 0
  config.data.flip = False  # random horizontal flips
  # Which samples to train on: a .npy file of ids, or a selection as .parquet
  # or .csv. Ids are positions in the split or the set's own. None: all.
  config.data.filter = config_dict.placeholder(str)

  config.noise = config_dict.ConfigDict()
  # "symmetric", "pair", "asymmetric", "confusion" or "file".
  config.noise.kind = "symmetric"
  # Exactly int(rate * N) labels are flipped; 0 with "confusion" and "file": as
  # the matrix or the table has it.
  config.noise.rate = 0.0
  config.noise.seed = 0
  # Of "asymmetric", such as "cat:dog,dog:cat"; None for CIFAR's usual one.
  config.noise.mapping = config_dict.placeholder(str)
  # Of "confusion": a .npy or .csv file, true classes by given ones.
  config.noise.matrix = config_dict.placeholder(str)
  # Of "file": a .csv or .parquet table, and its columns with labels and ids.
  config.noise.path = config_dict.placeholder(str)
  config.noise.column = config_dict.placeholder(str)
  config.noise.id_column = config_dict.placeholder(str)
  # Of "file": samples that the table lacks keep their labels.
  config.noise.partial = False

  config.model = config_dict.ConfigDict()
  config.model.name = "mlp"  # "mlp", "convnet", "resnet" or "vit"
  # Where weights come from that are not initialised: the workdir of a finished
  # run, a .safetensors file (or its folder) or "hf://owner/name". The head is
  # always a new one.
  config.model.pretrained = config_dict.placeholder(str)
  # Of the vit: "" is as `vit` has it; "pretrained" takes all of that from the
  # weights that `pretrained` names and the config.json beside them.
  config.model.size = ""
  # Hidden widths of the mlp, or channels per stage of convnet and resnet.
  config.model.widths = (256, 256)
  # Of convnet and resnet: pixels taken together, in each direction.
  config.model.patch_size = 1
  config.model.blocks_per_stage = 1  # of the resnet
  config.model.vit = vit()

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = "adamw"  # "adamw" or "sgd" (with momentum .9)
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "cosine"  # to 0 over the run, or "constant"
  config.optimizer.weight_decay = 1e-5

  # "sgd", "grad_mimic", "distillation", "rho", "grand", "influence", "agra",
  # "grad_match_omp", ...: experiments/methods/table.py has a table of all.
  config.method = "sgd"
  config.mimic = config_dict.ConfigDict()
  # Of grad_mimic: toward the reference's "weights" or its "outputs", or down
  # the "clean_gradient" of a few samples with true labels, or down the
  # "noisy_gradient" of an independent batch.
  config.mimic.direction = "weights"
  # The workdir of a finished run. For its weights it must have the learner's
  # architecture and should have its seed; for its outputs it may be any.
  config.mimic.reference = config_dict.placeholder(str)
  # A .npy file of logits [N, C] in place of a reference's outputs, a row for
  # each sample of the train split; [2, N, C] has the mirrored images' too.
  config.mimic.outputs = config_dict.placeholder(str)
  # Before the first step, that many training samples tell whether the weights
  # of the reference can guide the learner; if they can't, the run stops.
  config.mimic.check_samples = 256
  config.mimic.force = False  # goes on all the same
  config.mimic.clean_per_class = 5  # of "clean_gradient"; not trained on
  # A regular expression on "/"-joined parameter paths; None takes all leaves.
  config.mimic.layers = config_dict.placeholder(str)
  config.mimic.score = "projection"  # or "cosine"
  # "softmax", "ess_softmax", "top_fraction", "positive", "proportional"
  # or "uniform"
  config.mimic.weighting = "ess_softmax"
  config.mimic.temperature = 1.0  # of softmax
  config.mimic.warmup_steps = 0  # with uniform weights, before these
  # Of ess_softmax, top_fraction, grad_match_omp and random.
  config.mimic.fraction = 0.3
  # Of grad_match_omp and grad_match_least_squares, in mean squared norms.
  config.mimic.ridge = 0.1
  # Of grand_offline: the gradient norms of how many runs are averaged, after
  # how many epochs of each.
  config.mimic.grand_runs = 10
  config.mimic.grand_epochs = 1
  config.mimic.scope = "all"  # or "layers"
  config.mimic.engine = "auto"  # or "forward", "per_sample"

  config.select = config_dict.ConfigDict()
  # "auto", "gmm", "threshold", "kmeans" or "top_fraction"
  config.select.binarize = "auto"
  config.select.aggregate = "label_model"
  config.select.threshold = 0.0  # of "threshold", on the raw score
  config.select.fraction = 0.5  # of "top_fraction"

  config.checkpoint = config_dict.ConfigDict()
  config.checkpoint.every_epochs = 1
  config.checkpoint.keep = 2  # the newest
  config.checkpoint.keep_every = 0  # and each that many epochs, for ever

  config.study = config_dict.ConfigDict()
  config.study.seeds = (0, 1, 2)
  config.study.methods = ("sgd", "grad_mimic")
  config.study.retrain = True  # on what each method's selection keeps
  # Shares of the data to train on: each method's best, and some by chance.
  config.study.keep_fractions = ()
  config.study.keep_methods = ()  # whose; empty: of all that have scores
  # Selections to measure, by `select.aggregate`: "threshold" (at
  # `select.threshold`), "gmm", "kmeans", "top_fraction", "auto", and "weight":
  # the published threshold, a weight of more than 1 / batch_size.
  config.study.binarizers = ()
  # A folder of references, which studies may share; None: in the workdir.
  config.study.references = config_dict.placeholder(str)
  # The methods' own settings, as `experiments.tune` wrote them to a file.
  config.study.tuned = config_dict.placeholder(str)
  # What `experiments.tune` tries.
  config.study.tune = config_dict.ConfigDict()
  config.study.tune.learning_rates = ()
  # Of `mimic.temperature` with softmax weights, of `mimic.fraction` otherwise.
  config.study.tune.weighting_values = ()
  # Of `mimic.layers`, besides that one, for methods that look at gradients.
  config.study.tune.layers = ()
  # How the reference differs from the learner. Empty and 0: not at all, but
  # for its clean labels.
  config.study.reference = config_dict.ConfigDict()
  # Added to the seed: another initialisation and another batch order.
  config.study.reference.seed_offset = 0
  config.study.reference.model = ""  # model name, for another architecture
  config.study.reference.widths = ()  # of that model
  config.study.reference.num_epochs = 0
  config.study.reference.train_split = ""
  config.study.reference.noise_rate = 0.0  # symmetric, in its labels
  # Trains it on the very split that everything is tested on: to see what such
  # a reference would be worth, never to report an accuracy.
  config.study.reference.test_leak = False
  return config.lock()


def add_running(config: config_dict.ConfigDict) -> None:
  """Adds how a run is carried out, which may change when it is continued."""
  # Over how many devices a batch's rows are divided, and over how many the
  # parameters too: a batch takes data * fsdp devices. -1: all that are left.
  config.mesh = config_dict.ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1

  config.faults = config_dict.ConfigDict()
  # A process that has not moved for so long ends itself; 0: never.
  config.faults.stall_seconds = 1800
  # So many steps in a row whose gradient is not finite end the run; 0: none.
  config.faults.nonfinite_stop = 10

  config.log_every = 50  # steps between writes of metrics and scores
  # The first step and the one after the last that are traced for a profiler;
  # empty: none.
  config.profile_steps = ()


def vit() -> config_dict.ConfigDict:
  """What a vision transformer is made of; a small one for 32-pixel images."""
  config = config_dict.ConfigDict()
  config.patch_size = 4  # pixels; divides both sides of the images
  config.width = 192
  config.depth = 6  # blocks
  config.heads = 3
  config.mlp_width = 768
  config.pooling = "mean"  # or "class_token"
  config.norm_epsilon = 1e-6  # of the layer norms
  # Of the activations, such as "bfloat16"; None is that of the parameters.
  config.dtype = config_dict.placeholder(str)
  return config


def parse_arg(arg: str, **defaults: bool | int | float | str) -> dict:
  """Reads `key=value,key=value`, each value by the type of its default.

  Args:
    arg: what follows the colon in `--config=configs/<name>.py:<arg>`.
    **defaults: the keys there are and their defaults.

  Returns:
    The defaults, updated.

  Raises:
    ValueError: a key that is not there, or a value that can't be read.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, _, text = item.partition("=")
    if key not in defaults:
      known = ", ".join(defaults) or "none"
      raise ValueError(
        f"unknown config argument {key!r}; this config takes: {known}."
      )
    kind = type(defaults[key])
    try:
      values[key] = (
        {"true": True, "false": False}[text.lower()]
        if kind is bool
        else kind(text)
      )
    except (KeyError, ValueError):
      raise ValueError(
        f"config argument {key}={text!r} can't be read as {kind.__name__}."
      ) from None
  return values
