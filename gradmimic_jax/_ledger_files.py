"""The ledger's files on disk: manifest, row files, and lists of these.

All of them are Parquet, of one schema, so that whatever reads a folder of such
files takes this one as it is. Manifest and lists are texts in the metadata of
files without rows; earlier releases had them as plain files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradmimic_jax import _files

FORMAT = "gradmimic_jax.ledger"
VERSION = 1
FIELDS = ("score", "weight", "loss")

MANIFEST = "_manifest.parquet"
_EARLIER_MANIFESTS = ("_manifest.json", "manifest.json")
_TEXT = f"{FORMAT}.text".encode()  # in a Parquet file's metadata
# first step, last step, order of writing, writer, CRC-32 of the file's bytes.
# The checksum sits in the name because a Parquet footer can't hold its own.
# Ledgers of earlier releases had one writer, and named none.
_ROWS_NAME = re.compile(
  r"rows-(\d{9,})-(\d{9,})-(\d{6,})(?:-w(\d{5,}))?-([0-9a-f]{8})\.parquet"
)
# A writer's list of its files, a line each: CRC-32 of the rest, rows, name.
_LISTS, _EARLIER_LISTS = "_files-w*.parquet", "_files-w*.txt"
_LIST_LINE = re.compile(r"([0-9a-f]{8}) (\d+) (rows-\S+)")
ID_TYPES = {"integer": pa.int64(), "string": pa.string()}
# Windows has no such links, and would change the ends of lines.
_NOT_A_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class RowName(NamedTuple):
  """The fields of a row file's name."""

  first_step: int
  last_step: int
  sequence: int
  writer: int
  checksum: str


class RowFile(NamedTuple):
  """The description of a row file, from its name and its footer."""

  path: Path
  sequence: int  # order of writing: the later of two rows for an (id, step)
  writer: int
  checksum: str
  first_step: int
  last_step: int
  n_rows: int
  epochs: tuple[int, ...]


def inspect(path: Path, manifest: Mapping[str, Any]) -> RowFile:
  """Checks a file's name and footer against the manifest."""
  remedy = "Move it out of the ledger's folder."
  named = parse_rows_name(path.name)
  if named is None:
    raise ValueError(
      f"{path} is not a file that this ledger wrote: expected a name like"
      " rows-<first step>-<last step>-<number>-w<writer>-<checksum>.parquet."
      f" {remedy}"
    )
  try:
    footer = pq.read_metadata(path)
  except (pa.ArrowException, OSError) as error:
    raise ValueError(_torn(path, f"it has no Parquet footer ({error})")) from (
      error
    )
  try:
    about = json.loads((footer.metadata or {})[FORMAT.encode()])
    check = about.pop("check", None)  # earlier releases wrote none
    file = RowFile(
      path,
      named.sequence,
      named.writer,
      named.checksum,
      int(about["first_step"]),
      int(about["last_step"]),
      footer.num_rows,
      tuple(map(int, about["epochs"])),
    )
    ours = (
      manifest["ledger_id"],
      digest(manifest["fingerprints"]),
      VERSION,
    )
    theirs = about["ledger_id"], about["fingerprint"], about["version"]
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"{path} is not a ledger's file: its Parquet metadata doesn't say so."
      f" {remedy}"
    ) from error
  # A file's whole bytes are compared with its name when its rows are read.
  if check not in (None, checksum([about, footer.num_rows])):
    raise ValueError(_torn(path, "its Parquet metadata have another checksum"))
  if ours != theirs:
    raise ValueError(
      f"{path} belongs to another ledger: its (ledger id, fingerprint,"
      f" version) is {theirs}, this ledger's is {ours}, by its manifest"
      f" {MANIFEST}. {remedy}"
    )
  if (file.first_step, file.last_step) != named[:2]:
    raise ValueError(
      _torn(
        path,
        f"it has rows of steps {file.first_step} to {file.last_step}, and"
        " another file's name",
      )
    )
  return file


