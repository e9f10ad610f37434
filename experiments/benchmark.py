"""Measures what a mimic step costs, relative to a plain step.

python -m experiments.benchmark --config=configs/benchmark.py --workdir=runs/b

The plain step is a jitted `jax.value_and_grad` of the mean loss; the mimic step
gives the loss, the scores and the reweighted gradient. Neither updates anything
with an optimizer. The optax transformation is fed by vmap(value_and_grad) and
stands alone in its chain. Errors are relative to the largest entry of what
vmap(grad) gives in float64. An interrupted run goes on where it stopped.
"""

import contextlib
import datetime
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradmimic_jax as gm
from configs import benchmark as benchmark_config
from experiments import cli, models, workdir as workdir_lib
from experiments.tasks import classification
from gradmimic_jax.report import figures

RESULT_FILE = "benchmark.json"
RATIOS = ("time", "flops", "memory")
ERRORS = ("score_error", "gradient_error")
SWEPT = ("batch_size", "depth", "width")
_TEMPERATURE = 1.0
_PART = 8  # samples whose float64 gradients exist at a time


class Case(NamedTuple):
  """One row of the table, or one point of the sweep."""

  key: str  # of its entry in `benchmark.json`
  section: Any  # the model's fields
  batch_size: int
  layers: str
  engine: str


def run_benchmark(config: Any, workdir: Any) -> dict[str, Any]:
  """Measures all cases; goes on where an interrupted run stopped.

  Args:
    config: as `configs/benchmark.py` describes it.
    workdir: the benchmark's folder. Gets `benchmark.json`, which grows by an
      entry a case, and figures.

  Returns:
    What is in `benchmark.json`: the machine, and for each case of the table and
    point of the sweep its ratios and errors. A ratio is None where it has no
    meaning or the case did not fit into memory.

  Raises:
    ValueError: an unknown field, name or device, or a workdir of another config
      or machine.
  """
  folder = workdir_lib.claim(workdir, config, benchmark_config)
  with _settings(config) as device:
    results = _start(folder / RESULT_FILE, device)
    for part, cases, exact in (
      ("cases", table_cases(config), True),
      ("sweep", sweep_cases(config), False),
    ):
      done = results[part]
      for _, group in itertools.groupby(cases, lambda case: group_of(case.key)):
        left = [case for case in group if case.key not in done]
        if not left:
          continue
        setup = _Setup(left[0], config)
        for case in left:
          print(f"{part}: {case.key}", flush=True)
          done[case.key] = setup.measure(case, done, exact)
          workdir_lib.write_json(folder / RESULT_FILE, results)
  draw(config, folder, results)
  return results


def table_cases(config: Any) -> list[Case]:
  """The rows of the table, those of one model and batch size side by side."""
  return [
    Case(f"{name}/{size}/{layers}/{engine}", config[name], size, layers, engine)
    for name in config.models
    for size in config[name].batch_sizes
    for layers in config.layers
    if layers in patterns(config[name])
    for engine in config.engines
  ]


def sweep_cases(config: Any) -> list[Case]:
  """The points of the sweep, those of one size side by side."""
  base = config.sweep.model
  cases = []
  for axis in SWEPT:
    for value in config.sweep[axis]:
      section = base.copy_and_resolve_references().unlock()
      size = value if axis == "batch_size" else base.batch_sizes[0]
      if axis != "batch_size":
        section.vit[axis] = value
      if axis == "width":
        section.vit.mlp_width = base.vit.mlp_width * value // base.vit.width
      for line in config.sweep.lines:
        engine, layers = line.split("/")
        key = f"{axis}/{value}/{layers}/{engine}"
        cases.append(Case(key, section, size, layers, engine))
  return cases


def group_of(key: str) -> tuple[str, ...]:
  """What the cases of one model at one batch size have in common."""
  return tuple(key.split("/")[:2])


def patterns(section: Any) -> dict[str, str | None]:
  """What the names of mimic layers mean in a model, as `layers=` takes it."""
  if section.name == "vit":
    last = f"^blocks/{section.vit.depth - 1}/mlp/"
  elif section.widths:
    last = f"^body/{len(section.widths) - 1}/"
  else:  # nothing but a head
    return {"head": "^head/"}
  return {"head": "^head/", "last_mlp": last, "all": None}


