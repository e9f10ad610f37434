"""Facts about a selection's samples besides their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradmimic_jax import _frames
from gradmimic_jax.selection import _ids
from gradmimic_jax.selection.quality import checked_labels
from gradmimic_jax.selection.selection import Selection

KEYS = (
  "ids",
  "labels",
  "suggested",
  "true_labels",
  "class_names",
  "captions",
  "images",
)
MAX_TEXT = 200  # characters of a name or a value
MAX_CAPTION = 1000
# What the user may call by names of their own.
COLUMNS = ("ids", "labels", "suggested", "true_labels", "captions", "scores")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
  """Labels, names and images of a selection's samples, row by row."""

  rows: np.ndarray | None = None  # where in the data set each sample is
  labels: np.ndarray | None = None  # [N]
  suggested: np.ndarray | None = None  # [N]
  true_labels: np.ndarray | None = None  # [N]
  class_names: Any = None
  captions: Any = None  # of the data set
  images: Any = None  # of the data set

  def label_name(self, label: Any) -> str:
    """Returns a label's name."""
    label = str(label)
    if self.class_names is None or not label.isdigit():
      return text(label)
    index = int(label)
    if index >= len(self.class_names):
      return text(label)
    return text(self.class_names[index])

  def about(self, row: int) -> dict[str, str | None]:
    """Returns the texts to print beside a sample of the selection."""

    def name(labels):
      return None if labels is None else self.label_name(labels[row])

    return {
      "label": name(self.labels),
      "suggested": name(self.suggested),
      "true_label": name(self.true_labels),
      "caption": self.caption(row),
    }

  def caption(self, row: int, longest: int = MAX_CAPTION) -> str | None:
    """Returns a sample's text, or its tokens with a blank between."""
    if self.captions is None:
      return None
    assert self.rows is not None
    value = self.captions[int(self.rows[row])]
    if is_tokens(value):
      # As many as may be shown; others needn't be made text.
      value = " ".join(str(token) for token in value[:longest])
    return text(value, longest, keep="\n")

  @property
  def has_tokens(self) -> bool:
    """True if the texts are sequences of tokens."""
    return (
      self.captions is not None
      and len(self.captions) > 0
      and is_tokens(self.captions[0])
    )

  def image(self, row: int, side: int) -> Any:
    """Returns a sample's image, by choice a small one; None if there are none.

    Args:
      row: of the selection.
      side: in pixels, all that is needed. Images that have a method `at_most`
        are asked for it.
    """
    if self.images is None:
      return None
    assert self.rows is not None
    position = int(self.rows[row])
    if hasattr(self.images, "at_most"):
      return self.images.at_most(position, side)
    return self.images[position]


def find_samples(
  dataset: Any,
  selection: Selection,
  columns: Mapping[str, Any] | None = None,
) -> Samples:
  """Finds a selection's samples in what is known about a data set.

  Args:
    dataset: by name, or a frame, as `gm.report` takes it; None for nothing.
    selection: the selection whose samples are wanted.
    columns: the names of a frame's columns, by what they hold.

  Returns:
    The Samples.

  Raises:
    TypeError: no mapping, or entries of another kind.
    ValueError: an unknown name, entries of other lengths, samples that the data
      set lacks.
  """
  if dataset is None:
    return Samples()
  if _frames.is_frame(dataset):
    own = {k: v for k, v in (columns or {}).items() if v and k != "scores"}
    dataset = _frames.read_facts(dataset, "dataset", own)
  if not isinstance(dataset, Mapping):
    raise TypeError(
      f"dataset is a {type(dataset).__name__}; expected a data frame, or a"
      f" mapping with some of {', '.join(KEYS)}."
    )
  for key in dataset:
    if key not in KEYS:
      raise ValueError(
        f"dataset has {key!r}; expected some of {', '.join(KEYS)}."
      )
  given = {key: value for key, value in dataset.items() if value is not None}
  # Images may be decoded as they are asked for, by something without a length.
  sizes = {
    key: len(value)
    for key, value in given.items()
    if key != "class_names" and (key != "images" or hasattr(value, "__len__"))
  }
  if len(set(sizes.values())) > 1:
    raise ValueError(
      f"the entries of dataset differ in length: {sizes}; expected one of each"
      " a sample."
    )
  if not given.keys() - {"class_names"}:
    return Samples(class_names=given.get("class_names"))
  size = next(iter(sizes.values()), len(selection))
  rows = _rows(selection.ids, given.get("ids"), size)

  def labels(key):
    if key not in given:
      return None
    return checked_labels(given[key], len(given[key]))[rows]

  names = given.get("class_names")
  found = {key: labels(key) for key in ("labels", "suggested", "true_labels")}
  for key, values in found.items():
    kinds = {
      v.dtype.kind == "U" for v in (values, found["labels"]) if v is not None
    }
    if len(kinds) > 1:
      raise TypeError(
        f"dataset[{key!r}] and dataset['labels'] are of two kinds; expected"
        " integers in both, or names in both."
      )
    if values is None or names is None or values.dtype.kind == "U":
      continue
    if len(values) and values.max() >= len(names):
      raise ValueError(
        f"dataset[{key!r}] holds {values.max()}, but there are"
        f" {len(names)} class_names; expected a name for every label."
      )
  return Samples(
    rows,
    class_names=names,
    captions=given.get("captions"),
    images=given.get("images"),
    **found,
  )


