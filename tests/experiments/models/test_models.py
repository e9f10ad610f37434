"""Models against public implementations, and published weights into them."""

import builtins
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from ml_collections import ConfigDict

from experiments import models
from experiments.models import initial, vit
from experiments.models.pretrained import positions, vit as pretrained
from experiments.runtime import programs

IMAGE, CLASSES = (16, 16, 3), 5
# Who made the golden file, which model in it, and what its norms add.
MADE = {
  "huggingface": ("huggingface", "", 1e-12),
  "timm": ("timm", "", 1e-6),
  "timm, mean": ("timm", "mean_", 1e-6),
  "torchvision": ("torchvision", "", 1e-6),
}


@pytest.fixture(scope="module")
def golden(request):
  folder = request.path.parents[2] / "data"

  def read(library):
    with np.load(folder / f"vit_{library}.npz", allow_pickle=False) as file:
      return {key: file[key] for key in file.files}

  return {library: read(library) for library, _, _ in MADE.values()}


@pytest.fixture
def write(golden, tmp_path):
  """`write(made, **changes)`: a safetensors file; None takes a name out."""

  def write(made, changes=None, folder=tmp_path):
    library, prefix, _ = MADE[made]
    start = f"{prefix}weights/"
    weights = {
      key.removeprefix(start): value
      for key, value in golden[library].items()
      if key.startswith(start)
    } | (changes or {})
    file = folder / "model.safetensors"
    safetensors.numpy.save_file(
      {key: value for key, value in weights.items() if value is not None}, file
    )
    return file

  return write


def tiny(made="huggingface", **overrides):
  _, prefix, epsilon = MADE[made]
  return {
    "patch_size": 4,
    "width": 24,
    "depth": 2,
    "heads": 3,
    "mlp_width": 40,
    "pooling": "mean" if prefix else "class_token",
    "norm_epsilon": epsilon,
    **overrides,
  }


def config_of(name, **fields):
  return ConfigDict({"name": name} | fields)


def shapes(config, input_shape=IMAGE, num_classes=CLASSES, how=models.create):
  """What `how` gives, but for the parameters only their shapes: it is quick."""
  return _shapes(config.to_json(), input_shape, num_classes, how)


@functools.cache
def _shapes(config, input_shape, num_classes, how):
  config, kept = ConfigDict(json.loads(config)), []

  def create():
    fn, params = how(
      config, input_shape=input_shape, num_classes=num_classes, seed=0
    )
    kept.append(fn)
    return params

  like = jax.eval_shape(create)
  return kept[0], like


def random_like(like):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape).astype("f4")), like
  )


@pytest.mark.parametrize(
  "made",
  [
    "huggingface",
    "torchvision",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("timm", "timm, mean")),
  ],
)
def test_logits_and_features_are_those_of_the_public_model(golden, write, made):
  library, prefix, _ = MADE[made]
  expected = golden[library]
  config = config_of("vit", vit=tiny(made))
  apply, like = shapes(config)
  features_of, same = shapes(config, how=models.create_features)
  assert same == like
  params = pretrained.load(
    write(made), like, input_shape=IMAGE, options=config.vit
  )
  assert jax.tree.structure(params) == jax.tree.structure(like)
  images = expected["images"]
  logits = jax.jit(apply)(params, images)
  np.testing.assert_allclose(logits, expected[f"{prefix}logits"], atol=1e-5)
  features = jax.jit(features_of)(params, images)
  np.testing.assert_allclose(features, expected[f"{prefix}features"], atol=1e-5)


@pytest.mark.parametrize(
  ("size", "sides"), [("larger", (28, 20)), ("smaller", (12, 12))]
)
@pytest.mark.parametrize("made", MADE)
def test_positions_are_interpolated_as_the_library_does_it(
  golden, write, made, size, sides
):
  library, prefix, _ = MADE[made]
  if library == "torchvision":  # whose function knows squares only
    sides = (sides[0], sides[0])
  shape = (*sides, 3)
  config = config_of("vit", vit=tiny(pooling=tiny(made)["pooling"]))
  _, like = shapes(config, input_shape=shape)
  params = pretrained.load(write(made), like, input_shape=shape)
  np.testing.assert_allclose(
    params["position_embed"],
    golden[library][f"{prefix}{size}_positions"],
    atol=1e-6,
  )


