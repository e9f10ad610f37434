"""Benchmark: memory and communication of a step on the devices of a pod.

python -m experiments.benchmark --config=configs/benchmark/pod.py \
  --workdir=runs/pod

Compiles steps for devices that are not there. Prints tables; leaves `pod.json`
and `pod.md`. It takes half an hour on 2 CPU cores that other jobs hold too;
`--config.cases="()"` leaves the larger models out.
"""

from ml_collections import config_dict

from configs import base, classification, contrastive

# Every case is model/batch/devices/fsdp/step/layers/weighting: the batch is
# that of all devices, fsdp of which share one copy of the parameters. Steps are
# "plain", "forward", "per_sample", "streaming" (one sample at a time on each
# device) and "streaming_mesh" (with jax.set_mesh around it); layers "head",
# "last_mlp" and "all".
_CASES = (
  "vit_tiny/64/8/1/streaming/all/softmax",
  "vit_l_2/512/64/1/plain/all/softmax",
  "vit_l_2/512/64/1/forward/last_mlp/softmax",
  "vit_l_2/512/64/1/forward/all/softmax",
  "vit_l_2/512/64/1/per_sample/all/softmax",
  "vit_l_2/512/64/1/streaming/all/softmax",
  "vit_l_2/512/64/1/streaming_mesh/all/softmax",
  "vit_l_2/512/64/8/plain/all/softmax",
  "vit_l_2/512/64/8/forward/last_mlp/softmax",
  "vit_l_2/512/64/8/forward/all/softmax",
  "clip_b_2/512/64/1/plain/all/softmax",
  "clip_b_2/512/64/1/forward/all/softmax",
  "clip_b_2_remat/512/64/1/forward/all/softmax",
)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """Every field of the job; takes no argument."""
  base.parse_arg(arg)
  config = config_dict.ConfigDict()
  config.benchmark = "pod"
  # What is compiled for: "host" (virtual CPU devices), or with libtpu installed
  # "v5e", "v6e" or "v5p".
  config.target = "host"

  # Communication: the same step on more and more devices.
  config.scaling = config_dict.ConfigDict()
  config.scaling.models = ("vit_tiny", "clip_tiny")
  config.scaling.devices = (8, 64, 256)
  config.scaling.rows = 8  # samples of each device
  config.scaling.steps = ("forward", "per_sample", "streaming_mesh")
  config.scaling.weightings = ("softmax", "ess_softmax")

  # What devices hold and send, of any of the models below.
  config.cases = _CASES

  large = {"patch_size": 16, "width": 1024, "heads": 16}
  config.vit_l = _vit(224, 1000, depth=24, dtype="bfloat16", **large)
  # Two blocks of it. Activations in float32: CPUs have no other arithmetic.
  config.vit_l_2 = _vit(224, 1000, depth=2, **large)
  config.vit_tiny = _vit(32, 10, patch_size=8, width=64, depth=1, heads=2)
  config.clip_b = _clip(224, "B/16", dtype="bfloat16")
  config.clip_b_remat = _clip(224, "B/16", dtype="bfloat16", remat=True)
  two = {"image_depth": 2, "text_depth": 2}
  config.clip_b_2 = _clip(224, "B/16", **two)
  config.clip_b_2_remat = _clip(224, "B/16", remat=True, **two)
  config.clip_tiny = _clip(32, "tiny", image_depth=2, text_depth=1)
  return config.lock()


def _vit(image_size, num_classes, dtype="float32", **sizes):
  config = config_dict.ConfigDict()
  config.name = "vit"
  config.image_size = image_size  # pixels, both sides
  config.num_classes = num_classes
  config.dtype = dtype
  config.vit = classification.vit()
  config.vit.update(sizes)
  config.vit.mlp_width = 4 * config.vit.width
  return config


def _clip(image_size, size, dtype="float32", **fields):
  config = config_dict.ConfigDict()
  config.name = "clip"
  config.image_size = image_size
  config.size = size
  config.dtype = dtype
  clip = contrastive.get_config().model.clip
  config.clip = clip.copy_and_resolve_references().unlock()
  config.clip.update(fields)
  return config
