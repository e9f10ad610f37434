"""The ledger: every sample's scores, weights and losses, kept on disk.

A ledger is a folder of Parquet files, one a flush, beside a small JSON
manifest and each writer's list of its files. Files are only ever added: each is
written under a temporary name and renamed once its bytes are on the disk, so a
killed run leaves either a whole file or none. Several processes write one
ledger, each its own files.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradmimic_jax import _frames, _ledger_files as row_files

# Rows that `matrix` looks up at once: bounds memory, and keeps the number of
# passes over the ids small however many files there are.
_BATCH_ROWS = 1 << 24


class _Rows(NamedTuple):
  """The rows of one append."""

  steps: np.ndarray  # int64 [n], ascending
  epochs: np.ndarray  # int32 [n]
  ids: pa.Array  # [n]
  values: dict[str, np.ndarray | None]  # field -> float32 [n]


class ScoreLedger:
  """An append-only record of per-sample scores, weights and losses.

  Rows are (id, step, epoch, score, weight, loss). `append` keeps them in
  memory and `flush` writes them as one file; every reading method flushes
  first, so that it sees all appended rows. A row is identified by (id, step):
  appending it again, as a resumed run does, leaves one row, the one written
  last. Any number of processes may read a ledger, and several may write it at
  a time: each as another writer, with rows of its own.

  Guarantees:
    * A kill at any moment loses at most the rows that were not flushed.
    * The rows that are read don't depend on which writer wrote which: a run
      may go on with another number of writers.
    * Nor do they depend on how the appends were cut into files.
    * A file that is damaged or lost, or that another ledger wrote, is refused
      by name. Nothing is skipped in silence.
    * Whatever reads a folder of Parquet files reads this one:
      `pandas.read_parquet(path)`, `polars.read_parquet(path)`, DuckDB's
      `read_parquet('path')`, `pyarrow.dataset.dataset(path)`. A run that was
      interrupted may have recorded some (id, step) twice, with the same
      values: drop duplicates of the two.

  | edge case                                | behaviour                     |
  |------------------------------------------|-------------------------------|
  | NaN or infinite score, weight, loss      | stored as it is               |
  | weights or losses not given              | null in `table`, NaN in       |
  |                                          | `matrix`                      |
  | no ids in an append (all were padding)   | nothing is recorded           |
  | a sample seen twice in an epoch          | `matrix` has the latest step  |
  | a sample not seen in an epoch            | `matrix` has NaN              |
  | a file was lost                          | refused by name; see `recover`|
  | temporary files of a killed flush        | ignored; removed by that      |
  |                                          | writer's next flush           |
  | two writers open at a time write the     | one row, of either            |
  | same (id, step)                          |                               |

  Args:
    path: the ledger's folder; made by the first flush when it isn't there.
    fingerprints: names and values of the scores' origin (config, data,
      reference, ...). Stored with a new ledger and compared with an existing
      one; None takes an existing ledger's.
    writer: this process's number among those that write the ledger at a time,
      >= 0. When a run goes on, its writers open the ledger after all earlier
      ones have ended.
    recover: whether a ledger that lost files may be opened, to record their
      rows again: see `first_lost_step` and `forget_from`. It can't be read
      before that.

  Raises:
    TypeError: fingerprints that aren't strings by name; a writer that isn't an
      integer.
    ValueError: a negative writer, a ledger with other fingerprints, a damaged,
      lost or foreign file, a manifest that is missing, damaged or of another
      version.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with ScoreLedger(folder, fingerprints={"data": "digits"}) as ledger:
    ...   ledger.append([7, 3], [0.5, -1.0], step=1, epoch=0)
    ...   ledger.append([3, 9], [-2.0, 1.5], step=2, epoch=1)
    >>> ids, values = ScoreLedger(folder).matrix("score")
    >>> ids
    array([3, 7, 9])
    >>> values
    array([[-1. , -2. ],
           [ 0.5,  nan],
           [ nan,  1.5]], dtype=float32)

  References:
    Huang et al., arXiv 2501.06708: offline selection needs the mimic score of
    every sample at every step.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    fingerprints: Mapping[str, str] | None = None,
    writer: int = 0,
    recover: bool = False,
  ):
    self.path = Path(path)
    self.writer = _count("writer", writer, 2**31 - 1)
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(
        f"{self.path} is a file; a ledger is a folder. Give the folder's path."
      )
    self._asked = _checked_fingerprints(fingerprints)
    self._manifest: dict[str, Any] | None = None
    self._id_kind: str | None = None
    self._buffer: list[_Rows] = []
    self._known: dict[
      str, row_files.RowFile
    ] = {}  # files whose footer was checked
    self._listed: dict[str, int] | None = None  # this writer's list, once read
    # Refuse a bad ledger now, not after hours of training. One process reading
    # all files is enough.
    if self.writer:
      self._read_manifest()
    elif recover:
      self._look()
    else:
      self._files()

  @property
  def fingerprints(self) -> dict[str, str]:
    """Names and values of what the scores belong to."""
    if self._manifest is not None:
      return dict(self._manifest["fingerprints"])
    return dict(self._asked or {})

  @property
  def id_kind(self) -> str | None:
    """The kind of the ids, "integer" or "string"; None before any append."""
    return self._id_kind

  @property
  def epochs(self) -> tuple[int, ...]:
    """The epochs that have rows, ascending: the columns of `matrix`."""
    self.flush()
    return tuple(sorted({e for file in self._files() for e in file.epochs}))

  @property
  def lost_files(self) -> tuple[str, ...]:
    """The names of files that are not there any more."""
    return tuple(self._look()[1])

  @property
  def first_lost_step(self) -> int | None:
    """The first step whose rows were lost, from which to record again.

    None where no file is lost; 0 where a lost file's steps aren't known.
    """
    files, lost = self._look()
    if lost:
      return min(map(_first_step, lost))
    return 0 if self._numbers_lack(files) else None

  def forget_from(self, step: int) -> None:
    """Removes the files of a step and later ones, to record these again.

    One process calls this, while no other one writes. A file that has earlier
    rows, too, stays: its rows count until they are appended again.

    Args:
      step: not after `first_lost_step`.

    Raises:
      ValueError: rows of earlier steps were lost, too.
    """
    lost = self.first_lost_step
    if lost is not None and lost < step:
      raise ValueError(
        f"the ledger at {self.path} lost rows from step {lost} on, before"
        f" {step}. Record from there."
      )
    if self._manifest is None:
      return
    for file in self._look()[0]:
      if file.first_step >= step:
        file.path.unlink(missing_ok=True)
        del self._known[file.path.name]
    ledger_id = self._manifest["ledger_id"]
    for writer in row_files.find_writers(self.path):
      listed = row_files.read_own_list(self.path, writer, ledger_id)
      kept = {
        name: rows for name, rows in listed.items() if _first_step(name) < step
      }
      row_files.write_list(self.path, writer, self._manifest, kept)
    self._listed = None

  def append(
    self,
    ids: Any,
    scores: Any = None,
    *,
    step: Any,
    epoch: Any,
    weights: Any = None,
    losses: Any = None,
    mask: Any = None,
  ) -> None:
    """Keeps the rows of one step, or of several, until the next flush.

    The arrays are copied: the caller may reuse or donate its own.

    Args:
      ids: the samples' ids [n], or [K, n] of K steps: integers >= 0 or strings,
        none twice in a step. The first append fixes which of the two this
        ledger holds. Or a data frame of one step, with the columns id (or an
        index of ids), score and, where there are any, weight and loss; it
        stands for all four.
      scores: raw scores, shaped like ids; anything `np.asarray` takes.
      step: the step the rows were made at, >= 0; of K steps the first one, and
        the others follow, or all of them [K], ascending.
      epoch: the pass over the data that the step belongs to, >= 0; of K steps
        one for all, or each one's [K].
      weights: the samples' weights in the update, shaped like ids.
      losses: the samples' losses, shaped like ids.
      mask: bool, shaped like ids: False for padding, which isn't kept whatever
        its id is. None: there is none.

    Raises:
      TypeError: ids that are neither integers nor strings, or not of this
        ledger's kind; scores that aren't real numbers; a step or an epoch that
        isn't an integer; a mask that isn't bool.
      ValueError: arrays that aren't shaped like ids; ids that repeat in a step
        or are negative; a negative step or epoch, or steps that don't ascend.

    Example:
      >>> import tempfile
      >>> ledger = ScoreLedger(tempfile.mkdtemp())
      >>> ledger.append(
      ...   [[4, 2], [7, -1]],
      ...   [[0.5, 1.0], [2.0, 0.0]],
      ...   step=10,
      ...   epoch=0,
      ...   mask=[[True, True], [True, False]],
      ... )
      >>> ledger.table().select(["id", "step", "score"]).to_pylist()[-1]
      {'id': 7, 'step': 11, 'score': 2.0}
    """
    if _frames.is_frame(ids):
      if not (scores is weights is losses is None):
        raise TypeError("scores came twice: in a frame, and besides.")
      ids, scores, weights, losses = _frames.read_rows(ids).values()
    raw_ids = np.asarray(ids)
    if isinstance(ids, (list, tuple)) and raw_ids.dtype.kind == "U":
      # NumPy would turn 5 among strings into "5".
      raw_ids = np.array(ids, object)
    if raw_ids.ndim not in (1, 2):
      raise ValueError(
        f"ids has shape {raw_ids.shape}; expected [n], one id a sample, or"
        " [K, n] of K steps."
      )
    steps, epochs = _spread(step, epoch, raw_ids.shape)
    values = {
      "score": _floats("scores", scores, raw_ids.shape),
      "weight": _floats("weights", weights, raw_ids.shape),
      "loss": _floats("losses", losses, raw_ids.shape),
    }
    if values["score"] is None:
      raise TypeError("scores is None; expected numbers of the shape of ids.")
    kept = _checked_mask(mask, raw_ids.shape)
    raw_ids, steps, epochs = (x[kept] for x in (raw_ids, steps, epochs))
    if not len(raw_ids):
      return
    kind, checked_ids = _checked_ids(raw_ids, steps)
    if self._id_kind not in (None, kind):
      raise TypeError(
        f"ids are of kind {kind}, but the ledger at {self.path} holds"
        f" {self._id_kind} ids. Use one kind of id for a ledger."
      )
    self._id_kind = kind
    values = {
      name: None if value is None else value[kept]
      for name, value in values.items()
    }
    self._buffer.append(_Rows(steps, epochs, checked_ids, values))

  def flush(self) -> Path | None:
    """Writes the rows in memory as one file.

    Returns:
      The new file's path, or None when there was nothing to write.
    """
    if not self._buffer:
      return None
    self.path.mkdir(parents=True, exist_ok=True)
    if self._manifest is None:
      self._begin()
    assert self._manifest is not None
    if self._listed is None:
      row_files.remove_temporary_files(self.path, writer=self.writer)
    if self._manifest["id_kind"] != self._id_kind:
      raise TypeError(
        f"the rows in memory have {self._id_kind} ids, but the ledger at"
        f" {self.path} was begun meanwhile with {self._manifest['id_kind']}"
        " ids. Use one kind of id for a ledger."
      )
    table = self._buffered_table()
    first = min(int(rows.steps[0]) for rows in self._buffer)
    last = max(int(rows.steps[-1]) for rows in self._buffer)
    about = {
      "format": row_files.FORMAT,
      "version": row_files.VERSION,
      "ledger_id": self._manifest["ledger_id"],
      "fingerprint": row_files.digest(self.fingerprints),
      "first_step": first,
      "last_step": last,
      "epochs": sorted(
        {epoch for rows in self._buffer for epoch in set(rows.epochs.tolist())}
      ),
    }
    about["check"] = row_files.checksum([about, len(table)])
    metadata = {row_files.FORMAT: json.dumps(about)}
    sink = pa.BufferOutputStream()
    pq.write_table(
      table.replace_schema_metadata(metadata),
      sink,
      compression="zstd",
      use_dictionary=["step", "epoch"],  # scores and ids hardly repeat
    )
    content = sink.getvalue()
    path = self.path / row_files.rows_name(
      first,
      last,
      1 + row_files.last_sequence(self.path),
      self.writer,
      content,
    )
    row_files.write_atomically(path, content)
    # A kill before this line leaves a file that counts, though not listed.
    self._list(path.name, len(table))
    self._buffer = []  # only now: a failed write can be tried again
    return path

  def table(self) -> pa.Table:
    """All rows as a `pyarrow.Table`, one for an (id, step).

    Returns:
      Columns id (int64 or string), step (int64), epoch (int32), score, weight
      and loss (float32; null where not given), sorted by step, then id.
    """
    self.flush()
    files = self._files()
    if not files:
      return row_files.schema(self._id_kind or "integer").empty_table()
    columns = ["id", "step", "epoch", *row_files.FIELDS]
    return row_files.latest_rows(
      pa.concat_tables(row_files.read_rows(f, columns) for f in files)
    )

  def matrix(self, field: str = "score") -> tuple[np.ndarray, np.ndarray]:
    """One field as a matrix: a row a sample, a column an epoch.

    Args:
      field: "score", "weight" or "loss".

    Returns:
      ids [N], ascending (int64, or a NumPy string array), and values float32
      [N, T], one column for each of `epochs`. NaN marks a sample that was not
      seen in an epoch; where it was seen more than once, the latest step
      counts.

    Raises:
      ValueError: another field, or a ledger without rows.
    """
    if field not in row_files.FIELDS:
      raise ValueError(
        f"field is {field!r}; expected one of {row_files.FIELDS}."
      )
    epochs = np.asarray(self.epochs)
    if not len(epochs):
      raise ValueError(
        f"the ledger at {self.path} holds no rows, so it has no matrix."
        " Check the path, or append scores first."
      )
    import pyarrow.compute as pc  # slow, and runs only append

    ids = pa.nulls(0, row_files.ID_TYPES[self._id_kind or "integer"])
    for batch in self._batches(["id"], _BATCH_ROWS):
      ids = pc.unique(pa.chunked_array([ids, *batch["id"].chunks]))
    ids = ids.take(pc.sort_indices(ids))

    # Epoch by epoch in memory: voting reads one column at a time.
    values = np.full((len(epochs), len(ids)), np.nan, np.float32)
    for batch in self._batches(["id", "step", "epoch", field], len(ids)):
      row = pc.index_in(batch["id"], value_set=ids).to_numpy()
      column = np.searchsorted(epochs, batch["epoch"].to_numpy())
      value = batch[field].to_numpy()
      steps = batch["step"].to_numpy()
      if (steps[1:] < steps[:-1]).any():
        order = np.argsort(steps, kind="stable")
        row, column, value = row[order], column[order], value[order]
      values[column, row] = value  # where an index repeats, the last one stays
    return _numpy_ids(ids), values.T

  def __len__(self) -> int:
    """The number of rows, one for an (id, step)."""
    self.flush()
    return sum(
      group[0].n_rows
      if len(group) == 1
      else len(
        row_files.latest_rows(
          pa.concat_tables(
            row_files.read_rows(f, ["id", "step"]) for f in group
          )
        )
      )
      for group in row_files.group_by_steps(self._files())
    )

  def __enter__(self) -> ScoreLedger:
    return self

  def __exit__(self, *error: object) -> None:
    # Also after an error: the rows are true, and a resumed run may repeat them.
    self.flush()

  def __repr__(self) -> str:
    return (
      f"ScoreLedger({str(self.path)!r}, fingerprints={self.fingerprints!r})"
    )

  def _batches(self, columns: list[str], min_rows: int) -> Iterator[pa.Table]:
    """Yields the rows in order of step, in tables of some `min_rows` rows.

    Files whose steps overlap come in one table, in order of writing.
    """
    tables: list[pa.Table] = []
    for group in row_files.group_by_steps(self._files()):
      tables.extend(row_files.read_rows(file, columns) for file in group)
      if sum(map(len, tables)) >= min_rows:
        yield pa.concat_tables(tables)
        tables = []
    if tables:
      yield pa.concat_tables(tables)

  def _buffered_table(self) -> pa.Table:
    """Makes a table of the rows in memory, by step, one for an (id, step)."""
    buffer = sorted(self._buffer, key=lambda rows: rows.steps[0])  # stable
    columns = [
      pa.chunked_array([rows.ids for rows in buffer]),
      _as_arrow(np.concatenate([rows.steps for rows in buffer])),
      _as_arrow(np.concatenate([rows.epochs for rows in buffer])),
    ]
    for field in row_files.FIELDS:
      chunks = [rows.values[field] for rows in buffer]
      columns.append(
        pa.chunked_array(
          [
            pa.nulls(len(rows.ids), pa.float32())
            if chunk is None
            else _as_arrow(chunk)
            for chunk, rows in zip(chunks, buffer, strict=True)
          ]
        )
      )
    assert self._id_kind is not None
    table = pa.table(columns, schema=row_files.schema(self._id_kind))
    if any(
      one.steps[-1] >= other.steps[0]
      for one, other in itertools.pairwise(buffer)
    ):
      table = row_files.latest_rows(table)
    return table

  def _files(self) -> list[row_files.RowFile]:
    """Lists the ledger's files in order of writing; raises if one is lost."""
    files, lost = self._look()
    what = None
    if lost:
      more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
      what = f"{self.path / lost[0]} is missing{more}"
    elif (number := self._numbers_lack(files)) is not None:
      what = f"{self.path} has no file number {number}, and later ones"
    if what is not None:
      raise ValueError(
        f"{what}: the ledger at {self.path} lost rows. Restore the file from a"
        " copy, or record its steps again (`recover`; the command of a run"
        " that isn't finished does)."
      )
    return files

  def _look(self) -> tuple[list[row_files.RowFile], list[str]]:
    """Lists the files there are, in order of writing, and the lost names."""
    if self._manifest is None:
      self._read_manifest()
    listed = self._lists() or {}  # before looking at the files there are
    paths = row_files.find_rows(self.path)
    if paths and self._manifest is None:
      self._read_manifest()  # another writer may have begun right now
    if paths and self._manifest is None:
      raise ValueError(
        f"{self.path} holds Parquet files (the first is {paths[0].name}) but no"
        f" {row_files.MANIFEST}, so they can't be told to be a ledger's."
        " Restore the manifest, or give an empty folder."
      )
    for path in paths:
      if path.name not in self._known:
        self._known[path.name] = row_files.inspect(path, self._manifest or {})
    files = [self._known[path.name] for path in paths]
    there = {row_files.parse_rows_name(file.path.name): file for file in files}
    lost = []
    for name, rows in sorted(listed.items()):
      file = there.get(row_files.parse_rows_name(name))
      if file is None:
        if not (self.path / name).exists():  # network file systems list late
          lost.append(name)
      elif file.n_rows != rows:
        raise ValueError(
          f"{file.path} has {file.n_rows} rows, and the list beside it says"
          f" {rows}. Restore it from a copy."
        )
    return sorted(files, key=row_files.writing_order), lost

  def _lists(self) -> dict[str, int] | None:
    """Reads the rows of every file that was listed; None without any list."""
    if self._manifest is None:
      return None
    return row_files.read_lists(self.path, self._manifest["ledger_id"])

  def _numbers_lack(self, files: list[row_files.RowFile]) -> int | None:
    """Finds the `missing_number` of a ledger without lists."""
    return row_files.missing_number(files) if self._lists() is None else None

  def _read_manifest(self) -> None:
    """Takes kind and fingerprints from the manifest, if there is one."""
    manifest = row_files.read_manifest(self.path)
    if manifest is None:
      return
    if self._asked is not None:
      _compare_fingerprints(self.path, manifest["fingerprints"], self._asked)
    self._manifest = manifest
    self._id_kind = self._id_kind or manifest["id_kind"]

  def _begin(self) -> None:
    """Takes the manifest that another writer made meanwhile, or makes it."""
    self._read_manifest()
    if self._manifest is not None:
      return
    self._files()  # refuses files that lie there without a manifest
    manifest = {
      "format": row_files.FORMAT,
      "version": row_files.VERSION,
      "ledger_id": uuid.uuid4().hex,  # tells a twin's files from our own
      "id_kind": self._id_kind,
      "fingerprints": self.fingerprints,
    }
    if row_files.write_manifest(self.path, manifest, writer=self.writer):
      self._manifest = manifest
    else:
      self._read_manifest()

  def _list(self, name: str, rows: int) -> None:
    """Lists a new file, and at first those of its own that the list lacks."""
    assert self._manifest is not None
    if self._listed is None:
      ledger_id = self._manifest["ledger_id"]
      listed = row_files.read_own_list(self.path, self.writer, ledger_id)
      for path in row_files.find_rows(self.path):
        parts = row_files.parse_rows_name(path.name)
        if parts and parts.writer == self.writer and path.name not in listed:
          listed[path.name] = row_files.inspect(path, self._manifest).n_rows
      self._listed = listed
    self._listed[name] = rows
    row_files.write_list(self.path, self.writer, self._manifest, self._listed)


