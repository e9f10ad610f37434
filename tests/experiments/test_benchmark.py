"""The benchmark end to end, small; and the vision transformer it measures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import benchmark as benchmark_config, common
from experiments import benchmark, models


@pytest.fixture
def config():
  config = benchmark_config.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "models": ("mlp",),
      "layers": ("last_mlp",),
      "microbatch_size": 3,
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
    }
  )
  return config.lock()


@pytest.mark.slow
def test_a_benchmark_end_to_end(config, tmp_path, monkeypatch):
  folder = tmp_path / "benchmark"
  results = benchmark.run_benchmark(config, folder)
  assert len(results["cases"]) == len(config.engines)
  assert list(results["sweep"]) == ["batch_size/2/last_mlp/auto"]
  for key, entry in results["cases"].items():
    assert entry["time"] > 0
    assert entry["gradient_error"] < 1e-5
    assert (entry["flops"] is None) == key.endswith("/streaming")
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
  stored = json.loads((folder / "benchmark.json").read_text())
  assert stored == results
  text = benchmark.table(config, results)
  assert "auto (forward)" in text

  # What a stop has left out is measured, and nothing else.
  del stored["cases"]["mlp/10/last_mlp/optax"]
  (folder / "benchmark.json").write_text(json.dumps(stored))
  measured = []
  monkeypatch.setattr(
    benchmark._Setup,
    "measure",
    lambda self, case, *_: measured.append(case.key) or forward,
  )
  again = benchmark.run_benchmark(config, folder)
  assert measured == ["mlp/10/last_mlp/optax"]
  assert again["cases"].keys() == results["cases"].keys()
  monkeypatch.setattr(jax, "__version__", "0.0")
  with pytest.raises(ValueError, match="measured with jax"):
    benchmark.run_benchmark(config, folder)


def test_every_engine_and_layer_has_its_row():
  config = benchmark_config.get_config()
  keys = [case.key for case in benchmark.table_cases(config)]
  # Two batch sizes, five engines; a probe is nothing but a head.
  assert len(keys) == len(set(keys)) == 2 * 5 * (3 + 3 + 1)
  larger = benchmark_config.get_config("sizes=accelerator")
  keys = {case.key for case in benchmark.table_cases(larger)} - set(keys)
  assert len(keys) == 5 * 3
  assert all(key.startswith("vit_b16/64/") for key in keys)


def test_the_error_column_sees_errors():
  exact = {"w": np.array([1.0, -4.0]), "b": np.array([2.0])}
  ours = {"w": np.array([1.0, -4.0], np.float32), "b": np.array([2.5])}
  assert benchmark._error(exact, exact) == 0
  assert benchmark._error(ours, exact) == 0.5 / 4


def test_exact_answers_by_hand():
  # losses (w x)^2 / 2 have gradients w x^2; the way to the reference is down.
  x = np.array([1.0, 2.0, 3.0], np.float32)
  answers = benchmark.exact_answers(
    lambda params, batch: (params["w"] * batch["x"]) ** 2 / 2,
    {"w": jnp.asarray(0.5)},
    {"w": jnp.asarray(0.0)},
    {"x": jnp.asarray(x)},
    {"all": None},
  )
  scores, grads = answers["all"]
  assert scores.dtype == grads["w"].dtype == np.float64
  np.testing.assert_allclose(scores, 0.5 * x**2, rtol=1e-12)
  weights = np.exp(scores) / np.exp(scores).sum()
  np.testing.assert_allclose(grads["w"], weights @ scores, rtol=1e-12)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("device", "abacus", "no such device"),
    ("timing.pears", 1, "configs/benchmark.py lists the fields"),
  ],
)
def test_a_benchmark_refuses(config, tmp_path, field, value, message):
  config = config.unlock()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    benchmark.run_benchmark(config, tmp_path / "benchmark")


def vit(**overrides):
  config = common.get_config().unlock()
  config.model.name = "vit"
  config.update_from_flattened_dict(
    {f"model.vit.{key}": value for key, value in overrides.items()}
  )
  return models.create(
    config.model, input_shape=(32, 32, 3), num_classes=10, seed=0
  )


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_a_vit_sees_every_patch_and_every_layer(pooling):
  sizes = {"width": 24, "mlp_width": 48, "depth": 1}
  apply, params = vit(pooling=pooling, **sizes)
  images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  logits = jax.jit(apply)(params, images)
  assert logits.shape == (4, 10)
  grads, by_pixel = jax.jit(
    jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2), argnums=(0, 1))
  )(params, images)
  assert (np.abs(by_pixel) > 0).mean() > 0.99
  assert params["blocks"][0]["mlp"]["fc1"]["kernel"].shape == (24, 48)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(leaf).all()
    # A bias of the keys shifts all attention logits of a query alike.
    if "key" not in jax.tree_util.keystr(path):
      assert np.abs(leaf).max() > 0
  apply_bf16, _ = vit(pooling=pooling, dtype="bfloat16", **sizes)
  rounded = jax.jit(apply_bf16)(params, images)
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, logits, atol=0.05)


def test_the_small_vit_has_its_size():
  _, params = vit()
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
