"""What short runs of all kinds come to: a refactoring must not change it.

Record everything, refactor, and compare, on one machine and bit for bit:

  python -m tests.experiments.pinned --record base.npz
  python -m tests.experiments.pinned --compare base.npz

`pinned.json` beside this file has a summary that other machines agree with up
to `TOLERANCE`; `test_pinned.py` compares it. A change that is meant to change
numbers rewrites it: `--record base.npz --json`.
"""

import argparse
import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping

if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # As the default tests do: programs are compiled in half the time, and fewer
  # bits depend on what the compiler fuses.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import orbax.checkpoint as ocp

import gradmimic_jax as gm
from configs import (
  digits,
  score as score_config,
  select as select_config,
  shapes as clip_shapes,
)
from experiments.runtime import checkpoint, metrics as writers
from experiments.selection import files as select_job
from experiments.training import (
  scoring as score_job,
  trainer,
)
from tests.experiments import processes, tiny

CLASSIFICATION, CONTRASTIVE = "classification", "contrastive"
METHODS = ("sgd", "grad_mimic", "rho", "output_agreement")
INTERRUPTED = "/interrupted"
INTERRUPTED_AT = {CLASSIFICATION: 9, CONTRASTIVE: 3}  # a checkpoint is before

# All that numbers depend on is said here, so that defaults may move.
_BOTH = {
  "seed": 0,
  "mesh.data": 1,
  "mesh.fsdp": 1,
  "log_every": 5,
  "faults.nonfinite_stop": 10,
  "checkpoint.keep": 2,
  "data.filter": None,
  "noise.rate": 0.4,
  "model.pretrained": None,
  "mimic.direction": "weights",
  "mimic.check_samples": 64,
  "mimic.force": False,
  "mimic.score": "projection",
  "mimic.weighting": "ess_softmax",
  "mimic.fraction": 0.5,
  "mimic.warmup_steps": 1,
  "mimic.scope": "all",
}
FIELDS = {
  CLASSIFICATION: {
    **_BOTH,
    "batch_size": 256,
    "eval_batch_size": 256,
    "num_epochs": 3,
    "checkpoint.every_epochs": 1,
    "data.name": "digits",
    "data.train_split": "train",
    "data.test_split": "test",
    "data.image_size": 0,
    "data.flip": True,
    "noise.kind": "symmetric",
    "noise.seed": 0,
    "model.name": "mlp",
    "model.size": "",
    "model.widths": (16, 16),
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-2,
    "optimizer.schedule": "cosine",
    "optimizer.weight_decay": 1e-5,
    "mimic.layers": None,
    "mimic.engine": "auto",
  },
  CONTRASTIVE: {
    **_BOTH,
    "batch_size": 16,
    "num_samples": 96,
    "eval_every_steps": 2,
    "eval_batch_size": 16,
    "loss": "clip",
    "checkpoint.every_steps": 2,
    "data.name": "shapes",
    "data.image_size": 16,
    "data.mean": (0.5, 0.5, 0.5),
    "data.std": (0.25, 0.25, 0.25),
    "data.tokenizer": "shapes",
    "data.seed": 0,
    "data.train_size": 48,
    "data.held_out_size": 16,
    "data.zero_shot_size": 48,
    "noise.kinds": ("swapped", "truncated", "padded"),
    "model.size": "tiny",
    "model.clip.image_width": 16,
    "model.clip.text_width": 16,
    "model.clip.image_depth": 1,
    "model.clip.text_depth": 1,
    "model.clip.image_heads": 2,
    "model.clip.text_heads": 2,
    "model.clip.embed_width": 16,
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.2,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.epsilon": 1e-6,
    "mimic.layers": "all",
    "mimic.engine": "forward",
  },
}

# ---- How experiments is called: what a refactoring of it changes here. ----


def make_config(task, root, fields):
  """The config of a run."""
  get_config = {CLASSIFICATION: digits, CONTRASTIVE: clip_shapes}[task]
  config = get_config.get_config().copy_and_resolve_references().unlock()
  config.update_from_flattened_dict({**FIELDS[task], **fields})
  if task == CLASSIFICATION:
    config.data.data_dir = str(root / "data")
  return config.lock()


def train(task, root, folder, fields):
  """Trains to the end; the result."""
  return trainer.train_and_evaluate(make_config(task, root, fields), folder)


def interrupted(count):
  """A context in which training stops before step `count`."""

  def stop(step, to_do):
    if step <= count < step + to_do:
      raise KeyboardInterrupt

  return tiny.around_calls(stop)


