"""Where a run's metrics go: JSON lines, TensorBoard, a progress bar."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

METRICS_FILE = "metrics.jsonl"
# What differs from run to run of the same: in lines of their own.
TIMINGS = ("steps_per_second", "data_wait")


class MetricsWriter:
  """Writes scalars by step to `metrics.jsonl` and TensorBoard event files."""

  def __init__(self, workdir: pathlib.Path, *, first_step: int):
    """Opens the files.

    Args:
      workdir: the run's folder.
      first_step: where the run starts or goes on. Lines from there on stem from
        an interrupted run; they are dropped and will be written again.
    """
    path = workdir / METRICS_FILE
    rows = read_metrics(path, timings=True)
    kept = [row for row in rows if row["step"] < first_step]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
      file.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(temporary, path)
    self._file = open(path, "a")  # noqa: SIM115 - closed in close()
    self._events = _Events(workdir / "tensorboard", first_step=first_step)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one line, `{"step": step, **scalars}`."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)

  def flush(self) -> None:
    """Puts what was written on disk."""
    self._file.flush()
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes, what can't be flushed too."""
    try:
      self._file.close()
    finally:
      self._events.close()


class _Events:
  """A TensorBoard event file that is written where it is called.

  tensorboardX's own SummaryWriter hands over to a thread. A full disk ends that
  without a word, and then whoever writes waits for ever.
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
  """Takes what `MetricsWriter` takes, and keeps nothing."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def metrics(
  workdir: pathlib.Path, *, first_step: int
) -> MetricsWriter | Silence:
  """The run's `MetricsWriter`; of several processes, the first one writes."""
  if jax.process_index():
    return Silence()
  return MetricsWriter(workdir, first_step=first_step)


def read_metrics(
  path: pathlib.Path, *, timings: bool = False
) -> list[dict[str, Any]]:
  """The whole lines of a metrics file; none if there is no file.

  A line that a killed run left unfinished is the last one, and is left out.

  Args:
    path: the file.
    timings: whether to have the lines of `TIMINGS` as well: `steps_per_second`,
      and `data_wait`, the share of the time that steps had to wait for data.
      All other lines are the same in every run of a config.

  Returns:
    The lines.
  """
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines(keepends=True):
    if not line.endswith("\n"):
      break
    row = json.loads(line)
    if timings or not any(name in row for name in TIMINGS):
      rows.append(row)
  return rows


def progress(total: int, done: int, title: str) -> tqdm.tqdm:
  """A progress bar over steps; silent when the output is not a terminal."""
  return tqdm.tqdm(
    total=total,
    initial=done,
    desc=title,
    unit="step",
    disable=not sys.stderr.isatty(),
    leave=False,
  )
