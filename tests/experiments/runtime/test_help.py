"""What the commands say of themselves."""

import pathlib
import re
import subprocess
import sys

import pytest

from experiments import __main__ as overview
from experiments.runtime import cli

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = f"{ROOT / 'configs' / 'digits.py'}:rate=0.3"


def test_every_job_is_listed(capsys):
  overview.main()
  listed = capsys.readouterr().out
  jobs = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
  jobs.remove("experiments")  # what `python experiments/<job>.py` runs
  assert len(jobs) == 9
  assert all(f"  {job} " in listed for job in jobs)


@pytest.mark.parametrize(
  "given", [[f"--config={CONFIG}"], ["--config", CONFIG]]
)
def test_help_shows_flags_and_the_configs_fields_with_their_comments(
  capsys, given
):
  with pytest.raises(SystemExit) as left:
    cli._parse_flags(["train", *given, "--help"])
  assert left.value.code == 0
  text = capsys.readouterr().out
  assert "--workdir: Folder of this run" in text
  assert "--config.noise.rate=0.3\n" in text
  assert "The share of a set's images that may be damaged" in text


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["--config=configs/digits.py:foo=1"], r"'foo'; this config takes: rate"),
    (["--config=configs/digits.py:rate=x"], r"rate='x' can't be read as float"),
    (["--config", "none.py"], "expected a Python file"),
    (["--config=configs/__init__.py"], "it has no get_config"),
    (["--wrokdir=x"], "'wrokdir'. Did you mean: workdir"),
    (["--workdir"], "Missing value for flag --workdir"),
  ],
)
def test_what_is_wrong_with_a_command_is_one_line(
  arguments, expected, monkeypatch
):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit, match=f"^error: .*{expected}") as left:
    cli._parse_flags(["train", *arguments])
  assert "\n" not in str(left.value.code)


@pytest.mark.parametrize(
  "command",
  [
    ["experiments/sweep.py"],
    ["-mexperiments.trian"],
    ["-m", "experiments", "train"],
  ],
)
def test_a_job_called_otherwise_works_or_says_how(command):
  done = subprocess.run(
    [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode in (1, 2)
  assert re.fullmatch(
    r"error: .*(--config=|python -m experiments).*\n", done.stderr
  )


def test_help_on_a_config_that_is_not_there_is_one_line(capsys):
  with pytest.raises(SystemExit, match=r"error: --config is 'none.py'; expec"):
    cli._parse_flags(["train", "--config=none.py", "--help"])
