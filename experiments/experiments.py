"""Found by `python experiments/<job>.py` alone, which it makes work.

Python then looks for modules in this folder first, and takes this file for the
package: it is what the job's first import runs.
"""

import pathlib
import runpy
import sys

_FOLDER = pathlib.Path(__file__).resolve().parent

if __name__ == "experiments":
  # Nothing else is to be found here: `select`, for one, is Python's own too.
  sys.path[:] = [
    str(_FOLDER.parent),
    *(x for x in sys.path if pathlib.Path(x).resolve() != _FOLDER),
  ]
  del sys.modules["experiments"]
  _JOB = pathlib.Path(sys.argv[0]).stem
  runpy.run_module(f"experiments.{_JOB}", run_name="__main__", alter_sys=True)
  sys.exit()
