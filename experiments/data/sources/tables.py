"""Tables of labels beside samples: CSV and Parquet files."""

import csv
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv, parquet

from experiments.data.sources import options as options_lib, parts
from gradmimic_jax import _files

_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_HEADER_BYTES = 1 << 20


class Table(NamedTuple):
  """What a table says about samples; each [N]."""

  labels: np.ndarray  # integers or texts
  files: np.ndarray | None  # texts, and so are the others
  ids: np.ndarray | None
  splits: np.ndarray | None


def read(
  path: str, options: options_lib.Options, *, needs_files: bool
) -> Table:
  """Reads a table of labels.

  Args:
    path: A `.csv` (comma) or `.tsv` (tab) file with a header, or `.parquet`.
    options: The columns' names. `image` names that of files.
    needs_files: Whether there has to be a column of files.

  Returns:
    The Table. Labels are numbers where all of them are written as such.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If it is damaged, lacks a column or has an empty field.
  """
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in (*_SUFFIXES, ".parquet"):
    raise ValueError(
      f"config.data.labels is {path!r}; expected a table that ends in .csv,"
      " .tsv or .parquet"
    )
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"config.data.labels is {path!r}, and there is no such file"
    )
  remedy = "Write it again."
  with _files.named(path, f"{suffix[1:]} table", remedy):
    if suffix == ".parquet":
      names = parquet.read_schema(path).names
    else:
      names = _read_header(path, _SUFFIXES[suffix])

  def pick(wanted, usual, field, required):
    return options_lib.pick_column(
      names, wanted, usual, field=field, where=path, required=required
    )

  label = pick(options.label, options_lib.LABEL_NAMES, "label", True)
  file = pick(options.image, options_lib.FILE_NAMES, "image", needs_files)
  own = pick(options.id, options_lib.ID_NAMES, "id", False)
  split = pick(options.split, options_lib.SPLIT_NAMES, "split", False)
  columns = [name for name in (label, file, own, split) if name is not None]
  if len(set(columns)) < len(columns):
    raise ValueError(
      f"one column of {path} is asked for twice ({columns}); name the columns"
      " of files, labels, ids and splits in config.data.columns"
    )
  with _files.named(path, f"{suffix[1:]} table", remedy):
    if suffix == ".parquet":
      table = parquet.read_table(path, columns=columns)
    else:
      table = arrow_csv.read_csv(
        path,
        parse_options=arrow_csv.ParseOptions(delimiter=_SUFFIXES[suffix]),
        convert_options=arrow_csv.ConvertOptions(
          # "007" is not 7.
          column_types=dict.fromkeys(columns, pa.string()),
          include_columns=columns,
          strings_can_be_null=True,
          null_values=[""],
        ),
      )

  def texts(name):
    return None if name is None else to_texts(table[name], name, path)

  labels = texts(label)
  return Table(parts.to_numbers(labels), texts(file), texts(own), texts(split))


def _read_header(path: str, delimiter: str) -> list[str]:
  with open(path, encoding="utf-8-sig", newline="") as file:
    line = file.readline(_HEADER_BYTES)
  return next(csv.reader([line], delimiter=delimiter), [])


def to_texts(values: pa.ChunkedArray, name: str, path: str) -> np.ndarray:
  """Converts a column to texts; raises ValueError if a field is empty."""
  if values.null_count:
    row = values.is_null().to_pylist().index(True)
    raise ValueError(
      f"column {name!r} of {path} has {values.null_count} empty fields, the"
      f" first in row {row}; expected a value in each"
    )
  if pa.types.is_dictionary(values.type):
    values = values.cast(values.type.value_type)
  with _files.named(path):
    found = values.cast(pa.string()).to_pylist()
  return np.array(found, np.str_)
