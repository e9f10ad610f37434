"""Scores a data set in one pass for each checkpoint of a run.

python -m experiments.score --config=configs/score.py:learner=runs/learner \
  --config.mimic.reference=runs/reference --workdir=runs/scores
"""

from experiments.runtime import cli
from experiments.training.scoring import main

if __name__ == "__main__":
  cli.run(main, processes=cli.SHARED)
