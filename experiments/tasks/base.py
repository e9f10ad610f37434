"""The seam: the interface between jobs and tasks, whatever is learned."""

import abc
import functools
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import config_dict

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
  statistics: Any = ()  # the model's new ones, where training makes some


class Outputs(NamedTuple):
  """The learner's and the reference's outputs, as a task sees them.

  A model with statistics takes them as the keyword argument `statistics`,
  wherever `(params, batch)` is written here.
  """

  of: Callable[..., Any]  # (params, batch) -> the learner's outputs
  # (outputs, batch) -> losses [B] and hits [B]
  losses_and_hits: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  direction: gm.Direction  # toward the reference's outputs for the batch
  # By name: scores that look at outputs, of functions with `Aux`.
  scores: dict[str, Score]
  # (the reference's outputs, outputs, batch) -> [B]; None: there are none.
  divergences: Callable[[Any, Any, Any], jax.Array] | None = None
  coupled: bool = False  # True if losses depend on batch mates
  # (params, batch) -> the learner's outputs and its new statistics, for a batch
  # in training: one with random keys `[B]` by the name of `key`. None: training
  # is as evaluation.
  train: Callable[..., tuple[Any, Any]] | None = None
  # What of the model's statistics makes a sample's loss in training depend on
  # its batch mates, for messages; "": nothing.
  couples: str = ""

  def losses_fn(
    self, params: Any, batch: Any, **variables: Any
  ) -> tuple[jax.Array, Aux]:
    """Computes losses `[B]` and `Aux`, in one forward pass."""
    if self.train is not None and "key" in batch:
      outputs, statistics = self.train(params, batch, **variables)
    else:
      outputs, statistics = self.of(params, batch, **variables), ()
    losses, hits = self.losses_and_hits(outputs, batch)
    return losses, Aux(hits, outputs, statistics)


class Reference(NamedTuple):
  """The reference, as a training step receives it."""

  fingerprint: str  # of all that the steps are given
  params: Any  # the reference's parameters; None if no step looks at them
  # `for_batch(batch) -> the step's reference`, for a batch as it was read;
  # of several processes each gives its own rows.
  for_batch: Callable[[Any], Any]
  constant: bool = False  # True: the same for every batch

  @property
  def differs(self) -> bool:
    """True if batches have references of their own."""
    return self.params is None and not self.constant


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

  def kinds_of(self, ids: np.ndarray) -> np.ndarray:
    """Finds the kinds [M] of some of the samples, by their ids [M].

    Raises:
      ValueError: an id that is not there.
    """
    # Here, as no training run needs them.
    from experiments.data.pairs import datacomp
    from gradmimic_jax.selection import _ids

    own, ids = datacomp.as_ids(self.ids), datacomp.as_ids(ids)
    rows, missing = _ids.find(own, ids)
    if len(missing):
      raise ValueError(
        f"{len(missing)} of {len(ids)} ids are not among the {len(own)}"
        f" training samples, the first is {missing[0]!r}; expected ids of this"
        " data."
      )
    return self.kinds[rows]


class Samples(NamedTuple):
  """The contents of a page about a run's training samples."""

  title: str
  facts: dict[str, Any]  # of the data and the model, by name
  dataset: dict[str, Any] | None = None  # as `gm.report` takes it


class Headline(NamedTuple):
  """The two metrics of an evaluation that studies report."""

  loss: str
  accuracy: str


