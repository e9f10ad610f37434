"""Configs of every task that train in seconds, and interruptions."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from configs import digits, language, shapes
from experiments.training import steps

TASKS = ("classification", "contrastive", "language")
_ALL = {
  "batch_size": 16,
  "eval_batch_size": 16,
  "mesh.data": 1,  # of the eight virtual devices
  "num_epochs": 0,
  "num_samples": 0,
  "num_steps": 6,
  "eval_every_epochs": 0,
  "eval_every_steps": 2,
  "checkpoint.every_epochs": 0,
  "checkpoint.every_steps": 2,
  "checkpoint.keep": 3,
  "log_every": 2,
  "mimic.fraction": 0.5,
  "mimic.check_samples": 16,
}
_TASK = {
  "classification": {
    "data.train_split": "train[:48]",
    "data.test_split": "test[:32]",
    "model.widths": (16, 16),
    "optimizer.learning_rate": 1e-2,
  },
  "contrastive": {
    "model.clip.image_width": 16,
    "model.clip.text_width": 16,
    "model.clip.image_depth": 1,
    "model.clip.text_depth": 1,
    "model.clip.image_heads": 2,
    "model.clip.text_heads": 2,
    "model.clip.embed_width": 16,
    "data.image_size": 16,
    "data.train_size": 48,
    "data.held_out_size": 16,
    "data.zero_shot_size": 48,
  },
  "language": {
    "model.decoder.width": 16,
    "model.decoder.depth": 1,
    "model.decoder.mlp_width": 32,
    "data.length": 16,
    "data.shortest": 8,
    "data.train_size": 48,
    "data.held_out_size": 16,
  },
}
_CONFIGS = {
  "classification": digits,
  "contrastive": shapes,
  "language": language,
}


def make(task: str, data_dir: str, **fields: Any) -> Any:
  """The config of a run of six steps.

  Args:
    task: one of TASKS.
    data_dir: where digits are prepared.
    **fields: `{"dotted.field": value}` that differ.

  Returns:
    The config, locked.
  """
  config = _CONFIGS[task].get_config().copy_and_resolve_references().unlock()
  if task == "classification":
    config.data.data_dir = data_dir
  config.update_from_flattened_dict({**_ALL, **_TASK[task], **fields})
  return config.lock()


@contextlib.contextmanager
def interrupted(count: int) -> Iterator[None]:
  """Training stops with KeyboardInterrupt before its step `count`."""
  make_step = steps.make_train_step

  def make_interrupted(*args, **options):
    step, done = make_step(*args, **options), []

    def stopping(*args):
      if len(done) == count:
        raise KeyboardInterrupt
      done.append(None)
      return step(*args)

    return stopping

  with mock.patch.object(steps, "make_train_step", make_interrupted):
    try:
      yield
    except KeyboardInterrupt:
      return
  raise AssertionError(f"the run has ended before step {count}.")


def checkpointed(folder: pathlib.Path) -> list[int]:
  """The steps of the checkpoints in a run's folder."""
  found = folder / "checkpoints"
  return sorted(int(path.name) for path in found.iterdir() if path.is_dir())
