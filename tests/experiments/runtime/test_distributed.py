"""One program for one device and for many: rows, shards, meeting, restoring."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
import tiny
import update_case
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

import gradmimic_jax as gm
from configs import digits
from experiments import models
from experiments.data.pairs import in_memory as image_text
from experiments.runtime import checkpoint, distributed, sharding
from experiments.training import steps, trainer

CASE = str(pathlib.Path(update_case.__file__))


def mesh_of(data, fsdp, batch_size=8):
  return distributed.Devices(
    {"data": data, "fsdp": fsdp}, batch_size=batch_size
  )


@pytest.mark.parametrize(
  ("shape", "fsdp", "expected"),
  [
    ((1024, 64), 8, ("fsdp",)),
    ((64, 1024), 8, (None, "fsdp")),
    ((512, 512), 8, (None, "fsdp")),  # the last of equals
    ((1023, 512), 8, (None, "fsdp")),  # the largest can't be divided
    ((1023, 513), 8, ()),
    ((64, 64), 8, ()),  # small
    ((1024, 1024), 1, ()),
    ((), 8, ()),
  ],
)
def test_an_array_is_divided_along_its_largest_axis(shape, fsdp, expected):
  assert sharding.make_spec(shape, fsdp) == PartitionSpec(*expected)


@pytest.mark.parametrize(
  ("data", "fsdp", "message"),
  [
    (9, 1, r"data=9, fsdp=1, and there are 8 devices of 1 process"),
    (4, 4, "data=4, fsdp=4, and there are 8 devices"),
    (-1, 3, "data=-1, fsdp=3, and there are 8 devices"),
    (-1, -1, "of which one may be -1"),
    (0, 1, "of which one may be -1"),
    (3, 1, "batch_size is 8 on 3 devices"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(data, fsdp, message):
  with pytest.raises(ValueError, match=message):
    mesh_of(data, fsdp)


def test_a_mesh_takes_the_devices_that_are_left():
  assert dict(mesh_of(-1, 2).mesh.shape) == {"data": 4, "fsdp": 2}
  assert dict(mesh_of(2, -1).mesh.shape) == {"data": 2, "fsdp": 4}
  assert dict(mesh_of(2, 1).mesh.shape) == {"data": 2, "fsdp": 1}


def test_a_single_device_is_left_alone():
  devices = mesh_of(1, 1)
  assert devices.mesh is devices.rows is devices.whole is None
  params = {"w": jnp.ones([512, 512])}
  for put in (devices.place, devices.put, devices.place_rows):
    placed = put(params)["w"]
    assert placed.unsafe_buffer_pointer() == params["w"].unsafe_buffer_pointer()
  made = devices.compute(lambda params: params, params)
  assert made["w"] is params["w"]


def test_processes_that_cannot_meet_are_told_how():
  with pytest.raises(ValueError, match=r"can't meet.*--coordinator=host:port"):
    distributed.start(coordinator="localhost:1", num_processes=2, process_id=2)


class TestBatches:
  """The same global batches, whoever makes their rows."""

  IMAGES = np.random.default_rng(0).integers(0, 255, (44, 4, 4, 1), np.uint8)
  LABELS = np.arange(44)

  @pytest.mark.parametrize("count", [2, 4])
  def test_of_pairs(self, count):
    def make(process_index, process_count):
      return image_text.Pairs(
        self.IMAGES,
        self.LABELS[:, None],
        np.array([f"{i:032x}" for i in self.LABELS]),
        batch_size=8 // process_count,
        seed=0,
        num_epochs=2,
        process_index=process_index,
        process_count=process_count,
      )

    sets = [make(0, 1), *(make(i, count) for i in range(count))]
    iterators = [iter(one) for one in sets]
    for whole, *parts in zip(*iterators, strict=True):
      for key, rows in whole.items():
        np.testing.assert_array_equal(
          rows, np.concatenate([part[key] for part in parts])
        )
    assert len({one.fingerprint for one in sets}) == 1
    iterators[0].set_state(iterators[-1].get_state())


class TestFingerprints:
  """Of parameters: exact, on the devices, however they are divided."""

  W = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)

  def test_do_not_depend_on_the_sharding_and_gather_nothing(self):
    params = {"w": self.W, "b": np.arange(3, dtype=np.float32)}
    expected = checkpoint.fingerprint(params)
    for sizes in ((1, 1), (8, 1), (1, 8), (2, 4)):
      placed = mesh_of(*sizes).place(params)
      assert checkpoint.fingerprint(placed) == expected
    program = checkpoint._sums.lower(placed["w"]).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program

  def test_tell_values_places_dtypes_and_names_apart(self):
    w = self.W
    swapped, signs, last = w.copy(), w.copy(), w.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    signs[:2] *= -1
    last[-1, -1] = np.nextafter(last[-1, -1], np.float32(9))
    trees = [
      {"w": w},
      {"w": swapped},
      {"w": signs},
      {"w": last},
      {"w": w.T},
      {"w": w.reshape(256, 512)},
      {"w": w.view(np.int32)},
      {"w": w.astype(jnp.bfloat16)},
      {"v": w},
      {"w": np.zeros_like(w)},
      {"w": np.zeros_like(w, bool)},
    ]
    assert len({checkpoint.fingerprint(tree) for tree in trees}) == len(trees)


class TestCheckpoints:
  """Read into the shardings that are asked for."""

  class Iterator:
    """What has a state."""

    def __init__(self, state=None):
      self.state = state

    def get_state(self):
      return self.state

    def set_state(self, state):
      self.state = state

  def state(self, devices):
    params = {
      "w": jnp.arange(2.0**17).reshape(512, 256),
      "blocks": {0: jnp.ones(3)},
    }
    tx = optax.adam(1e-3)
    return devices.compute(
      functools.partial(steps.init_state, tx=tx), devices.place(params)
    )

  def test_a_save_does_not_ask_jax_whether_to_leave(
    self, tmp_path, monkeypatch
  ):
    """JAX stops all at one count of such questions: the loop's, of its calls.

    orbax would ask at every save, and count steps.
    """
    asked = []
    monkeypatch.setattr(
      multihost_utils,
      "reached_preemption_sync_point",
      lambda count: asked.append(count),
    )
    with checkpoint.Checkpointer(tmp_path, keep=1, fingerprint="a") as saver:
      saver.save(7, self.state(mesh_of(1, 1)), self.Iterator())
    assert checkpoint.steps(tmp_path) == [7]
    assert asked == []

  def test_on_other_devices(self, tmp_path):
    saved = self.state(mesh_of(2, 4))._replace(step=jnp.int32(7))
    saver = checkpoint.Checkpointer(tmp_path, keep=1, fingerprint="a")
    saver.save(7, saved, self.Iterator({"next_index": 7}))
    saver.wait()
    for sizes in ((1, 1), (8, 1), (1, 8)):
      like, iterator = self.state(mesh_of(*sizes)), self.Iterator()
      found = saver.restore(like, iterator)
      assert iterator.state == {"next_index": 7}
      for got, want, where in zip(
        *map(jax.tree.leaves, (found, saved, like)), strict=True
      ):
        np.testing.assert_array_equal(got, want)
        assert got.sharding.is_equivalent_to(where.sharding, got.ndim)
    saver.close()
    whole = checkpoint.load_params(tmp_path, self.state(mesh_of(1, 1)).params)
    parts = checkpoint.load_params(tmp_path, self.state(mesh_of(1, 8)).params)
    assert [shard.data.shape for shard in parts["w"].addressable_shards] == [
      (64, 256)
    ] * 8
    assert not whole["w"].committed
    np.testing.assert_array_equal(parts["w"], whole["w"])

  def test_kept_are_the_newest_and_some_for_ever(self, tmp_path):
    state = self.state(mesh_of(1, 1))
    saver = checkpoint.Checkpointer(
      tmp_path, keep=2, keep_every=3, fingerprint=""
    )
    for step in range(1, 9):
      saver.save(step, state, self.Iterator())
    saver.close()
    assert checkpoint.steps(tmp_path) == [3, 6, 7, 8]

  def test_one_that_was_cut_off_is_never_seen(self, tmp_path):
    state = self.state(mesh_of(1, 1))
    saver = checkpoint.Checkpointer(tmp_path, keep=2, fingerprint="")
    saver.save(1, state, self.Iterator(1))
    saver.close()
    folder = tmp_path / checkpoint.FOLDER
    half = folder / "2.orbax-checkpoint-tmp"
    (folder / "1").rename(half)  # a save ends with the other direction
    assert checkpoint.steps(tmp_path) == []
    saver = checkpoint.Checkpointer(tmp_path, keep=2, fingerprint="")
    assert saver.restore(state, self.Iterator()) is state
    saver.save(2, state, self.Iterator())
    saver.close()
    assert checkpoint.steps(tmp_path) == [2]
    assert not half.exists()

  def test_places_of_other_processes_are_refused(self, tmp_path, monkeypatch):
    """Of tar shards, that is: their places in the data differ."""
    state = self.state(mesh_of(1, 1))
    saver = checkpoint.Checkpointer(tmp_path, keep=2, fingerprint="")
    with monkeypatch.context() as patch:
      patch.setattr(distributed, "gather_texts", lambda text: [text, '"b"'])
      saver.save(1, state, self.Iterator("a"))
    with pytest.raises(ValueError, match=r"by 2 processes.*there are 1"):
      saver.restore(state, self.Iterator())
    saver.close()


def params_of(config, workdir):
  """A run's last parameters."""
  _, like = models.create(
    config.model, input_shape=(8, 8, 1), num_classes=10, seed=0
  )
  return checkpoint.load_params(workdir, like)


