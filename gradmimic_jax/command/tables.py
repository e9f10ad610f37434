"""Tables of scores, as `curate` takes them: wide or long, CSV or Parquet."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradmimic_jax import _files, _frames
from gradmimic_jax.selection import _columns, _csv, _ids

SUFFIXES = (".csv", ".tsv", ".parquet")
_LOOK = 1000  # rows by which a column's kind is told
_COMMAS = " Decimal commas aren't read: write 0.5, not 0,5."
_LONGEST_LINE = 1 << 16  # bytes of the line of names that are looked at
_STEPS = ("step", "epoch", "iteration", "checkpoint", "round")


class File:
  """A table's file; columns are read when they are asked for.

  Args:
    path: of a CSV or Parquet file.

  Raises:
    OSError: there is no such file.
    ValueError: it is of another kind, damaged, or empty.
  """

  def __init__(self, path: Path):
    self.path = path
    if path.suffix.lower() not in SUFFIXES:
      raise ValueError(
        f"{path} ends with {path.suffix or 'no suffix'!r}; expected a table,"
        f" one of {', '.join(SUFFIXES)}, or a ledger's folder."
      )
    self.is_text = path.suffix.lower() != ".parquet"
    self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    content = _files.read_bytes(path)
    if not content:
      raise ValueError(f"{path} is empty; expected a line of names, and rows.")
    self._content = content
    first_line = content[:_LONGEST_LINE].split(b"\n", 1)[0]
    if self._delimiter == "," and b";" in first_line and b"," not in first_line:
      self._delimiter = ";"  # as spreadsheets of half of Europe write it
    with _files.named(path, "table"):
      if self.is_text:
        names, first = _csv.first_records(content, delimiter=self._delimiter)
        if not first:
          raise ValueError("it has no rows")
        self.names = names
        tell = _csv.quotes_tell(content, first)
        self._quoted = [tell and cell.startswith(b'"') for cell in first]
      else:
        schema = pq.read_schema(pa.BufferReader(content))
        self.names = schema.names
    for name in self.names:
      if self.names.count(name) > 1:
        raise ValueError(
          f"{path} has {self.names.count(name)} columns {name!r}; expected"
          " names that differ."
        )

  def check(self, name: str, flag: str) -> str:
    """Returns the name of a column; ValueError if there is none."""
    if name not in self.names:
      near = difflib.get_close_matches(name, self.names, 1)
      raise ValueError(
        f"{flag} is {name!r}, and {self.path} has no such column"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" It has {shown(self.names)}."
      )
    return name

  def read(self, name: str) -> pa.Array:
    """Reads a column: text as it is written, if the file is text."""
    with _files.named(self.path, "table"):
      if self.is_text:
        table = _csv.read_text(self._content, [name], delimiter=self._delimiter)
      else:
        table = pq.read_table(pa.BufferReader(self._content), columns=[name])
      return _columns.whole(table[name])

  def sha256(self) -> str:
    """Computes the SHA-256 of the file's bytes."""
    return hashlib.sha256(self._content).hexdigest()

  def head(self) -> pa.Table:
    """Reads the first rows of all columns."""
    with _files.named(self.path, "table"):
      if not self.is_text:
        file = pq.ParquetFile(pa.BufferReader(self._content))
        batch = next(file.iter_batches(_LOOK), None)
        if batch is None:
          raise ValueError("it has no rows")
        return pa.Table.from_batches([batch])
      content, place = self._content, -1
      for _ in range(_LOOK + 1):
        place = content.find(b"\n", place + 1)
        if place < 0:
          break
      # A cell may hold an end of a line, so that the last row may be torn.
      head = content if place < 0 else content[: place + 1]
      while head.count(b'"') % 2 and place >= 0:
        place = content.find(b"\n", place + 1)
        head = content if place < 0 else content[: place + 1]
      return _csv.read_text(head, self.names, delimiter=self._delimiter)

  def ids(self, name: str, *, repeat: bool = False) -> np.ndarray:
    """Reads a column of ids: integers, or strings."""
    column = self.read(name)
    with _files.named(self.path):
      if self.is_text:
        quoted = self._quoted[self.names.index(name)]
        column = _csv.restored_ids(column, quoted, None)
      if column.null_count or (
        _columns.is_text(column)
        and (not repeat and pc.any(pc.equal(column, "")).as_py())
      ):
        raise ValueError(
          f"{self.path}: a row has no {name!r}; expected an id in every row."
        )
      if repeat:
        if _columns.is_text(column):
          return _columns.strings(column, name)
        return _ids.checked(column.to_numpy(zero_copy_only=False), name)
      try:
        return _columns.checked_ids(column)
      except ValueError as error:
        if "times" not in str(error):
          raise ValueError(f"{self.path}, column {name!r}: {error}.") from error
        raise ValueError(
          f"{self.path}, column {name!r}: {error}, and every row should be"
          " another sample's. Of a table with a row a sample and step, say so:"
          f" --long {','.join(self._long_guess(name))}"
        ) from error

  def numbers(self, name: str) -> np.ndarray:
    """Reads a column of numbers as float64, nan where one is missing."""
    column = self.read(name)
    try:
      return _columns.numbers(column, name)
    except ValueError as error:
      raise ValueError(self._no_numbers(column, name)) from error

  def matrix(self, names: Sequence[str]) -> np.ndarray:
    """Reads columns of numbers as float64 [N, T], nan where one is missing."""
    if self.is_text:
      try:
        table = _csv.read_numbers(
          self._content, names, delimiter=self._delimiter
        )
      except pa.ArrowInvalid:  # other words for a missing one, or no numbers
        pass
      else:
        values = np.empty((len(table), len(names)))
        for place, name in enumerate(names):
          values[:, place] = table[name].to_numpy()
        return values
    return np.stack([self.numbers(name) for name in names], axis=1)

  def texts(self, name: str) -> np.ndarray:
    """Reads a column as strings; missing ones are empty."""
    column = self.read(name)
    if not _columns.is_text(column):
      column = column.cast(pa.large_string())
    return _columns.strings(pc.fill_null(column, ""), name)

  def labels(self, name: str) -> np.ndarray:
    """Reads a column of labels: integers, or names."""
    column = self.read(name)
    if column.null_count:
      raise ValueError(
        f"{self.path}: {column.null_count:,} rows have no {name!r}; expected a"
        " label in every row."
      )
    if self.is_text and not self._quoted[self.names.index(name)]:
      return as_labels(_columns.strings(column, name))
    if _columns.is_text(column):
      return _columns.strings(column, name)
    return as_labels(column.to_numpy(zero_copy_only=False))

  def _no_numbers(self, column: pa.Array, name: str) -> str:
    if not _columns.is_text(column):
      return f"{self.path}: column {name!r} is of {column.type}, no numbers."
    for row, value in enumerate(column.to_pylist()):
      try:
        _columns.numbers(pa.array([value], pa.large_string()), name)
      except ValueError:
        return (
          f"{self.path}: column {name!r} holds text, such as {value!r:.60} in"
          f" row {row + 1}; expected numbers."
          + _COMMAS * ("," in value)
          + " Choose the columns of scores: --scores 'a,b' or --scores 'step_*'"
        )
    return f"{self.path}: column {name!r} holds no numbers."

  def _long_guess(self, id_name: str) -> list[str]:
    step = [n for n in self.names if n.strip().lower() in _STEPS]
    score = [n for n in self.names if "score" in n.lower()]
    return [id_name, (step or ["STEP"])[0], (score or ["SCORE"])[0]]


