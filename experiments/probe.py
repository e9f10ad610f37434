"""Linear probing under label noise: a grid of heads on stored features.

python -m experiments.probe --config=configs/label_noise.py:dataset=cifar10 \
  --workdir=runs/probe --config.model.pretrained=<workdir of a finished run>

Every method on every seed and noise rate. A cell of the grid is one method on
as many of its runs as one program takes; what is done stays done, and any
number of processes may be given the same command: they share the cells.
"""

from experiments.models import initial
from experiments.runtime import cli
from experiments.studies.probing.grid import main

if __name__ == "__main__":
  cli.run(main, prepare=initial.sized)
