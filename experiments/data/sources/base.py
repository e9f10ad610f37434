"""What all sources of samples are: labels, ids, names, and a way to read."""

import abc
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np


class Source(abc.ABC):
  """Samples with class labels, by position; nothing is decoded to find them.

  It can be pickled, for worker processes, and `read` may be called from several
  threads at once.

  Attributes:
    name: The data set, for messages: "cifar10/3.0.2" or "folder:photos".
    split: The part of it.
    where: The folder or file that it is in.
    remedy: What to do about samples that can't be read, for messages.
    labels: int32 [N], in 0 .. num_classes - 1; read-only.
    ids: str [N], each one different; read-only.
    num_classes: How many classes there are.
    class_names: Their names, in the order of the labels.
    fingerprint: 32 hexadecimal characters: a hash of class names, labels, ids
      and stored content. Files that are stored otherwise have another one, and
      a set that only moves to another folder keeps it.
    channels: Of images: 1 (grey), 3 or 4; None where samples are features.
    shape: Of every sample, [H, W, C] or [D], where it is known without
      decoding; else None.

  Args:
    name: As the attribute, and so are those that follow.
    split: The part of the set.
    where: The folder or file.
    labels: Integers [N].
    ids: Texts [N].
    class_names: The classes' names.
    content: A hash of what is stored.
    channels: Of images.
    shape: Of every sample.
    remedy: A clause.
    unlabelled: What to do about labels that are out of range, as the end of a
      sentence.

  Raises:
    ValueError: If there is no sample, a label is out of range or ids repeat.
  """

  def __init__(
    self,
    *,
    name: str,
    split: str,
    where: str | os.PathLike,
    labels: np.ndarray,
    ids: np.ndarray,
    class_names: Sequence[str],
    content: bytes,
    channels: int | None,
    shape: tuple[int, ...] | None = None,
    remedy: str = "restore them",
    unlabelled: str = "; give every sample a class",
  ):
    self.name, self.split, self.where = name, split, os.fspath(where)
    self.remedy = remedy
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)
    self.channels, self.shape = channels, shape
    labels = np.asarray(labels)
    if not len(labels):
      raise ValueError(
        f"{self} in {self.where} has no sample; expected at least one"
      )
    if len(ids) != len(labels):
      raise ValueError(
        f"{self} in {self.where} has {len(labels)} labels and {len(ids)} ids;"
        " expected as many of each"
      )
    outside = (labels < 0) | (labels >= self.num_classes)
    if outside.any():
      raise ValueError(
        f"{outside.sum()} of {len(labels)} labels of {self} lie outside"
        f" 0 .. {self.num_classes - 1}{unlabelled}"
      )
    self.labels = labels.astype(np.int32)
    self.ids = np.asarray(ids, np.str_)
    check_unique(self.ids, f"{self} in {self.where}")
    for array in (self.labels, self.ids):
      array.setflags(write=False)  # Shared by all who use this source.
    digest = hashlib.sha256(json.dumps(self.class_names).encode())
    digest.update(self.labels.astype("<i4").tobytes())
    digest.update(json.dumps(self.ids.tolist()).encode())
    digest.update(content)
    self.fingerprint = digest.hexdigest()[:32]

  def __len__(self) -> int:
    return len(self.labels)

  def __str__(self) -> str:
    return f"{self.name} {self.split}".rstrip()

  def __repr__(self) -> str:
    return f"<{type(self).__name__} {self}: {len(self)} samples>"

  @abc.abstractmethod
  def read(self, positions: Sequence[int]) -> list[Any]:
    """Reads samples as they are stored.

    Args:
      positions: In 0 .. N - 1, in any order, as often as wanted.

    Returns:
      For each position an encoded image (bytes) or an array: uint8 [H, W, C]
      or float32 [D].

    Raises:
      IndexError: If a position is out of range.
      ValueError: If a file is damaged, missing, or not the one that was there
        when the source was opened.
    """

  def check_positions(self, positions: Sequence[int]) -> np.ndarray:
    """Returns positions as an array; refuses those out of range."""
    rows = np.asarray(positions, np.int64).reshape(-1)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
      raise IndexError(
        f"positions of {self} must lie in 0 .. {len(self) - 1}, got"
        f" {rows.min()} .. {rows.max()}"
      )
    return rows

  def damaged(self, error: Exception | str) -> ValueError:
    """Makes the error of samples that can't be read."""
    return ValueError(
      f"the files of {self.name} in {self.where} are damaged or missing"
      f" ({first_line(error)}); {self.remedy}"
    )


def first_line(error: Exception | str) -> str:
  """Returns an error's text, or the first line of a longer one."""
  return (str(error).splitlines() or [repr(error)])[0]


def check_unique(values: np.ndarray, where: str, what: str = "id") -> None:
  """Raises ValueError if a text comes twice; names the first that does."""
  texts = np.asarray(values).tolist()
  if len(set(texts)) == len(texts):
    return
  seen: dict[str, int] = {}
  for row, text in enumerate(texts):
    if text in seen:
      raise ValueError(
        f"{what} {text!r} of {where} comes twice, for samples {seen[text]} and"
        f" {row}; expected every {what} once"
      )
    seen[text] = row


def content_digest(content: bytes) -> bytes:
  """Hashes one sample's content: 16 bytes."""
  return hashlib.blake2b(content, digest_size=16).digest()


def join_digests(digests: Sequence[bytes]) -> np.ndarray:
  """Returns samples' hashes as numbers, uint64 [N, 2]."""
  return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
