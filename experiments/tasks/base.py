"""The seam: what jobs ask of a task, whatever is learned."""

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
from experiments.data.pairs import datacomp
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
  coupled: bool = False  # whether losses depend on batch mates

  def losses_fn(self, params: Any, batch: Any) -> tuple[jax.Array, Aux]:
    """Losses `[B]` and `Aux`, of one forward pass."""
    outputs = self.of(params, batch)
    losses, hits = self.losses_and_hits(outputs, batch)
    return losses, Aux(hits, outputs)


class Reference(NamedTuple):
  """The reference, as a training step receives it."""

  fingerprint: str  # of all that the steps are given
  params: Any  # the reference's parameters; None if no step looks at them
  # `for_batch(batch) -> what the train step takes`, for a batch as it was read;
  # of several processes each gives its own rows.
  for_batch: Callable[[Any], Any]


class Rows(NamedTuple):
  """A batch as it was read, taken apart."""

  ids: np.ndarray  # [B], as ledgers have them
  real: np.ndarray  # bool [B], False for padding
  seen: dict[str, np.ndarray]  # what the model sees; `mask` is among it


class Truth(NamedTuple):
  """The training samples that are wrong, and how."""

  ids: np.ndarray  # [N], as ledgers have them
  kinds: np.ndarray  # text [N]: a kind of noise; "" is none

  @property
  def is_wrong(self) -> np.ndarray:
    """Bool [N]."""
    return self.kinds != ""

  def kinds_of(self, ids: np.ndarray) -> np.ndarray:
    """The kinds [M] of some of the samples, by their ids [M]."""
    own = datacomp.as_ids(self.ids)
    order = np.argsort(own)
    rows = np.searchsorted(own[order], datacomp.as_ids(ids))
    return self.kinds[order[rows]]


class Samples(NamedTuple):
  """What a page says and shows of a run's training samples."""

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
    devices: what it computes on.
    data: the run's, of a type of the task's own.
    params: the learner's, before the first step, on the devices.
    losses_fn: `(params, batch) -> (losses [B], hits [B])`.
    outputs: what the task makes of a model's outputs.
    batches: training batches, with grain's `get_state` and `set_state`.
    steps_per_epoch: batches in a pass over the data; None: it has no end.
    fingerprints: of all that a run depends on beside config and reference.
    data_fingerprints: which data a filter of the run's scores belongs to.
    last: closes the optimizer's chain; None: nothing does.
  """

  # The module of `configs` whose `get_config()` has every field there is.
  configs: types.ModuleType
  # Methods that can train it; None: all.
  methods: ClassVar[tuple[str, ...] | None] = None
  headline: ClassVar[Headline]
  # What to do where a reference's weights would harm.
  instead: ClassVar[str] = "grad_mimic_outputs or output_agreement"
  # What studies report besides the headline, and how `facts` calls the number
  # of samples that a run trains on.
  more_metrics: ClassVar[tuple[str, ...]] = ()
  size: ClassVar[str] = "train_samples"
  # The name of `score_by_reference`; None: there is no such score.
  reference_score: ClassVar[str | None] = None

  config: config_dict.ConfigDict
  devices: distributed.Devices
  data: Any
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
    config: config_dict.ConfigDict,
    devices: distributed.Devices,
    *,
    direction: str | None = None,
  ):
    """Loads data, and makes the model.

    Args:
      config: the run's.
      devices: what to compute on.
      direction: of the run's method; None: it has none.
    """

  @classmethod
  def of_learner(
    cls,
    config: config_dict.ConfigDict,
    devices: distributed.Devices,
    folder: pathlib.Path,
    *,
    direction: str | None = None,
  ) -> "Task":
    """The task of a finished run, to score its data again.

    Args:
      config: the run's.
      devices: what to compute on.
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
    """Finds out which data a filter of a run's scores belongs to.

    Args:
      config: of the run, or of what was scored.
      folder: its folder.
      ledger: the fingerprints of the ledger in it.

    Returns:
      What `data_fingerprints` is in a Task of that config.

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
    """Reads what a page shows of a run's training samples.

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
    """What the reference alone says of all training samples.

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
    """Steps of the run."""
    return durations.steps(
      self.config, "num", steps_per_epoch=self.steps_per_epoch
    )

  @property
  def samples(self) -> int | None:
    """The number of training samples; None where nobody knows."""
    return None

  @abc.abstractmethod
  def take(self, batch: dict[str, np.ndarray]) -> Rows:
    """A training batch, taken apart."""

  @abc.abstractmethod
  def passes(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """One pass over all training samples in order, from a batch on."""

  @abc.abstractmethod
  def evaluate(self, params: Any) -> dict[str, float]:
    """The metrics of parameters, by the names that are written."""

  def check_losses_fn(self) -> Callable[..., Any]:
    """`losses_fn`, for the batch that a reference is checked on."""
    return self.losses_fn

  @abc.abstractmethod
  def check_batch(self) -> Any:
    """Training samples on which a reference is checked, on the devices."""

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
    """Facts about the data, for `result.json`."""
    return {}

  def result_fingerprints(self) -> dict[str, str]:
    """Whose the files beside `result.json` are, by their names."""
    return {}

  def save(self, folder: pathlib.Path) -> None:
    """Leaves in a run's folder what later jobs need to know of its data."""
    del folder

  def close(self) -> None:
    """Ends what reads batches."""
    return None

  # What a study asks, without making the task.

  @classmethod
  def check_study(cls, config: config_dict.ConfigDict) -> None:
    """Raises ValueError unless a study of the config can be made."""
    del config

  @classmethod
  def noise_kinds(cls, config: config_dict.ConfigDict) -> tuple[str, ...]:
    """The kinds of noise that the config adds, as `Truth` has them."""
    return tuple(config.noise.kinds)

  @classmethod
  def seed_overrides(cls, seed: int) -> dict[str, Any]:
    """The fields that follow a study's seed, besides `seed`."""
    return {"noise.seed": seed}

  @classmethod
  def reference_overrides(
    cls, config: config_dict.ConfigDict, seed: int
  ) -> dict[str, Any]:
    """The fields in which a study's reference differs from its learners.

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
    """The truth about all training samples of a run, filter or not.

    Args:
      config: the run's.
      folder: the run's, which has begun at least.

    Returns:
      The Truth; None where nobody knows.

    Raises:
      ValueError: a file in the folder is damaged, or another run's.
    """
    del config, folder
    return None


def finished_run(config: config_dict.ConfigDict) -> pathlib.Path:
  """The folder of the finished run that `config.mimic.reference` names.

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
