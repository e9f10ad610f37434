"""CLIP against public implementations, and published weights into it."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from experiments.models import clip, initial
from experiments.models.pretrained import clip as clip_pretrained
from gradmimic_jax import layers

IMAGE = (16, 16, 3)
LIBRARIES = ("huggingface", "openclip")
FIELDS = {
  "embed_width": 12,
  "patch_size": 4,
  "image_width": 24,
  "image_depth": 2,
  "image_heads": 3,
  "image_mlp_width": 40,
  "context_length": 10,
  "vocab_size": 30,
  "text_width": 16,
  "text_depth": 3,
  "text_heads": 2,
  "text_mlp_width": 32,
}


@pytest.fixture(scope="module")
def golden(request):
  folder = request.path.parents[2] / "data"

  def read(library):
    with np.load(folder / f"clip_{library}.npz", allow_pickle=False) as file:
      return {key: file[key] for key in file.files}

  return {library: read(library) for library in LIBRARIES}


@pytest.fixture
def write(golden, tmp_path):
  """`write(library, changes)`: a safetensors file; None takes a name out."""

  def write(library, changes=None, name="model.safetensors"):
    weights = {
      key.removeprefix("weights/"): value
      for key, value in golden[library].items()
      if key.startswith("weights/")
    } | (changes or {})
    file = tmp_path / name
    safetensors.numpy.save_file(
      {key: value for key, value in weights.items() if value is not None}, file
    )
    return file

  return write


def config_of(size="tiny", **fields):
  return ConfigDict({"name": "clip", "size": size, "clip": fields})


@functools.cache
def _create(size, fields, input_shape):
  kept = []

  def params():
    given = dict(fields)
    dtype = given.pop("dtype", None)
    config = config_of(size, **given)
    config.dtype = dtype
    apply, params = clip.create(config, input_shape=input_shape, seed=0)
    kept.append(apply)
    return params

  like = jax.eval_shape(params)
  return kept[0], like


def create(size="tiny", input_shape=IMAGE, **fields):
  """The function, and the parameters' shapes only: it is quick."""
  return _create(size, tuple(sorted(fields.items())), input_shape)


def logits_of(features):
  scale = jnp.exp(features.logit_scale)
  return scale * features.image @ features.text.T


def unit(features):
  return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize(
  ("library", "prefix", "activation", "remat"),
  [
    ("huggingface", "", "quick_gelu", False),
    pytest.param("huggingface", "gelu_", "gelu", True, marks=pytest.mark.slow),
    pytest.param("openclip", "", "gelu", False, marks=pytest.mark.slow),
  ],
)
def test_features_and_logits_are_those_of_the_public_model(
  golden, write, library, prefix, activation, remat
):
  expected = golden[library]
  apply, like = create(**FIELDS, activation=activation, remat=remat)
  params = clip_pretrained.load(write(library), like, input_shape=IMAGE)
  assert jax.tree.structure(params) == jax.tree.structure(like)
  features = jax.jit(apply)(
    params, expected["images"], expected["tokens"].astype(np.int32)
  )
  for name, found in (("image", features.image), ("text", features.text)):
    theirs = unit(expected[f"{prefix}{name}_features"])
    np.testing.assert_allclose(found, theirs, atol=1e-5)
  np.testing.assert_allclose(
    logits_of(features), expected[f"{prefix}logits"], atol=1e-5
  )


def test_the_activation_is_seen(golden):
  there = golden["huggingface"]
  assert np.abs(there["gelu_logits"] - there["logits"]).max() > 1e-3


@pytest.mark.slow
def test_one_tower_alone_and_shorter_captions(golden, write):
  expected = golden["openclip"]
  apply, like = create(**FIELDS)
  params = clip_pretrained.load(write("openclip"), like, input_shape=IMAGE)
  tokens = expected["tokens"].astype(np.int32)
  images = jax.eval_shape(apply, params, expected["images"])
  assert images.text is None
  texts = jax.jit(apply)(
    params, tokens=tokens[[0, 3], :5]
  )  # their ends are at 4 and 1
  assert texts.image is None
  theirs = unit(expected["text_features"])[[0, 3]]
  np.testing.assert_allclose(texts.text, theirs, atol=1e-5)
  _, shorter = create(**FIELDS | {"context_length": 6})
  cut = clip_pretrained.load(write("openclip"), shorter, input_shape=IMAGE)
  np.testing.assert_array_equal(
    cut["text"]["position_embed"], params["text"]["position_embed"][:6]
  )
  with pytest.raises(ValueError, match=r"\(2, 11\); expected at most 10"):
    jax.eval_shape(apply, params, None, np.ones((2, 11), np.int32))


