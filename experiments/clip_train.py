"""Trains one CLIP with one method.

python -m experiments.clip_train --config=configs/shapes.py \
  --workdir=runs/clip
"""

from experiments.runtime import cli
from experiments.training.clip_trainer import main

if __name__ == "__main__":
  cli.run(main, processes=cli.SHARED)
