"""CSV tables: ids keep their type, and no spreadsheet runs them.

Text is quoted and numbers are not, by which a reader tells the id "007" from 7.
A cell that a spreadsheet would take for a formula gets an apostrophe in front,
and so does one that begins with an apostrophe: reading takes each off again.
"""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from gradmimic_jax.selection import _columns

# Signs that a spreadsheet takes for the beginning of a formula, also after
# blanks and in East Asian width; and the sign that escapes them.
_SIGNS = "=+\\-@'\uff1d\uff0b\uff0d\uff20"
_BLANK = "\\x00-\\x20\u00a0\u3000\ufeff"
_UNSAFE = f"^(?:[{_BLANK}]*[{_SIGNS}]|[\\t\\r\\n])"
_ESCAPED = f"^'(?:[{_BLANK}]*[{_SIGNS}]|[\\t\\r\\n])"
_INTEGER = "^(?:0|[1-9][0-9]*)$"
_DIGITS = "^[0-9]+$"
_NUMBER = (
  "^[ \\t]*[+-]?(?:[0-9]+\\.?[0-9]*|\\.[0-9]+)(?:[eE][+-]?[0-9]+)?[ \\t]*$"
)
# Possessive, so that a cell of any length takes no memory.
_CELL = re.compile(rb'("(?:[^"]++|"")*+"[^,\r\n]*+|[^,\r\n]*+)(,|\r?\n|\r|$)')
_BLOCK = 1 << 26  # bytes that are parsed at a time; no cell may be longer
_BOM = b"\xef\xbb\xbf"


def harmless(text: str) -> str:
  """Escapes a cell's text that a spreadsheet would take for a formula.

  Args:
    text: anything.

  Returns:
    The text, with an apostrophe in front if it needs one.

  Example:
    >>> [harmless(text) for text in ("=1+1", "-2", "'a", "a=1")]
    ["'=1+1", "'-2", "''a", 'a=1']
  """
  return f"'{text}" if re.match(_UNSAFE, text) else text


def harmless_column(column: pa.Array) -> pa.Array:
  """Escapes a column of strings, as `harmless` does."""
  unsafe = pc.match_substring_regex(column, _UNSAFE)
  if not pc.any(unsafe).as_py():
    return column
  with_sign = pc.binary_join_element_wise(
    pa.scalar("'", column.type), column, pa.scalar("", column.type)
  )
  return pc.if_else(unsafe, with_sign, column)


def restored_column(column: pa.Array) -> pa.Array:
  """Undoes `harmless_column`."""
  escaped = pc.match_substring_regex(column, _ESCAPED)
  if not pc.any(escaped).as_py():
    return column
  without_sign = pc.utf8_slice_codeunits(column, 1)
  return pc.if_else(escaped, without_sign, column)


def read(content: bytes | bytearray, *, escaped: bool | None) -> pa.Table:
  """Reads a selection's table: ids as integers or text, all else as written.

  Args:
    content: of the file.
    escaped: whether formulas in it have the apostrophe; None if not known, as
      in files of an earlier release or of another tool.

  Returns:
    The table; its columns but for `id` are text.

  Raises:
    ValueError: no table of a selection; ids that another tool has changed.
  """
  header, first = first_records(content)
  if not first:
    raise ValueError("it has no rows")
  steps = [name for name in header if name.startswith("vote_")]
  if (
    tuple(header[: len(_columns.NAMES)]) != _columns.NAMES
    or not steps
    or steps != [f"vote_{step}" for step in range(len(steps))]
    or len(set(header)) < len(header)
  ):
    raise ValueError(
      f"it has columns {header}; expected {list(_columns.NAMES)} and vote_0,"
      " vote_1, ..., separated by commas and without a column of row names"
    )
  table = read_text(content, [*_columns.NAMES, *steps])
  quoted = first[0].startswith(b'"')
  if quoted and any(cell.startswith(b'"') for cell in first[2:]):
    quoted = False  # as all is, quotes say nothing
  ids = restored_ids(
    _columns.whole(table["id"]), quoted, escaped, _leaves_formulas(content)
  )
  return table.set_column(0, "id", ids)


