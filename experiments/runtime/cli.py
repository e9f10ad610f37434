"""The command line of every job: flags, log lines, one-line errors."""

import contextlib
import gc
import importlib.util
import inspect
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.runtime import (
  distributed,
  fields,
  locks,
  preemption,
  programs,
)

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
  gc.freeze()  # what was imported, which is no garbage
  gc.enable()
  if exclusive:
    job = _locking(job)

  def main(argv):
    if len(argv) > 1:
      sys.exit(
        f"error: unexpected arguments: {' '.join(argv[1:])} (--help shows what"
        " there is)"
      )
    if _CONFIG.value is None or not _WORKDIR.value:
      sys.exit(
        "error: expected --config=configs/<name>.py and --workdir=runs/<name>"
        " (--help shows more)"
      )
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
      print(
        "interrupted; the same command goes on from what is saved",
        file=sys.stderr,
      )
      sys.exit(preemption.STATUS_OF_CTRL_C)

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


def _given_config(argv):
  """The config's file and its argument, as they were given; ("", ""): none."""
  found = ""
  for place, argument in enumerate(argv):
    name, is_assigned, value = argument.partition("=")
    if name in ("--config", "-config"):
      found = value if is_assigned else "".join(argv[place + 1 : place + 2])
  path, _, arg = found.partition(":")
  return path, arg


def _load_config(path, arg):
  """Loads a config's module and its config; leaves with a line about both."""
  if not pathlib.Path(path).is_file() or not path.endswith(".py"):
    sys.exit(f"error: --config is {path!r}; expected a Python file in configs/")
  spec = importlib.util.spec_from_file_location("given_config", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # where inspect looks for its source
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ValueError("it has no get_config; expected a Python file with one")
    return module, module.get_config(arg)
  except (ValueError, TypeError, OSError, ImportError) as error:
    sys.exit(f"error: --config={path}{arg and f':{arg}'}: {error}")


def _show_help(argv):
  """Prints what the command does, its flags, and the fields of its config."""
  print(inspect.cleandoc(sys.modules["__main__"].__doc__ or ""))
  print("\nflags:")
  for flag in flags.FLAGS.get_key_flags_for_module(__name__):
    print(f"  --{flag.name}: {flag.help}")
  path, arg = _given_config(argv)
  if not path:
    print("\nWith --config=configs/<name>.py as well: the config's fields.")
    return
  module, config = _load_config(path, arg)
  sources = [
    importlib.import_module(f"configs.{name}")
    for name in ("base", config.get("task", ""))
    if importlib.util.find_spec(f"configs.{name}") and name
  ]
  print(f"\n{inspect.cleandoc(module.__doc__ or '')}\n\nfields:")
  width = shutil.get_terminal_size().columns
  print(
    fields.as_text(fields.list_fields(config, [*sources, module]), width=width)
  )


def _parse_flags(argv):
  if {"--help", "-help", "-h", "--helpfull"} & set(argv):
    _show_help(argv)
    sys.exit(0)
  path, arg = _given_config(argv)
  if path:  # what is wrong with it, in one line, before ml_collections' many
    _load_config(path, arg)
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    # ml_collections raises these for a field that a locked config lacks.
    text = error.args[0] if error.args else error
    while isinstance(text, Exception):
      text = text.args[0] if text.args else ""
    name, _, advice = str(text).strip("\"'").partition("\n")
    name = name.strip("\"' ")
    advice = advice and f" {advice.strip()}"
    sys.exit(
      f"error: unknown config field: {name}.{advice} (--help shows the fields"
      " of the --config)"
    )
  except flags.Error as error:
    text = str(error).replace("\n", " ").strip()
    sys.exit(f"error: {text} (--help shows what there is)")