def assert_close(got, want, rtol):
  """Trees whose difference is small beside them."""
  ours, theirs = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for tree in (got, want)
  )
  assert np.linalg.norm(ours - theirs) <= rtol * np.linalg.norm(theirs)


# By the bits of the numbers; and whether parameters are divided.
CASES = {
  32: (("pairs", "grad_mimic", "forward", True),),
  64: (
    ("classes", "grad_mimic", "forward", False),
    ("classes", "grad_mimic", "per_sample", True),
    ("pairs", "grad_mimic", "forward", True),
    ("classes", "sgd", "auto", True),
    ("pairs", "sgd", "forward", False),
  ),
}


def run_cases(folder, *, simple, **layout):
  """The arrays of each case, and what each process held of large ones."""
  name = "_".join(map(str, layout.values()))
  everyone = layout["count"] * layout["devices"]
  cases = [
    [*method, everyone if divided else 1]
    for *method, divided in CASES[layout["bits"]]
  ]
  spec = json.dumps(
    {"cases": cases, "folder": str(folder), "name": name, "simple": simple}
  )
  processes.finish(processes.start([CASE, spec], **layout), timeout=500)
  held = [
    json.loads((folder / f"{name}_{number}.json").read_text())
    for number in range(layout["count"])
  ]
  found: dict[str, dict[str, np.ndarray]] = {}
  with np.load(folder / f"{name}.npz") as stored:
    for key in stored.files:
      case, place = key.split("|")
      found.setdefault(case, {})[place] = stored[key]
  return found, held


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
  """Every case on one device of one process; in float64 if that is asked for.

  Also leaves the references that all go toward.
  """

  @functools.cache
  def run(bits, simple):
    folder = tmp_path_factory.mktemp(f"updates{bits}")
    layout = {"count": 1, "devices": 1, "bits": bits}
    return folder, run_cases(folder, simple=simple, **layout)[0]

  return run


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "bits"), [(2, 4, 64), (1, 8, 32)])
def test_an_update_is_the_single_devices(
  request, on_one_device, count, devices, bits
):
  """Whole or divided parameters, engines, tasks; weights are of the batch."""
  if bits == 32:  # without optimizations it rounds a little more than 1e-6
    request.getfixturevalue("optimized")
  # JAX's attention is float32 at most. And how a program is divided doesn't
  # depend on whose the devices are: several processes don't compile attention.
  simple = bits == 64
  folder, alone = on_one_device(bits, simple)
  found, held = run_cases(
    folder, simple=simple, count=count, devices=devices, bits=bits
  )
  of_update, of_scores = {32: (1e-6, 1e-5), 64: (1e-12, 1e-12)}[bits]
  assert len(found) == len(CASES[bits])
  for case, arrays in found.items():
    *method, fsdp = case.split()
    expected = alone[" ".join([*method, "1"])]
    assert arrays.keys() == expected.keys()
    updates = [
      {key: x for key, x in tree.items() if key.startswith("/update/")}
      for tree in (arrays, expected)
    ]
    assert_close(*updates, of_update)
    for key in arrays.keys() - updates[0].keys():
      scale = np.abs(expected[key]).max()
      np.testing.assert_allclose(
        arrays[key], expected[key], rtol=0, atol=of_scores * max(scale, 1e-30)
      )
    # Each process holds its part of what is divided, learner and reference
    # alike: a copy for each group of fsdp devices, of all processes together.
    copies = count * devices // int(fsdp)
    for tree in ("learner", "reference"):
      for here, everywhere in (process[case][tree] for process in held):
        assert here * count == everywhere * copies
        assert everywhere or (tree == "reference" and "sgd" in case)


