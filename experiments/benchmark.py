"""Measures what a mimic step costs, relative to a plain step.

python -m experiments.benchmark --config=configs/benchmark/engines.py \
  --workdir=runs/b

A table of models, batch sizes, mimic layers and engines; a sweep over the sizes
of a small vision transformer; and how FLOPs fall with the number of tokens. An
interrupted run goes on where it stopped.
"""

from experiments.benchmarks.engines import main
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, processes=cli.FIRST, exclusive=True)