# As published with their weights.
@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("Ti/16", 5_717_416),
    ("S/16", 22_050_664),
    ("B/16", 86_567_656),
    ("B/32", 88_224_232),
    ("L/16", 304_326_632),
  ],
)
def test_named_sizes_have_their_parameters(name, parameters):
  sizes = vit.SIZES[name]
  one_block = {**sizes, "depth": 1, "pooling": "class_token"}
  _, like = shapes(config_of("vit", vit=one_block), (224, 224, 3), 1000)

  def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))

  others = (sizes["depth"] - 1) * count(like["blocks"][0])
  assert count(like) + others == parameters


@pytest.mark.parametrize(
  "name", ["mlp", pytest.param("convnet", marks=pytest.mark.slow)]
)
def test_one_program_makes_the_bits_that_many_make(name):
  config = config_of(name, widths=(16, 8))
  module, options = models.MODELS[name]
  with programs.run_once():
    made = module(
      input_shape=IMAGE,
      num_classes=CLASSES,
      rngs=nnx.Rngs(3),
      **options(config),
    )
  expected = nnx.to_pure_dict(nnx.state(made, nnx.Param))
  _, found = models.create(
    config, input_shape=IMAGE, num_classes=CLASSES, seed=3
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_head_that_does_not_fit_stays_and_is_said(write, caplog):
  _, like = shapes(config_of("vit", vit=tiny()), num_classes=3)
  like = random_like(like)
  params = pretrained.load(write("huggingface"), like, input_shape=IMAGE)
  np.testing.assert_array_equal(
    params["head"]["kernel"], like["head"]["kernel"]
  )
  assert "a head for 5 classes: the head for 3 classes stays" in caplog.text
  other = params["final_norm"]["scale"]
  assert not np.array_equal(other, like["final_norm"]["scale"])


def test_a_file_without_a_head_as_a_folder_in_half_precision(
  golden, write, tmp_path, caplog
):
  """As `ViTModel` is saved: no prefix, no classifier, but a pooler."""
  start = "weights/vit."
  weights = {
    key.removeprefix(start): value.astype(jnp.bfloat16)
    for key, value in golden["huggingface"].items()
    if key.startswith(start)
  }
  weights["pooler.dense.weight"] = np.zeros((24, 24), np.float32)
  weights["pooler.dense.bias"] = np.zeros(24, np.float32)
  safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
  _, like = shapes(config_of("vit", vit=tiny()))
  like = random_like(like)
  params = pretrained.load(tmp_path, like, input_shape=IMAGE)
  assert "has no head" in caplog.text
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
  # Half precision has 8 bits.
  exact = pretrained.load(write("huggingface"), like, input_shape=IMAGE)
  for ours, theirs in zip(
    jax.tree.leaves(params["blocks"]),
    jax.tree.leaves(exact["blocks"]),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2**-8)


KERNEL = "blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize(
  ("changes", "sizes", "message"),
  [
    ({}, {"depth": 3}, "lacks blocks/2/.* asks for .*depth=2"),
    ({}, {"depth": 1}, "has blocks/1/.*no place"),
    ({}, {"mlp_width": 48}, r"fc1/bias has shape \(40,\), expected \(48,\)"),
    ({}, {"patch_size": 8}, "patch_embed/kernel has shape .* is 48"),
    ({}, {"pooling": "mean"}, "has class_token.*pooling='class_token'"),
    ({KERNEL: None}, {}, "lacks blocks/1/mlp/fc1/kernel"),
    ({"blocks.0.ls1.gamma": np.ones(24)}, {}, r"has blocks\.0\.ls1\.gamma"),
    ({KERNEL: np.full((40, 24), np.nan)}, {}, "fc1/kernel .* not finite"),
    ({"patch_embed.proj.weight": None}, {}, "the names of huggingface, timm"),
    ({"pos_embed": np.zeros((1, 16, 24))}, {}, "15 position embeddings"),
  ],
)
def test_what_does_not_fit_is_named(write, changes, sizes, message):
  _, like = shapes(config_of("vit", vit=tiny(**sizes)))
  with pytest.raises(ValueError, match=message):
    pretrained.load(write("timm", changes), like, input_shape=IMAGE)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_attention_heads": 2}, "vit.heads=2"),
    ({"layer_norm_eps": 1e-5}, "vit.norm_epsilon=1e-05"),
    ({"hidden_act": "quick_gelu"}, "'gelu' only"),
  ],
)
def test_what_shapes_do_not_show_is_read_beside_the_file(
  write, fields, message
):
  file = write("huggingface")
  _, like = shapes(config_of("vit", vit=tiny()))
  beside = file.with_name("config.json")
  beside.write_text(json.dumps({"num_attention_heads": 3} | fields))
  with pytest.raises(ValueError, match=message):
    pretrained.load(file, like, input_shape=IMAGE, options=ConfigDict(tiny()))