def _first_step(name: str) -> int:
  parts = row_files.parse_rows_name(name)
  return parts.first_step if parts else 0


def _checked_fingerprints(
  fingerprints: Mapping[str, str] | None,
) -> dict[str, str] | None:
  if fingerprints is None:
    return None
  if not isinstance(fingerprints, Mapping):
    raise TypeError(
      "fingerprints must be a mapping of names to strings; got a"
      f" {type(fingerprints).__name__}."
    )
  for name, value in fingerprints.items():
    if not isinstance(name, str) or not isinstance(value, str):
      raise TypeError(
        f"fingerprints[{name!r}] is {value!r}; names and values must be"
        " strings. Hash or format the value first."
      )
  return dict(fingerprints)


def _compare_fingerprints(
  path: Path, found: Mapping[str, str], asked: Mapping[str, str]
) -> None:
  for name in sorted(found.keys() | asked.keys()):
    if found.get(name) != asked.get(name):
      raise ValueError(
        f"the ledger at {path} was made with other inputs: fingerprint"
        f" {name!r} is {found.get(name)!r} there and {asked.get(name)!r} here."
        " Use another folder, or the inputs it was made with, which"
        f" `gradmimic inspect {path}` lists."
      )


def _count(name: str, value: Any, limit: int) -> int:
  try:
    if isinstance(value, (bool, np.bool_)):
      raise TypeError
    count = operator.index(value)
  except TypeError as error:
    raise TypeError(f"{name} is {value!r}; expected an integer.") from error
  if not 0 <= count <= limit:
    raise ValueError(f"{name} is {count}; expected 0 <= {name} <= {limit}.")
  return count