def _rows(wanted: np.ndarray, ids: Any, n: int) -> np.ndarray:
  """Finds the row of each wanted id; without ids, rows are positions."""
  if ids is None:
    if wanted.dtype.kind not in "iu":
      raise ValueError(
        f"the selection's ids are strings, such as {str(wanted[0])!r}, and"
        " dataset has no ids to find them by; expected ids, one a sample."
      )
    missing = wanted[wanted >= n]
    rows = wanted.astype(np.int64)
  else:
    ids = _ids.checked(ids, "dataset['ids']")
    if not _ids.same_kind(ids, wanted):
      raise TypeError(
        f"dataset['ids'] has dtype {ids.dtype} and the selection's ids"
        f" {wanted.dtype}; expected the same kind of id."
      )
    order = _ids.order(ids)
    if not _ids.is_ascending(ids[order], strictly=True):
      raise ValueError(
        "dataset['ids'] repeat, so that they don't tell which sample is meant;"
        " expected each once."
      )
    rows, missing = _ids.find(ids, wanted, order)
  if len(missing):
    raise ValueError(
      f"{len(missing)} of the selection's {len(wanted)} samples are not in"
      f" dataset, which has {n}; the first is {missing[0]!r}. Give the data set"
      " that was scored."
    )
  return rows


def text(value: Any, longest: int = MAX_TEXT, keep: str = "") -> str:
  """Makes a value's text printable and not too long.

  Args:
    value: anything.
    longest: number of characters; the last one says that there were more.
    keep: characters that may stay though they don't print.

  Returns:
    Its text, with a sign in place of each character that doesn't print.

  Example:
    >>> len(text("a" * 300))
    200
  """
  whole = str(value)
  if len(whole) > longest:
    whole = whole[: longest - 1] + "…"
  if whole.isprintable():
    return whole
  return "".join(
    c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}"
    for c in whole
  )


def is_tokens(value: Any) -> bool:
  """True for a sequence of tokens, numbers or pieces of text."""
  return isinstance(value, (list, tuple)) or (
    isinstance(value, np.ndarray) and value.ndim == 1
  )


def column_names(columns: Any, n_steps: int) -> dict[str, Any]:
  """Checks the user's own names of columns.

  Args:
    columns: by `COLUMNS`; None for none.
    n_steps: the number of names that `scores` has to have.

  Returns:
    The names as texts to print, by `COLUMNS`.

  Raises:
    TypeError: no mapping.
    ValueError: an unknown key, or another number of scores' names.
  """
  if columns is None:
    return {}
  if not isinstance(columns, Mapping):
    raise TypeError(
      f"columns is a {type(columns).__name__}; expected a mapping with some of"
      f" {', '.join(COLUMNS)}."
    )
  for key in columns:
    if key not in COLUMNS:
      raise ValueError(
        f"columns has {key!r}; expected some of {', '.join(COLUMNS)}."
      )
  found = {k: v for k, v in columns.items() if v is not None}
  names: dict[str, Any] = {
    k: text(v) for k, v in found.items() if k != "scores"
  }
  if "scores" in found:
    steps = [text(name) for name in found["scores"]]
    if len(steps) != n_steps:
      raise ValueError(
        f"columns['scores'] has {len(steps)} names, and there are {n_steps}"
        " steps; expected a name a step."
      )
    names["scores"] = steps
  return names
