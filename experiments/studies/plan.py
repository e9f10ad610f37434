"""The runs of a study, and what the config of each differs in."""

import itertools
import re
from typing import Any, NamedTuple

from ml_collections import config_dict

from experiments import methods, tasks
from experiments.selection import cuts
from experiments.studies import detection, settings as tuned_settings
from experiments.training import memory

REFERENCE = "reference"
BASELINE = "sgd"  # what the others are compared with
_WEIGHTINGS = {
  "ess": ("ess_softmax", "fraction"),
  "temperature": ("softmax", "temperature"),
  "top": ("top_fraction", "fraction"),
}


class Run(NamedTuple):
  """One run of a study."""

  seed: int
  name: str  # of the run, and of its folder
  overrides: dict[str, Any]  # what its config has otherwise than the study's
  needs: tuple[str, ...] = ()  # runs of the same seed that must be finished
  # Of a run on a part of the data: whose scores choose (None: chance), and the
  # share that is kept (None: what that run's selection keeps); or a filter.
  chosen_by: str | None = None
  keep: float | None = None
  filter: str = ""
  reference: str = REFERENCE  # the one of `needs` that it goes by

  @property
  def is_on_a_part(self) -> bool:
    """True if it trains on a part of the data only."""
    return bool(self.chosen_by or self.keep or self.filter)


def plan_runs(config: config_dict.ConfigDict) -> list[Run]:
  """Plans all runs of a study, each after those that it needs.

  Raises:
    ValueError: no seeds or methods, a name that is not there, weights of
      another architecture, or filters without scores.
  """
  study = config.study
  _check(config)
  settings = plan_settings(config)
  tuned = tuned_settings.read(study.tuned)
  plain = {"method": BASELINE, **tuned.get(BASELINE, {})}
  made = {
    name: methods.create(fields["method"], config.mimic)
    for name, fields in settings.items()
  }
  for method in made.values():  # before hours go into the other runs
    memory.make_plan(config.mimic, method, samples=1, steps_per_epoch=1)
  scored = [
    name for name, method in made.items() if methods.tells_samples_apart(method)
  ]
  choosing = [name for name in scored if name in (study.keep_methods or scored)]
  by = study.filter_by or (scored[0] if scored else "")
  if study.against and study.against not in settings:
    raise ValueError(
      f"config.study.against is {study.against!r}; expected one of the runs"
      f" {', '.join(settings)}."
    )
  if study.filters and by not in scored:
    raise ValueError(
      f"config.study.filters needs the scores of a run, and filter_by is"
      f" {by!r}; expected one of {', '.join(scored) or '(none has any)'}."
    )
  first = (REFERENCE,) if needs_reference(config) else ()
  runs = []
  for seed in study.seeds:
    if first:
      other = tasks.get(config).reference_overrides(config, seed)
      runs.append(Run(seed, REFERENCE, other))
    for name, fields in settings.items():
      runs.append(Run(seed, name, fields, first if made[name] else ()))
      runs += _plan_rounds(runs[-1], made[name], study.rounds)
    for name in scored if study.retrain else ():
      runs.append(Run(seed, f"retrained_{name}", plain, (name,), name))
    for keep, scorer in itertools.product(
      study.keep_fractions, (*choosing, None)
    ):
      needs = (scorer or next(iter(settings)),)
      title = f"keep_{keep:g}_{scorer or 'random'}"
      runs.append(Run(seed, title, plain, needs, scorer, keep))
    for text in study.filters:
      title = "kept_" + cuts.file_of(text).removesuffix(".npy")
      runs.append(Run(seed, title, plain, (*first, by), filter=text))
  return runs


def is_later_round(name: str) -> bool:
  """True for the name of a run whose reference is a learner."""
  return re.search(r"_round\d+$", name) is not None


def _plan_rounds(run, method, rounds):
  """Plans runs whose reference is the learner of the round before."""
  if method is None or method.direction not in ("weights", "outputs"):
    return []
  found, last = [], run.name
  for number in range(2, rounds + 1):
    name = f"{run.name}_round{number}"
    found.append(run._replace(name=name, needs=(last,), reference=last))
    last = name
  return found


def plan_settings(config: config_dict.ConfigDict) -> dict[str, dict[str, Any]]:
  """Plans the methods, each at the layers and weightings that it looks at.

  Returns:
    For each run's name its overrides, `{name: {"dotted.field": value}}`.

  Raises:
    ValueError: a name that is not there, or weights of another architecture.
  """
  study = config.study
  tuned = tuned_settings.read(study.tuned)
  weightings = {name: read_weighting(name) for name in study.weightings}
  found: dict[str, dict[str, Any]] = {}
  for name in study.methods:
    method = _create(config, name)
    layers: tuple[str | None, ...] = (None,)
    values: tuple[str | None, ...] = (None,)
    points: tuple[str | None, ...] = (None,)
    if "points" in tuned_settings.fields_read(name, config.mimic):
      points = tuple(study.points) or points
    if methods.reads_layers(method):
      layers = tuple(study.layers) or layers
    if "weighting" in tuned_settings.fields_read(name, config.mimic):
      values = tuple(weightings) or values
    for layer, value, point in itertools.product(layers, values, points):
      overrides: dict[str, Any] = {"method": name, **tuned.get(name, {})}
      if layer is not None:
        overrides["mimic.layers"] = layer
      if value is not None:
        overrides |= weightings[value]
      if point is not None:
        overrides["mimic.points"] = read_points(point)
      words = [x for x in (name, layer, value, point) if x is not None]
      found[re.sub(r"[^\w.]+", "_", "_".join(words))] = overrides
  return found


