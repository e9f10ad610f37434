"""Documents of text: from a file, or from what ships with Python.

A document stays together when a part of the text is held out.
"""

import ast
import functools
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from experiments.runtime import limits as limits_lib

SUFFIXES = (".txt", ".jsonl", ".parquet")
# The separators of a .txt file's documents: blank lines, or none. Without any,
# each window of the file is held out or not on its own.
DOCUMENTS = ("paragraphs", "windows")

# Modules that aren't everywhere, the same in all versions, or in English.
_LEFT_OUT = {
  *("__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib"),
  *("lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter"),
  *("turtledemo",),
}
_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)
_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_WORD = re.compile(r"[\"'(]*[A-Za-z][a-z'-]*[)\"']*[,;:.?!]*[)\"']*")
_END = re.compile(r"[.?!:][\"')]*$")
_WORDS = 12  # of a paragraph, at least
_PROSE = 0.85  # share of its words that look like English ones


class Document(NamedTuple):
  """One text."""

  name: str
  text: str


def read(
  path: str | pathlib.Path,
  *,
  field: str = "text",
  documents: str = "paragraphs",
  most_bytes: int = 64 << 20,
) -> list[Document]:
  """Reads the documents of a file, without empty ones.

  | file       | a document is                                       |
  |------------|-----------------------------------------------------|
  | `.txt`     | a paragraph (blank lines part them), or all of it   |
  | `.jsonl`   | the text in `field` of a line's object              |
  | `.parquet` | the text in the column `field` of a row             |

  Args:
    path: the file, UTF-8.
    field: of the objects or the table.
    documents: of a `.txt` file: "paragraphs", or "windows" for all of it.
    most_bytes: limit on the text; a larger file is refused before it is in
      memory.

  Returns:
    Documents in the file's order. Their names are numbers from 0: of the line,
    of the row, or of the paragraph.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another suffix, a file that is too large, no UTF-8, no JSON, no
      table, without the field, or without text.
  """
  path = pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise ValueError(
      f"config.data.path {str(path)!r} ends in {path.suffix!r}; expected one of"
      f" {', '.join(SUFFIXES)}."
    )
  if documents not in DOCUMENTS:
    raise ValueError(
      f"config.data.documents is {documents!r}; expected one of"
      f" {', '.join(DOCUMENTS)}."
    )
  if not path.is_file():
    raise FileNotFoundError(
      f"config.data.path is {str(path)!r}, and there is no such file; expected"
      f" one that ends in {', '.join(SUFFIXES)}, or None for the text that"
      " ships with Python."
    )
  found: Iterable[tuple[int, str]]
  if path.suffix == ".parquet":
    found = _read_parquet(path, field, most_bytes)
  elif path.suffix == ".jsonl":
    found = _read_lines(path, _read_text(path, most_bytes), field)
  else:
    text = _read_text(path, most_bytes)
    parts = [text] if documents == "windows" else _BLANK.split(text)
    found = enumerate(filter(None, map(str.strip, parts)))
  kept = [Document(str(name), text) for name, text in found if text.strip()]
  if not kept:
    raise ValueError(f"{path} holds no text; expected some in UTF-8.")
  return kept


@functools.lru_cache(maxsize=1)
def embedded() -> tuple[Document, ...]:
  """Reads English prose about Python from Python itself: about 900 kB.

  It is the help topics of `pydoc`, and texts between triple quotes in the
  standard library: paragraphs of at least 12 words that end as sentences do and
  whose words look like English ones. Each paragraph is there once. The text
  differs a little from one version of Python to the next.

  Returns:
    A document for each topic and for each module that has such paragraphs.

  Raises:
    ValueError: the standard library's source files are not there.
  """
  from pydoc_data import topics

  texts = [(f"topics/{name}", text) for name, text in topics.topics.items()]
  root = _root()
  for path in _library():
    quoted = b"\n\n".join(_QUOTED.findall(path.read_bytes()))
    name = path.relative_to(root).as_posix()
    texts.append((name, quoted.decode("utf-8", "replace")))
  seen: set[str] = set()
  found = []
  for name, text in texts:
    paragraphs = dict.fromkeys(_prose(text))
    fresh = [part for part in paragraphs if part not in seen]
    seen.update(fresh)
    if fresh:
      found.append(Document(name, "\n\n".join(fresh)))
  return tuple(found)


def code(count: int, characters: int, rng: np.random.Generator) -> list[str]:
  """Draws pieces of Python code: no docstring, no comment.

  Args:
    count: number of pieces, n.
    characters: in each.
    rng: draws the modules of the standard library; pieces of one module follow
      one another.

  Returns:
    The pieces `[n]`, no two from the same place.

  Raises:
    ValueError: the standard library hasn't as many.
  """
  pieces: list[str] = []
  paths = _library()
  for number in rng.permutation(len(paths)):
    if len(pieces) >= count:
      break
    text = _bare(paths[number].read_bytes())
    starts = range(0, len(text) - characters + 1, characters)
    pieces += [text[start : start + characters] for start in starts]
  if len(pieces) < count:
    raise ValueError(
      f"the standard library has {len(pieces)} pieces of code of {characters}"
      f" characters, and {count} are asked for; lower config.noise.rate, or"
      " leave the kind 'code' out."
    )
  return pieces[:count]


