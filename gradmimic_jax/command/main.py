"""Arguments of `gradmimic`, and its errors: one line, and status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

_CURATE = """\
Decides from every sample's scores which samples to keep.

The table has a row a sample and a column a step, or (--long) a row a sample and
step. High scores are good. DIR gets report.html, a page to look at; remove.csv
and keep.csv; selection.parquet, for `gradmimic filter` and Python; and
manifest.json, for `gradmimic inspect`.
"""
_FILTER = """\
Combines filters: & both, | either, - without, ~ not, and parentheses.

  gradmimic filter "mimic & ~short" --set mimic=out/selection.parquet \\
    --set short=short.csv --out kept.npy
"""
_INSPECT = """\
Says what a file holds and whether it is whole: a ledger, a filter, a selection,
a DataComp subset, a manifest, or a table. Status 1 if it is damaged.
"""


class _Parser(argparse.ArgumentParser):
  """Tells a mistake in one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command's arguments."""
  parser = _Parser(
    prog="gradmimic",
    description="Which samples of a data set to keep, by their scores.",
    allow_abbrev=False,
  )
  parser.add_argument("--version", action="store_true", help="print it")
  commands = parser.add_subparsers(dest="command", title="commands")

  def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(
      name,
      help=summary,
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  curate = add("curate", "from scores to a page and two lists", _CURATE)
  curate.add_argument(
    "scores", help="a table, .csv, .tsv or .parquet, or a ledger's folder"
  )
  curate.add_argument("--out", required=True, metavar="DIR", help="to write to")
  curate.add_argument(
    "--id", metavar="COL", help="column of ids; found by its name otherwise"
  )
  curate.add_argument(
    "--scores",
    dest="columns",
    metavar="COLS",
    help="columns of scores: names with commas, or a pattern such as 'step_*';"
    " all columns of numbers otherwise",
  )
  curate.add_argument(
    "--long",
    metavar="ID,STEP,SCORE",
    help="the three columns of a table with a row a sample and step",
  )
  curate.add_argument(
    "--labels",
    metavar="COL|FILE",
    help="the given labels: a column, or a .csv, .parquet, .npy or .txt file",
  )
  curate.add_argument(
    "--suggested", metavar="COL", help="column of better labels, for the page"
  )
  curate.add_argument(
    "--captions", metavar="COL", help="column of texts, for the page"
  )
  curate.add_argument(
    "--images",
    metavar="FOLDER|COL",
    help="the images: a folder, in which they are found by id, by a column of"
    " names or in order; or a column of paths",
  )
  curate.add_argument(
    "--mark",
    type=float,
    metavar="SCORE",
    help="the score that parts good from bad, where there is one: 0 for mimic"
    " scores, which a ledger's are",
  )
  curate.add_argument("--title", metavar="TEXT", help="of the page")

  chosen = add("filter", "combine filters into one file of ids", _FILTER)
  chosen.add_argument("expression", help="such as 'mimic & ~short'")
  chosen.add_argument(
    "--set",
    action="append",
    default=[],
    required=True,
    dest="sets",
    metavar="NAME=FILE",
    help="a filter's name and file: a selection, .npy or a table of ids; may be"
    " given again",
  )
  chosen.add_argument(
    "--pool", metavar="FILE", help="ids of all samples, for ~"
  )
  chosen.add_argument(
    "--out",
    required=True,
    metavar="FILE",
    help=".npy or .csv; ids that are DataComp's uids go to .npy as its subset",
  )

  inspect = add("inspect", "what a file holds, and if it is whole", _INSPECT)
  inspect.add_argument("path", help="a file, or a folder")
  return parser


def run(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the arguments; those of the process if not given.

  Returns:
    The exit status: 0; 1 for a damaged file that was inspected; 2 for a
    mistake, which is told in one line.

  Example:
    >>> run(["--version"])
    gradmimic_jax ...
    0
  """
  parser = make_parser()
  arguments = parser.parse_args(argv)
  try:
    if arguments.version:
      from gradmimic_jax import _version

      print(f"gradmimic_jax {_version.__version__}")
      return 0
    if arguments.command == "curate":
      from gradmimic_jax.command import curate

      return curate.run(arguments)
    if arguments.command == "filter":
      from gradmimic_jax.command import combine

      return combine.run(arguments)
    if arguments.command == "inspect":
      from gradmimic_jax.command import inspect

      return inspect.run(arguments)
  except (ValueError, TypeError, OSError, ImportError) as error:
    print(f"gradmimic {arguments.command}: {one_line(error)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("gradmimic: stopped", file=sys.stderr)
    return 130
  parser.print_help(sys.stderr)
  return 2


def one_line(error: BaseException) -> str:
  """Formats an error as one line."""
  text = " ".join(str(error).split()) or type(error).__name__
  if isinstance(error, OSError) and error.strerror and error.filename:
    text = f"{os.fspath(error.filename)}: {error.strerror}"
  return text


def main() -> NoReturn:
  """The console script."""
  sys.exit(run())


if __name__ == "__main__":
  main()
