"""Runs that are killed, asked to leave, stopped, out of room, or broken."""

import contextlib
import functools
import json
import random
import re
import shutil
import signal
import subprocess
import time
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
import tiny
from etils import epath

import gradmimic_jax as gm
from experiments.runtime import (
  checkpoint,
  checksums,
  claims as claims_lib,
  metrics as writers,
  preemption,
  watchdog,
)
from experiments.training import step_log, trainer as train

SAMPLES = 1437
EPOCHS = 64  # a job notices a SIGTERM within a second
HEARTBEAT_TIMEOUT = 10  # seconds; the usual 40 would all be waited for
STALL_SECONDS = 15
BOUND = 60  # seconds until the others of a lost process have left
GRACE = 30  # seconds that clusters leave between SIGTERM and SIGKILL
# What a process says that has lost another one: the job, or JAX itself.
LOST = r"error in process \d|another task died"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """`start(workdir, **fields)`: a run's processes, which don't outlive this."""
  folder = tmp_path_factory.mktemp("reference")
  reference, everyone = folder / "run", []
  fixed = {
    "data.data_dir": folder / "data",
    "num_epochs": EPOCHS,
    "batch_size": 256,
    "model.widths": (16, 16),
    "optimizer.learning_rate": 1e-2,
    "checkpoint.every_epochs": 1,
    "method": "grad_mimic",
    "mimic.reference": reference,
  }

  def start(workdir, *, count=2, heartbeat=HEARTBEAT_TIMEOUT, **fields):
    command = [
      *("-m", "experiments.train"),
      *processes.flags_of("configs/digits.py", workdir, **{**fixed, **fields}),
      f"--heartbeat_timeout={heartbeat}",
    ]
    started = processes.start(command, count=count, devices=count)
    everyone.extend(started)
    return started

  clean = {"method": "sgd", "noise.rate": 0.0, "num_epochs": 3}
  processes.finish(start(reference, count=1, **clean))
  yield start
  for process in everyone:
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
  """`undisturbed(count)`: the run that processes make whom nothing befalls."""
  folder = tmp_path_factory.mktemp("undisturbed")

  @functools.cache
  def run(count):
    processes.finish(start(folder / str(count), count=count))
    return folder / str(count)

  return run


def state_of(run):
  """The newest checkpoint's arrays, whoever has written them."""
  folder = run.absolute() / checkpoint.FOLDER / str(newest(run)) / "state"
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(epath.Path(folder)).tree
  how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  return handler.restore(
    epath.Path(folder),
    args=ocp.args.PyTreeRestore(item=tree, restore_args=how),
  )


def assert_same_run(one, other):
  """State bit for bit; checkpoints, ledger and metrics row for row."""
  assert checkpoint.steps(one) == checkpoint.steps(other)
  a, b = state_of(one), state_of(other)
  assert len(jax.tree.leaves(a["params"])) == 6
  jax.tree.map(np.testing.assert_array_equal, a, b)
  a, b = (gm.ScoreLedger(run / train.LEDGER_FOLDER) for run in (one, other))
  assert len(a) == SAMPLES * len(a.epochs)
  assert a.table().equals(b.table())
  for read in (metrics_of, result_of):
    assert read(one) == read(other)


def metrics_of(run):
  return writers.read_metrics(run / writers.METRICS_FILE)


def result_of(run):
  result = json.loads((run / train.RESULT_FILE).read_text())
  return {name: result[name] for name in result.keys() - {"seconds"}}


def newest(run):
  """The step of the newest whole checkpoint; -1 if there is none."""
  return max(checkpoint.steps(run), default=-1)


def half_saved(run):
  """Checkpoints that are not whole, or not yet."""
  return list((run / checkpoint.FOLDER).glob("*.orbax-checkpoint-tmp"))


def claims(run):
  """Differs from start to start of a run."""
  file = run / "config.json"
  return file.stat().st_mtime_ns if file.exists() else None


def until(happened, started, *, timeout=300):
  """What happens, which these processes bring about; fails if they end."""
  end = time.monotonic() + timeout
  while not (found := happened()):
    for process in started:
      if process.poll() is not None:
        pytest.fail(f"status {process.returncode}: {process.communicate()[1]}")
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.005)
  return found


