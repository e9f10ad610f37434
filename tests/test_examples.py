"""The example files run as they stand."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LIBRARIES = {"equinox_model": "equinox", "haiku_model": "haiku"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  sorted(path.stem for path in EXAMPLES.glob("*.py")),
)
def test_an_example_runs(name):
  if name in LIBRARIES:
    pytest.importorskip(LIBRARIES[name])
  done = subprocess.run(
    [sys.executable, EXAMPLES / f"{name}.py"],
    env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout


@pytest.mark.slow
def test_grad_mimic_is_above_sgd_in_the_linen_example(capsys):
  # As users have it, not as strict as tests.
  with (
    pytest.MonkeyPatch.context() as patch,
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    patch.setattr(sys, "argv", ["linen.py"])
    runpy.run_path(str(EXAMPLES / "linen.py"), run_name="__main__")
  found = dict(
    re.findall(r"^(\S+) +accuracy (\S+)$", capsys.readouterr().out, re.M)
  )
  assert float(found["Grad-Mimic"]) > float(found["SGD"]) + 0.1
