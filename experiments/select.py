"""From a ledger to a selection, filter files and a manifest.

python -m experiments.select --config=configs/select.py:run=runs/scores \
  --workdir=runs/filter
"""

from experiments.runtime import cli
from experiments.selection.files import main

if __name__ == "__main__":
  cli.run(main, processes=cli.FIRST, exclusive=True)
