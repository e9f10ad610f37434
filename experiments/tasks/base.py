"""The seam: the interface between jobs and tasks, whatever is learned."""

import abc
import functools
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax

import gradmimic_jax as gm
from experiments.runtime import (
  distributed,
  durations,
  workdir as workdir_lib,
)
from gradmimic_jax.scores import Score


class Aux(NamedTuple):
  """A loss function's outputs besides the losses."""

  hits: jax.Array  # bool [B]
  outputs: Any  # the learner's


class Outputs(NamedTuple):
  """The learner's and the reference's outputs, as a task sees them."""

  of: Callable[..., Any]  # (params, batch) -> the learner's outputs
  # (outputs, batch) -> losses [B] and hits [B]
  losses_and_hits: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  direction: gm.Direction  # toward the reference's outputs for the batch
  # By name: scores that look at outputs, of functions with `Aux`.
  scores: dict[str, Score]
  # (the reference's outputs, outputs, batch) -> [B]; None: there are none.
  divergences: Callable[[Any, Any, Any], jax.Array] | None = None
  coupled: bool = False  # True if losses depend on batch mates

  def losses_fn(self, params: Any, batch: Any) -> tuple[jax.Array, Aux]:
    """Computes losses `[B]` and `Aux`, in one forward pass."""
    outputs = self.of(params, batch)
    losses, hits = self.losses_and_hits(outputs, batch)
    return losses, Aux(hits, outputs)


class Reference(NamedTuple):
  """The reference, as a training step receives it."""

  fingerprint: str  # of all that the steps are given
  params: Any  # the reference's parameters; None if no step looks at them
  # `for_batch(batch) -> the step's reference`, for a batch as it was read;
  # of several processes each gives its own rows.
  for_batch: Callable[[Any], Any]


class Rows(NamedTuple):
  """A batch as it was read, in parts."""

  ids: np.ndarray  # [B], as ledgers have them
  real: np.ndarray  # bool [B], False for padding
  seen: dict[str, np.ndarray]  # the model's input; `mask` is among it


class Truth(NamedTuple):
  """The training samples that are wrong, and how."""

  ids: np.ndarray  # [N], as ledgers have them
  kinds: np.ndarray  # text [N]: a kind of noise; "" is none

  @property
  def is_wrong(self) -> np.ndarray:
    """True where a sample is wrong, bool [N]."""
    return self.kinds != ""


class Headline(NamedTuple):
  """The two metrics of an evaluation that studies report."""

  loss: str
  accuracy: str


class Task(abc.ABC):
  """A run's data, model and losses.

  Attributes:
    config: the run's, with fields that the task works out filled in.
    devices: the devices that it computes on.
    params: the learner's, before the first step, on the devices.
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    outputs: the functions of the model's outputs.
    batches: training batches, with grain's `get_state` and `set_state`.
    steps_per_epoch: batches in a pass over the data; None: it has no end.
    fingerprints: of all that a run depends on beside config and reference.
    data_fingerprints: the data that a filter of the run's scores belongs to.
    last: closes the optimizer's chain; None: nothing does.
  """

  # The module of `configs` whose `get_config()` has every field there is.
  configs: ClassVar[types.ModuleType]
  # Methods that can train it; None: all.
  methods: ClassVar[tuple[str, ...] | None] = None
  headline: ClassVar[Headline]
  # Advice where a reference's weights would harm.
  instead: ClassVar[str] = "grad_mimic_outputs or output_agreement"

  config: Any
  devices: distributed.Devices
  params: Any
  losses_fn: Callable[..., Any]
  outputs: Outputs
  batches: Any
  steps_per_epoch: int | None
  fingerprints: dict[str, str]
  data_fingerprints: dict[str, str]
  last: optax.GradientTransformation | None = None

  @abc.abstractmethod
  def __init__(
    self,
    config: Any,
    devices: distributed.Devices,
    *,
    direction: str | None = None,
  ):
    """Loads data, and makes the model.

    Args:
      config: the run's.
      devices: the devices to compute on.
      direction: of the run's method; None: it has none.
    """

  @classmethod
  def create_for_scoring(
    cls,
    config: Any,
    devices: distributed.Devices,
    folder: pathlib.Path,
    *,
    direction: str | None = None,
  ) -> "Task":
    """Creates the task of a finished run, to score its data again.

    Args:
      config: the run's.
      devices: the devices to compute on.
      folder: the run's.
      direction: of the method that scores.

    Returns:
      The Task.
    """
    del folder
    return cls(config, devices, direction=direction)

  @functools.cached_property
  def total_steps(self) -> int:
    """The number of steps of the run."""
    return durations.steps(
      self.config, "num", steps_per_epoch=self.steps_per_epoch
    )

  @property
  def samples(self) -> int | None:
    """The number of training samples; None if it is unknown."""
    return None

  @abc.abstractmethod
  def take(self, batch: dict[str, np.ndarray]) -> Rows:
    """Takes a training batch apart."""

  @abc.abstractmethod
  def passes(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Goes over all training samples once, in order, from a batch on."""

  @abc.abstractmethod
  def evaluate(self, params: Any) -> dict[str, float]:
    """Computes the metrics of parameters, by the names to write them under."""

  def check_losses_fn(self) -> Callable[..., Any]:
    """Returns `losses_fn` for the batch that a reference is checked on."""
    return self.losses_fn

  @abc.abstractmethod
  def check_batch(self) -> Any:
    """Returns training samples to check a reference on, on the devices."""

  @abc.abstractmethod
  def load_reference(self, direction: str) -> Reference:
    """Loads the reference that a method's direction asks for.

    Args:
      direction: a method's; see `experiments.methods`.

    Returns:
      The Reference.

    Raises:
      ValueError: no reference, or one that doesn't fit.
      FileNotFoundError: a reference that is not there.
    """

  def facts(self) -> dict[str, Any]:
    """Returns facts about the data, for `result.json`."""
    return {}

  def result_fingerprints(self) -> dict[str, str]:
    """Returns fingerprints of the files beside `result.json`, by name."""
    return {}

  def save(self, folder: pathlib.Path) -> None:
    """Leaves in a run's folder the facts on its data that later jobs need."""
    del folder

  def close(self) -> None:
    """Ends the reading of batches."""
    return None


def finished_run(config: Any) -> pathlib.Path:
  """Finds the finished run that `config.mimic.reference` names.

  Args:
    config: a run's.

  Returns:
    The folder.

  Raises:
    ValueError: none is named.
    FileNotFoundError: there is no finished run.
  """
  where = config.mimic.reference
  if where is None:
    raise ValueError(
      f"method {config.method!r} needs a reference: set"
      " --config.mimic.reference to the workdir of a finished run, or use"
      " experiments.study, which trains one."
    )
  if not (pathlib.Path(where) / workdir_lib.RESULT_FILE).exists():
    raise FileNotFoundError(
      f"there is no finished run in {where}, which config.mimic.reference"
      " names: give that run's own command (again) first."
    )
  return pathlib.Path(where)