class Begun:
  """A run that has just been started, up to some moment."""

  def __init__(self, start, run, **options):
    self.run = run
    self._claim, self._newest = claims(run), newest(run)
    self._since = time.monotonic()
    self.processes = start(run, **options)
    self.seconds_to_save = float("nan")

  def until(self, happened):
    return until(happened, self.processes)

  def saves(self):
    """Waits for a new checkpoint."""
    saved = self.until(
      lambda: (step := newest(self.run)) > self._newest and step
    )
    if np.isnan(self.seconds_to_save):
      self.seconds_to_save = time.monotonic() - self._since
    self._newest = saved

  def starting(self, rng):
    """Data are there and processes have met; compiles, restores, begins."""
    self.until(lambda: claims(self.run) != self._claim)
    time.sleep(rng.uniform(0, 2))

  def saving(self, rng):
    """A checkpoint is being written."""
    self.saves()  # by now nothing is left of earlier runs' halves
    self.until(lambda: not half_saved(self.run))
    self.until(lambda: half_saved(self.run))
    time.sleep(rng.uniform(0, 0.02))

  def stepping(self, rng):
    """Somewhere between two checkpoints."""
    self.saves()
    since = time.monotonic()
    self.saves()
    time.sleep(rng.uniform(0, time.monotonic() - since))


def send(how, victim, other):
  """Sends a signal; the seconds until the other process ends, and its words."""
  for process in (victim, other):
    assert process.poll() is None
  since = time.monotonic()
  victim.send_signal(how)
  _, words = other.communicate(timeout=BOUND)
  return time.monotonic() - since, words


def show(request, name, seconds):
  """Leaves what was measured in the test's record."""
  text = f"{name}: median {np.median(seconds):.1f} s, most {max(seconds):.1f} s"
  request.node.user_properties.append((name, seconds))
  print(text, [round(x, 1) for x in seconds])


@pytest.mark.slow
def test_three_kills_lose_nothing(start, undisturbed, tmp_path, request):
  """Of either process, at any moment; the other one leaves by itself."""
  moments = ["starting", "saving", "stepping"]
  rng = random.Random(7)
  rng.shuffle(moments)
  whole, run = undisturbed(2), tmp_path / "run"
  to_leave, to_save = [], []
  for moment in moments:
    begun = Begun(start, run)
    getattr(begun, moment)(rng)
    number = rng.randrange(2)
    victim, other = begun.processes[number], begun.processes[1 - number]
    seconds, words = send(signal.SIGKILL, victim, other)
    print(f"{moment}: process {number} after {newest(run)}, {seconds:.1f} s")
    assert victim.wait() == -signal.SIGKILL
    assert other.returncode != 0
    assert re.search(LOST, words)
    assert not (run / train.RESULT_FILE).exists()
    to_leave.append(seconds)
    to_save.append(begun.seconds_to_save)
  processes.finish(start(run))
  assert_same_run(run, whole)
  show(request, "from a kill to the other's end", to_leave)
  to_save = [seconds for seconds in to_save if not np.isnan(seconds)]
  show(request, "from a start to a new checkpoint", to_save)


@pytest.mark.slow
def test_a_run_that_is_asked_to_leave_saves_first(
  start, undisturbed, tmp_path, request
):
  """With status 0, within the grace period, whoever is asked.

  A single process is asked by `test_a_run_that_is_asked_to_leave_loses_no_step`
  and `test_a_job_that_is_asked_to_leave_before_its_loop_ends_well`.
  """
  rng = random.Random(2)
  run, needed = tmp_path / "run", []
  for numbers in ((1,), (0, 1)):
    begun = Begun(start, run)
    begun.stepping(rng)
    since, before = time.monotonic(), newest(run)
    for number in numbers:
      begun.processes[number].send_signal(signal.SIGTERM)
    words = [process.communicate(timeout=GRACE) for process in begun.processes]
    needed.append(time.monotonic() - since)
    assert needed[-1] < GRACE
    assert [process.returncode for process in begun.processes] == [0, 0]
    (step,) = re.findall(r"SIGTERM: saved \S+ at step (\d+)", words[0][1])
    # JAX looks for a signal once a second; epochs have six steps.
    assert before < newest(run) == int(step) <= before + 12 * 6
    assert not half_saved(run)
    assert not (run / train.RESULT_FILE).exists()
  processes.finish(start(run))
  assert_same_run(run, undisturbed(2))
  show(request, "from SIGTERM to the end", needed)