def _spread(
  step: Any, epoch: Any, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Gives every row of `[n]` or `[K, n]` its step and its epoch."""
  count = shape[0] if len(shape) == 2 else 1
  steps = _counts("step", step, 2**63 - 1, count)
  epochs = _counts("epoch", epoch, 2**31 - 1, count)
  if steps.ndim == 0:
    steps = steps + np.arange(count)
  if (steps[1:] <= steps[:-1]).any():
    raise ValueError(f"step is {steps.tolist()}; expected ascending steps.")
  epochs = np.broadcast_to(epochs, count).astype(np.int32)
  if len(shape) == 1:
    return np.repeat(steps, shape[0]), np.repeat(epochs, shape[0])
  wide = steps[:, None], epochs[:, None]
  return np.repeat(wide[0], shape[1], axis=1), np.repeat(
    wide[1], shape[1], axis=1
  )


def _counts(name: str, value: Any, limit: int, count: int) -> np.ndarray:
  """Checks a number for all of K steps, or one for each: int64 [] or [K]."""
  if np.ndim(value) == 0:
    return np.asarray(_count(name, value, limit), np.int64)
  array = np.asarray(value)
  if array.dtype.kind not in "iu":
    raise TypeError(f"{name} has dtype {array.dtype}; expected integers.")
  if array.shape != (count,):
    raise ValueError(
      f"{name} has shape {array.shape}, and ids are of {count} step(s);"
      f" expected one number, or [{count}]."
    )
  for extreme in (array.min(initial=0), array.max(initial=0)):
    _count(name, extreme, limit)
  return array.astype(np.int64)


def _floats(
  name: str, values: Any, shape: tuple[int, ...]
) -> np.ndarray | None:
  """Copies values to float32 of that shape; None stays None."""
  if values is None:
    return None
  array = np.asarray(values)
  if array.shape != shape:
    expected = f"there are {shape[0]} ids; expected [{shape[0]}]"
    if len(shape) == 2:
      expected = f"ids have shape {shape}; expected that"
    raise ValueError(
      f"{name} has shape {array.shape}, but {expected}, one value an id."
    )
  if not np.can_cast(array.dtype, np.float32, "same_kind"):
    raise TypeError(f"{name} has dtype {array.dtype}; expected real numbers.")
  with np.errstate(over="ignore"):  # beyond float32 is infinite, and legal
    return array.astype(np.float32, copy=True)


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
  if mask is None:
    return np.ones(shape, bool)
  array = np.asarray(mask)
  if array.dtype != bool:
    raise TypeError(f"mask has dtype {array.dtype}; expected bool.")
  if array.shape != shape:
    raise ValueError(f"mask has shape {array.shape}; expected {shape}.")
  return array


def _checked_ids(ids: np.ndarray, steps: np.ndarray) -> tuple[str, pa.Array]:
  """Finds the kind of ids [n] and copies them; none negative, none twice."""
  if ids.dtype.kind in "iu":
    if ids.min() < 0:
      raise ValueError(
        f"ids holds {ids.min()}; expected ids >= 0. Leave padding out:"
        " append(ids[mask], scores[mask], ...)."
      )
    if ids.max() > 2**63 - 1:
      raise ValueError(f"ids holds {ids.max()}, which doesn't fit in int64.")
    codes = ids.astype(np.int64, copy=True)
    kind, checked = "integer", _as_arrow(codes)
  elif ids.dtype.kind in "UTO":
    try:
      # By way of objects: Arrow ends a NumPy string at its first NUL.
      kind, checked = "string", pa.array(ids.astype(object), pa.string())
    except pa.ArrowException as error:
      raise TypeError(f"ids are not all strings: {error}.") from error
    if checked.null_count:
      raise TypeError("ids holds None or NaN; expected a string a sample.")
  else:
    raise TypeError(
      f"ids has dtype {ids.dtype}; expected integers >= 0 or strings."
    )
  if kind == "string":
    codes = checked.dictionary_encode().indices.to_numpy()
  order = np.lexsort((codes, steps))
  codes, ordered = codes[order], steps[order]
  twice = (codes[1:] == codes[:-1]) & (ordered[1:] == ordered[:-1])
  if twice.any():
    row = order[np.argmax(twice)]
    count = np.sum((codes == codes[np.argmax(twice)]) & (ordered == steps[row]))
    raise ValueError(
      f"ids repeat within one step: {checked[row].as_py()!r} came {count}"
      " times. Append each sample of a step once; leave padding out."
    )
  return kind, checked


def _as_arrow(array: np.ndarray) -> pa.Array:
  """Takes an array of numbers as Arrow's, without copying it.

  `pa.array` imports pandas, which takes half a second.
  """
  buffers = [None, pa.py_buffer(np.ascontiguousarray(array))]
  kind = pa.from_numpy_dtype(array.dtype)
  return pa.Array.from_buffers(kind, len(array), buffers)


def _numpy_ids(ids: pa.Array) -> np.ndarray:
  array = ids.to_numpy(zero_copy_only=False)
  # A fixed-width string array needs no pickle to be saved; objects do.
  return array.astype(np.str_) if ids.type == pa.string() else array