def rows_name(
  first_step: int, last_step: int, sequence: int, writer: int, content: Any
) -> str:
  """Makes the name of a file with these bytes, as `inspect` reads it."""
  return (
    f"rows-{first_step:09d}-{last_step:09d}-{sequence:06d}-w{writer:05d}"
    f"-{zlib.crc32(content):08x}.parquet"
  )


def last_sequence(folder: Path) -> int:
  """Finds the highest sequence number in the files' names; 0 without files."""
  named = (parse_rows_name(path.name) for path in folder.iterdir())
  return max((parts.sequence for parts in named if parts), default=0)


def parse_rows_name(name: str) -> RowName | None:
  """Parses a row file's name; None for the name of another file."""
  named = _ROWS_NAME.fullmatch(name)
  if named is None:
    return None
  first, last, sequence, writer, checksum = named.groups()
  return RowName(
    int(first), int(last), int(sequence), int(writer or 0), checksum
  )


def missing_number(files: Sequence[RowFile]) -> int | None:
  """Finds the first number that no file has, though a later one is there.

  Ledgers of earlier releases have no lists; their files are numbered from 1.
  """
  numbers = {file.sequence for file in files}
  gaps = set(range(1, max(numbers, default=0))) - numbers
  return min(gaps, default=None)


def find_rows(folder: Path) -> list[Path]:
  """Finds the files with rows, by name."""
  return sorted(folder.glob("[!_]*.parquet"))


def list_path(folder: Path, writer: int) -> Path:
  """Returns the path of a writer's list of its files."""
  return folder / _LISTS.replace("*", f"{writer:05d}")


def read_lists(folder: Path, ledger_id: str) -> dict[str, int] | None:
  """Reads all lists: the rows of each file, by name; None without any list."""
  lists = _find_lists(folder)
  listed: dict[str, int] = {}
  for path in lists:
    listed |= _read_list(path, ledger_id)
  return listed if lists else None


def read_own_list(folder: Path, writer: int, ledger_id: str) -> dict[str, int]:
  """Reads one writer's list: the rows of each of its files, by name."""
  listed: dict[str, int] = {}
  for path in _find_lists(folder):
    if path.stem == list_path(folder, writer).stem:
      listed |= _read_list(path, ledger_id)
  return listed


def _find_lists(folder):
  return [*sorted(folder.glob(_EARLIER_LISTS)), *sorted(folder.glob(_LISTS))]


def _read_list(path, ledger_id):
  remedy = (
    "Restore it from a copy; or, if no rows-*.parquet has been lost, delete it:"
    " the next flush writes it again."
  )
  try:
    text = _read_text(path).decode("ascii")
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
  # A kill may have cut off the last line; its file is there all the same.
  head, *lines = text.split("\n")[:-1] or [""]
  if not head.startswith(FORMAT + " "):
    raise ValueError(f"{path} is damaged (no first line). {remedy}")
  if head != f"{FORMAT} {ledger_id}":
    raise ValueError(
      f"{path} belongs to another ledger than {MANIFEST} beside it. {remedy}"
    )
  found = {}
  for number, line in enumerate(lines, 2):
    match = _LIST_LINE.fullmatch(line)
    if match is None or match[1] != _line_checksum(match[2], match[3]):
      raise ValueError(f"{path} is damaged (line {number}). {remedy}")
    found[match[3]] = int(match[2])
  return found


def write_list(
  folder: Path, writer: int, manifest: Mapping[str, Any], files: dict[str, int]
) -> None:
  """Writes a writer's list: the rows of each of its files, by name."""
  lines = [f"{FORMAT} {manifest['ledger_id']}\n"]
  lines += [
    f"{_line_checksum(rows, name)} {rows} {name}\n"
    for name, rows in files.items()
  ]
  path = list_path(folder, writer)
  write_atomically(path, _as_parquet("".join(lines), manifest["id_kind"]))
  path.with_suffix(".txt").unlink(missing_ok=True)  # an earlier release's


def _line_checksum(rows, name):
  return f"{zlib.crc32(f'{rows} {name}'.encode()):08x}"


