"""The command line of every job: flags, log lines, one-line errors."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.runtime import distributed, locks, preemption, programs

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file in configs/, with :key=value,... after it."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of this run; made if missing, continued if not."
)
# Where a run runs is no part of what it is: no fields of a config.
_PROGRAMS = flags.DEFINE_string(
  "compilation_cache",
  None,
  "Folder of compiled programs, or 'off'; if missing, .gradmimic_programs"
  " beside the workdir. JAX_COMPILATION_CACHE_DIR goes first.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Meet the other processes of this TPU pod, Slurm job..."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Meet the other processes: host:port of the first."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Meet the other processes: how many there are."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Meet the other processes: which this is, from 0."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout",
  distributed.HEARTBEAT_TIMEOUT,
  "Seconds without a sign of life after which a process counts as lost.",
  lower_bound=1,
)


# What a job does with several processes.
SHARED = "shared"  # they do it together
FIRST = "first"  # the first one does it; the others wait
ALONE = "alone"  # there must not be several


def run(
  job: Callable[[Any, str], Any],
  *,
  processes: str = ALONE,
  exclusive: bool = False,
  prepare: Callable[[Any], Any] = lambda config: config,
) -> None:
  """Runs `job(config, workdir)` with the command line's config and workdir.

  Of several processes only the first one's standard output is shown, and one
  that fails ends at once: JAX ends the others, which would wait for it.

  Args:
    job: `train_and_evaluate`, `run_study` or another of their kind.
    processes: what it does with several processes, one of the names above.
    exclusive: whether its workdir is locked meanwhile. Not so for jobs that
      share theirs, nor for those that lock the folders of their runs.
    prepare: fills in what of the config is read from elsewhere, before anything
      else is done with it.
  """
  preemption.listen()
  if exclusive:
    job = _locking(job)
  flags.mark_flags_as_required(["config", "workdir"])

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    debug = logging.level_debug()
    if not debug:
      logging.set_verbosity(logging.WARNING)
      logging.get_absl_handler().addFilter(_is_news)
    try:
      distributed.start(
        detect=_DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
      )
      if jax.distributed.is_initialized():
        if processes == ALONE and jax.process_count() > 1:
          # All come here, so they can leave in order.
          raise ValueError(
            "this job is one for a single process; expected no --distributed"
            " and no --coordinator"
          )
        return _run_together(job, prepare, processes, debug)
      _call(job, prepare)
    except (ValueError, TypeError, OSError, ImportError) as error:
      # What a user can mend is said in one line.
      if debug:
        raise
      sys.exit(f"error: {error} (--v=1 shows where this comes from)")
    except preemption.PreemptedError as left:
      preemption.ignore()
      if not jax.distributed.is_initialized():
        # Whatever was interrupted may not survive an orderly end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left.code)
      raise
    except KeyboardInterrupt:
      sys.exit("interrupted; the same command goes on from the last checkpoint")

  app.run(main, flags_parser=_parse_flags)


def _locking(job):
  def locked(config, workdir):
    with locks.hold(pathlib.Path(workdir), together=False):
      return job(config, workdir)

  return locked


def _call(job, prepare):
  workdir: Any = _WORKDIR.value
  if _PROGRAMS.value != "off":
    beside = pathlib.Path(workdir).absolute().parent / programs.FOLDER
    programs.keep_on_disk(_PROGRAMS.value or beside)
  return job(prepare(_CONFIG.value), workdir)


def _run_together(job, prepare, processes, debug):
  """As one of several processes, which all end if one of them fails."""
  with contextlib.ExitStack() as stack:
    if not distributed.is_first():
      nowhere = stack.enter_context(open(os.devnull, "w"))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
    try:
      if processes == FIRST:
        return distributed.by_first(lambda: _call(job, prepare))
      return _call(job, prepare)
    except Exception as error:
      if debug:
        logging.exception("process %d", jax.process_index())
      lines = str(error).strip().splitlines() or [type(error).__name__]
      print(
        f"error in process {jax.process_index()}: {lines[0]} (--v=1 shows where"
        " this comes from)",
        file=sys.stderr,
        flush=True,
      )
    except KeyboardInterrupt:
      print(
        f"process {jax.process_index()} was interrupted; the same command goes"
        " on from the last checkpoint",
        file=sys.stderr,
        flush=True,
      )
  # Leaving in order means to meet the others, which may wait elsewhere.
  os._exit(1)


def _is_news(record):
  """Not so orbax's errors, with stacks, which it raises in the end."""
  return record.levelname != "ERROR" or not (
    "orbax" in record.pathname or record.name == "asyncio"
  )


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
      f"error: unknown config field: {lines} (configs/base.py lists the"
      " fields there are)"
    )
  except flags.IllegalFlagValueError as error:
    # A config file that can't be read ends in its own message.
    sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
