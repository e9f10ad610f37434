"""One reference, several methods on the same noisy data, then selection.

  python -m experiments.study --config=configs/digits.py --workdir=runs/digits
  python -m experiments.study --config=configs/shapes.py --workdir=runs/shapes

For each seed: a reference trained on true data, from the learner's own
initialisation unless `config.study.reference` has it otherwise; every method on
the same noisy data, at each of the layers and weightings; and plain runs on
what selections and filters keep. A run that is finished is not repeated, and
any number of jobs may be given the same command: they share the runs. The
processes of one job share every run.

A config with a section `probe` makes a grid of heads on stored features: every
method on every seed and noise rate, several runs in one program. One with a
section `cross` looks for errors in the labels that a set was published with.
"""

from experiments.models import initial
from experiments.runtime import cli
from experiments.studies import runner
from experiments.studies.probing import cross_fitting, grid


def main(config, workdir: str) -> None:
  """Runs the study, the grid of heads, or the cross-fitting."""
  job = runner.main
  if "probe" in config:
    job = cross_fitting.main if "cross" in config else grid.main
  job(config, workdir)


if __name__ == "__main__":
  cli.run(main, processes=cli.SHARED, prepare=initial.sized)
