"""Runs a list of jobs that build on each other, or prints their commands.

python -m experiments.sweep --config=configs/sweep.py:study=digits \
  --workdir=runs/sweep

A cell of the sweep is one job with a workdir of its own, run as a process of
its own. What is done stays done, a cell that was cut off goes on where its job
can, and any number of processes may be given the same command: they share the
cells. `--config.run=false` prints the commands, for a scheduler to run.
"""

from experiments.runtime import cli
from experiments.runtime.sweep import main

if __name__ == "__main__":
  cli.run(main)
