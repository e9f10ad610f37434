"""Features of a frozen backbone: right, kept, and checked when read back."""

import io
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds
from PIL import Image

from configs import label_noise
from experiments import models
from experiments.data import decoding, sources
from experiments.models.pretrained import vit as pretrained
from experiments.runtime import checkpoint
from experiments.studies.probing import features
from experiments.training import trainer as train


@pytest.fixture
def make_probe(digits_dir):
  """`make_probe(**{"dotted.field": value})`: a head on the digits' pixels."""

  def make(**overrides):
    config = label_noise.get_config("seeds=1").unlock()
    config.update_from_flattened_dict(
      {
        "eval_batch_size": 500,
        "data.data_dir": digits_dir,
        "data.image_size": 0,
        "data.name": "digits",
        "model.name": "mlp",
        "model.widths": (),
        **overrides,
      }
    )
    return config.lock()

  return make


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return tmp_path_factory.mktemp("backbone") / "run"


@pytest.fixture
def backbone(make_config, run):
  """The workdir of a finished run."""
  config = make_config(**{"num_epochs": 1, "model.widths": (12,)})
  train.train_and_evaluate(config, run)
  return str(run)


def digits(digits_dir, split):
  return sources.load("digits", split, data_dir=digits_dir)


def test_are_those_of_the_backbone(make_probe, backbone, digits_dir, tmp_path):
  config = make_probe(**{"model.pretrained": backbone})
  both = features.load(config, tmp_path)
  _, like = models.create(
    make_config_section((12,)), input_shape=(8, 8, 1), num_classes=10, seed=0
  )
  params = checkpoint.load_params(backbone, like)["body"][0]
  shown = json.loads((pathlib.Path(backbone) / "input.json").read_text())
  for split, found in zip(("train", "test"), both, strict=True):
    data = digits(digits_dir, split)
    views = [data.images, data.images[:, :, ::-1]][: len(found.values)]
    assert found.values.shape == (len(views), len(data.images), 12)
    for view, values in zip(views, found.values, strict=True):
      pixels = view.reshape(len(view), -1).astype(np.float64) / 255
      scaled = (pixels - shown["mean"][0]) / shown["std"][0]
      kernel = np.asarray(params["kernel"], np.float64)
      hidden = scaled @ kernel + np.asarray(params["bias"], np.float64)
      np.testing.assert_allclose(values, np.maximum(hidden, 0), atol=1e-5)
    np.testing.assert_array_equal(found.labels, data.labels)
    np.testing.assert_array_equal(found.ids, data.ids)
    assert found.class_names == data.class_names
  assert [len(found.values) for found in both] == [2, 1]


def test_a_part_is_taken_from_the_whole(
  make_probe, backbone, tmp_path, monkeypatch
):
  parts = {
    "data.train_split": "train[100:900]",
    "data.test_split": "train[:99]",
  }
  config = make_probe(**{"model.pretrained": backbone})
  part = make_probe(**{"model.pretrained": backbone, **parts})
  expected = features.load(part, tmp_path / "computed")
  features.load(config, tmp_path / "taken")
  monkeypatch.setattr(features, "_compute", None)
  taken = features.load(part, tmp_path / "taken")
  for ours, theirs in zip(taken, expected, strict=True):
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-6)
    for field in ("labels", "ids"):
      np.testing.assert_array_equal(
        getattr(ours, field), getattr(theirs, field)
      )
    assert ours.fingerprint == theirs.fingerprint
  assert [found.values.shape[:2] for found in taken] == [(2, 800), (1, 99)]


def make_config_section(widths):
  section = label_noise.get_config().model.copy_and_resolve_references()
  section.name, section.widths = "mlp", widths
  return section


def test_are_read_back_without_the_images(make_probe, tmp_path, monkeypatch):
  config = make_probe()
  first = features.load(config, tmp_path)
  monkeypatch.setattr(sources, "load", None)
  for found, before in zip(features.load(config, tmp_path), first, strict=True):
    assert isinstance(found.values, np.memmap)
    np.testing.assert_array_equal(found.values, before.values)
    np.testing.assert_array_equal(found.labels, before.labels)
    assert found.fingerprint == before.fingerprint


def _cut(file):
  file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[-5] ^= 1
  file.write_bytes(bytes(content))


def _other_labels(file):
  about = json.loads(file.with_suffix(".json").read_text())
  about["labels"][0] += 1
  file.with_suffix(".json").write_text(json.dumps(about))


@pytest.mark.parametrize(
  "harm",
  [
    _cut,
    _flip_a_bit,
    _other_labels,
    lambda file: file.with_suffix(".json").unlink(),
    *(
      pytest.param(harm, marks=pytest.mark.slow)
      for harm in (
        lambda file: file.write_bytes(b""),
        lambda file: file.with_suffix(".json").write_text("[]"),
        lambda file: file.unlink(),
      )
    ),
  ],
)
def test_damage_is_repaired(make_probe, tmp_path, harm):
  config = make_probe()
  first, _ = features.load(config, tmp_path)
  expected = np.array(first.values)
  file = tmp_path / f"{first.fingerprint}.npy"
  harm(file)
  again, _ = features.load(config, tmp_path)
  np.testing.assert_array_equal(again.values, expected)
  np.testing.assert_array_equal(again.labels, first.labels)
  assert sorted(x.suffix for x in tmp_path.iterdir()) == [
    ".json",
    ".json",
    ".npy",
    ".npy",
  ]


