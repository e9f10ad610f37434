"""What a job says before it trains or scores."""

import pathlib
from typing import Any

import jax
from ml_collections import config_dict

from experiments import tasks
from experiments.methods import Method
from experiments.runtime import metrics, terminal


def training(
  task: tasks.Task, method: Method | None, params: Any, folder: pathlib.Path
) -> str:
  """Describes a run that is going to be trained.

  Args:
    task: the run's.
    method: the run's; None: plain training.
    params: the learner's.
    folder: the run's.

  Returns:
    Lines.
  """
  config, steps = task.config, task.total_steps
  length = f"{steps:,} steps of {config.batch_size:,} samples"
  if task.steps_per_epoch:
    epochs = steps / task.steps_per_epoch
    length += f", {epochs:.4g} epoch{'' if epochs == 1 else 's'} of"
    length += f" {task.steps_per_epoch:,} steps"
  scores = ", and of scores in ledger/" if method and method.score else ""
  return terminal.outline(
    f"train by {config.method}",
    {
      "data": describe_data(config, task),
      "model": describe_model(config, params),
      "reference": method and _reference(config, method),
      "devices": terminal.describe_devices(task.devices.count),
      "length": length,
      "look at": f"{folder / metrics.METRICS_FILE}{scores}; or: tensorboard"
      f" --logdir {folder}",
    },
  )


def scoring(
  task: tasks.Task, method: Method | None, checkpoints: int, learner: Any
) -> str:
  """Describes the scoring of a data set.

  Args:
    task: of the learner's config.
    method: whose scores they are.
    checkpoints: number of passes over the data.
    learner: the folder of the run whose checkpoints they are.

  Returns:
    Lines.
  """
  config = task.config
  many = "a pass" if checkpoints == 1 else f"{checkpoints} passes"
  return terminal.outline(
    f"score by {config.method}",
    {
      "data": describe_data(config, task, scored=True),
      "model": describe_model(config, task.params),
      "reference": method and _reference(config, method),
      "devices": terminal.describe_devices(task.devices.count),
      "length": f"{many} over the data, one for each checkpoint of {learner}",
    },
  )


def describe_data(
  config: config_dict.ConfigDict, task: Any = None, *, scored: bool = False
) -> str:
  """Describes a run's data, such as "digits train, 1,437 samples".

  Args:
    config: the run's.
    task: made of it; None: numbers are left out.
    scored: whether all samples are meant, also those that a filter leaves out.

  Returns:
    A line.
  """
  data, noise = config.data, config.noise
  name = data.get("name") or data.get("path") or config.task
  text = f"{name} {data.get('train_split') or ''}".strip()
  facts = {} if task is None else task.facts()
  count = None
  if task is not None:
    count = task.samples if scored else facts.get(type(task).size)
  if count is not None:
    text += f", {count:,} samples"
  if data.get("filter") and not scored:
    text += f", chosen by {data.filter}"
  rate = facts.get("noise_rate", noise.rate)
  if rate:
    kinds = noise.get("column") or noise.get("kind") or "/".join(noise.kinds)
    text += f", {kinds} noise {rate:.3g}"
  return text


def describe_model(config: config_dict.ConfigDict, params: Any) -> str:
  """Describes a model, such as "mlp, 85,002 parameters".

  Args:
    config: the run's.
    params: its parameters; None: their number is left out.

  Returns:
    A line.
  """
  model = config.model
  words = [model.get("name") or config.task, model.get("size") or ""]
  text = " ".join(filter(None, words))
  if params is not None:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    text += f", {count:,} parameters"
  if model.get("pretrained"):
    text += f", from {model.pretrained}"
  return text


def _reference(config, method):
  """What the method looks at, and where it is from."""
  where = config.mimic.reference or config.mimic.outputs
  if not method.direction or where is None:
    return None
  return f"{where}, toward its {method.direction}"