@dataclasses.dataclass(frozen=True)
class Table:
  """Scores, and whose they are."""

  ids: np.ndarray  # [N]
  scores: np.ndarray  # [N, T]
  steps: list[str]  # [T], the names of the columns, or the steps
  id_name: str | None  # the column of ids; None: they are positions
  rows: np.ndarray | None = None  # of a long table: each sample's first row
  notes: list[str] = dataclasses.field(default_factory=list)


def read_wide(
  file: File,
  *,
  id_name: str | None,
  scores: str | None,
  others: Sequence[str],
) -> Table:
  """Reads a table with a row a sample and a column a step.

  Args:
    file: the table's.
    id_name: the column of ids; None: found by its name, or positions.
    scores: names with commas, or a pattern; None: all columns of numbers.
    others: columns that are something else.

  Returns:
    The Table.

  Raises:
    ValueError: no such column, ids that repeat, scores that are no numbers.
  """
  notes: list[str] = []
  if id_name is None:
    id_name = find_id(file)
  else:
    file.check(id_name, "--id")
  ids = None if id_name is None else file.ids(id_name)
  taken = {*others, id_name}
  if scores is None:
    steps = _find_scores(file, taken, notes)
  else:
    steps = _named_scores(file, scores)
    for name in steps:
      if name == id_name:
        raise ValueError(
          f"--scores takes {name!r}, the column of ids; leave it out."
        )
  values = file.matrix(steps)
  if ids is None:
    ids = np.arange(len(values))
    told = "no column of ids: samples are numbered by row, from 0"
    if unique := _find_names(file, {*others, *steps}):
      told += f"; if {unique!r} names them: --id {_quoted(unique)}"
    notes.append(told)
  return Table(ids, _finite(values, file, steps), steps, id_name, None, notes)


