"""The example files run as they stand."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LIBRARIES = {"equinox_model": "equinox", "haiku_model": "haiku"}


@functools.cache
def printed(name):
  """What an example prints, in a process of its own."""
  done = subprocess.run(
    [sys.executable, EXAMPLES / f"{name}.py"],
    env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  sorted(path.stem for path in EXAMPLES.glob("*.py")),
)
def test_an_example_runs(name):
  if name in LIBRARIES:
    pytest.importorskip(LIBRARIES[name])
  assert printed(name)


@pytest.mark.slow
def test_grad_mimic_is_above_sgd_in_the_linen_example():
  found = dict(re.findall(r"^(\S+) +accuracy (\S+)$", printed("linen"), re.M))
  assert float(found["Grad-Mimic"]) > float(found["SGD"]) + 0.1
