"""The cells of a grid of heads: what is trained together, and after what."""

import itertools
from typing import NamedTuple

from ml_collections import config_dict

from configs import label_noise
from experiments import methods
from experiments.runtime import workdir as workdir_lib
from experiments.studies import detection, settings
from experiments.studies.plan import BASELINE, REFERENCE
from experiments.studies.probing import heads
from experiments.training import memory

# Methods whose fraction must be a number when jit traces.
ONE_VALUE = ("grad_match_omp",)


class Cell(NamedTuple):
  """One method's runs that are one program: seeds x (rate, value)."""

  method: str  # or REFERENCE
  seeds: tuple[int, ...]
  points: tuple[tuple[float, float | None], ...]
  # Of the training samples, those whose true labels the reference has; None
  # for methods without one.
  share: float | None = None
  # Whether the baseline is trained on what that method's selection keeps, and
  # on the true labels that the reference has besides.
  retrained: bool = False
  with_clean: bool = False

  @property
  def name(self) -> str:
    """What its runs are called in tables."""
    if not self.retrained:
      return self.method
    return f"retrained_{self.method}" + "_with_clean" * self.with_clean

  @property
  def trained_by(self) -> str:
    """The method whose steps it takes."""
    plain = self.retrained or self.method == REFERENCE
    return BASELINE if plain else self.method


def check(config: config_dict.ConfigDict) -> None:
  """Raises ValueError unless the grid can be run."""
  workdir_lib.check_fields(config, label_noise)
  wanted = config.study.reference
  given = {
    "config.data.filter": config.data.filter,
    "config.mimic.reference": config.mimic.reference,
    "config.mimic.outputs": config.mimic.outputs,
    "config.study.reference.model": wanted.model,
    "config.study.reference.train_split": wanted.train_split,
    "config.study.reference.test_leak": wanted.test_leak,
    "config.study.keep_fractions": config.study.keep_fractions,
    "config.study.rounds": config.study.rounds
    if config.study.rounds > 1
    else 0,
  }
  for field, value in given.items():
    if value:
      raise ValueError(
        f"{field} is {value!r}, which a grid of heads has no use for: its"
        " reference is a head of its own. Leave it out, or use"
        " protocol=finetune."
      )
  for field, count in (
    ("study.seeds", len(config.study.seeds)),
    ("study.methods", len(config.study.methods)),
    ("probe.rates", len(config.probe.rates)),
    ("probe.reference_shares", len(config.probe.reference_shares)),
    ("probe.runs_per_cell", config.probe.runs_per_cell),
    ("num_epochs", config.num_epochs),
    ("batch_size", config.batch_size),
    ("eval_batch_size", config.eval_batch_size),
  ):
    if count < 1:
      raise ValueError(f"config.{field} has {count}; expected at least 1.")
  for name in config.study.methods:
    memory.make_plan(
      config.mimic,
      methods.create(name, config.mimic),
      samples=1,
      steps_per_epoch=1,
    )
    if name == "grand_offline":
      raise ValueError(
        "config.study.methods has 'grand_offline', which needs runs of its own;"
        " use protocol=finetune for it, or take 'grand'."
      )
  for share in config.probe.reference_shares:
    if not 0 < share <= 1:
      raise ValueError(
        f"config.probe.reference_shares has {share}; expected numbers above 0"
        " and up to 1."
      )
  detection.check(config)
  for name, fields in settings.read(config.study.tuned).items():
    field = f"mimic.{heads.value_field(name, config.mimic)}"
    if config.probe.weighting_values and field in fields:
      raise ValueError(
        f"config.study.tuned sets {field} of {name}, and"
        " config.probe.weighting_values has several; give one of the two."
      )


def has_reference(name: str, config: config_dict.ConfigDict) -> bool:
  """True if that method goes by a reference that is trained."""
  method = methods.create(name, config.mimic)
  return method is not None and method.direction in ("weights", "outputs")


def cells_of(config: config_dict.ConfigDict) -> list[Cell]:
  """Makes the grid's cells, each after those that it needs."""
  study, shares = config.study, tuple(config.probe.reference_shares)
  guided = [name for name in study.methods if has_reference(name, config)]
  made = []
  for share in shares if guided else ():
    made += _chunked(config, REFERENCE, [[(0.0, None)]], share=share)
  for name in study.methods:
    values: list[float | None] = [None]
    if heads.value_field(name, config.mimic) is not None:
      values = sorted(config.probe.weighting_values) or values
    # One value's rates stand together.
    groups = [
      [(rate, value) for rate in config.probe.rates] for value in values
    ]
    if name not in ONE_VALUE:
      groups = [list(itertools.chain(*groups))]
    for share in shares if name in guided else (None,):
      made += _chunked(config, name, groups, share=share)
  return [*made, *_retrained(config, made)]


def _chunked(config, name, groups, *, share):
  """Yields a method's cells, none of them larger than a program may be."""
  most = config.probe.runs_per_cell
  for group in groups:
    for some in _chunks(group, most):
      for seeds in _chunks(config.study.seeds, max(1, most // len(some))):
        yield Cell(name, tuple(seeds), tuple(some), share)


def _chunks(items, size):
  items = list(items)
  for start in range(0, len(items), size):
    yield items[start : start + size]


def _retrained(config, made):
  """Yields plain runs on what those cells' selections keep."""
  chosen = config.study.keep_methods or config.study.methods
  for cell in made if config.study.retrain else ():
    scored = cell.method != REFERENCE and methods.tells_samples_apart(
      methods.create(cell.method, config.mimic)
    )
    if not scored or cell.method not in chosen:
      continue
    yield cell._replace(retrained=True)
    if cell.share is not None and cell.share < 1:
      yield cell._replace(retrained=True, with_clean=True)