def find_writers(folder: Path) -> list[int]:
  """Finds the writers that have a list."""
  stems = {path.stem for path in _find_lists(folder)}
  return sorted(int(stem.removeprefix("_files-w")) for stem in stems)


def is_ledger(folder: Path) -> bool:
  """True for a folder with a manifest, be it a damaged one."""
  if any((folder / name).exists() for name in (MANIFEST, "_manifest.json")):
    return True
  try:  # other jobs have manifests of that name, too
    about = json.loads((folder / "manifest.json").read_bytes())
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(about, dict) and about.get("format") == FORMAT


def read_manifest(folder: Path) -> dict[str, Any] | None:
  """Reads and checks the folder's manifest; None if there is none."""
  for name in (MANIFEST, *_EARLIER_MANIFESTS):
    path = folder / name
    try:
      content = _read_text(path)
    except FileNotFoundError:
      continue
    except ValueError as error:
      raise ValueError(_bad_manifest(path, str(error))) from error
    return _checked_manifest(path, content)
  return None


def _as_parquet(text: str, id_kind: str) -> pa.Buffer:
  """Makes a Parquet file without rows whose metadata hold a text."""
  sink = pa.BufferOutputStream()
  about = schema(id_kind).with_metadata({_TEXT: text})
  # Its `empty_table` would import pandas.
  pq.write_table(pa.Table.from_batches([], about), sink)
  return sink.getvalue()


def _read_text(path: Path) -> bytes:
  """Reads the text of a manifest or a list, be it in a Parquet file."""
  content = path.read_bytes()
  if path.suffix != ".parquet":
    return content
  try:
    footer = pq.read_metadata(pa.BufferReader(content))
    return footer.metadata[_TEXT]
  except (pa.ArrowException, OSError, KeyError, TypeError) as error:
    text = " ".join(str(error).split())
    raise ValueError(f"no Parquet file with a text: {text:.100}") from error


def _checked_manifest(path, content):
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(_bad_manifest(path, f"not UTF-8: {error}")) from error
  try:
    manifest = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(_bad_manifest(path, f"not JSON: {error}")) from error
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise ValueError(_bad_manifest(path, f"its format is not {FORMAT!r}"))
  if manifest.pop("check", None) not in (None, checksum(manifest)):
    raise ValueError(_bad_manifest(path, "its checksum is another"))
  if manifest.get("version") != VERSION:
    raise ValueError(
      f"{path} is of version {manifest.get('version')!r}; this gradmimic_jax"
      f" reads version {VERSION}. Read it with the release that wrote it."
    )
  prints = manifest.get("fingerprints")
  if (
    not isinstance(manifest.get("ledger_id"), str)
    or manifest.get("id_kind") not in (*ID_TYPES,)
    or not isinstance(prints, dict)
    or not all(isinstance(value, str) for value in prints.values())
  ):
    raise ValueError(
      _bad_manifest(path, "ledger_id, id_kind or fingerprints is not right")
    )
  return manifest


def write_manifest(
  folder: Path, manifest: Mapping[str, Any], *, writer: int
) -> bool:
  """Writes the manifest unless there is one; True if it was written."""
  sealed = {**manifest, "check": checksum(manifest)}
  text = json.dumps(sealed, indent=2, sort_keys=True) + "\n"
  content = _as_parquet(text, manifest["id_kind"])
  return write_once(folder / MANIFEST, content, writer=writer)


def checksum(value: Any) -> str:
  """Computes eight hex digits that tell JSON-like values apart."""
  return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def group_by_steps(files: Sequence[RowFile]) -> list[list[RowFile]]:
  """Groups files whose step ranges overlap; groups are in order of step."""
  found: list[list[RowFile]] = []
  end = -1
  for file in sorted(files, key=lambda file: file.first_step):
    if not found or file.first_step > end:
      found.append([])
    found[-1].append(file)
    end = max(end, file.last_step)
  return [sorted(group, key=writing_order) for group in found]


def writing_order(file: RowFile) -> tuple[int, int]:
  """Returns a sort key by which the last of two rows for an (id, step) counts.

  Writers that are open at the same time may use the same numbers: they have no
  row in common.
  """
  return file.sequence, file.writer