@pytest.mark.slow
def test_a_second_job_on_a_workdir_is_refused(start, tmp_path):
  """At once, with one line; several processes of a job are one run."""
  run, fields = tmp_path / "run", {"num_epochs": 1000}
  begun = Begun(start, run, **fields)
  begun.saves()
  for process in start(run, **fields):
    _, words = process.communicate(timeout=BOUND)
    assert process.returncode == 1
    (line,) = (line for line in words.splitlines() if "is in use" in line)
    assert f"process {begun.processes[0].pid} on" in line
    assert "Traceback" not in words
  assert all(process.poll() is None for process in begun.processes)
  begun.saves()  # the first goes on
  for process in begun.processes:
    process.kill()


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(start, tmp_path, request):
  """Where it gives no sign of life, and where it only makes no steps.

  The run goes on from a checkpoint then, as after kills.
  """
  rng = random.Random(0)
  run, needed = tmp_path / "run", []
  stall = {"faults.stall_seconds": STALL_SECONDS, "heartbeat": 100}
  still = r"error: the run in \S+ has not moved for \d+ seconds"
  for number, options, status, message in (
    (0, {}, -signal.SIGABRT, LOST),
    (1, stall, watchdog.EXIT_STATUS, still),
  ):
    begun = Begun(start, run, **options)
    begun.stepping(rng)
    hung, other = begun.processes[number], begun.processes[1 - number]
    seconds, words = send(signal.SIGSTOP, hung, other)
    needed.append(seconds)
    assert other.returncode == status
    assert re.search(message, words)
    # Nor does the one that hung go on alone, should it wake up.
    hung.send_signal(signal.SIGCONT)
    hung.communicate(timeout=BOUND)
    assert hung.returncode != 0
  assert newest(run) > 0
  show(request, "from a hang to the other's end", needed)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "moments"), [("train", (8,)), ("study", (2, 16))]
)
def test_a_job_that_is_asked_to_leave_before_its_loop_ends_well(
  tmp_path, digits_dir, job, moments
):
  """While it imports, reads data, compiles, and between two runs."""
  command = [
    *("-m", f"experiments.{job}"),
    *processes.flags_of(
      "configs/digits.py:seeds=1",
      tmp_path / "run",
      **{"data.data_dir": digits_dir, "num_epochs": 400},
    ),
  ]
  for seconds in moments:
    (process,) = processes.start(command, count=1)
    time.sleep(seconds)
    for _ in range(2):
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)
      time.sleep(0.01)
    _, words = process.communicate(timeout=GRACE)
    assert process.returncode == 0, words
    assert "Traceback" not in words
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.fixture
def mount(tmp_path):
  """`mount(options)`: a small disk, as a folder; skips where it can't be."""
  disks = []

  def mount(options):
    disk = tmp_path / f"disk{len(disks)}"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if shutil.which("mount") is None:
      pytest.skip("there is no mount")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      pytest.skip(f"a small disk can't be mounted: {done.stderr.strip()}")
    disks.append(disk)
    return disk

  yield mount
  for disk in disks:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk, *, leave):
  """Writes a file to the disk until only so many bytes are free."""
  filler = disk / "filler"
  with open(filler, "wb", buffering=0) as file:
    try:
      while True:
        file.write(bytes(4096))
    except OSError:
      file.truncate(file.tell() - leave)
  return filler


def test_a_disk_that_is_too_small_is_found_before_training(make_config, mount):
  disk = mount("size=2m")
  config = make_config(**{"model.widths": (256, 256)})
  with pytest.raises(
    OSError,
    match=r"3 checkpoints in .* may take 3\.\d MB, and the disk has 2\.\d MB",
  ):
    train.train_and_evaluate(config, disk / "run")
  assert not metrics_of(disk / "run")
  assert not checkpoint.steps(disk / "run")


