"""Trains one model with one method.

python -m experiments.train --config=configs/digits.py --workdir=runs/one
"""

from experiments.models import initial
from experiments.runtime import cli
from experiments.training.trainer import main

if __name__ == "__main__":
  cli.run(main, processes=cli.SHARED, prepare=initial.sized)
