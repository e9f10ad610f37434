"""DataComp's training, with Grad-Mimic as published, ready for a pod.

python -m experiments.train --config=configs/datacomp.py:scale=small \
  --config.data.shards="('shards/{00000000..00001287}.tar',)" \
  --config.data.tokenizer=hf://openai/clip-vit-base-patch32 \
  --config.mimic.reference=hf://openai/clip-vit-base-patch32 \
  --config.model.clip.activation=quick_gelu --distributed \
  --workdir=runs/datacomp_small

ViT-B/32 at 224 pixels and the hyper-parameters of DataComp's own code. As
published, the learner goes toward the weights of public CLIP, with the last MLP
of the image encoder as its mimic layer, at temperature .05 (they tried .03 to
.5). A learner from scratch is not in the basin of those weights: the check
before the first step says so and stops the run. `--config.mimic.force=true`
does as published all the same; `method=output_agreement` goes by the
similarities that the reference finds, pair by pair, which need no common basin.

`method=sgd` is the plain run to compare with, `--config.data.filter=subset.npy`
trains on a subset file, and `experiments.select` makes such files of a run's
ledger.
"""

from ml_collections import config_dict

from configs import base, contrastive

# Samples seen, of as many pairs in the pool.
_SCALES = {"small": 12_800_000, "medium": 128_000_000}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """One run's config.

  Arguments are `scale` ("small", "medium"), `method`, `layers`, `direction`
  ("weights", "outputs") and `temperature`.

  Raises:
    ValueError: an unknown argument or scale.
  """
  values = base.parse_arg(
    arg,
    scale=tuple(_SCALES),
    method="grad_mimic",
    layers="image_last_mlp",
    direction="weights",
    temperature=0.05,
  )
  config = contrastive.get_config().unlock()
  config.update_from_flattened_dict(
    {
      "num_samples": _SCALES[values["scale"]],
      "batch_size": 4096,
      "eval_every_steps": 250,
      "eval_batch_size": 1000,
      "data.name": "shards",
      "data.tokenizer": "tokenizer.json",
      "data.image_size": 224,
      # CLIP's own, of all its public weights.
      "data.mean": (0.48145466, 0.4578275, 0.40821073),
      "data.std": (0.26862954, 0.26130258, 0.27577711),
      "data.held_out_size": 5000,
      "data.zero_shot_size": 10_000,
      "data.window": 16_384,
      "data.readers": 8,
      "data.num_threads": 4,
      "model.size": "B/32",
      "model.dtype": "bfloat16",
      "optimizer.learning_rate": 5e-4,
      "optimizer.warmup_steps": 500,
      "optimizer.weight_decay": 0.2,
      "optimizer.b1": 0.9,
      "optimizer.b2": 0.98,
      "optimizer.epsilon": 1e-6,
      "optimizer.schedule": "cosine",
      "method": values["method"],
      "mimic.direction": values["direction"],
      "mimic.layers": values["layers"],
      "mimic.weighting": "softmax",
      "mimic.temperature": values["temperature"],
      "checkpoint.every_steps": 500,
    }
  )
  return config.lock()
