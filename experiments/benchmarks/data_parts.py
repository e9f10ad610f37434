"""The parts of the benchmark of data, each in a process of its own."""

import io
import json
import pathlib
import shutil
import sys
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
from PIL import Image

from configs import classification, report, select
from experiments.benchmarks import selection as selection_benchmark, timing
from experiments.data import decoding, sources, stream
from experiments.data.pairs import shard_files, shards
from experiments.reporting import page
from experiments.runtime import distributed
from experiments.selection import files
from experiments.tasks.classification import data as data_lib
from experiments.training import trainer

_CLASSES = 10
_TEST = 100  # files
_DISTINCT = 500  # pictures; other files have another comment
_READ_ROUND = 640  # images
_PAIRS, _SHARDS = 2000, 8  # image-text pairs, and their files
_PAIRS_READ = 2560


def make_files(folder: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
  """Makes JPEG files, smooth pictures with noise on top, in folders by class.

  Args:
    folder: of the benchmark.
    settings: the config's fields.

  Returns:
    The folder, with `train` and `test`.
  """
  root = pathlib.Path(folder, f"photos{settings['samples']}")
  done = root / "done"
  if done.exists():
    return root
  rng = np.random.default_rng(settings["seed"])
  shape = settings["height"], settings["width"]
  pictures = []
  for _ in range(min(_DISTINCT, settings["samples"])):
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = coarse.resize(shape[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) + rng.normal(0, 6, (*shape, 3))
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=settings["quality"])
    pictures.append(file.getvalue())
  for split, count in (("train", settings["samples"]), ("test", _TEST)):
    for label in range(_CLASSES):
      (root / split / f"class{label}").mkdir(parents=True, exist_ok=True)
    for row in range(count):
      comment = f"{split}{row:08d}".encode()
      marker = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment
      picture = pictures[row % len(pictures)]
      where = root / split / f"class{row % _CLASSES}" / f"{row:06d}.jpg"
      where.write_bytes(picture[:2] + marker + picture[2:])
  done.touch()
  return root


def make_config(settings: dict[str, Any], **overrides: Any) -> Any:
  """Makes the config of a run on the files: a small model, for one epoch."""
  config = classification.get_config().unlock()
  root = make_files(pathlib.Path(settings["folder"]), settings)
  config.update_from_flattened_dict(
    {
      "data.name": f"folder:{root}",
      "data.image_size": settings["image_size"],
      "data.flip": True,
      "data.workers": settings["workers"],
      "model.widths": (8,),
      "batch_size": settings["batch_size"],
      "eval_batch_size": settings["batch_size"],
      "num_epochs": 1,
      **overrides,
    }
  )
  return config.lock()


def first_step(settings: dict[str, Any]) -> dict[str, float]:
  """Counts CPU seconds until the first step is done, and memory."""
  started = time.process_time()
  found: dict[str, float] = {}
  config = make_config(
    settings, **{"num_epochs": 0, "num_steps": 1, "eval_every_epochs": 1}
  )
  plan = trainer.Run.plan

  def plan_watched(run, batch):
    call = plan(run, batch)

    def watched(*given):
      output = jax.block_until_ready(call.function(*given))
      found.setdefault("seconds", time.process_time() - started)
      found.setdefault("peak_gb", selection_benchmark._peak_bytes() / 1e9)
      return output

    return call._replace(function=watched)

  with mock.patch.object(trainer.Run, "plan", plan_watched):
    trainer.train_and_evaluate(config, _fresh(settings, "first_step"))
  return found


def epoch(settings: dict[str, Any]) -> dict[str, float]:
  """Trains an epoch on images that are decoded each time."""
  config = make_config(settings, **{"data.residence": "stream"})
  started = time.process_time()
  trainer.train_and_evaluate(config, _fresh(settings, "epoch"))
  seconds = time.process_time() - started
  return {
    "seconds": seconds,
    "peak_gb": selection_benchmark._peak_bytes() / 1e9,
  }


def scored(settings: dict[str, Any]) -> dict[str, Any]:
  """Trains with scores, for select and report."""
  config = make_config(settings, method="random")
  return trainer.train_and_evaluate(config, _fresh(settings, "scored"))


def select_part(settings: dict[str, Any]) -> dict[str, float]:
  """Selects from the run with scores."""
  config = select.get_config().unlock()
  config.run = str(pathlib.Path(settings["folder"], "scored"))
  return _counted(
    lambda: files.select_run(config.lock(), _fresh(settings, "selected"))
  )


def report_part(settings: dict[str, Any]) -> dict[str, float]:
  """Writes the page of the run with scores."""
  config = report.get_config().unlock()
  config.run = str(pathlib.Path(settings["folder"], "scored"))
  selected = pathlib.Path(settings["folder"], "selected")
  config.selection = str(selected / "selection.parquet")
  folder = _fresh(settings, "page")
  found = _counted(lambda: page.report_run(config.lock(), folder))
  text = (folder / page.REPORT_FILE).read_text()
  return {**found, "thumbnails": text.count("data:image/png;base64")}


def _counted(work):
  """Counts CPU seconds and decoded images of some work."""
  decode = decoding.Transform.decode
  with mock.patch.object(
    decoding.Transform, "decode", autospec=True, side_effect=decode
  ) as counter:
    started = time.process_time()
    work()
    seconds = time.process_time() - started
  return {"seconds": seconds, "decodes": counter.call_count}


def streamed(settings: dict[str, Any]) -> dict[str, Any]:
  """Reads batches in turn with a bare grain pipeline of the same transforms."""
  import grain

  config = make_config(settings, **{"data.residence": "stream"})
  source = sources.open(config.data, "train")
  images = data_lib.open_images(config, source)
  size, workers = settings["batch_size"], settings["workers"]
  ours = stream.train_batches(
    images, source.labels, batch_size=size, seed=0, workers=workers
  )

  def decode(row):
    (encoded,) = source.read([row])
    image = images.reader.transform.decode(encoded)
    return {"image": image, "label": source.labels[row], "index": row}

  bare = (
    grain.MapDataset.range(len(source)).shuffle(seed=0).repeat().map(decode)
  )
  bare = iter(
    bare.batch(size).to_iter_dataset(
      grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
    )
  )
  seconds: dict[str, list[list[float]]] = {"ours": [], "bare": []}
  for _ in range(settings["rounds"] + 1):
    for name, batches in (("ours", ours), ("bare", bare)):
      watch, cpu = timing.Watch(), time.process_time()
      for _ in range(_READ_ROUND // size):
        next(batches)
      seconds[name].append([watch.lap(), time.process_time() - cpu])
  ours.close()
  bare.close()
  kept = {name: np.array(found[1:]) for name, found in seconds.items()}
  return {
    "ratios": (kept["bare"][:, 0] / kept["ours"][:, 0]).tolist(),
    "cpu_ratios": (kept["bare"][:, 1] / kept["ours"][:, 1]).tolist(),
    "images_a_second": _READ_ROUND / float(np.median(kept["ours"][:, 0])),
  }


def memory(settings: dict[str, Any]) -> dict[str, float]:
  """Gathers batches of images that are decoded already."""
  size, count = settings["image_size"], min(settings["samples"], 2000)
  config = make_config(settings, **{"data.residence": "memory"})
  images = data_lib.open_images(config, sources.open(config.data, "train"))
  decoded = images._decoded
  decoded._there[:] = True
  decoded.samples[:count] = 1  # pages that are there
  batches = stream.train_batches(
    images,
    images.source.labels,
    batch_size=settings["batch_size"],
    seed=0,
    indices=np.arange(count),
    augmentation=stream.Augmentation(flip=True),
  )
  copy = np.empty((settings["batch_size"], size, size, 3), np.uint8)
  rates, copies = [], []
  for _ in range(settings["rounds"] + 1):
    since = time.process_time()
    for _ in range(20):
      next(batches)
    rates.append(20 * len(copy) / (time.process_time() - since))
    since = time.process_time()
    for start in range(0, 20 * len(copy), len(copy)):
      first = start % (count - len(copy))
      copy[:] = decoded.samples[first : first + len(copy)]
    copies.append(20 * len(copy) / (time.process_time() - since))
  return {  # by CPU seconds; copies in a row are the machine's own limit
    "images_a_second": float(np.median(rates[1:])),
    "copies_a_second": float(np.median(copies[1:])),
  }


def two(settings: dict[str, Any]) -> dict[str, float]:
  """Trains an epoch by one of two processes; counts what it decodes."""
  read: set[int] = set()
  whole = decoding.Reader.read

  def counted(reader, positions, *given):
    if reader.source.split == "train":
      read.update(np.asarray(positions).tolist())
    return whole(reader, positions, *given)

  config = make_config(settings, **{"data.residence": "stream"})
  folder = pathlib.Path(settings["folder"], "two")
  with mock.patch.object(decoding.Reader, "read", counted):
    trainer.train_and_evaluate(config, folder)
  return {"share": len(read) / settings["samples"]}


def pairs(settings: dict[str, Any]) -> dict[str, Any]:
  """Reads image-text pairs by processes; counts this thread's CPU time."""
  folder = pathlib.Path(settings["folder"], "pairs")
  root = make_files(pathlib.Path(settings["folder"]), settings)
  if not folder.exists():
    files = sorted((root / "train").rglob("*.jpg"))[:_PAIRS]
    shard_files.write(
      folder,
      (np.asarray(Image.open(file)) for file in files),
      [f"the picture {file.stem}" for file in files],
      [f"{int(file.stem):032x}" for file in files],
      samples_per_shard=len(files) // _SHARDS,
    )
  found: dict[str, Any] = {}
  for readers in (0, 1, settings["workers"]):
    batches = iter(
      shards.ShardStream(
        folder,
        tokenizer=lambda texts: np.zeros((len(texts), 77), np.int32),
        batch_size=settings["batch_size"],
        image_size=settings["image_size"],
        seed=0,
        num_threads=1,
        readers=readers,
      )
    )
    for _ in range(2 * max(readers, 1)):  # those that were made ahead
      next(batches)
    watch, cpu = timing.Watch(), time.thread_time()
    for _ in range(_PAIRS_READ // settings["batch_size"]):
      next(batches)
    found[str(readers)] = {
      "milliseconds": 1000 * (time.thread_time() - cpu) / _PAIRS_READ,
      "images_a_second": _PAIRS_READ / watch.lap(),
    }
    batches.close()
  return {**found[str(settings["workers"])], "readers": found}


_PARTS = {
  "pairs": pairs,
  "first_step": first_step,
  "epoch": epoch,
  "scored": scored,
  "select": select_part,
  "report": report_part,
  "streamed": streamed,
  "memory": memory,
  "two": two,
}


def answer() -> None:
  """Measures the part that the command line asks for; prints what was found."""
  settings = json.loads(sys.argv[1])
  port, count, number = settings["process"]
  if count > 1:
    distributed.start(
      coordinator=f"localhost:{port}", num_processes=count, process_id=number
    )
  print(json.dumps(_PARTS[settings["part"]](settings)))


def _fresh(settings, name) -> pathlib.Path:
  folder = pathlib.Path(settings["folder"], name)
  shutil.rmtree(folder, ignore_errors=True)
  return folder
