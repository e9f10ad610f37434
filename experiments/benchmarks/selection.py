"""Measures the offline stage on millions of samples: seconds and memory.

A ledger is written batch by batch, read back, selected from, and the kept uids
written as a DataComp subset. Each size has a process to itself, so that its
peak of memory is its own; sizes that an earlier run has measured stay.
"""

import json
import pathlib
import resource
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from configs.benchmark import selection as selection_config
from experiments.benchmarks import timing
from experiments.reporting import figures
from experiments.runtime import workdir as workdir_lib

RESULT_FILE = "selection.json"
STAGES = ("append", "reload", "select", "export")
_ONE = "from experiments.benchmarks import selection; selection.answer()"


def measure(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Measures every size; goes on where an interrupted run stopped.

  The workdir gets figures and `selection.json`, which grows by an entry a size
  and is returned: the machine, and for each size the seconds of every stage,
  their sum, peak memory and the ledger's size in GB (10^9 bytes), and the F1 of
  what is dropped.

  Raises:
    ValueError: an unknown field, a size below 1, or another config's workdir.
  """
  for name, least in (("samples", 1), ("steps", 1), ("batch_size", 1)):
    if np.min(config[name], initial=least) < least:
      raise ValueError(
        f"config.{name} is {config[name]}; expected at least {least}."
      )
  folder = workdir_lib.claim(
    workdir, config, selection_config, job="selection_cost"
  )
  file = folder / RESULT_FILE
  results = {"machine": workdir_lib.machine(), "sizes": {}}
  if file.exists():
    results = workdir_lib.read_json(file, {"sizes": dict})
  for n in config.samples:
    if str(n) in results["sizes"]:
      continue
    print(f"{n:,} samples", flush=True)
    asked = workdir_lib.as_dict(config) | {"samples": n}
    del asked["benchmark"]
    answered = subprocess.run(
      [sys.executable, "-c", _ONE], input=json.dumps([str(folder), asked]),
      stdout=subprocess.PIPE, text=True, check=True,
      cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    results["sizes"][str(n)] = json.loads(answered.stdout)
    workdir_lib.write_json(file, results)
  draw(folder, results)
  return results


def answer() -> None:
  """Measures the size that standard input asks for; prints what was found."""
  folder, sizes = json.load(sys.stdin)
  print(json.dumps(measure_one(pathlib.Path(folder), **sizes)))


def measure_one(
  folder: pathlib.Path,
  *,
  samples: int,
  steps: int,
  batch_size: int,
  noise_rate: float,
  seed: int,
  select: dict[str, Any],
) -> dict[str, float]:
  """Measures one size in this process; its files are removed again.

  `noise_rate` of the samples score low, and `select` has options of
  `gm.select`.
  """
  rng = np.random.default_rng(seed)
  noisy = rng.random(samples, np.float32) < noise_rate
  uids = np.empty(samples, "u8,u8")
  for half in ("f0", "f1"):
    uids[half] = rng.integers(0, 2**64, samples, np.uint64)
  scratch = folder / f"scratch{samples}"
  shutil.rmtree(scratch, ignore_errors=True)
  seconds = {}
  watch = timing.Watch()

  def done(stage):
    seconds[stage] = round(watch.lap(), 2)

  ledger = gm.ScoreLedger(scratch / "ledger")
  for epoch in range(steps):
    order = rng.permutation(samples)
    for start in range(0, samples, batch_size):
      ids = order[start : start + batch_size]
      scores = rng.standard_normal(len(ids), np.float32)
      scores *= 0.6  # a step by itself errs on 5 %
      scores += np.where(noisy[ids], np.float32(-1), np.float32(1))
      step = epoch * -(-samples // batch_size) + start // batch_size
      ledger.append(ids, scores, step=step, epoch=epoch)
    ledger.flush()
  del ledger, order
  done("append")
  ledger = gm.ScoreLedger(scratch / "ledger")
  ids, scores = ledger.matrix()
  done("reload")
  selection = gm.select(scores, ids=ids, **select)
  done("select")
  gm.export.write_datacomp_subset(
    scratch / "subset.npy", uids[selection.kept_ids]
  )
  done("export")
  bytes_ = sum(f.stat().st_size for f in (scratch / "ledger").iterdir())
  shutil.rmtree(scratch)
  return {
    **seconds,
    "seconds": round(sum(seconds.values()), 2),
    "peak_gb": round(_peak_bytes() / 1e9, 2),
    "ledger_gb": round(bytes_ / 1e9, 6),
    "f1": round(gm.metrics.f1(~selection.keep, noisy), 4),
  }


def _peak_bytes() -> int:
  """The most memory that this process has held."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # `ru_maxrss` may be that of the process before it
    for line in status.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def draw(folder: pathlib.Path, results: dict[str, Any]) -> list[pathlib.Path]:
  """Draws seconds and memory against the number of samples."""
  sizes = {int(n): entry for n, entry in sorted(
    results["sizes"].items(), key=lambda item: int(item[0])
  )}  # fmt: skip
  millions = [n / 1e6 for n in sizes]

  def line(key):
    return [(millions, [entry[key] for entry in sizes.values()])]

  return [
    figures.learning_curves(
      {name: line(key) for name, key in lines.items()},
      folder / file,
      title="from scores to a filter",
      xlabel="million samples",
      ylabel=unit,
    )
    for file, unit, lines in (
      (
        "selection_time.png",
        "seconds",
        {"all": "seconds", **{stage: stage for stage in STAGES}},
      ),
      (
        "selection_memory.png",
        "GB",
        {"peak memory": "peak_gb", "ledger on disk": "ledger_gb"},
      ),
    )
  ]


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """The sizes as text."""
  del config
  columns = (*STAGES, "seconds", "peak_gb", "ledger_gb", "f1")
  lines = [f"{'samples':>12}" + "".join(f"{name:>11}" for name in columns)]
  for n in sorted(map(int, results["sizes"])):
    entry = results["sizes"][str(n)]
    cells = "".join(f"{entry[name]:>11.4g}" for name in columns)
    lines.append(f"{n:>12,}{cells}")
  return "\n".join(lines)
