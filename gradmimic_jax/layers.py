"""Mimic layers: the leaves that the direction and the score look at."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gradmimic_jax import _tree

Layers = (
  None | str | re.Pattern | Sequence[str] | Callable[[str, Any], bool] | Any
)


def choose(layers: Layers, params: Any) -> list[bool]:
  """One flag for each leaf of params: is it in the mimic layers?

  Args:
    layers: None (all leaves); a regular expression, or a list of them, searched
      for in the "/"-joined leaf paths (anchor it with `^` and `$` to match a
      whole path); a predicate `(path, leaf) -> bool`; or a tree of bools like
      params, as `optax.masked` takes it.
    params: the parameter tree.

  Returns:
    Flags in flattening order.

  Raises:
    ValueError: a pattern matches no leaf (the paths are listed), or nothing is
      chosen at all.
    TypeError: a bool tree of another structure, or something else entirely.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"body": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(3)}}
    >>> choose("^head/", params)
    [False, True]
  """
  paths = _tree.leaf_paths(params)
  leaves = jax.tree.leaves(params)
  if layers is None:
    flags = [True] * len(paths)
  elif isinstance(layers, (str, re.Pattern)):
    flags = _matching([layers], paths)
  elif isinstance(layers, (list, tuple)) and all(
    isinstance(pattern, (str, re.Pattern)) for pattern in layers
  ):
    flags = _matching(layers, paths)
  elif callable(layers):
    flags = [bool(layers(*item)) for item in zip(paths, leaves, strict=True)]
  else:
    flags = _from_tree(layers, params)
  if not any(flags):
    raise ValueError(
      f"layers={layers!r} chooses no leaf. The leaves are: {', '.join(paths)}."
    )
  return [bool(flag) for flag in flags]


def _matching(patterns: Sequence[Any], paths: list[str]) -> list[bool]:
  flags = [False] * len(paths)
  for pattern in patterns:
    try:
      expression = re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f"layers pattern {pattern!r} is not a regular expression: {error}."
      ) from error
    matches = [expression.search(path) is not None for path in paths]
    if not any(matches):
      raise ValueError(
        f"layers pattern {expression.pattern!r} matches no leaf. The leaves"
        f" are: {', '.join(paths)}."
      )
    flags = [a or b for a, b in zip(flags, matches, strict=True)]
  return flags


def _from_tree(tree: Any, params: Any) -> list[bool]:
  flags, found = jax.tree.flatten(tree)
  expected: Any = jax.tree.structure(params)
  kinds = (bool, np.bool_)
  if found != expected or not all(isinstance(flag, kinds) for flag in flags):
    raise TypeError(
      f"layers={tree!r} is not understood; expected None, a regular expression"
      " or a list of them, a predicate (path, leaf) -> bool, or a tree of bools"
      " with the structure of params."
    )
  return [bool(flag) for flag in flags]