def read_long(file: File, names: str) -> Table:
  """Reads a table with a row a sample and step.

  Args:
    file: the table's.
    names: of the columns of ids, steps and scores, with commas.

  Returns:
    The Table; samples are in order of their first rows, steps ascend.

  Raises:
    ValueError: not three names, no such column, a sample that has two scores of
      a step.
  """
  parts = [part.strip() for part in names.split(",")]
  if len(parts) != 3 or len(set(parts)) < 3:
    raise ValueError(
      f"--long is {names!r}; expected the names of three columns, those of ids,"
      " steps and scores: --long id,step,score"
    )
  for part in parts:
    file.check(part, "--long")
  id_name, step_name, score_name = parts
  ids = file.ids(id_name, repeat=True)
  values = file.numbers(score_name)
  column = file.read(step_name)
  try:
    steps = _columns.numbers(column, step_name)
  except ValueError:
    steps = file.texts(step_name)
  if steps.dtype.kind == "f" and np.isnan(steps).any():
    raise ValueError(f"{file.path}: a row has no {step_name!r}.")
  unique, first, place = np.unique(ids, return_index=True, return_inverse=True)
  order = np.argsort(first, kind="stable")
  rank = np.empty(len(order), np.int64)
  rank[order] = np.arange(len(order))
  known, column_of = np.unique(steps, return_inverse=True)
  if len(known) > len(ids) / 2 and len(unique) < len(known):
    raise ValueError(
      f"{file.path}: column {step_name!r} has {len(known):,} different values"
      f" and {id_name!r} {len(unique):,}; are they swapped in --long?"
    )
  cell = rank[place] * len(known) + column_of
  counts = np.bincount(cell, minlength=len(unique) * len(known))
  if counts.max() > 1:
    row = int(np.flatnonzero(counts[cell] > 1)[0])
    raise ValueError(
      f"{file.path}: {id_name} {ids[row].item()!r} has {counts[cell[row]]}"
      f" scores of {step_name} {steps[row].item()!r}; expected one. Is there a"
      " better column of steps?"
    )
  scores = np.full((len(unique), len(known)), np.nan)
  scores.ravel()[cell] = values
  named = [
    f"{step:g}" if steps.dtype.kind == "f" else str(step) for step in known
  ]
  return Table(
    unique[order],
    _finite(scores, file, [score_name]),
    named,
    id_name,
    first[order],
  )


def find_id(file: File) -> str | None:
  """Finds the column of ids by its name; None if there is none."""
  named = [n for n in file.names if n in ("id", "uid")][:1]
  named = named or [
    n for n in file.names if n and _frames.is_id_name(n) and not _numbered(n)
  ]
  if len(named) > 1:
    raise ValueError(
      f"{file.path} has the columns {shown(named)}, any of which may hold the"
      f" ids; say which: --id {_quoted(named[0])}"
    )
  if not named:  # the index that pandas writes
    named = [n for n in file.names[:1] if not n.strip() or _numbered(n)]
  return named[0] if named else None


def _find_names(file: File, taken: set[str]) -> str | None:
  """Finds a column of texts that all differ, as names of files do."""
  head = file.head()
  for name in file.names:
    column = _columns.whole(head[name])
    if (
      name not in taken
      and not _frames.is_label_name(name)
      and _columns.is_text(column)
      and len(column) == pc.count_distinct(column).as_py() > 1
    ):
      return name
  return None


def _numbered(name: str) -> bool:
  return name.strip().lower().startswith(("unnamed:", "__index"))


