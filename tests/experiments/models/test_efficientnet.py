"""EfficientNet-Lite0 against NumPy in float64, and against the public model."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from experiments import models
from experiments.models import efficientnet, initial
from experiments.models.pretrained import efficientnet as pretrained

SHARED = pathlib.Path(__file__).parents[4] / "shared" / "backbone"
SIDE, CLASSES = 33, 5  # odd, so that "same" pads unevenly
CONFIG = ConfigDict({"name": "efficientnet_lite0", "pretrained": None})
# Of each block: kernel, stride, expansion, output channels.
BLOCKS = {
  f"{stage}.{block}": (kernel, stride if block == 0 else 1, expansion, width)
  for stage, (blocks, kernel, stride, expansion, width) in enumerate(
    [
      (1, 3, 1, 1, 16),
      (2, 3, 2, 6, 24),
      (2, 5, 2, 6, 40),
      (3, 3, 2, 6, 80),
      (3, 5, 1, 6, 112),
      (4, 5, 2, 6, 192),
      (1, 3, 1, 6, 320),
    ]
  )
  for block in range(blocks)
}


@functools.cache
def make_weights(classes=CLASSES):
  """Random weights under timm's names, with statistics that matter."""
  rng = np.random.default_rng(0)
  weights = {}

  def convolution(name, outputs, inputs, size):
    scale = (2 / (inputs * size**2)) ** 0.5
    weights[f"{name}.weight"] = rng.normal(
      0, scale, (outputs, inputs, size, size)
    )

  def norm(name, channels):
    weights[f"{name}.weight"] = rng.uniform(0.5, 1.5, channels)
    weights[f"{name}.bias"] = rng.normal(0, 0.3, channels)
    weights[f"{name}.running_mean"] = rng.normal(0, 0.3, channels)
    weights[f"{name}.running_var"] = rng.uniform(0.5, 2, channels)

  convolution("conv_stem", 32, 3, 3)
  norm("bn1", 32)
  inputs = 32
  for number, (kernel, _, expansion, width) in BLOCKS.items():
    block, hidden = f"blocks.{number}", inputs * expansion
    if expansion == 1:
      layers = [("conv_dw", hidden, 1, kernel), ("conv_pw", width, hidden, 1)]
    else:
      layers = [
        ("conv_pw", hidden, inputs, 1),
        ("conv_dw", hidden, 1, kernel),
        ("conv_pwl", width, hidden, 1),
      ]
    for place, (name, *shape) in enumerate(layers, 1):
      convolution(f"{block}.{name}", *shape)
      norm(f"{block}.bn{place}", shape[0])
    inputs = width
  convolution("conv_head", 1280, 320, 1)
  norm("bn2", 1280)
  weights["classifier.weight"] = rng.normal(0, 0.05, (classes, 1280))
  weights["classifier.bias"] = rng.normal(0, 0.3, classes)
  return {name: x.astype(np.float32) for name, x in weights.items()}


