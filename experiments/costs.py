"""What a step of each method costs, against a plain one: time and memory.

python -m experiments.costs --workdir=runs/costs \
  --config=configs/label_noise.py:dataset=cifar10,protocol=finetune \
  --config.mimic.reference=<workdir of a finished run>

The steps are those of training, optimizer included, on the first batch. They
are timed in turn, round by round: a time is the median over the rounds of its
ratio to sgd's in the same round. Memory is the compiler's own count of what a
step holds besides its arguments and results. The reference's outputs are found
once, before training, and don't count.
"""

from experiments.benchmarks.methods import main
from experiments.models import initial
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, exclusive=True, prepare=initial.sized)
