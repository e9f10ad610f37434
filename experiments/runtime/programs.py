"""Programs that are made once a process, however many runs need them."""

import collections
import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from ml_collections import config_dict

# Programs that are kept of each factory, those that were used last.
_KEPT = 16
FOLDER = ".gradmimic_programs"  # of those that are kept on disk
_BYTES_ON_DISK = 1 << 30

Made = TypeVar("Made")


@contextlib.contextmanager
def run_once() -> Iterator[None]:
  """Compiles what the block runs quickly, not for speed: on CPUs alone.

  Random numbers of a few shapes take LLVM seconds to optimize, and
  milliseconds to draw.

  Yields:
    Nothing.
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, before or jax.default_backend() == "cpu")
  try:
    yield
  finally:
    jax.config.update(name, before)


def keep_on_disk(folder: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in a folder, for later processes.

  Whoever can write to the folder can give those processes code to run. Where
  JAX has a folder already, as by `JAX_COMPILATION_CACHE_DIR`, that one stays.

  Args:
    folder: made with the first program. It keeps 1 GiB, those used last, where
      the package filelock is installed; anything otherwise.
  """
  if jax.config.values["jax_compilation_cache_dir"]:
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  if importlib.util.find_spec("filelock"):  # which JAX needs for the limit
    jax.config.update("jax_compilation_cache_max_size", _BYTES_ON_DISK)


def once(make: Callable[..., Made]) -> Callable[..., Made]:
  """Makes a factory give one result for equal arguments.

  JAX compiles a function anew for every function object: runs that differ in
  seed alone share their programs only where they share the functions. A factory
  may be kept so if its result depends on its arguments' values alone.

  Args:
    make: the factory. Its arguments are hashable, `ConfigDict`s (equal where
      their fields are), or trees of those. Where one is none of these, or is a
      method of an object (which would be kept with all that it holds), every
      call makes a new result.

  Returns:
    The factory, which keeps the 16 results that were used last.

  Example:
    >>> double = once(lambda factor: lambda x: factor * x)
    >>> double(2) is double(2), double(2) is double(3)
    (True, False)
  """
  kept: collections.OrderedDict[Any, Made] = collections.OrderedDict()

  @functools.wraps(make)
  def made(*args, **options):
    try:
      key = _key((args, options))
      hash(key)
    except TypeError:
      return make(*args, **options)
    if key not in kept:
      kept[key] = make(*args, **options)
      if len(kept) > _KEPT:
        kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]

  return made


def _key(arguments):
  leaves, structure = jax.tree.flatten(
    arguments, is_leaf=lambda x: isinstance(x, config_dict.ConfigDict)
  )
  return structure, tuple(map(_leaf_key, leaves))


def _leaf_key(leaf):
  if inspect.ismethod(leaf):
    raise TypeError("a method would be kept with its object")
  if isinstance(leaf, config_dict.ConfigDict):
    return leaf.to_json()
  return type(leaf), leaf  # 1, 1.0 and True are equal, and other programs