class Task(abc.ABC):
  """A run's data, model and losses.

  Attributes:
    config: the run's, with fields that the task works out filled in.
    devices: the devices that it computes on.
    data: the run's, of a type of the task's own.
    params: the learner's, before the first step, on the devices.
    losses_fn: `(params, batch) -> (losses [B], hits [B])`; with the keyword
      argument `statistics`, where the model has some.
    outputs: the functions of the model's outputs.
    statistics: what the model carries besides its parameters, before the first
      step, on the devices; `()`: nothing.
    batches: training batches, with grain's `get_state` and `set_state`.
    steps_per_epoch: batches in a pass over the data; None: it has no end.
    fingerprints: of all that a run depends on beside config and reference.
    data_fingerprints: the data that a filter of the run's scores belongs to.
    last: closes the optimizer's chain; None: nothing does.
    resident: a tree of arrays that stay on the devices and go into every step;
      None: there are none.
    expand: `(batch, resident) -> batch`, compiled with the steps: makes an
      uploaded batch, or one of a reference, what the losses take; None: it is
      that. From a factory that `programs.once` keeps, as programs are shared by
      runs that share it.
  """

  # The module of `configs` whose `get_config()` has every field there is.
  configs: types.ModuleType
  # Methods that can train it; None: all.
  methods: ClassVar[tuple[str, ...] | None] = None
  headline: ClassVar[Headline]
  # Advice where a reference's weights would harm.
  instead: ClassVar[str] = "grad_mimic_outputs or output_agreement"
  # Metrics that studies report besides the headline, and the name in `facts` of
  # the number of samples that a run trains on.
  more_metrics: ClassVar[tuple[str, ...]] = ()
  size: ClassVar[str] = "train_samples"
  # The name of `score_by_reference`; None: there is no such score.
  reference_score: ClassVar[str | None] = None

  config: config_dict.ConfigDict
  devices: distributed.Devices
  data: Any
  params: Any
  statistics: Any = ()
  losses_fn: Callable[..., Any]
  outputs: Outputs
  batches: Any
  steps_per_epoch: int | None
  fingerprints: dict[str, str]
  data_fingerprints: dict[str, str]
  last: optax.GradientTransformation | None = None
  resident: Any = None
  expand: Callable[[Any, Any], Any] | None = None

  @abc.abstractmethod
  def __init__(
    self,
    config: config_dict.ConfigDict,
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
    config: config_dict.ConfigDict,
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

  # Of finished runs, for jobs that make no model.

  @classmethod
  def load_fingerprints(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> dict[str, str]:
    """Describes the data that a filter of a run's scores belongs to.

    Args:
      config: of the run, or of what was scored.
      folder: its folder.
      ledger: the fingerprints of the ledger in it.

    Returns:
      The `data_fingerprints` of a Task of that config.

    Raises:
      ValueError: files in the folder that are not of that ledger.
      FileNotFoundError: one of them, or the data set, is not there.
    """
    del config, folder, ledger
    return {}

  @classmethod
  def load_samples(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> Samples:
    """Reads the contents of a page about a run's training samples.

    Args:
      config: of the run, or of what was scored.
      folder: its folder.
      ledger: the fingerprints of the ledger in it.

    Returns:
      The Samples.

    Raises:
      ValueError, FileNotFoundError: as `load_fingerprints`.
    """
    del folder, ledger
    return Samples(config.data.get("name", config.task), {})

  @classmethod
  def score_by_reference(
    cls, config: config_dict.ConfigDict
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores all training samples by the reference alone.

    Args:
      config: a run's, with its reference.

    Returns:
      Ids [N] and scores [N], high = good.

    Raises:
      ValueError: the task has no such score.
    """
    raise ValueError(
      f"the task {config.task!r} has no score by the reference alone; leave out"
      " filters such as clip_top30."
    )

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
  def evaluate(self, params: Any, **variables: Any) -> dict[str, float]:
    """Computes the metrics of parameters, by the names to write them under.

    Args:
      params: the parameters.
      **variables: `statistics`, where the model has some.

    Returns:
      Metrics by name.
    """

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

  # For studies, which don't make the task.

  @classmethod
  def check_study(cls, config: config_dict.ConfigDict) -> None:
    """Raises ValueError unless a study of the config can be made."""
    del config

  @classmethod
  def noise_kinds(cls, config: config_dict.ConfigDict) -> tuple[str, ...]:
    """Returns the kinds of noise that the config adds, as in `Truth`."""
    return tuple(config.noise.kinds)

  @classmethod
  def seed_overrides(cls, seed: int) -> dict[str, Any]:
    """Returns the fields that follow a study's seed, besides `seed`."""
    return {"noise.seed": seed}

  @classmethod
  def reference_overrides(
    cls, config: config_dict.ConfigDict, seed: int
  ) -> dict[str, Any]:
    """Returns the fields in which a study's reference differs from learners.

    Args:
      config: the study's.
      seed: the study's.

    Returns:
      `{"dotted.field": value}`.
    """
    wanted = config.study.reference
    return {
      "seed": seed + wanted.seed_offset,
      "method": "sgd",
      "noise.rate": wanted.noise_rate,
      **durations.overrides(wanted),
    }

  @classmethod
  def load_truth(
    cls, config: config_dict.ConfigDict, folder: pathlib.Path
  ) -> Truth | None:
    """Loads the truth about all training samples of a run, filter or not.

    Args:
      config: the run's.
      folder: the run's, which has begun at least.

    Returns:
      The Truth; None if it is unknown.

    Raises:
      ValueError: a file in the folder is damaged, or another run's.
    """
    del config, folder
    return None


def finished_run(config: config_dict.ConfigDict) -> pathlib.Path:
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
