"""CLIP's study: one reference, several methods, filters, what they are worth.

  python -m experiments.clip_study --config=configs/shapes.py \
    --workdir=runs/clip_shapes

For each seed: a reference trained on true captions, from the learner's own
initialisation unless `config.study.reference` has it otherwise; every method on
the same mis-captioned pairs, those with scores at each of the layers and
weightings; and plain runs on what filters keep, of as many samples seen. A run
that is finished is not repeated, and any number of processes may be given the
same command: they share the runs.
"""

from experiments.models import initial
from experiments.runtime import cli
from experiments.studies.clip_runner import main

if __name__ == "__main__":
  cli.run(main, processes=cli.SHARED, prepare=initial.sized)
