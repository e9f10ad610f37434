"""Measures what the training loop costs beside its jitted steps.

The loop is the one that all training jobs go through, with all it does: it
reads, puts on devices, logs and writes the ledger. In turn with it, the same
calls run one after the other on batches that stay on the devices.
"""

import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from configs.benchmark import loop as loop_config
from experiments.benchmarks import timing
from experiments.data import sources
from experiments.runtime import (
  metrics as writers,
  prefetch,
  programs,
  tables,
  workdir as workdir_lib,
)
from experiments.training import loop, trainer

RESULT_FILE = "loop.json"
# In turn: so many steps of the loop, with files of metrics at their end, and so
# many on their own. The first rounds warm up.
_STEPS = 120
_ROUNDS = 10
_WARM_UP = 2
_COMPILED = "/jax/core/compile/backend_compile_duration"


def measure(
  config: config_dict.ConfigDict, workdir: Any, *, steps_a_round: int = _STEPS
) -> dict[str, Any]:
  """Measures the loop, a second seed's runs, and the start of a process.

  Args:
    config: as `configs/benchmark/loop.py` describes it.
    workdir: the folder; gets the runs that are measured, and `loop.json`.
    steps_a_round: how many steps of each kind are timed in turn; a fifth of
      them for the convnets.

  Returns:
    What is in `loop.json`: for each of `config.parts` what was found. Of loops:
    `overhead`, everything but the steps as a share of their time (the median of
    the rounds), its quartiles, the seconds a step takes by itself and in the
    loop, the CPU seconds of the main thread a step, evaluations and checkpoints
    aside, `data_wait`, the share of the loop's time in which nothing ran for
    want of data, and the steps in a call.

  Raises:
    ValueError: as `trainer.train_and_evaluate`; a workdir that was used before;
      an unknown part.
  """
  odd = [part for part in config.parts if part not in loop_config.PARTS]
  if odd:
    raise ValueError(
      f"config.parts has {odd[0]!r}; expected some of {loop_config.PARTS}."
    )
  folder = workdir_lib.claim(workdir, config, loop_config, job="loop")
  if any((folder / part).exists() for part in loop_config.PARTS):
    raise ValueError(
      f"workdir {folder} was used before; expected a new one to measure in."
    )
  found: dict[str, Any] = {"machine": workdir_lib.machine()}
  for part in config.parts:
    place = folder / part
    place.mkdir()
    if part == "seeds":
      found[part] = _measure_seeds(config, place)
    elif part == "start":
      found[part] = _measure_start(config, place)
    else:
      count = steps_a_round
      if part in ("convnet", "cifar10"):  # whose steps are long
        count = max(1, count // 5)
      found[part] = _measure_loop(config, part, place, count)
    workdir_lib.write_json(folder / RESULT_FILE, found)
  return found


def _of_run(config, **fields):
  """The config of a run, without this benchmark's own fields."""
  config = config.copy_and_resolve_references().unlock()
  del config.benchmark, config.parts
  config.update_from_flattened_dict(fields)
  return config.lock()


def _train_reference(config, folder, **fields):
  fields = {"method": "sgd", "noise.rate": 0.0, **fields}
  trainer.train_and_evaluate(_of_run(config, **fields), folder)
  return str(folder)


def _measure_loop(config, part, folder, steps_a_round):
  fields = dict(loop_config.PARTS[part])
  if fields["method"] == "grad_mimic":
    reference = _train_reference(config, folder / "reference")
    fields["mimic.reference"] = reference
  folder = folder / "run"
  folder.mkdir()
  run = trainer.Run(_of_run(config, **fields), folder)
  alone = _Alone(run, steps_a_round)
  total = _ROUNDS * steps_a_round
  loop.run(
    folder,
    run.state,
    run.batches,
    schedule=run.schedule._replace(
      total_steps=total,
      eval_every=steps_a_round,
      save_every=total,
      keep_every=0,
    ),
    fingerprint=run.fingerprint,
    plan=lambda _: alone.call,
    pack=run.pack,
    take=run.take,
    resident=run.task.resident,
    evaluate=alone,
    ledger=run.ledger(),
  )
  # The first has no steps of the loop; the last has a checkpoint.
  rounds = alone.rounds[1 + _WARM_UP :]
  shares = [inside / outside - 1 for inside, outside, _ in rounds]
  rows = writers.read_metrics(folder / writers.METRICS_FILE, timings=True)
  waits = [
    row["data_wait"]
    for row in rows
    if "data_wait" in row and row["step"] >= _WARM_UP * steps_a_round
  ]
  low, middle, high = statistics.quantiles(shares, n=4)
  inside, outside, busy = (
    statistics.median(values) / steps_a_round
    for values in zip(*rounds, strict=True)
  )
  return {
    "overhead": middle,
    "overhead_quartiles": [low, high],
    "step_seconds": outside,
    "loop_seconds": inside,
    "main_thread_seconds": busy,
    "data_wait": statistics.fmean(waits),
    "steps_per_call": alone.call.length,
  }


class _Alone:
  """Called where the loop evaluates: times the same steps by themselves.

  Attributes:
    call: the loop's.
    rounds: seconds since the call before, of the loop; of those steps; and CPU
      seconds of the main thread in the loop.
  """

  def __init__(self, run: trainer.Run, count: int):
    self._count = count
    batches = run.batches
    start = batches.get_state()
    first = next(batches)
    batches.set_state(start)
    self.call = run.plan(first)
    length = self.call.length
    packed = run.pack(length)([first] * length)
    taken = run.take(0, prefetch.Read(packed, None, (0,) * length))
    self._step = timing.TrainStep(
      self.call.function,
      jax.tree.map(jnp.copy, run.state),
      taken.reference,
      jax.device_put(taken.batch),
      run.task.resident,
      taken.live,
    )
    self.rounds: list[tuple[float, float, float]] = []
    self._watch = timing.Watch()
    self._since = time.thread_time()

  def __call__(self, params: Any) -> dict[str, float]:
    """Times a round.

    Args:
      params: the loop's, which are left alone.

    Returns:
      Nothing to write.
    """
    inside, busy = self._watch.lap(), time.thread_time() - self._since
    # A queue is kept full, as in the loop.
    calls = max(1, self._count // self.call.length)
    each = timing.seconds(self._step, calls, ahead=2) / self.call.length
    self.rounds.append((inside, self._count * each, busy))
    self._watch.lap()
    self._since = time.thread_time()
    return {}


def _measure_seeds(config, folder):
  """CPU seconds and compilations of a first and a second seed's runs."""
  compiled: list[str] = []

  def note(event: str, duration_secs: float, **_: Any) -> None:
    del duration_secs
    if event == _COMPILED:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  found: dict[str, Any] = {}
  for seed in (0, 1):
    fields = {"seed": seed, "noise.seed": seed}
    reference = _train_reference(config, folder / f"reference{seed}", **fields)
    for method in ("sgd", "grad_mimic"):
      compiled.clear()
      since = time.process_time()
      where = {"mimic.reference": reference} if method == "grad_mimic" else {}
      run = _of_run(config, method=method, **where, **fields)
      trainer.train_and_evaluate(run, folder / f"{method}{seed}")
      found[f"{method}, seed {seed}"] = {
        "cpu_seconds": time.process_time() - since,
        "compilations": len(compiled),
      }
  ours, plain = (found[f"{m}, seed 1"] for m in ("grad_mimic", "sgd"))
  found["ratio"] = ours["cpu_seconds"] / plain["cpu_seconds"]
  return found


def _measure_start(config, folder):
  """CPU seconds of a process that takes one step, and evaluates and saves."""
  # Prepares the set, which is done once on a machine.
  sources.open(config.data, config.data.train_split)
  cache = folder / programs.FOLDER
  flags = [f"--compilation_cache={cache}"]
  if config.data.data_dir is not None:
    flags.append(f"--config.data.data_dir={config.data.data_dir}")
  # Programs are kept where this says, and Python keeps its bytecode.
  unset = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
  environment = {
    key: value for key, value in os.environ.items() if key not in unset
  }
  found = {}
  for name in ("cold", "warm"):
    since = _children()
    subprocess.run(
      [
        *(sys.executable, "-m", "experiments.train"),
        "--config=configs/digits.py",
        f"--workdir={folder / name}",
        *flags,
        "--config.num_epochs=0",
        "--config.num_steps=1",
        "--config.method=random",
      ],
      check=True,
      stdout=subprocess.DEVNULL,
      env=environment,
      cwd=pathlib.Path(__file__).parents[2],
    )
    found[name] = _children() - since
  return found


def _children():
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """The rows that the project promises, as Markdown."""
  del config
  rows = []
  for part, found in results.items():
    if "overhead" in found:
      share, busy = 1 + found["overhead"], 1000 * found["main_thread_seconds"]
      rows.append([f"{part}: loop / its steps", f"{share:.2f}"])
      rows.append([f"{part}: main thread, CPU ms a step", f"{busy:.3f}"])
    if part == "seeds":
      second = [x for name, x in found.items() if name.endswith("seed 1")]
      compiled = sum(x["compilations"] for x in second)
      ratio = f"{found['ratio']:.2f}"
      rows.append(["second seed: Grad-Mimic / SGD, CPU", ratio])
      rows.append(["second seed: compilations", str(compiled)])
    if part == "start":
      rows += [
        [f"first step done, {name} cache, CPU s", f"{found[name]:.1f}"]
        for name in ("cold", "warm")
      ]
  return "\n".join(tables.markdown(["what", "found"], rows))
