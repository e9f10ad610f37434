"""CLIP on rendered shapes, 30 % of them mis-captioned: minutes on a CPU.

python -m experiments.study --config=configs/shapes.py \
  --workdir=runs/clip_shapes

A tiny CLIP sees 300 batches of 192 out of 12,000 pairs. With three seeds, other
mimic layers, weightings and filters (results/clip_shapes):

python -m experiments.study --workdir=runs/clip_shapes_full \
  --config=configs/shapes.py:seeds=3,layers=all+image_last_mlp,\
ess=0.5+0.7+0.9,filters=true

References, by the argument: `own` starts as the learner does and sees the same
pictures with their true captions; `foreign` starts from another seed, `larger`
is a model of twice the width, which has no weights to go toward.
"""

from ml_collections import config_dict

from configs import base, contrastive

_REFERENCES = {
  "own": {},
  "foreign": {"seed_offset": 1000},
  "larger": {"seed_offset": 1000, "width": 128, "depth": 4},
}
# Those that were published, and the share that is truly right.
_FILTERS = (
  "mimic_top30",
  "mimic_top35",
  "mimic_top40",
  "clip_top30",
  "clip_top30 - mimic_bottom15",
  "clip_top30 - mimic_bottom20",
  "random30",
  "mimic_top70",
  "clip_top70",
  "random70",
)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """A study's config; one run of it is what `experiments.train` takes.

  Arguments are `layers`, `direction` ("weights", "outputs"), effective sample
  sizes `ess` and `temperature`s, each one or several with + between; number of
  `seeds`; `reference`, as above; `filters`: whether to retrain on what filters
  keep; `others`: further methods, such as output_agreement+rho.

  Raises:
    ValueError: an unknown argument or reference, or no weighting at all.
  """
  values = base.parse_arg(
    arg,
    layers="all",
    direction="weights",
    ess="0.7",
    temperature="",
    seeds=1,
    reference=tuple(_REFERENCES),
    filters=False,
    others="",
  )
  weightings = tuple(
    f"{name}{value}"
    for name in ("ess", "temperature")
    for value in filter(None, values[name].split("+"))
  )
  if not weightings:
    raise ValueError("config arguments ess and temperature are both empty.")
  directions = values["direction"].split("+")
  config = contrastive.get_config().unlock()
  config.noise.rate = 0.3
  # A run takes a minute: no need to save it ten times.
  config.checkpoint.every_steps = 150
  config.mimic.direction = directions[0]
  # What a foreign reference does is one of the questions.
  config.mimic.force = values["reference"] == "foreign"
  config.study.seeds = tuple(range(values["seeds"]))
  config.study.methods = (
    "sgd",
    *(f"grad_mimic_{name}" for name in directions),
    *filter(None, values["others"].split("+")),
  )
  config.study.layers = tuple(values["layers"].split("+"))
  config.study.weightings = weightings
  config.study.filters = _FILTERS if values["filters"] else ()
  config.study.reference.update(_REFERENCES[values["reference"]])
  return config.lock()
