"""Sources: the same samples, whatever they are stored as."""

import concurrent.futures
import csv
import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pyarrow import parquet

import gradmimic_jax as gm
from configs import classification
from experiments.data import filters, noise, sources
from experiments.data.sources import (
  arrays as arrays_lib,
  base,
  folder as folder_lib,
  index,
  splits,
  whole_splits,
)

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
    found = decode(data, "test")
    for row, content in enumerate(SAMPLES["test"][0]):
      image = Image.open(io.BytesIO(content))
      resized = image.resize((5, 5), Image.Resampling.BILINEAR)
      np.testing.assert_array_equal(found.images[row], np.asarray(resized))
    assert decode(data, "test") is found


def write_npz(root, **changes):
  arrays = {}
  for split, (_, labels, ids) in SAMPLES.items():
    rng = np.random.default_rng(len(split))
    arrays[f"{split}_images"] = rng.integers(0, 256, (len(ids), 4, 5), np.uint8)
    arrays[f"{split}_labels"] = labels[:, None]  # as MedMNIST has them
    arrays[f"{split}_ids"] = np.array(ids)
  arrays |= {"class_names": np.array(CLASSES), **changes}
  np.savez_compressed(root / "set.npz", **arrays)
  return make_config(f"npz:{root}/set.npz"), arrays


def decode(data, split):
  size = data.image_size or None
  return whole_splits.decode_split(sources.open(data, split), size)


class TestArrays:
  def test_images_of_an_npz_file(self, tmp_path):
    data, arrays = write_npz(tmp_path)
    for split, (_, labels, ids) in SAMPLES.items():
      source = sources.open(data, split)
      assert source.ids.tolist() == ids
      assert source.class_names == CLASSES
      assert (source.channels, source.shape) == (1, (4, 5, 1))
      np.testing.assert_array_equal(source.labels, labels)
      for one in (source, pickle.loads(pickle.dumps(source))):
        (last, first) = one.read([len(ids) - 1, 0])
        assert first.dtype == np.uint8
        images = arrays[f"{split}_images"]
        np.testing.assert_array_equal(first[..., 0], images[0])
        np.testing.assert_array_equal(last[..., 0], images[-1])
      decoded = decode(data, split)
      np.testing.assert_array_equal(decoded.images[..., 0], images)

  def test_names_of_keras(self, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (6, 2, 2, 3), np.uint8)}
    arrays |= {"y_train": np.arange(6) % 2, "x_test": arrays["x_train"][:2]}
    np.savez(tmp_path / "a.npz", **arrays, y_test=np.arange(2))
    source = sources.open(make_config(f"npz:{tmp_path}/a.npz"), "train")
    assert source.labels.tolist() == [0, 1] * 3
    assert source.ids[5] == "train_00005"
    np.testing.assert_array_equal(source.read([5])[0], arrays["x_train"][5])

  @pytest.mark.parametrize("kind", [np.float16, np.float32])
  @pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
  def test_features_with_labels_beside_them(self, tmp_path, kind, suffix):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 7)).astype(kind)
    labels = np.array([CLASSES[x] for x in np.arange(30) % 3])
    ids = [f"x{row}" for row in range(30)]
    np.save(tmp_path / "all.npy", rows)
    beside = tmp_path / f"all_labels{suffix}"
    if suffix == ".npy":
      np.save(beside, labels)
      ids = [f"all_{row:05d}" for row in range(30)]
    elif suffix == ".csv":
      lines = ["label,id", *map(",".join, zip(labels, ids, strict=True))]
      beside.write_text("\n".join(lines))
    else:
      parquet.write_table(pa.table({"label": labels, "id": ids}), beside)
    splits_ = {"train_split": "all[:50%]", "test_split": "all[50%:]"}
    data = make_config(f"features:{tmp_path}/all.npy", **splits_)
    source = sources.open(data, "all[50%:]")
    assert source.channels is None
    assert source.shape == (7,)
    assert source.class_names == CLASSES
    assert source.ids.tolist() == ids[15:]
    for one in (source, pickle.loads(pickle.dumps(source))):
      (found,) = one.read([14])
      assert found.dtype == np.float32
      np.testing.assert_array_equal(found, rows[29].astype(np.float32))
    with pytest.raises(ValueError, match="are features"):
      decode(data, "all[50%:]")

  def test_a_file_for_each_split(self, tmp_path):
    for split, (_, labels, _) in SAMPLES.items():
      np.save(tmp_path / f"{split}.npy", np.ones((len(labels), 2), np.float32))
      np.save(tmp_path / f"y_{split}.npy", labels)
    data = make_config(f"features:{tmp_path}/{{split}}.npy")
    data.labels = "y_{split}.npy"
    assert len(sources.open(data, "train")) == NUMS["train"]
    assert len(sources.open(data, "test")) == NUMS["test"]


