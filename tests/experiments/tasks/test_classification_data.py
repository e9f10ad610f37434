"""Runs on images as users have them: stored anyhow, some of them broken."""

import csv
import json
import multiprocessing
import os
import time
from unittest import mock

import jax
import numpy as np
import pytest

import gradmimic_jax as gm
from configs import classification, report, select
from experiments import models
from experiments.data import decoding, stream, workers
from experiments.reporting import page
from experiments.runtime import checkpoint
from experiments.selection import files
from experiments.tasks.classification import data, task
from experiments.training import trainer
from tests.experiments import processes
from tests.experiments.data import source_case, test_sources

NUM = 24


def make_config(name, **overrides):
  config = classification.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "data.name": str(name),
      "data.image_size": 6,
      "data.flip": True,
      "data.workers": 0,
      "mesh.data": 1,
      "model.widths": (),
      "batch_size": 8,
      "eval_batch_size": 8,
      "num_epochs": 2,
      "log_every": 1,
      **overrides,
    }
  )
  return config.lock()


@pytest.fixture
def photos(tmp_path):
  """A folder of photographs with a table; photo 5 and 7 are cut off."""
  root = tmp_path / "photos"
  root.mkdir()
  encoded, labels = source_case.photos(NUM + 6)
  with open(root / "labels.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["file", "label", "split"])
    for row, (content, label) in enumerate(zip(encoded, labels, strict=True)):
      cut = len(content) // 2 if row in (5, 7) else None
      (root / f"{row:02d}.jpg").write_bytes(content[:cut])
      split = "train" if row < NUM else "test"
      writer.writerow([f"{row:02d}.jpg", f"kind{label}", split])
  return {
    "name": f"folder:{root}",
    "data.labels": str(root / "labels.csv"),
  }


@pytest.mark.slow
def test_the_same_data_train_alike_however_they_are_stored(tmp_path):
  found = {}
  for write in (
    test_sources.write_tfds,
    test_sources.write_table,
    test_sources.write_parquet,
  ):
    root = tmp_path / write.__name__
    root.mkdir()
    config = make_config("x").unlock()
    config.data.update(
      {
        field: value
        for field, value in write(root).items()
        if field in ("name", "source", "labels", "data_dir")
      }
    )
    folder = tmp_path / f"{write.__name__}_run"
    result = trainer.train_and_evaluate(config.lock(), folder)
    run = trainer.Run(config, folder)
    params = checkpoint.load_params(folder, run.state.params)
    found[write.__name__] = result["test_loss"], jax.device_get(params)
  first, *others = found.values()
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, first, other)


def test_broken_images_are_left_out_and_listed(photos, tmp_path):
  config = make_config(**photos, method="grand", **{"faults.bad_images": 0.1})
  folder = tmp_path / "run"
  result = trainer.train_and_evaluate(config, folder)
  assert result["bad_images"] == 2
  (listed,) = json.loads((folder / "bad_images.json").read_text()).values()
  assert [name[:2] for name in listed] == ["05", "07"]
  assert all("not readable" in reason for reason in listed.values())
  ids, scores = gm.ScoreLedger(folder / "ledger").matrix()
  np.testing.assert_array_equal(ids, np.delete(np.arange(NUM), [5, 7]))
  assert np.isfinite(scores).all()

  # Later jobs decode nothing but what they show.
  decode = decoding.Transform.decode
  with mock.patch.object(
    decoding.Transform, "decode", autospec=True, side_effect=decode
  ) as counter:
    chosen = select.get_config().unlock()
    chosen.run = str(folder)
    files.select_run(chosen.lock(), tmp_path / "selected")
    assert counter.call_count == 0
    wanted = report.get_config().unlock()
    wanted.run = str(folder)
    wanted.selection = str(tmp_path / "selected" / "selection.parquet")
    wanted.gallery = 3
    page.report_run(wanted.lock(), tmp_path / "page")
  text = (tmp_path / "page" / "report.html").read_text()
  shown = text.count("data:image/png;base64")
  assert 0 < counter.call_count <= shown < NUM


def test_too_many_broken_images_end_the_run(photos, tmp_path):
  config = make_config(**photos)
  with pytest.raises(ValueError, match=r"2 of 24 images .*can't be used: '05"):
    trainer.train_and_evaluate(config, tmp_path / "run")


def test_a_head_on_features_of_any_model(tmp_path):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 40)
  vectors = rng.normal(size=(40, 7)) + 4 * np.eye(3, 7)[labels]
  np.save(tmp_path / "features.npy", vectors.astype(np.float32))
  np.save(tmp_path / "labels.npy", labels)
  config = make_config(
    f"features:{tmp_path / 'features.npy'}",
    num_epochs=40,
    **{
      "data.labels": str(tmp_path / "labels.npy"),
      "data.train_split": "all[:80%]",
      "data.test_split": "all[80%:]",
      "data.flip": False,
      "eval_every_epochs": 40,
      "checkpoint.every_epochs": 40,
      "optimizer.learning_rate": 0.1,
    },
  )
  result = trainer.train_and_evaluate(config, tmp_path / "run")
  assert result["test_accuracy"] == 1
  for change, text in (
    ({"model.name": "convnet"}, "expected a model for vectors"),
    ({"data.flip": True}, "can't be mirrored or cropped"),
  ):
    other = config.copy_and_resolve_references().unlock()
    other.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=text):
      trainer.train_and_evaluate(other.lock(), tmp_path / "other")


