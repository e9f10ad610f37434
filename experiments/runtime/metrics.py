"""Metrics of a run: JSON lines, TensorBoard, a sink."""

import importlib
import itertools
import json
import os
import pathlib
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gradmimic_jax import _files

METRICS_FILE = "metrics.jsonl"
# These differ between runs of one config, and have lines of their own.
TIMINGS = ("steps_per_second", "data_wait")
_CHECK = "check"
_RUN = "fingerprint"  # of the run, in the first line
_MAX_BYTES = 1 << 32
_GROUPS = ("train", "test", "held_out", "zero_shot")  # beginnings of names
_BINS = 64


class Sink(Protocol):
  """Takes a run's metrics elsewhere, as `train_and_evaluate` is given it.

  It is called in the first process, in the thread that trains, once a group of
  steps; an error of its ends the run. A run that goes on after an interruption
  tells it of some steps again.
  """

  def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
    """Takes metrics by their names in `metrics.jsonl`, of a step.

    Args:
      step: the last one of a group, whose measurements are averaged, or that of
        an evaluation.
      scalars: the metrics.
    """


def find_sink(name: str | None) -> Sink | None:
  """Finds the function that `config.metrics_sink` names.

  Args:
    name: "package.module:function", or None.

  Returns:
    The function; None for None.

  Raises:
    ValueError: it can't be imported, or isn't a function.
  """
  if name is None:
    return None
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"config.metrics_sink is {name!r}, which can't be imported ({error});"
      " expected 'package.module:function'."
    ) from error
  if not callable(found):
    raise ValueError(
      f"config.metrics_sink is {name!r}, a {type(found).__name__}; expected a"
      " function (step, {name: number})."
    )
  return found


class MetricsWriter:
  """Writes scalars by step to `metrics.jsonl`, and in groups elsewhere.

  `metrics.jsonl` has a line for every step, evaluation and measurement of
  speed. TensorBoard, and each `Sink`, get the means of a group of steps.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    first_step: int,
    fingerprint: str = "",
    about: str = "",
    sinks: Sequence[Sink] = (),
  ):
    """Opens the files.

    Args:
      workdir: the run's folder.
      first_step: step at which the run starts or goes on. Lines from there on
        are an interrupted run's; they are dropped and will be written again.
      fingerprint: the run's; "" takes any run's lines.
      about: a text for TensorBoard, such as the config.
      sinks: get the metrics, too.
    """
    path = workdir / METRICS_FILE
    rows = read_metrics(path, timings=True, fingerprint=fingerprint)
    kept = [_line(row) for row in rows if row["step"] < first_step]
    if fingerprint:
      kept.insert(0, _line({"step": 0, _RUN: fingerprint}))
    _files.write_bytes(path, "".join(kept).encode())
    self._file = open(path, "a")  # noqa: SIM115 - closed in close()
    self._events = _Events(workdir / "tensorboard", first_step=first_step)
    self._sinks = sinks
    self._means: dict[str, list[np.ndarray]] = {}  # since the last summary
    if about:
      lines = "".join(f"    {line}\n" for line in about.splitlines())
      self._events.add_text("config", lines, first_step)  # code, in Markdown

  def write(
    self, step: int, scalars: Mapping[str, float], *, later: bool = False
  ) -> None:
    """Writes one line, `{"step": step, **scalars}`.

    Args:
      step: the step.
      scalars: numbers by name.
      later: whether they are shown with the next summary, not at once.
    """
    self._file.write(_line({"step": step, **scalars}))
    if not later:
      self._show(step, scalars)
      return
    for name, value in scalars.items():
      self._means.setdefault(name, []).append(np.array([value]))

  def write_steps(self, first: int, columns: Mapping[str, Any]) -> None:
    """Writes a line for each of several steps.

    Args:
      first: the first step; the others follow.
      columns: arrays [n] by name, a number a step.
    """
    lists = {k: np.asarray(v, float).tolist() for k, v in columns.items()}
    names, rows = list(lists), zip(*lists.values(), strict=True)
    self._file.writelines(
      _line({"step": step, **dict(zip(names, row, strict=True))})
      for step, row in enumerate(rows, first)
    )
    for name, column in columns.items():
      self._means.setdefault(name, []).append(np.asarray(column, float))

  def summarize(self, step: int, scores: np.ndarray) -> None:
    """Sends TensorBoard and the sinks the means of the steps since last time.

    Args:
      step: the last of these steps.
      scores: of samples, [n]; TensorBoard gets a histogram of those that are
        finite.
    """
    means = {
      name: _mean(np.concatenate(parts)) for name, parts in self._means.items()
    }
    self._means.clear()
    self._show(step, means)
    self._events.add_histogram("train/score", scores, step)

  def _show(self, step, scalars):
    self._events.add_scalars(scalars, step)
    for sink in self._sinks:
      sink(step, scalars)

  def flush(self) -> None:
    """Shows all lines so far to readers of the files."""
    self._file.flush()
    self._events.flush()

  def sync(self) -> None:
    """Puts all lines so far on disk, for a checkpoint that counts on them."""
    self.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Flushes and closes the files, also one that can't be flushed."""
    try:
      self._file.close()
    finally:
      self._events.close()


