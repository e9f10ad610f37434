"""Every field of image-text pairs and CLIP, with its default.

A field that is not here is refused, on the command line and in code.
"""

from ml_collections import config_dict

from configs import base

# Fields of `experiments.models.clip.CLIP` that a size may be given others of.
_SIZES = (
  "embed_width",
  "patch_size",
  "image_width",
  "image_depth",
  "image_heads",
  "image_mlp_width",
  "context_length",
  "vocab_size",
  "text_width",
  "text_depth",
  "text_heads",
  "text_mlp_width",
)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The defaults, locked."""
  base.parse_arg(arg)
  config = base.get_config(
    "contrastive",
    num_samples=57_600,  # repeats count
    eval_every_steps=10,
    save_every_steps=100,
  )
  config.batch_size = 192  # pairs of all devices together; negatives, that is
  # Pairs at a time; the held-out loss tells a pair from so many.
  config.eval_batch_size = 192
  config.loss = "clip"  # or "sigmoid" (with model.clip.logit_bias)

  config.data = config_dict.ConfigDict()
  config.data.name = "shapes"  # drawn in memory, or "shards"
  config.data.image_size = 32  # pixels, both sides
  # Per channel, of pixels scaled to [0, 1].
  config.data.mean = (0.5, 0.5, 0.5)
  config.data.std = (0.25, 0.25, 0.25)
  # "shapes", or what CLIP's published tokenizers come as: a tokenizer.json,
  # bpe_simple_vocab_16e6.txt.gz, their folder, or "hf://owner/name".
  config.data.tokenizer = "shapes"
  # A DataComp subset file of the uids to train on; None: all.
  config.data.filter = config_dict.placeholder(str)
  # Of shapes: what is drawn, and how many pairs.
  config.data.seed = 0
  config.data.train_size = 12_000
  config.data.held_out_size = 960  # clean pairs for loss and retrieval
  config.data.zero_shot_size = 960
  # Of shards: paths, folders or patterns such as "small/{00000000..00001287}".
  # Evaluation takes held_out_size pairs from the beginning of held_out_shards,
  # and zero_shot_size images of a prepared TFDS set; without them there is no
  # such evaluation.
  config.data.shards = ()
  config.data.held_out_shards = ()
  config.data.zero_shot = config_dict.placeholder(str)  # such as "cifar10"
  config.data.zero_shot_split = "test"
  config.data.data_dir = config_dict.placeholder(str)
  config.data.window = 4096  # samples that are shuffled at once
  # Where uids are from: "json", or "name" for shards that have none there, such
  # as img2dataset's: of the names of shard and sample.
  config.data.uid_source = "json"
  # Which files make a sample, by extension. "gif", "bmp", "tif" and "tiff"
  # among those of images let such images be read.
  config.data.parts = config_dict.ConfigDict()
  config.data.parts.image = ("jpg", "jpeg", "png", "webp")
  config.data.parts.caption = ("txt",)
  config.data.parts.json = ("json",)
  # The field of the json that has the caption; None: a file of its own.
  config.data.parts.caption_key = config_dict.placeholder(str)
  config.data.max_broken_share = 0.1
  config.data.num_threads = 8  # that decode, of each reader
  # Processes of each host that read shards, each its own; their batches come in
  # turn, so another number is another order. 0: threads of the run's process.
  config.data.readers = 0

  # Of shapes: the share of pairs with a wrong caption, and how it is wrong.
  config.noise = config_dict.ConfigDict()
  config.noise.rate = 0.0
  config.noise.kinds = ("swapped", "truncated", "padded")

  config.model = config_dict.ConfigDict()
  # Or "B/32", "B/16", "L/14", or "pretrained": as the config.json beside the
  # weights that `pretrained` names has it.
  config.model.size = "tiny"
  # Published weights to start from: a .safetensors file, its folder or
  # "hf://owner/name".
  config.model.pretrained = config_dict.placeholder(str)
  # Of the activations, such as "bfloat16"; None is that of the parameters.
  config.model.dtype = config_dict.placeholder(str)
  # What shall be other than the size has it.
  config.model.clip = config_dict.ConfigDict()
  for name in _SIZES:
    config.model.clip[name] = config_dict.placeholder(int)
  config.model.clip.activation = config_dict.placeholder(str)
  config.model.clip.norm_epsilon = config_dict.placeholder(float)
  config.model.clip.remat = config_dict.placeholder(bool)
  config.model.clip.logit_scale = config_dict.placeholder(float)
  config.model.clip.logit_bias = config_dict.placeholder(float)

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 20
  config.optimizer.weight_decay = 0.2
  config.optimizer.decaying = "matrices"  # or "all": gains and biases too
  config.optimizer.b2 = 0.98
  config.optimizer.epsilon = 1e-6

  # Of methods "sgd", "grad_mimic", "grad_mimic_weights", "grad_mimic_outputs",
  # "output_agreement", "rho", "rho_topk" and "random". Toward "outputs": the
  # similarities that the reference finds within the batch. Layers may be
  # "image_last_mlp", "text_last_mlp", "both_last_mlp" or "all".
  config.mimic.layers = "all"
  config.mimic.temperature = 0.05
  config.mimic.fraction = 0.7
  # The losses of a batch depend on each other: no other engine can do it.
  config.mimic.engine = "forward"
  config.mimic.microbatch_size = config_dict.placeholder(int)  # nor in parts
  config.mimic.check_independence = True

  config.select.binarize = "gmm"  # for the report
  config.select.aggregate = "majority"
  config.select.fraction = 0.7

  config.study.seeds = (0,)
  config.study.methods = ("sgd", "grad_mimic_weights")
  config.study.layers = ("all",)
  config.study.weightings = ("ess0.7",)
  config.study.retrain = False
  config.study.cost_batch_sizes = (256, 1024)
  config.study.reference.width = 0  # of both towers
  config.study.reference.depth = 0  # of both towers
  return config.lock()