class _Setup:
  """One model at one batch size: its data, its plain step, the truth."""

  def __init__(self, case: Case, config: Any):
    self.config, self.section = config, case.section
    self.losses_fn, self.params = _model(case.section, config.seed)
    self.batch = _batch(case.section, case.batch_size, config.seed)
    plain = jax.jit(self._plain_step).lower(self.params, self.batch)
    self.plain = plain.compile()
    # A step down the mean gradient: scores then differ as they do in training,
    # where some samples agree with the reference and some don't.
    _, grads = jax.device_get(self.plain(self.params, self.batch))
    self.reference = jax.device_put(
      jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * g, self.params, grads)
    )
    self.truth: dict[str, Any] | None = None

  def _plain_step(self, params, batch):
    return jax.value_and_grad(lambda p: jnp.mean(self.losses_fn(p, batch)))(
      params
    )

  def measure(self, case: Case, done: dict[str, Any], exact: bool):
    """The case's entry; that of a case with the same program is repeated."""
    step, args, read = self._candidate(case)
    lowered = jax.jit(step).lower(*args)
    program = workdir_lib.fingerprint(lowered.as_text())
    for entry in done.values():
      if entry["program"] == program:
        return entry
    entry = dict.fromkeys((*RATIOS, *ERRORS))
    engine = getattr(step, "engine", case.engine)
    entry |= {"engine": engine, "program": program}
    try:
      compiled = lowered.compile()
      output = jax.block_until_ready(compiled(*args))
      entry["memory"] = _ratio(_memory(compiled), _memory(self.plain))
      # A scan's body is counted once, however often it runs.
      if case.engine != "streaming":
        entry["flops"] = _ratio(_flops(compiled), _flops(self.plain))
      if exact:
        scores, grads = jax.device_get(read(output))
        true_scores, true_grads = self._truth(case.layers)
        entry["gradient_error"] = _error(grads, true_grads)
        if scores is not None:
          entry["score_error"] = _error(scores, true_scores)
      del output
      entry |= _time(
        lambda: self.plain(self.params, self.batch),
        lambda: compiled(*args),
        self.config.timing,
      )
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      entry["failed"] = "out of memory"
    return entry

  def _candidate(self, case):
    """The step, its arguments, and `output -> (scores or None, grads)`."""
    layers = patterns(self.section)[case.layers]
    if case.engine == "optax":
      tx = gm.reweight_by_mimic_score(
        self.reference, layers=layers, weighting=gm.softmax(_TEMPERATURE)
      )
      per_sample = jax.vmap(
        jax.value_and_grad(self._loss_of_one), in_axes=(None, 0)
      )

      def step(params, state, batch):
        losses, rows = per_sample(params, batch)
        grads, state = tx.update(rows, state, params)
        return jnp.mean(losses), grads, state

      state = tx.init(self.params)
      return step, (self.params, state, self.batch), lambda out: (None, out[1])
    streaming = case.engine == "streaming"
    step = gm.mimic_value_and_grad(
      self.losses_fn,
      layers=layers,
      weighting=gm.softmax(_TEMPERATURE),
      engine="per_sample" if streaming else case.engine,
      microbatch_size=self.config.microbatch_size if streaming else None,
    )
    args = (self.params, self.reference, self.batch)
    return step, args, lambda out: (out[0][1].scores, out[1])

  def _loss_of_one(self, params, sample):
    return self.losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

  def _truth(self, layers):
    if self.truth is None:
      losses_fn = self.losses_fn
      if self.section.vit.dtype is not None:
        wide = self.section.copy_and_resolve_references().unlock()
        wide.vit.dtype = None
        losses_fn, _ = _model(wide, self.config.seed)
      self.truth = exact_answers(
        losses_fn,
        self.params,
        self.reference,
        self.batch,
        {
          name: pattern
          for name, pattern in patterns(self.section).items()
          if name in self.config.layers
        },
      )
    return self.truth[layers]


