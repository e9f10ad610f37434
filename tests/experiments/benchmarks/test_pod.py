"""Memory and communication of a pod's steps, as compilers have them."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gradmimic_jax as gm
from configs.benchmark import pod as pod_config
from experiments.benchmarks.pod import cases as pod, step as pod_step
from experiments.benchmarks.pod.collectives import Collective, collectives
from experiments.runtime import sharding
from tests.experiments.processes import ROOT

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

"""


def program(*lines, before=""):
  body = "\n".join(f"  {line}" for line in lines)
  entry = "ENTRY %main (x: f32[8]) -> f32[8] {"
  return f"{HEADER}{SUM}{before}{entry}\n{body}\n}}\n"


def loop(limit, *, known=""):
  """A program with a loop that reduces two numbers."""
  before = (
    "%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {\n"
    "  %t = (s32[], f32[2]{0}) parameter(0)\n"
    "  %x = f32[2]{0} get-tuple-element(%t), index=1\n"
    "  %r = f32[2]{0} all-reduce(%x), replica_groups={}, to_apply=%sum\n"
    "  %i = s32[] get-tuple-element(%t), index=0\n"
    "  ROOT %u = (s32[], f32[2]{0}) tuple(%i, %r)\n"
    "}\n\n"
    "%condition (c: (s32[], f32[2])) -> pred[] {\n"
    "  %c = (s32[], f32[2]{0}) parameter(0)\n"
    "  %j = s32[] get-tuple-element(%c), index=0\n"
    f"  %n = s32[] {limit}\n"
    "  ROOT %l = pred[] compare(%j, %n), direction=LT\n"
    "}\n\n"
  )
  return program(
    "%s = (s32[], f32[2]{0}) parameter(0)",
    "ROOT %w = (s32[], f32[2]{0}) while(%s), condition=%condition,"
    f" body=%body{known}",
    before=before,
  )


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{}", 8),
    ("{{0,1},{2,3},{4,5},{6,7}}", 2),
    ("[2,4]<=[8]", 4),
    ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['data'=4,'fsdp'=2] {'data'}", 4),
    ("mesh['data'=4,'fsdp'=2] {'data','fsdp'}", 8),
    ("mesh['a'=8] {'a':(1)4}", 4),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
  ],
)
def test_device_groups_are_read(groups, size):
  line = f"ROOT %r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}"
  assert collectives(program(line)) == [Collective("all-reduce", 32, size, 1)]


def test_what_a_device_does_alone_is_no_collective():
  alone = "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
  assert not collectives(
    program(f"ROOT %r = f32[8]{{0}} all-reduce(%x), {alone}")
  )


def test_tuples_layouts_and_comments_are_read():
  line = (
    "%r = (f32[2,3]{1,0:T(8,128)S(1)}, bf16[5]{0}, /*index=2*/pred[]) "
    "all-reduce(%x, %y, %z), replica_groups={}, to_apply=%sum"
  )
  assert collectives(program(line))[0].bytes == 4 * 6 + 2 * 5 + 1


def test_a_pair_of_start_and_done_is_one():
  found = collectives(
    program(
      "%s = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), dimensions={0},"
      " replica_groups=[1,8]<=[8]",
      "ROOT %d = f32[64]{0} all-gather-done(%s)",
    )
  )
  assert found == [Collective("all-gather", 256, 8, 1)]


def test_a_scattered_sum_counts_whole():
  line = (
    "ROOT %r = f32[8]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8],"
    " dimensions={0}, to_apply=%sum"
  )
  (found,) = collectives(program(line))
  assert found.bytes == 8 * 32
  assert found.sent == 7 * 32


def test_bytes_around_a_ring():
  assert Collective("all-reduce", 80, 8, 3).sent == 3 * 2 * 70
  assert Collective("all-gather", 80, 8, 1).sent == 70
  assert Collective("collective-permute", 80, 2, 1).sent == 80


@pytest.mark.parametrize(
  "text",
  [
    loop("constant(5)"),
    loop(
      "parameter(1)",
      known=', backend_config={"known_trip_count":{"n":"5"}}',
    ),
  ],
  ids=["condition", "compiler"],
)
def test_a_loop_counts_as_often_as_it_runs(text):
  assert collectives(text) == [Collective("all-reduce", 8, 8, 5)]


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("nothing", "ENTRY"),
    (loop("parameter(1)"), "how often"),
    (
      program("ROOT %r = f9[8] all-reduce(%x), replica_groups={}"),
      "'f9'",
    ),
    (
      program("ROOT %r = f32[<=8] all-reduce(%x), replica_groups={}"),
      "shape",
    ),
    (
      program("ROOT %r = f32[8] all-reduce(%x), replica_groups=?"),
      "can't be read",
    ),
    (program("ROOT %r = f32[8] collective-broadcast(%x)"), "collective-br"),
  ],
)
def test_what_cant_be_read_is_an_error(text, match):
  with pytest.raises(ValueError, match=match):
    collectives(text)


