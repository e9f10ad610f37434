"""The runs of CLIP's study, and what the config of each differs in."""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import methods
from experiments.runtime import durations
from experiments.selection import filters as clip_filters
from experiments.tasks.contrastive import data as clip_data
from experiments.tasks.contrastive.task import Contrastive

REFERENCE = "reference"
BASELINE = "sgd"
FILTERS = "filters"  # the folder of a seed's subset files
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
  filter: str = ""  # what of the data it trains on, as an expression


def runs_of(config: Any) -> list[Run]:
  """All runs of the study, each after those that it needs.

  Args:
    config: the study's.

  Returns:
    The runs.

  Raises:
    ValueError: no seeds, no baseline among the methods, a name that is not
      there, weights of another architecture, or filters without scores.
  """
  wanted = config.study
  if not wanted.seeds or BASELINE not in wanted.methods:
    raise ValueError(
      f"config.study has seeds {wanted.seeds} and methods {wanted.methods};"
      f" expected a seed at least, and {BASELINE!r} to compare with."
    )
  if config.data.name != clip_data.SHAPES:
    raise ValueError(
      f"config.data.name is {config.data.name!r}; a study needs to know which"
      " captions are wrong: expected 'shapes'. For shards, give"
      " experiments.train and experiments.select one by one."
    )
  clip_filters.check(wanted.filters)
  settings = settings_of(config)
  scored = [name for name in settings if name not in (BASELINE, "random")]
  by = wanted.filter_by or (scored[0] if scored else "")
  if wanted.filters and by not in scored:
    raise ValueError(
      f"config.study.filters needs the scores of a run, and filter_by is"
      f" {by!r}; expected one of {', '.join(scored) or '(none has any)'}."
    )
  runs = []
  for seed in wanted.seeds:
    if scored:
      runs.append(Run(seed, REFERENCE, reference_overrides(config, seed)))
    for name, overrides in settings.items():
      needs = (REFERENCE,) if name in scored else ()
      runs.append(Run(seed, name, overrides, needs))
    for expression in wanted.filters:
      name = "kept_" + clip_filters.file_of(expression).removesuffix(".npy")
      needs = (REFERENCE, by)
      runs.append(Run(seed, name, {"method": BASELINE}, needs, expression))
  return runs


def settings_of(config: Any) -> dict[str, dict[str, Any]]:
  """For each run's name its overrides, but for references and filters.

  Args:
    config: the study's.

  Returns:
    `{name: {"dotted.field": value}}`.

  Raises:
    ValueError: a name that is not there, or weights of another architecture.
  """
  found: dict[str, dict[str, Any]] = {}
  weightings = {name: weighting(name) for name in config.study.weightings}
  for method in config.study.methods:
    if method not in Contrastive.methods:
      raise ValueError(
        f"config.study.methods has {method!r}; expected some of"
        f" {', '.join(Contrastive.methods)}."
      )
    made = methods.create(method, config.mimic)
    layers: tuple[str | None, ...] = (None,)
    values: tuple[str | None, ...] = (None,)
    if made is not None and method not in ("random", "rho_topk"):
      values = tuple(weightings)
    if methods.reads_layers(made):
      layers = tuple(config.study.layers)
    if made is not None and made.direction == "weights":
      _check_architecture(config, method)
    for layer, value in itertools.product(layers, values):
      overrides: dict[str, Any] = {"method": method}
      if layer is not None:
        overrides["mimic.layers"] = layer
      if value is not None:
        overrides |= weightings[value]
      words = [word for word in (method, layer, value) if word is not None]
      found[re.sub(r"[^\w.]+", "_", "_".join(words))] = overrides
  return found


def weighting(name: str) -> dict[str, Any]:
  """The fields that a name in `config.study.weightings` sets.

  Args:
    name: such as "ess0.5".

  Returns:
    `{"mimic.weighting": ..., "mimic.fraction": ...}` or the like.

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


def _check_architecture(config, method):
  wanted = config.study.reference
  if wanted.width or wanted.depth:
    raise ValueError(
      f"config.study.methods has {method!r}, which goes toward the reference's"
      " weights, and config.study.reference makes it another model (width"
      f" {wanted.width}, depth {wanted.depth}); expected the same architecture,"
      " or methods that look at outputs only: grad_mimic_outputs,"
      " output_agreement, rho."
    )


def reference_overrides(config: Any, seed: int) -> dict[str, Any]:
  """What the reference's config has otherwise than the learner's."""
  wanted = config.study.reference
  fields = {
    "model.clip.image_width": wanted.width,
    "model.clip.text_width": wanted.width,
    "model.clip.image_depth": wanted.depth,
    "model.clip.text_depth": wanted.depth,
  }
  return {
    "seed": seed + wanted.seed_offset,
    "method": BASELINE,
    "noise.rate": 0.0,
    **durations.overrides(wanted),
    **{field: value for field, value in fields.items() if value},
  }


def derived(config: Any, seed: int, overrides: Mapping[str, Any]) -> Any:
  """A copy of the config for a run; its data follow the study's seed."""
  copy = config.copy_and_resolve_references().unlock()
  copy.update_from_flattened_dict(
    {"seed": seed, "data.seed": seed, **overrides}
  )
  return copy.lock()
