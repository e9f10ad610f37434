"""Runs a list of jobs that build on each other, or prints their commands.

A cell of the sweep is one job with a workdir of its own, run as a process of
its own. Finished cells stay, an interrupted one goes on if its job can, and any
number of processes may be given the same command: they share the cells.
`--config.run=false` prints the commands, for a scheduler to run.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import Any, NamedTuple

from ml_collections import config_dict

from configs import sweep as sweep_config
from experiments.runtime import (
  claims,
  preemption,
  renamed,
  terminal,
  workdir as workdir_lib,
)

JOBS = (
  "train",
  "tune",
  "study",
  "benchmark",
  "score",
  "select",
  "report",
  "compare",
)
_CELL = re.compile(r"([\w.-]+): *(\w+) +(.+)", re.DOTALL)
_SWEEP = "sweep"  # in braces: the sweep's own folder
_MENTIONED = re.compile(r"\{([\w.-]+)\}")


class Cell(NamedTuple):
  """One job of a sweep."""

  name: str  # and its folder's
  job: str
  arguments: tuple[str, ...]  # of the command line, but for --workdir
  needs: tuple[str, ...]  # cells whose folders the arguments mention


def run_sweep(config: config_dict.ConfigDict, workdir: Any) -> list[str]:
  """Runs all cells, or prints their commands.

  Args:
    config: as `configs/sweep.py` describes it.
    workdir: gets each cell's folder, its output as `<name>.log`, and
      `<name>.json` once it is done: job, times and duration.

  Returns:
    The cells' commands.

  Raises:
    ValueError: a cell that can't be read, or that needs one which is not there.
    ChildProcessError: a job failed; its last words are in the message.
  """
  folder = pathlib.Path(workdir)
  cells = parse(config.cells)
  commands = [command(cell, folder) for cell in cells]
  if not config.run:
    for line in commands:
      print(line)
    return commands
  workdir_lib.claim(folder, config, sweep_config, job="sweep")
  finished = sum((folder / f"{cell.name}.json").exists() for cell in cells)
  terminal.note(
    terminal.outline(
      "sweep",
      {
        "jobs": f"{len(cells)}, {finished} of them finished",
        "of": ", ".join(dict.fromkeys(cell.job for cell in cells)),
        "look at": f"{folder}/<job's name>.log",
      },
    )
  )
  done: set[str] = set()

  def attempt(cell):
    if not done.issuperset(cell.needs):
      return None
    if _attempt(cell, folder):
      done.add(cell.name)
      return True
    return None

  claims.share(cells, attempt)
  return commands


def parse(lines: Any) -> list[Cell]:
  """Parses lines such as `name: job --config=... --config.x={other}`.

  Args:
    lines: of `config.cells`; `{other}` stands for the folder of another cell,
      `{sweep}` for that of the sweep.

  Returns:
    The cells, each after those that it needs.

  Raises:
    ValueError: a line that can't be read, a name given twice, a job that isn't
      there, or a cell that is needed and doesn't come before.
  """
  cells: dict[str, Cell] = {}
  for line in lines:
    match = _CELL.fullmatch(line.strip())
    if match is None:
      raise ValueError(
        f"config.cells has {line!r}; expected 'name: job --config=...'."
      )
    name, job, arguments = match.groups()
    needs = tuple(
      other
      for other in dict.fromkeys(_MENTIONED.findall(arguments))
      if other != _SWEEP
    )
    if job not in JOBS:
      new = renamed.command(job)
      raise ValueError(
        f"cell {name!r} is of job {job!r}; expected one of {', '.join(JOBS)}."
        + (f" It is now {new}." if new else "")
      )
    if name in cells:
      raise ValueError(f"config.cells has {name!r} twice.")
    for other in needs:
      if other not in cells:
        raise ValueError(
          f"cell {name!r} needs {other!r}, which does not come before it."
        )
    cells[name] = Cell(name, job, tuple(shlex.split(arguments)), needs)
  return list(cells.values())


def command(cell: Cell, folder: pathlib.Path) -> str:
  """Formats the cell's command line."""
  return shlex.join(["python", *_arguments(cell, folder)])


def _arguments(cell, folder):
  def path(match):
    return str(folder if match[1] == _SWEEP else folder / match[1])

  return [
    "-m",
    f"experiments.{cell.job}",
    f"--workdir={folder / cell.name}",
    *(_MENTIONED.sub(path, argument) for argument in cell.arguments),
  ]


def _attempt(cell, folder) -> bool:
  """Runs a cell; False if another process is at it."""
  marker = folder / f"{cell.name}.json"
  # Folders may be moved: their paths are not compared.
  wanted = [cell.job, *cell.arguments]
  if _done(marker, wanted):
    return True
  claim = claims.take(folder / f"{cell.name}.claim")
  if claim is None:
    return False
  try:
    if _done(marker, wanted):
      return True
    print(f"{cell.name}: {cell.job}", flush=True)
    start = time.monotonic()
    log = folder / f"{cell.name}.log"
    code = _run([sys.executable, *_arguments(cell, folder)], log)
    if code == preemption.STATUS_OF_CELLS:  # which is not done yet
      preemption.leave(f"{cell.name} was asked to leave")
    if code:
      last = log.read_text().strip().splitlines()[-1:]
      raise ChildProcessError(
        f"{cell.name} failed: {''.join(last)} ({log} has all of its output;"
        " the same command goes on from there)."
      )
    about = {
      "command": wanted,
      "seconds": round(time.monotonic() - start, 1),
      "machine": workdir_lib.machine(),
    }
    workdir_lib.write_json(marker, about)
    return True
  finally:
    claim.release()


def _run(command, log):
  """Runs a job, and returns its status; asks it to leave when interrupted."""
  status = {preemption.STATUS: str(preemption.STATUS_OF_CELLS)}
  with (
    open(log, "a") as output,
    subprocess.Popen(
      command,
      stdout=output,
      stderr=subprocess.STDOUT,
      env={**os.environ, **status},
    ) as process,
  ):
    try:
      return process.wait()
    except BaseException:
      process.terminate()
      process.wait()
      raise


def _done(marker, wanted):
  if not marker.exists():
    return False
  return workdir_lib.read_json(marker, {"command": list})["command"] == wanted


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Runs the sweep, then says where its results are."""
  run_sweep(config, workdir)
  if config.run:
    print(f"done: {workdir}")