def exact_answers(
  losses_fn: Callable[..., jax.Array],
  params: Any,
  reference: Any,
  batch: Any,
  layers: dict[str, str | None],
) -> dict[str, tuple[np.ndarray, Any]]:
  """Scores and reweighted gradients by vmap(grad) in float64.

  It goes over the batch twice, a few samples at a time, because a large batch's
  float64 gradients would not fit into memory; and it shares nothing with the
  library but the choice of layers.

  Args:
    losses_fn: `(params, batch) -> losses [B]`.
    params: the learner's parameters.
    reference: a tree like params.
    batch: leaves `[B, ...]`.
    layers: names and patterns of mimic layers.

  Returns:
    For each name the scores `[B]` and the gradient, float64.
  """
  with jax.enable_x64(True):
    params, reference, batch = jax.tree.map(_widen, (params, reference, batch))
    directions = {
      name: _direction(params, reference, pattern)
      for name, pattern in layers.items()
    }

    def loss_of_one(params, sample):
      return losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

    rows_of = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0))

    @jax.jit
    def scores_of(params, directions, part):
      rows = jax.tree.leaves(rows_of(params, part))
      return {
        name: -sum(
          jnp.tensordot(row, v, v.ndim)
          for row, v in zip(rows, direction, strict=True)
        )
        for name, direction in directions.items()
      }

    @jax.jit
    def add(sums, params, part, weights):
      rows = rows_of(params, part)
      return {
        name: jax.tree.map(
          lambda total, row, w=w: total + jnp.tensordot(w, row, 1),
          sums[name],
          rows,
        )
        for name, w in weights.items()
      }

    size = len(jax.tree.leaves(batch)[0])
    slices = [slice(i, i + _PART) for i in range(0, size, _PART)]
    parts = [jax.tree.map(lambda x, at=at: x[at], batch) for at in slices]
    answers = jax.device_get(
      [scores_of(params, directions, part) for part in parts]
    )
    scores = {
      name: np.concatenate([answer[name] for answer in answers])
      for name in layers
    }
    weights = {name: _softmax(m / _TEMPERATURE) for name, m in scores.items()}
    sums = {name: jax.tree.map(np.zeros_like, params) for name in layers}
    for part, at in zip(parts, slices, strict=True):
      chosen = {name: w[at] for name, w in weights.items()}
      sums = add(sums, params, part, chosen)
    sums = jax.device_get(sums)
  return {name: (scores[name], sums[name]) for name in layers}


def _widen(x):
  x = np.asarray(x)
  return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x


def _softmax(x):
  parts = np.exp(x - x.max())
  return parts / parts.sum()


def _direction(params, reference, pattern):
  """Unit vector to the reference: leaves, 0 outside the mimic layers."""
  flags = gm.layers.choose(pattern, params)
  leaves = [
    flag * (r - p)
    for p, r, flag in zip(
      jax.tree.leaves(params), jax.tree.leaves(reference), flags, strict=True
    )
  ]
  norm = np.sqrt(sum(np.sum(v**2) for v in leaves))
  return [np.asarray(v / norm) for v in leaves]


def _model(section, seed):
  """`losses_fn(params, batch) -> losses [B]`, and params."""
  apply, params = models.create(
    section,
    input_shape=section.input_shape,
    num_classes=section.num_classes,
    seed=seed,
  )
  with_hits = classification.make_losses_fn(apply)
  return (lambda params, batch: with_hits(params, batch)[0]), params


def _batch(section, size, seed):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(size, *section.input_shape)).astype(np.float32)
  labels = rng.integers(section.num_classes, size=size)
  return {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}


def _time(plain, candidate, timing) -> dict[str, Any]:
  """Times the two in turn: the median of the pairs' ratios, and seconds."""
  jax.block_until_ready((plain(), candidate()))  # warm-up
  calls = max(1, math.ceil(timing.shortest / _seconds(plain, 1)))
  pairs: list[tuple[float, float]] = []
  until = time.perf_counter() + timing.seconds
  while len(pairs) < timing.pairs or time.perf_counter() < until:
    pairs.append((_seconds(plain, calls), _seconds(candidate, calls)))
  ratios = [b / a for a, b in pairs]
  low, middle, high = np.percentile(ratios, [25, 50, 75])
  return {
    "time": float(middle),
    "time_quartiles": [float(low), float(high)],
    "pairs": len(pairs),
    "plain_seconds": float(np.median([a for a, _ in pairs])),
  }


def _seconds(step, calls):
  """Seconds a call, of several in a row."""
  start = time.perf_counter()
  for _ in range(calls):
    output = step()
    # An accelerator queues calls, as in training; a CPU could overlap them.
    if next(iter(jax.tree.leaves(output)[0].devices())).platform == "cpu":
      jax.block_until_ready(output)
  jax.block_until_ready(output)
  return (time.perf_counter() - start) / calls


def _flops(compiled):
  return (compiled.cost_analysis() or {}).get("flops")


def _memory(compiled):
  analysis = compiled.memory_analysis()
  return None if analysis is None else analysis.temp_size_in_bytes


def _ratio(ours, plain):
  return ours / plain if ours and plain else None


