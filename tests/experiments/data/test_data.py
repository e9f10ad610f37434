"""Data sets and batches: what goes into a run, and its resume."""

import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from experiments.data import digits, pipeline, sources, streams
from experiments.data.sources import decoded, tfds as tfds_source

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
  def test_cifar10(self):
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


NUM = 53
LABELS = np.random.default_rng(1).integers(0, 10, NUM)
# Each image tells by its pixels which one it is, and which way round.
IMAGES = np.zeros((NUM, 2, 3, 3), np.uint8)
IMAGES[:, :, 0] = np.arange(NUM)[:, None, None]
IMAGES[:, :, 2] = 200


def batches(**options):
  options = {"batch_size": 8, "seed": 0, "num_epochs": 3, **options}
  return pipeline.train_batches(IMAGES, LABELS, **options)


def assert_same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_no_two_draws_share_a_stream():
  numbers = [n for name, n in vars(streams).items() if name.isupper()]
  assert len(numbers) >= 5
  assert len(set(numbers)) == len(numbers)


class TestTrainBatches:
  def test_each_epoch_covers_every_sample_once_in_an_order_of_its_own(self):
    steps = pipeline.steps_per_epoch(NUM, 8)
    taken = list(batches())
    assert len(taken) == 3 * steps == 21
    epochs = []
    for epoch in range(3):
      rows = taken[epoch * steps : (epoch + 1) * steps]
      index = np.concatenate([batch["index"] for batch in rows])
      mask = np.concatenate([batch["mask"] for batch in rows])
      assert mask.dtype == bool
      np.testing.assert_array_equal(np.sort(index[mask]), np.arange(NUM))
      np.testing.assert_array_equal(index[~mask], -1)
      assert mask[:NUM].all()
      epochs.append(tuple(index[mask]))
    assert len(set(epochs)) == 3

  def test_rows_belong_together(self):
    for batch in batches():
      real, index = batch["mask"], batch["index"]
      assert {key: value.dtype for key, value in batch.items()} == {
        "image": np.float32,
        "label": np.int32,
        "index": np.int32,
        "mask": np.bool_,
      }
      assert batch["image"].shape == (8, 2, 3, 3)
      np.testing.assert_array_equal(batch["label"][real], LABELS[index[real]])
      np.testing.assert_allclose(
        batch["image"][real], IMAGES[index[real]] / 255, rtol=1e-6
      )

  def test_padding_repeats_a_real_row(self):
    last = list(batches(num_epochs=1))[-1]
    assert last["mask"].tolist() == [True] * 5 + [False] * 3
    for row in (5, 6, 7):
      np.testing.assert_array_equal(last["image"][row], last["image"][0])
      assert last["label"][row] == last["label"][0]

  def test_resumes_from_every_state(self):
    options = {"flip": True, "num_epochs": 2}
    whole = list(batches(**options))
    iterator = batches(**options)
    for step in range(len(whole) + 1):
      state = json.loads(json.dumps(iterator.get_state()))
      resumed = batches(**options)
      resumed.set_state(state)
      assert_same(list(resumed), whole[step:])
      next(iterator, None)

  def test_seed_decides(self):
    assert_same(list(batches(seed=1)), list(batches(seed=1)))
    orders = set()
    for seed in (0, 1, 2):
      taken = [batch["index"] for batch in batches(seed=seed)]
      for start in (0, 7, 14):
        orders.add(tuple(np.concatenate(taken[start : start + 7])))
    # No epoch of one seed is an epoch of another.
    assert len(orders) == 9

  def test_endless_without_a_number_of_epochs(self):
    iterator = batches(num_epochs=None)
    seen = [next(iterator)["index"] for _ in range(40)]
    assert len(seen) == 40

  def test_subset_keeps_the_positions_of_the_whole(self):
    kept = np.array([50, 3, 7, 19, 20])
    taken = list(batches(indices=kept, batch_size=3, num_epochs=2))
    assert len(taken) == 4
    for epoch in (taken[:2], taken[2:]):
      index = np.concatenate([batch["index"] for batch in epoch])
      np.testing.assert_array_equal(np.sort(index[index >= 0]), np.sort(kept))
    first = taken[0]
    np.testing.assert_array_equal(first["label"], LABELS[first["index"]])

  def test_a_batch_larger_than_the_data_is_padded(self):
    (only,) = batches(batch_size=64, num_epochs=1)
    assert only["image"].shape[0] == 64
    assert only["mask"].sum() == NUM

  def test_flips_about_half_and_keeps_order(self):
    plain = list(batches(num_epochs=20))
    flipped = list(batches(num_epochs=20, flip=True))
    assert "flipped" not in plain[0]
    for one in flipped:
      # Mirrored images have the bright column first.
      first, last = one["image"][:, 0, 0, 0], one["image"][:, 0, -1, 0]
      np.testing.assert_array_equal(one["flipped"], first > last)
    turned = []
    for one, other in zip(plain, flipped, strict=True):
      np.testing.assert_array_equal(one["index"], other["index"])
      same = (one["image"] == other["image"]).all((1, 2, 3))
      mirrored = (one["image"][:, :, ::-1] == other["image"]).all((1, 2, 3))
      assert (same ^ mirrored).all()
      turned += mirrored.tolist()
    assert 0.45 < np.mean(turned) < 0.55

  def test_normalises_by_channel(self):
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    (batch,) = batches(batch_size=NUM, num_epochs=1, mean=mean, std=std)
    expected = (IMAGES[batch["index"]] / 255 - mean) / std
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-5, atol=1e-6)

  def test_later_changes_of_the_labels_do_not_reach_the_batches(self):
    labels = LABELS.copy()
    iterator = pipeline.train_batches(IMAGES, labels, batch_size=8, seed=0)
    labels[:] = 0
    batch = next(iterator)
    np.testing.assert_array_equal(batch["label"], LABELS[batch["index"]])

  @pytest.mark.parametrize(
    ("options", "error", "text"),
    [
      ({"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
      ({"seed": -1}, ValueError, "seed must not be negative"),
      ({"num_epochs": 0}, ValueError, "num_epochs must be positive or None"),
      ({"indices": [0, 53]}, ValueError, r"0 \.\. 52, got 0 \.\. 53"),
      ({"indices": [1, 1]}, ValueError, "indices must differ"),
      ({"indices": []}, ValueError, "at least one sample"),
      ({"indices": np.ones(NUM, bool)}, TypeError, "np.flatnonzero"),
      ({"std": 0.0}, ValueError, "std must be positive"),
      ({"mean": (0.5, 0.5)}, ValueError, "mean must be one number or one per"),
    ],
  )
  def test_bad_values(self, options, error, text):
    with pytest.raises(error, match=text):
      batches(**options)

  def test_bad_arrays(self):
    options = {"batch_size": 8, "seed": 0}
    with pytest.raises(ValueError, match=r"\(53,\), got \(52,\)"):
      pipeline.train_batches(IMAGES, LABELS[1:], **options)
    with pytest.raises(TypeError, match="uint8, got float64"):
      pipeline.train_batches(IMAGES / 255, LABELS, **options)
    with pytest.raises(TypeError, match="integers, got float64"):
      pipeline.train_batches(IMAGES, LABELS * 0.5, **options)
    with pytest.raises(ValueError, match=r"\[N, H, W, C\], got \(53, 2, 3\)"):
      pipeline.train_batches(IMAGES[..., 0], LABELS, **options)


def test_tones_of_16_bits_are_kept():
  ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
  content = io.BytesIO()
  Image.fromarray(ramp[:, None].repeat(3, axis=1)).save(content, "PNG")
  for mode, channels in (("L", 1), ("RGB", 3)):
    found = decoded._decode_image(content.getvalue(), mode, None)
    assert found.shape == (256, 3, channels)
    np.testing.assert_array_equal(found[:, 0, 0], np.arange(256))


class TestEvalBatches:
  def test_goes_over_all_in_order(self):
    taken = list(pipeline.eval_batches(IMAGES, LABELS, batch_size=8))
    assert len(taken) == 7
    index = np.concatenate([batch["index"] for batch in taken])
    np.testing.assert_array_equal(index, [*range(NUM), -1, -1, -1])
    mask = np.concatenate([batch["mask"] for batch in taken])
    np.testing.assert_array_equal(mask, index >= 0)

  def test_subset_in_the_given_order(self):
    (batch,) = pipeline.eval_batches(
      IMAGES, LABELS, batch_size=4, indices=[9, 2, 5]
    )
    assert batch["index"].tolist() == [9, 2, 5, -1]


class TestFingerprint:
  def test_tells_every_setting_apart(self):
    plain = {"source": "a", "labels": LABELS, "batch_size": 8, "seed": 0}
    changes = [
      {},
      {"source": "b"},
      {"labels": (LABELS + 1) % 10},
      {"batch_size": 4},
      {"seed": 1},
      {"indices": np.arange(NUM - 1)},
      {"flip": True},
      {"mean": 0.5},
      {"std": (0.5, 0.5, 0.4)},
    ]
    prints = []
    for change in changes:
      options = {**plain, **change}
      prints.append(
        pipeline.fingerprint(
          options.pop("source"), options.pop("labels"), **options
        )
      )
    assert len(set(prints)) == len(changes)

  def test_does_not_depend_on_how_the_same_is_said(self):
    one = pipeline.fingerprint("a", LABELS, batch_size=8, seed=0)
    other = pipeline.fingerprint(
      "a",
      LABELS.astype(np.int32).tolist(),
      batch_size=np.int64(8),
      seed=0,
      indices=list(range(NUM)),
      mean=[0],
      std=1,
    )
    assert one == other
