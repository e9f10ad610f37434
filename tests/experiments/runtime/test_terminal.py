"""What a job tells people."""

import sys
import time

from experiments.runtime import terminal


def test_facts_that_are_unknown_are_left_out():
  text = terminal.outline("train", {"data": "digits", "noise": None, "at": ""})
  assert text.splitlines() == ["train", "  data  digits"]


def test_in_a_log_a_run_says_what_it_is_at():
  told = []
  bar = terminal.Progress(9, 3, "run", note=told.append)
  bar.begin()
  bar.show(4, {"train_loss": 2.0, "train_accuracy": 0.5})  # a line a step is no
  bar.show(4, {"test_loss": 1.0, "zero_shot_accuracy@1": 0.25, "other": 7.0})
  bar.update(6, 2)
  bar.close()
  assert told == [
    "goes on at step 3",
    "compiling",
    "step 4 of 9: test loss 1, zero shot accuracy@1 0.25",
  ]


def test_without_words_there_are_none(capfd):
  bar = terminal.Progress(9, 0, "run")
  bar.begin()
  bar.show(4, {"test_loss": 1.0})
  bar.update(9, 0)
  bar.close()
  assert capfd.readouterr() == ("", "")


def test_on_a_terminal_the_bar_has_loss_accuracy_and_epoch(monkeypatch, capfd):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  told = []
  bar = terminal.Progress(9, 0, "run", note=told.append)
  bar.begin()
  bar.show(2, {"train_loss": 2.0, "train_accuracy": 0.5, "train_other": 1.0})
  bar.show(2, {"test_accuracy": 0.25})
  time.sleep(0.15)  # sooner, the bar would not be drawn again
  bar.update(9, 1)
  bar.close()
  shown = capfd.readouterr().err
  assert "run: compiling:" in shown
  last = shown.rpartition("run: 100%")[2]
  assert "epoch 2, accuracy 0.5, loss 2, test accuracy 0.25" in last
  assert "compiling" not in last
  assert not told