def train_in_two_processes(root, folder, fields):
  """Trains a classifier in two processes to the end."""
  fields = {
    **FIELDS[CLASSIFICATION],
    "data.data_dir": str(root / "data"),
    **fields,
  }
  given = {name: value for name, value in fields.items() if value is not None}
  flags = processes.flags_of("configs/digits.py", folder, **given)
  command = ["-m", "experiments.train", *flags]
  processes.finish(processes.start(command, count=2))
  return json.loads((folder / trainer.RESULT_FILE).read_text())


def score(root, folder, *, learner, reference):
  """Scores a classifier's data with all checkpoints that it kept."""
  config = score_config.get_config(f"learner={learner}").unlock()
  config.method, config.batch_size, config.flush_every = "grad_mimic", 500, 2
  config.mesh.data = config.mesh.fsdp = 1
  config.split, config.data_dir = None, str(root / "data")
  for name, value in FIELDS[CLASSIFICATION].items():
    section, _, field = name.partition(".")
    if section == "mimic":
      config.mimic[field] = value
  config.mimic.reference = str(reference)
  score_job.score_dataset(config.lock(), folder)


def select(folder, *, run, binarize, aggregate):
  """Selects from a classifier's ledger; the selection that was written."""
  config = select_config.get_config(f"run={run}").unlock()
  config.select.binarize, config.select.aggregate = binarize, aggregate
  select_job.select_run(config.lock(), folder)
  return gm.export.read_parquet(folder / select_job.SELECTION_FILE)


def load_params(folder):
  """The newest checkpoint's parameters, on the host."""
  newest = checkpoint.steps(folder)[-1]
  path = folder / checkpoint.FOLDER / str(newest) / "state"
  stored = ocp.PyTreeCheckpointHandler().metadata(path.absolute()).tree
  like = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored["params"]
  )
  return jax.device_get(checkpoint.load_params(folder, like))


def load_ledger(folder):
  """The ledger in a run's folder; None if it has none."""
  path = folder / trainer.LEDGER_FOLDER
  return gm.ScoreLedger(path) if path.exists() else None


def load_metrics(folder):
  """The lines of a run's metrics, without times."""
  return writers.read_metrics(folder / writers.METRICS_FILE)


# ---- What is collected. ----


