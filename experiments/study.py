"""One reference, several methods on the same noisy labels, then selection.

  python -m experiments.study --config=configs/digits.py --workdir=runs/digits

For each seed: a reference trained on clean labels, from the learner's own
initialisation unless `config.study.reference` has it otherwise; every method on
the same noisy labels; and from the scores of those that have any, a selection
and models retrained on what it keeps. A run that is finished is not repeated,
and any number of jobs may be given the same command: they share the runs. The
processes of one job share every run.
"""

from experiments.models import initial
from experiments.runtime import cli
from experiments.studies.runner import main

if __name__ == "__main__":
  cli.run(main, processes=cli.SHARED, prepare=initial.sized)