class TestDatasetObjects:
  def test_a_dataset_and_the_folder_that_it_saves(self, tmp_path):
    datasets = pytest.importorskip("datasets", reason="no datasets package")
    images, labels, ids = SAMPLES["train"]
    features = datasets.Features(
      {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(CLASSES)),
        "id": datasets.Value("string"),
      }
    )
    rows = {
      "image": [{"bytes": image, "path": None} for image in images],
      "label": labels,
      "id": ids,
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "all.parquet")
    slices = {"train_split": "all", "test_split": "all"}
    found = [
      sources.from_dataset(made),
      sources.from_dataset(datasets.load_from_disk(str(tmp_path / "saved"))),
      sources.open(make_config(f"parquet:{tmp_path}/saved", **slices), "all"),
      sources.open(
        make_config(f"parquet:{tmp_path}/all.parquet", **slices), "all"
      ),
    ]
    for source in found:
      assert source.ids.tolist() == ids
      assert source.class_names == CLASSES
      assert source.labels.tolist() == labels.tolist()
      assert source.read([20, 3]) == [images[20], images[3]]
      other = pickle.loads(pickle.dumps(source))
      assert other.read([20, 3]) == [images[20], images[3]]
    assert len({source.fingerprint for source in found}) == 1
    half = sources.from_dataset(made, split="all[:50%]")
    assert half.ids.tolist() == ids[:10]
    with pytest.raises(TypeError, match=r"got DatasetDict; of a DatasetDict"):
      sources.from_dataset(datasets.DatasetDict({"train": made}))


