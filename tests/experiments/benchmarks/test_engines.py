"""The benchmark end to end, small; and the vision transformer it measures."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import classification
from configs.benchmark import engines as engines_config
from experiments import models
from experiments.benchmarks import engine_steps, engines, float64


@pytest.fixture
def config():
  config = engines_config.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "models": ("mlp",),
      "layers": ("last_mlp",),
      "engines": (
        "forward",
        "per_sample",
        "streaming_3",
        "auto",
        "optax",
        "outputs",
      ),
      "largest_compared": 10,
      "timing.pairs": 1,
      "timing.seconds": 0.0,
      "timing.shortest": 0.0,
      "mlp.batch_sizes": (10,),
      "mlp.widths": (16, 16),
      "sweep.model.vit.patch_size": 16,
      "sweep.model.vit.depth": 1,
      "sweep.batch_size": (2,),
      "sweep.depth": (),
      "sweep.width": (),
      "sweep.lines": ("auto/last_mlp",),
      "tokens.image_sizes": (),
    }
  )
  return config.lock()


@pytest.mark.slow
def test_a_benchmark_end_to_end(config, tmp_path, monkeypatch):
  folder = tmp_path / "engines"
  results = engines.measure(config, folder)
  assert len(results["cases"]) == len(config.engines)
  assert list(results["sweep"]) == ["batch_size/2/last_mlp/auto"]
  assert results["sweep"]["batch_size/2/last_mlp/auto"]["score_error"] is None
  for key, entry in results["cases"].items():
    assert entry["time"] > 0
    assert entry["gradient_error"] < 1e-5
    assert (entry["flops"] is None) == key.endswith("_3")
    if key.endswith("/optax"):
      assert entry["score_error"] is None
    else:
      assert entry["score_error"] < 1e-5
  forward, auto = (
    results["cases"][f"mlp/10/last_mlp/{name}"] for name in ("forward", "auto")
  )
  assert auto == forward
  assert 1 < auto["flops"] < 1.7
  for name in ("time_mlp.png", "sweep.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")
  stored = json.loads((folder / "engines.json").read_text())
  assert stored == results
  text = engines.table(config, results)
  assert "auto (forward)" in text

  # What a stop has left out is measured, and nothing else.
  left_out = ["mlp/10/last_mlp/forward", "mlp/10/last_mlp/optax"]
  for key in left_out:
    del stored["cases"][key]
  (folder / "engines.json").write_text(json.dumps(stored))
  measured = []

  def spy(self, cases, keep, compare):
    assert compare
    for case in cases:
      measured.append(case.key)
      keep(case, forward)

  monkeypatch.setattr(engine_steps.Setup, "measure", spy)
  again = engines.measure(config, folder)
  assert measured == left_out
  assert again["cases"].keys() == results["cases"].keys()
  monkeypatch.setattr(jax, "__version__", "0.0")
  with pytest.raises(ValueError, match="measured with jax"):
    engines.measure(config, folder)


def test_every_engine_and_layer_has_its_row():
  config = engines_config.get_config()
  keys = [case.key for case in engines.table_cases(config)]
  # Two batch sizes, seven engines; a probe is nothing but a head.
  assert len(keys) == len(set(keys)) == 2 * 7 * (3 + 3 + 1)
  larger = engines_config.get_config("sizes=accelerator")
  keys = {case.key for case in engines.table_cases(larger)}
  # A ViT-B/16 at two batch sizes and a decoder at one, five engines.
  assert len(keys) == 3 * 5 * 3
  assert {key.rsplit("/", 2)[0] for key in keys} == {
    "vit_b16/64",
    "vit_b16/256",
    "decoder/32",
  }


def test_layers_that_are_a_part_of_the_blocks():
  config = engines_config.get_config("sizes=accelerator")
  paths = [
    "patch_embed/kernel",
    *(f"blocks/{k}/mlp/fc1/kernel" for k in range(12)),
    "head/kernel",
  ]
  for name in ("vit_b16", "decoder"):
    found = engine_steps.patterns(config[name])
    chosen = {
      layers: [path for path in paths if re.search(pattern, path)]
      for layers, pattern in found.items()
      if pattern is not None
    }
    assert chosen["last_half"] == paths[7:]
    assert chosen["last_quarter"] == paths[10:]
    assert chosen["last_mlp"] == [paths[12]]


def test_streaming_without_a_size_is_refused():
  with pytest.raises(ValueError, match="expected its microbatch size too"):
    engine_steps.options_of("streaming")


def test_sizes_that_meet_in_the_base_are_measured_once(
  config, tmp_path, monkeypatch
):
  config = config.unlock()
  config.update_from_flattened_dict(
    {"models": (), "sweep.batch_size": (32,), "sweep.depth": (1, 2)}
  )
  entry = dict.fromkeys(
    ("engine", *engine_steps.RATIOS, *engine_steps.ERRORS), 1.0
  )
  measured = []

  class Spy:
    def __init__(self, *_):
      pass

    def measure(self, cases, keep, compare):
      assert not compare
      for case in cases:
        measured.append(case.key)
        keep(case, entry)

  monkeypatch.setattr(engine_steps, "Setup", Spy)
  results = engines.measure(config, tmp_path / "engines")
  ours = [f"{x}/last_mlp/auto" for x in ("batch_size/32", "depth/2", "depth/1")]
  assert measured == [ours[0], ours[1]]
  assert set(results["sweep"]) == set(ours)


@pytest.mark.slow
def test_flops_of_the_last_block_fall_with_tokens(monkeypatch):
  config = engines_config.get_config()
  # FLOPs are of shapes: a step toward it needn't be made.
  monkeypatch.setattr(
    engine_steps.Setup, "reference", property(lambda setup: setup.params)
  )
  ratios = []
  for case in engines.token_cases(config):
    setup = engine_steps.Setup(case.section, case.batch_size, config)
    ratios.append(setup.count(case)["flops"])
  # Of the last MLP's two layers, three products of 4 width^2 each; of a plain
  # step, three times 12 width^2 and attention's 2 tokens * width a block.
  width, depth = config.tokens.model.vit.width, config.tokens.model.vit.depth
  expected = [
    1 + 12 * width / (3 * depth * (12 * width + 2 * tokens))
    for tokens in (64, 144, 196)
  ]
  np.testing.assert_allclose(ratios, expected, atol=1e-3)
  assert ratios[0] > 1.05 > ratios[1] > ratios[2]


def test_the_error_column_sees_errors():
  true = {"w": np.array([1.0, -4.0]), "b": np.array([2.0])}
  ours = {"w": np.array([1.0, -4.0], np.float32), "b": np.array([2.5])}
  assert float64.error(true, true) == 0
  assert float64.error(ours, true) == 0.5 / 4


def test_exact_answers_by_hand():
  # losses (w x)^2 / 2 have gradients w x^2; the way to the reference is down.
  x = np.array([1.0, 2.0, 3.0], np.float32)
  params, reference = {"w": jnp.asarray(0.5)}, {"w": jnp.asarray(0.0)}
  gap = float64.weights_gap(params, reference)
  answers = float64.answers(
    lambda params, batch: (params["w"] * batch["x"]) ** 2 / 2,
    params,
    {"x": jnp.asarray(x)},
    {"all": float64.unit_vector(gap, None)},
    2.0,
  )
  scores, grads = answers["all"]
  assert scores.dtype == grads["w"].dtype == np.float64
  np.testing.assert_allclose(scores, 0.5 * x**2, rtol=1e-12)
  weights = np.exp(scores / 2) / np.exp(scores / 2).sum()
  np.testing.assert_allclose(grads["w"], weights @ scores, rtol=1e-12)


def test_the_way_to_outputs_by_hand():
  # Logits w x of a linear model: minus the gradient is x^T (targets - outputs).
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(5, 3)), rng.normal(size=(3, 4))
  targets = rng.normal(size=(5, 4))

  def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

  descent = float64.outputs_descent(
    lambda params, batch: batch @ params["w"], {"w": w}, targets, x
  )
  expected = x.T @ (softmax(targets) - softmax(x @ w)) / 5
  assert descent["w"].dtype == np.float64
  np.testing.assert_allclose(descent["w"], expected, rtol=1e-12)
  (unit,) = float64.unit_vector(descent, None)
  np.testing.assert_allclose(unit, expected / np.linalg.norm(expected))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("device", "abacus", "no such device"),
    ("timing.pears", 1, "configs/benchmark/engines.py lists the fields"),
  ],
)
def test_a_benchmark_refuses(config, tmp_path, field, value, message):
  config = config.unlock()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    engines.measure(config, tmp_path / "engines")


def test_another_machine_is_refused_and_another_day_is_not(tmp_path):
  file = tmp_path / engines.RESULT_FILE
  device = jax.devices()[0]
  results = engines._start(file, device)
  assert set(results) == {"machine", *engines.PARTS}
  results["machine"]["date"] = "2001-01-01"
  results["cases"]["one"] = {"time": 1.0}
  file.write_text(json.dumps(results))
  assert engines._start(file, device) == results
  results["machine"]["jax"] = "0.0.1"
  file.write_text(json.dumps(results))
  with pytest.raises(ValueError, match=r"jax '0\.0\.1' and this machine has"):
    engines._start(file, device)


def vit(dtype=None, **overrides):
  config = classification.get_config().unlock()
  config.model.name, config.model.dtype = "vit", dtype
  config.update_from_flattened_dict(
    {f"model.vit.{key}": value for key, value in overrides.items()}
  )
  return models.create(
    config.model, input_shape=(32, 32, 3), num_classes=10, seed=0
  )


@pytest.mark.slow
def test_bfloat16_activations_agree_with_float64_to_2e_2(config):
  config = config.unlock()
  sizes = {"width": 24, "mlp_width": 48, "depth": 1, "patch_size": 16}
  config.update_from_flattened_dict(
    {"layers": ("all",), "models": ("vit_b16",)}
    # "auto" is "forward" here, and a part is a batch to "ghost".
    | {"engines": ("forward", "ghost", "streaming_2", "outputs")}
    | {"vit_b16.input_shape": (32, 32, 3), "vit_b16.batch_sizes": (6,)}
    | {f"vit_b16.vit.{key}": value for key, value in sizes.items()}
  )
  assert config.vit_b16.dtype == "bfloat16"
  cases = engines.table_cases(config)
  entries = {}
  setup = engine_steps.Setup(cases[0].section, cases[0].batch_size, config)
  setup.measure(
    cases, lambda case, entry: entries.update({case.engine: entry}), True
  )
  assert set(entries) == set(config.engines)
  for engine, entry in entries.items():
    assert 1e-4 < entry["gradient_error"] < 2e-2
    if engine != "optax":
      assert 1e-4 < entry["score_error"] < 2e-2


def test_the_small_vit_has_its_size():
  params = jax.eval_shape(lambda: vit()[1])
  assert sum(x.size for x in jax.tree.leaves(params)) == 2_693_194


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"patch_size": 5}, "patch_size is 5"),
    ({"heads": 5}, "heads is 5"),
    ({"pooling": "max"}, "pooling is 'max'"),
  ],
)
def test_a_vit_refuses(sizes, message):
  with pytest.raises(ValueError, match=message):
    vit(**sizes)