@pytest.mark.parametrize("library", LIBRARIES)
def test_positions_are_interpolated_as_the_library_does_it(
  golden, write, library
):
  shape = (24, 24, 3)
  _, like = create(**FIELDS, input_shape=shape)
  params = clip_pretrained.load(write(library), like, input_shape=shape)
  np.testing.assert_allclose(
    params["image"]["position_embed"],
    golden[library]["larger_positions"],
    atol=1e-6,
  )
  with pytest.raises(ValueError, match=r"patches 2x6, .* has 37 position"):
    clip_pretrained.load(write(library), like, input_shape=(8, 24, 3))


# As published with their weights.
@pytest.mark.parametrize(
  ("name", "parameters"),
  [("B/32", 151_277_313), ("B/16", 149_620_737), ("L/14", 427_616_513)],
)
def test_named_sizes_have_their_parameters(name, parameters):
  one = {"image_depth": 1, "text_depth": 1}
  _, like = create(name, **one, input_shape=(224, 224, 3))

  def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))

  others = sum(
    (clip.SIZES[name][f"{tower}_depth"] - 1) * count(like[tower]["blocks"][0])
    for tower in ("image", "text")
  )
  assert count(like) + others == parameters


@pytest.mark.slow
def test_half_precision_activations_keep_parameters_and_features_wide(
  golden, write
):
  expected = golden["openclip"]
  arguments = expected["images"], expected["tokens"].astype(np.int32)
  apply, like = create(**FIELDS, dtype="bfloat16")
  params = clip_pretrained.load(write("openclip"), like, input_shape=IMAGE)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
  fn = jax.jit(apply)
  text = fn.lower(params, *arguments).as_text()
  products = re.findall(r"dot_general.*-> tensor<[\dx]*x(\w+)>", text)
  assert set(products) <= {"bf16", "f32"}
  assert products.count("bf16") > len(products) * 0.8  # softmaxes are wide
  features = fn(params, *arguments)
  assert features.image.dtype == features.text.dtype == jnp.float32
  # bfloat16 has 8 bits.
  np.testing.assert_allclose(
    features.image, unit(expected["image_features"]), atol=0.02
  )


@pytest.mark.slow
def test_remat_holds_less_for_the_backward_pass():
  def held(remat):
    apply, like = create(remat=remat, input_shape=(32, 32, 3))
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((64, 16), jnp.int32)

    def pullback(params, images, tokens):
      fn = lambda params: logits_of(apply(params, images, tokens))  # noqa: E731
      return jax.vjp(fn, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pullback, like, images, tokens))
    return sum(x.size for x in leaves)

  assert held(True) < 0.3 * held(False)


def test_a_fields_none_is_the_sizes_and_unknown_names_are_refused():
  given = clip.options(config_of("B/32", patch_size=16, text_heads=None))
  assert given == clip.SIZES["B/16"]
  with pytest.raises(ValueError, match=r"'B/8'; expected one of B/32"):
    clip.options(config_of("B/8"))
  with pytest.raises(ValueError, match=r"field\(s\) depth; expected .*remat"):
    clip.options(config_of(depth=3))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"patch_size": 5}, r"clip\.patch_size is 5; expected"),
    ({"image_heads": 5}, "image_width is 64 and image_heads is 5"),
    ({"text_heads": 3}, "text_width is 64 and text_heads is 3"),
    ({"activation": "relu"}, "'relu'; expected one of gelu, quick_gelu"),
  ],
)
def test_sizes_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    create(**fields)


def test_mimic_layers_have_names():
  _, like = create(image_depth=3, text_depth=2)
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(like)
  ]

  def chosen(name):
    flags = layers.choose(clip.mimic_layers(name, like), like)
    return {path for path, flag in zip(paths, flags, strict=True) if flag}

  def mlp(block):
    return {
      f"{block}/mlp/{layer}/{leaf}"
      for layer in ("fc1", "fc2")
      for leaf in ("kernel", "bias")
    }

  image, text = mlp("image/blocks/2"), mlp("text/blocks/1")
  assert chosen("image_last_mlp") == image
  assert chosen("text_last_mlp") == text
  assert chosen("both_last_mlp") == image | text
  assert chosen("all") == set(paths)
  assert chosen("^logit_scale$") == {"logit_scale"}  # a pattern of one's own
  with pytest.raises(ValueError, match="matches no leaf"):
    chosen("image_last_mpl")


