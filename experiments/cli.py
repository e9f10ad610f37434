"""What every job's command line shares: flags, log lines, one-line errors."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file in configs/, with :key=value,... after it."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this run; made if missing, continued if not."
)


def run(job: Callable[[Any, str], Any]) -> None:
  """Runs `job(config, workdir)` with the command line's config and workdir.

  Args:
    job: `train_and_evaluate`, `run_study` or another of their kind.
  """
  flags.mark_flags_as_required(["config", "workdir"])

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    debug = logging.level_debug()
    if not debug:
      logging.set_verbosity(logging.WARNING)
    try:
      job(_CONFIG.value, _WORKDIR.value)
    except (ValueError, TypeError, OSError, ImportError) as error:
      # What a user can mend is said in one line.
      if debug:
        raise
      sys.exit(f"error: {error} (--v=1 shows where this comes from)")
    except KeyboardInterrupt:
      sys.exit("interrupted; the same command goes on from the last checkpoint")

  app.run(main, flags_parser=_parse_flags)


def _parse_flags(argv):
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections raises these for a field that a locked config lacks.
    text = error.args[0] if error.args else error
    while isinstance(text, Exception):
      text = text.args[0] if text.args else ""
    lines = " ".join(str(text).split("\n")).strip("\"'")
    sys.exit(
      f"error: unknown config field: {lines} (configs/common.py lists the"
      " fields there are)"
    )
  except flags.IllegalFlagValueError as error:
    # A config file that can't be read ends in its own message.
    sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
