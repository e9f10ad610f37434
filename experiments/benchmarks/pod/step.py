"""A train step compiled for devices that are not there.

Nothing is allocated and nothing runs: the step is that of `experiments.train`,
its arguments are shapes with shardings, and the compiler is asked what its
program holds in memory and sends between devices. The devices are a host's
virtual ones, or those of a TPU slice: for these libtpu has to be installed, and
no TPU.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from configs import (
  classification as classification_config,
  contrastive as contrastive_config,
)
from experiments import methods, models
from experiments.benchmarks import engine_steps
from experiments.benchmarks.pod.collectives import Collective, collectives
from experiments.models import clip
from experiments.runtime import sharding
from experiments.tasks.classification import losses as classification
from experiments.tasks.contrastive import (
  evaluation as clip_features,
  losses as contrastive,
)
from experiments.training import optimizer, steps

HOST = "host"
# Slices by how many chips they have.
_FLAT = {
  8: "4x2", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBES = {
  8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
  256: "4x8x8", 512: "8x8x8",
}  # fmt: skip
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES}
PLAIN = "plain"
# "streaming" as a job runs it; "streaming_mesh" with jax.set_mesh around it.
STEPS = (PLAIN, "forward", "per_sample", "streaming", "streaming_mesh")
LAYERS = ("head", "last_mlp", "all")
_TOTAL_STEPS = 1000  # of the learning rate's schedule
# Machine code for virtual devices is not looked at.
_NO_CODE = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
}


class Case(NamedTuple):
  """One step of one model on one slice."""

  model: str  # a section of the config
  batch_size: int  # of all devices together
  devices: int
  fsdp: int = 1  # devices that share one copy of the parameters
  step: str = PLAIN  # one of STEPS
  layers: str = "all"  # one of LAYERS
  weighting: str = "softmax"  # "ess_softmax", ...

  @property
  def key(self) -> str:
    """Its name in `pod.json`."""
    return "/".join(str(x) for x in self)


class Compiled(NamedTuple):
  """The compiler's account of a step, in bytes on each device."""

  arguments: int  # state, reference and batch
  temporaries: int  # the most that is held besides
  collectives: list[Collective]


class Shapes(NamedTuple):
  """A case's arguments, as shapes with shardings."""

  state: steps.TrainState
  reference: Any  # None for a plain step
  batch: dict[str, jax.ShapeDtypeStruct]


def devices(target: str, count: int) -> list[Any]:
  """Devices to compile for: of a kind of TPU in `SLICES`, or of this `"host"`.

  A host must have been given as many virtual devices before JAX started.

  Raises:
    ValueError: an unknown target, or there are not as many.
    ImportError: libtpu is not installed.
  """
  if target == HOST:
    found = jax.devices("cpu")
    if len(found) < count:
      raise ValueError(
        f"this host has {len(found)} virtual devices and {count} were asked"
        " for; expected jax.config.update('jax_num_cpu_devices', n) with as"
        " many before JAX starts."
      )
    return list(found[:count])
  if count not in SLICES.get(target, {}):
    known = ", ".join(f"{k} {tuple(v)}" for k, v in SLICES.items())
    raise ValueError(
      f"config.target is {target!r} and {count} devices were asked for;"
      f" expected 'host', or of TPUs: {known}."
    )
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{target}:{SLICES[target][count]}"
    )
  except (RuntimeError, ValueError) as error:
    raise ImportError(
      f"JAX can't describe the TPU slice {target}:{SLICES[target][count]}"
      f" ({error}); expected libtpu to be installed (pip install libtpu), or"
      " --config.target=host."
    ) from error
  return list(topology.devices)


def compile_step(case: Case, section: Any, found: list[Any]) -> Compiled:
  """Compiles a case of the model in a section, for as many devices as it has.

  Raises:
    ValueError: an unknown step or layers, or a text that can't be read.
  """
  mesh = mesh_of(case, found)
  step, shapes = train_step(case, section, mesh)
  around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
  if case.step == "streaming_mesh":
    around = jax.set_mesh(mesh)
  with around:
    lowered = step.lower(*shapes)
  host = found[0].platform == "cpu"
  compiled = lowered.compile(compiler_options=_NO_CODE if host else None)
  memory = compiled.memory_analysis()
  return Compiled(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    collectives(compiled.as_text()),
  )


