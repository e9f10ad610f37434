"""Metrics in TensorBoard's groups, and wherever a user wants them."""

import json

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments.runtime import metrics


def events(folder):
  """The events in TensorBoard's files: length, two checksums, content."""
  found = []
  for file in sorted((folder / "tensorboard").glob("events*")):
    content = file.read_bytes()
    at = 0
    while at < len(content):
      size = int.from_bytes(content[at : at + 8], "little")
      found.append(
        event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
      )
      at += size + 16
  return found


def test_groups_of_steps_are_shown_by_their_means(tmp_path):
  told = []
  writer = metrics.MetricsWriter(
    tmp_path,
    first_step=0,
    about='{\n  "seed": 7\n}',
    sinks=[lambda step, scalars: told.append((step, dict(scalars)))],
  )
  losses = np.float32([3, 1, 5])
  writer.write_steps(0, {"train_loss": losses[:2], "train_skipped": [0, 1]})
  writer.write_steps(2, {"train_loss": losses[2:], "train_skipped": [0]})
  writer.write(2, {"data_wait": 0.5}, later=True)
  writer.summarize(2, np.array([1.0, np.nan, 2.0, np.inf, 2.0]))
  writer.write(3, {"test_accuracy": 0.5, "zero_shot_accuracy@1": 0.25})
  writer.sync()
  assert told == [
    (
      2,
      {
        "train_loss": 3.0,
        "train_skipped": pytest.approx(1 / 3),
        "data_wait": 0.5,
      },
    ),
    (3, {"test_accuracy": 0.5, "zero_shot_accuracy@1": 0.25}),
  ]
  assert metrics.read_metrics(tmp_path / metrics.METRICS_FILE) == [
    {"step": 0, "train_loss": 3.0, "train_skipped": 0.0},
    {"step": 1, "train_loss": 1.0, "train_skipped": 1.0},
    {"step": 2, "train_loss": 5.0, "train_skipped": 0.0},
    {"step": 3, "test_accuracy": 0.5, "zero_shot_accuracy@1": 0.25},
  ]
  writer.close()
  shown = {
    (event.step, value.tag): value
    for event in events(tmp_path)
    for value in event.summary.value
  }
  assert shown[2, "train/loss"].simple_value == 3
  assert shown[2, "speed/data_wait"].simple_value == 0.5
  assert shown[3, "test/accuracy"].simple_value == 0.5
  assert shown[3, "zero_shot/accuracy_1"].simple_value == 0.25
  assert shown[2, "train/score"].histo.num == 3  # the finite ones
  (text,) = shown[0, "config/text_summary"].tensor.string_val
  assert json.loads(text) == {"seed": 7}


def test_a_sink_is_found_by_its_name():
  assert metrics.find_sink(None) is None
  assert metrics.find_sink("json:dumps") is json.dumps
  for name in ("json", "nowhere.at_all:f", "json:nothing", ":f"):
    with pytest.raises(ValueError, match=f"metrics_sink is '{name}', which"):
      metrics.find_sink(name)
  with pytest.raises(ValueError, match=r"is 'json:__name__', a str; expected"):
    metrics.find_sink("json:__name__")