def beside(file, **fields):
  file.with_name("config.json").write_text(json.dumps(fields))


def load(source, input_shape=IMAGE, **fields):
  """Weights into a model of which all but the shapes is `tiny("timm")`."""
  vit = tiny("timm", **fields)
  shown = {x: vit[x] for x in vit.keys() - {"heads", "norm_epsilon"}}
  _, like = shapes(config_of("vit", vit=tiny(**shown)), input_shape)
  return pretrained.load(source, like, input_shape=input_shape, options=vit)


# As transformers writes it for the golden model.
CONFIG = {
  "model_type": "vit",
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "intermediate_size": 40,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "patch_size": 4,
  "image_size": 16,
  "num_channels": 3,
}


def test_a_model_that_its_file_contradicts_is_told_all_at_once(write):
  file = write("huggingface")
  beside(file, **CONFIG)
  right = {"norm_epsilon": 1e-12}
  load(file, **right)
  with pytest.raises(ValueError, match="another one than") as error:
    load(file, heads=6, width=48, depth=3, mlp_width=48, patch_size=8)
  for field, theirs, ours in (
    ("heads", 3, 6),
    ("width", 24, 48),
    ("depth", 2, 3),
    ("mlp_width", 40, 48),
    ("patch_size", 4, 8),
    ("norm_epsilon", 1e-12, 1e-6),
  ):
    says = (
      f"{field}: the file's config.json says {theirs}, the model has {ours}"
    )
    assert says in str(error.value)
    assert f"config.model.vit.{field}={theirs}" in str(error.value)
  # What transformers leaves out has its own default.
  fields = {k: v for k, v in CONFIG.items() if k != "num_attention_heads"}
  beside(file, **fields)
  with pytest.raises(ValueError, match="says 12, the model has 3"):
    load(file, **right)
  for changes, message in (
    ({"num_hidden_layers": 12}, r"depth: config.json says 12, the arrays 2"),
    ({"image_size": 224}, r"has 16 .*224x224 pixels.* have 56x56"),
    ({"num_channels": 1}, "says 1, the model has 3 only"),
    ({"image_size": {"a": 1}, "vision": 3}, None),
  ):
    beside(file, **CONFIG | changes)
    if message is None:
      load(file, **right)
    else:
      with pytest.raises(ValueError, match=message):
        load(file, **right)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"architecture": "vit_tiny_patch16_224"}, None),
    (
      {"architecture": "vit_small_patch16_224.augreg"},
      "heads: .* says 6, .* 3",
    ),
    ({"architecture": "deit3_base_patch16_224"}, "heads: .* says 12, .* 3"),
    (
      {"architecture": "vit_base_patch4", "model_args": {"num_heads": 3}},
      None,
    ),
    ({"architecture": "vit_tiny", "global_pool": "avg"}, "pooling: .* 'mean'"),
    ({"architecture": "vit_tiny", "global_pool": "map"}, "'map'.*token' only"),
    (
      {"architecture": "vit_tiny_clip_quickgelu"},
      "'quick_gelu', the model has 'gelu' only",
    ),
    ({"pretrained_cfg": {"input_size": [1, 16, 16]}}, "channels: .* says 1"),
    (
      {"architecture": "vit_tiny", "model_args": {"no_embed_class": True}},
      "says True, the model has False only",
    ),
    ({"model_args": 3, "architecture": "x"}, "can't be read: TypeError"),
  ],
)
def test_timms_own_names_and_arguments_are_read(write, fields, message):
  file = write("timm")
  beside(file, **fields)
  if message is None:
    load(file)
    with pytest.raises(ValueError, match=r"norm_epsilon: .* says 1e-06"):
      load(file, norm_epsilon=1e-12)
  else:
    with pytest.raises(ValueError, match=message):
      load(file)


