"""A workdir belongs to one run at a time."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from experiments.runtime import claims, locks
from experiments.studies import plan, records, runner
from experiments.training import trainer as train

# Another program's hand on the lock's file, which knows nothing of ours.
HOLDER = """
import fcntl, os, sys
path, byte, owner = sys.argv[1], int(sys.argv[2]), sys.argv[3]
file = os.open(path, os.O_RDWR | os.O_CREAT)
try:
  fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
except OSError:
  sys.exit(3)
os.pwrite(file, owner.encode(), 0)
print("held", flush=True)
sys.stdin.read()
"""
OWNER = json.dumps({"host": "node7", "pid": 4711, "since": "2026-11-27 14:00"})


@pytest.fixture
def holder():
  """`holder(path, byte)`: a process that holds a byte; or None, if it can't."""
  started = []

  def start(path, byte=0, owner=OWNER):
    process = subprocess.Popen(
      [sys.executable, "-S", "-c", HOLDER, str(path), str(byte), owner],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process if process.stdout.readline() == "held\n" else None

  yield start
  for process in started:
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_by_whom(tmp_path, holder):
  process = holder(tmp_path / locks.FILE)
  with (
    pytest.raises(
      locks.InUseError,
      match=(
        f"{re.escape(str(tmp_path))} is in use: process 4711 on 'node7' works"
        " in it since 2026-11-27 14:00"
      ),
    ) as caught,
    locks.hold(tmp_path),
  ):
    pass
  assert "\n" not in str(caught.value)
  process.kill()  # which leaves nothing behind
  process.wait()
  with locks.hold(tmp_path):
    pass


@pytest.mark.parametrize("owner", ["", "[1]", "{", '{"pid": "x"}'])
def test_whoever_it_is(tmp_path, holder, owner):
  holder(tmp_path / locks.FILE, owner=owner)
  with (
    pytest.raises(locks.InUseError, match="another process works in it"),
    locks.hold(tmp_path),
  ):
    pass


def test_a_process_that_is_left_of_a_job_keeps_the_next_job_out(
  tmp_path, holder
):
  process = holder(tmp_path / locks.FILE, byte=3)
  with pytest.raises(locks.InUseError), locks.hold(tmp_path):
    pass
  process.kill()
  process.wait()
  with locks.hold(tmp_path):
    # The first process has its own byte only: the others have theirs.
    assert holder(tmp_path / locks.FILE, byte=0) is None
    assert holder(tmp_path / locks.FILE, byte=3) is not None
  assert holder(tmp_path / locks.FILE, byte=0) is not None


def test_a_run_says_who_it_is(tmp_path):
  with locks.hold(tmp_path):
    about = json.loads((tmp_path / locks.FILE).read_text())
    assert about["pid"] == os.getpid()
    # Looking for it gives nothing away.
    with pytest.raises(locks.InUseError, match="this process works in it alr"):
      locks.hold(tmp_path).__enter__()
    with locks.hold(tmp_path / "seed0"):  # a run of a study
      pass
  assert (tmp_path / locks.FILE).read_text() == ""


def test_an_error_frees_the_folder_and_leaves_no_new_one(tmp_path):
  def fail(folder):
    with locks.hold(folder):
      raise RuntimeError

  for folder in (tmp_path, tmp_path / "new"):
    for _ in range(2):
      with pytest.raises(RuntimeError):
        fail(folder)
  assert not (tmp_path / "new").exists()
  with locks.hold(tmp_path / "new"):
    (tmp_path / "new" / "result.json").touch()
  assert (tmp_path / "new" / "result.json").exists()


def test_leftovers_are_removed_but_for_caches_of_others(tmp_path):
  names = ["config.json.17.tmp", ".result.json.0f.tmp", "17_x.npy.tmp"]
  other = ".outputs_0123.npy.0f.tmp"
  for name in (*names, other):
    (tmp_path / name).touch()
  with locks.hold(tmp_path):
    assert sorted(os.listdir(tmp_path)) == sorted([locks.FILE, other])


def test_a_link_is_not_followed(tmp_path):
  (tmp_path / locks.FILE).symlink_to(tmp_path / "victim")
  with pytest.raises(OSError, match=locks.FILE), locks.hold(tmp_path):
    pass
  assert not (tmp_path / "victim").exists()


def test_without_locks_a_claim_has_to_do(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks here")

  monkeypatch.setattr(locks.fcntl, "lockf", refuse)
  with locks.hold(tmp_path):
    assert (tmp_path / ".lock.claim").exists()
  assert not (tmp_path / ".lock.claim").exists()
  claim = claims.take(tmp_path / ".lock.claim")
  with pytest.raises(locks.InUseError), locks.hold(tmp_path):
    pass
  claim.release()


def test_a_study_leaves_a_run_to_who_has_it(make_config, tmp_path, monkeypatch):
  """Its claim was thought to be stale: another process only stood still."""

  def train_and_evaluate(*_):
    raise locks.InUseError("in use")

  monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
  run = plan.Run(0, "sgd", {})
  (tmp_path / "seed0").mkdir()
  there = records.Records(make_config(), tmp_path, [run])
  assert runner._attempt(there, run) is None
  assert not list((tmp_path / "seed0").iterdir())


def test_processes_of_another_container_may_live(tmp_path, monkeypatch):
  """Host names and process numbers may be the same in all of them."""
  file = tmp_path / "x"
  gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
  gone.wait()
  for host, free in ((claims._host(), True), ("elsewhere", False)):
    file.write_text(json.dumps({"host": host, "pid": gone.pid, "token": "t"}))
    claim = claims.take(file)
    assert (claim is not None) == free
    if claim is not None:
      claim.release()
