"""What the commands say of themselves."""

import pathlib

import pytest

from experiments import __main__ as overview
from experiments.runtime import cli

ROOT = pathlib.Path(__file__).parents[3]


def test_every_job_is_listed(capsys):
  overview.main()
  listed = capsys.readouterr().out
  jobs = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
  assert len(jobs) == 9
  assert all(f"  {job} " in listed for job in jobs)


def test_help_shows_flags_and_the_configs_fields_with_their_comments(capsys):
  config = ROOT / "configs" / "digits.py"
  with pytest.raises(SystemExit) as left:
    cli._parse_flags(["train", f"--config={config}:rate=0.3", "--help"])
  assert left.value.code == 0
  text = capsys.readouterr().out
  assert "--workdir: Folder of this run" in text
  assert "--config.noise.rate=0.3\n" in text
  assert "The share of a set's images that may be damaged" in text


def test_help_on_a_config_that_is_not_there_is_one_line(capsys):
  with pytest.raises(SystemExit, match=r"error: --config is 'none.py'; expec"):
    cli._parse_flags(["train", "--config=none.py", "--help"])