def test_a_workdir_that_is_read_only_is_found_before_training(
  make_config, mount
):
  disk = mount("ro,size=8m")
  with pytest.raises(
    PermissionError, match=r"run can't be written to: .*disk0"
  ):
    train.train_and_evaluate(make_config(), disk / "run")


@pytest.mark.slow
@pytest.mark.parametrize("leave", [0, 32 * 1024])
def test_a_disk_that_fills_up(start, undisturbed, mount, leave):
  """Has it no room for metrics and scores, or none for a checkpoint."""
  disk = mount("size=16m")
  run = disk / "run"
  begun = Begun(start, run, count=1)
  begun.stepping(random.Random(0))
  filler = fill(disk, leave=leave)
  words = [process.communicate(timeout=BOUND) for process in begun.processes]
  assert all(process.returncode for process in begun.processes)
  lines = "".join(errors for _, errors in words).splitlines()
  said = r"error( in process \d)?: the disk of \S+ is full \(0\.\d MB left\)"
  assert any(re.match(said, line) for line in lines), lines
  saved = newest(run)
  assert saved > 0
  assert int(state_of(run)["step"]) == saved
  filler.unlink()
  processes.finish(start(run, count=1))
  assert_same_run(run, undisturbed(1))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp("shared")


@pytest.fixture
def config(make_config):
  """Of three epochs, with scores, that stops after three skipped steps."""
  return make_config(
    method="random", steps_per_call=3, **{"faults.nonfinite_stop": 3}
  )


@pytest.fixture
def whole(config, shared):
  """That config's run, to whom nothing happened."""
  train.train_and_evaluate(config, shared / "whole")
  return shared / "whole"


def test_a_half_checkpoint_gives_way_to_the_one_before(
  config, whole, tmp_path, monkeypatch
):
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  (run / train.RESULT_FILE).unlink()
  saved = run / checkpoint.FOLDER / "18"
  half = saved.with_name("18.orbax-checkpoint-tmp")
  saved.rename(half)  # which is how a save ends, in the other direction
  shutil.rmtree(half / "data")
  begun_at = []
  restore = checkpoint.Checkpointer.restore

  def restoring(*args):
    state = restore(*args)
    begun_at.append(int(state.step))
    return state

  monkeypatch.setattr(checkpoint.Checkpointer, "restore", restoring)
  train.train_and_evaluate(config, run)
  assert begun_at == [12]
  assert_same_run(run, whole)
  assert not half_saved(run)


@pytest.fixture
def meanwhile():
  """`meanwhile(step, happens)`: calls that when the step has been started."""
  with contextlib.ExitStack() as stack:

    def meanwhile(at, happens):
      def after(step, count):
        if step <= at < step + count:
          happens()

      stack.enter_context(tiny.around_calls(after=after))

    yield meanwhile


@pytest.fixture
def damaged(whole, tmp_path):
  """A copy of that run, to be damaged; its result is gone."""
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  (run / train.RESULT_FILE).unlink()
  return run


def flip(path, at=0.5):
  """Changes one bit of a file."""
  content = bytearray(path.read_bytes())
  content[int(at * len(content))] ^= 4
  path.write_bytes(content)


def largest(folder):
  files = (path for path in folder.rglob("*") if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
  config, whole, damaged, caplog
):
  file = largest(damaged / checkpoint.FOLDER / "18")
  flip(file)
  with caplog.at_level("WARNING", logger="absl"):
    train.train_and_evaluate(config, damaged)
  assert f"{file} is damaged" in caplog.text
  assert "goes on from checkpoint 12, not 18" in caplog.text
  assert_same_run(damaged, whole)


def test_a_damaged_checkpoint_with_none_before_it_is_named(config, damaged):
  shutil.rmtree(damaged / checkpoint.FOLDER / "12")
  file = damaged / checkpoint.FOLDER / "18" / "data" / "metadata"
  flip(file)
  with pytest.raises(
    ValueError, match=r"18/data/metadata is damaged.*no checkpoint before it"
  ):
    train.train_and_evaluate(config, damaged)
  flip(file)
  assert train.train_and_evaluate(config, damaged)["steps"] == 18


