"""What CLIP's steps cost, against a plain one: time and memory.

python -m experiments.clip_costs --workdir=runs/clip_costs \
  --config=configs/shapes.py:layers=image_last_mlp+all \
  --config.mimic.reference=<workdir of a finished run>

Measured as in `experiments.costs`, at each of `study.cost_batch_sizes`, with
the first of `study.weightings`.
"""

from experiments.benchmarks.clip_methods import main
from experiments.models import initial
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, exclusive=True, prepare=initial.sized)