def test_what_nothing_tells_is_said(write, caplog):
  load(write("timm"))
  assert "tells heads and norm_epsilon" in caplog.text
  assert "heads=3, norm_epsilon=1e-06" in caplog.text
  with pytest.raises(ValueError, match=r"depth=2.* heads are not told"):
    load(write("timm"), depth=1)


@pytest.mark.parametrize("made", ["huggingface", "timm", "timm, mean"])
def test_all_sizes_are_taken_from_the_file(write, made):
  library, _, _ = MADE[made]
  file = write(made)
  config = config_of("vit", vit=tiny(width=8, heads=1), size="pretrained")
  config.pretrained = str(file)
  with pytest.raises(ValueError, match=r"tells the number of heads.* depth=2"):
    pretrained.sized(config)
  if library == "timm":
    beside(file, architecture="vit_tiny_patch16_224")
  else:
    beside(file, model_type="vit", num_attention_heads=3)
  assert pretrained.architecture(file) == tiny(made)
  kept = file.with_name("config.json").read_text()
  beside(file, num_attention_heads="three")
  with pytest.raises(ValueError, match=r"model\.safetensors about the model"):
    pretrained.sized(config)
  file.with_name("config.json").write_text(kept)
  whole = ConfigDict({"model": config, "seed": 0})
  assert initial.sized(whole).model.vit.to_dict() == tiny(made)
  assert whole.model.vit.width == 8
  config.size = "B/16"
  with pytest.raises(ValueError, match=r"config\.model\.size is 'B/16'"):
    shapes(config)
  config.size, config.pretrained = "pretrained", None
  with pytest.raises(ValueError, match="expected published weights"):
    initial.sized(whole)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["huggingface", "timm", "timm, mean"])
def test_a_model_of_the_files_sizes_is_the_public_one(golden, write, made):
  library, prefix, _ = MADE[made]
  file = write(made)
  if library == "timm":
    beside(file, architecture="vit_tiny_patch16_224")
  else:
    beside(file, **CONFIG)
  config = config_of("vit", vit=tiny(width=8, heads=1), size="pretrained")
  config.pretrained = str(file)
  apply, params = initial.create(
    config, input_shape=IMAGE, num_classes=CLASSES, seed=0
  )
  head = {
    name: golden[library][f"{prefix}weights/{theirs}"]
    for name, theirs in {
      "huggingface": {"kernel": "classifier.weight", "bias": "classifier.bias"},
      "timm": {"kernel": "head.weight", "bias": "head.bias"},
    }[library].items()
  }
  params["head"] = {"kernel": head["kernel"].T, "bias": head["bias"]}
  logits = jax.jit(apply)(params, golden[library]["images"])
  np.testing.assert_allclose(
    logits, golden[library][f"{prefix}logits"], atol=1e-5
  )


def test_grids_that_are_no_squares(write, caplog):
  """Taken as they are where they fit, and resized from what they are."""
  stored = np.random.default_rng(0).normal(size=(1, 7, 24)).astype(np.float32)
  file = write("timm", {"pos_embed": stored})
  wide, high = (8, 12, 3), (12, 8, 3)
  for shape in (wide, high):  # Nothing tells them apart.
    params = load(file, shape)
    np.testing.assert_array_equal(params["position_embed"], stored)
    assert f"are taken for {shape[0] // 4}x{shape[1] // 4}." in caplog.text
  with pytest.raises(ValueError, match=r"has 6 .*3x3 patches.* tells"):
    load(file, (12, 12, 3))
  beside(
    file, architecture="vit_tiny", pretrained_cfg={"input_size": [3, 8, 12]}
  )
  np.testing.assert_array_equal(load(file, wide)["position_embed"], stored)
  for shape, grid in ((high, (3, 2)), ((16, 20, 3), (4, 5))):
    resized = positions.resize(
      stored[0, 1:].reshape(2, 3, -1), grid, antialias=True, align_corners=False
    )
    found = load(file, shape)["position_embed"]
    np.testing.assert_array_equal(found[0, 0], stored[0, 0])
    np.testing.assert_allclose(
      found[0, 1:], resized.reshape(-1, 24), rtol=1e-6, atol=1e-6
    )
  beside(file, model_args={"img_size": [8, 8]}, architecture="vit_tiny")
  with pytest.raises(ValueError, match=r"8x8 pixels.* have 2x2 patches"):
    load(file, wide)
  # A square number of another shape than the model's: said what is assumed.
  file.with_name("config.json").unlink()
  load(write("timm"), (8, 32, 3))
  assert "are taken for 4x4" in caplog.text


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ((1 << 40).to_bytes(8, "little") + b"{}", "claims 1099511627776 bytes"),
    ((100).to_bytes(8, "little") + b"{}", "can't be read as safetensors"),
    (
      (60_000).to_bytes(8, "little") + b'{"a":' * 12_000,
      "can't be read as safetensors",
    ),
    (b"", "can't be read as safetensors"),
    (b"\x10", "can't be read as safetensors"),
  ]
  + [
    (
      len(header).to_bytes(8, "little") + header + bytes(8),
      "can't be read as safetensors",
    )
    for header in (
      json.dumps({"a": about}).encode()
      for about in (
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 50]},
        {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "X", "shape": [8], "data_offsets": [0, 8]},
      )
    )
  ],
)
def test_headers_of_weights_are_not_believed(tmp_path, content, message):
  file = tmp_path / "model.safetensors"
  file.write_bytes(content)
  for job in (pretrained.preprocessing, pretrained.architecture):
    with pytest.raises(ValueError, match=message) as error:
      job(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"a":' * 90_000, "more than 100 deep"),
    ("[" * 200 + "]" * 200, "more than 100 deep"),
    ("1" * 90_000, "damaged"),
    (" " * (17 << 20), "the limit is 16777216"),
  ],
)
def test_files_beside_weights_are_bounded(write, text, message):
  file = write("timm")
  file.with_name("config.json").write_text(text)
  with pytest.raises(ValueError, match=message) as error:
    load(file)
  assert str(file.with_name("config.json")) in str(error.value)