def test_a_checkpoint_of_an_earlier_release_is_taken(config, damaged, caplog):
  for file in damaged.rglob("checksums_*.txt"):
    file.unlink()
  copy = damaged.with_name("copy")
  shutil.copytree(damaged, copy)
  with caplog.at_level("WARNING", logger="absl"):
    assert train.train_and_evaluate(config, damaged)["steps"] == 18
  assert "18 has no checksums; it is taken as it is" in caplog.text
  (copy / checkpoint.FOLDER / "18" / "data" / "metadata").write_text("{")
  with caplog.at_level("WARNING", logger="absl"):
    assert train.train_and_evaluate(config, copy)["steps"] == 18
  assert "18 can't be read" in caplog.text


def test_a_fault_of_another_kind_removes_nothing(config, damaged, monkeypatch):
  def fail(*_):
    raise ValueError("no room on the device")

  monkeypatch.setattr(checkpoint.Checkpointer, "_read", fail)
  with pytest.raises(ValueError, match="no room"):
    train.train_and_evaluate(config, damaged)
  assert checkpoint.steps(damaged) == [12, 18]


def test_every_byte_of_a_checkpoint_counts(damaged):
  folder = damaged / checkpoint.FOLDER / "18"
  for part in range(3):
    assert checksums.check(folder, part, 3)
  left_out = {"_CHECKPOINT_METADATA", "commit_success.txt"}
  files = [
    path
    for path in folder.rglob("*")
    if path.is_file() and path.name not in left_out
  ]
  assert len(files) > 10
  for path in files:
    content = path.read_bytes()
    for changed in (
      b"",
      content[:-1],
      content + b"\0",
      bytes(len(content)),
      *(
        content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        for at in np.linspace(0, len(content) - 1, 9).astype(int)
      ),
    ):
      path.write_bytes(changed)
      with pytest.raises(ValueError, match=path.name):
        checksums.check(folder)
    path.write_bytes(content)
    if not path.match("checksums_*"):
      path.unlink()
      with pytest.raises(ValueError, match=f"{path.name} is missing"):
        checksums.check(folder)
      path.write_bytes(content)
  (folder / "state" / "more").touch()
  with pytest.raises(ValueError, match="more has no checksum"):
    checksums.check(folder)
  (folder / "state" / "more").unlink()
  twelve = folder.rename(folder.with_name("24"))
  with pytest.raises(ValueError, match=r"is of another one .checkpoint 18"):
    checksums.check(twelve)


def test_an_odd_line_of_checksums_is_damage_whatever_its_own_sum(tmp_path):
  folder = tmp_path / "18"
  folder.mkdir()
  body = b"checkpoint 18\nno checksum of anything\n"
  end = f"{zlib.crc32(body):08x}\n".encode()
  (folder / "checksums_0.txt").write_bytes(body + end)
  with pytest.raises(ValueError, match=r"checksums_0\.txt is damaged"):
    checksums.check(folder)


def test_a_reference_that_is_damaged_is_named(make_config, whole, tmp_path):
  teacher = tmp_path / "teacher"
  shutil.copytree(whole, teacher)
  config = make_config(
    **{"method": "grad_mimic", "mimic.reference": str(teacher)}
  )
  flip(largest(teacher / checkpoint.FOLDER / "18"))
  with pytest.raises(ValueError, match=r"teacher/checkpoints/18/.* is damaged"):
    train.train_and_evaluate(config, tmp_path / "run")
  shutil.rmtree(teacher / checkpoint.FOLDER)
  shutil.copytree(whole / checkpoint.FOLDER, teacher / checkpoint.FOLDER)
  result = json.loads((teacher / train.RESULT_FILE).read_text())
  del result["checksum"]  # as another run's
  (teacher / train.RESULT_FILE).write_text(
    json.dumps({**result, "fingerprint": "0" * 16})
  )
  with pytest.raises(ValueError, match=r"checkpoints/18 is of another run"):
    train.train_and_evaluate(config, tmp_path / "run")