def _error(ours, exact) -> float:
  """Largest difference, relative to the largest entry."""
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
  difference = max(
    np.max(np.abs(np.asarray(a, np.float64) - b)) for a, b in pairs
  )
  largest = max(np.max(np.abs(b)) for b in jax.tree.leaves(exact))
  return float(difference / largest)


@contextlib.contextmanager
def _settings(config) -> Iterator[jax.Device]:
  """The device and precision that the config asks for."""
  try:
    device = jax.devices(config.device or None)[0]
  except RuntimeError as error:
    raise ValueError(
      f"config.device is {config.device!r}, and JAX finds no such device here;"
      f" expected one of {jax.default_backend()}, cpu, or '' for the default."
    ) from error
  with (
    jax.default_device(device),
    jax.default_matmul_precision(config.matmul_precision),
  ):
    yield device


def _start(file: pathlib.Path, device: jax.Device) -> dict[str, Any]:
  """What an earlier run on this kind of machine measured, or nothing yet."""
  machine = {
    "platform": device.platform,
    "device": device.device_kind,
    "cpu_cores": os.cpu_count(),
    "jax": jax.__version__,
  }
  if not file.exists():
    today = datetime.date.today().isoformat()
    return {"machine": machine | {"date": today}, "cases": {}, "sweep": {}}
  results = workdir_lib.read_json(file)
  for field, value in machine.items():
    theirs = results["machine"][field]
    if theirs != value:
      raise ValueError(
        f"{file} was measured with {field} {theirs!r} and this machine has"
        f" {value!r}; ratios of two machines don't mix: choose another"
        " --workdir."
      )
  return results


def draw(
  config: Any, folder: pathlib.Path, results: dict[str, Any]
) -> list[pathlib.Path]:
  """Draws the time ratios of the table, and the sweep if there is one."""
  paths = []
  for name in config.models:
    bars: dict[str, dict[str, float]] = {}
    for case in table_cases(config):
      model, size, layers, engine = case.key.split("/")
      ratio = results["cases"][case.key]["time"]
      if model == name and ratio is not None:
        bars.setdefault(f"{layers}\n{size}", {})[engine] = ratio
    if bars:
      paths.append(
        figures.ratio_bars(
          bars,
          folder / f"time_{name}.png",
          title=f"{name}: mimic layers and batch size",
          ylabel="time / plain step",
        )
      )
  curves: dict[str, Any] = {
    ratio: {axis: {} for axis in SWEPT if config.sweep[axis]}
    for ratio in RATIOS
  }
  for case in sweep_cases(config):
    axis, value, layers, engine = case.key.split("/")
    for ratio in RATIOS:
      y = results["sweep"][case.key][ratio]
      if y is not None:
        line = curves[ratio][axis].setdefault(f"{engine}, {layers}", ([], []))
        line[0].append(int(value))
        line[1].append(y)
  if results["sweep"]:
    paths.append(
      figures.ratio_curves(
        curves, folder / "sweep.png", title="ratio to a plain step"
      )
    )
  return paths


def table(config: Any, results: dict[str, Any]) -> str:
  """The cases, and below them the sweep, as text."""
  columns = (*RATIOS, *ERRORS)
  lines = []
  for part, cases, start in (
    ("cases", table_cases(config), ("model", "batch", "layers", "engine")),
    ("sweep", sweep_cases(config), ("size", "value", "layers", "engine")),
  ):
    shown = columns if part == "cases" else RATIOS
    if not cases:
      continue
    head = "{:<10} {:>5}  {:<8} {:<18}".format(*start)
    lines += ["", head + "".join(f"{name:>15}" for name in shown)]
    for case in cases:
      entry = results[part][case.key]
      *first, engine = case.key.split("/")
      if engine == "auto":
        engine = f"auto ({entry['engine']})"
      row = "{:<10} {:>5}  {:<8} {:<18}".format(*first, engine)
      for name in shown:
        value, form = entry[name], ".1e" if name in ERRORS else ".3f"
        row += f"{'-' if value is None else format(value, form):>15}"
      lines.append(row + f"  {entry.get('failed', '')}".rstrip())
  return "\n".join(lines[1:])


def main(config: Any, workdir: str) -> None:
  """Runs the benchmark, then prints the table and where the rest is."""
  results = run_benchmark(config, workdir)
  machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
  print(f"\nratios to a plain step ({machine}):\n")
  print(table(config, results))
  print(f"\nfigures and {RESULT_FILE}: {workdir}")


if __name__ == "__main__":
  cli.run(main)
