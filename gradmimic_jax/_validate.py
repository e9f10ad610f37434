"""Checks on what users hand in; every message says what to do about it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradmimic_jax import _mesh, _tree


def concrete(value: Any) -> bool:
  """True if a value can be looked at now; it can't while jax traces it."""
  return not isinstance(value, jax.core.Tracer)


def positive_scalar(name: str, value: Any) -> None:
  """Raises unless `value` is a finite scalar above zero."""
  if not concrete(value):
    return
  number = _scalar(name, value)
  if not (math.isfinite(number) and number > 0):
    raise ValueError(f"{name} is {number}; expected a finite number above 0.")


def fraction(name: str, value: Any) -> None:
  """Raises unless `value` is a scalar in (0, 1]."""
  if not concrete(value):
    return
  number = _scalar(name, value)
  if not 0 < number <= 1:
    raise ValueError(f"{name} is {number}; expected a fraction in (0, 1].")


def positive_int(name: str, value: Any) -> None:
  """Raises unless `value` is an integer above zero."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"{name} is {value!r}; expected an integer.")
  if value < 1:
    raise ValueError(f"{name} is {value}; expected an integer above 0.")


def made(name: str, value: Any, factories: tuple[Any, ...], how: str) -> None:
  """Raises unless `value` is a callable, and not the factory of one.

  Args:
    name: the argument's name.
    value: the value that arrived.
    factories: functions that make such values, often handed over uncalled.
    how: an example of a right value.
  """
  if not callable(value) or value in factories:
    shown = getattr(value, "__name__", repr(value))
    raise TypeError(f"{name} is {shown}; expected what a call gives: {how}.")


def _scalar(name: str, value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise TypeError(f"{name} is {value!r}; expected a number.") from error


def choice(name: str, value: Any, choices: Any) -> None:
  """Raises unless `value` is one of the choices."""
  if value not in choices:
    known = ", ".join(repr(c) for c in choices)
    raise ValueError(f"{name} is {value!r}; expected one of {known}.")


def floating_params(params: Any) -> None:
  """Raises unless params has leaves and all of them are floating point."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if not leaves:
    raise TypeError(
      "params has no array leaves; expected a tree of floating-point arrays."
    )
  for path, leaf in leaves:
    dtype = getattr(leaf, "dtype", None) if is_array(leaf) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f"params leaf {_tree.key_path(path)!r} is {_describe(leaf)}; expected a"
        " floating-point array. Keep counters, random keys and other state out"
        f" of params and pass them as keyword arguments.{_nnx_advice(params)}"
      )


def _nnx_advice(tree: Any) -> str:
  """Names the functions that take a module of Flax NNX; "" for other trees."""
  if not any(x.__module__.startswith("flax.nnx") for x in type(tree).__mro__):
    return ""
  return (
    " A module of Flax NNX goes to the functions of these names in gm.nnx,"
    " which see to its state."
  )


def like_params(name: str, tree: Any, params: Any, advice: str) -> Any:
  """Puts `tree` in the containers of `params`; raises unless it is like params.

  Args:
    name: the tree's name in the message.
    tree: the tree to check.
    params: the tree it must resemble.
    advice: what to do about a difference.

  Returns:
    A tree of the structure of params, whatever containers the leaves came in.

  Raises:
    TypeError: paths are missing or unknown (they are listed), or not unique.
    ValueError: a leaf has another shape; path and both shapes are named.
  """
  leaves = _tree.leaves_like(tree, params)
  if leaves is None:
    raise TypeError(f"{name} {_difference(tree, params)}. {advice}")
  for (path, leaf), found in zip(_leaves_by_path(params), leaves, strict=True):
    floating = is_array(found) and jnp.issubdtype(
      jnp.result_type(found), jnp.floating
    )
    if not floating:
      raise TypeError(
        f"{name} leaf {path!r} is {_describe(found)}; expected a"
        f" floating-point array. {advice}{_nnx_advice(tree)}"
      )
    if jnp.shape(found) != jnp.shape(leaf):
      raise ValueError(
        f"{name} leaf {path!r} has shape {jnp.shape(found)}; params has"
        f" {jnp.shape(leaf)} there. {advice}"
      )
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _difference(tree: Any, params: Any) -> str:
  """Describes how the paths of a tree differ from those of params."""
  ours = [path for path, _ in _leaves_by_path(params)]
  theirs = [path for path, _ in _leaves_by_path(tree)]
  missing = [path for path in ours if path not in theirs]
  unknown = [path for path in theirs if path not in ours]
  problems = []
  if missing:
    problems.append(f"lacks {_listing(missing)}")
  if unknown:
    problems.append(f"has {_listing(unknown)}, which params does not have")
  if not problems:
    twice = sorted({path for path in theirs if theirs.count(path) > 1})
    problems.append(
      f"has two leaves at {_listing(twice)}, in other containers than params"
    )
  return " and ".join(problems)