def test_another_input_shape_than_the_models_is_refused(write):
  _, like = shapes(config_of("vit", vit=tiny()))
  with pytest.raises(ValueError, match=r"patches 2x4, .* 17 position"):
    pretrained.load(write("huggingface"), like, input_shape=(8, 16, 3))


def test_files_that_are_not_there_or_not_weights(tmp_path, monkeypatch):
  _, like = shapes(config_of("vit", vit=tiny()))

  def load(source):
    return pretrained.load(source, like, input_shape=IMAGE)

  with pytest.raises(FileNotFoundError, match='write "hf://owner/name"'):
    load("google/vit-base-patch16-224")
  (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
  with pytest.raises(FileNotFoundError, match=r"there is pytorch_model\.bin"):
    load(tmp_path)
  with pytest.raises(ValueError, match="pickled weights"):
    load(tmp_path / "pytorch_model.bin")

  real = builtins.__import__

  def without_hub(name, *args, **kwargs):
    if name == "huggingface_hub":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without_hub)
  with pytest.raises(ImportError, match="pip install huggingface_hub"):
    load("hf://google/vit-base-patch16-224")


# As transformers writes it, and as older files have it.
PREPROCESSOR = {
  "do_normalize": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
  "resample": 2,
  "rescale_factor": 0.00392156862745098,
  "size": {"height": 224, "width": 224},
}
CROPPED = {
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
  "resample": 3,
  "do_center_crop": True,
  "crop_size": 224,
  "size": {"shortest_edge": 256},
}
TIMM = {
  "architecture": "vit_tiny_patch16_224",
  "pretrained_cfg": {
    "input_size": [3, 384, 384],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
  },
}
HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
  ("made", "name", "content", "expected"),
  [
    (
      "huggingface",
      "preprocessor_config.json",
      PREPROCESSOR,
      (HALF, HALF, (224, 224), "bilinear", 1.0),
    ),
    (
      "huggingface",
      "preprocessor_config.json",
      CROPPED,
      (*IMAGENET, (224, 224), "bicubic", 0.875),
    ),
    (
      "timm",
      "config.json",
      TIMM,
      (HALF, HALF, (384, 384), "bicubic", 1.0),
    ),
    ("huggingface", None, {}, (HALF, HALF, (224, 224), "bilinear", 1.0)),
    ("timm", None, {}, (HALF, HALF, (224, 224), "bicubic", 0.9)),
    ("torchvision", None, {}, (*IMAGENET, (224, 224), "bilinear", 0.875)),
  ],
)
def test_preprocessing_is_the_models_own(
  write, caplog, made, name, content, expected
):
  file = write(made)
  if name:
    file.with_name(name).write_text(json.dumps(content))
  assert pretrained.preprocessing(file) == expected
  assert (f"as {made} does by default" in caplog.text) == (name is None)


