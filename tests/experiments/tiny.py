"""Configs of every task that train in seconds, and interruptions."""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import gradmimic_jax as gm
from configs import digits, language, shapes
from experiments.runtime import checkpoint, metrics
from experiments.training import calls, steps, trainer

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
    "optimizer.name": "sgd",  # whose programs are the smallest
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
    "optimizer.name": "sgd",
    "model.decoder.width": 16,
    "model.decoder.depth": 1,
    "model.decoder.mlp_width": 32,
    "data.length": 16,
    "data.shortest": 8,
    "data.train_size": 48,
    "data.held_out_size": 16,
    "noise.kinds": ("shuffled", "boilerplate"),  # code takes a second
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
    data_dir: where digits are prepared, and a text is written.
    **fields: `{"dotted.field": value}` that differ.

  Returns:
    The config, locked.
  """
  config = _CONFIGS[task].get_config().copy_and_resolve_references().unlock()
  if task == "classification":
    config.data.data_dir = data_dir
  if task == "language":  # Python's own text takes seconds to find
    file = pathlib.Path(data_dir) / "text.txt"
    if not file.exists():
      file.write_text(_text())
    config.data.path = str(file)
  config.update_from_flattened_dict({**_ALL, **_TASK[task], **fields})
  return config.lock()


def _text():
  """A hundred paragraphs of a small vocabulary."""
  rng = np.random.default_rng(0)
  words = np.array(
    ["the", "cat", "dog", "sees", "hears", "no", "other", "old", "new", "tree"]
  )
  return "\n\n".join(" ".join(rng.choice(words, 20)) for _ in range(100))


@contextlib.contextmanager
def nudged() -> Iterator[None]:
  """Each step of a run goes some way off, the same one; nothing is compiled."""
  call = calls.Call(1, _nudge)
  with (
    mock.patch.object(
      calls, "make", return_value=calls.Made(None, None, lambda *_: call)
    ),
    mock.patch.object(calls, "choose_length", return_value=1),
  ):
    yield


def _nudge(state, *_):
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + np.float32(rng.normal(scale=0.02, size=x.shape)), state.params
  )
  metrics = {name: jnp.zeros([1]) for name in ("loss", "nonfinite", "skipped")}
  return state._replace(params=params), steps.StepOutput(metrics, {})


@contextlib.contextmanager
def around_calls(
  before: Callable[[int, int], None] = lambda step, count: None,
  after: Callable[[int, int], None] = lambda step, count: None,
) -> Iterator[list]:
  """Calls functions around a run's calls, with their steps done and to do.

  Steps are counted from the run's start or restart. Gives a list, which gets
  the results of `calls.make`.
  """
  make, made = calls.make, []

  def make_watched(*args, **options):
    found = make(*args, **options)
    made.append((found.step, found.make_call))
    done = 0

    def eventful_call(*given):
      call = found.make_call(*given)

      def make_eventful(function):
        def eventful(*args):
          nonlocal done
          count = int(np.sum(args[-1]))
          before(done, count)
          result = function(*args)
          after(done, count)
          done += count
          return result

        return eventful

      between = call.between and make_eventful(call.between)
      return call._replace(
        function=make_eventful(call.function), between=between
      )

    return found._replace(make_call=eventful_call)

  with mock.patch.object(calls, "make", make_watched):
    yield made


@contextlib.contextmanager
def before_step(count: int, happens: Callable[[], None]) -> Iterator[list]:
  """A run calls `happens` before its step `count`, which it has to reach.

  Several steps go into a call: it happens before the call of that one.
  Gives a list, as `around_calls`.
  """
  reached = []

  def before(step, to_do):
    if step <= count < step + to_do:
      reached.append(None)
      happens()

  with around_calls(before) as made:
    yield made
  assert reached, f"the run has ended before step {count}."


@contextlib.contextmanager
def interrupted(count: int) -> Iterator[None]:
  """Training stops with KeyboardInterrupt before its step `count`."""

  def stop():
    raise KeyboardInterrupt

  with before_step(count, stop), contextlib.suppress(KeyboardInterrupt):
    yield


def assert_same_run(one: pathlib.Path, other: pathlib.Path, like: Any) -> None:
  """The same parameters (as `like`), metrics and ledgers, bit for bit."""
  params = [checkpoint.load_params(folder, like) for folder in (one, other)]
  jax.tree.map(np.testing.assert_array_equal, *params)
  lines = [metrics.read_metrics(x / metrics.METRICS_FILE) for x in (one, other)]
  assert lines[0] == lines[1]
  ledgers = [x / trainer.LEDGER_FOLDER for x in (one, other)]
  assert ledgers[0].exists() == ledgers[1].exists()
  if ledgers[0].exists():
    tables = [gm.ScoreLedger(path).table() for path in ledgers]
    assert tables[0].equals(tables[1])


def kill(folder: pathlib.Path, to: pathlib.Path, count: int) -> None:
  """Copies a run's folder as a kill before its step `count` leaves it."""
  end = time.monotonic() + 60
  while checkpoint.steps(folder) != list(range(2, count + 1, 2)):
    assert time.monotonic() < end, "a checkpoint is late"
    time.sleep(0.01)
  shutil.copytree(folder, to)
