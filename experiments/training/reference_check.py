"""The check of a run's reference before the first step."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments.runtime import distributed, workdir as workdir_lib
from experiments.training import reference as reference_lib

FILE = "reference_check.json"


def check(
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  losses_fn: Callable[..., Any],
  params: Any,
  reference: reference_lib.Reference | None,
  draw: Callable[[], Any],
  *,
  instead: str = "grad_mimic_outputs or output_agreement",
) -> dict[str, Any] | None:
  """Checks the reference's weights; stops a run that they would harm.

  Args:
    config: the run's.
    folder: the run's; a reference that has passed is not checked again.
    losses_fn: `(params, batch) -> (losses [B], aux)`.
    params: the learner's parameters before the first step.
    reference: the run's, or None.
    draw: gives the batch to check on.
    instead: the methods to recommend where the weights would harm.

  Returns:
    The values that `save` writes, or None if there was nothing to check.

  Raises:
    ValueError: the reference lies in a foreign basin, and `config.mimic.force`
      is not set; or no samples to check it on.
  """
  if reference is None or reference.params is None:
    return None
  if config.mimic.check_samples < 1:
    raise ValueError(
      f"config.mimic.check_samples is {config.mimic.check_samples}; expected at"
      " least 1."
    )
  known = None
  if (folder / FILE).exists():
    fields = {"reference": str, "verdict": str}
    known = workdir_lib.read_json(folder / FILE, fields)
    if known["reference"] != reference.fingerprint:
      known = None
  # All processes check, or none.
  agreed = distributed.agree(known is not None)
  if (
    agreed
    and known is not None
    and (known["verdict"] != "foreign basin" or config.mimic.force)
  ):
    return known
  report = gm.check_reference(
    losses_fn,
    params,
    reference.params,
    draw(),
    layers=config.mimic.layers,
    has_aux=True,
  )
  if report.verdict != "foreign basin" or config.mimic.force:
    log = logging.info if report.verdict == "ok" else logging.warning
    log("%s", report)
    return as_json(report) | {"reference": reference.fingerprint}
  raise ValueError(
    f"the reference {config.mimic.reference} lies in a foreign basin (cosine"
    f" with the learner's weights {report.weight_cosine:.3f}, barrier"
    f" {report.barrier:.3g}): scores toward its weights would be worthless or"
    f" inverted. Use the method {instead}, which needs only its outputs (in a"
    " study, by --config.study.methods); or start from its initialisation (its"
    " --config.seed; in a study, another workdir with"
    " --config.study.reference.seed_offset=0); or give --config.mimic.force to"
    " train all the same."
  )


def save(folder: pathlib.Path, checked: dict[str, Any] | None) -> None:
  """Writes the result of `check` to the run's folder."""
  if checked is not None:
    workdir_lib.write_json(folder / FILE, checked, sealed=True)


def as_json(report: gm.ReferenceReport) -> dict[str, Any]:
  """Converts the report's fields to JSON: numbers that aren't are null."""

  def plain(value):
    if isinstance(value, np.ndarray):
      return [plain(x) for x in value.tolist()]
    if isinstance(value, float) and not np.isfinite(value):
      return None
    return value

  fields = dataclasses.asdict(report)
  return {name: plain(value) for name, value in fields.items()}