FC1 = "text_model.encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
  ("changes", "fields", "message"),
  [
    ({}, {"text_depth": 4}, "lacks text/blocks/3/.* asks for .*text_depth=3"),
    ({}, {"image_depth": 1}, "has image/blocks/1/.*no place.*image_depth=2"),
    ({}, {"vocab_size": 31}, r"\(30, 16\), expected \(31, 16\).*vocab_size=30"),
    ({}, {"patch_size": 8}, r"patch_embed/kernel has shape .*patch_size=4"),
    ({}, {"embed_width": 8}, "projection/kernel has .*embed_width=12"),
    ({}, {"context_length": 12}, "captions of 10 tokens and the model for 12"),
    ({}, {"logit_bias": -10.0}, "lacks logit_bias"),
    ({FC1: None}, {}, "lacks text/blocks/1/mlp/fc1/kernel"),
    ({FC1: np.full((32, 16), np.inf)}, {}, "fc1/kernel .* not finite"),
    ({"vision_model.head.weight": np.ones(3)}, {}, r"has vision_model\.head"),
    (
      {"vision_model.embeddings.class_embedding": None},
      {},
      "expected a CLIP model .* huggingface, openclip",
    ),
  ],
)
def test_what_does_not_fit_is_named(write, changes, fields, message):
  _, like = create(**FIELDS | fields)
  with pytest.raises(ValueError, match=message):
    clip_pretrained.load(write("huggingface", changes), like, input_shape=IMAGE)


def test_names_and_leaves_that_some_files_have(golden, write, tmp_path):
  """Old Hugging Face files; OpenCLIP's of sigmoid losses, and its own name."""
  ids = {"text_model.embeddings.position_ids": np.arange(10)[None]}
  _, like = create(**FIELDS)
  plain = clip_pretrained.load(write("huggingface"), like, input_shape=IMAGE)
  old = clip_pretrained.load(write("huggingface", ids), like, input_shape=IMAGE)
  jax.tree.map(np.testing.assert_array_equal, plain, old)
  (tmp_path / "model.safetensors").unlink()
  _, like = create(**FIELDS, logit_bias=-10.0)
  bias = {"logit_bias": np.array([-7.5], np.float32)}
  write("openclip", bias, "open_clip_model.safetensors")
  params = clip_pretrained.load(tmp_path, like, input_shape=IMAGE)
  np.testing.assert_array_equal(params["logit_bias"], -7.5)
  scale = golden["openclip"]["weights/logit_scale"]
  np.testing.assert_array_equal(params["logit_scale"], scale)


@pytest.mark.slow
def test_a_model_is_made_from_weights_that_its_config_names(write, caplog):
  config = config_of(**FIELDS)
  config.pretrained = str(write("openclip"))
  _, params = clip_pretrained.create(config, input_shape=IMAGE, seed=0)
  assert "whether it was made with config.model.clip's activ" in caplog.text
  expected = clip_pretrained.load(config.pretrained, params, input_shape=IMAGE)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


HUGGINGFACE = {
  "text_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
  "vision_config": {"num_attention_heads": 3, "layer_norm_eps": 1e-5},
}
OPENCLIP = {
  "model_cfg": {
    "quick_gelu": True,
    "vision_cfg": {"width": 24, "head_width": 8, "image_size": 16},
    "text_cfg": {"heads": 2},
  },
  "preprocess_cfg": {"mean": [0.5] * 3, "interpolation": "bilinear"},
}


@pytest.mark.parametrize(
  ("name", "content"),
  [("config.json", HUGGINGFACE), ("open_clip_config.json", OPENCLIP)],
)
@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"activation": "gelu"}, r"set config\.model\.clip\.activation='quick_"),
    ({"text_heads": 4}, "text_heads=2"),
    ({"image_heads": 4}, "image_heads=3"),
  ],
)
def test_what_shapes_do_not_show_is_read_beside_the_file(
  write, caplog, name, content, fields, message
):
  file = write("huggingface")
  file.with_name(name).write_text(json.dumps(content))
  right = FIELDS | {"activation": "quick_gelu"}

  def load(fields):
    config = config_of(**right | fields)
    _, like = create(**FIELDS)
    return clip_pretrained.load(
      file, like, input_shape=IMAGE, options=clip.options(config)
    )

  load({})
  assert "can't be seen" not in caplog.text
  with pytest.raises(ValueError, match=message):
    load(fields)