def test_collectives_of_a_compiled_program():
  mesh = Mesh(
    np.asarray(jax.devices("cpu")[:8]), "data", axis_types=(AxisType.Auto,)
  )
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())

  def fn(x):
    # Each step's sum depends on the one before: nothing can leave the loop.
    total, _ = jax.lax.scan(
      lambda t, _: (jnp.tanh(jnp.sum(x * t, axis=0)), None),
      jnp.ones(16),
      length=5,
    )
    return x, x.T @ x, total

  x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
  text = jax.jit(fn, out_shardings=whole).lower(x).compile().as_text()
  found = sorted(collectives(text))
  assert found == [
    Collective("all-gather", 4 * 64 * 16, 8, 1),
    Collective("all-reduce", 4 * 16, 8, 5),
    Collective("all-reduce", 4 * 16 * 16, 8, 1),
  ]


@pytest.fixture(scope="module")
def section():
  return pod_config.get_config().vit_tiny


@pytest.fixture(scope="module")
def compiled(section):
  """`compiled(step, weighting)`: the tiny model's step on eight devices."""
  found = {}

  def get(step, weighting):
    case = case_of(step, weighting)
    if case not in found:
      with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
      ):
        found[case] = pod_step.compile_step(
          case, section, pod_step.devices("host", 8)
        )
    return found[case]

  return get


def case_of(step, weighting="softmax", *, fsdp=1):
  return pod_step.Case("vit_tiny", 64, 8, fsdp, step, "all", weighting)


def held(tree):
  """Bytes on each device."""
  return sum(
    np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def total(step, kind):
  return sum(x.bytes * x.times for x in step.collectives if x.kind == kind)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("step", "weighting", "gradients", "samples"),
  [
    ("plain", "softmax", 1, 0),
    ("forward", "ess_softmax", 1, 1),
    ("per_sample", "softmax", 1, 1),
    # Without a mesh that is set, once a microbatch.
    ("streaming", "softmax", 8, 1),
    # A second sample for its second pass.
    ("streaming_mesh", "ess_softmax", 1, 2),
  ],
)
def test_what_a_step_is_given_and_sends(
  step, weighting, gradients, samples, compiled, section
):
  case, found = case_of(step, weighting), compiled(step, weighting)
  mesh = pod_step.mesh_of(case, pod_step.devices("host", 8))
  _, shapes = pod_step.train_step(case, section, mesh)
  assert found.arguments == sum(map(held, shapes))
  whole = sum(4 * x.size for x in jax.tree.leaves(shapes.state.params))
  sample = 4 * 3 * section.image_size**2
  # A handful of scalars; in streaming without a mesh, of each microbatch.
  more = total(found, "all-reduce") - gradients * whole - samples * sample
  assert 0 <= more <= 128
  scores = 4 * 64 if weighting == "ess_softmax" else 0
  assert 0 <= total(found, "all-gather") - scores <= 128
  if step == "forward":  # not the sums of the weighting's search, either
    assert all(x.times == 1 for x in found.collectives)


def test_large_parameters_are_divided(section):
  """And with them the reference and the optimizer's two moments."""
  wide = section.copy_and_resolve_references().unlock()
  wide.vit.width, wide.vit.mlp_width = 256, 1024
  case = case_of("forward", fsdp=4)
  mesh = pod_step.mesh_of(case, pod_step.devices("host", 8))
  _, shapes = pod_step.train_step(case, wide, mesh)
  params = held(shapes.state.params)
  assert held(shapes.reference) == params
  assert 0 <= held(shapes.state.opt_state) - 2 * params <= 16  # counters
  sizes = [4 * x.size for x in jax.tree.leaves(shapes.state.params)]
  large = sum(x for x in sizes if x >= 4 * sharding.LEAST_SIZE)
  assert large > sum(sizes) / 2
  assert params == sum(sizes) - large + large / 4


def tiny_config(**overrides):
  config = pod_config.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "scaling.models": (),
      "cases": (),
      **overrides,
    }
  )
  return config.lock()


def test_job_goes_on_where_it_stopped(tmp_path, monkeypatch):
  asked = []

  def compile_step(case, section, found):
    asked.append(case.key)
    return pod_step.Compiled(1, 2, [Collective("all-reduce", 80, 8, 3)])

  monkeypatch.setattr(pod_step, "compile_step", compile_step)
  first = "vit_tiny/64/8/1/plain/all/softmax"
  second = "vit_tiny/64/8/1/forward/head/softmax"
  pod.measure(tiny_config(cases=(first,)), tmp_path)
  results = pod.measure(tiny_config(cases=(first, second)), tmp_path)
  assert asked == [first, second]
  assert json.loads((tmp_path / pod.RESULT_FILE).read_text()) == results
  assert results["compiled"]["host"][first]["all-reduce"] == {
    "bytes": 240,
    "in_loops": 240,
    "sent": 420,
    "runs": 3,
  }
  assert second in (tmp_path / pod.TABLE_FILE).read_text()


