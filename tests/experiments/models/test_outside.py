"""Models of a user's own, by name; activations in bfloat16 for all models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
from flax import nnx
from ml_collections import ConfigDict

from experiments import models
from experiments.models import clip, decoder, outside

SHAPE, CLASSES = (4, 4, 1), 3


def create(name, options="", how=models.create, **fields):
  config = ConfigDict(
    {"name": f"own_models:{name}", "options": options} | fields
  )
  return how(config, input_shape=SHAPE, num_classes=CLASSES, seed=5)


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(1), (3, *SHAPE))


def test_an_nnx_module_is_what_its_own_call_gives(images):
  apply, params = create("Net", "width=6, rate=0.5")
  net = own_models.Net(
    num_classes=CLASSES, input_shape=SHAPE, rngs=nnx.Rngs(5), width=6, rate=0.5
  )
  net.eval()
  assert sorted(params) == ["head", "layer", "norm"]
  np.testing.assert_array_equal(
    apply(params, images, apply.statistics), net(images)
  )
  features, same = create("Net", "width=6, rate=0.5", models.create_features)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  np.testing.assert_array_equal(
    features(params, images, features.statistics), net.features(images)
  )


def test_a_linen_module_is_what_its_own_call_gives(images):
  apply, params = create("LinenNet", "width=6, rate=0.5")
  net = own_models.LinenNet(num_classes=CLASSES, width=6, rate=0.5)
  variables = net.init(jax.random.key(5), images, train=False)
  jax.tree.map(np.testing.assert_array_equal, params, variables["params"])
  np.testing.assert_array_equal(
    apply(params, images, apply.statistics),
    net.apply(variables, images, train=False),
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Net", "LinenNet"])
def test_a_sample_has_its_mask_by_its_own_key_alone(name, images):
  apply, params = create(name, "norm='layer', rate=0.5")
  assert apply.statistics == ()
  keys = jax.random.split(jax.random.key(2), 3)
  train = jax.jit(lambda rows: apply.train(params, images, keys[rows])[0])
  together, others = train(jnp.arange(3)), train(jnp.arange(3)[::-1])
  np.testing.assert_allclose(together[1], others[1], rtol=1e-6)
  assert np.abs(together[0] - others[0]).max() > 0.01
  alone = jax.jit(apply.train)(params, images[2:], keys[2:])[0]
  np.testing.assert_allclose(together[2:], alone, rtol=1e-6)


def test_statistics_that_nobody_gives_are_missed(images):
  apply, params = create("Net")
  with pytest.raises(ValueError, match=r"own_models:Net has statistics"):
    apply(params, images)


@pytest.mark.parametrize(
  ("name", "options", "error", "message"),
  [
    ("nowhere:Net", "", ImportError, "finds no module 'nowhere'; expected its"),
    ("own_models:Nt", "", ImportError, "no 'Nt'; its Flax modules are Net, Li"),
    ("own_models:make_net", "", TypeError, "expected a class that derives fro"),
    ("own_models:jax", "", TypeError, "expected a class that derives from"),
    (
      "own_models:Asking",
      "",
      TypeError,
      "asks for classes, depth, which nothing gives and doesn't take num_class",
    ),
    ("own_models:Net", "wide=8", TypeError, "doesn't take wide; expected num_"),
    ("own_models:Net", "width=a", ValueError, "options is 'width=a', which ca"),
    ("own_models:Net", "8", ValueError, "options is '8', which can't be read"),
    ("own_models:Net", "rngs=1", ValueError, "options has rngs, which the run"),
    ("own_models:Net", "width='a'", ValueError, r"width='a', fails: \w+Error"),
    ("own_models:Wide", "", ValueError, r"to \(2, 4\) in evaluation; expected"),
    ("own_models:Failing", "", ValueError, r"images \(2, 4, 4, 1\), fails: Ty"),
    ("own_models:WithoutMode", "", ValueError, "call no parameter train; expe"),
    ("mlp", "width=8", ValueError, "of models of one's own; expected ''"),
  ],
)
def test_what_is_no_such_model_is_said_in_one_line(
  name, options, error, message
):
  config = ConfigDict({"name": name, "options": options, "widths": (8,)})
  with pytest.raises(error, match=message) as caught:
    models.create(config, input_shape=SHAPE, num_classes=CLASSES, seed=0)
  assert "\n" not in str(caught.value)


def test_a_file_that_fails_is_named(tmp_path, monkeypatch):
  (tmp_path / "broken_model.py").write_text("import math\nmath.nothing\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ImportError, match="broken_model fails: AttributeError"):
    outside.load_class("broken_model:Net")


def test_another_file_of_the_class_is_another_model(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  text = "from flax import nnx\nclass Net(nnx.Module):\n  pass\n"
  found = []
  for name, more in (("one_net", ""), ("same_net", ""), ("other_net", "# \n")):
    (tmp_path / f"{name}.py").write_text(text + more)
    config = ConfigDict({"name": f"{name}:Net"})
    found.append(models.fingerprints(config)["model"])
  assert found[0] == found[1] != found[2]
  assert models.fingerprints(ConfigDict({"name": "mlp"})) == {}


VIT = {
  "patch_size": 4,
  "width": 8,
  "depth": 1,
  "heads": 2,
  "mlp_width": 8,
}
MODELS = {
  "mlp": {"widths": (8,)},
  "convnet": {"widths": (8,)},
  "resnet": {"widths": (8, 8)},
  "vit": {"vit": VIT},
}


def computed(name, dtype):
  """The jaxpr of a model's logits, and params and outputs as shapes."""
  config = ConfigDict({"name": name, "dtype": dtype, **MODELS.get(name, {})})
  kept = []
  tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
  inputs = [jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)]

  def params():
    if name == "clip":
      config.size = "tiny"
      made = clip.create(config, input_shape=(8, 8, 3), seed=0)
      inputs.append(tokens)
    elif name == "decoder":
      config.decoder = {key: VIT[key] for key in VIT if key != "patch_size"}
      made = decoder.create(config, vocab_size=9, context_length=4, seed=0)
      inputs[:] = [tokens]
    else:
      made = models.create(
        config, input_shape=(8, 8, 3), num_classes=CLASSES, seed=0
      )
    kept.append(made[0])
    return made[1]

  like = jax.eval_shape(params)
  text = str(jax.make_jaxpr(kept[0])(like, *inputs))
  return text, like, jax.eval_shape(kept[0], like, *inputs)


@pytest.mark.parametrize(
  "name",
  [
    *(name for name in MODELS if name != "resnet"),
    "decoder",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("clip", "resnet")),
  ],
)
def test_activations_are_bfloat16_and_all_else_is_float32(name):
  products = r"(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)"
  text, params, outputs = computed(name, "bfloat16")
  found = re.findall(products, text)
  assert found.count("bf16") > len(found) / 2
  # Attention's softmax, and where features are normalised.
  assert set(found) <= {"bf16", "f32"}
  for leaf in jax.tree.leaves((params, outputs)):
    assert leaf.dtype == jnp.float32
  assert set(re.findall(products, computed(name, None)[0])) == {"f32"}


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_dtype_that_activations_can_not_have(dtype):
  with pytest.raises(ValueError, match=f"dtype is '{dtype}'; expected 'bfloat"):
    computed("mlp", dtype)


def test_a_model_that_takes_no_dtype():
  with pytest.raises(TypeError, match="Net has no parameter dtyp"):
    create("Net", dtype="bfloat16")
