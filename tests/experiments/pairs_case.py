"""Tiny configs of image-text pairs, in memory and in shards."""

from configs import datacomp, shapes as shapes_config
from experiments.data.pairs import shapes, shard_files

TINY = {
  "batch_size": 16,
  "num_samples": 64,
  "eval_every_steps": 2,
  "eval_batch_size": 16,
  "mesh.data": 1,
  "model.size": "tiny",
  "model.clip.image_width": 16,
  "model.clip.text_width": 16,
  "model.clip.image_depth": 1,
  "model.clip.text_depth": 1,
  "model.clip.image_heads": 2,
  "model.clip.text_heads": 2,
  "model.clip.embed_width": 16,
  "data.image_size": 16,
  "data.held_out_size": 16,
  "data.zero_shot_size": 48,
  "checkpoint.every_steps": 2,
}


def make(config, **overrides):
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict({**TINY, **overrides})
  return config.lock()


def on_shapes(arg="", **overrides):
  config = shapes_config.get_config(arg)
  return make(config, **{"data.train_size": 48, **overrides})


def write_shards(folder):
  """Four shards of 24 pairs; one image is no image."""
  pairs = shapes.load("train", size=96, seed=0, image_size=16)
  shard_files.write(
    folder,
    pairs.images,
    pairs.captions.tolist(),
    pairs.uids.tolist(),
    samples_per_shard=24,
    image_format="png",
  )
  first = folder / "00000000.tar"
  content = first.read_bytes()
  assert content.count(b"\x89PNG") == 24
  first.write_bytes(content.replace(b"\x89PNG", b"!PNG", 1))
  return folder


def on_shards(folder, **overrides):
  return make(
    datacomp.get_config("scale=small,method=rho"),
    **{
      "num_samples": 32,
      "data.shards": (str(folder),),
      "data.held_out_shards": (str(folder / "00000003.tar"),),
      "data.tokenizer": "shapes",
      "data.window": 16,
      "data.num_threads": 0,
      "data.readers": 0,
      "data.max_broken_share": 0.2,
      "model.dtype": "float32",
      **overrides,
    },
  )