@pytest.mark.parametrize(
  "text",
  ["{", "[]", '{"image_mean": 3}', '{"rescale_factor": 0.5}']
  + [
    json.dumps(PREPROCESSOR | fields)
    for fields in (
      {"resample": -1},
      {"do_rescale": False},
      {"image_std": [0.5, 0.0, 0.5]},
      {"image_std": [0.5]},
      {"image_mean": [float("nan")] * 3},
      {"size": {"height": 0, "width": 4}},
    )
  ],
)
def test_preprocessing_that_can_not_be_read(write, text):
  file = write("huggingface")
  file.with_name("preprocessor_config.json").write_text(text)
  with pytest.raises(ValueError, match=r"damaged|no fields|can't be read"):
    pretrained.preprocessing(file)


CONFIGS = {
  "mlp": {"widths": (12,)},
  "convnet": {"widths": (8,)},
  "resnet": {"widths": (8,), "blocks_per_stage": 2},
  "vit": {"vit": tiny(depth=1)},
  "efficientnet_lite0": {},
}


@pytest.mark.parametrize(
  "name",
  [
    name
    # Whose logits and features are asked, or who has but one layer more.
    if name not in ("efficientnet_lite0", "mlp")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in CONFIGS
  ],
)
def test_the_head_on_the_features_is_the_model(name):
  assert CONFIGS.keys() == models.MODELS.keys()
  config = config_of(name, **CONFIGS[name])
  apply, like = shapes(config, (8, 8, 3))
  features_of, _ = shapes(config, (8, 8, 3), how=models.create_features)
  params = random_like(like)
  images = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
  logits, features = jax.jit(lambda p, x: (apply(p, x), features_of(p, x)))(
    params, images
  )
  head = params["head"]
  np.testing.assert_allclose(
    features @ head["kernel"] + head["bias"], logits, rtol=1e-5, atol=1e-5
  )


@pytest.mark.slow
def test_a_resnets_gradients_ignore_batch_mates_and_go_forward_too():
  apply, like = shapes(config_of("resnet", widths=(8, 16)), (7, 6, 3))
  params, direction = (
    random_like(like),
    jax.tree.map(np.cos, random_like(like)),
  )
  rng = np.random.default_rng(1)
  images = rng.normal(size=(3, 7, 6, 3)).astype(np.float32)

  @jax.jit
  def of_first(images):
    loss = lambda p: jnp.sum(apply(p, images)[0] ** 2)  # noqa: E731
    return jax.grad(loss)(params), jax.jvp(loss, (params,), (direction,))[1]

  alone, forward = of_first(images)
  others, _ = of_first(np.concatenate([images[:1], -5 * images[1:]]))
  for path, leaf in jax.tree_util.tree_leaves_with_path(alone):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max()
    ),
    alone,
    others,
  )
  backward = sum(
    np.vdot(a, b)
    for a, b in zip(*map(jax.tree.leaves, (alone, direction)), strict=True)
  )
  np.testing.assert_allclose(forward, backward, rtol=1e-4)


def test_a_resnet_on_patches_sees_them_as_pixels():
  """Patches of 2 with their channels are what cut images without are."""
  rng = np.random.default_rng(2)
  images = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
  apply, like = shapes(
    config_of("resnet", widths=(8,), patch_size=2), (4, 6, 3)
  )
  plain, same = shapes(config_of("resnet", widths=(8,)), (2, 3, 12))
  assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, same)
  params = random_like(like)
  pixels = np.zeros((2, 2, 3, 12), np.float32)
  for row, column in np.ndindex(4, 6):
    place = 3 * (2 * (row % 2) + column % 2)
    pixels[:, row // 2, column // 2, place : place + 3] = images[:, row, column]
  np.testing.assert_allclose(
    jax.jit(apply)(params, images),
    jax.jit(plain)(params, pixels),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"widths": (8, 12)}, r"widths is \(8, 12\)"),
    ({"widths": ()}, r"widths is \(\)"),
    ({"widths": (8,), "blocks_per_stage": 0}, "blocks_per_stage is 0"),
    ({"widths": (8,), "patch_size": 3}, "patch_size is 3"),
  ],
)
def test_a_resnet_refuses(fields, message):
  config = config_of("resnet", **fields)
  with pytest.raises(ValueError, match=message):
    models.create(config, input_shape=(8, 8, 3), num_classes=4, seed=0)