def compute(weights, images):
  """Features and logits by the published description, in float64."""
  weights = {name: x.astype(np.float64) for name, x in weights.items()}

  def convolve(x, name, stride=1):
    kernel = weights[f"{name}.weight"]
    size, grouped = kernel.shape[-1], kernel.shape[1] == 1
    padding = []
    for side in x.shape[1:3]:
      total = max((-(-side // stride) - 1) * stride + size - side, 0)
      padding.append((total // 2, total - total // 2))
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    windows = windows[:, ::stride, ::stride]  # [B, H, W, C, k, k]
    if grouped:
      return np.einsum("bhwckl,ckl->bhwc", windows, kernel[:, 0])
    return np.einsum("bhwckl,ockl->bhwo", windows, kernel, optimize=True)

  def normalise(x, name):
    mean, variance = (
      weights[f"{name}.running_{which}"] for which in ("mean", "var")
    )
    x = (x - mean) / np.sqrt(variance + 1e-3)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

  def relu6(x):
    return np.clip(x, 0, 6)

  x = relu6(normalise(convolve(images, "conv_stem", 2), "bn1"))
  for number, (_, stride, expansion, width) in BLOCKS.items():
    block, before, norms = f"blocks.{number}", x, iter((1, 2, 3))
    if expansion > 1:
      x = convolve(x, f"{block}.conv_pw")
      x = relu6(normalise(x, f"{block}.bn{next(norms)}"))
    x = convolve(x, f"{block}.conv_dw", stride)
    x = relu6(normalise(x, f"{block}.bn{next(norms)}"))
    x = convolve(x, f"{block}.conv_pw{'l' if expansion > 1 else ''}")
    x = normalise(x, f"{block}.bn{next(norms)}")
    if stride == 1 and before.shape[-1] == width:
      x = x + before
  x = relu6(normalise(convolve(x, "conv_head"), "bn2"))
  features = x.mean(axis=(1, 2))
  logits = features @ weights["classifier.weight"].T
  return features, logits + weights["classifier.bias"]


@pytest.fixture(scope="module")
def created():
  kept = []

  def create():
    apply, params = models.create(
      CONFIG, input_shape=(SIDE, SIDE, 3), num_classes=CLASSES, seed=0
    )
    kept.append(apply)
    return params

  like = jax.eval_shape(create)
  return kept[0], like


@pytest.fixture
def write(tmp_path):
  def write(weights, **config):
    file = tmp_path / "model.safetensors"
    kept = {name: x for name, x in weights.items() if x is not None}
    safetensors.numpy.save_file(kept, file)
    if config:
      (tmp_path / "config.json").write_text(json.dumps(config))
    return file

  return write


@pytest.mark.slow
def test_logits_are_those_of_the_published_description(created, write):
  apply, like = created
  weights = make_weights()
  params = pretrained.load(write(weights), like)
  images = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3))
  _, expected = compute(weights, images)
  logits = jax.jit(apply)(params, images.astype(np.float32))
  np.testing.assert_allclose(logits, expected, atol=2e-5 * abs(expected).max())


@pytest.mark.slow
@pytest.mark.skipif(
  not SHARED.exists(), reason="the public weights are not beside the project"
)
def test_features_and_logits_are_those_of_the_public_model():
  """That the model is its head on its features is asked of all models."""
  with np.load(SHARED / "expected.npz", allow_pickle=False) as file:
    expected = {name: file[name] for name in file.files}
  images = expected["image_nchw"].transpose(0, 2, 3, 1)
  options = {"input_shape": images.shape[1:], "num_classes": 1000, "seed": 0}
  _, like = models.create(CONFIG, **options)
  features, _ = models.create_features(CONFIG, **options)
  params = pretrained.load(SHARED / "tf_efficientnet_lite0.safetensors", like)
  found = jax.jit(features)(params, images)
  np.testing.assert_allclose(found, expected["features"], atol=1e-4)
  logits = found @ params["head"]["kernel"] + params["head"]["bias"][None]
  np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


@pytest.mark.parametrize(
  ("stride", "size", "shape"), [(2, 5, (7, 10)), (1, 3, (1, 2))]
)
def test_shifts_and_groups_give_one_convolution_and_one_gradient(
  stride, size, shape
):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, *shape, 3)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(size, size, 3)), jnp.float32)
  found = []
  for convolve in (
    efficientnet.convolve_by_shifts,
    efficientnet.convolve_in_groups,
  ):

    @jax.jit
    def both(x, k, convolve=convolve):
      value, pullback = jax.vjp(lambda x, k: convolve(x, k, stride), x, k)
      return value, *pullback(jnp.sin(value))

    found.append(both(images, kernel))
  for ours, theirs in zip(*found, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_head_for_other_classes_stays_new_and_the_rest_is_loaded(
  created, write
):
  weights = make_weights(classes=7)
  _, like = created
  head = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), like["head"])
  params = pretrained.load(write(weights), {**like, "head": head})
  assert (params["head"]["kernel"] == 2).all()
  stem = weights["conv_stem.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(params["stem"]["kernel"], stem)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"bn1.running_var": None}, "lacks running_var of stem_norm"),
    ({"conv_head.weight": None}, "lacks top/kernel"),
    ({"blocks.7.0.conv_pw.weight": np.ones((2, 2), np.float32)}, "blocks.7.0"),
    ({"conv_stem.weight": np.ones((32, 1, 3, 3), np.float32)}, "stem/kernel"),
    ({"conv_head.weight": np.ones((1280, 320, 3, 3), np.float32)}, "top/ker"),
    ({"bn2.bias": np.full(1280, np.nan, np.float32)}, "not finite"),
  ],
)
def test_a_file_of_another_model_is_refused(created, write, changes, named):
  file = write(make_weights() | changes)
  with pytest.raises(ValueError, match=named):
    pretrained.load(file, created[1])


def test_a_relative_with_other_padding_is_refused(created, write):
  file = write(make_weights(), architecture="efficientnet_lite0")
  with pytest.raises(ValueError, match="'efficientnet_lite0'"):
    pretrained.load(file, created[1])


def test_images_are_prepared_as_the_file_beside_the_weights_says(write):
  images = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
    "input_size": [3, 192, 192],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
  }
  file = write(
    {"bn1.bias": np.ones(32, np.float32)},
    architecture="tf_efficientnet_lite0",
    pretrained_cfg=images,
  )
  assert initial.scaling(str(file), "efficientnet_lite0") == (
    images["mean"],
    images["std"],
  )


def test_scaling_is_timms_where_no_file_tells(write):
  file = write({"bn1.bias": np.ones(32, np.float32)})
  mean, std = initial.scaling(str(file), "efficientnet_lite0")
  assert (mean, std) == ([0.5] * 3, [0.5] * 3)
