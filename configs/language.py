"""A language model on English prose, 30 % of it none: minutes on a CPU.

python -m experiments.study --config=configs/language.py --workdir=runs/language

A decoder of two blocks reads bytes of what ships with Python: help topics and
docstrings. Of the sequences that it is trained on, a tenth each are prose whose
words are shuffled, code, and boilerplate. The reference starts as the learner
does and sees the same places of the text without noise. Arguments after a
colon: `:rate=0.5,seeds=1,path=/data/text.jsonl`.
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A study of sgd, grad_mimic and rho on noisy text.

  Arguments are `rate` of noise, number of `seeds`, `path` of a file of text.
  """
  values = base.parse_arg(arg, rate=0.3, seeds=3, path="")
  config = base.get_config(
    "language", num_steps=200, eval_every_steps=20, save_every_steps=100
  )
  config.batch_size = 32  # sequences
  config.eval_batch_size = 256

  config.data = config_dict.ConfigDict()
  # A .txt, .jsonl or .parquet file, UTF-8; None: the text that ships with
  # Python.
  config.data.path = config_dict.placeholder(str)
  config.data.path = values["path"] or None
  # Of .jsonl and .parquet: the field or column with the text.
  config.data.field = "text"
  # Of .txt: its "paragraphs" are documents, which blank lines part; or its
  # "windows" are, each on its own, so that what is held out may stand beside
  # what is trained on.
  config.data.documents = "paragraphs"
  config.data.most_bytes = 64 << 20  # a larger file is refused
  # "bytes", or a tokenizer.json, its folder, or "hf://owner/name".
  config.data.tokenizer = "bytes"
  config.data.length = 64  # tokens in a sequence
  # What is left at a document's end is left out if it has fewer tokens.
  config.data.shortest = 32
  config.data.held_out_fraction = 0.1  # of the sequences, by whole documents
  # Sequences that are taken of each part; 0: all.
  config.data.train_size = 6000
  config.data.held_out_size = 256
  config.data.seed = 0  # of what is held out and taken
  # Which sequences to train on: a .npy file of ids, or a selection as .parquet
  # or .csv. None: all.
  config.data.filter = config_dict.placeholder(str)

  config.noise = config_dict.ConfigDict()
  config.noise.rate = values["rate"]
  config.noise.kinds = ("shuffled", "code", "boilerplate")
  config.noise.seed = 0

  config.model = config_dict.ConfigDict()
  config.model.name = "decoder"
  # Of the activations, such as "bfloat16"; None is that of the parameters.
  config.model.dtype = config_dict.placeholder(str)
  config.model.decoder = decoder()

  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.01
  # Chosen on the held-out loss of seeds 0 and 1, where 0.5 saved no steps.
  config.mimic.fraction = 0.75

  config.study.seeds = tuple(range(values["seeds"]))
  config.study.methods = ("sgd", "grad_mimic", "rho")
  config.study.retrain = False
  return config.lock()


def decoder() -> config_dict.ConfigDict:
  """Options of a small decoder, as `Decoder` describes them."""
  config = config_dict.ConfigDict()
  config.width = 32
  config.depth = 2  # blocks
  config.heads = 2
  config.mlp_width = 128
  config.tied = False  # whether the head is the embedding
  config.activation = "gelu"  # or "quick_gelu"
  config.norm_epsilon = 1e-5
  return config