def _mean(values):
  with np.errstate(invalid="ignore"):  # of infinities of both signs
    return float(np.mean(values))


def _line(row):
  """Formats a line of the file; its last field is a checksum of the others."""
  text = json.dumps(row)
  check = f"{zlib.crc32(text.encode()):08x}"
  return f'{text[:-1]}, "{_CHECK}": "{check}"}}\n'


def _row_checksum(row):
  return f"{zlib.crc32(json.dumps(row).encode()):08x}"


class _Events:
  """A TensorBoard event file that is written at once.

  tensorboardX's own SummaryWriter hands over to a thread. A full disk ends the
  thread without a word, and then its callers wait for ever.
  """

  def __init__(self, folder, *, first_step):
    # Slow to import, and the jobs that train nothing don't need it.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._event, self._summary = event_pb2.Event, summary
    folder.mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(str(folder / "events"))
    # TensorBoard hides what earlier files have from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(first_step, session_log=start)
    self.flush = self._file.flush
    self.close = self._file.close

  def add_scalars(self, scalars, step):
    """Writes all of them as one event."""
    found = None
    for name, value in scalars.items():
      one = self._summary.scalar(group(name), value)
      found = one if found is None else found
      if found is not one:
        found.MergeFrom(one)
    if found is not None:
      self._write(step, summary=found)

  def add_histogram(self, name, values, step):
    finite = values[np.isfinite(values)]
    if finite.size:
      self._write(step, summary=self._summary.histogram(name, finite, _BINS))

  def add_text(self, name, text, step):
    self._write(step, summary=self._summary.text(name, text))

  def _write(self, step, **what):
    self._file.write_event(
      self._event(step=step, wall_time=time.time(), **what)
    )


def group(name: str) -> str:
  """Names a metric as TensorBoard groups it.

  Example:
    >>> group("train_loss"), group("held_out_accuracy"), group("data_wait")
    ('train/loss', 'held_out/accuracy', 'speed/data_wait')
  """
  if name in TIMINGS:
    return f"speed/{name}"
  for prefix in _GROUPS:
    if name.startswith(f"{prefix}_"):
      return f"{prefix}/{name.removeprefix(prefix + '_')}"
  return f"evaluation/{name}"


class Silence:
  """Takes the calls of `MetricsWriter`, and keeps nothing."""

  def write(
    self, step: int, scalars: Mapping[str, float], *, later: bool = False
  ) -> None:
    """Does nothing."""

  def write_steps(self, first: int, columns: Mapping[str, Any]) -> None:
    """Does nothing."""

  def summarize(self, step: int, scores: np.ndarray) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def sync(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def metrics(workdir: pathlib.Path, **options: Any) -> MetricsWriter | Silence:
  """Opens the run's `MetricsWriter`; only the first process writes."""
  if jax.process_index():
    return Silence()
  return MetricsWriter(workdir, **options)


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