def batch_size(batch: Any) -> int:
  """Returns the B that the leading axis of every batch leaf must have."""
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  if not leaves:
    raise TypeError(
      "batch has no array leaves; expected arrays with a leading axis [B]."
    )
  sizes: dict[str, int] = {}
  for path, leaf in leaves:
    label = _tree.key_path(path) or "batch"
    if not is_array(leaf):
      raise TypeError(
        f"batch leaf {label!r} is {_kind(leaf)}, which JAX can't hold;"
        " expected an array of numbers or bools. Keep ids, texts and other"
        " objects out of the batch, and set them beside the scores [B]"
        " afterwards: rows stay in order."
      )
    shape = jnp.shape(leaf)
    if not shape:
      raise ValueError(
        f"batch leaf {label!r} is a scalar; expected a leading axis [B]. Pass"
        " what is not per sample as a keyword argument."
      )
    sizes[label] = shape[0]
  if len(set(sizes.values())) > 1:
    listed = ", ".join(f"{label!r}: {size}" for label, size in sizes.items())
    raise ValueError(
      f"batch leaves have different leading sizes ({listed}); expected the same"
      " B for all. Pass what is not per sample as a keyword argument."
    )
  size = next(iter(sizes.values()))
  if size == 0:
    raise ValueError("batch has leading size 0; expected at least one sample.")
  return size


def is_array(value: Any) -> bool:
  """True if JAX can hold it: arrays of numbers or bools, and plain numbers."""
  if isinstance(value, (np.ndarray, np.generic)):
    try:
      jax.typeof(value)
    except TypeError:  # text, bytes, dates, objects, records
      return False
    return True
  known = (jax.Array, bool, int, float, complex)
  protocols = ("__jax_array__", "__array__", "__dlpack__")
  return isinstance(value, known) or any(
    hasattr(value, name) for name in protocols
  )


def padding_mask(mask: Any, size: int, rows: Any = None) -> jax.Array:
  """Returns `mask` as bool `[B]`, divided as `rows`; all True without one."""
  if mask is None:
    return jnp.ones([size], bool)
  if not all(map(is_array, jax.tree.leaves(mask))):
    raise TypeError(
      f"mask is {_kind(mask)}; expected bool [B], True for real samples."
    )
  mask = jnp.asarray(mask)
  if mask.dtype != bool:
    raise TypeError(
      f"mask has dtype {mask.dtype}; expected bool [B], True for real samples."
    )
  if mask.shape != (size,):
    raise ValueError(
      f"mask has shape {mask.shape}; expected ({size},), one entry for each"
      " sample of the batch."
    )
  return mask if rows is None else _mesh.rows_like(mask, rows)


def baseline(
  score: str, reference: Any, size: int, name: str = "reference"
) -> jax.Array:
  """Returns the numbers `[B]` in the reference's place; raises for others."""
  expected = (
    f"with score={score!r} expected one number for each sample of this batch"
    + (", the reference's losses" if score == "excess_loss" else "")
    + f": floating point [{size}]."
  )
  arrays = isinstance(reference, (jax.Array, np.ndarray))
  if not arrays or not is_array(reference):
    raise TypeError(f"{name} is {_kind(reference)}; {expected}")
  numbers = jnp.asarray(reference)
  floating = jnp.issubdtype(numbers.dtype, jnp.floating)
  if numbers.shape != (size,) or not floating:
    raise ValueError(
      f"{name} has shape {numbers.shape} and dtype {numbers.dtype}; {expected}"
    )
  return _tree.to_accumulate(numbers)


def logits(name: str, value: Any) -> jax.Array:
  """Returns logits `[B, C]`, float32 or wider; raises for anything else."""
  arrays = isinstance(value, (jax.Array, np.ndarray))
  if not arrays or not is_array(value):
    raise TypeError(
      f"{name} is {_kind(value)}; expected an array of logits [B, C]."
    )
  value = jnp.asarray(value)
  if value.ndim != 2 or not jnp.issubdtype(value.dtype, jnp.floating):
    raise ValueError(
      f"{name} has shape {value.shape} and dtype {value.dtype}; expected"
      " floating-point logits [B, C]."
    )
  return _tree.to_accumulate(value)


