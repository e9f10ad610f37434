"""The binarisers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradmimic_jax.selection.binarize import (
  Binarizer,
  gmm,
  kmeans,
  threshold,
  top_fraction,
)

# name -> factory; `select` hands "threshold" and "top_fraction" their value.
# "auto" has none: the joint model of all steps cuts them together.
BINARIZERS: dict[str, Callable[..., Binarizer] | None] = {
  "auto": None,
  "threshold": threshold,
  "kmeans": kmeans,
  "gmm": gmm,
  "top_fraction": top_fraction,
}


def make_binarizer(name: Any, **values: float | None) -> Binarizer | None:
  """The binariser of a name, or the given one.

  Args:
    name: a key of `BINARIZERS`, or a binariser.
    **values: `threshold` and `fraction`, each for the binariser that takes it.

  Returns:
    A binariser; None for "auto", which isn't one of single columns.

  Raises:
    TypeError: neither a name nor a function.
    ValueError: an unknown name, a value missing, or one that the binariser
      doesn't take.

  Example:
    >>> make_binarizer("threshold", threshold=0.5)([1.0], 0)
    Cut(value=0.5, note='', fit={})
  """
  given = {key: value for key, value in values.items() if value is not None}
  takes = {"threshold": "threshold", "top_fraction": "fraction"}
  if not isinstance(name, str) and not callable(name):
    raise TypeError(
      f"binarize is {name!r}; expected one of {sorted(BINARIZERS)}, or a"
      " function (scores [n], seed) -> Cut."
    )
  if isinstance(name, str) and name not in BINARIZERS:
    raise ValueError(
      f"binarize is {name!r}; expected one of {sorted(BINARIZERS)}."
    )
  for key in given:
    if not isinstance(name, str) or takes.get(name) != key:
      user = next(user for user, taken in takes.items() if taken == key)
      raise ValueError(
        f"{key}={given[key]} has no effect with binarize={name!r}; leave it"
        f" out, or use binarize={user!r}."
      )
  if not isinstance(name, str):
    return name
  if name == "top_fraction" and not given:
    raise ValueError(
      "binarize='top_fraction' needs fraction, the share to keep, in (0, 1]."
    )
  factory = BINARIZERS[name]
  return factory(*given.values()) if factory else None
