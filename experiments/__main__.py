"""Lists the jobs: `python -m experiments`."""

import ast
import pathlib

_FOLDER = pathlib.Path(__file__).parent


def main() -> None:
  """Prints each job with the first line of its description."""
  print(
    "python -m experiments.<job> --config=configs/<name>.py --workdir=...\n"
  )
  for file in sorted(_FOLDER.glob("[a-z]*.py")):
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    print(f"  {file.stem:10} {text.splitlines()[0]}")
  print(
    "\n--help says what a job takes; with --config, the config's fields too."
  )


if __name__ == "__main__":
  main()
