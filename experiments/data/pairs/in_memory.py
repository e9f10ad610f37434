"""Batches of image-text pairs from memory, like those from shards.

A training loop sees the same from `Pairs` and from `shards.ShardStream`: a
grain data set with a `fingerprint`, whose iterator gives batches with "image"
(uint8), "text", "uid", "index" and "mask". Its state is a small JSON, which an
iterator over other data or settings refuses. Either goes on as long as the loop
asks: a budget of samples seen is a number of steps, samples over rows in a
batch.
"""

from typing import Any

import numpy as np

from experiments.data.rows import Rows


class Pairs(Rows):
  """Pairs in memory, in epochs that are each a fresh permutation.

  Args:
    images: uint8 [N, S, S, 3].
    text: Tokens, integers [N, L].
    uids: str [N], each one different.
    **options: As `Rows` takes them.

  Raises:
    ValueError: If shapes don't fit together or a value is out of range.
    TypeError: If an array has the wrong dtype.
  """

  noun = "pair"

  def __init__(
    self,
    images: np.ndarray,
    text: np.ndarray,
    uids: np.ndarray,
    **options: Any,
  ):
    uids = np.asarray(uids)
    if images.dtype != np.uint8 or np.asarray(text).dtype.kind not in "iu":
      raise TypeError(
        f"images must be uint8 and text integers, got {images.dtype} and"
        f" {np.asarray(text).dtype}"
      )
    if (
      images.ndim != 4
      or np.ndim(text) != 2
      or not len(images) == len(text) == len(uids)
    ):
      raise ValueError(
        "expected images [N, H, W, C], text [N, L] and uids [N], got"
        f" {images.shape}, {np.shape(text)} and {uids.shape}"
      )
    super().__init__(
      {"image": images, "text": np.asarray(text).astype(np.int32)},
      uids,
      about={"images": list(images.shape)},
      **options,
    )