def settings(digits_dir, **more):
  """Of three epochs, at which a second job goes on by itself."""
  return {
    "data.data_dir": digits_dir,
    "num_epochs": 3,
    "batch_size": 256,
    "model.widths": (256, 256),
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 1e-2,
    "checkpoint.keep": 9,
    **more,
  }


def run_job(job, config_file, workdir, *, count=1, devices=1, **fields):
  """What the first process has printed."""
  command = ["-m", f"experiments.{job}"]
  command += processes.flags_of(config_file, workdir, **fields)
  return processes.finish(
    processes.start(command, count=count, devices=devices)
  )[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits_dir):
  """A run on clean labels."""
  folder = tmp_path_factory.mktemp("reference") / "run"
  fields = settings(digits_dir, **{"noise.rate": 0.0})
  run_job("train", "configs/digits.py", folder, **fields)
  return folder


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_devices(
  digits_dir, reference, tmp_path
):
  """One process begins, four go on, and after those it is one again."""
  fields = settings(
    digits_dir,
    **{"method": "grad_mimic", "mimic.reference": str(reference)},
  )

  def start(workdir, count, devices, fsdp):
    layout = {"count": count, "devices": devices, "mesh.fsdp": fsdp}
    run_job("train", "configs/digits.py", workdir, **layout, **fields)

  start(tmp_path / "run", 1, 1, 1)
  whole = gm.ScoreLedger(tmp_path / "run" / "ledger").table()
  config = digits_config(fields)
  expected = params_of(config, tmp_path / "run")
  saved = checkpoint.steps(tmp_path / "run")
  # As if it had been cut off after the first epoch, and after the second.
  for left, after in ((1, (4, 2, 8)), (2, (1, 1, 1))):
    for step in saved[left:]:
      shutil.rmtree(tmp_path / "run" / checkpoint.FOLDER / str(step))
    (tmp_path / "run" / "result.json").unlink()
    start(tmp_path / "run", *after)
    assert checkpoint.steps(tmp_path / "run") == saved
    assert_close(params_of(config, tmp_path / "run"), expected, 1e-5)
    # Rows of later epochs were written again; they count once.
    again = gm.ScoreLedger(tmp_path / "run" / "ledger").table()
    for column in ("id", "step", "epoch"):
      assert again[column].equals(whole[column])
    for column in ("score", "weight", "loss"):
      wanted = whole[column].to_numpy()
      np.testing.assert_allclose(
        again[column].to_numpy(), wanted, rtol=0, atol=1e-4 * wanted.std()
      )