def test_rows_that_were_lost_are_recorded_again(config, whole, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  lost = sorted((run / train.LEDGER_FOLDER).glob("rows-*"))[-1]
  lost.unlink()
  with pytest.raises(
    ValueError, match=rf"{lost.name} is missing.*To record them.*result\.json"
  ):
    train.train_and_evaluate(config, run)
  (run / train.RESULT_FILE).unlink()
  train.train_and_evaluate(config, run)
  assert_same_run(run, whole)


def test_rows_that_no_checkpoint_is_before(config, damaged):
  (damaged / "ledger" / "_manifest.parquet").unlink()
  for file in (damaged / train.LEDGER_FOLDER).iterdir():
    file.unlink()
  with pytest.raises(
    ValueError, match=r"ledger: rows of steps from 0 on were lost\. The oldest"
  ):
    train.train_and_evaluate(config, damaged)
  assert checkpoint.steps(damaged) == [12, 18]


def test_metrics_that_were_lost_are_written_again(config, whole, damaged):
  file = damaged / writers.METRICS_FILE
  lines = file.read_text().splitlines(keepends=True)
  last = next(i for i, line in enumerate(lines) if '"step": 14' in line)
  file.write_text("".join(lines[:last]))
  assert 12 <= writers.recorded_steps(file) < 15
  train.train_and_evaluate(config, damaged)
  assert_same_run(damaged, whole)


def test_metrics_of_another_run_are_refused(tmp_path):
  writers.MetricsWriter(tmp_path, first_step=0, fingerprint="ours").close()
  writers.MetricsWriter(tmp_path, first_step=0, fingerprint="ours").close()
  with pytest.raises(
    ValueError, match=r"metrics\.jsonl is of another run.*'ours', .*'theirs'"
  ):
    writers.MetricsWriter(tmp_path, first_step=0, fingerprint="theirs")


@pytest.mark.parametrize(
  ("old", "new"), [(b"0.", b"1."), (b"{", b"[" * 10**5), (b'"step"', b'"stop"')]
)
def test_metrics_that_are_damaged_are_named(tmp_path, old, new):
  writer = writers.MetricsWriter(tmp_path, first_step=0)
  for step in range(3):
    writer.write(step, {"train_loss": 0.5})
  writer.close()
  file = tmp_path / writers.METRICS_FILE
  assert writers.recorded_steps(file) == 3
  file.write_bytes(file.read_bytes().replace(old, new, 1))
  with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged.*line 1"):
    writers.read_metrics(file)


@pytest.fixture
def job(monkeypatch):
  """This process is a job, as `cli.run` makes it one."""
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(preemption, "_job", False)
  preemption.listen()
  yield
  preemption._asked.clear()
  signal.signal(signal.SIGTERM, before)


def test_a_job_that_has_nothing_to_save_leaves_at_once(job, capfd):
  with pytest.raises(preemption.PreemptedError) as left:
    ask_to_leave()
  assert left.value.code == 0
  ask_to_leave()  # is asked again, on its way
  assert capfd.readouterr().err.count("SIGTERM: there was nothing to sa") == 1
  # What swallows the error can't keep a job from leaving.
  with pytest.raises(preemption.PreemptedError, match="from what is finished"):
    claims_lib.share([1], lambda item: item)


def ask_to_leave():
  signal.raise_signal(signal.SIGTERM)


def test_ctrl_c_asks_to_save_and_twice_interrupts(monkeypatch, capfd):
  monkeypatch.setattr(preemption, "_signal", signal.SIGTERM)
  before = signal.getsignal(signal.SIGINT)
  with contextlib.closing(preemption.Preemption()) as asked:
    assert not asked.reached()
    signal.raise_signal(signal.SIGINT)
    assert asked.reached()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    with pytest.raises(preemption.PreemptedError) as left:
      asked.leave(3, "runs/one")
  assert left.value.code == 130
  told = "Ctrl-C: saved runs/one at step 3; the same command goes on there\n"
  assert capfd.readouterr().err == told
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [17, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_leave_loses_no_step(
  config, whole, tmp_path, meanwhile, at
):
  """The last one either."""
  run, asks = tmp_path / "run", iter([ask_to_leave])
  meanwhile(at, lambda: next(asks, int)())  # the first run only
  with pytest.raises(
    preemption.PreemptedError, match=f"saved .*run at step {at + 1}; the same"
  ) as left:
    train.train_and_evaluate(config, run)
  assert left.value.code == 0
  assert newest(run) == at + 1
  assert not (run / train.RESULT_FILE).exists()
  train.train_and_evaluate(config, run)
  jax.tree.map(np.testing.assert_array_equal, state_of(run), state_of(whole))
  assert metrics_of(run) == metrics_of(whole)


@pytest.mark.slow
def test_a_job_that_is_asked_as_a_run_ends_leaves_in_the_next(
  make_config, tmp_path, monkeypatch
):
  config = make_config(num_epochs=1)
  run, following = tmp_path / "run", tmp_path / "following"
  save = checkpoint.Checkpointer.save

  def saving(*args):
    save(*args)
    ask_to_leave()

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, "save", saving)
    assert train.train_and_evaluate(config, run)["steps"] == 6
  with pytest.raises(preemption.PreemptedError, match="following at step 0"):
    train.train_and_evaluate(config, following)
  assert checkpoint.steps(following) == [0]


@pytest.fixture
def poison(monkeypatch):
  """`poison(*steps)`: their images are no numbers; of no others any more."""
  take = train.Run.take

  def poison(*broken):
    def taking(self, step, read):
      taken = take(self, step, read)
      hit = [at for at in range(len(taken.ids)) if step + at in broken]
      if not hit:
        return taken
      batch = dict(taken.batch)
      shape = batch["mask"].shape
      seen = self.task.expand(
        {"row": batch.pop("row").reshape(-1)}, self.task.resident
      )
      image = np.array(seen["image"])
      batch["image"] = image.reshape(*shape, *image.shape[1:])
      batch["image"][hit] = np.nan
      return taken._replace(batch=batch)

    monkeypatch.setattr(train.Run, "take", taking)

  return poison


@pytest.mark.parametrize(
  ("stop", "broken"),
  [
    (3, (2, 3, 6, 7)),
    pytest.param(0, tuple(range(1, 18)), marks=pytest.mark.slow),
  ],
)
def test_steps_that_are_not_finite_are_skipped_and_counted(
  make_config, tmp_path, poison, stop, broken
):
  poison(*broken)
  config = make_config(
    method="random", steps_per_call=3, **{"faults.nonfinite_stop": stop}
  )
  result = train.train_and_evaluate(config, tmp_path)
  rows = metrics_of(tmp_path)
  skipped = [row["step"] for row in rows if row.get("train_skipped")]
  assert skipped == list(broken)
  padding = sum(step % 6 == 5 for step in broken) * (6 * 256 - SAMPLES)
  assert result["nonfinite_samples"] == 256 * len(broken) - padding
  assert result["steps"] == 18
  for leaf in jax.tree.leaves(state_of(tmp_path)):
    assert np.isfinite(leaf).all()
  assert not (tmp_path / step_log.NONFINITE_FILE).exists()


def test_a_run_that_only_skips_stops_and_names_the_samples(
  config, whole, tmp_path, poison
):
  """With the last checkpoint from before; mended, it is as if nothing was."""
  run = tmp_path / "run"
  poison(7, 9, 10, 11)
  with pytest.raises(
    step_log.NonFiniteError,
    match=r"steps 9 to 11 had no finite gradient.* are in .*nonfinite\.json",
  ):
    train.train_and_evaluate(config, run)
  assert checkpoint.steps(run) == [6]
  found = json.loads((run / step_log.NONFINITE_FILE).read_text())
  assert [row["step"] for row in found] == [9, 10, 11]
  table = gm.ScoreLedger(whole / train.LEDGER_FOLDER).table().to_pandas()
  for row in found:
    assert sorted(row["ids"]) == table.id[table.step == row["step"]].tolist()
  poison()
  train.train_and_evaluate(config, run)
  assert_same_run(run, whole)
