"""The wheel in an environment of its own, as a new user has it.

Needs a package registry, or pip's cache.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "data" / "typed_script.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """The folder of programs of an environment with the wheel and `report`."""
  folder = tmp_path_factory.mktemp("environment")
  source = folder / "source"
  source.mkdir()
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  shutil.copytree(ROOT / "gradmimic_jax", source / "gradmimic_jax")
  pip = [sys.executable, "-m", "pip", "--quiet"]
  call([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source])
  (wheel,) = folder.glob("*.whl")
  call([sys.executable, "-m", "venv", folder / "venv"])
  programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
  # What is imported is compiled then, which takes less than all of it.
  install = ["--quiet", "install", "--no-compile", f"{wheel}[report]"]
  call([programs / "pip", *install])
  call([programs / "gradmimic", "--version"])
  return programs


def call(command, **options):
  variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run(
    [str(part) for part in command],
    check=True,
    capture_output=True,
    text=True,
    env=variables,
    **options,
  )


def measured(command, **options):
  """What came, its CPU seconds, and its peak memory in bytes."""
  code = (
    "import resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], check=True)\n"
    "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)\n"
  )
  done = call([sys.executable, "-c", code, *command], **options)
  seconds, kilobytes = done.stderr.splitlines()[-1].split()
  return done.stdout, float(seconds), int(kilobytes) * 1024


def write_table(path, n):
  rng = np.random.default_rng(0)
  scores = rng.normal(np.where(rng.random(n) < 0.2, -1, 1), 0.7, (5, n)).T
  labels = rng.integers(0, 10, (n, 1))
  columns = [np.arange(n)[:, None], labels, scores]
  np.savetxt(
    path,
    np.concatenate(columns, axis=1),
    ["%d", "%d"] + ["%.4f"] * 5,
    ",",
    header="id,label,s_0,s_1,s_2,s_3,s_4",
    comments="",
  )


def test_a_folder_and_a_table_become_a_page_in_20_seconds(
  environment, tmp_path
):
  image_lib = pytest.importorskip("PIL.Image")
  write_table(tmp_path / "scores.csv", 600)
  (tmp_path / "photos").mkdir()
  rng = np.random.default_rng(0)
  for i in range(600):
    pixels = rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)
    image_lib.fromarray(pixels).save(tmp_path / f"photos/{i:04d}.jpg")
  out, seconds, _ = measured(
    [
      *(environment / "gradmimic", "curate", "scores.csv", "--labels=label"),
      *("--images=photos", "--out=out"),
    ],
    cwd=tmp_path,
  )
  print(f"{seconds:.1f} CPU seconds")
  assert seconds < 20
  assert len(out.splitlines()) == 3
  page = (tmp_path / "out/report.html").read_text()
  assert page.count("data:image/") >= 48
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "keep.csv",
    "manifest.json",
    "remove.csv",
    "report.html",
    "report.json",
    "selection.parquet",
  ]


def test_a_million_rows_take_a_minute_and_a_gigabyte(environment, tmp_path):
  write_table(tmp_path / "scores.csv", 1_000_000)
  _, seconds, memory = measured(
    [environment / "gradmimic", "curate", "scores.csv", "--out=out"],
    cwd=tmp_path,
  )
  print(f"{seconds:.1f} CPU seconds, {memory / 1e6:.0f} MB")
  assert seconds < 60
  assert memory < 1e9


def test_help_is_there_at_once(environment):
  programs = environment / "gradmimic"
  _, seconds, memory = measured([programs, "curate", "--help"])
  print(f"{seconds:.2f} CPU seconds, {memory / 1e6:.0f} MB")
  assert seconds < 0.5
  version = call([programs, "--version"]).stdout
  assert version.startswith("gradmimic_jax ")


def test_the_import_costs_hardly_more_than_jax_and_optax(environment):
  def seconds(code):
    return min(
      measured([environment / "python", "-c", code])[1] for _ in range(2)
    )

  names = "[getattr(gm, name) for name in gm.__all__]"
  own = seconds("import gradmimic_jax")
  plain = seconds("import jax, optax")
  everything = seconds(f"import gradmimic_jax as gm; {names}")
  print(f"{own:.2f}; jax, optax {plain:.2f}; every name {everything:.2f}")
  assert own < plain + 0.3


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_script_has_no_type_errors(environment, tmp_path, checker):
  """mypy --strict, and pyright's default; optax and Arrow have no types."""
  shutil.copy(SCRIPT, tmp_path)
  if checker == "mypy":
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict"]
    command += ["--ignore-missing-imports"]
    command += ["--python-executable", environment / "python", SCRIPT.name]
  else:
    pytest.importorskip("basedpyright")  # the same checker, with its Node
    (tmp_path / "pyrightconfig.json").write_text(
      '{"typeCheckingMode": "standard", "reportMissingModuleSource": false}'
    )
    command = [sys.executable, "-m", "basedpyright", "--pythonpath"]
    command += [environment / "python", SCRIPT.name]
  try:
    done = call(command, cwd=tmp_path)
  except subprocess.CalledProcessError as error:
    pytest.fail(error.stdout + error.stderr)
  assert "0 errors" in done.stdout or "no issues" in done.stdout


def test_every_public_name_is_there(environment, tmp_path):
  """Also those that need flax or matplotlib, which aren't installed."""
  code = (
    "import gradmimic_jax as gm\n"
    "from gradmimic_jax import *\n"
    "for call in (lambda: gm.nnx.mimic_scores(None),"
    " lambda: gm.plots.scores_by_group([1.0], [1])):\n"
    "  try: call()\n"
    "  except ModuleNotFoundError as error: print(error)\n"
  )
  out = call([environment / "python", "-c", code], cwd=tmp_path).stdout
  assert "pip install flax" in out
  assert "gradmimic_jax[plots]" in out
