"""Mimic layers: the leaves that the direction and the score look at."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gradmimic_jax import _tree

_BOOLS = (bool, np.bool_)

Layers = (
  None | str | re.Pattern | Sequence[str] | Callable[[str, Any], bool] | Any
)


def choose(layers: Layers, params: Any) -> list[bool]:
  """Flags each leaf of params that is in the mimic layers.

  Args:
    layers: None (all leaves); a regular expression, or a list of them, searched
      for in the "/"-joined leaf paths (anchor it with `^` and `$` to match a
      whole path); a predicate `(path, leaf) -> bool`; or a tree of bools with
      the paths of params, as `optax.masked` takes it. It may be callable, as
      models are that are trees themselves.
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
  elif callable(layers) and not _is_callable_tree(layers, params):
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


def _is_callable_tree(layers: Any, params: Any) -> bool:
  """True if something callable is a tree of bools and no predicate."""
  if isinstance(layers, functools.partial):  # jax.tree_util.Partial too
    return False
  flags = jax.tree.leaves(layers)
  if len(flags) == 1 and flags[0] is layers:
    return False
  if _tree.leaves_like(layers, params) is not None:
    return True
  return bool(flags) and all(isinstance(flag, _BOOLS) for flag in flags)


def _from_tree(tree: Any, params: Any) -> list[bool]:
  flags = _tree.leaves_like(tree, params)
  if flags is None or not all(isinstance(flag, _BOOLS) for flag in flags):
    raise TypeError(
      f"layers={tree!r} is not understood; expected None, a regular expression"
      " or a list of them, a predicate (path, leaf) -> bool, or a tree of bools"
      " with the paths of params."
    )
  return [bool(flag) for flag in flags]
