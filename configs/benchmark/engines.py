"""Benchmark: the cost of a mimic step, relative to the model's plain step.

python -m experiments.benchmark --config=configs/benchmark/engines.py \
  --workdir=runs/engines

Prints a table; leaves `engines.json` and figures. It takes six to seven
minutes on 2 CPU cores, which should have nothing else to do. On an accelerator,
`configs/benchmark/engines.py:sizes=accelerator` measures a ViT-B/16 at 224
pixels and a decoder of its size, both in bfloat16, and nothing else.
"""

from ml_collections import config_dict

from configs import base, classification, language


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """Every field; `sizes` is "cpu", or "accelerator" for two larger models.

  Raises:
    ValueError: an unknown argument or sizes.
  """
  sizes = base.parse_arg(arg, sizes=("cpu", "accelerator"))["sizes"]
  config = config_dict.ConfigDict()
  config.benchmark = "engines"
  config.device = ""  # "cpu", "gpu", "tpu"; "" is JAX's default
  # jax_default_matmul_precision, such as "highest"; None is the backend's own
  # (which may be less than float32: it shows in the errors).
  config.matmul_precision = config_dict.placeholder(str)
  config.seed = 0  # of parameters and batches
  # Which of the sections below.
  config.models = ("vit_small", "mlp", "probe")
  # "head", "last_mlp" (of the last block), "last_quarter" and "last_half" of
  # the blocks with the head, "all".
  config.layers = ("head", "last_mlp", "all")
  # "streaming_8" is the per-sample engine in microbatches of 8, "ghost_8" the
  # ghost engine; "optax" the optax transformation, fed by vmap(value_and_grad);
  # "outputs" the forward engine toward a reference's stored outputs, where the
  # others go toward weights.
  config.engines = (
    "forward",
    "per_sample",
    "streaming_8",
    "ghost",
    "auto",
    "optax",
    "outputs",
  )
  # Cases such as "all/forward" of which a profile is written to
  # `profiles/MODEL/BATCH/...`, for TensorBoard or XProf.
  config.profiles = ()

  # Batches up to this size are compared with float64, which is slow.
  config.largest_compared = 32

  config.timing = config_dict.ConfigDict()
  # Pairs (plain step, mimic step) are timed until both are reached.
  config.timing.pairs = 2
  config.timing.seconds = 0.3
  # Steps shorter than this are timed several in a row.
  config.timing.shortest = 0.005

  config.vit_small = _model("vit", input_shape=(32, 32, 3))
  config.mlp = _model("mlp", input_shape=(8, 8, 1))
  config.probe = _model("mlp", input_shape=(1, 1, 768))
  config.probe.widths = ()  # nothing but a head on features
  config.vit_b16 = _model("vit", input_shape=(224, 224, 3))
  config.vit_b16.num_classes = 1000
  config.vit_b16.batch_sizes = (64, 256)
  config.vit_b16.vit.patch_size = 16
  config.vit_b16.vit.width = 768
  config.vit_b16.vit.depth = 12
  config.vit_b16.vit.heads = 12
  config.vit_b16.vit.mlp_width = 3072
  config.vit_b16.dtype = "bfloat16"
  config.decoder = config_dict.ConfigDict()
  config.decoder.name = "decoder"
  config.decoder.decoder = language.decoder()
  config.decoder.decoder.width = 768
  config.decoder.decoder.depth = 12
  config.decoder.decoder.heads = 12
  config.decoder.decoder.mlp_width = 3072
  config.decoder.vocab_size = 259
  config.decoder.length = 512  # tokens
  config.decoder.dtype = "bfloat16"
  config.decoder.batch_sizes = (32,)

  # How the ratios grow: one size of a small ViT at a time, the others as in
  # `model`. An empty tuple leaves a size out.
  config.sweep = config_dict.ConfigDict()
  config.sweep.model = _model("vit", input_shape=(32, 32, 3))
  config.sweep.model.batch_sizes = (32,)
  config.sweep.model.vit.patch_size = 8
  config.sweep.model.vit.width = 96
  config.sweep.model.vit.depth = 2
  config.sweep.model.vit.mlp_width = 384
  config.sweep.batch_size = (8, 32, 128)
  config.sweep.depth = (1, 2, 4)
  config.sweep.width = (48, 96, 192)  # mlp_width grows with it
  config.sweep.lines = ("auto/head", "auto/all")

  # FLOPs alone, which are counted without compiling: attention grows faster
  # with the tokens than the mimic layers do.
  config.tokens = config_dict.ConfigDict()
  config.tokens.model = _model("vit", input_shape=(32, 32, 3))
  config.tokens.model.batch_sizes = (32,)
  config.tokens.image_sizes = (32, 48, 56)  # 64, 144, 196 tokens
  config.tokens.lines = ("auto/last_mlp",)
  if sizes == "accelerator":
    config.models = ("vit_b16", "decoder")
    config.layers = ("all", "last_half", "last_quarter")
    config.engines = (
      "forward",
      "ghost",
      "per_sample",
      "ghost_32",
      "streaming_32",
    )
    config.largest_compared = 0
    config.timing.pairs = 15
    config.sweep.batch_size = config.sweep.depth = config.sweep.width = ()
    config.tokens.image_sizes = ()
  return config.lock()


def _model(name, input_shape):
  config = config_dict.ConfigDict()
  config.name = name
  config.widths = (256, 256)
  config.dtype = config_dict.placeholder(str)  # of the activations
  config.vit = classification.vit()
  config.input_shape = input_shape
  config.num_classes = 10
  config.batch_sizes = (32, 128)
  return config