class TestIndex:
  def test_follows_the_data(self, tmp_path):
    """Another content of the same size is another set."""
    data = write_table(tmp_path)
    first = sources.open(data, "train")
    path = tmp_path / "train_00003.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"was changed after the set was open"):
      first.read([3])
    second = sources.open(data, "train")
    assert second.read([3]) == [bytes(content)]
    assert second.fingerprint != first.fingerprint
    # Touching a file changes nothing that counts.
    os.utime(path, ns=(1, 1))
    assert sources.open(data, "train").fingerprint == second.fingerprint

  @pytest.mark.parametrize("write", [write_parquet, write_shards])
  def test_a_file_that_changes_is_read_again(self, tmp_path, write):
    data = write(tmp_path)
    first = sources.open(data, "test")
    other = sources.open(data, "train")
    for path in sorted(tmp_path.glob("train-*")):
      if path.is_file():
        # The training samples' files, under the test samples' names.
        path.replace(str(path).replace("train", "test"))
    with pytest.raises(
      (FileNotFoundError, ValueError), match=r"has no|none of"
    ):
      sources.open(data, "train")
    data.train_split = "test"
    second = sources.open(data, "test")
    assert second.read(range(21)) == SAMPLES["train"][0]
    assert second.labels.tolist() == other.labels.tolist()
    assert second.fingerprint != first.fingerprint

  def test_a_set_that_moves_keeps_its_fingerprint_and_index(
    self, tmp_path, monkeypatch
  ):
    for name in ("a", "b"):
      (tmp_path / name).mkdir()
    data = write_parquet(tmp_path / "a" / ".." / "a")
    first = sources.open(data, "train")
    (tmp_path / "b").rmdir()
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(base, "content_digest", None)
    second = sources.open(make_config(f"parquet:{tmp_path}/b"), "train")
    assert second.fingerprint == first.fingerprint
    assert second.read(range(21)) == SAMPLES["train"][0]

  @pytest.mark.parametrize("write", [write_parquet, write_folder])
  def test_lies_in_the_users_cache_where_the_set_cant_be_written(
    self, tmp_path, cache, monkeypatch, write
  ):
    data = write(tmp_path)
    allowed = index._is_writable
    monkeypatch.setattr(
      index,
      "_is_writable",
      lambda x: not x.is_relative_to(tmp_path) and allowed(x),
    )
    source = sources.open(data, "train")
    assert not (tmp_path / index.FOLDER).exists()
    assert list((cache / "gradmimic_jax" / "sources").glob("*.npz"))
    monkeypatch.setattr(base, "content_digest", None)
    again = sources.open(data, "train")
    assert again.fingerprint == source.fingerprint
    assert again.read([2]) == source.read([2])

  def test_is_made_anew_where_it_is_damaged_or_a_link(self, tmp_path, caplog):
    data = write_shards(tmp_path)
    source = sources.open(data, "train")
    for damage in ("cut", "flip", "objects", "empty"):
      for path in (tmp_path / index.FOLDER).glob("*.npz"):
        content = bytearray(path.read_bytes())
        if damage == "objects":
          with open(path, "wb") as file:
            np.savez(file, label=np.array([print], object))
          continue
        content[len(content) // 2] ^= damage == "flip"
        size = {"cut": len(content) // 2, "empty": 0}.get(damage)
        path.write_bytes(content[:size])
      again = sources.open(data, "train")
      assert again.fingerprint == source.fingerprint
      assert again.read([7]) == source.read([7])
    assert "made anew" in caplog.text
    kept = tmp_path / index.FOLDER
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    for path in kept.glob("*"):
      path.unlink()
    assert sources.open(data, "train").fingerprint == source.fingerprint
    assert not list(kept.glob("*"))

  def test_is_made_once_by_all_who_open_the_set(self, tmp_path, monkeypatch):
    data = write_shards(tmp_path)
    seen = []
    digest = base.content_digest
    monkeypatch.setattr(
      base, "content_digest", lambda x: seen.append(x) or digest(x)
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      found = list(pool.map(lambda _: sources.open(data, "train"), range(4)))
    assert sorted(seen) == sorted(SAMPLES["train"][0] + SAMPLES["test"][0])
    assert len({source.fingerprint for source in found}) == 1

  def test_a_ledger_of_the_set_before_it_changed_is_refused(self, tmp_path):
    """Both sets are named, by their fingerprints."""
    config = classification.get_config().copy_and_resolve_references().unlock()
    (tmp_path / "set").mkdir()
    config.data = write_table(tmp_path / "set")
    before = sources.open(config.data, "train")
    labels = noise.NoisyLabels(
      before.labels, before.labels, np.zeros(21, bool), 0.0
    )
    prints = filters.fingerprints(config, before, labels)
    with gm.ScoreLedger(tmp_path / "ledger", fingerprints=prints) as ledger:
      ledger.append(before.ids, np.zeros(21), step=0, epoch=0)
    path = tmp_path / "set" / "train_00000.png"
    path.write_bytes(SAMPLES["test"][0][0])
    after = sources.open(config.data, "train")
    prints = filters.fingerprints(config, after, labels)
    with pytest.raises(ValueError, match="made with other inputs") as error:
      gm.ScoreLedger(tmp_path / "ledger", fingerprints=prints)
    assert before.fingerprint[:16] in str(error.value)
    assert after.fingerprint[:16] in str(error.value)

  def test_a_copy_that_is_gone_is_made_again(self, tmp_path):
    data = write_parquet(tmp_path)  # compressed
    sources.open(data, "train")
    copies = list((tmp_path / index.FOLDER).glob("*.images"))
    assert len(copies) == 4
    for path in copies:
      path.unlink()
    source = sources.open(data, "train")
    assert source.read(range(21)) == SAMPLES["train"][0]

  def test_images_that_are_stored_as_they_are_are_not_copied(self, tmp_path):
    sources.open(write_parquet(tmp_path, compression="none"), "train")
    assert not list(tmp_path.rglob("*.images"))


def write_lines(root, lines):
  """A table of files, beside one image."""
  (root / "a.png").write_bytes(SAMPLES["test"][0][0])
  (root / "b.png").write_bytes(SAMPLES["test"][0][1])
  (root / "labels.csv").write_text("\n".join(lines))
  splits_ = {"train_split": "all", "test_split": "all"}
  return make_config(f"folder:{root}", labels="labels.csv", **splits_)


class TestBadFolders:
  def test_without_images(self, tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train" / "a.png").write_bytes(b"")
    with pytest.raises(
      ValueError, match=r"has no image in its 1 folders \(1 l"
    ):
      sources.open(make_config(f"folder:{tmp_path}"), "train")
    with pytest.raises(
      FileNotFoundError, match="there is none; expected a fol"
    ):
      sources.open(make_config(f"folder:{tmp_path}/none"), "train")

  def test_a_class_that_one_split_lacks(self, tmp_path):
    data = write_folder(tmp_path)
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "wasp")
    for split in ("train", "test"):
      with pytest.raises(ValueError, match="lacks 1 of 4 classes") as error:
        sources.open(data, split)
      assert "split 'train'" in str(error.value)
      assert re.search(
        "'test' has: 'wasp'|'train' has: 'bee'", str(error.value)
      )

  def test_classes_in_place_of_splits(self, tmp_path):
    data = write_folder(tmp_path)
    data.name += "/train"
    with pytest.raises(ValueError, match=r"'ant', 'bee', 'cat'.*'all\[:80%\]'"):
      sources.open(data, "train")
    data.train_split, data.test_split = "all[:60%]", "all[60%:]"
    parts = [sources.open(data, x) for x in (data.train_split, data.test_split)]
    assert sorted(map(len, parts)) == [8, 13]
    assert not set(parts[0].ids) & set(parts[1].ids)
    # Not the first classes: a slice is a random part, always the same.
    assert set(parts[1].labels.tolist()) == {0, 1, 2}

  @pytest.mark.parametrize("to_folder", [False, True])
  def test_links_that_lead_out_of_it(self, tmp_path, to_folder):
    root = tmp_path / "set"
    root.mkdir()
    data = write_folder(root)
    outside = tmp_path / "secret.png"
    outside.write_bytes(b"secret")
    link = root / "train" / "ant" / "link.png"
    link.symlink_to(tmp_path if to_folder else outside)
    with pytest.raises(ValueError, match=r"link\.png is a link that leads out"):
      sources.open(data, "train")
    link.unlink()
    link.symlink_to(root / "train" / "bee" / _name(root / "train" / "bee"))
    assert len(sources.open(data, "train")) == 22

  def test_classes_that_are_numbers_come_in_their_order(self, tmp_path):
    for name in ("10", "9", "0"):
      (tmp_path / "train" / name).mkdir(parents=True)
      (tmp_path / "train" / name / "a.png").write_bytes(SAMPLES["test"][0][0])
    data = make_config(f"folder:{tmp_path}", test_split="train")
    assert sources.open(data, "train").class_names == ("0", "9", "10")

  def test_content_counts_up_to_a_size(self, tmp_path, monkeypatch, caplog):
    data = write_folder(tmp_path)
    whole = sources.open(data, "train").fingerprint
    monkeypatch.setattr(folder_lib, "HASHED_BYTES", 10)
    monkeypatch.setattr(base, "content_digest", None)
    caplog.set_level("INFO")
    sized = sources.open(data, "train").fingerprint
    assert sized != whole
    assert "not of their content" in caplog.text
    path = next((tmp_path / "train").glob("*/*.PNG"))
    path.write_bytes(path.read_bytes() + b"\0")
    assert sources.open(data, "train").fingerprint != sized

  def test_grey_images_have_one_channel(self, tmp_path):
    for number in range(3):
      path = tmp_path / "train" / f"c{number}" / "a.png"
      path.parent.mkdir(parents=True)
      Image.new("L", (3, 3), number).save(path)
    data = make_config(f"folder:{tmp_path}", test_split="train")
    assert sources.open(data, "train").channels == 1
    data.channels = 4
    assert sources.open(data, "train").channels == 4
    data.channels = 2
    with pytest.raises(ValueError, match=r"config\.data\.channels is 2"):
      sources.open(data, "train")

  @pytest.mark.parametrize(
    ("lines", "error", "text"),
    [
      (["file,label", "a.png,x", "c.png,y"], FileNotFoundError, "'c.png'"),
      (["file,label", "a.png,x", "a.png,y"], ValueError, "'a.png' of .* twice"),
      (["file,label", "../a.png,x"], ValueError, r"'\.\./a\.png'; expected"),
      (["file,label", "/etc/passwd,x"], ValueError, "'/etc/passwd'; expected"),
      (["file,label", "x\\..\\..\\a,x"], ValueError, "without '..'"),
      (["file,label", ",x"], ValueError, "1 empty fields, the first in row 0"),
      (["file,label", "a.png,"], ValueError, "'label' of .* 1 empty fields"),
      (["name,label", "a.png,x"], ValueError, "columns 'name', 'label'; exp"),
      (["file,file,label", "a.png,a,x"], ValueError, "'file' twice"),
      (["file,label"], ValueError, "damaged or no csv"),
      ([], ValueError, "has the columns ; expected one of label"),
      (["file,label", "a.png,x,y"], ValueError, "damaged or no csv table"),
      (
        ["file,label,id", "a.png,x,1", "b.png,x,1"],
        ValueError,
        "'1' of .* twi",
      ),
      (["file,label", "a.png,1", "b.png,3"], ValueError, "only 2 samples"),
      (["file,label", "a.png,1", "b.png,1"], ValueError, "is of class 0"),
      (["file,label", "labels.csv/a,x"], FileNotFoundError, "are not in"),
    ],
  )
  def test_tables(self, tmp_path, lines, error, text):
    with pytest.raises(error, match=text) as caught:
      sources.open(write_lines(tmp_path, lines), "all")
    assert "\n" not in str(caught.value)

  def test_tables_that_are_not_there(self, tmp_path):
    data = write_lines(tmp_path, ["file,label", "a.png,x"])
    for name, error in (
      ("none.csv", FileNotFoundError),
      ("a.png", ValueError),
    ):
      data.labels = name
      with pytest.raises(error, match=r"config\.data\.labels is"):
        sources.open(data, "all")
    data.labels = "labels.csv"
    with pytest.raises(ValueError, match="no column of splits"):
      sources.open(data, "train")
    data.columns.label = "colour"
    with pytest.raises(ValueError, match=r"expected 'colour' for labels: set"):
      sources.open(data, "all")

  def test_a_table_whose_file_is_a_link_out(self, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    data = write_lines(root, ["file,label", "in/b.png,x"])
    (tmp_path / "b.png").write_bytes(b"")
    (root / "in").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link that leads out"):
      sources.open(data, "all")

  def test_a_class_that_one_split_of_a_table_lacks(self, tmp_path):
    lines = ["file,label,split", "a.png,x,train", "b.png,y,test"]
    data = write_lines(tmp_path, lines)
    data.train_split, data.test_split = "train", "test"
    with pytest.raises(ValueError, match=r"'train' of .* lacks 1 of 2 .* 'y'"):
      sources.open(data, "train")


def _name(folder):
  return sorted(x.name for x in folder.iterdir())[0]


class TestBadParquet:
  def open(self, root, table, **changes):
    splits_ = {"train_split": "all", "test_split": "all", **changes}
    parquet.write_table(table, root / "a.parquet")
    return sources.open(
      make_config(f"parquet:{root}/a.parquet", **splits_), "all"
    )

  def test_columns(self, tmp_path):
    table = make_table("test")
    with pytest.raises(
      ValueError, match=r"columns 'id', 'image'; expected one"
    ):
      self.open(tmp_path, table.drop_columns(["label"]))
    with pytest.raises(ValueError, match="columns 'id', 'label'; expected one"):
      self.open(tmp_path, table.drop_columns(["image"]))
    with pytest.raises(ValueError, match="is string; expected encoded images"):
      self.open(tmp_path, table, columns={"image": "id"})
    doubles = table.set_column(2, "label", pa.array([0.5] * 9))
    with pytest.raises(ValueError, match="is double; expected one class"):
      self.open(tmp_path, doubles)

  def test_rows(self, tmp_path):
    table = make_table("test", struct=False)
    images = table["image"].to_pylist()
    nulls = table.set_column(1, "image", pa.array([*images[:8], None]))
    with pytest.raises(ValueError, match="has no bytes in row 8"):
      self.open(tmp_path, nulls)
    rows = [{"bytes": None, "path": "a"}, *([{"bytes": b"x"}] * 8)]
    with pytest.raises(ValueError, match="has no bytes in row 0"):
      self.open(tmp_path, table.set_column(1, "image", pa.array(rows)))
    nulls = table.set_column(2, "label", pa.array([*range(8), None]))
    with pytest.raises(ValueError, match="has no label in row 8"):
      self.open(tmp_path, nulls)
    high = table.set_column(2, "label", pa.array([0, 1, 2, 3] * 2 + [-1]))
    with pytest.raises(ValueError, match=r"3 of 9 labels .* outside 0 \.\. 2"):
      self.open(tmp_path, high)
    twice = table.set_column(0, "id", pa.array(["a"] * 9))
    with pytest.raises(ValueError, match=r"id 'a' of .* comes twice, for sam"):
      self.open(tmp_path, twice)
    with pytest.raises(ValueError, match="has no sample"):
      self.open(tmp_path, table[:0])

  def test_labels_without_names(self, tmp_path):
    table = make_table("test", names=None)
    low = table.set_column(2, "label", pa.array([-1, *[0] * 8]))
    with pytest.raises(ValueError, match="is -1; expected numbers from 0 on"):
      self.open(tmp_path, low)

  def test_names_that_are_none(self, tmp_path):
    for names in ([], ["a", "a"], [1]):
      with pytest.raises(ValueError, match="no list of different texts"):
        self.open(tmp_path, make_table("test", names=names))

  def test_splits(self, tmp_path):
    data = write_plain_parquet(tmp_path)
    with pytest.raises(ValueError, match="none of its 4 files has it in its"):
      sources.open(data, "valid")
    with pytest.raises(
      ValueError, match="can't be read; expected a name, a sl"
    ):
      sources.open(data, "train[:x]")
    with pytest.raises(ValueError, match="can't be read"):
      sources.open(data, "train[10%:20]")
    path = tmp_path / "train_more-00000-of-00001.parquet"
    parquet.write_table(make_table("test"), path)
    assert len(sources.open(data, "train")) == NUMS["train"]
    with pytest.raises(TypeError, match="split must be a str, got 3"):
      sources.open(data, 3)
    parquet.write_table(
      make_table("test", names=("ant", "cat", "bee")),
      tmp_path / "test-00000-of-00002.parquet",
    )
    with pytest.raises(ValueError, match="name different classes"):
      sources.open(data, "train")
    (tmp_path / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="another order in split 'test'"):
      sources.open(data, "train")

  @pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
  def test_damage_gets_one_line(self, tmp_path, suffix):
    if suffix == ".arrow":
      data = write_saved(tmp_path)
      path = tmp_path / "train" / "data-00000-of-00001.arrow"
    else:
      data = write_parquet(tmp_path)
      path = tmp_path / "train-00000-of-00002.parquet"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" + content[9:]):
      path.write_bytes(damaged)
      with pytest.raises(ValueError, match="is damaged or no Parquet") as error:
        sources.open(data, "train")
      assert "\n" not in str(error.value)
      assert str(path) in str(error.value)

  def test_saved_folders(self, tmp_path):
    data = write_saved(tmp_path)
    with pytest.raises(ValueError, match=r"has \['test', 'train'\]"):
      sources.open(data, "valid")
    data.name += "/train"
    with pytest.raises(
      ValueError, match=r"one data set without splits.*'all\["
    ):
      sources.open(data, "train")
    state = tmp_path / "train" / "state.json"
    for about in (
      {"_data_files": [{"filename": "../x.arrow"}]},
      {"_data_files": []},
      {"_data_files": 3},
      {},
    ):
      state.write_text(json.dumps(about))
      with pytest.raises(ValueError, match=r"state\.json is damaged"):
        sources.open(data, "all")

  def test_no_room_for_a_copy(self, tmp_path, monkeypatch):
    data = write_parquet(tmp_path)
    monkeypatch.setattr(index, "_is_writable", lambda x: False)
    with pytest.raises(
      ValueError, match=r"can be written to.*compression='none'"
    ):
      sources.open(data, "train")


class TestBadArrays:
  @pytest.mark.parametrize(
    ("changes", "text"),
    [
      ({"train_images": np.array([{}] * 21)}, "holds object"),
      (
        {"train_images": np.zeros((21, 2, 2), np.float32)},
        "is float32 .*uint8",
      ),
      (
        {"train_images": np.zeros((21, 2, 2, 2), np.uint8)},
        "1, 3 or 4 channels",
      ),
      ({"train_labels": np.zeros(20, int)}, r"\(20,\), beside 21 samples"),
      ({"train_labels": np.zeros(21)}, "is float64"),
      ({"train_ids": np.array(["a"] * 21)}, "'a' of .* comes twice"),
      ({"train_ids": np.array(["a"])}, r"is \(1,\); expected \(21,\)"),
      ({"train_labels": np.arange(21)}, r"labels .* outside 0 \.\. 2"),
      (
        {
          "train_labels": np.zeros(0),
          "train_images": np.zeros((0, 2, 2), np.uint8),
        },
        "is float64",
      ),
    ],
  )
  def test_npz(self, tmp_path, changes, text):
    with pytest.raises(ValueError, match=text) as error:
      sources.open(write_npz(tmp_path, **changes)[0], "train")
    assert "\n" not in str(error.value)

  def test_npz_without_the_arrays_or_damaged(self, tmp_path, monkeypatch):
    data, _ = write_npz(tmp_path)
    with pytest.raises(
      ValueError, match=r"train_images uint8 \(21, 4, 5\), .*a"
    ):
      sources.open(data, "valid")
    monkeypatch.setattr(arrays_lib, "_MOST_BYTES", 100)
    path = tmp_path / "set.npz"
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"the limit is 100"):
      sources.open(data, "train")
    monkeypatch.undo()
    content = path.read_bytes()
    for damaged in (b"", content[:-300], b"x" * 100):
      path.write_bytes(damaged)
      with pytest.raises(ValueError, match="is damaged or no archive"):
        sources.open(data, "train")
    with pytest.raises(FileNotFoundError, match="and there is none"):
      sources.open(make_config(f"npz:{tmp_path}/none.npz"), "train")

  @pytest.mark.parametrize(
    ("rows", "labels", "text"),
    [
      (np.ones((3, 2), np.float32), np.zeros(4, int), r"\(4,\), beside 3 samp"),
      (np.ones((3, 2), np.float64), np.zeros(3, int), r"float64 \(3, 2\); exp"),
      (np.ones(3, np.float32), np.zeros(3, int), r"float32 \(3,\); expected"),
      (np.ones((0, 2), np.float32), np.zeros(0, int), r"float32 \(0, 2\); exp"),
      (np.array([[1], [np.nan]], np.float32), np.zeros(2, int), "is row 1"),
      (np.array([{}] * 2), np.zeros(2, int), "is damaged or no NumPy"),
      (np.ones((3, 2), np.float32), np.array([{}] * 3), "holds object"),
    ],
  )
  def test_features(self, tmp_path, rows, labels, text):
    np.save(tmp_path / "all.npy", rows)
    np.save(tmp_path / "all_labels.npy", labels)
    splits_ = {"train_split": "all", "test_split": "all"}
    data = make_config(f"features:{tmp_path}/all.npy", **splits_)
    with pytest.raises(ValueError, match=text) as error:
      sources.open(data, "all")
    assert "\n" not in str(error.value)

  def test_features_that_are_not_there(self, tmp_path):
    data = make_config(f"features:{tmp_path}/x.npy")
    with pytest.raises(FileNotFoundError, match="and there is none"):
      sources.open(data, "all")
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    with pytest.raises(
      ValueError, match=r"one set without splits; put {split}"
    ):
      sources.open(data, "train")
    data.train_split = data.test_split = "all"
    with pytest.raises(FileNotFoundError, match=r"no labels.*x_labels\.npy"):
      sources.open(data, "all")
    data.labels = "none.csv"
    with pytest.raises(FileNotFoundError, match=r"labels is 'none\.csv'"):
      sources.open(data, "all")

  def test_features_that_change_while_they_are_open(self, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    np.save(tmp_path / "x_labels.npy", [0, 1, 0])
    splits_ = {"train_split": "all", "test_split": "all"}
    data = make_config(f"features:{tmp_path}/x.npy", **splits_)
    source = sources.open(data, "all")
    first, written = source.fingerprint, pickle.dumps(source)
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(OSError, match="was changed after"):
      pickle.loads(written)
    assert sources.open(data, "all").fingerprint != first


class TestBadShards:
  def open(self, root, members, **changes):
    with tarfile.open(root / "train-0.tar", "w") as tar:
      for name, content in members:
        member = tarfile.TarInfo(name)
        if content is None:
          member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
          tar.addfile(member)
          continue
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    data = make_config(f"webdataset:{root}", test_split="train", **changes)
    return sources.open(data, "train")

  @pytest.mark.parametrize(
    ("members", "text"),
    [
      ([("a.png", b"x")], r"'a' has the files \['png'\]; expected one image"),
      ([("a.png", b"x"), ("b.cls", b"0")], r"'a' has the files"),
      (
        [("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")],
        "expected one image",
      ),
      ([("a.png", b"x"), ("a.cls", b"")], "class of sample 'a' is empty"),
      ([("a.png", b"x"), ("a.cls", b"0" * 2000)], "2000 bytes; the limit is"),
      ([("a.png", b"x"), ("a.json", b"{")], "json of sample .a. can't be read"),
      ([("a.png", b"x"), ("a.json", b"{}")], r"has \[\]; expected label or"),
      ([("a.png", b"x"), ("a.json", b'{"label": [1]}')], r"'a' is '\[1\]'"),
      ([("a.png", None), ("a.cls", b"0")], "'a.png' is a symbolic link"),
      ([("a.png", b"x"), ("a.cls", b"0")] * 2, "'a' has two|comes twice"),
      ([], "has no sample"),
    ],
  )
  def test_samples(self, tmp_path, members, text):
    with pytest.raises(ValueError, match=text) as error:
      self.open(tmp_path, members)
    assert "\n" not in str(error.value)

  def test_names_that_repeat_come_with_their_shard(self, tmp_path):
    members = [("0.png", b"x"), ("0.cls", b"0")]
    self.open(tmp_path, members)
    (tmp_path / "train-0.tar").rename(tmp_path / "train-1.tar")
    source = self.open(tmp_path, members)
    assert source.ids.tolist() == ["train-0/0", "train-1/0"]

  def test_damage(self, tmp_path):
    data = write_shards(tmp_path)
    path = tmp_path / "train-000.tar"
    content = path.read_bytes()
    for damaged in (b"", content[:3000], b"x" * 600 + content[600:]):
      path.write_bytes(damaged)
      with pytest.raises(ValueError, match="is damaged or no webdataset"):
        sources.open(data, "train")

  def test_braces_and_fields(self, tmp_path):
    data = write_shards(tmp_path)
    data.name = f"webdataset:{tmp_path}/{{split}}-{{000..001}}.tar"
    assert len(sources.open(data, "train")) == 21
    data.name = f"webdataset:{tmp_path}/{{split}}-{{000..002}}.tar"
    with pytest.raises(FileNotFoundError, match="1 of 3 shards are not there"):
      sources.open(data, "train")


class TestKinds:
  def test_of_a_set(self, tmp_path):
    data = make_config("x", source="csv")
    with pytest.raises(
      ValueError, match=r"config\.data\.source is 'csv'; expec"
    ):
      sources.open(data, "train")
    with pytest.raises(ValueError, match="expected a name or path after"):
      sources.open(make_config("folder:"), "train")
    with pytest.raises(ValueError, match="no data set named 'nothing:x'"):
      sources.open(make_config("nothing:x", data_dir=str(tmp_path)), "train")

  def test_a_slice_is_rounded_as_tfds_rounds_it(self):
    for text in ("a[:33%]", "a[33%:]", "a[-1:]", "a[2:5]", "a[10%:60%]"):
      for count in (7, 10, 37, 150):
        info = tfds.core.SplitInfo(
          name="a", shard_lengths=[count], num_bytes=0, filename_template=None
        )
        (own,) = splits.parse(text)
        read = tfds.core.ReadInstruction.from_spec(text)
        (theirs,) = read.to_absolute({"a": info})
        rows = list(range(count))[theirs.from_ : theirs.to]
        assert own.rows(count).tolist() == rows, (text, count)
