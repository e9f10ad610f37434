"""Measures what something costs, or how right it is; the config names what.

python -m experiments.benchmark --config=configs/benchmark/<what>.py \
  --workdir=runs/b

engines          a mimic step by engine, mimic layers, batch and model
methods          a training step of every method of a study
loop             the training loop beside its steps
data             images from their files to the devices
selection        from scores to a filter, on millions of samples
check_reference  how often `gm.check_reference` is right
pod              memory and communication of a step on many devices

Each prints a table and leaves all numbers in `<what>.json`. What times steps
should have the machine to itself.
"""

from experiments import benchmarks
from experiments.models import initial
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(
    benchmarks.main,
    processes=cli.FIRST,
    exclusive=True,
    prepare=initial.sized,
  )
