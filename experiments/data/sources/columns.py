"""The columns of tables of images, as the Hugging Face Hub has them."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from experiments.data.sources import options as options_lib
from experiments.runtime import limits as limits_lib
from gradmimic_jax import _files


class Columns(NamedTuple):
  """The columns of a file."""

  image: str
  label: str
  id: str | None
  class_names: tuple[str, ...] | None
  stored: str  # The path of the images' bytes.

  @property
  def read(self) -> list[str]:
    """The columns to read."""
    return [self.stored, self.label, *([self.id] if self.id else [])]


def pick_columns(
  schema: pa.Schema, options: options_lib.Options, path: str
) -> Columns:
  """Finds the columns of a table.

  Args:
    schema: The table's; `datasets` puts the classes' names into its metadata.
    options: The columns' names.
    path: The table, for messages.

  Returns:
    The Columns.

  Raises:
    ValueError: If one is missing, or of another kind.
  """

  def pick(wanted, usual, field, required=True):
    return options_lib.pick_column(
      schema.names, wanted, usual, field=field, where=path, required=required
    )

  image = pick(options.image, options_lib.IMAGE_NAMES, "image")
  label = pick(options.label, options_lib.LABEL_NAMES, "label")
  own = pick(options.id, options_lib.ID_NAMES, "id", False)
  kind = schema.field(image).type
  is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
  stored = kind.field("bytes").type if is_struct else kind
  if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
    raise ValueError(
      f"column {image!r} of {path} is {kind}; expected encoded images, as bytes"
      " or a struct of bytes and path"
    )
  kind = schema.field(label).type
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  if not (
    pa.types.is_integer(kind)
    or pa.types.is_string(kind)
    or pa.types.is_large_string(kind)
  ):
    raise ValueError(
      f"column {label!r} of {path} is {kind}; expected one class for each"
      " sample, as an integer or a text"
    )
  return Columns(
    image,
    label,
    own,
    _read_names(schema, label, path),
    f"{image}.bytes" if is_struct else image,
  )


def _read_names(
  schema: pa.Schema, label: str, path: str
) -> tuple[str, ...] | None:
  """Reads the classes' names where Hugging Face's `datasets` puts them."""
  about = (schema.metadata or {}).get(b"huggingface")
  if about is None:
    return None
  with _files.named(path, "file of `datasets`"):
    found = limits_lib.parse_json(about, most=limits_lib.DEFAULT.config_bytes)
    for key in ("info", "features", label, "names"):
      found = found.get(key) if isinstance(found, dict) else None
    if found is None:
      return None
    if not (
      isinstance(found, list)
      and found
      and all(isinstance(name, str) for name in found)
      and len(set(found)) == len(found)
    ):
      raise ValueError("its names of classes are no list of different texts")
  return tuple(found)


def read_images(
  batch: pa.RecordBatch, columns: Columns, row: int, where: str
) -> list[bytes]:
  """Returns the encoded images of a batch.

  Args:
    batch: Some rows.
    columns: Those of the table.
    row: The first of them, for messages.
    where: The table, likewise.

  Returns:
    The images.

  Raises:
    ValueError: If one is missing, or in a file elsewhere.
  """
  images = batch.column(columns.image)
  if pa.types.is_struct(images.type):
    # Not `field`, which forgets the structs that are missing.
    images = images.flatten()[images.type.get_field_index("bytes")]
  if images.null_count:
    raise ValueError(
      f"column {columns.image!r} of {where} has no bytes in row"
      f" {row + images.is_null().to_pylist().index(True)}; expected images that"
      " are stored in the table, as `save_to_disk` and `to_parquet` put them"
    )
  return images.to_pylist()


def read_labels(
  batch: pa.RecordBatch, columns: Columns, row: int, where: str
) -> np.ndarray:
  """Returns the labels of a batch, as `read_images` does its images.

  Returns:
    Integers or texts.

  Raises:
    ValueError: If one is missing.
  """
  values, name = batch.column(columns.label), columns.label
  if values.null_count:
    first = row + values.is_null().to_pylist().index(True)
    raise ValueError(
      f"column {name!r} of {where} has no label in row {first}; expected one in"
      " each"
    )
  if pa.types.is_dictionary(values.type):
    values = values.cast(values.type.value_type)
  if pa.types.is_integer(values.type):
    return values.to_numpy(zero_copy_only=False).astype(np.int64)
  return np.array(values.to_pylist(), np.str_)
