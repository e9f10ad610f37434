"""Measures the offline stage on millions of samples: seconds and memory.

python -m experiments.scale --config=configs/benchmark/selection.py \
  --workdir=runs/scale

A ledger is written batch by batch, read back, selected from, and the kept uids
written as a DataComp subset. Each size has a process to itself, so that its
peak of memory is its own; sizes that an earlier run has measured stay.
"""

import json
import pathlib
import sys

from experiments.benchmarks import selection
from experiments.runtime import cli

if __name__ == "__main__":
  if sys.argv[1:2] == ["--one"]:
    folder, sizes = pathlib.Path(sys.argv[2]), json.load(sys.stdin)
    print(json.dumps(selection.measure(folder, **sizes)))
  else:
    cli.run(selection.main, exclusive=True)
