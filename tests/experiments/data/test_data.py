"""Data sets and batches: what goes into a run, and its resume."""

import io
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from experiments.data import digits, sources
from experiments.data.sources import tfds as tfds_source

REPOSITORY = pathlib.Path(__file__).parents[3]
CIFAR10 = REPOSITORY.parent / "shared" / "tfds"


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory):
  """A folder in which the digits are prepared."""
  folder = tmp_path_factory.mktemp("tfds")
  digits.prepare(str(folder))
  return folder


@pytest.fixture(scope="session")
def train(prepared_dir):
  return sources.load("digits", "train", data_dir=prepared_dir)


class TestDigits:
  def test_is_the_bundled_set_split_once(self, prepared_dir, train):
    test = sources.load("digits", "test", data_dir=prepared_dir)
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")

    bundled = load_digits()
    stored = np.concatenate([train.images, test.images])[..., 0]
    pixels = np.rint(stored * (16 / 255)).astype(int)
    rows = np.column_stack(
      [
        pixels.reshape(len(pixels), -1),
        np.concatenate([train.labels, test.labels]),
      ]
    )
    expected = np.column_stack([bundled.data.astype(int), bundled.target])
    np.testing.assert_array_equal(
      rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)]
    )
    assert train.images.min() == 0
    assert train.images.max() == 255

  def test_split_is_stratified(self, prepared_dir, train):
    test = sources.load("digits", "test", data_dir=prepared_dir)
    shares = np.bincount(test.labels) / 360 - np.bincount(train.labels) / 1437
    assert np.abs(shares).max() < 0.005

  def test_ids_follow_the_stored_order(self, train):
    assert train.ids[0] == "train_00000"
    assert train.ids[-1] == "train_01436"
    assert len(set(train.ids)) == len(train.ids)

  @pytest.mark.slow
  def test_two_processes_prepare_one_folder_without_tensorflow(
    self, tmp_path, train
  ):
    """The one that runs these tests, and one that starts with it."""
    script = (
      "import sys\n"
      "from experiments.data import sources\n"
      "print('ready', flush=True)\n"
      "sys.stdin.readline()\n"
      f"d = sources.load('digits', 'train', data_dir={str(tmp_path)!r})\n"
      "print(d.fingerprint, 'tensorflow' in sys.modules)\n"
    )
    process = subprocess.Popen(
      [sys.executable, "-W", "error", "-c", script],
      cwd=REPOSITORY,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    ready = process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    mine = sources.load("digits", "train", data_dir=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (ready, process.returncode) == ("ready\n", 0), err
    assert out.split() == [train.fingerprint, "False"]
    assert mine.fingerprint == train.fingerprint
    assert "OpenCV" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


class TestSources:
  def test_decodes_once_a_process(self, prepared_dir, train):
    assert sources.load("digits", "train", data_dir=str(prepared_dir)) is train
    with pytest.raises(ValueError, match="read-only"):
      train.labels[0] = 1

  def test_default_folder_is_that_of_tfds(
    self, prepared_dir, train, monkeypatch
  ):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_dir))
    assert sources.load("digits", "train") is train

  def test_slices_and_sums_of_splits(self, prepared_dir, train):
    tail = sources.load("digits", "train[1400:]+test", data_dir=prepared_dir)
    assert len(tail.labels) == 37 + 360
    np.testing.assert_array_equal(tail.images[:37], train.images[1400:])
    np.testing.assert_array_equal(tail.ids[:37], train.ids[1400:])
    assert tail.fingerprint != train.fingerprint

  def test_positions_stand_in_for_ids(self, prepared_dir):
    builder = tfds_source._find("digits", str(prepared_dir))
    np.testing.assert_array_equal(
      tfds_source._positions(builder, "train[1435:]+test[:1]"),
      ["train_01435", "train_01436", "test_00000"],
    )

  def test_unprepared_set_says_how_to_prepare_it(self, prepared_dir):
    with pytest.raises(FileNotFoundError) as error:
      sources.load("cifar10", "train", data_dir=prepared_dir)
    text = str(error.value)
    assert "holds digits/1.0.0" in text
    assert f"tfds build cifar10 --data_dir={prepared_dir} --file_format" in text
    assert "\n" not in text

  @pytest.mark.parametrize(
    ("name", "split", "texts"),
    [
      ("mnits", "train", ["'mnits'", "holds digits", "did you mean 'mnist'"]),
      ("digits:7.0.0", "train", ["only: 1.0.0"]),
      ("no such/set!", "train", ["can't be opened"]),
      ("digits", "valid", ["split 'valid'", "['test', 'train']"]),
      ("digits", "train[:x]", ["split 'train[:x]'"]),
    ],
  )
  def test_unknown_names_get_one_line(self, prepared_dir, name, split, texts):
    with pytest.raises(ValueError, match=re.escape(texts[0])) as error:
      sources.load(name, split, data_dir=prepared_dir)
    assert "\n" not in str(error.value)
    for text in texts:
      assert text in str(error.value)

  def test_wrong_kind_of_name(self):
    with pytest.raises(TypeError, match="split must be a str, got 3"):
      sources.load("digits", 3)

  def test_unwritable_folder(self, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set TFDS_DATA_DIR"):
      sources.load("digits", "train", data_dir=tmp_path / "file")

  def test_missing_shard(self, tmp_path):
    digits.prepare(str(tmp_path))
    next(tmp_path.glob("digits/1.0.0/*test*")).unlink()
    with pytest.raises(ValueError, match="damaged or missing"):
      sources.load("digits", "test", data_dir=tmp_path)

  def test_images_of_several_sizes(self, tmp_path):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
      }
    )
    _write(
      tmp_path,
      "sizes",
      features,
      [
        {"image": _png(4, 4, "L"), "label": 0},
        {"image": _png(4, 5, "RGB"), "label": 1},
      ],
    )
    with pytest.raises(ValueError, match=r"vary in size.*\(4, 5, 3\)"):
      sources.load("sizes", "train", data_dir=tmp_path)
    # A grey file in a set of colour images comes out with three channels.
    first = sources.load("sizes", "train[:1]", data_dir=tmp_path)
    assert first.images.shape == (1, 4, 4, 3)
    assert first.ids.tolist() == ["train_00000"]

  def test_names_the_features_of_another_kind_of_set(self, tmp_path):
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    _write(tmp_path, "words", features, [{"text": "hello"}])
    with pytest.raises(
      ValueError, match=r"\{'text': 'Text'\}; expected 'image"
    ):
      sources.load("words", "train", data_dir=tmp_path)

  def test_unlabelled_split(self, tmp_path):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
      }
    )
    example = {"image": _png(4, 4, "RGB"), "label": -1}
    _write(tmp_path, "unlabelled", features, [example])
    with pytest.raises(ValueError, match=r"1 of 1 labels .* outside 0 \.\. 1"):
      sources.load("unlabelled", "train", data_dir=tmp_path)

  @pytest.mark.skipif(
    not (CIFAR10 / "cifar10").exists(),
    reason="no prepared CIFAR-10 beside the repository",
  )
  def test_cifar10(self, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = sources.load("cifar10", "test[:200]", data_dir=CIFAR10)
    assert data.images.shape == (200, 32, 32, 3)
    assert data.class_names[:2] == ("airplane", "automobile")
    assert all(name.startswith("test_") for name in data.ids)
    assert np.bincount(data.labels, minlength=10).min() > 5


def _png(height, width, mode):
  file = io.BytesIO()
  Image.new(mode, (width, height)).save(file, format="PNG")
  return file.getvalue()


def _write(folder, name, features, examples):
  """Prepares a data set of a few examples, its images already encoded."""

  class Handmade(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=features, disable_shuffling=True
      )

    def _split_generators(self, dl_manager):
      return {"train": enumerate(examples)}

    def _generate_examples(self):
      raise NotImplementedError

  Handmade.name = name
  Handmade(data_dir=folder, file_format="array_record").download_and_prepare()