def test_a_contrastive_model_takes_no_step_that_looks_at_one_pair():
  config = tiny_config(**{"scaling.models": ("clip_tiny", "vit_tiny")})
  steps = {(case.model, case.step) for case in pod.scaling_cases(config)}
  clip = {step for model, step in steps if model == "clip_tiny"}
  assert clip == {"plain", "forward"}
  assert ("vit_tiny", "per_sample") in steps


@pytest.mark.parametrize(
  ("key", "match"),
  [
    ("vit_tiny/64/8/1/plain/all", "can't be read"),
    ("vit_huge/64/8/1/plain/all/softmax", "can't be read"),
    ("target/64/8/1/plain/all/softmax", "can't be read"),
    ("vit_tiny/64/x/1/plain/all/softmax", "numbers"),
    ("vit_tiny/60/8/1/plain/all/softmax", "shared"),
    ("vit_tiny/64/8/3/plain/all/softmax", "shared"),
  ],
)
def test_a_wrong_case_is_refused(key, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    pod.measure(tiny_config(cases=(key,)), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_wrong_targets_and_names_are_refused(section):
  with pytest.raises(ValueError, match="v5e"):
    pod_step.devices("v2", 8)
  with pytest.raises(ValueError, match="jax_num_cpu_devices"):
    pod_step.devices("host", 9)
  for field in ("step", "layers"):
    case = case_of("plain")._replace(**{field: "none"})
    with pytest.raises(ValueError, match=field):
      pod_step.compile_step(case, section, pod_step.devices("host", 8))


@pytest.mark.slow
@pytest.mark.parametrize(
  "weighting",
  [
    pytest.param(gm.softmax(0.1), id="one"),
    pytest.param(gm.ess_softmax(0.4), id="two"),
  ],
)
def test_each_device_streams_to_the_same_gradient(weighting):
  """Sums of its own are carried by each device of a mesh that is set.

  Of mimic layers, which get the weighted gradient, and of the others.
  """
  mesh = Mesh(
    np.asarray(jax.devices("cpu")[:8]), "data", axis_types=(AxisType.Auto,)
  )
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  params = {"a": draw(5, 4), "b": draw(4, 3)}
  reference = {"a": draw(5, 4), "b": draw(4, 3)}
  batch = {"x": draw(48, 5), "y": draw(48, 3)}
  # The first device has padding only, the second one a row that counts.
  mask = np.arange(48) >= 11

  def losses_fn(params, batch):
    out = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
    return jnp.sum((out - batch["y"]) ** 2, axis=-1)

  fn = gm.mimic_value_and_grad(
    losses_fn,
    layers="^b",
    scope="layers",
    weighting=weighting,
    microbatch_size=16,
  )
  alone = jax.jit(fn)(params, reference, batch, mask=mask)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(fn)
      .lower(
        *jax.device_put((params, reference), whole),
        jax.device_put(batch, rows),
        mask=jax.device_put(mask, rows),
      )
      .compile()
    )
    together = compiled(
      *jax.device_put((params, reference), whole),
      jax.device_put(batch, rows),
      mask=jax.device_put(mask, rows),
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6),
    alone,
    together,
  )
  assert all(x.times == 1 for x in collectives(compiled.as_text()))


@pytest.mark.slow
def test_communication_grows_by_the_scores_only(tmp_path):
  """At 8 and 64 devices, both tasks.

  By the weighting that asks for all scores; single steps have the other.
  """
  command = [
    sys.executable,
    "-m",
    "experiments.benchmark",
    "--config=configs/benchmark/pod.py",
    f"--workdir={tmp_path}",
    "--config.cases=()",
    "--config.scaling.devices=(8,64)",
    "--config.scaling.steps=('forward','per_sample')",
    "--config.scaling.weightings=('ess_softmax',)",
  ]
  subprocess.run(
    command,
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    check=True,
    stdout=subprocess.DEVNULL,
  )
  file = tmp_path / pod.RESULT_FILE
  compiled = json.loads(file.read_text())["compiled"]["host"]
  config = pod_config.get_config()
  sample = 4 * 3 * config.vit_tiny.image_size**2
  features = 4 * pod_step.clip.options(config.clip_tiny)["embed_width"]
  seen = 0
  for key, entry in compiled.items():
    model, size, devices, _, step, _, _ = key.split("/")
    if step == "plain":
      continue
    plain_key = f"{model}/{size}/{devices}/1/plain/all/softmax"
    plain, scores = compiled[plain_key], 4 * int(size)
    reduce, gather = (
      entry[kind]["bytes"] - plain[kind]["bytes"]
      for kind in ("all-reduce", "all-gather")
    )
    assert entry["all-reduce"]["in_loops"] == 0
    # Of images in float32 one sound one is shown to all; of CLIP's, stored in
    # uint8, none. Its texts' tangents go where their features go.
    clip = model == "clip_tiny"
    assert 0 <= reduce - (scores if clip else sample) <= 64
    # Where a sound sample is: a number and a flag of each device.
    asked = 5 * int(devices) + scores
    assert 0 <= gather - (features * int(size) if clip else 0) <= asked
    seen += 1
  assert seen == 2 * (2 + 1)