def read_points(text: str) -> tuple[float, ...]:
  """Reads a name in `config.study.points`, such as "0.25+0.75".

  Raises:
    ValueError: a name that doesn't read.
  """
  try:
    return tuple(map(float, text.split("+")))
  except ValueError:
    raise ValueError(
      f"config.study.points has {text!r}; expected such as 0.5 or 0.25+0.75."
    ) from None


def read_weighting(name: str) -> dict[str, Any]:
  """Reads a name in `config.study.weightings`, such as "ess0.5", as fields.

  Raises:
    ValueError: a name that doesn't read.
  """
  match = re.fullmatch(r"([a-z]+)([0-9.]+(?:e-?\d+)?)", name)
  if match is None or match[1] not in _WEIGHTINGS:
    raise ValueError(
      f"config.study.weightings has {name!r}; expected such as ess0.5,"
      " temperature0.05 or top0.7."
    )
  kind, field = _WEIGHTINGS[match[1]]
  return {"mimic.weighting": kind, f"mimic.{field}": float(match[2])}


def needs_reference(config: config_dict.ConfigDict) -> bool:
  """True if any method looks at a reference that is to be trained."""
  directions = {
    method.direction
    for method in (_create(config, name) for name in config.study.methods)
    if method is not None
  }
  logged = config.mimic.outputs is not None
  return "weights" in directions or ("outputs" in directions and not logged)


def derived(
  config: config_dict.ConfigDict, **overrides: Any
) -> config_dict.ConfigDict:
  """A locked copy with other fields; data and noise follow its `seed`."""
  follows = tasks.get(config).seed_overrides(overrides["seed"])
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict({**follows, **overrides})
  return copy.lock()


def make_config(
  config: config_dict.ConfigDict, run: Run
) -> config_dict.ConfigDict:
  """The config of a run; its data are those of the study's seed."""
  follows = tasks.get(config).seed_overrides(run.seed)
  return derived(config, **{"seed": run.seed, **follows, **run.overrides})


def _check(config):
  """Raises ValueError for what can be told before hours go into it."""
  study, task = config.study, tasks.get(config)
  if not study.seeds or not study.methods:
    raise ValueError(
      f"config.study has seeds {study.seeds} and methods {study.methods};"
      " expected at least one of each."
    )
  compared = study.layers or study.weightings or study.points or study.filters
  if compared and BASELINE not in study.methods:
    raise ValueError(
      f"config.study has methods {study.methods} at several settings or on"
      f" filters; expected {BASELINE!r} to compare with."
    )
  if study.rounds < 1:
    raise ValueError(
      f"config.study.rounds is {study.rounds}; expected at least 1."
    )
  if study.rounds > 1 and config.mimic.outputs is not None:
    raise ValueError(
      f"config.study.rounds is {study.rounds}, and config.mimic.outputs has the"
      " outputs of one reference for all rounds; expected one of the two."
    )
  task.check_study(config)
  for fraction in study.keep_fractions:
    if not 0 < fraction < 1:
      raise ValueError(
        f"config.study.keep_fractions has {fraction}; expected numbers above 0"
        " and below 1."
      )
  detection.check(config)
  cuts.check(study.filters)
  for text in study.filters:
    if "basic" in text or ("clip_" in text and task.reference_score is None):
      raise ValueError(
        f"config.study.filters has {text!r}, and there are no scores for it;"
        " expected filters of mimic_top30, random30 and the like, and"
        " clip_top30 where a reference has such scores of its own."
      )


def _create(config, name):
  """The method of that name, if the task and the reference are for it."""
  task = tasks.get(config)
  if task.methods is not None and name not in task.methods:
    raise ValueError(
      f"config.study.methods has {name!r}; expected some of"
      f" {', '.join(task.methods)}."
    )
  method = methods.create(name, config.mimic)
  if method is None or method.direction != "weights":
    return method
  for field, theirs in task.reference_overrides(config, 0).items():
    # Where the weights come from may differ: it is their shapes that must not.
    if not field.startswith("model.") or field == "model.pretrained":
      continue
    mine = config
    for key in field.split("."):
      mine = mine[key]
    if theirs != mine:
      raise ValueError(
        f"config.study.methods has {name!r}, which goes toward the reference's"
        " weights, and config.study.reference makes it another model: the"
        f" reference has {field} {theirs!r}, the learner's is {mine!r};"
        " expected the same architecture, or methods that look at outputs only:"
        " grad_mimic_outputs, output_agreement, rho."
      )
  return method