# As transformers writes it for the golden model.
WHOLE = {
  "model_type": "clip",
  "projection_dim": 12,
  "vision_config": {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "patch_size": 4,
    "image_size": 16,
  },
  "text_config": {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 10,
    "vocab_size": 30,
    "eos_token_id": 29,
  },
}


def changed(tower, **fields):
  return WHOLE | {tower: WHOLE[tower] | fields}


def test_a_model_that_its_file_contradicts_is_told_all_at_once(write):
  file = write("huggingface")

  def load(content, **fields):
    file.with_name("config.json").write_text(json.dumps(content))
    config = config_of(**FIELDS | {"activation": "quick_gelu"} | fields)
    fields.pop("activation", None)
    _, like = create(**FIELDS | fields)
    return clip_pretrained.load(
      file, like, input_shape=IMAGE, options=clip.options(config)
    )

  load(WHOLE)
  # Without one it is the model's own, which is none of OpenAI's.
  with pytest.raises(ValueError, match=r"the model has 'gelu'\."):
    load(WHOLE, activation=None)
  load(WHOLE, context_length=6)  # A shorter one is none.
  with pytest.raises(ValueError, match="another one than") as error:
    load(WHOLE, embed_width=8, image_heads=4, text_heads=4, activation="gelu")
  for line in (
    "embed_width: the file's config.json says 12, the model has 8",
    "image_heads: the file's config.json says 3, the model has 4",
    "text_heads: the file's config.json says 2, the model has 4",
    "activation: the file's config.json says 'quick_gelu', the model has 'ge",
    "config.model.clip.text_heads=2",
  ):
    assert line in str(error.value)
  for content, message in (
    (changed("text_config", eos_token_id=5), "end_token: .* says 5, .*29 only"),
    (changed("text_config", hidden_act="gelu"), "says 'gelu', the model has"),
    (changed("text_config", vocab_size=31), "says 31, the arrays 30"),
    (changed("vision_config", layer_norm_eps=1e-6), "norm_epsilon: .* 1e-06"),
    (changed("vision_config", image_size=224), "have 56x56 patches"),
    (WHOLE | {"vision_config": [3]}, "can't be read: TypeError"),
  ):
    with pytest.raises(ValueError, match=message):
      load(content)


def test_all_sizes_are_taken_from_the_file(write):
  file = write("huggingface")
  config = config_of("pretrained", text_heads=None)
  with pytest.raises(ValueError, match="expected weights"):
    clip.options(config)
  config.pretrained = str(file)
  with pytest.raises(ValueError, match=r"tells image_heads, text_heads, activ"):
    clip_pretrained.sized(config)
  file.with_name("config.json").write_text(json.dumps(WHOLE))
  whole = ConfigDict({"model": config})
  found = clip.options(initial.sized(whole).model)
  own = {"activation": "quick_gelu", "norm_epsilon": 1e-5}
  assert found == FIELDS | own
  config.clip.text_heads = 4  # What is said by oneself stays, and is compared.
  _, like = create(**FIELDS)
  options = clip.options(clip_pretrained.sized(config))
  with pytest.raises(ValueError, match=r"text_heads: .* says 2, .* has 4"):
    clip_pretrained.load(file, like, input_shape=IMAGE, options=options)


@pytest.mark.slow
def test_a_model_of_the_files_sizes_is_the_public_one(golden, write):
  file = write("huggingface")
  file.with_name("config.json").write_text(json.dumps(WHOLE))
  config = config_of("pretrained", activation=None)
  config.pretrained = str(file)
  apply, params = clip_pretrained.create(config, input_shape=IMAGE, seed=0)
  there = golden["huggingface"]
  tokens = there["tokens"].astype(np.int32)
  logits = logits_of(jax.jit(apply)(params, there["images"], tokens))
  np.testing.assert_allclose(logits, there["logits"], atol=1e-5)


def test_preprocessing_is_the_models_own(write, caplog):
  file = write("huggingface")
  openai = clip_pretrained.preprocessing(file)
  assert openai[2:] == ((224, 224), "bicubic", 1.0)
  assert "images are prepared as OpenAI does" in caplog.text
  beside = file.with_name("open_clip_config.json")
  beside.write_text(json.dumps(OPENCLIP))
  found = clip_pretrained.preprocessing(file)
  assert found == ((0.5,) * 3, openai.std, (16, 16), "bilinear", 1.0)
  beside.write_text(json.dumps({"preprocess_cfg": {}}))
  with pytest.raises(ValueError, match="about images can't be read: KeyError"):
    clip_pretrained.preprocessing(file)