def read_text(content: bytes | bytearray, columns: list[str]) -> pa.Table:
  """Reads columns of a table as the text that is written."""
  return pa_csv.read_csv(
    pa.BufferReader(content),
    read_options=pa_csv.ReadOptions(block_size=_BLOCK),
    parse_options=pa_csv.ParseOptions(newlines_in_values=True),
    convert_options=pa_csv.ConvertOptions(
      include_columns=columns,
      column_types={name: pa.large_string() for name in columns},
      null_values=[],
      strings_can_be_null=False,
      quoted_strings_can_be_null=False,
    ),
  )


def restored_ids(
  text: pa.Array, quoted: bool, escaped: bool | None, formulas: bool = False
) -> pa.Array:
  """Makes a column of ids what it was before it was written.

  Args:
    text: as it is written.
    quoted: whether quotes say that it is text.
    escaped: as `read` takes it.
    formulas: whether the writer left formulas as they are.

  Returns:
    Integers or text.

  Raises:
    ValueError: ids that another tool has changed.
  """
  ids = text if quoted else _numbers_or_text(text)
  if _columns.is_text(ids):
    if escaped is None:
      escaped = not formulas and _looks_escaped(ids)
    if escaped:
      ids = restored_column(ids)
  return ids


def _leaves_formulas(content: bytes | bytearray) -> bool:
  """True for files of the earlier releases, which didn't escape formulas."""
  if not content.startswith(b'"id","keep"'):
    return False
  _, first = first_records(content)
  return first[1] in (b"true", b"false")


def _looks_escaped(ids: pa.Array) -> bool:
  """True if `harmless` may have been applied to all of the ids."""
  signed = pc.starts_with(ids, "'")
  fits = pc.equal(signed, pc.match_substring_regex(ids, _ESCAPED))
  unsafe = pc.and_not(pc.match_substring_regex(ids, _UNSAFE), signed)
  return pc.all(fits).as_py() and not pc.any(unsafe).as_py()


def _numbers_or_text(text: pa.Array) -> pa.Array:
  """Converts ids without quotes to integers, if all are written as such."""

  def all_match(pattern: str, column: pa.Array) -> bool:
    return pc.all(pc.match_substring_regex(column, pattern)).as_py()

  if all_match(_INTEGER, text):
    for kind in (pa.int64(), pa.uint64()):
      try:
        return text.cast(kind)
      except pa.ArrowInvalid:  # too long for it
        continue
    return text
  there = text.filter(pc.not_equal(pc.utf8_trim_whitespace(text), ""))
  if len(there) and all_match(_NUMBER, there):
    if len(there) < len(text) and all_match(_INTEGER, there):
      raise ValueError("ids are missing, and the others are integers")
    if not all_match(_DIGITS, there):
      odd = there.filter(pc.invert(pc.match_substring_regex(there, _DIGITS)))
      raise ValueError(
        f"ids such as {odd[0].as_py()!r} are numbers as a spreadsheet or a data"
        " frame rewrites ids; write integers, or text in quotes"
      )
  return text


def first_records(
  content: bytes | bytearray,
) -> tuple[list[str], list[bytes]]:
  """Returns the names of the columns, and the first row's cells as written.

  Args:
    content: of a CSV file.

  Returns:
    Names, and the cells with their quotes; no cells if there are no rows.

  Raises:
    ValueError: nothing is in it, or a cell doesn't end.
  """
  place = len(_BOM) if content[:3] == _BOM else 0
  records: list[list[bytes]] = []
  while len(records) < 2:
    record: list[bytes] = []
    end = b","
    while end == b",":
      cell = _CELL.match(content, place)
      if cell is None:
        raise ValueError("a cell in it doesn't end")
      end, place = cell[2], cell.end()
      record.append(cell[1])
    if record != [b""]:  # empty lines are no rows
      records.append(record)
    elif place >= len(content):
      if not records:
        raise ValueError("it is empty")
      records.append([])
  names = [cell.decode("utf-8", "replace") for cell in records[0]]
  return [n[1:-1] if n[:1] == '"' else n for n in names], records[1]
