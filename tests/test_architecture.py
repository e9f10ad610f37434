"""The arrows of the house: configs <- experiments -> gradmimic_jax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FORBIDDEN = {
  "gradmimic_jax": {
    "absl",
    "configs",
    "experiments",
    "flax",
    "grain",
    "ml_collections",
    "orbax",
    "tensorflow",
    "tensorflow_datasets",
  },
  "configs": {"experiments", "flax", "gradmimic_jax", "jax", "optax"},
  "experiments": {"tensorflow"},
}


def imported(path):
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names.add(node.module.split(".")[0])
  return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_follow_the_arrows(package):
  files = list((ROOT / package).rglob("*.py"))
  assert files
  for path in files:
    wrong = imported(path) & FORBIDDEN[package]
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}"


def test_importing_the_library_loads_nothing_heavy():
  code = (
    "import sys, gradmimic_jax; print(*{'sklearn', 'matplotlib', 'flax',"
    " 'tensorflow'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
  )
  assert not done.stdout.strip()
