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
    logging.set_verbosity(logging.WARNING)
    try:
      job(_CONFIG.value, _WORKDIR.value)
    except (ValueError, TypeError, OSError) as error:
      # What a user can mend is said in one line; -v=1 shows where it came from.
      if logging.level_debug():
        raise
      sys.exit(f"error: {error}")
    except KeyboardInterrupt:
      sys.exit("interrupted; the same command goes on from the last checkpoint")

  app.run(main, flags_parser=_parse_flags)


def _parse_flags(argv):
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections raises these for a field that a locked config lacks.
    field = str(error).strip("\"'")
    sys.exit(
      f"error: unknown config field: {field}. configs/common.py lists the"
      " fields there are."
    )
