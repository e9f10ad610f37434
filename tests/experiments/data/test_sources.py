"""Sources: the same samples, whatever they are stored as."""

import concurrent.futures
import csv
import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pyarrow import parquet

from configs import classification
from experiments.data import sources
from experiments.data.sources import base, index

CLASSES = ("ant", "bee", "cat")
NUMS = {"train": 21, "test": 9}


def make_samples(split):
  """Encoded images, labels and ids of a split, in an order of their own."""
  rng = np.random.default_rng(len(split))
  labels = np.arange(NUMS[split]) % 3
  rng.shuffle(labels)
  images = []
  for _ in labels:
    height, width = rng.integers(3, 9, 2)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    images.append(file.getvalue())
  ids = [f"{split}_{row:05d}" for row in range(len(labels))]
  return images, labels, ids


SAMPLES = {split: make_samples(split) for split in NUMS}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """The user's cache, empty."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder


def make_config(name, **changes):
  data = classification.get_config().data.copy_and_resolve_references()
  data = data.unlock()
  data.name = str(name)
  columns = changes.pop("columns", {})
  data.columns.update(columns)
  data.update(changes)
  return data


def write_tfds(root):
  class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=CLASSES),
        "id": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      return {
        split: enumerate(
          {"image": image, "label": int(label), "id": name}
          for image, label, name in zip(*samples, strict=True)
        )
        for split, samples in SAMPLES.items()
      }

    def _generate_examples(self):
      raise NotImplementedError

  Small.name = "small"
  Small(data_dir=root, file_format="array_record").download_and_prepare()
  return make_config("small", data_dir=str(root))


def write_folder(root):
  for images, labels, ids in SAMPLES.values():
    split = ids[0].split("_")[0]
    for image, label, name in zip(images, labels, ids, strict=True):
      path = root / split / CLASSES[label] / f"{name}.PNG"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(image)
  (root / ".hidden").mkdir()
  (root / "train" / "ant" / "notes.txt").write_text("no image")
  return make_config(f"folder:{root}")


def write_table(root, **changes):
  rows = []
  for split, (images, labels, ids) in SAMPLES.items():
    for image, label, name in zip(images, labels, ids, strict=True):
      (root / f"{name}.png").write_bytes(image)
      rows.append([f"{name}.png", CLASSES[label], name, split])
  with open(root / "labels.csv", "w", encoding="utf-8", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["filename", "class", "id", "split"])
    writer.writerows(rows)
  options = {"labels": str(root / "labels.csv"), **changes}
  return make_config(f"folder:{root}", **options)


def make_table(split, *, names=CLASSES, struct=True, texts=False):
  images, labels, ids = SAMPLES[split]
  kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  column = pa.array(images, pa.binary())
  if struct:
    rows = [{"bytes": x, "path": f"{n}.png"} for x, n in zip(images, ids)]  # noqa: B905
    column = pa.array(rows, kind)
  table = pa.table(
    {
      "id": ids,
      "image": column,
      "label": [CLASSES[x] for x in labels] if texts else labels,
    }
  )
  if names is None:
    return table
  label = {"names": list(names), "_type": "ClassLabel"}
  about = {"info": {"features": {"label": label, "image": {"_type": "Image"}}}}
  return table.replace_schema_metadata({"huggingface": json.dumps(about)})


def write_parquet(root, **options):
  """As the Hub has them, in two files of several row groups."""
  for split in NUMS:
    table = make_table(split)
    half = len(table) // 2
    for number, part in enumerate((table[:half], table[half:])):
      path = root / f"{split}-{number:05d}-of-00002.parquet"
      parquet.write_table(part, path, row_group_size=4, **options)
  return make_config(f"parquet:{root}")


def write_plain_parquet(root):
  return write_parquet(root, compression="none")


def write_text_parquet(root):
  """Bytes, labels as texts, without names, in a folder for each split."""
  for split in NUMS:
    (root / split).mkdir()
    table = make_table(split, names=None, struct=False, texts=True)
    parquet.write_table(table, root / split / "data.parquet")
  return make_config(root, source="parquet")


def write_saved(root):
  """As `datasets` saves them: Arrow's stream format beside a state."""
  for split in NUMS:
    folder = root / split
    folder.mkdir()
    table = make_table(split)
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(folder / name, table.schema) as writer:
      writer.write_table(table, max_chunksize=5)
    state = {"_data_files": [{"filename": name}], "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
  (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  return make_config(f"parquet:{root}")


def write_shards(root):
  for split, (images, labels, ids) in SAMPLES.items():
    for shard in range(2):
      with tarfile.open(root / f"{split}-{shard:03d}.tar", "w") as tar:
        half = len(labels) // 2
        rows = range(half) if shard == 0 else range(half, len(labels))
        for row in rows:
          # A class as a text of its own, or in the json.
          label = CLASSES[labels[row]]
          about = ("cls", label.encode())
          if row % 2:
            about = ("json", json.dumps({"label": label}).encode())
          for suffix, content in (("png", images[row]), about):
            member = tarfile.TarInfo(f"{ids[row]}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
  return make_config(f"webdataset:{root}/{{split}}-*.tar")


IMAGE_SETS = {
  "tfds": write_tfds,
  "folder": write_folder,
  "table": write_table,
  "parquet": write_parquet,
  "plain parquet": write_plain_parquet,
  "parquet with texts": write_text_parquet,
  "saved to disk": write_saved,
  "webdataset": write_shards,
}


@pytest.fixture(scope="module", params=IMAGE_SETS)
def stored(request, tmp_path_factory):
  """A kind of set, and the config of one that is written."""
  root = tmp_path_factory.mktemp("set")
  return request.param, IMAGE_SETS[request.param](root)


class TestEverySourceOfImages:
  def test_has_the_same_samples_labels_and_classes(self, stored):
    kind, data = stored
    for split, (images, labels, ids) in SAMPLES.items():
      source = sources.open(data, split)
      assert len(source) == NUMS[split]
      assert source.class_names == CLASSES
      assert source.num_classes == 3
      assert source.channels == 3
      assert source.shape is None
      assert source.labels.dtype == np.int32
      np.testing.assert_array_equal(source.labels, labels)
      expected = ids
      if kind == "folder":
        names = (CLASSES[label] for label in labels)
        pairs = zip(names, ids, strict=True)
        expected = [f"{split}/{name}/{own}.PNG" for name, own in pairs]
      assert source.ids.tolist() == expected
      rows = np.random.default_rng(0).integers(0, len(images), 50)
      assert source.read(rows) == [images[row] for row in rows]
      assert source.read([]) == []
      with pytest.raises(IndexError, match=r"must lie in 0 \.\. "):
        source.read([0, len(images)])
      with pytest.raises(ValueError, match="read-only"):
        source.labels[0] = 1

  def test_slices_and_sums(self, stored):
    _, data = stored
    whole = sources.open(data, "train")
    head, tail = (sources.open(data, f"train[{x}]") for x in (":33%", "33%:"))
    assert (len(head), len(tail)) == (7, 14)
    assert sorted([*head.ids, *tail.ids]) == sorted(whole.ids)
    images = dict(zip(whole.ids, whole.read(range(21)), strict=True))
    labels = dict(zip(whole.ids, whole.labels, strict=True))
    both = sources.open(data, "train[33%:]+test")
    assert len(both) == 14 + 9
    for source in (head, tail):
      rows = np.arange(len(source))[::-1]
      assert source.read(rows) == [images[x] for x in source.ids[rows]]
      assert source.labels.tolist() == [labels[x] for x in source.ids]
    test = sources.open(data, "test")
    assert both.read([14, 3, 22, 13]) == [
      *test.read([0]),
      *tail.read([3]),
      *test.read([8]),
      *tail.read([13]),
    ]
    prints = {x.fingerprint for x in (whole, head, tail, both, test)}
    assert len(prints) == 5

  def test_pickles_before_and_after_it_reads(self, stored):
    _, data = stored
    source = sources.open(data, "test")
    for _ in range(2):
      other = pickle.loads(pickle.dumps(source))
      assert other.read([8, 0]) == source.read([8, 0])
      assert other.fingerprint == source.fingerprint

  def test_threads_read_at_once(self, stored):
    _, data = stored
    source = sources.open(data, "train")
    images = SAMPLES["train"][0]
    orders = [np.random.default_rng(x).permutation(21) for x in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      for order, found in zip(
        orders, pool.map(source.read, orders), strict=True
      ):
        assert found == [images[row] for row in order]

  def test_opens_again_without_reading_or_decoding(self, stored, monkeypatch):
    _, data = stored
    first = sources.open(data, "train")
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(index, "_write", None)
    monkeypatch.setattr(base, "content_digest", None)  # of every image read
    again = sources.open(data, "train")
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.ids, first.ids)

  def test_decodes_to_the_same_pixels(self, stored):
    _, data = stored
    data = data.copy_and_resolve_references()
    data.image_size = 5
    found = sources.of_config(data, "test")
    for row, content in enumerate(SAMPLES["test"][0]):
      image = Image.open(io.BytesIO(content))
      resized = image.resize((5, 5), Image.Resampling.BILINEAR)
      np.testing.assert_array_equal(found.images[row], np.asarray(resized))
    assert sources.of_config(data, "test") is found
