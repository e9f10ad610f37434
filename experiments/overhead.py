"""Measures what the training loop costs beside its jitted steps.

python -m experiments.overhead --config=configs/benchmark/loop.py \
  --workdir=runs/o

The loop is the one that all training jobs go through, with all it does: it
reads, puts on devices, logs, writes the ledger and saves. In turn with it, the
same steps run one after the other on a batch that stays on the devices.
"""

from experiments.benchmarks.loop import main
from experiments.models import initial
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, exclusive=True, prepare=initial.sized)
