"""Every field of image classification, with its default.

A field that is not here is refused, on the command line and in code.
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The defaults, locked."""
  base.parse_arg(arg)
  config = base.get_config(
    "classification", num_epochs=50, eval_every_epochs=1, save_every_epochs=1
  )

  config.data = config_dict.ConfigDict()
  # Any prepared TFDS image-classification set ("digits" prepares itself), or a
  # kind of set and its path: "folder:photos", "parquet:photos/data",
  # "npz:photos.npz", "features:{split}.npy" or "webdataset:{split}-*.tar".
  config.data.name = "digits"
  config.data.source = ""  # "folder" and so on, for a path without a prefix
  # The labels' file: of "folder" a table of files and labels, .csv or .parquet;
  # of "features" such a table, or .npy. None: folders by class, or beside it.
  config.data.labels = config_dict.placeholder(str)
  # Columns of tables and Parquet files; "": by their usual names.
  config.data.columns = config_dict.ConfigDict()
  config.data.columns.image = ""  # images, or their files
  config.data.columns.label = ""
  config.data.columns.id = ""
  config.data.columns.split = ""
  config.data.channels = 0  # 1, 3 or 4; 0: grey if the first images are
  config.data.data_dir = config_dict.placeholder(str)
  # Splits, slices and sums: "train[:10%]", "train+test"; of one file or folder
  # without splits "all[:80%]" and "all[80%:]".
  config.data.train_split = "train"
  config.data.test_split = "test"
  # Pixels that both sides of every image are resized to; 0: as they are.
  config.data.image_size = 0
  # "keep_ratio" resizes the shorter side and cuts out the middle; "squeeze"
  # resizes both sides, whatever the image's proportions.
  config.data.resize = "keep_ratio"
  # Of training images: "center", as in evaluation, or "random_resized": another
  # part at each sight, of a share of the area between these bounds.
  config.data.crop = "center"
  config.data.crop_scale = (0.08, 1.0)
  config.data.flip = False  # random horizontal flips
  # Where decoded images live: on the "device"s, in "memory" once they were read
  # first, or nowhere ("stream": decoded each time); "auto" goes by their size.
  config.data.residence = "auto"
  # Threads that make batches ahead: -1 as many as cores, 0 the thread that
  # reads. Or processes, for what holds Python's lock while it decodes.
  config.data.workers = -1
  config.data.worker_processes = False
  # Of pixels scaled to [0, 1], one number or one a channel. Empty: as the
  # model's weights have it, or else measured on so many training images (on all
  # of a set that is no larger than CIFAR-10).
  config.data.mean = ()
  config.data.std = ()
  config.data.statistics_samples = 128
  # Which samples to train on: a .npy file of ids, or a selection as .parquet
  # or .csv. Ids are positions in the split or the set's own. None: all.
  config.data.filter = config_dict.placeholder(str)

  # The share of a set's images that may be damaged, or beyond the limits: they
  # are left out, and listed in the run's folder. More are an error.
  config.faults.bad_images = 0.01

  config.noise = config_dict.ConfigDict()
  # "symmetric", "pair", "asymmetric", "confusion" or "file".
  config.noise.kind = "symmetric"
  # Exactly int(rate * N) labels are flipped; 0 with "confusion" and "file": as
  # the matrix or the table has it.
  config.noise.rate = 0.0
  config.noise.seed = 0
  # Of "asymmetric", such as "cat:dog,dog:cat"; None for CIFAR's usual one.
  config.noise.mapping = config_dict.placeholder(str)
  # Of "confusion": a .npy or .csv file, true classes by given ones.
  config.noise.matrix = config_dict.placeholder(str)
  # Of "file": a .csv or .parquet table, and its columns with labels and ids.
  config.noise.path = config_dict.placeholder(str)
  config.noise.column = config_dict.placeholder(str)
  config.noise.id_column = config_dict.placeholder(str)
  # Of "file": samples that the table lacks keep their labels.
  config.noise.partial = False

  config.model = config_dict.ConfigDict()
  # "mlp", "convnet", "resnet" or "vit"; or "package.module:Class", a module of
  # your own by Flax NNX or Linen; experiments/models/outside.py says how.
  config.model.name = "mlp"
  # Of a module of your own, as they stand between its constructor's brackets:
  # "width=64, activation='gelu'".
  config.model.options = ""
  # Of the activations, such as "bfloat16"; None is that of the parameters.
  # Parameters and losses are float32 in any case.
  config.model.dtype = config_dict.placeholder(str)
  # Where weights come from that are not initialised: the workdir of a finished
  # run, a .safetensors file (or its folder) or "hf://owner/name". The head is
  # always a new one.
  config.model.pretrained = config_dict.placeholder(str)
  # Of the vit: "" is as `vit` has it; "pretrained" takes all of that from the
  # weights that `pretrained` names and the config.json beside them.
  config.model.size = ""
  # Hidden widths of the mlp, or channels per stage of convnet and resnet.
  config.model.widths = (256, 256)
  # Of convnet and resnet: pixels taken together, in each direction.
  config.model.patch_size = 1
  config.model.blocks_per_stage = 1  # of the resnet
  config.model.vit = vit()

  wanted = config.study.reference
  wanted.model = ""  # model name, for another architecture
  wanted.widths = ()  # of that model
  wanted.options = ""  # of that model, if it is one of your own
  wanted.train_split = ""
  # Trains it on the very split that everything is tested on: to see what such
  # a reference would be worth, never to report an accuracy.
  wanted.test_leak = False
  return config.lock()


def vit() -> config_dict.ConfigDict:
  """Sizes of a vision transformer; a small one for 32-pixel images."""
  config = config_dict.ConfigDict()
  config.patch_size = 4  # pixels; divides both sides of the images
  config.width = 192
  config.depth = 6  # blocks
  config.heads = 3
  config.mlp_width = 768
  config.pooling = "mean"  # or "class_token"
  config.norm_epsilon = 1e-6  # of the layer norms
  return config
