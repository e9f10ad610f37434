"""Fields that the configs of all tasks share, and reading of arguments.

`configs/classification.py`, `configs/contrastive.py` and the like list every
field of their task. A field that is not there is refused, on the command line
and in code.
"""

from ml_collections import config_dict

_UNITS = ("epochs", "samples", "steps")


def get_config(task: str, **durations: int) -> config_dict.ConfigDict:
  """The fields of every task, with their defaults; unlocked.

  Durations are as `add_durations` takes them.
  """
  config = config_dict.ConfigDict()

  config.task = task
  # Initialisation and batch order. Runs of one seed start from the same
  # parameters: that puts a reference into the learner's own basin.
  config.seed = 0
  config.batch_size = 128  # of all devices together
  config.eval_batch_size = 512
  config.checkpoint = config_dict.ConfigDict()
  config.checkpoint.keep = 2  # the newest
  add_durations(config, **durations)
  _add_running(config)

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = "adamw"  # "adamw" or "sgd" (with momentum .9)
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "cosine"  # to 0 over the run, or "constant"
  config.optimizer.warmup_steps = 0  # a line up to the learning rate
  config.optimizer.weight_decay = 1e-5
  # "all"; or "matrices": no gains and biases; or a regular expression on
  # "/"-joined parameter paths, of those that decay.
  config.optimizer.decaying = "all"
  # The largest norm of a step's gradient, which is scaled down to it; 0: none.
  config.optimizer.clip_norm = 0.0
  # Decay, such as 0.999, of an exponential average of the parameters, which are
  # then evaluated and used as a reference in their place; 0: none.
  config.optimizer.average = 0.0
  config.optimizer.b1 = 0.9  # of adamw, and so are these
  config.optimizer.b2 = 0.999
  config.optimizer.epsilon = 1e-8

  # "sgd", "grad_mimic", "distillation", "rho", "grand", "influence", "agra",
  # "grad_match_omp", ...: experiments/methods/table.py has a table of all.
  config.method = "sgd"
  config.mimic = config_dict.ConfigDict()
  # Of grad_mimic: toward the reference's "weights" or its "outputs", or down
  # the "clean_gradient" of a few samples with true labels, or down the
  # "noisy_gradient" of an independent batch.
  config.mimic.direction = "weights"
  # The workdir of a finished run, or (of image-text pairs) published weights.
  # For its weights it must have the learner's architecture and should have its
  # seed; for its outputs it may be any.
  config.mimic.reference = config_dict.placeholder(str)
  # What published weights are of, where it isn't the learner's own model.
  config.mimic.reference_size = config_dict.placeholder(str)
  config.mimic.reference_activation = config_dict.placeholder(str)
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
  # Scores are measured in every so many epochs; in those between, weights go by
  # the last ones, ledgers repeat them, and a step costs what a plain one does
  # (in microbatches, a pass more).
  config.mimic.refresh_epochs = 1
  # Of ess_softmax, top_fraction, grad_match_omp and random.
  config.mimic.fraction = 0.3
  # Of grad_match_omp and grad_match_least_squares, in mean squared norms.
  config.mimic.ridge = 0.1
  # Where on the way from the learner, 0, to the reference's weights, 1, a mimic
  # score is measured; a mean of several takes a pass for each.
  config.mimic.points = (0.0,)
  # Of distillation_mixed: the share of the reference's outputs; the labels have
  # the rest.
  config.mimic.mix = 0.5
  # Of grand_offline: the gradient norms of how many runs are averaged, after
  # how many epochs of each.
  config.mimic.grand_runs = 10
  config.mimic.grand_epochs = 1
  config.mimic.scope = "all"  # or "layers"
  # "auto", "forward", "per_sample"; or "ghost", which is the fastest on an
  # accelerator where much more than the head is in the mimic layers.
  config.mimic.engine = "auto"
  # How many samples are computed at a time, which saves memory; the gradient is
  # the whole batch's all the same. With scores their gradients are held one by
  # one, but not by the ghost engine. None: all, or as the engine has it.
  config.mimic.microbatch_size = config_dict.placeholder(int)
  # Refuses losses that depend on batch mates where an engine can't take them.
  config.mimic.check_independence = True

  config.select = config_dict.ConfigDict()
  # "auto", "gmm", "threshold", "kmeans" or "top_fraction"
  config.select.binarize = "auto"
  config.select.aggregate = "label_model"
  config.select.threshold = 0.0  # of "threshold", on the raw score
  config.select.fraction = 0.5  # of "top_fraction"

  config.study = config_dict.ConfigDict()
  config.study.seeds = (0, 1, 2)
  config.study.methods = ("sgd", "grad_mimic")
  # Every method with scores at all of these. Points as `mimic.points`, such as
  # "0.5" or "0.21+0.79"; layers as `mimic.layers`;
  # weightings such as "ess0.7" (an effective sample size of 70 % of the batch),
  # "temperature0.05" or "top0.7". Empty: as `mimic` has them.
  config.study.points = ()
  config.study.layers = ()
  config.study.weightings = ()
  # How often each method with a reference is run: from the second round on, the
  # learner of the round before is the reference.
  config.study.rounds = 1
  # A run of the study that the others' accuracy is compared with, seed by seed.
  config.study.against = ""
  config.study.retrain = True  # on what each method's selection keeps
  # Shares of the data to train on: each method's best, and some by chance.
  config.study.keep_fractions = ()
  config.study.keep_methods = ()  # whose; empty: of all that have scores
  # Selections to measure, by `select.aggregate`: "threshold" (at
  # `select.threshold`), "gmm", "kmeans", "top_fraction", "auto", and "weight":
  # the published threshold, a weight of more than 1 / batch_size.
  config.study.binarizers = ()
  # Filters to retrain on: "mimic_top30", "random30" and the like, percents of
  # the pool, combined with - & | and parentheses.
  config.study.filters = ()
  # The run whose mimic scores filters go by; "": the first one with scores.
  config.study.filter_by = ""
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
  # Batches at which steps are compared; empty: the config's own.
  config.study.cost_batch_sizes = ()
  # How the reference differs from the learner. Empty and 0: not at all, but
  # for its clean data.
  config.study.reference = config_dict.ConfigDict()
  # Added to the seed: another initialisation and another batch order.
  config.study.reference.seed_offset = 0
  config.study.reference.num_epochs = 0
  config.study.reference.num_samples = 0
  config.study.reference.num_steps = 0
  config.study.reference.noise_rate = 0.0  # of its data
  return config