def test_what_they_depend_on_is_in_the_name(make_probe, backbone, tmp_path):
  configs = (
    make_probe(),
    make_probe(**{"data.flip": False}),
    make_probe(**{"probe.scaling": "published"}),
    make_probe(**{"data.train_split": "train[:100]"}),
    make_probe(**{"model.pretrained": backbone}),
  )
  names = {features.load(c, tmp_path)[0].fingerprint for c in configs}
  assert len(names) == len(configs)
  # What a head is trained with is not.
  other = make_probe(**{"optimizer.learning_rate": 0.1, "batch_size": 7})
  assert features.load(other, tmp_path)[0].fingerprint in names


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"model.widths": (8,)}, "random weights is of no use"),
    ({"probe.scaling": "mine"}, "expected one of model, published"),
    ({"model.pretrained": "nowhere"}, "expected the workdir of a finished run"),
  ],
)
def test_a_backbone_that_is_none(make_probe, tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    features.load(make_probe(**overrides), tmp_path)


def test_a_backbone_for_other_images(make_probe, backbone, tmp_path):
  config = make_probe(**{"model.pretrained": backbone, "data.image_size": 12})
  with pytest.raises(ValueError, match=r"\(8, 8, 1\).*\(12, 12, 1\)"):
    features.load(config, tmp_path)


def test_an_unfinished_backbone(make_probe, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")
  config = make_probe(**{"model.pretrained": str(tmp_path / "run")})
  with pytest.raises(FileNotFoundError, match="no finished run"):
    features.load(config, tmp_path / "cache")


def _png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return file.getvalue()


@pytest.fixture
def photos(tmp_path):
  """A prepared set of colour images of two sizes, and the images."""
  rng = np.random.default_rng(0)
  shapes = [(20, 30, 3), (16, 16, 3), (9, 40, 3)]
  images = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
  labels = tfds.features.ClassLabel(num_classes=2)

  class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    name = "photos"

    def _info(self):
      features = {"image": tfds.features.Image(), "label": labels}
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      examples = [
        {"image": _png(x), "label": i % 2} for i, x in enumerate(images)
      ]
      return {split: enumerate(examples) for split in ("train", "test")}

    def _generate_examples(self):
      raise NotImplementedError

  Photos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  return str(tmp_path), images


def test_images_of_several_sizes_are_resized(photos):
  folder, images = photos
  with pytest.raises(ValueError, match=r"set config\.data\.image_size"):
    sources.load("photos", "train", data_dir=folder)
  found = sources.load("photos", "train", data_dir=folder, size=16)
  assert found.images.shape == (3, 16, 16, 3)
  assert found.images.dtype == np.uint8
  np.testing.assert_array_equal(found.images[1], images[1])
  # Bilinear with antialiasing: the mean stays, neighbours are averaged.
  for before, after in zip(images, found.images, strict=True):
    np.testing.assert_allclose(after.mean(), before.mean(), atol=4)
  assert found.images[2].std() < 0.9 * images[2].std()
  other = sources.load("photos", "train", data_dir=folder, size=8)
  assert other.fingerprint != found.fingerprint
  with pytest.raises(ValueError, match="at least 1 pixel"):
    sources.load("photos", "train", data_dir=folder, size=0)


@pytest.mark.slow  # a transformer is compiled
def test_published_weights(make_probe, photos, tmp_path, request):
  folder, _ = photos
  start = "weights/"
  with np.load(
    request.path.parents[2] / "data" / "vit_huggingface.npz", allow_pickle=False
  ) as golden:
    weights = {
      key.removeprefix(start): golden[key]
      for key in golden.files
      if key.startswith(start)
    }
  file = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(weights, file)
  config = make_probe(
    **{
      "data.data_dir": folder,
      "data.name": "photos",
      "data.image_size": 16,
      "model.name": "vit",
      "model.vit.patch_size": 4,
      "model.vit.width": 24,
      "model.vit.depth": 2,
      "model.vit.heads": 3,
      "model.vit.mlp_width": 40,
      "model.pretrained": str(file),
    }
  )
  train_split, _ = features.load(config, tmp_path / "cache")
  # The whole model's logits, by the whole model.
  apply, like = models.create(
    config.model, input_shape=(16, 16, 3), num_classes=5, seed=0
  )
  params = pretrained.load(file, like, input_shape=(16, 16, 3))
  source = sources.open(config.data, "train")
  shown = decoding.Reader(source, decoding.Transform(3, 16), (16, 16, 3))
  images, _ = shown.read(range(len(source)))
  for view, values in zip(
    (images, images[:, :, ::-1]), train_split.values, strict=True
  ):
    # Hugging Face's custom: mean .5, standard deviation .5.
    expected = apply(params, jnp.asarray(view / 127.5 - 1, jnp.float32))
    head = params["head"]
    np.testing.assert_allclose(
      values @ head["kernel"] + head["bias"], expected, atol=1e-5
    )