def latest_rows(table: pa.Table) -> pa.Table:
  """Keeps the last row of each (id, step); sorts by step, then id."""
  ids = table["id"]
  if ids.type == pa.string():
    import pyarrow.compute as pc  # slow, and runs only append

    values = pc.unique(ids)
    ids = pc.index_in(ids, value_set=values.take(pc.sort_indices(values)))
  codes, steps = ids.to_numpy(), table["step"].to_numpy()
  order = np.lexsort((codes, steps))  # stable: rows written later come later
  codes, steps = codes[order], steps[order]
  is_last = np.ones(len(order), bool)
  is_last[:-1] = (codes[1:] != codes[:-1]) | (steps[1:] != steps[:-1])
  return table.take(order[is_last])


def read_rows(file: RowFile, columns: list[str]) -> pa.Table:
  """Reads columns of a file; raises if its bytes aren't those written."""
  content = file.path.read_bytes()
  checksum = f"{zlib.crc32(content):08x}"
  if checksum != file.checksum:
    raise ValueError(
      _torn(
        file.path,
        f"the checksum of its bytes is {checksum}, its name says"
        f" {file.checksum}",
      )
    )
  table = pq.read_table(pa.BufferReader(content), columns=columns)
  return table.replace_schema_metadata(None)


def _torn(path: Path, what: str) -> str:
  return (
    f"{path} is torn or garbled: {what}. A ledger only renames whole files"
    " into place, so it was damaged afterwards (an unfinished copy, a full"
    " disk). Restore it from a copy, or delete it and record the steps in its"
    " name again."
  )


def _bad_manifest(path: Path, what: str) -> str:
  return (
    f"{path} is not the manifest of a ledger ({what}). Restore it, or give the"
    " path of another folder."
  )


def schema(id_kind: str) -> pa.Schema:
  """The columns of a row file."""
  return pa.schema(
    [
      ("id", ID_TYPES[id_kind]),
      ("step", pa.int64()),
      ("epoch", pa.int32()),
      *((field, pa.float32()) for field in FIELDS),
    ]
  )


def write_atomically(path: Path, content: Any) -> None:
  """Writes a file so that it is there whole or not at all."""
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  _write(temporary, content)
  os.replace(temporary, path)
  _files.sync(path.parent)


def write_once(path: Path, content: Any, *, writer: int) -> bool:
  """Writes a file unless it is there; of several writers, one does.

  Args:
    path: the file.
    content: its bytes.
    writer: the writer whose temporary file it is before.

  Returns:
    True if it was written. The file is there, and whole, in either case.
  """
  temporary = path.with_name(
    f".{path.name}.w{writer:05d}.{uuid.uuid4().hex}.tmp"
  )
  _write(temporary, content)
  try:
    os.link(temporary, path)  # fails where there is a file, as a rename doesn't
    _files.sync(path.parent)
  except FileExistsError:
    return False
  except OSError:
    # A file system without hard links. A file that a kill cuts off here is
    # refused by name when it is read.
    try:
      _write(path, content)
    except FileExistsError:
      return False
  finally:
    temporary.unlink(missing_ok=True)
  return True


def _write(path, content):
  """Writes a file that must not be there, nor a link in its place."""
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOT_A_LINK
  with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    except OSError:  # such as a full disk, which a part of a file keeps full
      path.unlink(missing_ok=True)
      raise


def remove_temporary_files(folder: Path, *, writer: int) -> None:
  """Removes the temporary files that this writer's killed writes left."""
  mine = f"w{writer:05d}"
  for pattern in (
    f".rows-*-{mine}-*.tmp",
    f".{MANIFEST}.{mine}.*tmp",
    f".{list_path(folder, writer).name}.*tmp",
  ):
    for path in folder.glob(pattern):
      path.unlink(missing_ok=True)


def digest(fingerprints: Mapping[str, str]) -> str:
  """Computes sixteen hex digits that tell fingerprints apart."""
  text = json.dumps(dict(fingerprints), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