def _run_arrays(folder, result):
  """All that a run has found: arrays by name."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(load_params(folder)):
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    found[f"params/{name}"] = np.asarray(leaf)
  series = collections.defaultdict(list)
  for row in load_metrics(folder):
    for name, value in row.items():
      if name != "step" and isinstance(value, int | float):
        series[name].append((row["step"], value))
  for name, rows in series.items():
    found[f"metrics/{name}"] = np.array([value for _, value in rows], float)
    found[f"metrics/{name}/step"] = np.array([step for step, _ in rows])
    # The last evaluation: what the result says, not only the metrics.
    if name in result:
      found[f"result/{name}"] = np.array([result[name]], float)
  return {**found, **_ledger_arrays(folder)}


def _ledger_arrays(folder):
  ledger = load_ledger(folder)
  if ledger is None:
    return {}
  found = {}
  for name, column in ledger.table().to_pydict().items():
    empty = any(value is None for value in column)
    found[f"ledger/{name}"] = np.array(
      column, float if empty or name in ("score", "weight", "loss") else None
    )
  return found


def _selection_arrays(selection):
  return {
    f"selection/{name}": np.asarray(getattr(selection, name))
    for name in ("ids", "keep", "keep_probability", "quality", "votes")
  }


def _trained(task, root, name, **fields):
  """The folder of a run that is made where it is not there yet."""
  folder = root / task / name
  if not folder.exists():
    train(task, root, folder, fields)
  return folder


def _reference(task, root):
  return _trained(task, root, "reference", **{"noise.rate": 0.0})


def _fields(task, root, method):
  needed = {} if method == "sgd" else {"reference": _reference(task, root)}
  return {
    "method": method,
    **{f"mimic.{name}": str(path) for name, path in needed.items()},
  }


def _method_run(root, task, method):
  fields = _fields(task, root, method)
  folder = _trained(task, root, method, **fields)
  # A finished run is not repeated; its result is read.
  return _run_arrays(folder, train(task, root, folder, fields))


def _interrupted_run(root, task):
  fields = _fields(task, root, "grad_mimic")
  folder = root / task / "interrupted"
  with contextlib.suppress(KeyboardInterrupt):
    with interrupted(INTERRUPTED_AT[task]):
      train(task, root, folder, fields)
    raise RuntimeError(f"the run in {folder} was not interrupted.")
  return _run_arrays(folder, train(task, root, folder, fields))


def _shared_run(root):
  fields = {
    **_fields(CLASSIFICATION, root, "grad_mimic"),
    "model.widths": (256, 256),  # large enough to be divided
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "num_epochs": 1,
    "mimic.force": True,
  }
  reference = _trained(
    CLASSIFICATION,
    root,
    "wide_reference",
    **{
      "noise.rate": 0.0,
      "num_epochs": 1,
      "model.widths": fields["model.widths"],
    },
  )
  fields["mimic.reference"] = str(reference)
  folder = root / CLASSIFICATION / "two_processes"
  return _run_arrays(folder, train_in_two_processes(root, folder, fields))


def _scores(root):
  reference = _reference(CLASSIFICATION, root)
  folder = root / CLASSIFICATION / "scores"
  if not folder.exists():
    learner = _trained(CLASSIFICATION, root, "sgd", method="sgd")
    score(root, folder, learner=learner, reference=reference)
  return folder


def _selection(root, job, binarize, aggregate):
  if job == "train":
    fields = _fields(CLASSIFICATION, root, "grad_mimic")
    run = _trained(CLASSIFICATION, root, "grad_mimic", **fields)
  else:
    run = _scores(root)
  folder = root / CLASSIFICATION / f"selection_{job}_{binarize}"
  return _selection_arrays(
    select(folder, run=run, binarize=binarize, aggregate=aggregate)
  )


# What is pinned: a name, and what makes the arrays in a folder that all share.
CASES: dict[str, Callable[[pathlib.Path], Mapping[str, np.ndarray]]] = {
  **{
    f"{task}/{method}": functools.partial(_method_run, task=task, method=method)
    for task in (CLASSIFICATION, CONTRASTIVE)
    for method in METHODS
  },
  **{
    f"{task}{INTERRUPTED}": functools.partial(_interrupted_run, task=task)
    for task in (CLASSIFICATION, CONTRASTIVE)
  },
  f"{CLASSIFICATION}/two_processes": _shared_run,
  "score": lambda root: _ledger_arrays(_scores(root)),
  **{
    f"select/{job}/{binarize}": functools.partial(
      _selection, job=job, binarize=binarize, aggregate=aggregate
    )
    for job in ("train", "score")
    for binarize, aggregate in (("auto", "label_model"), ("gmm", "majority"))
  },
}


def differences(found, expected):
  """Names whose arrays are not the same bits: the largest difference of each.

  Args:
    found: arrays by name.
    expected: the same of another time.

  Returns:
    A text by name, only of those that differ.
  """
  texts = {}
  for name in sorted({*found, *expected}):
    if name not in found or name not in expected:
      texts[name] = "is gone" if name in expected else "is new"
      continue
    here, there = found[name], expected[name]
    if (here.shape, here.dtype) != (there.shape, there.dtype):
      texts[name] = (
        f"is {here.dtype}{here.shape}, was {there.dtype}{there.shape}"
      )
    elif here.tobytes() != there.tobytes():
      if here.dtype.kind in "fiub":
        gap = np.abs(here.astype(float) - there.astype(float))
        nans = int((np.isnan(here) != np.isnan(there)).sum())
        texts[name] = f"differs by up to {np.nanmax(gap, initial=0):.3g}" + (
          f", and in {nans} NaN" if nans else ""
        )
      else:
        texts[name] = f"differs in {int((here != there).sum())} entries"
  return texts


# ---- The summary, for other machines. ----

FILE = pathlib.Path(__file__).with_name("pinned.json")
# Relative to an array's norm. Compiled with all optimizations, these runs come
# out within 2.4e-7 (classification) and 2.4e-6 (contrastive): other CPUs round
# like that. A change of a step's mathematics is far above.
TOLERANCE = 1e-4
# A softmax doesn't see it: its gradient is 0 but for rounding, which Adam
# scales up. Those leaves have no value to agree on.
_ROUNDING = "attention/key/bias"
_WHOLE = ("result/", "metrics/")  # kept as they are
_SUMMED = (
  *_WHOLE[:1],
  "metrics/train_loss",
  "params/",
  "ledger/",
  "selection/",
)


def summarize(arrays):
  """A few numbers of each array.

  Args:
    arrays: of one case, by name.

  Returns:
    By name, what JSON can hold: results and the losses of all steps; of other
    floats sum, sum of squares, a projection on fixed normal noise, and how many
    are NaN; of booleans how many are true; of integers and text a checksum.
  """
  return {
    name: _summary(name, array)
    for name, array in arrays.items()
    if name.startswith(_SUMMED) and not name.endswith(_ROUNDING)
  }


def _summary(name, array):
  if array.dtype == bool:
    return {"true": int(array.sum()), "size": array.size}
  if array.dtype.kind in "iuU":
    content = "\n".join(map(str, array.ravel().tolist()))
    return {"crc32": zlib.crc32(content.encode()), "size": array.size}
  values = array.astype(np.float64).ravel()
  if name.startswith(_WHOLE):
    return [_rounded(value) for value in values]
  nans = int(np.isnan(values).sum())
  values = np.nan_to_num(values)
  noise = np.random.default_rng(zlib.crc32(name.encode())).normal(
    size=values.size
  )
  sums = values.sum(), values @ values, values @ noise
  return {"sums": [*map(_rounded, sums)], "nan": nans, "size": values.size}


def _rounded(value):
  return float(f"{value:.10g}")  # below any tolerance; a float32 has 9


def deviations(found, expected):
  """How far summaries are from what they were, where they were the same kind.

  Args:
    found: from `summarize`.
    expected: the same, of another time.

  Returns:
    By name, the largest deviation, relative to the norm of the array; infinite
    where shapes, integers, text or counts differ.
  """
  return {
    name: _deviation(found.get(name), expected.get(name))
    for name in sorted({*found, *expected})
  }


def _deviation(here, there):
  if here == there:
    return 0.0
  if type(here) is not type(there) or len(here) != len(there):
    return math.inf
  if isinstance(here, list):
    here, there = np.array(here), np.array(there)
    return float(np.abs(here - there).max() / max(np.abs(there).max(), 1e-6))
  if any(here.get(k) != there.get(k) for k in ("crc32", "true", "nan", "size")):
    return math.inf
  (one, squares, projection), now = there["sums"], here["sums"]
  norm = max(math.sqrt(squares), 1e-6)
  return max(
    abs(now[0] - one) / norm / math.sqrt(there["size"]),
    abs(now[1] - squares) / norm**2 / 2,
    abs(now[2] - projection) / norm,
  )


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  group = parser.add_mutually_exclusive_group(required=True)
  group.add_argument("--record", metavar="FILE.npz", help="what to write")
  group.add_argument("--compare", metavar="FILE.npz", help="what to compare")
  parser.add_argument(
    "--json", action="store_true", help=f"with --record: {FILE.name} as well"
  )
  parser.add_argument(
    "--only", default="", help="only cases whose names begin so"
  )
  asked = parser.parse_args(arguments)
  # What was compiled once is found again, as in the tests.
  jax.config.update("jax_compilation_cache_dir", str(processes.CACHE))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  arrays, summary = {}, {}
  with tempfile.TemporaryDirectory() as root:
    for case, make in CASES.items():
      if case.startswith(asked.only):
        started = time.monotonic()
        found = make(pathlib.Path(root))
        seconds = time.monotonic() - started
        print(f"{case}: {len(found)} arrays, {seconds:.1f} s", flush=True)
        arrays.update({f"{case}:{name}": x for name, x in found.items()})
        summary[case] = summarize(found)
  if asked.record:
    np.savez_compressed(asked.record, **arrays)
    if asked.json:
      write_summary(summary)
    return 0
  with np.load(asked.compare, allow_pickle=False) as file:
    expected = {
      name: file[name] for name in file.files if name.startswith(asked.only)
    }
  texts = differences(arrays, expected)
  for name, text in texts.items():
    print(f"{name} {text}")
  print(f"{len(texts)} of {len(expected)} arrays differ")
  return int(bool(texts))


def write_summary(summary):
  """Writes `pinned.json`, a line an array."""
  cases = []
  for case, arrays in summary.items():
    if case.endswith(INTERRUPTED):  # ends as the one that wasn't
      continue
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in arrays.items())
    cases.append(f"{json.dumps(case)}: {{\n  " + ",\n  ".join(lines) + "}")
  FILE.write_text("{" + ",\n".join(cases) + "}\n")


if __name__ == "__main__":
  sys.exit(main())
