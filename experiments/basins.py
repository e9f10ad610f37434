"""Checks references of the learner's own initialisation, and of others.

python -m experiments.basins --config=configs/benchmark/check_reference.py \
  --workdir=runs/basins

For each seed: a reference from the learner's own initialisation and one from
another, both trained on clean labels; and a learner for each noise rate. Every
learner is checked against both references, good (at the end of their run) and
poor (after one epoch). The verdict is in error where it takes an own reference
for foreign, or a foreign one for anything else.
"""

from experiments.benchmarks.check_reference import main
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, exclusive=True)
