"""Merging of equal operations, so that each is computed once.

A direction that runs the model itself repeats the forward pass of losses_fn.
XLA merges equal operations only after it has rewritten them, and it rewrites
them by what else uses them, so that two copies of one layer norm, one with a
backward pass behind it and one without, no longer look alike. This module
merges them before that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core


def computed_once(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps `fn` so that jit merges its equal operations on equal operands.

  Numbers stay the same. Loops, rematerialised and other functions with a rule
  of their own are merged as a whole or not at all, and operations with side
  effects never. Called with concrete arrays, fn runs as it is.

  Args:
    fn: of trees to a tree of arrays.

  Returns:
    A function called like fn.
  """

  @functools.wraps(fn)
  def call(*args, **kwargs):
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
    if not any(traced):
      return fn(*args, **kwargs)

    def call_traced(chosen):
      arrays = iter(chosen)
      merged = [
        next(arrays) if flag else leaf
        for leaf, flag in zip(leaves, traced, strict=True)
      ]
      args, kwargs = jax.tree.unflatten(structure, merged)
      return fn(*args, **kwargs)

    chosen = [x for x, flag in zip(leaves, traced, strict=True) if flag]
    closed, shape = jax.make_jaxpr(call_traced, return_shape=True)(chosen)
    outputs = _evaluate(closed.jaxpr, closed.consts, chosen, {}, _plain_jit())
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)

  return call


def _evaluate(jaxpr, consts, values, seen, plain_jit):
  """Evaluates a jaxpr; `seen` holds the operations done so far."""
  known = dict(
    zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True)
  )

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else known[atom]

  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    if _is_plain(eqn, plain_jit):
      inner = eqn.params["jaxpr"]
      results = _evaluate(inner.jaxpr, inner.consts, operands, seen, plain_jit)
    else:
      key = _key(eqn, operands)
      results, _ = seen.get(key, (None, None))
      if results is None:
        results = _apply(jaxpr, eqn, known)
        if key is not None:
          # Operands are kept: an object's id is used again once it is gone.
          seen[key] = results, operands
    known.update(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _apply(jaxpr, eqn, known):
  """Evaluates one equation, in the context in which it was traced."""
  used = list(
    dict.fromkeys(x for x in eqn.invars if not isinstance(x, core.Literal))
  )
  alone = jaxpr.replace(
    constvars=[],
    invars=used,
    outvars=eqn.outvars,
    eqns=[eqn],
    effects=eqn.effects,
  )
  fn = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
  return fn(*(known[x] for x in used))


def _key(eqn, operands):
  """Makes a key that equal equations share; None for one without equals."""
  if eqn.effects:
    return None
  names = tuple(
    (str(atom.aval), np.asarray(atom.val).tobytes())
    if isinstance(atom, core.Literal)
    else id(value)
    for atom, value in zip(eqn.invars, operands, strict=True)
  )
  key = (
    eqn.primitive,
    names,
    tuple(sorted(eqn.params.items())),
    str(eqn.ctx),
  )
  try:
    hash(key)
  except TypeError:  # a parameter that can't be compared
    return None
  return key


def _plain_jit():
  """Returns the equation of a jit that says nothing about devices."""
  (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x + 1))(0.0).eqns
  return eqn


def _is_plain(eqn, plain_jit):
  """True if the equation is a jit that only groups other equations."""
  if eqn.primitive is not plain_jit.primitive:
    return False
  (unsaid,) = plain_jit.params["in_shardings"]
  said = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
  return all(x is unsaid for x in said)
