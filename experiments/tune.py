"""Tunes every method of a study with the same budget, on held-out samples.

python -m experiments.tune --workdir=runs/tuning \
  --config=configs/label_noise.py:dataset=cifar10,protocol=finetune,rate=0.4 \
  --config.data.train_split='train[:40000]' \
  --config.data.test_split='train[40000:]'

Each method is run with every learning rate of `config.study.tune`; where it has
a weighting whose strength is set (a temperature or a fraction) with every value
of that too, and where it looks at gradients with every choice of layers. What
does best on `config.data.test_split`, which must not be the split that results
are reported on, is written to `tuned.json`: give it to a study as
`config.study.tuned`.
"""

from experiments.models import initial
from experiments.runtime import cli
from experiments.studies.tuning import main

if __name__ == "__main__":
  cli.run(main, prepare=initial.sized)
