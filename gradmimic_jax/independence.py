"""Check that samples are independent: each loss depends on its own row only.

Engines other than the forward one show losses_fn one sample at a time. They
give the gradient of the batch's losses only if these don't depend on batch
mates, on their number, or on a random key that all share. This module compares
both views on a few made-up rows: under jit there are no others. Nothing of the
comparison is in the program that is being traced.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradmimic_jax import (
  _identity,
  _made_up,
  _per_sample,
  _problem,
  _tree,
  _validate,
)

# Rows to compare: with two, dropout at a low rate might treat both alike.
ROWS = 4
# Bytes of made-up inputs and closed-over arrays, at most.
LARGEST = 4 * 2**30
# A difference counts from this many times the effect of rounding.
_ROUNDINGS = 8
_OFF = "check_independence=False turns this check off."
_REMEMBERED = 1024

_seen: set[Any] = set()


def check_independence(
  losses_fn: Callable[..., Any],
  params: Any,
  batch: Any,
  *,
  has_aux: bool = False,
  **kwargs: Any,
) -> None:
  """Checks that each loss depends on its own sample only.

  `losses_fn(params, batch)_i = losses_fn(params, batch_i)_0` for all i

  Per-sample gradients, by `engine="per_sample"`, by microbatches or by one's
  own `jax.vmap(jax.grad(loss_fn))`, mean something else where that does not
  hold: with BatchNorm in training mode, contrastive losses, losses divided by
  the batch's size or valid count, and random keys that samples share.
  `mimic_value_and_grad` and `mimic_scores` check it themselves, where they need
  it; before `reweight_by_mimic_score` call this once.

  The two sides are compared on two draws of 4 made-up rows and made-up
  parameters, of the shapes and dtypes that come, on the host: matrices by He's
  rule, vectors around 1, features between 0 and 1 or signed, integers 0 and 1.
  They must agree to `eps ** 0.6` of the largest loss, 7e-5 in float32 and .05
  in bfloat16, or to 8 times what a change of the inputs by one eps does to
  them, with eps of the coarsest dtype in losses_fn. A sample's loss beside
  other mates must be the same to 7e-5 in any dtype. Floating leaves of aux are
  compared too. Losses that are not finite alone say nothing, unless all are.

  The first call for a function and shapes costs one compilation of two forward
  passes (2.7 s of CPU time for a ViT of 6 layers and 2.7 million parameters,
  less than compiling its plain step), and later ones no time, memory or FLOPs:
  the outcome is remembered, without keeping losses_fn alive. A change
  of a global variable or of an object that losses_fn closes over is not seen,
  as in jit. Callbacks that return nothing are left out.

  Args:
    losses_fn: `losses_fn(params, batch, **kwargs) -> losses [B]`, or `(losses,
      aux)` with `has_aux`.
    params: its parameters: arrays, tracers, or of type `jax.ShapeDtypeStruct`.
    batch: leaves `[B, ...]`, of the same kinds.
    has_aux: whether losses_fn returns `(losses, aux)`.
    **kwargs: for losses_fn. Made up if they are tracers.

  Raises:
    ValueError: a loss, or an entry of aux, depends on more than its own sample;
      or aux has a leaf that is not of samples.

  Warns:
    UserWarning: the two could not be compared: inputs of more than 4 GiB, side
      effects, no finite loss, or a function that no backend here can run.

  Example:
    >>> import jax.numpy as jnp
    >>> import gradmimic_jax as gm
    >>> def losses_fn(params, batch):
    ...   return (batch["x"] @ params["w"]) ** 2
    >>> params, batch = {"w": jnp.ones(3)}, {"x": jnp.ones((8, 3))}
    >>> gm.check_independence(losses_fn, params, batch)
    >>> gm.check_independence(
    ...   lambda p, b: losses_fn(p, {"x": b["x"] - b["x"].mean()}),
    ...   params, batch)
    Traceback (most recent call last):
    ...
    ValueError: losses_fn gives sample ...
  """
  advice = "Pass has_aux=True if it returns (losses, aux)."
  plain = _problem.plain_losses_fn(losses_fn, has_aux, kwargs, advice)

  def compare(params, batch):
    with checked(losses_fn, params, batch, kwargs, has_aux):
      jax.eval_shape(plain, params, batch)  # for the errors of its own

  leaves = jax.tree.leaves((params, batch))
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
    jax.eval_shape(compare, params, batch)  # tracers in their place
  else:
    compare(params, batch)


@contextlib.contextmanager
def checked(
  losses_fn: Callable[..., Any],
  params: Any,
  batch: Any,
  kwargs: dict[str, Any],
  has_aux: bool,
) -> Iterator[None]:
  """Checks independence before the computation that relies on it.

  If the comparison fails because losses_fn does, the computation's own error
  is the better one.
  """
  size = _validate.batch_size(batch)
  shapes, structure = jax.tree.flatten(
    (
      jax.tree.map(_made_up.make_shape, params),
      jax.tree.map(lambda x: _made_up.make_shape(x, min(size, ROWS)), batch),
    )
  )
  options, containers = jax.tree.flatten(kwargs)
  # Numbers among the keyword arguments may change from step to step.
  options = [int if type(x) is int else x for x in options]
  known = _identity.key((losses_fn, has_aux, options))
  sizes = tuple((x.shape, x.dtype) for x in shapes)
  key = known, structure, str(containers), sizes
  problem = None
  if size > 1 and key not in _seen:  # both views of one row are the same
    try:
      _compare(losses_fn, params, batch, kwargs, has_aux)
    except _NotComparedError as error:
      problem = error
  yield
  if problem is not None:
    warnings.warn(
      f"losses_fn was not compared on a batch and on single samples: {problem}."
      " If its losses depend on batch mates, or on a random key that samples"
      f" share, use engine='forward'. {_OFF}",
      stacklevel=4,
    )
  if len(_seen) >= _REMEMBERED:
    _seen.clear()
  _seen.add(key)


class _NotComparedError(Exception):
  """The reason why the two views could not be compared."""


class _Views(NamedTuple):
  """losses_fn's two views of a batch, as one program."""

  closed: Any  # jaxpr of (params, rows, traced keyword arguments)
  inputs: Any  # their shapes and dtypes
  together: list[Any]  # (path, shape and dtype) of losses and leaves of aux
  alone: list[Any]  # the same, of samples alone: [B, 1, ...]


