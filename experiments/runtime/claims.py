"""Claims: processes agree through the file system who works on what."""

import contextlib
import functools
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from experiments.runtime import preemption

_BEAT = 10.0  # seconds between signs of life
# A claim without a sign of life for so long is taken over. Much longer than a
# beat: clocks of machines differ, and network file systems are late.
STALE_AFTER = 120.0
_POLL = 1.0  # seconds between looks at what other processes work on

Item = TypeVar("Item")
Result = TypeVar("Result")


class Claim:
  """A claim that this process holds; a thread gives signs of life meanwhile.

  A process that is killed leaves its claim behind. Others take it over at once
  where they can see that the process is gone (on the same machine), otherwise
  after `STALE_AFTER` seconds. In the rare case that two take over the same
  claim at once, both may do the work: the protected files must be written all
  or nothing, and be the same from either process.
  """

  def __init__(self, path: pathlib.Path, content: str):
    self._path, self._content = path, content
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._live, daemon=True)
    self._thread.start()

  def _live(self):
    while not self._over.wait(_BEAT):
      with contextlib.suppress(OSError):
        os.utime(self._path)

  def release(self) -> None:
    """Gives the claim back, unless another process has taken it over."""
    self._over.set()
    self._thread.join()
    if _read(self._path) == self._content:
      self._path.unlink(missing_ok=True)


def take(
  path: pathlib.Path, *, stale_after: float = STALE_AFTER
) -> Claim | None:
  """Claims the work that a file stands for.

  Args:
    path: of the claim's file; its folder must be there.
    stale_after: seconds without a sign of life after which a claim of another
      process counts for nothing.

  Returns:
    The claim, to be released; None if another process holds it.
  """
  content = json.dumps(
    {
      "host": _host(),
      "pid": os.getpid(),
      "token": uuid.uuid4().hex,
    }
  )
  for _ in range(2):
    try:
      descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
      if not _remove_stale(path, stale_after):
        return None
      continue
    with os.fdopen(descriptor, "w") as file:
      file.write(content)
    return Claim(path, content)
  return None


@contextlib.contextmanager
def hold(path: pathlib.Path, *, poll: float = 0.5) -> Iterator[None]:
  """Waits for a claim, and holds it in a `with` block."""
  claim = take(path)
  while claim is None:
    time.sleep(poll)
    claim = take(path)
  try:
    yield
  finally:
    claim.release()


def do_once(
  path: pathlib.Path,
  read: Callable[[], Result | None],
  work: Callable[[], Result],
) -> Result | None:
  """Does work that no other process is at, unless it is done by now.

  Args:
    path: of the claim.
    read: gives the result, if there is one.
    work: makes it, and leaves it for `read`.

  Returns:
    The result; None if another process has the claim.
  """
  claim = take(path)
  if claim is None:
    return None
  try:
    found = read()
    return work() if found is None else found
  finally:
    claim.release()


def share(
  items: Sequence[Item], attempt: Callable[[Item], Result | None]
) -> list[Result]:
  """Collects every item's result, found here or by another process.

  Args:
    items: the work, each item after those that it needs.
    attempt: `item -> result`; None where another process is at it, or where
      it has to wait. Called again until there is a result.

  Returns:
    The results, in the order of the items.
  """
  found: dict[int, Result] = {}
  while len(found) < len(items):
    before = len(found)
    for number, item in enumerate(items):
      if number not in found:
        preemption.leave_if_asked()
        result = attempt(item)
        if result is not None:
          found[number] = result
    if len(found) == before:
      time.sleep(_POLL)  # other processes work on all that is left
  return [found[number] for number in range(len(items))]


def _remove_stale(path: pathlib.Path, stale_after: float) -> bool:
  """Removes a stale claim; True if no other claim is in the way."""
  try:
    age = time.time() - path.stat().st_mtime
  except FileNotFoundError:
    return True
  seen = _read(path)
  if age < stale_after and not _is_abandoned(seen):
    return False
  aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
  try:
    os.rename(path, aside)  # only one process succeeds
  except FileNotFoundError:
    return True
  if _read(aside) != seen:
    # Another process made a new claim after this one had looked.
    with contextlib.suppress(OSError):
      os.link(aside, path)
    aside.unlink()
    return False
  aside.unlink()
  return True


@functools.cache
def _host() -> str:
  """Names what numbers its own processes: a machine's boot, or a container.

  Containers may have one host name, and in each the main process is 1.
  """
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts.append(os.readlink("/proc/self/ns/pid"))
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    parts.append(boot.read_text().strip())
  return " ".join(parts)


def _is_abandoned(content: str | None) -> bool:
  """True if a claim's process ran on this machine and is gone."""
  try:
    about: Any = json.loads(content or "")
    if about["host"] != _host():
      return False
    os.kill(about["pid"], 0)
  except ProcessLookupError:
    return True
  except (ValueError, KeyError, TypeError, OSError):
    return False  # not written yet, damaged, or a process of someone else
  return False


def _read(path: pathlib.Path) -> str | None:
  try:
    return path.read_text()
  except (OSError, UnicodeDecodeError):
    return None
