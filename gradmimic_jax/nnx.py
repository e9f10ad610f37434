"""The method for modules of Flax NNX, as `flax.nnx.value_and_grad` has them.

The functions take the module itself, and see to its statistics (BatchNorm) and
its random keys (Dropout). They need flax, which nothing else here does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from gradmimic_jax import gradients, reference as reference_lib
from gradmimic_jax.gradients import MimicInfo, MimicScores
from gradmimic_jax.reference import ReferenceReport

if TYPE_CHECKING:
  from flax import nnx


def mimic_value_and_grad(
  losses_fn: Callable[..., Any],
  *,
  wrt: Any = None,
  has_aux: bool = False,
  **options: Any,
) -> Callable[..., tuple[tuple[jax.Array, MimicInfo], nnx.State]]:
  """Like `nnx.value_and_grad`, with samples weighted by their mimic scores.

  The module is changed in place as by `nnx.value_and_grad`: what a forward pass
  changes in it (BatchNorm's statistics, the counts of Dropout's keys) is
  changed once a step. Call it in a function under `nnx.jit`.

  Args:
    losses_fn: `losses_fn(model, batch, **kwargs) -> losses [B]`, or `(losses,
      aux)` with `has_aux`.
    wrt: which variables are trained, a filter of NNX; `nnx.Param` if not given.
    has_aux: whether losses_fn returns `(losses, aux)`.
    **options: of `gm.mimic_value_and_grad`; `layers` and a direction of one's
      own see the trained variables as a nested dict. Where batch statistics or
      random keys are in play, the engine has to be the forward one, which
      "auto" takes unless microbatches or gradient norms are asked for.

  Returns:
    `fn(model, reference, batch, *, mask=None, step=None, **kwargs) -> ((loss,
    MimicInfo), grads)`. `reference`: a module of the same structure, which is
    left as it is; or what else the direction or the score asks for. `grads`: an
    `nnx.State`, as `nnx.Optimizer.update` takes it.

  Raises:
    ModuleNotFoundError: flax is not installed.
    TypeError: from `fn`, a model that isn't an NNX module.
    ValueError: as `gm.mimic_value_and_grad`.

  Example: ::

    step = gm.nnx.mimic_value_and_grad(losses_fn, weighting=gm.ess_softmax(0.3))

    @nnx.jit
    def train_step(model, optimizer, reference, batch):
      (loss, info), grads = step(model, reference, batch)
      optimizer.update(model, grads)
      return loss, info.scores
  """
  lib = _nnx()
  wrt = lib.Param if wrt is None else wrt

  def fn(
    model: nnx.Module, reference: Any, batch: Any, **kwargs: Any
  ) -> tuple[tuple[jax.Array, MimicInfo], nnx.State]:
    run = _Run(lib, model, wrt, losses_fn, has_aux)
    step = gradients.mimic_value_and_grad(run.losses, has_aux=True, **options)
    (loss, info), grads = step(
      run.params, run.params_of(reference), batch, **kwargs
    )
    leaves, aux = info.aux
    run.update(leaves)
    return (loss, info._replace(aux=aux)), run.state_of(grads)

  return fn


def mimic_scores(
  losses_fn: Callable[..., Any],
  *,
  wrt: Any = None,
  has_aux: bool = False,
  **options: Any,
) -> Callable[..., MimicScores]:
  """Mimic scores of a batch, without a gradient; the module stays as it is.

  Args:
    losses_fn: as in `mimic_value_and_grad`.
    wrt: as in `mimic_value_and_grad`.
    has_aux: as in `mimic_value_and_grad`; only the score sees the aux.
    **options: of `gm.mimic_scores`.

  Returns:
    `fn(model, reference, batch, *, mask=None, step=None, **kwargs) ->
    MimicScores`.

  Raises:
    ModuleNotFoundError, TypeError, ValueError: as `mimic_value_and_grad`.
  """
  lib = _nnx()
  wrt = lib.Param if wrt is None else wrt

  def fn(
    model: nnx.Module, reference: Any, batch: Any, **kwargs: Any
  ) -> MimicScores:
    run = _Run(lib, model, wrt, losses_fn, has_aux)
    score = gradients.mimic_scores(run.losses, has_aux=True, **options)
    return score(run.params, run.params_of(reference), batch, **kwargs)

  return fn


def check_reference(
  losses_fn: Callable[..., Any],
  model: nnx.Module,
  reference: nnx.Module,
  batch: Any,
  *,
  wrt: Any = None,
  has_aux: bool = False,
  **options: Any,
) -> ReferenceReport:
  """Tests if a reference module's weights can guide this model.

  As `gm.check_reference`; both modules stay as they are. Losses are those of
  the mode that the model is in, by its own statistics and random keys.

  Args:
    losses_fn: as in `mimic_value_and_grad`.
    model: the learner.
    reference: a module of the same structure.
    batch: leaves `[B, ...]`.
    wrt: as in `mimic_value_and_grad`.
    has_aux: as in `mimic_value_and_grad`.
    **options: of `gm.check_reference`, and keyword arguments for losses_fn.

  Returns:
    A ReferenceReport.

  Raises:
    ModuleNotFoundError: flax is not installed.
    TypeError, ValueError: as `gm.check_reference`.

  Example: ::

    print(gm.nnx.check_reference(losses_fn, model, reference, batch))
  """
  lib = _nnx()
  run = _Run(lib, model, lib.Param if wrt is None else wrt, losses_fn, has_aux)
  return reference_lib.check_reference(
    run.losses,
    run.params,
    run.params_of(reference),
    batch,
    has_aux=True,
    **options,
  )


class _Run:
  """A module as a pure function of its trained variables."""

  def __init__(
    self,
    lib: Any,
    model: Any,
    wrt: Any,
    losses_fn: Callable[..., Any],
    has_aux: bool,
  ):
    if not isinstance(model, lib.Module):
      raise TypeError(
        f"model is a {type(model).__name__}; expected an nnx.Module. Trees of"
        " parameters go to gm.mimic_value_and_grad and gm.mimic_scores."
      )
    self._lib, self._model, self._wrt = lib, model, wrt
    self._losses_fn, self._has_aux = losses_fn, has_aux
    self._graph, self._state, self._rest = lib.split(model, wrt, ...)
    self.params = lib.to_pure_dict(self._state)
    self._changed: list[int] = []

  def params_of(self, reference):
    """Returns the trained variables of a module; other values as they are."""
    if isinstance(reference, self._lib.Module):
      reference = self._lib.state(reference, self._wrt)
    if isinstance(reference, self._lib.State):
      return self._lib.to_pure_dict(reference)
    return reference

  def losses(self, params, batch, **kwargs):
    """Computes losses and, as the aux, what was changed and the user's aux."""
    lib = self._lib
    model = lib.merge(self._graph, self.state_of(params), self._rest, copy=True)
    losses = self._losses_fn(model, batch, **kwargs)
    losses, aux = losses if self._has_aux else (losses, None)
    _, _, rest = lib.split(model, self._wrt, ...)
    before, after = jax.tree.leaves(self._rest), jax.tree.leaves(rest)
    structures = {jax.tree.structure(rest), jax.tree.structure(self._rest)}
    if len(structures) > 1:
      raise ValueError(
        "losses_fn adds variables to the model, or takes some away; expected"
        " the same ones after it. Make them when the model is made."
      )
    # Which variables those are is known from their identity while tracing.
    pairs = zip(before, after, strict=True)
    self._changed = [i for i, (old, new) in enumerate(pairs) if new is not old]
    return losses, ([after[i] for i in self._changed], aux)

  def state_of(self, tree):
    """Puts leaves in the variables that they belong to."""
    state = jax.tree.map(lambda x: x, self._state)
    self._lib.replace_by_pure_dict(state, tree)
    return state

  def update(self, leaves):
    """Changes the module as its forward pass did."""
    rest, structure = jax.tree.flatten(self._rest)
    for i, leaf in zip(self._changed, leaves, strict=True):
      rest[i] = leaf
    self._lib.update(self._model, jax.tree.unflatten(structure, rest))


def _nnx() -> Any:
  try:
    from flax import nnx
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "gm.nnx needs flax: pip install flax. Trees of parameters need nothing"
      " else: gm.mimic_value_and_grad."
    ) from error
  return nnx
