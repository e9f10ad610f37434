"""Tables of what was found: for pandas, and for notebooks to show."""

from __future__ import annotations

import html as html_lib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
  import pandas as pd

ROWS = 10  # that a notebook shows
_COLUMNS = 12
_TEXT = 60  # characters of a cell


def numbers(values: np.ndarray) -> pa.Array:
  """Converts floats to Arrow's, null where they are nan."""
  return pa.array(values, from_pandas=True)


def to_pandas(table: pa.Table, *, index: str | None = None) -> pd.DataFrame:
  """Converts a table to a pandas DataFrame.

  Args:
    table: any.
    index: the name of the column that becomes the index; None: the rows are
      numbered.

  Returns:
    The DataFrame.

  Raises:
    ModuleNotFoundError: pandas is not installed.
  """
  try:
    frame = table.to_pandas()
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "to_pandas needs pandas: pip install pandas. Without it, to_arrow()"
      " gives what polars and others read."
    ) from error
  return frame if index is None else frame.set_index(index)


def html(
  value: Any, table: pa.Table | None = None, *, n_rows: int | None = None
) -> str:
  r"""Formats a value for a notebook: its text, and a table's first rows.

  Args:
    value: whose `str` sums it up.
    table: its first rows, or all of them; None: the text says it all.
    n_rows: how many rows there are; as many as the table has if not given.

  Returns:
    HTML; names and ids are shown as they are written, and never as HTML.

  Example:
    >>> html("1 id", pa.table({"id": ["<b>"]}))[-50:]
    '<tr><td>&lt;b&gt;</td></tr>\n</tbody></table></div>'
  """
  text = f"<div><pre>{html_lib.escape(str(value))}</pre>"
  if table is None:
    return f"{text}</div>"
  names = table.column_names[:_COLUMNS]
  lines = [
    text,
    "<table><thead><tr>"
    + "".join(f"<th>{_cell(name)}</th>" for name in names)
    + "</tr></thead><tbody>",
  ]
  for row in table.select(names).slice(0, ROWS).to_pylist():
    cells = "".join(f"<td>{_cell(row[name])}</td>" for name in names)
    lines.append(f"<tr>{cells}</tr>")
  lines.append("</tbody></table></div>")
  n_rows = len(table) if n_rows is None else n_rows
  rows, columns = n_rows - ROWS, table.num_columns - len(names)
  more = [f"{rows:,} more rows"] * (rows > 0)
  more += [f"{columns:,} more columns"] * (columns > 0)
  if more:
    lines.insert(-1, "</tbody></table>")
    lines[-1] = f"<p>and {', '.join(more)}</p></div>"
  return "\n".join(lines)


def _cell(value: Any) -> str:
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return "\N{EN DASH}"
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  if len(text) > _TEXT:
    text = text[: _TEXT - 1] + "…"
  return html_lib.escape(text)
