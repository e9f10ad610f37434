"""Benchmark: memory and communication of a step on the devices of a pod.

python -m experiments.pod --config=configs/benchmark/pod.py --workdir=runs/pod

Formulas for large models, batches and slices, and what the compiler says of
steps for devices that are not there: whether the formulas hold, and whether a
step sends more than plain data-parallel training as devices are added. Nothing
runs. An interrupted job goes on where it stopped.
"""

from experiments.benchmarks.pod.cases import main
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, exclusive=True)
