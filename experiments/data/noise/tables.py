"""Label noise from files: a table of given labels, or a confusion matrix."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

NO_LABEL = -1  # Of a sample that the table has no label for.


def read_labels(
  labels: np.ndarray,
  *,
  num_classes: int,
  path: str | os.PathLike,
  ids: np.ndarray,
  class_names: Sequence[str] | None = None,
  column: str | None = None,
  id_column: str = "id",
) -> np.ndarray:
  """Takes the labels from a table, as people or programs gave them.

  Args:
    labels: int [N], only for their number.
    num_classes: How many classes there are, C.
    path: A .csv file with a header, or a .parquet file. An id comes once.
    ids: The samples' ids [N], compared as text.
    class_names: The names [C], for a column of names.
    column: The column of labels, numbers or class names; may be left out
      where the table has just one besides the ids.
    id_column: The column of ids.

  Returns:
    The new labels [N]; -1 where the table has no label for a sample.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If the file isn't such a table, or has none of the ids.
  """
  import pyarrow.compute as pc  # slow, and most runs have no table

  table = _read_table(path, id_column)
  column = _label_column(table, path, column, id_column)
  known = table[id_column].cast(pa.string())
  if pc.count_distinct(known, mode="all").as_py() < len(known):
    counts = pc.value_counts(known)
    most = max(counts.to_pylist(), key=lambda count: count["counts"])
    raise ValueError(
      f"id {most['values']!r} comes {most['counts']} times in column "
      f"{id_column!r} of {os.fspath(path)}; expected every id once"
    )
  wanted = pa.array(np.asarray(ids).astype(np.str_))
  rows = pc.index_in(wanted, value_set=known)
  if rows.null_count == len(rows):
    first = known[0].as_py() if len(known) else None
    raise ValueError(
      f"none of the {len(rows)} samples' ids (such as {wanted[0].as_py()!r}) "
      f"is in column {id_column!r} of {os.fspath(path)} (such as {first!r}); "
      "check that it belongs to this data set and split, and the id column"
    )
  given = _class_numbers(table[column], column, path, class_names, num_classes)
  taken = pc.fill_null(given.take(rows), NO_LABEL)
  return taken.to_numpy(zero_copy_only=False).astype(np.int32)


def read_matrix(matrix: Any, num_classes: int) -> np.ndarray:
  """Reads a confusion matrix of counts or rates, from an array or a file.

  Args:
    matrix: Numbers [C, C], or the path of a .npy file or of a .csv file
      (numbers only, no header) that holds them.
    num_classes: How many classes there are, C.

  Returns:
    float64 [C, C].

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If it isn't a matrix of that shape, finite and not negative.
  """
  what = "the confusion matrix"
  if isinstance(matrix, (str, os.PathLike)):
    what = f"the confusion matrix {os.fspath(matrix)}"
    suffix = pathlib.Path(matrix).suffix
    if suffix not in (".npy", ".csv"):
      raise ValueError(f"{what} ends in {suffix!r}; expected .npy or .csv")
    try:
      if suffix == ".npy":
        matrix = np.load(matrix, allow_pickle=False)
      else:
        matrix = np.loadtxt(matrix, delimiter=",", ndmin=2)
    except ValueError as error:
      raise ValueError(
        f"{what} can't be read ({error}); expected rows of numbers alone"
      ) from error
  values = np.array(matrix, dtype=np.float64)
  if values.shape != (num_classes, num_classes):
    raise ValueError(
      f"{what} has shape {values.shape}; expected a row and a column for each "
      f"class, {(num_classes, num_classes)}"
    )
  if not (np.isfinite(values) & (values >= 0)).all():
    raise ValueError(
      f"{what} holds {values.min()} .. {values.max()}; expected finite counts "
      "or rates >= 0"
    )
  return values


def _read_table(path, id_column) -> pa.Table:
  from pyarrow import csv, parquet

  suffix = pathlib.Path(path).suffix
  if suffix not in (".csv", ".parquet"):
    raise ValueError(
      f"the noise file {os.fspath(path)} ends in {suffix!r}; expected .csv or "
      ".parquet"
    )
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"there is no noise file {os.fspath(path)}; expected a table of ids and "
      "labels"
    )
  try:
    if suffix == ".parquet":
      return parquet.read_table(path)
    options = csv.ConvertOptions(
      column_types={id_column: pa.string()},  # "007" is not 7.
      null_values=[""],
      strings_can_be_null=True,
    )
    return csv.read_csv(path, convert_options=options)
  except pa.ArrowInvalid as error:
    raise ValueError(
      f"the noise file {os.fspath(path)} can't be read as {suffix[1:]} "
      f"({error})"
    ) from error


def _label_column(table, path, column, id_column) -> str:
  names = table.column_names
  if column is None:
    others = [name for name in names if name != id_column]
    if id_column in names and len(others) == 1:
      return others[0]
  if id_column not in names or column not in names or column == id_column:
    raise ValueError(
      f"{os.fspath(path)} has the columns {names}, and id_column is "
      f"{id_column!r}, column {column!r}; name the column of ids and one of "
      "labels"
    )
  return column


def _class_numbers(values, column, path, class_names, num_classes):
  """Converts a column of class numbers or names to numbers, null for none."""
  import pyarrow.compute as pc

  where = f"column {column!r} of {os.fspath(path)}"
  if pa.types.is_dictionary(values.type):
    values = values.cast(values.type.value_type)
  if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
    if class_names is None:
      raise ValueError(f"{where} holds names; give class_names to read them")
    names = pa.array(list(class_names), values.type)
    numbers = pc.index_in(values, value_set=names, skip_nulls=True)
    unknown = pc.and_(pc.is_null(numbers), pc.is_valid(values))
    if pc.any(unknown).as_py():
      text = values.filter(unknown)[0].as_py()
      raise ValueError(
        f"{where} holds {text!r}, which is no class; there are "
        f"{list(class_names)[:20]}"
      )
    return numbers
  if not pa.types.is_integer(values.type):
    raise ValueError(
      f"{where} holds {values.type} values; expected class numbers or names"
    )
  limits = pc.min_max(values).as_py()
  if limits["min"] is not None and not (
    0 <= limits["min"] <= limits["max"] < num_classes
  ):
    raise ValueError(
      f"{where} holds {limits['min']} .. {limits['max']}; expected class "
      f"numbers in 0 .. {num_classes - 1}, and nothing where there is none"
    )
  return values
