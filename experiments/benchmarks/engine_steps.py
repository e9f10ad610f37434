"""Measures mimic steps of one model at one batch size against a plain step.

The plain step is a jitted `jax.value_and_grad` of the mean loss; the mimic step
gives the loss, the scores and the reweighted gradient. Neither updates anything
with an optimizer. The optax transformation is fed by vmap(value_and_grad) and
stands alone in its chain. Errors are relative to the largest entry of what
vmap(grad) gives in float64.
"""

import concurrent.futures
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

import gradmimic_jax as gm
from experiments import models
from experiments.benchmarks import float64, timing
from experiments.models import decoder
from experiments.tasks.classification import losses as classification
from experiments.tasks.language import losses as language

RATIOS = ("time", "flops", "memory")
ERRORS = ("score_error", "gradient_error")
_TEMPERATURE = 1.0
_PROFILED = 3  # steps
_PADDING = 0  # a token that no sequence has


class Case(NamedTuple):
  """A row of a table."""

  key: str  # of its entry in `engines.json`
  section: Any  # the model's fields
  batch_size: int
  layers: str
  engine: str


class _Candidate(NamedTuple):
  """A mimic step, traced but not compiled."""

  engine: str  # which one it is, if the case says auto
  lowered: Any
  args: tuple[Any, ...]
  read: Callable[[Any], tuple[Any, Any]]  # output -> scores or None, gradient