def digits_config(fields):
  """The config of a command line's fields."""
  config = digits.get_config("").unlock()
  config.update_from_flattened_dict(fields)
  return config.lock()


@pytest.mark.slow
def test_a_data_set_is_scored_together(digits_dir, reference, tmp_path):
  fields = settings(digits_dir)
  with tiny.nudged():
    learner = digits_config({**fields, "mesh.data": 1})
    trainer.train_and_evaluate(learner, tmp_path / "learner")
  job = (
    "score",
    f"configs/score.py:learner={tmp_path / 'learner'}",
  )
  fields = {
    "mimic.reference": reference,
    "batch_size": 64,
    "flush_every": 5,
  }
  for count, layout in (
    (1, {}),
    (2, {"devices": 2, "mesh.fsdp": 4}),
  ):
    run_job(*job, tmp_path / str(count), count=count, **fields, **layout)
  results = {
    (tmp_path / str(count) / "result.json").read_text() for count in (1, 2)
  }
  assert len(results) == 1
  one, two = (
    gm.ScoreLedger(tmp_path / str(count) / "ledger").matrix()
    for count in (1, 2)
  )
  np.testing.assert_array_equal(two[0], one[0])
  np.testing.assert_allclose(two[1], one[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_study_is_made_together(digits_dir, reference, tmp_path):
  """The first process claims, filters and reports; all train every run."""
  folder = tmp_path / "study"
  fields = settings(digits_dir)
  chosen = {"study.methods": "('grad_mimic',)"}
  text = run_job(
    "study", "configs/digits.py:seeds=1", folder, count=2, **fields, **chosen
  )
  assert "seed 0: retrained_grad_mimic" in text
  assert (folder / "report_grad_mimic.html").exists()
  summary = json.loads((folder / "summary.json").read_text())
  rows = {row["method"]: row for row in summary["rows"]}
  assert list(rows) == ["reference", "grad_mimic", "retrained_grad_mimic"]
  # What one process makes of the same samples.
  config = digits_config(fields)
  ours, alone = (
    params_of(config, run) for run in (folder / "seed0/reference", reference)
  )
  assert_close(ours, alone, 1e-5)
  (chosen,) = folder.rglob("manifest.json")
  kept = json.loads(chosen.read_text())["kept"]
  assert 0 < kept == rows["retrained_grad_mimic"]["train_samples"] < 1437


@pytest.mark.slow
def test_jobs_of_one_process_refuse_several(digits_dir, tmp_path):
  command = [
    *("-m", "experiments.tune"),
    *processes.flags_of("configs/digits.py", tmp_path / "run"),
  ]
  started = processes.start(command, count=2)
  for process in started:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "error: this job is one for a single process" in errors
