"""Batches: what is in them, their order, their resume, wherever images live."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.data import decoding, purposes, statistics, store, stream
from experiments.runtime import distributed
from experiments.tasks.classification import inputs
from tests.experiments.data.source_case import (
  Handmade,
  encode,
  open_images,
  photos,
)

NUM = 53
LABELS = np.random.default_rng(1).integers(0, 10, NUM)
# Each image tells by its pixels which one it is, and which way round.
IMAGES = np.zeros((NUM, 2, 3, 3), np.uint8)
IMAGES[:, :, 0] = np.arange(NUM)[:, None, None]
IMAGES[:, :, 2] = 200
SOURCE = Handmade(list(IMAGES), LABELS, shape=(2, 3, 3))
FLIP = stream.Augmentation(flip=True)
FILES, FILE_LABELS = photos(23, kind="PNG")
PHOTOS = Handmade(FILES, FILE_LABELS)


def batches(source=SOURCE, labels=LABELS, *, images=None, **options):
  options = {"batch_size": 8, "seed": 0, "num_epochs": 3, **options}
  images = images or open_images(source, residence="stream")
  return stream.train_batches(images, labels, **options)


def see(batch, images=None, mean=(0.0,), std=(1.0,)):
  """The batch as a model sees it."""
  shown = {key: batch[key] for key in inputs.SEEN if key in batch}
  resident = None if images is None else images.resident
  return jax.device_get(inputs.make_expand(mean, std)(shown, resident))


def assert_same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_no_two_draws_share_a_stream():
  numbers = [n for name, n in vars(purposes).items() if name.isupper()]
  assert len(numbers) >= 5
  assert len(set(numbers)) == len(numbers)


class TestTrainBatches:
  def test_each_epoch_covers_every_sample_once_in_an_order_of_its_own(self):
    steps = stream.steps_per_epoch(NUM, 8)
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

  def test_the_order_is_the_one_of_seed_and_epoch(self):
    taken = np.concatenate([batch["index"] for batch in batches(seed=7)])
    for epoch in range(3):
      order = np.random.default_rng((7, purposes.ORDER, epoch)).permutation(NUM)
      np.testing.assert_array_equal(taken[56 * epoch :][:NUM], order)

  def test_rows_belong_together(self):
    for batch in batches():
      real, index = batch["mask"], batch["index"]
      assert {key: value.dtype for key, value in batch.items()} == {
        "image": np.uint8,
        "label": np.int32,
        "index": np.int32,
        "mask": np.bool_,
        "batch_index": np.int32,
      }
      assert batch["image"].shape == (8, 2, 3, 3)
      np.testing.assert_array_equal(batch["label"][real], LABELS[index[real]])
      np.testing.assert_array_equal(batch["image"][real], IMAGES[index[real]])
      np.testing.assert_array_equal(batch["batch_index"], index)

  def test_padding_repeats_a_real_row(self):
    last = list(batches(num_epochs=1))[-1]
    assert last["mask"].tolist() == [True] * 5 + [False] * 3
    for row in (5, 6, 7):
      np.testing.assert_array_equal(last["image"][row], last["image"][0])
      assert last["label"][row] == last["label"][0]

  def test_seed_decides(self):
    assert_same(list(batches(seed=1)), list(batches(seed=1)))
    orders = set()
    for seed in (0, 1, 2):
      taken = [batch["index"] for batch in batches(seed=seed)]
      for start in (0, 7, 14):
        orders.add(tuple(np.concatenate(taken[start : start + 7])))
    # No epoch of one seed is an epoch of another.
    assert len(orders) == 9

  @pytest.mark.parametrize("workers", [0, 2])
  def test_endless_without_a_number_of_epochs(self, workers):
    iterator = batches(num_epochs=None, workers=workers)
    seen = [next(iterator)["index"] for _ in range(40)]
    iterator.close()
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
    flipped = list(batches(num_epochs=20, augmentation=FLIP))
    assert "flipped" not in plain[0]
    turned = []
    for one, other in zip(plain, flipped, strict=True):
      np.testing.assert_array_equal(one["index"], other["index"])
      upright, seen = see(one)["image"], see(other)["image"]
      # Mirrored images have the bright column first.
      first, last = seen[:, 0, 0, 0], seen[:, 0, -1, 0]
      np.testing.assert_array_equal(other["flipped"], first > last)
      same = (upright == seen).all((1, 2, 3))
      mirrored = (upright[:, :, ::-1] == seen).all((1, 2, 3))
      assert (same ^ mirrored).all()
      turned += mirrored.tolist()
    assert 0.45 < np.mean(turned) < 0.55

  def test_later_changes_of_the_labels_do_not_reach_the_batches(self):
    labels = LABELS.copy()
    iterator = batches(labels=labels)
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
      ({"labels": LABELS[1:]}, ValueError, r"\(53,\), got \(52,\)"),
      ({"labels": LABELS * 0.5}, TypeError, "integers, got float64"),
      ({"workers": -1}, ValueError, "workers must not be negative"),
      ({"process": (2, 2)}, ValueError, "process is 2 of 2 for batches of 8"),
      ({"process": (0, 3)}, ValueError, "process is 0 of 3 for batches of 8"),
    ],
  )
  def test_bad_values(self, options, error, text):
    with pytest.raises(error, match=text):
      batches(**options)

  def test_a_place_that_is_not_there_is_refused(self):
    with pytest.raises(ValueError, match="step 22 of 21"):
      batches().set_state({"step": 22})


class TestInputs:
  def test_normalise_by_channel(self):
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    (batch,) = batches(batch_size=NUM, num_epochs=1)
    expected = (IMAGES[batch["index"]] / 255 - mean) / std
    seen = see(batch, mean=mean, std=std)["image"]
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)

  def test_an_expanded_batch_and_features_stay_as_they_are(self):
    once = see(next(batches(augmentation=FLIP)), mean=(0.5,), std=(0.2,))
    again = see(once, mean=(0.5,), std=(0.2,))
    np.testing.assert_array_equal(once["image"], again["image"])

  def test_bad_scaling(self):
    with pytest.raises(ValueError, match="std must be positive"):
      inputs.check_scaling([0.0], [0.0], 3)
    with pytest.raises(ValueError, match="mean must be one number or one per"):
      inputs.check_scaling([0.5, 0.5], [1.0], 3)


def brute_force(step, seed, scale):
  """A batch of crops of PHOTOS by Pillow, in float64, one row at a time."""
  steps, rows = 3, []
  order = np.random.default_rng((seed, purposes.ORDER, step // steps))
  order = order.permutation(23)[step % steps * 8 :][:8]
  flips = np.random.default_rng((seed, purposes.FLIP, step)).random(8) < 0.5
  draws = np.random.default_rng((seed, purposes.CROP, step)).random((8, 10, 4))
  for row, at in enumerate(order):
    pixels = Image.fromarray(decoding.Transform(3).decode(FILES[at]))
    box = decoding.random_box(pixels.size, draws[row], scale)
    pixels = np.asarray(pixels.resize((9, 9), Image.Resampling.BILINEAR, box))
    pixels = pixels[:, ::-1] if flips[row] else pixels
    rows.append((pixels / 255 - 0.4) / 0.3)
  return np.stack(rows), order


def test_random_crops_are_those_of_seed_and_step():
  crops = stream.Augmentation(flip=True, crop_scale=(0.1, 0.9))
  images = open_images(PHOTOS, size=9, random_crop=True)
  assert images.residence == "stream"
  taken = list(
    batches(labels=FILE_LABELS, images=images, seed=5, augmentation=crops)
  )
  for step in (0, 1, 4, 8):
    expected, order = brute_force(step, 5, (0.1, 0.9))
    seen = see(taken[step], mean=(0.4,), std=(0.3,))
    np.testing.assert_array_equal(taken[step]["index"][: len(order)], order)
    real = seen["image"][: len(order)]
    np.testing.assert_allclose(real, expected, rtol=1e-5, atol=1e-5)
  # Padding is cropped as the row that it repeats.
  last = taken[2]["image"]
  np.testing.assert_array_equal(last[7], last[0])


@pytest.mark.parametrize("residence", store.RESIDENCES)
class TestResidences:
  """The same batches, wherever images live and whoever makes them."""

  def make(self, residence, **options):
    images = open_images(PHOTOS, size=9, residence=residence, threads=2)
    crops = options.pop("crops", FLIP)
    if residence == "stream":  # which alone has them
      images = open_images(PHOTOS, size=9, random_crop=True)
    else:
      crops = FLIP
    made = batches(
      labels=FILE_LABELS,
      images=images,
      num_epochs=2,
      augmentation=crops,
      **options,
    )
    return made, images

  def test_show_what_is_decoded_each_time(self, residence):
    made, images = self.make(residence)
    plain, _ = self.make("stream")
    assert images.residence == residence
    for batch, expected in zip(made, plain, strict=True):
      assert ("row" in batch) == (residence == "device")
      shown, wanted = see(batch, images), see(expected)
      assert shown.keys() == wanted.keys()
      for key in shown:
        np.testing.assert_array_equal(shown[key], wanted[key])

  @pytest.mark.parametrize("workers", [0, 2])
  def test_resume_from_every_state(self, residence, workers):
    crops = stream.Augmentation(flip=True, crop_scale=(0.3, 1.0))
    made, _ = self.make(residence, crops=crops)
    whole = list(made)
    made, _ = self.make(residence, crops=crops, workers=workers)
    for step in range(len(whole) + 1):
      state = json.loads(json.dumps(made.get_state()))
      resumed, _ = self.make(residence, crops=crops, workers=workers)
      resumed.set_state(state)
      assert_same(list(resumed), whole[step:])
      resumed.close()
      next(made, None)
    made.close()

  @pytest.mark.parametrize("count", [2, 4])
  def test_processes_share_the_batches_of_one(self, residence, count):
    crops = stream.Augmentation(flip=True, crop_scale=(0.3, 1.0))
    (whole, _), *parts = (
      self.make(residence, crops=crops, process=process)
      for process in ((0, 1), *((number, count) for number in range(count)))
    )
    for batch, *theirs in zip(whole, *(one for one, _ in parts), strict=True):
      for part in theirs:
        np.testing.assert_array_equal(
          part.pop("batch_index"), batch["batch_index"]
        )
      for key in theirs[0]:
        np.testing.assert_array_equal(
          batch[key], np.concatenate([part[key] for part in theirs])
        )
    # Nothing of a state depends on who has it.
    assert len({json.dumps(one.get_state()) for one, _ in parts}) == 1


class TestSharesOfTheSet:
  def test_a_process_reads_its_own_rows_alone(self):
    read = []

    class Counted(Handmade):
      def read(self, positions):
        read.extend(positions)
        return super().read(positions)

    source = Counted(list(IMAGES), LABELS, shape=(2, 3, 3))
    made = batches(source, num_epochs=1, process=(1, 2))
    own = np.concatenate([batch["index"] for batch in made])
    # One more where padding repeats another's row.
    assert set(own[own >= 0]) <= set(read)
    assert len(read) <= (own >= 0).sum() + 1
    assert len(read) <= 0.52 * NUM

  def test_memory_decodes_each_once_and_only_what_was_asked_for(self):
    source = Handmade(FILES, FILE_LABELS)
    source.fingerprint = "another"
    images = open_images(source, size=9, residence="memory")
    iterator = batches(labels=FILE_LABELS, images=images, num_epochs=None)
    first = next(iterator)["image"].copy()
    assert images._decoded._there.sum() == 8
    for _ in range(2):
      next(iterator)
    source.samples = None  # Nothing is left to read.
    iterator.set_state({"step": 0})
    np.testing.assert_array_equal(next(iterator)["image"], first)

  def test_a_mesh_shares_what_no_device_could_hold(self, monkeypatch):
    source = Handmade(list(IMAGES), LABELS, shape=(2, 3, 3))
    devices = distributed.Devices({"data": -1, "fsdp": 1}, batch_size=8)
    for room, rows in ((NUM * 18, 56), (NUM * 9, 7)):
      source.fingerprint = f"room {room}"
      monkeypatch.setattr(store, "CPU_BYTES", room)
      images = open_images(source, devices=devices)
      assert images.residence == "device"
      assert images.resident.sharding.shard_shape((56, 2, 3, 3))[0] == rows
      for batch in batches(images=images, augmentation=FLIP, num_epochs=1):
        shown = {key: batch[key] for key in inputs.SEEN if key in batch}
        expand = jax.jit(inputs.make_expand((0.0,), (1 / 255,)))
        seen = expand(devices.put(shown), images.resident)["image"]
        wanted = IMAGES[batch["row"]]
        mirrored = batch["flipped"]
        wanted[mirrored] = wanted[mirrored][:, :, ::-1]
        np.testing.assert_array_equal(np.rint(seen), wanted)

  def test_sizes_choose_and_the_config_overrides(self, monkeypatch):
    monkeypatch.setattr(store, "CPU_BYTES", NUM * 18)
    assert open_images(SOURCE).residence == "device"
    monkeypatch.setattr(store, "CPU_BYTES", NUM * 18 - 1)
    assert open_images(SOURCE).residence == "memory"
    monkeypatch.setattr(store, "host_bytes", lambda: 1000)
    assert open_images(SOURCE).residence == "stream"
    for residence in store.RESIDENCES:
      assert open_images(SOURCE, residence=residence).residence == residence
    assert open_images(SOURCE, random_crop=True).residence == "stream"
    with pytest.raises(ValueError, match="crops are taken from images as they"):
      open_images(SOURCE, residence="memory", random_crop=True)
    with pytest.raises(ValueError, match="expected 'auto' or one of device"):
      open_images(SOURCE, residence="disk")

  def test_images_of_several_sizes_are_refused(self):
    images = open_images(PHOTOS, residence="stream")
    with pytest.raises(ValueError, match="vary in size: sample 0 is"):
      list(batches(labels=FILE_LABELS, images=images))


class TestFeatures:
  def test_are_what_is_stored(self):
    vectors = np.random.default_rng(0).normal(size=(NUM, 5)).astype(np.float32)
    source = Handmade(list(vectors), LABELS, channels=None, shape=(5,))
    for residence in store.RESIDENCES:
      images = open_images(source, residence=residence)
      for batch in batches(images=images, num_epochs=1):
        seen = see(batch, images)["image"]
        assert seen.dtype == np.float32
        real = batch["mask"]
        np.testing.assert_array_equal(seen[real], vectors[batch["index"][real]])


class TestBadImages:
  FILES = tuple(encode(image) for image in IMAGES)
  BAD = (3, 17, 18, 44)

  def make(self, residence="stream", share=0.1, **options):
    files = list(self.FILES)
    for at in self.BAD:
      files[at] = files[at][:50]
    source = Handmade(files, LABELS, shape=(2, 3, 3))
    images = open_images(source, residence=residence, bad_share=share)
    return batches(images=images, **options), images

  @pytest.mark.parametrize("residence", store.RESIDENCES)
  def test_are_masked_and_listed(self, residence):
    made, images = self.make(residence, num_epochs=1)
    plain = list(batches(num_epochs=1))
    for batch, whole in zip(made, plain, strict=True):
      lost = np.isin(whole["index"], self.BAD)
      np.testing.assert_array_equal(
        batch["index"], np.where(lost, -1, whole["index"])
      )
      np.testing.assert_array_equal(batch["mask"], whole["mask"] & ~lost)
      np.testing.assert_array_equal(batch["batch_index"], whole["index"])
      seen = see(batch, images)["image"]
      good = batch["mask"]
      np.testing.assert_array_equal(
        seen[good], IMAGES[batch["index"][good]] * np.float32(1 / 255)
      )
      np.testing.assert_array_equal(seen[lost], 0)
    assert sorted(images.bad.found) == list(self.BAD)
    assert list(images.bad.listed()) == [f"id{at}" for at in self.BAD]
    assert "not readable" in images.bad.listed()["id17"]

  @pytest.mark.parametrize("residence", ["memory", "stream"])
  def test_are_the_same_for_two_processes_and_with_workers(self, residence):
    whole, _ = self.make(residence)
    parts = [
      self.make(residence, process=(number, 2), workers=2)[0]
      for number in (0, 1)
    ]
    for batch, *theirs in zip(whole, *parts, strict=True):
      for key in ("index", "mask", "image"):
        np.testing.assert_array_equal(
          batch[key], np.concatenate([part[key] for part in theirs])
        )
    for part in parts:
      part.close()

  @pytest.mark.parametrize("residence", store.RESIDENCES)
  def test_too_many_are_an_error_with_their_names(self, residence):
    made, images = self.make(residence, share=0.07)
    with pytest.raises(store.BadImagesError) as caught:
      list(made if residence != "device" else images.resident)
    text = str(caught.value)
    assert "4 of 53 images of handmade train in memory can't be used" in text
    assert "'id17' (image not readable: " in text
    assert "at most a share of 0.07 (config.faults.bad_images)" in text
    with pytest.raises(ValueError, match="expected a share, 0 to 1"):
      self.make(share=2)

  def test_do_not_count_in_mean_and_deviation(self):
    _, images = self.make()
    good = np.delete(IMAGES, self.BAD, axis=0).reshape(-1, 3) / 255
    mean, std = statistics.measure(
      images, samples=1, devices=distributed.Devices.alone()
    )
    np.testing.assert_allclose(mean, good.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum(good.std(axis=0), 1e-3))


class TestStatistics:
  ALONE = distributed.Devices.alone()

  @pytest.mark.parametrize("residence", store.RESIDENCES)
  def test_are_those_of_all_pixels_of_a_small_set(self, residence):
    images = open_images(PHOTOS, size=9, residence=residence)
    pixels, _ = images.reader.read(np.arange(23))
    pixels = pixels.reshape(-1, 3) / 255
    mean, std = statistics.measure(images, samples=1, devices=self.ALONE)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-12)

  def test_of_a_larger_set_are_those_of_a_sample_that_processes_share(
    self, monkeypatch
  ):
    monkeypatch.setattr(statistics, "WHOLE", 100)
    images = open_images(PHOTOS, size=9, residence="stream")
    pixels, _ = images.reader.read(np.arange(7) * 23 // 7)
    mean, _ = statistics.measure(images, samples=7, devices=self.ALONE)
    wanted = pixels.reshape(-1, 3).mean(axis=0) / 255
    np.testing.assert_allclose(mean, wanted, rtol=1e-12)
    whole = statistics._sample(images, 7, range(23))
    parts = [
      statistics._sample(images, 7, part) for part in (range(12), range(12, 23))
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert max(map(len, parts)) <= 4

  def test_a_constant_channel_has_some_deviation(self):
    images = open_images(SOURCE, residence="stream")
    _, std = statistics.measure(images, samples=9, devices=self.ALONE)
    assert min(std) >= 1e-3
    assert math.isfinite(max(std))
    with pytest.raises(ValueError, match="expected at least 1"):
      statistics.measure(images, samples=0, devices=self.ALONE)


class TestEvalBatches:
  IMAGES = open_images(SOURCE, residence="stream")

  def test_goes_over_all_in_order(self):
    taken = list(stream.eval_batches(self.IMAGES, LABELS, batch_size=8))
    assert len(taken) == 7
    index = np.concatenate([batch["index"] for batch in taken])
    np.testing.assert_array_equal(index, [*range(NUM), -1, -1, -1])
    mask = np.concatenate([batch["mask"] for batch in taken])
    np.testing.assert_array_equal(mask, index >= 0)

  def test_subset_in_the_given_order(self):
    (batch,) = stream.eval_batches(
      self.IMAGES, LABELS, batch_size=4, indices=[9, 2, 5]
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
      {"augmentation": FLIP},
      {"augmentation": stream.Augmentation(crop_scale=(0.1, 1.0))},
      {"transform": decoding.Transform(3, 8)},
      {"transform": decoding.Transform(3, 8, "squeeze")},
      {"mean": 0.5},
      {"std": (0.5, 0.5, 0.4)},
    ]
    prints = []
    for change in changes:
      options = {**plain, **change}
      prints.append(
        stream.fingerprint(
          options.pop("source"), options.pop("labels"), **options
        )
      )
    assert len(set(prints)) == len(changes)

  def test_does_not_depend_on_how_the_same_is_said(self):
    one = stream.fingerprint("a", LABELS, batch_size=8, seed=0)
    other = stream.fingerprint(
      "a",
      LABELS.astype(np.int32).tolist(),
      batch_size=np.int64(8),
      seed=0,
      indices=list(range(NUM)),
      mean=[0],
      std=1,
    )
    assert one == other