def same_outputs(reference: jax.Array, outputs: jax.Array) -> None:
  """Raises unless the reference's and the learner's logits go together."""
  if outputs.shape != reference.shape:
    raise ValueError(
      f"the reference's outputs have shape {reference.shape} and the learner's"
      f" {outputs.shape}; expected the same [B, C] for both."
    )


def losses_shape(losses: Any, size: int) -> None:
  """Raises unless losses_fn returned one floating-point loss a sample."""
  if jnp.shape(losses) != (size,):
    raise ValueError(
      f"losses_fn returned shape {jnp.shape(losses)}; expected ({size},), one"
      " loss for each sample. Drop the mean or sum over the batch."
    )
  if not jnp.issubdtype(losses.dtype, jnp.floating):
    raise TypeError(
      f"losses_fn returned dtype {losses.dtype}; expected floating point."
    )


def unmasked(params: Any) -> None:
  """Raises if optax has masked a part of params away."""

  def masked(leaf):
    return isinstance(leaf, optax.MaskedNode)

  if any(map(masked, jax.tree.leaves(params, is_leaf=masked))):
    raise TypeError(
      "params has leaves that optax.masked or optax.partition took away; their"
      " gradients would keep their batch axis. Choose layers with layers= (and"
      " scope='layers'), and put this transformation first in the chain."
    )


def per_sample_gradients(updates: Any, params: Any) -> int:
  """Raises unless every leaf is `[B, *p]` over a params leaf `[*p]`.

  Args:
    updates: the gradients that came.
    params: the parameters they belong to.

  Returns:
    B, the number of samples.

  Raises:
    TypeError: the trees differ, or a leaf is missing.
    ValueError: a leaf is averaged already, or the leaves disagree about B.
  """
  ours = dict(_leaves_by_path(params))
  theirs = dict(_leaves_by_path(updates))
  if ours.keys() != theirs.keys():
    odd = sorted(set(ours) ^ set(theirs))
    raise TypeError(
      f"per-sample gradients and params differ at {_listing(odd)}; expected the"
      " gradients of all of params. Choose layers with layers=, not with"
      " optax.masked or optax.partition around this transformation."
    )
  found: Any = jax.tree.structure(updates)
  expected_structure: Any = jax.tree.structure(params)
  if found != expected_structure:
    # The same paths in another order would pair leaves wrongly.
    raise TypeError(
      f"per-sample gradients are a {found}; expected the containers of params,"
      f" {expected_structure}."
    )
  how = (
    "Compute per-sample gradients with jax.vmap(jax.grad(loss_fn), in_axes="
    "(None, 0))(params, batch), and put this transformation first in the chain."
  )
  size = None
  for path, leaf in ours.items():
    shape, expected = jnp.shape(theirs[path]), jnp.shape(leaf)
    if shape == expected:
      raise ValueError(
        f"gradient {path!r} has shape {shape}, the shape of its parameter: it"
        f" is averaged over the batch already; expected (B,) + {expected}."
        f" {how}"
      )
    if len(shape) != len(expected) + 1 or shape[1:] != expected:
      raise ValueError(
        f"gradient {path!r} has shape {shape}; expected (B,) + {expected}."
        f" {how}"
      )
    if size is None:
      size, first = shape[0], path
    elif shape[0] != size:
      raise ValueError(
        f"gradient {path!r} has {shape[0]} samples and {first!r} has {size};"
        f" expected the same B for all. {how}"
      )
  if size is None:
    raise TypeError("params has no leaves; expected a tree of arrays.")
  if size == 0:
    raise ValueError("gradients have 0 samples; expected at least one.")
  return size


def _leaves_by_path(tree: Any) -> list[tuple[str, Any]]:
  return [
    (_tree.key_path(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _listing(paths: list[str], most: int = 8) -> str:
  shown = ", ".join(repr(path) for path in paths[:most])
  return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _describe(leaf: Any) -> str:
  dtype = getattr(leaf, "dtype", None)
  return f"{type(leaf).__name__}" if dtype is None else f"of dtype {dtype}"


def _kind(value: Any) -> str:
  return ("" if hasattr(value, "dtype") else "a ") + _describe(value)