@pytest.mark.parametrize(
  ("change", "text"),
  [
    ({"data.crop": "corner"}, "expected one of center, random_resized"),
    (
      {"data.crop": "random_resized", "data.crop_scale": (0.0, 1.0)},
      "the least and the largest share",
    ),
    (
      {"data.crop": "random_resized", "data.image_size": 0},
      "expected the size of the crops",
    ),
    ({"data.mean": (0.5,)}, "expected both, or neither"),
    ({"data.mean": (0.5, 0.5), "data.std": (1.0,)}, "one number or one per"),
    ({"data.resize": "stretch"}, "expected 'keep_ratio' or 'squeeze'"),
    ({"data.residence": "disk"}, "expected 'auto' or one of device"),
    ({"faults.bad_images": 1.5}, "expected a share, 0 to 1"),
  ],
)
def test_fields_that_make_no_sense(photos, tmp_path, change, text):
  with pytest.raises(ValueError, match=text):
    trainer.train_and_evaluate(
      make_config(**photos, **change), tmp_path / "run"
    )


def test_pages_decode_images_no_larger_than_they_show_them():
  encoded, labels = source_case.photos(2, kind="PNG")
  source = source_case.Handmade(encoded, labels)
  for size, shown in ((224, 64), (6, 6), (None, None)):
    images = task._Shown(source, decoding.Transform(3, size))
    small = decoding.Transform(3, shown).decode(encoded[1])
    np.testing.assert_array_equal(images.at_most(1, 64), small)
    whole = decoding.Transform(3, size).decode(encoded[1])
    np.testing.assert_array_equal(images[1], whole)


@pytest.mark.slow  # worker processes start
def test_a_worker_that_dies_ends_the_run_which_goes_on(photos, tmp_path):
  fields = {
    "data.crop": "random_resized",
    "data.workers": 2,
    "data.worker_processes": True,
    "faults.bad_images": 0.1,
    "num_epochs": 16,
    "checkpoint.every_epochs": 1,
  }
  config = make_config(**photos, **fields)
  whole = trainer.train_and_evaluate(
    make_config(**photos, **fields | {"data.worker_processes": False}),
    tmp_path / "whole",
  )
  following = stream.Batches.__next__
  killed = []

  def kill(batches):
    batch = following(batches)
    if batches.get_state()["step"] == 20 and not killed:
      started = multiprocessing.active_children()
      assert len(started) == 2
      os.kill(started[0].pid, 9)
      killed.append(time.monotonic())
    return batch

  with (
    mock.patch.object(stream.Batches, "__next__", kill),
    pytest.raises(
      workers.WorkerError, match=r"one of the 2 processes.*code -9"
    ),
  ):
    trainer.train_and_evaluate(config, tmp_path / "run")
  assert time.monotonic() - killed[0] < 60
  assert not (tmp_path / "run" / "result.json").exists()
  result = trainer.train_and_evaluate(config, tmp_path / "run")
  assert result["test_loss"] == whole["test_loss"]


@pytest.mark.slow  # real processes
def test_two_processes_train_as_one_wherever_images_live(photos, tmp_path):
  found = {}
  for residence, count in (
    ("memory", 1),
    ("stream", 2),
    ("device", 2),
  ):
    folder = tmp_path / f"{residence}{count}"
    fields = {
      "data.name": photos["name"],
      "data.labels": photos["data.labels"],
      "data.image_size": 6,
      "data.flip": True,
      "data.residence": residence,
      "model.widths": (),
      "batch_size": 8,
      "eval_batch_size": 8,
      "num_epochs": 2,
      "faults.bad_images": 0.1,
    }
    command = ["-m", "experiments.train"]
    command += processes.flags_of("configs/classification.py", folder, **fields)
    processes.finish(processes.start(command, count=count))
    config = make_config("x")
    _, like = models.create(
      config.model, input_shape=(6, 6, 3), num_classes=3, seed=0
    )
    found[folder.name] = checkpoint.load_params(folder, like)
    (listed,) = json.loads((folder / "bad_images.json").read_text()).values()
    assert [name[:2] for name in listed] == ["05", "07"]
    shown = json.loads((folder / "input.json").read_text())
    assert shown["mean"] == pytest.approx(
      json.loads((tmp_path / "memory1" / "input.json").read_text())["mean"]
    )
  for params in found.values():
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6),
      params,
      found["memory1"],
    )


def test_a_share_is_drawn_class_by_class_and_within_a_larger_one():
  labels = np.repeat([0, 1, 2], [50, 10, 4])
  labels = np.random.default_rng(0).permutation(labels)
  small = data.draw_share(labels, share=0.1, seed=3)
  np.testing.assert_array_equal(np.bincount(labels[small]), [5, 1, 1])
  large = data.draw_share(labels, share=0.5, seed=3)
  np.testing.assert_array_equal(np.bincount(labels[large]), [25, 5, 2])
  assert set(small) < set(large)
  assert len(set(large)) == len(large)
  assert (np.diff(large) > 0).all()
  other = data.draw_share(labels, share=0.5, seed=4)
  assert set(other) != set(large)
  everything = data.draw_share(labels, share=1.0, seed=3)
  np.testing.assert_array_equal(everything, np.arange(64))
