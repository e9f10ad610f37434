"""Keys by which functions count as the same, without keeping any alive.

A lambda is made anew wherever its line runs, and a bound method wherever it is
looked up; a finding about one of them must hold for the next one like it.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

_PLAIN = (bool, int, str, bytes, type(None))
# Longer containers are known by their length, and by being the same one.
_LONGEST = 1000


def key(value: Any) -> Hashable:
  """Makes a key that is equal for values that jit would trace alike.

  Functions are known by their code and what it closes over, arrays by shape and
  dtype, fractional numbers by their kind, containers by their contents, other
  objects by being the same one. The key holds no object alive but code.

  Args:
    value: a function, or a tree of anything.

  Returns:
    A hashable key.

  Example:
    >>> key([lambda x: x + n for n in (1, 1)][0]) == key(lambda x: x + 1)
    False
    >>> first, second = ((lambda x: x + 1) for _ in range(2))
    >>> first is second, key(first) == key(second)
    (False, True)
  """
  return _key(value, ())


def _key(value, above):
  if isinstance(value, _PLAIN):
    return type(value), value
  if isinstance(value, (jax.Array, np.ndarray, np.generic)):
    return value.shape, str(value.dtype)
  if isinstance(value, (float, complex)):
    return type(value)
  if any(value is x for x in above):  # a function that closes over itself
    return "above"
  above = (*above, value)
  if isinstance(value, (list, tuple, dict)) and len(value) > _LONGEST:
    return type(value), len(value), id(value)
  if isinstance(value, (list, tuple)):
    return type(value), *(_key(x, above) for x in value)
  if isinstance(value, dict):
    return type(value), *(_key(item, above) for item in value.items())
  if isinstance(value, functools.partial):
    given = [value.func, value.args, value.keywords]
    return "partial", _key(given, above)
  if inspect.ismethod(value):
    return "method", _key([value.__func__, value.__self__], above)
  if inspect.isfunction(value):
    used = [value.__defaults__, value.__kwdefaults__, _contents(value)]
    return value.__code__, _key(used, above)
  inner = getattr(value, "__wrapped__", None)
  if inspect.isfunction(inner):  # jax.jit and its like
    return type(value), _key(inner, above)
  return _Same(value)


def _contents(function):
  """Lists the values that a function closes over."""
  found = []
  for cell in function.__closure__ or ():
    try:
      found.append(cell.cell_contents)
    except ValueError:  # not filled yet
      found.append(None)
  return found


class _Same:
  """Equal to another one of the same object, as long as that lives."""

  def __init__(self, value):
    self._id = id(value)
    self._alive: Any = lambda: self  # of the few kinds without weak references
    with contextlib.suppress(TypeError):
      self._alive = weakref.ref(value)

  def __hash__(self):
    return self._id

  def __eq__(self, other):
    return (
      isinstance(other, _Same)
      and self._id == other._id
      and self._alive() is not None
    )