def add_durations(config: config_dict.ConfigDict, **values: int) -> None:
  """Sets how long a run is, and how often it is evaluated and saved.

  Each in epochs, samples or steps, of which at most one is above 0: the length
  `num_*`, `eval_every_*`, `checkpoint.every_*`, and `checkpoint.keep_every_*`
  for checkpoints that are kept for good.

  Args:
    config: to set them in.
    **values: what isn't 0, such as `num_epochs=50` or `save_every_steps=100`
      (of `checkpoint.every_steps`).
  """
  for unit in _UNITS:
    config[f"num_{unit}"] = values.pop(f"num_{unit}", 0)
  for unit in _UNITS:
    config[f"eval_every_{unit}"] = values.pop(f"eval_every_{unit}", 0)
  for unit in _UNITS:
    config.checkpoint[f"every_{unit}"] = values.pop(f"save_every_{unit}", 0)
    config.checkpoint[f"keep_every_{unit}"] = 0
  if values:
    raise ValueError(f"there are no durations {', '.join(values)}.")


def _add_running(config: config_dict.ConfigDict) -> None:
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
  # "package.module:function" that gets (step, {name: number}), too.
  config.metrics_sink = config_dict.placeholder(str)
  # Steps in a compiled call, which ends at evaluations and checkpoints in any
  # case; 0: by the rule of experiments/training/calls.py. Its value belongs to
  # the run: another one may round otherwise.
  config.steps_per_call = 0
  # The first step and the one after the last that are traced for a profiler;
  # empty: none.
  config.profile_steps = ()


def parse_arg(
  arg: str, **defaults: bool | int | float | str | tuple[str, ...]
) -> dict:
  """Reads `key=value,key=value`, each value by the type of its default.

  Args:
    arg: what follows the colon in `--config=configs/<name>.py:<arg>`.
    **defaults: the keys there are and their defaults; of a tuple, the only
      values there are, it is the first.

  Returns:
    The defaults, updated.

  Raises:
    ValueError: a key that is not there, or a value that can't be read or isn't
      among those there are.
  """
  choices = {k: v for k, v in defaults.items() if isinstance(v, tuple)}
  values = defaults | {key: known[0] for key, known in choices.items()}
  for item in filter(None, (arg or "").split(",")):
    key, _, text = item.partition("=")
    if key not in defaults:
      known = ", ".join(defaults) or "none"
      raise ValueError(
        f"unknown config argument {key!r}; this config takes: {known}."
      )
    kind = type(values[key])
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
    if values[key] not in choices.get(key, (values[key],)):
      raise ValueError(
        f"config argument {key}={text!r}; expected one of"
        f" {', '.join(choices[key])}."
      )
  return values
