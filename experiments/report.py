"""From a run to one page to look at.

python -m experiments.report --config=configs/report.py:run=runs/scores \
  --workdir=runs/report
"""

from experiments.reporting.page import main
from experiments.runtime import cli

if __name__ == "__main__":
  cli.run(main, processes=cli.FIRST, exclusive=True)
