"""Locks: a workdir belongs to one run at a time.

The lock is the operating system's on bytes of a file (POSIX `lockf`): it ends
with the process that holds it, whatever ends that, and NFS and Lustre show it
to all hosts. A process must not open such a file twice, as the first `close`
would release the lock.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import jax
from absl import logging

from experiments.runtime import claims, distributed

try:
  import fcntl
except ImportError:  # on Windows
  fcntl = None  # type: ignore[assignment]

FILE = ".lock"
# The caches that other runs leave beside a reference.
_OF_OTHERS = "outputs_"
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# (device, number) of the files that are open here, and by which process: a
# fork's child has its parent's list, and none of its locks.
_open: dict[tuple[int, int], int] = {}


class InUseError(OSError):
  """Another run works in the workdir."""


@contextlib.contextmanager
def hold(folder: pathlib.Path, *, together: bool = True) -> Iterator[None]:
  """Keeps other runs out of a workdir while a `with` block runs.

  Temporary files that a killed run left there are removed.

  Args:
    folder: the workdir; made if it is missing, and removed again if nothing is
      put there.
    together: whether all processes of a job call it at once, which are one run;
      otherwise one of them does.

  Yields:
    Nothing.

  Raises:
    InUseError: another run holds it; in one line, who, and since when.
    OSError: the lock can't be opened.
  """
  number = jax.process_index() if together else 0
  made = not folder.exists()
  with contextlib.ExitStack() as stack:
    failure, error = "", None
    if number == 0:
      try:
        stack.enter_context(_locked(folder, 0))
        _remove_leftovers(folder)
      except OSError as found:
        error, failure = found, str(found)
    if together:
      failure = distributed.gather_texts(failure)[0]
    if failure:
      raise error or InUseError(failure)
    if number:
      stack.enter_context(_locked(folder, number))
    elif made:
      stack.callback(_remove_empty, folder)
    yield


@contextlib.contextmanager
def _locked(folder, number):
  """Holds the byte of one of a job's processes."""
  descriptor, claim = _take(folder, number)
  about = os.fstat(descriptor)
  key = about.st_dev, about.st_ino
  _open[key] = os.getpid()
  try:
    yield
  finally:
    del _open[key]
    if number == 0:
      os.ftruncate(descriptor, 0)
    if claim is not None:
      claim.release()
    os.close(descriptor)


def _take(folder, number):
  """Opens and locks the file; claims it where there are no locks."""
  path = folder / FILE
  flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
  while True:
    if _open.get(_key(path)) == os.getpid():
      raise InUseError(_in_use(folder, "this process works in it already"))
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, claim = os.open(path, flags, 0o666), None
    try:
      locked = _lock(descriptor, number)
      if not locked and number == 0:
        # The next best thing: a kill leaves it behind for a while.
        claim = claims.take(path.with_suffix(".claim"))
        if claim is None:
          raise InUseError(_in_use(folder, "another process works in it"))
      if _key(path) == _key(descriptor):
        if number == 0:
          _write_owner(descriptor)
        return descriptor, claim
    except BlockingIOError as error:
      who = _owner(descriptor)
      os.close(descriptor)
      raise InUseError(_in_use(folder, who)) from error
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)  # its folder was removed, and is there again


def _lock(descriptor, number):
  """Locks a file; BlockingIOError if another process has it."""
  if fcntl is None:
    return False
  how = fcntl.LOCK_EX | fcntl.LOCK_NB
  try:
    if number:
      fcntl.lockf(descriptor, how, 1, number)
    else:
      # All bytes: no process of another job may be left, either.
      fcntl.lockf(descriptor, how)
      fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)
  except OSError as error:
    if error.errno in (errno.EACCES, errno.EAGAIN):
      raise BlockingIOError(error.errno, "locked") from error
    if error.errno in _NO_LOCKS:
      logging.warning("this file system has no locks (%s).", error)
      return False
    raise
  return True


def _key(path):
  try:
    about = os.stat(path)
  except FileNotFoundError:
    return None
  return about.st_dev, about.st_ino


def _write_owner(descriptor):
  since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  about = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, json.dumps(about).encode(), 0)


def _owner(descriptor):
  """Describes the process that has the lock."""
  try:
    about = json.loads(os.pread(descriptor, 1000, 0))
    return (
      f"process {int(about['pid'])} on {str(about['host'])[:80]!r} works in it"
      f" since {str(about['since'])[:40]}"
    )
  except (ValueError, KeyError, TypeError, OSError):
    return "another process works in it"


def _in_use(folder, who):
  return (
    f"workdir {folder} is in use: {who}. Wait for it or end it; or choose"
    " another --workdir."
  )


def _remove_leftovers(folder):
  """Removes temporary files of runs that are gone: only ours is left."""
  for path in folder.glob("*.tmp"):
    # Other runs write these; `replacing` removes old ones.
    if not path.name.lstrip(".").startswith(_OF_OTHERS) and not path.is_dir():
      path.unlink(missing_ok=True)


def _remove_empty(folder):
  """Removes a workdir in which there is nothing but the lock's file."""
  if os.listdir(folder) == [FILE]:
    with contextlib.suppress(OSError):
      (folder / FILE).unlink()
      folder.rmdir()
