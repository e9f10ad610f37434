"""Lists the jobs: `python -m experiments`."""

import ast
import pathlib
import sys

_FOLDER = pathlib.Path(__file__).parent


def main() -> None:
  """Prints each job with the first line of its description."""
  if sys.argv[1:2] and (_FOLDER / f"{sys.argv[1]}.py").is_file():
    print(
      f"error: expected python -m experiments.{sys.argv[1]}, with a dot",
      file=sys.stderr,
    )
    sys.exit(2)
  print(
    "python -m experiments.<job> --config=configs/<name>.py --workdir=...\n"
  )
  for file in sorted(_FOLDER.glob("[a-z]*.py")):
    if file.stem == _FOLDER.name:  # which is no job
      continue
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    print(f"  {file.stem:10} {text.splitlines()[0]}")
  print(
    "\n--help says what a job takes; with --config, the config's fields too."
  )


if __name__ == "__main__":
  main()
