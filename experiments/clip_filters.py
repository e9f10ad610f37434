"""Filters of image-text pairs by mimic and CLIP scores, as subset files.

python -m experiments.clip_filters --workdir=runs/datacomp_filters \
  --config=configs/clip_filters.py:run=runs/datacomp_small \
  --config.metadata=metadata/

Each percentage is one of the whole pool, taken before anything is combined.
"""

from experiments.runtime import cli
from experiments.selection.filters import main

if __name__ == "__main__":
  cli.run(main, exclusive=True)
