"""A `datasets.Dataset` of Hugging Face, as it is in memory or on disk."""

from typing import Any

import numpy as np
import pyarrow as pa

from experiments.data.sources import (
  base,
  columns as columns_lib,
  headers,
  options as options_lib,
  parts,
  splits,
)

_ROWS = 64  # Images in memory at once.


class Rows:
  """Reads rows of a Dataset."""

  def __init__(self, dataset: Any, columns: columns_lib.Columns):
    self._dataset, self._columns = dataset, columns

  def read(self, rows: np.ndarray) -> list[bytes]:
    """Returns encoded images."""
    if not len(rows):
      return []
    return columns_lib.read_images(
      _one_batch(self._dataset[rows.tolist()]), self._columns, 0, "dataset"
    )


def from_dataset(
  dataset: Any,
  *,
  name: str = "dataset",
  split: str = splits.ALL,
  **columns: Any,
) -> base.Source:
  """Makes a source of a `datasets.Dataset`.

  All of it is read once, to hash its images; nothing is kept of that.

  Args:
    dataset: The Dataset: images in a column of `datasets.Image` or bytes, and
      labels as `ClassLabel`, integers or texts.
    name: Of the source, for messages.
    split: "all", or a slice of it such as "all[:80%]".
    columns: Fields of `options.Options`, such as `label="fine_label"`.

  Returns:
    The source. Ids are those of a column, else positions.

  Raises:
    TypeError: If it is something else.
    ValueError: If a column is missing, or a row has no image or no label.
  """
  for method in ("with_format", "iter", "features"):
    if not hasattr(dataset, method):
      raise TypeError(
        f"expected a datasets.Dataset, got {type(dataset).__name__}; of a"
        " DatasetDict take one split, as in dataset['train']"
      )
  options = options_lib.Options(name)._replace(**columns)

  def find(whole: str) -> parts.Part:
    if whole != splits.ALL:
      raise ValueError(
        f"split is {split!r}; a Dataset has only 'all', and slices of it"
      )
    return _find(dataset.with_format("arrow"), options)

  return parts.combine(find, split, others=(), name=name, where="memory")


def _find(dataset: Any, options: options_lib.Options) -> parts.Part:
  schema = dataset.features.arrow_schema
  columns = columns_lib.pick_columns(schema, options, options.path)
  labels: list[np.ndarray] = []
  ids: list[str] = []
  digests: list[bytes] = []
  wanted = [columns.image, columns.label, *([columns.id] if columns.id else [])]
  for table in dataset.select_columns(wanted).iter(batch_size=_ROWS):
    batch, row = _one_batch(table), len(digests)
    images = columns_lib.read_images(batch, columns, row, options.path)
    digests += map(base.content_digest, images)
    labels.append(columns_lib.read_labels(batch, columns, row, options.path))
    if columns.id is not None:
      ids += map(str, batch.column(columns.id).to_pylist())
  reader, count = Rows(dataset, columns), len(digests)
  joined = np.concatenate(labels) if labels else np.empty(0, np.int64)
  return parts.Part(
    labels=parts.to_numbers(joined),
    ids=np.array(ids, np.str_) if ids else splits.make_ids(splits.ALL, count),
    content=base.join_digests(digests),
    reader=reader,
    class_names=columns.class_names,
    channels=options.channels or headers.find_channels(reader, count),
  )


def _one_batch(table: pa.Table) -> pa.RecordBatch:
  (batch,) = table.combine_chunks().to_batches()
  return batch
