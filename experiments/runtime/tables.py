"""Rows of results as CSV and Markdown."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import gradmimic_jax as gm


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
  """Computes the mean and its standard error, None for a single value."""
  if len(values) < 2:
    return float(np.mean(values)), None
  error = np.std(values, ddof=1) / math.sqrt(len(values))
  return float(np.mean(values)), float(error)


def accuracy(row: dict[str, Any] | None, digits: int = 4) -> str:
  """Formats a row's test accuracy with its standard error."""
  if row is None:
    return "-"
  return with_error(row["test_accuracy"], row["test_accuracy_error"], digits)


def with_error(mean: float, error: float | None, digits: int) -> str:
  """Formats `mean ± error`."""
  text = f"{mean:.{digits}f}"
  return text if error is None else f"{text} ± {error:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
  """Formats a number, or a dash where there is none."""
  return "-" if value is None else f"{value:.{digits}f}"


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
  """Formats rows as CSV, with the columns of all rows together.

  Text that a spreadsheet would take for a formula gets an apostrophe in front,
  as `gm.export.harmless` says; numbers below zero are numbers.
  """
  columns = list(dict.fromkeys(key for row in rows for key in row))
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(map(_cell, columns))
  writer.writerows([_cell(row.get(key)) for key in columns] for row in rows)
  return text.getvalue()


def _cell(value):
  if value is None or isinstance(value, (bool, int, float, np.number)):
    return value
  return gm.export.harmless(str(value))


def markdown(
  header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Iterator[str]:
  """Yields the lines of a Markdown table."""
  yield f"| {' | '.join(header)} |"
  yield f"|{'---|' * len(header)}"
  for row in rows:
    yield f"| {' | '.join(row)} |"
