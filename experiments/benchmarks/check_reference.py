"""Checks references of the learner's own initialisation, and of others.

For each seed: a reference from the learner's own initialisation and one from
another, both trained on clean labels; and a learner for each noise rate. Every
learner is checked against both references, good (at the end of their run) and
poor (after one epoch). The verdict is in error where it takes an own reference
for foreign, or a foreign one for anything else.
"""

import collections
import pathlib
from typing import Any

from ml_collections import config_dict

import gradmimic_jax as gm
from configs.benchmark import check_reference as check_reference_config
from experiments.data import stream
from experiments.models import initial
from experiments.reporting import figures
from experiments.runtime import checkpoint, workdir as workdir_lib
from experiments.tasks.classification import (
  data as data_lib,
  inputs,
  losses as classification,
)
from experiments.training import reference_check, trainer as train

RESULT_FILE = "check_reference.json"


def measure(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Trains what is not there yet, checks every pair, counts the errors.

  The workdir gets a folder for each run, a figure, and `check_reference.json`,
  whose content is returned: `checks` and those of a wrong verdict, `errors`.

  Raises:
    ValueError: an unknown field or name, or a workdir of another config.
    FileNotFoundError: a data set that is not there.
  """
  folder = workdir_lib.claim(
    workdir, config, check_reference_config, job="check_reference"
  )
  checks: list[dict[str, Any]] = []
  for seed in config.check_reference.seeds:
    checks += checks_of_seed(config, folder, seed)
  errors = [check for check in checks if is_error(check)]
  results = {"machine": workdir_lib.machine(), "checks": checks}
  results["errors"] = errors
  workdir_lib.write_json(folder / RESULT_FILE, results)
  draw(config, folder, checks)
  return results


def checks_of_seed(
  config: config_dict.ConfigDict, folder: pathlib.Path, seed: int
) -> list[dict[str, Any]]:
  """Every learner of a seed against every reference."""
  wanted = config.check_reference
  epochs = sorted(set(wanted.epochs))

  def run(name, seed, rate=0.0):
    copy = config.copy_and_resolve_references().unlock()
    del copy.benchmark, copy.check_reference
    copy.update_from_flattened_dict(
      {
        "seed": seed,
        "method": "sgd",
        "noise.rate": rate,
        "noise.seed": seed,
        "checkpoint.every_epochs": 1,
        "checkpoint.keep": config.num_epochs + 1,
      }
    )
    print(f"seed {seed}: {name}", flush=True)
    train.train_and_evaluate(copy.lock(), folder / f"seed{seed}_{name}")
    return copy, folder / f"seed{seed}_{name}"

  references = {}
  for kind, offset in (("own", 0), ("foreign", wanted.foreign)):
    _, where = run("reference", seed + offset)
    references[kind] = where
  checks = []
  for rate in wanted.rates:
    run_config, where = run(f"noise{rate:g}", seed, rate)
    data = data_lib.load_data(run_config)
    apply, start = initial.for_data(config.model, data, seed=seed)
    losses_fn = classification.make_losses_fn(apply)
    steps = stream.steps_per_epoch(len(data.train.source), config.batch_size)
    batch = inputs.make_expand(data.mean, data.std)(
      data_lib.draw_batch(data, samples=wanted.samples, seed=seed), None
    )
    for epoch in epochs:
      learner = start
      if epoch:
        learner = checkpoint.load_params(where, start, step=epoch * steps)
      for kind, place in references.items():
        for quality, at in (("good", config.num_epochs), ("poor", 1)):
          found = gm.check_reference(
            losses_fn,
            learner,
            checkpoint.load_params(place, start, step=at * steps),
            batch,
            has_aux=True,
          )
          checks.append(
            {
              "seed": seed,
              "noise_rate": rate,
              "epoch": epoch,
              "reference": kind,
              "quality": quality,
              **reference_check.as_json(found),
            }
          )
  return checks


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """Ranges of the two marks and counts of verdicts, by kind of reference."""
  del config
  checks = results["checks"]
  lines = [
    f"{'reference':<14} {'epoch':>6} {'weight cosine':>16} {'rel. barrier':>16}"
    f"  verdicts"
  ]
  groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
  for check in checks:
    key = check["reference"], check["quality"], check["epoch"]
    groups.setdefault(key, []).append(check)
  for (kind, quality, epoch), group in sorted(groups.items()):
    verdicts = collections.Counter(check["verdict"] for check in group)
    spans = [
      f"{min(values):.2f} .. {max(values):.2f}"
      for values in (
        [check["weight_cosine"] for check in group],
        [check["relative_barrier"] for check in group],
      )
    ]
    counts = ", ".join(f"{n} {name}" for name, n in sorted(verdicts.items()))
    lines.append(
      f"{kind + ', ' + quality:<14} {epoch:>6} {spans[0]:>16} {spans[1]:>16}"
      f"  {counts}"
    )
  lines += [
    "",
    f"{len(results['errors'])} of {len(checks)} verdicts take one basin for the"
    " other.",
  ]
  return "\n".join(lines)


def draw(
  config: config_dict.ConfigDict,
  folder: pathlib.Path,
  checks: list[dict[str, Any]],
) -> pathlib.Path:
  """Draws every check by the two marks that the verdict goes by."""
  groups: dict[str, tuple[list[float], list[float]]] = {}
  for check in checks:
    name = f"{check['reference']}, {check['quality']}"
    xs, ys = groups.setdefault(name, ([], []))
    xs.append(check["weight_cosine"])
    ys.append(check["relative_barrier"])
  return figures.scatter(
    groups,
    folder / "check_reference.png",
    title=f"{config.data.name}, {config.model.name}: references by their marks",
    xlabel="cosine of the learner's weights with the reference's",
    ylabel="barrier between them, relative",
    vertical=gm.reference.FOREIGN_COSINE,
    horizontal=gm.reference.FOREIGN_BARRIER,
  )


def is_error(check: dict[str, Any]) -> bool:
  """True if the verdict takes one basin for the other."""
  return (check["verdict"] == "foreign basin") != (
    check["reference"] == "foreign"
  )