class _Draw(NamedTuple):
  """One set of inputs, and the outputs of both views."""

  inputs: Any
  together: list[np.ndarray]  # losses and floating leaves of aux, [B, -1]
  alone: list[np.ndarray]  # the same, of samples alone


def _compare(losses_fn, params, batch, kwargs, has_aux):
  given = params, batch, kwargs
  mesh = jax.sharding.get_abstract_mesh()
  for around in (None, mesh):  # losses_fn may speak of the mesh
    try:
      with _made_up.apart(around):
        views = _trace(losses_fn, has_aux, *given)
        with _made_up.on_host():
          problem = _disagreement(views, given)
      break
    except _NotComparedError:
      if mesh.empty or around is mesh:
        raise
  if problem is not None:
    raise ValueError(problem)
  for (path, leaf), (_, alone) in zip(views.together, views.alone, strict=True):
    if not _is_per_sample(leaf, alone):
      more = f" and {leaf.shape} for one of {views.together[0][1].shape[0]}"
      _per_sample.refuse_state(path[1:], alone.shape[1:], more)


def _trace(losses_fn, has_aux, params, batch, kwargs):
  leaves, structure = jax.tree.flatten(kwargs)
  traced = [x for x in leaves if isinstance(x, jax.core.Tracer)]

  def both(params, rows, arrays):
    arrays = iter(arrays)
    merged = [
      next(arrays) if isinstance(x, jax.core.Tracer) else x for x in leaves
    ]
    plain = _problem.plain_losses_fn(
      losses_fn, has_aux, jax.tree.unflatten(structure, merged), ""
    )
    alone = jax.vmap(partial(_per_sample.shown_alone, plain), in_axes=(None, 0))
    return plain(params, rows), alone(params, rows)

  size = _validate.batch_size(batch)
  # losses_fn may take only batches that devices can share.
  devices = jax.device_count()
  for count in (ROWS, -(-ROWS // devices) * devices, size):
    make_rows = partial(_made_up.make_shape, count=min(count, size))
    inputs = (
      jax.tree.map(_made_up.make_shape, params),
      jax.tree.map(make_rows, batch),
      [_made_up.make_shape(x) for x in traced],
    )
    try:
      closed, outputs = jax.make_jaxpr(both, return_shape=True)(*inputs)
      together, alone = map(jax.tree_util.tree_leaves_with_path, outputs)
      return _Views(closed, inputs, together, alone)
    except Exception as error:  # losses_fn's own, of any kind
      problem = _NotComparedError(_told(error))
  raise problem


def _is_per_sample(together, alone):
  """True if a leaf has one entry for each sample of a batch."""
  shape = together.shape
  return shape != () and alone.shape == (shape[0], 1, *shape[1:])


def _disagreement(views, given):
  """Describes how the two views differ; None if they don't."""
  tracked = [
    i
    for i, ((_, leaf), (_, alone)) in enumerate(
      zip(views.together, views.alone, strict=True)
    )
    if _is_per_sample(leaf, alone) and jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  look, eps = _looker(views, tracked)
  draws = [look(_made(views.inputs, signed)) for signed in (False, True)]
  finite = any(map(_some_finite, draws))
  real = None if finite else _real(views.inputs, given)
  if real is not None:
    draws.append(look(real))
    finite = _some_finite(draws[-1])
  for draw, other in zip(draws, (*draws[1:], draws[0]), strict=True):
    # First beside other mates: the program is the same, so all bits are.
    mixed = look(_with_mates(draw.inputs, other.inputs))
    for k, (a, b) in enumerate(zip(draw.together, mixed.together, strict=True)):
      differs = _differs(a[_KEPT], b[_KEPT], _SAME)
      if np.any(differs):
        again = look(draw.inputs).together[k]
        differs &= ~_differs(a[_KEPT], again[_KEPT], 0)
      if np.any(differs):
        row = int(np.argmax(np.max(differs, axis=1)))
        return _mates_text(views, tracked[k], a[_KEPT], b[_KEPT], row)
    # Then alone.
    rounding = np.zeros(len(tracked))
    if np.any(_excess(draw, eps, rounding)[1] > 0):
      rounding = _rounding(draw, look(_made_up.nudged(draw.inputs, eps)))
    rows, excess = _excess(draw, eps, rounding)
    for k in np.flatnonzero(excess > 0)[:1]:
      return _text(views, draw, tracked[k], k, rows[k])
  if not finite and _only_one_side_is_finite(draws):  # divided by B - 1, say
    return _text(views, draws[0], 0, 0, 0)
  if not finite:
    raise _NotComparedError("its losses of made-up inputs are not finite")
  return None


# Rows that keep their place when others get other mates.
_KEPT = slice(None, None, 2)
# Tolerance between runs of one program: a solver may stop for all at once.
_SAME = float(np.finfo(np.float32).eps) ** 0.6


def _differs(a, b, tolerance):
  """True where two outputs of one program differ, bool `[B, -1]`."""
  finite = np.isfinite(a) & np.isfinite(b)
  scale = max(_largest(a), _largest(b))
  with np.errstate(invalid="ignore"):
    far = np.abs(a - b) > tolerance * scale
  return np.where(finite, far, np.isfinite(a) != np.isfinite(b))


def _rounding(draw, nudged):
  """Measures how much each output changes if the inputs hardly do."""
  return [
    max(_largest(a - c), _largest(b - d))
    for a, b, c, d in zip(*draw[1:], *nudged[1:], strict=True)
  ]


def _excess(draw, eps, rounding):
  """Finds the worst row of each output, and its excess over rounding.

  With an excess above 0 the two views differ by more than rounding explains.
  """
  found = []
  for k, (a, b) in enumerate(zip(draw.together, draw.alone, strict=True)):
    both = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore"):
      gap = np.max(np.where(both, np.abs(a - b), 0), axis=1)
    scale = _largest(np.where(both, np.maximum(np.abs(a), np.abs(b)), 0))
    row = int(np.argmax(gap))
    found.append((row, gap[row] - eps**0.6 * scale - _ROUNDINGS * rounding[k]))
  rows, excess = zip(*found, strict=True)
  return rows, np.array(excess)


def _some_finite(draw):
  return np.any(np.isfinite(draw.together[0]) & np.isfinite(draw.alone[0]))


def _only_one_side_is_finite(draws):
  sides = [
    np.isfinite(np.concatenate(side))
    for side in zip(*((x.together[0], x.alone[0]) for x in draws), strict=True)
  ]
  return any(map(np.all, sides))


def _largest(values):
  """The largest of the finite absolute values."""
  return np.max(np.abs(values), where=np.isfinite(values), initial=0)


def _looker(views, tracked):
  """Makes a function `inputs -> _Draw`; also the eps of the coarsest dtype."""
  closed = views.closed
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in closed.in_avals)
  total += sum(x.size * x.dtype.itemsize for x in closed.consts)
  if total > LARGEST:
    raise _NotComparedError(
      f"parameters and closed-over arrays have {total / 2**30:.1f} GiB, and"
      f" so would those that it takes; up to {LARGEST / 2**30:.0f} are made up"
    )
  consts = [_known(x) for x in closed.consts]
  count = len(views.together)
  outputs = [*tracked, *(count + i for i in tracked)]
  try:
    run = _made_up.program(closed, consts, outputs)
  except Exception as error:
    raise _NotComparedError(_told(error)) from error

  def look(inputs):
    try:
      found = run(*jax.tree.leaves(inputs))
    except Exception as error:  # no backend takes all programs
      raise _NotComparedError(_told(error)) from error
    found = [x.astype(np.float64).reshape(x.shape[0], -1) for x in found]
    return _Draw(inputs, found[: len(tracked)], found[len(tracked) :])

  return look, _made_up.coarsest_eps(closed.jaxpr)


def _known(const):
  """Copies a closed-over array, or makes one up if it can't be looked at."""
  is_traced = isinstance(const, jax.core.Tracer)
  if is_traced or not getattr(const, "is_fully_addressable", True):
    shape = _made_up.make_shape(const)
    return _made_up.parameter(shape, np.random.default_rng(3), signed=False)
  return _made_up.copied(const)


def _made(inputs, signed):
  """Makes inputs up; keyword arguments are positive, as variances are."""
  rng = np.random.default_rng(int(signed))
  params, rows, arrays = inputs
  return (
    jax.tree.map(lambda x: _made_up.parameter(x, rng, signed), params),
    jax.tree.map(lambda x: _made_up.feature(x, rng, signed), rows),
    [_made_up.parameter(x, rng, signed=False) for x in arrays],
  )


def _real(inputs, given):
  """Returns the inputs themselves, if they are there to be looked at."""
  params, batch, _ = given
  shapes, structure = jax.tree.flatten(inputs)
  rows = jax.tree.leaves(inputs[1])
  leaves = [
    *jax.tree.leaves(params),
    *(
      x[: row.shape[0]] if hasattr(x, "__getitem__") else x
      for x, row in zip(jax.tree.leaves(batch), rows, strict=True)
    ),
  ]
  if len(leaves) < len(shapes) or not all(
    isinstance(x, (jax.Array, np.ndarray))
    and not isinstance(x, jax.core.Tracer)
    and getattr(x, "is_fully_addressable", True)
    and x.dtype == shape.dtype
    for x, shape in zip(leaves, shapes, strict=True)
  ):
    return None
  return jax.tree.unflatten(structure, [_known(x) for x in leaves])


def _with_mates(inputs, others):
  """Puts others in place of every second row of the inputs."""
  params, rows, arrays = inputs

  def mix(leaf, other):
    odd = np.arange(leaf.shape[0]) % 2 == 1
    odd = odd.reshape(-1, *([1] * (leaf.ndim - 1)))
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return (jnp if is_key else np).where(odd, other, leaf)

  return params, jax.tree.map(mix, rows, others[1]), arrays


_EXPECTED = (
  "The per-sample engine, which microbatches and scores with gradient norms"
  " take, and the ghost engine show losses_fn one sample at a time; expected"
  " losses of single rows."
)


def _mates_text(views, output, one, other, row):
  entry = int(np.argmax(np.nan_to_num(np.abs(one - other)[row], nan=np.inf)))
  return (
    f"losses_fn gives sample {row * 2} {_what(views, output)}"
    f" {one[row, entry]:.6g} beside some samples and {other[row, entry]:.6g}"
    f" beside others (made-up numbers). {_EXPECTED} Losses that couple samples"
    " (contrastive ones, BatchNorm in training mode, division by a valid count)"
    " take engine='forward'; BatchNorm with running averages, or no division,"
    f" takes any engine. {_OFF}"
  )


def _text(views, draw, output, k, row):
  one, other = (x[k][row] for x in (draw.together, draw.alone))
  entry = int(np.argmax(np.nan_to_num(np.abs(one - other), nan=np.inf)))
  if _draws_random_numbers(views):
    why = (
      "draws random numbers by a key that samples share",
      "Give each sample a key of its own: put jax.random.split(key, B) into the"
      " batch and use it under jax.vmap in losses_fn, not a key among the"
      " keyword arguments; or use engine='forward', where one key draws for the"
      " whole batch.",
    )
  else:
    why = (
      "depends on how many samples there are, or on its place among them",
      "Losses that are divided by the batch's size need no division, as weights"
      " sum to 1; or use engine='forward'.",
    )
  count = views.together[0][1].shape[0]
  return (
    f"losses_fn gives sample {row} {_what(views, output)} {one[entry]:.6g} in a"
    f" batch of {count} and {other[entry]:.6g} alone (made-up numbers): it"
    f" {why[0]}. {_EXPECTED} {why[1]} {_OFF}"
  )


def _what(views, output):
  path, _ = views.together[output]
  return f"in aux leaf {_tree.key_path(path[1:])!r}" if output else "the loss"


def _draws_random_numbers(views):
  return any(
    eqn.primitive.name.startswith(("random_", "threefry", "rng_"))
    for eqn in _made_up.equations(views.closed.jaxpr)
  )


def _told(error):
  first = str(error).strip().split("\n")[0]
  return f"{type(error).__name__}: {first[:200]}"
