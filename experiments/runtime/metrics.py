"""Metrics of a run: JSON lines, TensorBoard, a progress bar."""

import itertools
import json
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from gradmimic_jax import _files

METRICS_FILE = "metrics.jsonl"
# These differ between runs of one config, and have lines of their own.
TIMINGS = ("steps_per_second", "data_wait")
_CHECK = "check"
_RUN = "fingerprint"  # of the run, in the first line
_MAX_BYTES = 1 << 32


class MetricsWriter:
  """Writes scalars by step to `metrics.jsonl` and TensorBoard event files."""

  def __init__(
    self, workdir: pathlib.Path, *, first_step: int, fingerprint: str = ""
  ):
    """Opens the files.

    Args:
      workdir: the run's folder.
      first_step: step at which the run starts or goes on. Lines from there on
        are an interrupted run's; they are dropped and will be written again.
      fingerprint: the run's; "" takes any run's lines.
    """
    path = workdir / METRICS_FILE
    rows = read_metrics(path, timings=True, fingerprint=fingerprint)
    kept = [_line(row) for row in rows if row["step"] < first_step]
    if fingerprint:
      kept.insert(0, _line({"step": 0, _RUN: fingerprint}))
    _files.write_bytes(path, "".join(kept).encode())
    self._file = open(path, "a")  # noqa: SIM115 - closed in close()
    self._events = _Events(workdir / "tensorboard", first_step=first_step)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one line, `{"step": step, **scalars}`."""
    self._file.write(_line({"step": step, **scalars}))
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)

  def flush(self) -> None:
    """Puts all lines so far on disk."""
    self._file.flush()
    # A checkpoint counts on these lines, whatever happens to the machine.
    os.fsync(self._file.fileno())
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes the files, also one that can't be flushed."""
    try:
      self._file.close()
    finally:
      self._events.close()


def _line(row):
  """Formats a line of the file; its last field is a checksum of the others."""
  return json.dumps({**row, _CHECK: _row_checksum(row)}) + "\n"


def _row_checksum(row):
  return f"{zlib.crc32(json.dumps(row).encode()):08x}"


class _Events:
  """A TensorBoard event file that is written at once.

  tensorboardX's own SummaryWriter hands over to a thread. A full disk ends the
  thread without a word, and then its callers wait for ever.
  """

  def __init__(self, folder, *, first_step):
    folder.mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(str(folder / "events"))
    # TensorBoard hides what earlier files have from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(first_step, session_log=start)
    self.flush = self._file.flush
    self.close = self._file.close

  def add_scalar(self, name, value, step):
    self._write(step, summary=summary.scalar(name, value))

  def _write(self, step, **what):
    event = event_pb2.Event(step=step, wall_time=time.time(), **what)
    self._file.write_event(event)


class Silence:
  """Takes the calls of `MetricsWriter`, and keeps nothing."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def metrics(
  workdir: pathlib.Path, *, first_step: int, fingerprint: str = ""
) -> MetricsWriter | Silence:
  """Opens the run's `MetricsWriter`; only the first process writes."""
  if jax.process_index():
    return Silence()
  return MetricsWriter(workdir, first_step=first_step, fingerprint=fingerprint)


def read_metrics(
  path: pathlib.Path, *, timings: bool = False, fingerprint: str = ""
) -> list[dict[str, Any]]:
  """Reads the whole lines of a metrics file; none if there is no file.

  A line that a killed run left unfinished is the last one, and is left out.

  Args:
    path: the file.
    timings: whether to have the lines of `TIMINGS` as well: `steps_per_second`,
      and `data_wait`, the share of the time that steps had to wait for data.
      All other lines are the same in every run of a config.
    fingerprint: of the run whose lines they must be; "": of any.

  Returns:
    The lines, without their checksums.

  Raises:
    OSError: it can't be read.
    ValueError: a line is damaged, or they are another run's.
  """
  if not path.exists():
    return []
  content = bytes(_files.read_bytes(path, max_bytes=_MAX_BYTES))
  rows, last = [], 0
  for number, line in enumerate(content.split(b"\n")[:-1], 1):
    remedy = (
      f"That is line {number}: restore the file from a copy, or cut it off"
      " before that line."
    )
    row = _files.parse_json(line, path, remedy=remedy)
    with _files.named(path, remedy=remedy):
      if type(row.get("step")) is not int:
        raise ValueError(f"its step is {str(row.get('step'))[:40]!r}")
      check = row.pop(_CHECK, None)  # earlier releases wrote none
      if check not in (None, _row_checksum(row)):
        raise ValueError("its checksum is another")
      if _RUN in row:
        if fingerprint and row[_RUN] != fingerprint:
          raise ValueError(
            f"{path} is of another run: its fingerprint is {row[_RUN]!r},"
            f" expected {fingerprint!r}."
          )
        continue
      is_timing = any(name in row for name in TIMINGS)
      if not is_timing:
        if row["step"] < last:
          raise ValueError(f"its step {row['step']} comes after {last}")
        last = row["step"]
    if timings or not is_timing:
      rows.append(row)
  return rows


def recorded_steps(path: pathlib.Path, fingerprint: str = "") -> int:
  """Counts the steps, from the first on, that a run's metrics have lines of."""
  steps = {
    row["step"]
    for row in read_metrics(path, fingerprint=fingerprint)
    if any(name.startswith("train_") for name in row)
  }
  return next(step for step in itertools.count() if step not in steps)


def progress(total: int | None, done: int, title: str) -> tqdm.tqdm:
  """Makes a progress bar over steps; silent if the output is no terminal."""
  return tqdm.tqdm(
    total=total,
    initial=done,
    desc=title,
    unit="step",
    disable=not sys.stderr.isatty(),
    leave=False,
  )
