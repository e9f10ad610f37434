"""Puts finished studies together: the paper's tables, and ours beside them.

python -m experiments.compare --config=configs/compare.py \
  --workdir=runs/results --config.probe="('runs/probe',)" \
  --config.finetune="('runs/finetune_0.4','runs/finetune_0.6')"
"""

from experiments.runtime import cli
from experiments.studies.comparison import main

if __name__ == "__main__":
  cli.run(main, processes=cli.FIRST, exclusive=True)