def _find_scores(file: File, taken: set[Any], notes: list[str]) -> list[str]:
  """Finds the columns of numbers that may be scores."""
  head = file.head()
  found, unsure, texts = [], [], []
  for name in file.names:
    if name in taken or not name.strip() or _numbered(name):
      continue
    if _frames.is_label_name(name):
      notes.append(
        f"column {name!r} is left out; if it holds labels: --labels"
        f" {_quoted(name)}"
      )
      continue
    kind, share = _kind(_columns.whole(head[name]))
    if kind == "text" and share > 0.5:
      file.numbers(name)  # raises, and says where
    if kind == "text":
      texts.append(name)
    elif kind == "float" and not _frames.is_id_name(name):
      found.append(name)
    elif kind != "empty":
      unsure.append(name)
  if unsure:
    which = found or [n for n in unsure if not _frames.is_id_name(n)]
    raise ValueError(
      f"{file.path}: column {unsure[0]!r} looks like ids or counts among the"
      f" scores. If it holds the ids: --id {_quoted(unsure[0])}; else name the"
      f" scores: --scores {_quoted(','.join(which[:6]) or 'a,b')}"
    )
  if not found:
    rest = f" {shown(texts)} hold text." if texts else ""
    example = ""
    if texts:
      example = f" such as {head[texts[0]][0].as_py()!r:.60}"
      rest = f" {texts[0]!r} holds text{example}."
    firsts = [str(head[name][0].as_py()) for name in texts]
    if any(re.fullmatch(r"[+-]?\d*,\d+", first) for first in firsts):
      rest = f"{rest}{_COMMAS}"
    raise ValueError(
      f"{file.path} has no column of scores: its columns are"
      f" {shown(file.names)}.{rest} Expected numbers such as 0.25, a column a"
      " step; or name them: --scores 'a,b'"
    )
  if texts:
    notes.append(f"left out, as text: {shown(texts)}")
  return found


def _kind(column: pa.Array) -> tuple[str, float]:
  """Tells float, integer, text and empty columns; and the share of numbers."""
  if not _columns.is_text(column):
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
      return "float", 1.0
    return ("integer" if pa.types.is_integer(column.type) else "text"), 0.0
  good, whole, there = 0, True, 0
  for value in column.to_pylist():
    text = (value or "").strip()
    if not text or text.lower() in _columns.MISSING:
      continue
    there += 1
    try:
      float(text)
    except ValueError:
      continue
    good += 1
    whole = whole and text.lstrip("+-").isdigit()
  if not there:
    return "empty", 0.0
  if good < there:
    return "text", good / there
  return ("integer" if whole else "float"), 1.0


def _named_scores(file: File, text: str) -> list[str]:
  """Finds the columns that `--scores` names or that fit its pattern."""
  if text in file.names:
    return [text]
  found: list[str] = []
  for part in (part.strip() for part in text.split(",")):
    if part in file.names or not any(sign in part for sign in "*?["):
      found.append(file.check(part, "--scores"))
      continue
    fits = fnmatch.filter(file.names, part)
    if not fits:
      raise ValueError(
        f"--scores is {part!r}, which no column fits: {file.path} has"
        f" {shown(file.names)}."
      )
    found += fits
  return list(dict.fromkeys(found))


def _finite(values: np.ndarray, file: File, names: Sequence[str]) -> np.ndarray:
  if not len(values):
    raise ValueError(f"{file.path} has no rows; expected a row a sample.")
  if not np.isfinite(values).any():
    raise ValueError(
      f"{file.path}: no finite number is in {shown(list(names))}, only missing"
      " ones and nan. Choose other columns: --scores 'a,b'"
    )
  return values


def as_labels(values: np.ndarray) -> np.ndarray:
  """Converts labels [N] to integers, if all are such, or else to strings."""
  if values.dtype.kind == "f" and (values == np.floor(values)).all():
    values = values.astype(np.int64)  # as a missing value elsewhere makes them
  if values.dtype.kind in "OT":
    values = values.astype(np.str_)
  if values.dtype.kind == "U" and len(values):
    if np.char.isdigit(values).all() and np.char.str_len(values).max() < 10:
      return values.astype(np.int64)
    return values
  if values.dtype.kind == "b":
    return np.where(values, "true", "false")
  if values.dtype.kind in "iu" and (values >= 0).all():
    return values.astype(np.int64)
  return values.astype(np.str_)


def shown(names: Sequence[str]) -> str:
  """Lists names, the first ones of many."""
  text = ", ".join(repr(name) for name in names[:8])
  return text + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _quoted(text: str) -> str:
  """Quotes an argument for a shell where it needs that."""
  plain = text.replace("_", "").replace(",", "").replace("-", "")
  return text if plain.isalnum() else repr(text)