def _read_text(path, most):
  with open(path, "rb") as file:
    content = file.read(most + 1)
  if len(content) > most:
    raise ValueError(
      f"{path} has more than {most} bytes; expected at most as many: take a"
      " part of it, or raise config.data.most_bytes."
    )
  try:
    return content.decode("utf-8-sig").replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is no UTF-8: byte 0x{content[error.start]:02x} at position"
      f" {error.start}; save it as UTF-8."
    ) from error


def _read_lines(path, text, field) -> Iterator[tuple[int, str]]:
  # Not splitlines: JSON's strings may hold what that takes for an end.
  for number, line in enumerate(text.split("\n")):
    if not line.strip():
      continue
    try:
      value = limits_lib.parse_json(line, most=len(line))
    except ValueError as error:
      raise ValueError(
        f"line {number + 1} of {path} is no JSON: {error}; expected an object a"
        " line."
      ) from error
    if not isinstance(value, dict) or field not in value:
      there = list(value)[:8] if isinstance(value, dict) else type(value)
      raise ValueError(
        f"line {number + 1} of {path} has no field {field!r} (there is"
        f" {there}); set config.data.field to the one that holds the text."
      )
    if not isinstance(value[field], str):
      raise ValueError(
        f"line {number + 1} of {path} has a {type(value[field]).__name__} in"
        f" {field!r}; expected text: set config.data.field to the one that"
        " holds it."
      )
    # Half of a surrogate pair is no character, and can't be encoded.
    yield number, value[field].encode("utf-8", "replace").decode()


def _read_parquet(path, field, most) -> list[tuple[int, str]]:
  found = []
  try:
    with parquet.ParquetFile(path) as file:
      schema = file.schema_arrow
      if schema.names.count(field) != 1:
        raise ValueError(
          f"{path} has the columns {schema.names[:20]} and not one {field!r};"
          " set config.data.field to the one that holds the text."
        )
      kind = schema.field(field).type
      if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(
          f"column {field!r} of {path} holds {kind} values; expected text: set"
          " config.data.field to the column that holds it."
        )
      _check_size(path, _claimed(file, field), most)
      number = read = 0
      for rows in file.iter_batches(batch_size=1024, columns=[field]):
        rows.validate(full=True)  # a file may hold what is no UTF-8
        read += rows.nbytes
        _check_size(path, read, most)
        for text in rows[0].to_pylist():
          if text is not None:
            found.append((number, text))
          number += 1
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} can't be read as a Parquet file: {str(error)[:300]}"
    ) from error
  return found


def _claimed(file, field):
  """Bytes of the column, unpacked, as the file has it."""
  groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
  return sum(
    group.column(place).total_uncompressed_size
    for group in groups
    for place in range(group.num_columns)
    if group.column(place).path_in_schema == field
  )


def _check_size(path, size, most):
  if size > most:
    raise ValueError(
      f"{path} holds more than {most} bytes of text; expected at most as many:"
      " take a part of it, or raise config.data.most_bytes."
    )


def _root() -> pathlib.Path:
  return pathlib.Path(sysconfig.get_path("stdlib"))


@functools.lru_cache(maxsize=1)
def _library() -> Sequence[pathlib.Path]:
  """Lists the standard library's modules, in the order of their names."""
  found: list[pathlib.Path] = []
  for folder, folders, names in os.walk(_root()):
    folders[:] = set(folders) - _LEFT_OUT  # site-packages may be large
    found += [pathlib.Path(folder, x) for x in names if x.endswith(".py")]
  if not found:
    raise ValueError(
      f"there are no source files of Python's standard library in {_root()},"
      " which the embedded text and the noise of kind 'code' are from; set"
      " config.data.path to a file of text, and leave 'code' out of"
      " config.noise.kinds."
    )
  return sorted(found)


def _prose(text) -> Iterator[str]:
  """Yields the paragraphs that are English sentences, a space between words."""
  for paragraph in _BLANK.split(text):
    words = paragraph.split()
    if len(words) < _WORDS or not _END.search(words[-1]):
      continue
    english = sum(map(_looks_english, words))
    if english >= _PROSE * len(words):
      yield " ".join(words)


@functools.lru_cache(maxsize=1 << 16)  # most words come again
def _looks_english(word) -> bool:
  return _WORD.fullmatch(word) is not None


def _bare(source) -> str:
  """Strips docstrings and comments from a module's code."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # invalid escapes of old modules
    tree = ast.parse(source)
  for node in ast.walk(tree):
    body = getattr(node, "body", None)
    if not isinstance(body, list):
      continue
    # A text that stands alone does nothing, docstring or not.
    body[:] = [line for line in body if not _is_text(line)] or [ast.Pass()]
  return ast.unparse(ast.fix_missing_locations(tree))


def _is_text(line):
  return (
    isinstance(line, ast.Expr)
    and isinstance(line.value, ast.Constant)
    and isinstance(line.value.value, str)
  )
