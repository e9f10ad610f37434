"""The house: its arrows, its floors and its sizes.

configs <- experiments -> gradmimic_jax. A file in experiments/ is a command, a
folder is a room, and a room uses only the rooms below it.
"""

import ast
import functools
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
    "matplotlib",
    "ml_collections",
    "orbax",
    "tensorflow",
    "tensorflow_datasets",
  },
  "configs": {"experiments", "flax", "gradmimic_jax", "jax", "optax"},
  "experiments": {"tensorflow"},
}
# The library's doors to others, which import them when they are called.
DOORS = {
  "gradmimic_jax/nnx.py": {"flax"},
  "gradmimic_jax/plots.py": {"matplotlib"},
}
# From the ground up: a room uses those before it.
ROOMS = (
  "runtime",
  "data",
  "models",
  "methods",
  "tasks",
  "training",
  "selection",
  "reporting",
  "studies",
  "benchmarks",
)
# What names a task's folder outside of it: where tasks are made, and what is
# about that task alone. A new task is named in the first one only.
NAMES_A_TASK = (
  "experiments/tasks/__init__.py",
  "experiments/training/grand.py",
  "experiments/studies/probing/",
  "experiments/benchmarks/",
)


@functools.cache
def modules():
  """Path of every module by its dotted name."""
  found = {}
  for package in FORBIDDEN:
    for path in (ROOT / package).rglob("*.py"):
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
      found[name.removesuffix(".__init__")] = path
  return found


@functools.cache
def imported(path):
  """Dotted names that a file imports; names of modules where they are such."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full in modules() else node.module)
  return found


def room_of(name):
  """The folder below experiments; "" for a command."""
  parts = name.split(".")
  path = modules().get(name)
  below = (
    parts[1:] if path is None or path.name == "__init__.py" else parts[1:-1]
  )
  return below[0] if parts[0] == "experiments" and below else ""


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_follow_the_arrows(package):
  files = list((ROOT / package).rglob("*.py"))
  assert files
  for path in files:
    where = path.relative_to(ROOT).as_posix()
    wrong = {x.split(".")[0] for x in imported(path)} & FORBIDDEN[package]
    wrong = wrong - DOORS.get(where, set())
    assert not wrong, f"{where} imports {', '.join(wrong)}"


def test_every_room_has_its_floor():
  folders = {x.name for x in (ROOT / "experiments").iterdir() if x.is_dir()}
  assert folders - {"__pycache__"} == set(ROOMS)


def test_a_room_uses_the_rooms_below_it():
  for name, path in modules().items():
    mine = room_of(name)
    if not mine:
      continue
    for other in imported(path):
      theirs = room_of(other) if other.startswith("experiments.") else ""
      if theirs:
        assert ROOMS.index(theirs) <= ROOMS.index(mine), f"{name} uses {other}"
      assert other not in commands(), f"{name} uses the command {other}"


def commands():
  return {
    f"experiments.{path.stem}"
    for path in (ROOT / "experiments").glob("*.py")
    if path.name != "__init__.py"
  }


def test_no_module_reaches_itself():
  graph = {
    name: {x for x in imported(path) if x in modules() and x != name}
    for name, path in modules().items()
  }
  done: set[str] = set()

  def visit(name, above):
    assert name not in above, f"a circle: {' -> '.join((*above, name))}"
    if name not in done:
      for other in sorted(graph[name]):
        visit(other, (*above, name))
      done.add(name)

  for name in graph:
    visit(name, ())


def test_files_in_experiments_are_commands():
  files = set((ROOT / "experiments").glob("*.py"))
  # What makes `python experiments/<job>.py` work is no command.
  files.remove(ROOT / "experiments" / "experiments.py")
  assert len(files) <= 11
  for path in files:
    lines = path.read_text().splitlines()
    assert len(lines) <= 80, f"{path.name} has {len(lines)} lines"
    if not path.name.startswith("__"):
      assert any("cli.run(" in line for line in lines), path.name


def test_tasks_are_named_in_one_place():
  folders = {
    path.parent.name for path in (ROOT / "experiments/tasks").rglob("task.py")
  }
  for name, path in modules().items():
    if not name.startswith("experiments.") or room_of(name) == "":
      continue
    inside = name.removeprefix("experiments.tasks.").split(".")[0]
    for other in imported(path):
      task = other.removeprefix("experiments.tasks.").split(".")[0]
      if not other.startswith("experiments.tasks.") or task not in folders:
        continue
      where = str(path.relative_to(ROOT))
      allowed = inside == task or where.startswith(NAMES_A_TASK)
      assert allowed, f"{where} names the task {task}"


def test_tests_mirror_the_rooms():
  folders = {
    path.name
    for path in (ROOT / "tests" / "experiments").iterdir()
    if path.is_dir() and path.name != "__pycache__"
  }
  assert folders <= {*ROOMS, "contract"}


@pytest.mark.slow  # a process of its own
def test_a_run_loads_nothing_heavy_that_it_does_not_need():
  loaded = _print_of(
    "import sys\n"
    "from experiments.training import trainer\n"
    "from experiments.tasks.classification import task\n"
    "from gradmimic_jax import _ledger_files\n"
    "_ledger_files._as_parquet('', 'integer')\n"
    "print(*{'sklearn', 'matplotlib', 'tensorflow', 'pandas', 'jinja2',"
    " 'grain', 'pyarrow.compute', 'experiments.tasks.language.task'}"
    " & set(sys.modules))"
  )
  assert not loaded


def _print_of(code):
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip()


def test_importing_the_library_loads_nothing_heavy():
  loaded = _print_of(
    "import sys, gradmimic_jax\n"
    "[getattr(gradmimic_jax, name) for name in gradmimic_jax.__all__]\n"
    "print(*{'sklearn', 'matplotlib', 'flax', 'tensorflow', 'pandas', 'PIL',"
    " 'jinja2'} & set(sys.modules))"
  )
  assert not loaded