def patterns(section: Any) -> dict[str, str | None]:
  """Patterns of a model's mimic layers by name, as `layers=` takes them."""
  if section.name in ("vit", "decoder"):
    depth = section[section.name].depth
    return {
      "head": "^head/",
      "last_mlp": f"^blocks/{depth - 1}/mlp/",
      "last_quarter": _from_block(depth - max(1, depth // 4), depth),
      "last_half": _from_block(depth // 2, depth),
      "all": None,
    }
  if not section.widths:  # nothing but a head
    return {"head": "^head/"}
  last = f"^body/{len(section.widths) - 1}/"
  return {"head": "^head/", "last_mlp": last, "all": None}


def _from_block(first, depth):
  """The pattern of all that comes from a block on."""
  numbers = "|".join(str(block) for block in range(first, depth))
  return f"^(blocks/({numbers})|final_norm|head)/"


def options_of(engine: str) -> dict[str, Any]:
  """The options of a row of the table, such as "streaming_8".

  Raises:
    ValueError: streaming without a microbatch size.
  """
  name, _, size = engine.rpartition("_")
  if size.isdigit():
    microbatch = {"microbatch_size": int(size)}
    return microbatch if name == "streaming" else {"engine": name, **microbatch}
  if engine == "streaming":
    raise ValueError(
      "config.engines has 'streaming'; expected its microbatch size too, as in"
      " 'streaming_8'."
    )
  return {"engine": engine}


class Setup:
  """One model at one batch size: its data, its plain step, the truth."""

  def __init__(
    self,
    section: Any,
    batch_size: int,
    config: config_dict.ConfigDict,
    profiles: pathlib.Path | None = None,
  ):
    """Draws parameters and a batch; profiles go into a folder."""
    self.config, self.section, self.profiles = config, section, profiles
    self.outputs_fn, self.losses_fn, self.params = _model(section, config.seed)
    self.batch = _batch(section, batch_size, config.seed)
    self._given = self.params, self.batch
    self._truth: dict[str, Any] = {}

  def count(self, case: Case) -> dict[str, Any]:
    """The case's entry with FLOPs only, as traced: nothing is compiled."""
    candidate = self._candidate(case)
    flops = timing.ratio(
      timing.flops(candidate.lowered), timing.flops(self._lowered)
    )
    return _entry(candidate.engine) | {"flops": flops}

  def measure(
    self,
    cases: Sequence[Case],
    keep: Callable[[Case, dict[str, Any]], None],
    compare: bool,
  ) -> None:
    """Measures cases of this model and batch size.

    `keep` is called with each case and its entry, as soon as it is there. A
    ratio or error is None where it has no meaning or the case did not fit into
    memory; errors against float64 are found if `compare` is true.
    """
    # XLA leaves cores idle when it compiles one program. All is compiled before
    # anything is timed. "auto" is another engine by the same name.
    workers = max(2, (os.cpu_count() or 1) // 2)
    programs: dict[tuple[str, str], tuple[_Candidate, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      for case in cases:
        if self._program(case) not in programs:
          candidate = self._candidate(case)
          compiling = pool.submit(candidate.lowered.compile)
          programs[self._program(case)] = candidate, compiling
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
      program = self._program(case)
      if program not in entries:
        entries[program] = self._measure(case, *programs[program], compare)
      keep(case, entries[program])

  def _measure(self, case, candidate, compiling, compare):
    entry = _entry(candidate.engine)
    try:
      compiled = compiling.result()
      output = jax.block_until_ready(compiled(*candidate.args))  # warm-up
      entry["memory"] = timing.ratio(
        timing.temporaries(compiled), timing.temporaries(self.plain)
      )
      # A scan's body is counted once, however often it runs.
      if "microbatch_size" not in options_of(case.engine):
        entry["flops"] = timing.ratio(
          timing.flops(compiled), timing.flops(self.plain)
        )
      if compare:
        scores, grads = jax.device_get(candidate.read(output))
        true_scores, true_grads = self._exact(case)
        entry["gradient_error"] = float64.error(grads, true_grads)
        if scores is not None:
          entry["score_error"] = float64.error(scores, true_scores)
      del output
      step = functools.partial(compiled, *candidate.args)
      entry |= self._time(step)
      if f"{case.layers}/{case.engine}" in self.config.profiles:
        self._profile(f"{case.layers}/{case.engine}", step)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      entry["failed"] = "out of memory"
    return entry

  def _profile(self, name, step):
    """Writes profiles of a few warm steps: these, and once the plain ones."""
    if self.profiles is None:
      return
    plain = functools.partial(self.plain, *self._given)
    for folder, each in {name: step, "plain": plain}.items():
      if not (self.profiles / folder).exists():
        with jax.profiler.trace(str(self.profiles / folder)):
          jax.block_until_ready([each() for _ in range(_PROFILED)])

  def _time(self, candidate):
    """Times two warm steps in turn: the median of the rounds' ratios."""
    wanted = self.config.timing
    plain = functools.partial(self.plain, *self._given)
    # An accelerator queues calls, as in training; a CPU could overlap them.
    (device,) = jax.tree.leaves(self.params)[0].devices()
    ahead = 0 if device.platform == "cpu" else None
    once = timing.seconds(plain, 1, ahead=ahead)
    calls = max(1, math.ceil(wanted.shortest / once))
    rounds = timing.rounds(
      {"plain": plain, "mimic": candidate},
      {"plain": calls, "mimic": calls},
      least=wanted.pairs,
      at_least_seconds=wanted.seconds,
      ahead=ahead,
    )
    ratios = [each["mimic"] / each["plain"] for each in rounds]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {
      "time": float(middle),
      "time_quartiles": [float(low), float(high)],
      "pairs": len(rounds),
      "plain_seconds": float(np.median([each["plain"] for each in rounds])),
    }

  @functools.cached_property
  def _lowered(self):
    def step(params, batch):
      return jax.value_and_grad(lambda p: jnp.mean(self.losses_fn(p, batch)))(
        params
      )

    return jax.jit(step).lower(self.params, self.batch)

  @functools.cached_property
  def plain(self) -> Any:
    """The plain step, compiled and warm."""
    compiled = self._lowered.compile()
    jax.block_until_ready(compiled(self.params, self.batch))
    return compiled

  @functools.cached_property
  def reference(self) -> Any:
    """A step down the mean gradient.

    Scores then differ as they do in training, where some samples agree with the
    reference and some don't.
    """
    _, grads = jax.device_get(self.plain(self.params, self.batch))
    return jax.device_put(
      jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * g, self.params, grads)
    )

  @functools.cached_property
  def reference_outputs(self) -> jax.Array:
    """The reference's logits for the batch, computed once."""
    return jax.jit(self.outputs_fn)(self.reference, self.batch)

  def _program(self, case):
    """Identifies the case's program among those of the others."""
    if case.engine != "auto":
      return case.layers, case.engine
    return case.layers, self._step(case).engine

  def _step(self, case):
    options = options_of(case.engine)
    if case.engine == "outputs":
      options = {"direction": gm.toward_outputs(self.outputs_fn)}
    return gm.mimic_value_and_grad(
      self.losses_fn,
      layers=patterns(self.section)[case.layers],
      weighting=gm.softmax(_TEMPERATURE),
      **options,
    )

  def _candidate(self, case):
    if case.engine == "optax":
      return self._transformation(case)
    step = self._step(case)
    outputs = case.engine == "outputs"
    reference = self.reference_outputs if outputs else self.reference
    args = (self.params, reference, self.batch)
    lowered = jax.jit(step).lower(*args)
    return _Candidate(
      step.engine, lowered, args, lambda out: (out[0][1].scores, out[1])
    )

  def _transformation(self, case):
    tx = gm.reweight_by_mimic_score(
      self.reference,
      layers=patterns(self.section)[case.layers],
      weighting=gm.softmax(_TEMPERATURE),
    )

    def loss_of_one(params, sample):
      return self.losses_fn(params, jax.tree.map(lambda x: x[None], sample))[0]

    per_sample = jax.vmap(jax.value_and_grad(loss_of_one), in_axes=(None, 0))

    def step(params, state, batch):
      losses, rows = per_sample(params, batch)
      grads, state = tx.update(rows, state, params)
      return jnp.mean(losses), grads, state

    args = (self.params, tx.init(self.params), self.batch)
    lowered = jax.jit(step).lower(*args)
    return _Candidate("optax", lowered, args, lambda out: (None, out[1]))

  def _exact(self, case):
    """True scores and gradient of a case; all cases' are found at once."""
    if not self._truth:
      wide = self.section.copy_and_resolve_references().unlock()
      wide.dtype = None
      outputs_fn, losses_fn, _ = _model(wide, self.config.seed)
      trees = {False: float64.weights_gap(self.params, self.reference)}
      if "outputs" in self.config.engines:
        trees[True] = float64.outputs_descent(
          outputs_fn, self.params, self.reference_outputs, self.batch
        )
      directions = {
        _name(layers, outputs): float64.unit_vector(tree, pattern)
        for layers, pattern in patterns(self.section).items()
        for outputs, tree in trees.items()
        if layers in self.config.layers
      }
      self._truth = float64.answers(
        losses_fn, self.params, self.batch, directions, _TEMPERATURE
      )
    return self._truth[_name(case.layers, case.engine == "outputs")]


def _name(layers, outputs):
  return f"{layers}, toward outputs" if outputs else layers


def _entry(engine):
  return {"engine": engine} | dict.fromkeys((*RATIOS, *ERRORS))


def _model(section, seed):
  """`(params, batch) -> outputs`, `-> losses [B]`, and params."""
  if section.name == "decoder":
    apply, params = decoder.create(
      section,
      vocab_size=section.vocab_size,
      context_length=section.length,
      seed=seed,
    )
    losses_fn = language.make_losses_fn(apply, padding=_PADDING)
    outputs_fn = language.make_outputs(apply, padding=_PADDING).of
  else:
    apply, params = models.create(
      section,
      input_shape=section.input_shape,
      num_classes=section.num_classes,
      seed=seed,
    )
    losses_fn = classification.make_losses_fn(apply)
    outputs_fn = classification.make_outputs_fn(apply)
  return outputs_fn, lambda params, batch: losses_fn(params, batch)[0], params


def _batch(section, size, seed):
  rng = np.random.default_rng(seed)
  if section.name == "decoder":
    shape = size, section.length + 1
    tokens = rng.integers(_PADDING + 1, section.vocab_size, size=shape)
    return {"tokens": jnp.asarray(tokens, jnp.int32)}
  images = rng.normal(size=(size, *section.input_shape)).astype(np.float32)
  labels = rng.integers(section.num_classes, size=size)
  return {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
