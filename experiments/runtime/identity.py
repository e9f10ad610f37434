"""The identity of jobs: one table of the fields that decide a job's results.

Two configs that agree in these fields give the same results in one workdir. All
other fields may differ from one launch to the next.
"""

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any

# Fields of any config for the way in which a job is carried out,
RUNNING = ("mesh.*", "faults.*", "log_every", "profile_steps", "metrics_sink")
# and fields that point elsewhere, or don't change the results. If they point to
# contents that count, a run's fingerprint has those.
_ELSEWHERE = (
  "mimic.reference",
  "mimic.outputs",
  "mimic.force",
  "data.filter",
  "data.shards",
  "data.held_out_shards",
  "data.num_threads",
  "data.residence",
  "data.worker_processes",
  "data.workers",
  "data.max_broken_share",
  "model.pretrained",
  "noise.matrix",
  "noise.path",
)
_RUN = (
  "task",
  "seed",
  "batch_size",
  "eval_batch_size",
  "loss",
  "num_*",
  "steps_per_call",
  "eval_every_*",
  "data.*",
  "noise.*",
  "model.*",
  "optimizer.*",
  "method",
  "mimic.*",
)
# Fields by job, as patterns; those after a "!" are taken out again.
IDENTITY: dict[str, tuple[str, ...]] = {
  "run": _RUN,
  # Results stay valid as seeds, methods and settings are added.
  "study": (*_RUN, "study.reference.*", "study.filter_by"),
  "grid": (
    *_RUN,
    "study.reference.*",
    "probe.*",
    "!noise.rate",
    "!probe.rates",
    "!probe.reference_shares",
    "!probe.weighting_values",
    "!probe.features",
    "!probe.runs_per_cell",
  ),
  "cross_fitting": (
    *_RUN,
    "study.seeds",
    "study.reference.*",
    "probe.scaling",
    "cross.folds",
  ),
  "tuning": (*_RUN, "!noise.rate"),
  "score": ("steps", "split", "method", "batch_size", "mimic.*"),
  "selection": ("select.*", "filters", "clip_column", "seed"),
  "report": ("select.*",),
  "sweep": (),
  "engines": ("*",),
  "methods": _RUN,
  "loop": _RUN,
  "check_reference": _RUN,
  "data": ("*",),
  "selection_cost": ("*", "!samples"),
  "pod": ("*", "!target", "!cases", "!scaling.*"),
}


def counts(field: str, job: str) -> bool:
  """True if a field is part of a job's identity.

  Args:
    field: a config's, as "section.field".
    job: a name in `IDENTITY`.

  Returns:
    True if it must be the same for all results in one workdir.

  Raises:
    ValueError: there is no such job.

  Example:
    >>> counts("optimizer.learning_rate", "run"), counts("mesh.data", "run")
    (True, False)
  """
  if job not in IDENTITY:
    raise ValueError(f"no job {job!r}; expected one of {', '.join(IDENTITY)}.")
  return _counts(field, job)


@functools.cache
def _counts(field, job):
  without = [name[1:] for name in IDENTITY[job] if name.startswith("!")]
  return _matches(field, IDENTITY[job]) and not _matches(
    field, (*RUNNING, *_ELSEWHERE, *without)
  )


def _matches(field, patterns):
  return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def pick_fields(
  flat: Mapping[str, Any], job: str, *, elsewhere: bool = False
) -> dict[str, Any]:
  """Picks the fields of a job's identity.

  Args:
    flat: a config as `{"section.field": value}`.
    job: a name in `IDENTITY`.
    elsewhere: whether to take those that point elsewhere, too: for what is told
      apart by names alone.

  Returns:
    Those fields and their values.
  """
  return {
    field: value
    for field, value in flat.items()
    if counts(field, job) or (elsewhere and _matches(field, _ELSEWHERE))
  }