def mesh_of(case: Case, found: list[Any]) -> Mesh:
  """The mesh that `distributed.Devices` makes of `config.mesh`."""
  if len(found) != case.devices:
    raise ValueError(
      f"{len(found)} devices came for a case of {case.devices}; expected one"
      " each."
    )
  return Mesh(
    np.asarray(found).reshape(-1, case.fsdp),
    (sharding.DATA, sharding.FSDP),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def train_step(case: Case, section: Any, mesh: Mesh) -> tuple[Any, Shapes]:
  """The jitted step of a case, and shapes to lower it with."""
  for name, value, known in (
    ("step", case.step, STEPS),
    ("layers", case.layers, LAYERS),
  ):
    if value not in known:
      raise ValueError(
        f"a case's {name} is {value!r}; expected one of {', '.join(known)}."
      )
  rows = NamedSharding(mesh, sharding.ROWS)
  apply, params = model(section)
  config = _job_config(case, section, params)
  losses_fn, tx, batch, outputs = _make_job(case, section, config, apply, rows)
  method = methods.create(config.method, config.mimic)
  state = jax.eval_shape(functools.partial(steps.init_state, tx=tx), params)
  step = steps.make_train_step(
    losses_fn,
    tx,
    method,
    config.mimic,
    outputs,
    out_shardings=steps.make_shardings(state, mesh),
  )
  shapes = Shapes(
    _placed(state, sharding.make_param_shardings(state, mesh)),
    None
    if method is None
    else _placed(params, sharding.make_param_shardings(params, mesh)),
    _placed(batch, jax.tree.map(lambda _: rows, batch)),
  )
  return step, shapes


def model(section: Any) -> tuple[Any, Any]:
  """A section's model: its `apply`, and its parameters as shapes."""
  shape = (section.image_size, section.image_size, 3)
  made: dict[str, Any] = {}

  def create():
    if section.name == "clip":
      made["apply"], params = clip.create(section, input_shape=shape, seed=0)
    else:
      made["apply"], params = models.create(
        section, input_shape=shape, num_classes=section.num_classes, seed=0
      )
    return params

  params = jax.eval_shape(create)
  return made["apply"], params


def layers_pattern(case: Case, section: Any, params: Any) -> str | None:
  """The case's mimic layers, as a pattern of leaf paths; None for all."""
  if section.name != "clip":
    return engine_steps.patterns(section)[case.layers]
  last = clip.mimic_layers("both_last_mlp", params)
  known = {"head": "^(image|text)/projection/", "last_mlp": last, "all": None}
  return known[case.layers]


def _job_config(case, section, params):
  """The job's own config, with what the case says."""
  made = contrastive_config if section.name == "clip" else classification_config
  config = made.get_config().unlock()
  config.method = "sgd" if case.step == PLAIN else "grad_mimic_weights"
  config.mimic.weighting = case.weighting
  config.mimic.layers = layers_pattern(case, section, params)
  config.mimic.engine = case.step
  config.mimic.check_independence = False  # no model runs here
  if case.step.startswith("streaming"):
    config.mimic.engine = "per_sample"
    config.mimic.microbatch_size = case.devices  # a sample on each
  return config


def _make_job(case, section, config, apply, rows):
  """Losses, optimizer, batch and outputs, as a run of the task has them."""
  n, size, last = case.batch_size, section.image_size, None
  if section.name == "clip":
    apply = clip_features.scaled(apply, config.data.mean, config.data.std)
    losses_fn = contrastive.make_losses_fn(apply, config.loss, sharding=rows)
    outputs = contrastive.make_outputs(apply, config.loss, sharding=rows)
    last = contrastive.keep_logit_scale()
    tokens = clip.options(section)["context_length"]
    given = {"text": jax.ShapeDtypeStruct((n, tokens), jnp.int32)}
    pixels: Any = jnp.uint8
  else:
    losses_fn = classification.make_losses_fn(apply)
    outputs = classification.make_outputs(classification.make_outputs_fn(apply))
    given = {"label": jax.ShapeDtypeStruct((n,), jnp.int32)}
    pixels = jnp.float32
  tx = optimizer.create(config.optimizer, total_steps=_TOTAL_STEPS, last=last)
  batch = {
    "image": jax.ShapeDtypeStruct((n, size, size, 3), pixels),
    **given,
    "mask": jax.ShapeDtypeStruct((n,), bool),
  }
  return losses_fn, tx, batch, outputs


def _placed(tree, shardings):
  return jax.tree.map(
    lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
    tree,
    shardings,
  )
