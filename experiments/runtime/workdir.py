"""A run's folder: which config it belongs to, what is finished in it."""

import contextlib
import datetime
import errno
import hashlib
import io
import json
import os
import pathlib
import shutil
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from experiments.runtime import identity
from gradmimic_jax import _files

CONFIG_FILE = "config.json"
INPUT_FILE = "input.json"  # what a run's model was made for, and is shown
RESULT_FILE = "result.json"  # is there once a run has finished
# What `claim` adds to a config: which job it is of.
_JOB = "job"
_SEAL = "checksum"
_MAX_JSON = 1 << 30  # bytes; features' descriptions have every sample's id
_REMEDY = "Choose another --workdir, or delete that folder to start over."
# How C++ libraries say that a disk is full.
_FULL_DISK = tuple(os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT))


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that readers see the old one or the new, not a part.

  Several processes, of several hosts, may write the same file.
  """
  _files.write_bytes(path, content)


def write_json(path: pathlib.Path, value: Any, *, sealed: bool = False) -> None:
  """Writes JSON, all or nothing.

  Args:
    path: the file.
    value: its content; an object, if it is to be sealed.
    sealed: whether to add a checksum, which `read_json` takes out again.
  """
  if sealed:
    value = {**value, _SEAL: _seal(value)}
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  write_bytes(path, text.encode())


def read_json(
  path: pathlib.Path,
  fields: Mapping[str, type] | None = None,
  *,
  sealed: bool = True,
) -> Any:
  """Reads what `write_json` wrote.

  Args:
    path: the file.
    fields: of an object: names that must be there, and the types of their
      values. None: it may be no object.
    sealed: whether to compare a seal, if there is one, and to take it out.

  Returns:
    Its content.

  Raises:
    OSError: it isn't there, or can't be read.
    ValueError: it is damaged; the file is named.
  """
  found = _files.read_json(
    path,
    kind=object if fields is None else dict,
    max_bytes=_MAX_JSON,
    remedy=_REMEDY,
  )
  if not isinstance(found, dict):
    return found
  with _files.named(path, remedy=_REMEDY):
    for name, kind in (fields or {}).items():
      if not isinstance(found.get(name), kind):
        raise ValueError(f"its {name} is {str(found.get(name))[:80]!r}")
  if sealed and found.get(_SEAL, expected := _seal(found)) != expected:
    raise ValueError(
      f"{path} is damaged (its {_SEAL} is {str(found[_SEAL])[:40]!r}, not"
      f" {expected!r}). {_REMEDY}"
    )
  if sealed:
    found.pop(_SEAL, None)
  return found


def _seal(value):
  # Runs of one config have the same files but for the time that they took.
  kept = {k: v for k, v in value.items() if k not in (_SEAL, "seconds")}
  return fingerprint(kept)


def read_input(folder: pathlib.Path, *, checked: bool = True) -> dict[str, Any]:
  """Reads the input that a run's model was made for: its `input.json`.

  Args:
    folder: the run's.
    checked: whether to compare it with what the finished run says of it.

  Returns:
    Its content: shape, num_classes, mean and std.

  Raises:
    OSError: there is none.
    ValueError: it is damaged, or another run's.
  """
  file = folder / INPUT_FILE
  fields = {"shape": list, "num_classes": int, "mean": list, "std": list}
  shown = read_json(file, fields, sealed=checked)
  if checked:
    _check_owner(file, "input", shown)
  return shown


def read_model(folder: pathlib.Path) -> dict[str, Any]:
  """The section `model` of a run's config."""
  return read_json(folder / CONFIG_FILE, {"model": dict})["model"]


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The config of the job whose folder it is.

  Args:
    folder: its workdir.

  Returns:
    The config's sections and fields.

  Raises:
    OSError: there is none.
    ValueError: it is damaged, or an earlier release made the folder.
  """
  return _read_config(folder)[0]


def _read_config(folder):
  """The config, and the job whose it is."""
  found = read_json(folder / CONFIG_FILE, {})
  job = found.pop(_JOB, None)
  if job not in identity.IDENTITY:
    raise ValueError(
      f"{folder} was made by an earlier release, whose runs this one can't go"
      f" on with or read ({CONFIG_FILE} names no job). Use that release for it,"
      " or give the job's command again with another --workdir."
    )
  return found, job


def check_config(
  folder: pathlib.Path, job: str, prints: Mapping[str, str]
) -> None:
  """Raises ValueError where a run's `config.json` is that of another one.

  Args:
    folder: the run's.
    job: which job's it is, a name in `identity.IDENTITY`.
    prints: fingerprints that the run left elsewhere.
  """
  if "config" not in prints:
    return
  mine = config_fingerprint(read_config(folder), job)
  if mine != prints["config"]:
    raise ValueError(
      f"{folder / CONFIG_FILE} is of another run: its fingerprint is {mine!r},"
      f" and by {RESULT_FILE} or the ledger beside it {prints['config']!r}."
      " Restore what doesn't belong there."
    )


def of_result(folder: pathlib.Path) -> dict[str, str]:
  """The fingerprints in a finished run's `result.json`; {}: there are none."""
  file = folder / RESULT_FILE
  if not file.exists():
    return {}
  found = read_json(file, {}).get("fingerprints", {})
  return found if isinstance(found, dict) else {}


def _check_owner(file, name, content):
  """Raises ValueError where a file is not of the run whose result is beside."""
  own, found = of_result(file.parent).get(name), fingerprint(content)
  if own not in (None, found):
    raise ValueError(
      f"{file} is of another run: its fingerprint is {found!r}, and that in"
      f" {RESULT_FILE} is {own!r}. Restore the one that doesn't belong there."
    )


def read_result(file: pathlib.Path, expected: str) -> dict[str, Any]:
  """Reads the `result.json` of a finished run.

  Args:
    file: that file.
    expected: the fingerprint of the run that would be trained now.

  Returns:
    Its content.

  Raises:
    ValueError: it is damaged, or has another fingerprint.
  """
  result = read_json(file, {"fingerprint": str})
  if "fingerprints" in result and _SEAL not in read_json(file, sealed=False):
    raise ValueError(f"{file} is damaged (it has no {_SEAL}). {_REMEDY}")
  if result["fingerprint"] != expected:
    raise ValueError(
      f"{file} stems from other data, or another reference, filter, backbone or"
      f" start (fingerprint {result['fingerprint']!r}, expected {expected!r})."
      " Choose another --workdir, or delete that one to start over."
    )
  return result


def write_arrays(path: pathlib.Path, **arrays: Any) -> None:
  """Writes an `.npz` file of what are arrays, all or nothing."""
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  write_bytes(path, content.getvalue())


def fingerprint(*parts: Any) -> str:
  """Sixteen hex digits that tell JSON-like values apart."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine(device: jax.Device | None = None) -> dict[str, Any]:
  """Describes the machine of a result (None: the default device), dated."""
  device = device or jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "cpu_cores": os.cpu_count(),
    "jax": jax.__version__,
    "date": datetime.date.today().isoformat(),
  }


def as_dict(config: config_dict.ConfigDict) -> dict[str, Any]:
  """The config as JSON reads it back."""
  return json.loads(config.to_json())


def flatten(
  config: config_dict.ConfigDict | dict[str, Any],
) -> dict[str, Any]:
  """The config as `{"section.field": value}`."""
  return _flat(config if isinstance(config, dict) else as_dict(config))


def config_fingerprint(
  config: config_dict.ConfigDict | dict[str, Any], job: str
) -> str:
  """The fingerprint of the fields that make a job what it is.

  Args:
    config: the job's.
    job: a name in `identity.IDENTITY`.

  Returns:
    Sixteen hex digits.
  """
  return fingerprint(identity.pick_fields(flatten(config), job))


def check(
  path: str | os.PathLike,
  config: config_dict.ConfigDict,
  fields: types.ModuleType,
  *,
  job: str,
) -> pathlib.Path:
  """Raises unless `path` may be, or become, the workdir of this config.

  Args:
    path: the folder, which need not be there.
    config: what is going to run in it.
    fields: the module of `configs` whose `get_config()` has every field there
      is for this kind of job.
    job: a name in `identity.IDENTITY`, which says what fields may not differ
      from an earlier run's. Of paths to other inputs it is the contents that
      count, and the run's fingerprint has those.

  Returns:
    The folder's path.

  Raises:
    ValueError: the config has a field that doesn't exist or lacks one, or the
      folder belongs to another config; the field that differs is named.
    PermissionError: the folder can't be written to, or made.
  """
  check_fields(config, fields)
  folder = pathlib.Path(path)
  _check_writable(folder)
  file = folder / CONFIG_FILE
  if file.exists():
    found, theirs_job = _read_config(folder)
    for field, theirs, ours in _differences(found, as_dict(config)):
      if identity.counts(field, job):
        raise ValueError(
          f"workdir {folder} belongs to another config: {field} is {theirs!r}"
          f" there and {ours!r} here ({CONFIG_FILE}). Choose another --workdir,"
          " or delete that one to start over."
        )
    if theirs_job != job:
      raise ValueError(
        f"workdir {folder} belongs to another job: {theirs_job!r} there and"
        f" {job!r} here ({CONFIG_FILE}). Choose another --workdir."
      )
  elif folder.exists() and any(
    entry.suffix != ".tmp" and not entry.match(".lock*")
    for entry in folder.iterdir()
  ):
    raise ValueError(
      f"workdir {folder} is not empty and has no {CONFIG_FILE}; expected a new"
      " folder or one that an earlier run of this config made."
    )
  return folder


def _check_writable(folder):
  there = folder
  while not there.exists() and there != there.parent:
    there = there.parent
  # Also tells of a file system that is mounted read-only.
  if not os.access(there, os.W_OK):
    raise PermissionError(
      f"workdir {folder} can't be written to: {there} is read-only, or belongs"
      " to somebody else. Choose another --workdir."
    )


def check_room(
  folder: pathlib.Path, size: int, *, beside: str, what: str
) -> None:
  """Raises unless there is room for what a job is going to write.

  Args:
    folder: the run's.
    size: bytes of it.
    beside: the name of its folder; what an earlier run left there counts as
      room, as it will be replaced.
    what: it is, for the message.

  Raises:
    OSError: the disk is too full.
  """
  found = folder / beside
  there = sum(
    path.stat().st_size for path in found.rglob("*") if path.is_file()
  )
  free = shutil.disk_usage(folder).free
  if free < size - there:
    raise OSError(
      f"{what} in {folder} may take {_megabytes(size - there)}, and the disk"
      f" has {_megabytes(free)} left. Make room, lower config.checkpoint.keep,"
      " or choose another --workdir."
    )


@contextlib.contextmanager
def full_disk_named(folder: pathlib.Path) -> Iterator[None]:
  """Turns what libraries raise on a full disk into one line that says so.

  Args:
    folder: the run's.

  Yields:
    Nothing.

  Raises:
    OSError: the block failed for want of room.
  """
  try:
    yield
  except Exception as error:
    if not _is_full_disk(error):
      raise
    free = _megabytes(shutil.disk_usage(folder).free)
    raise OSError(
      f"the disk of {folder} is full ({free} left). The last checkpoint is"
      " whole: make room, and the same command goes on from there."
    ) from error


def _is_full_disk(error):
  """True if the error, or one that led to it, is for want of room."""
  seen = []
  while error is not None and error not in seen:
    seen.append(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(text in str(error) for text in _FULL_DISK):
      return True
    error = error.__cause__ or error.__context__
  return False


def _megabytes(size):
  return f"{size / 1e6:,.1f} MB"


def claim(
  path: str | os.PathLike,
  config: config_dict.ConfigDict,
  fields: types.ModuleType,
  *,
  job: str,
) -> pathlib.Path:
  """Makes `path` the workdir of this config, after `check`.

  A job claims its workdir once it knows that the config can run, so that a
  mistake can be mended in the same workdir.

  Args:
    path: the folder; made if it is missing.
    config: as in `check`.
    fields: as in `check`.
    job: as in `check`.

  Returns:
    The folder's path.

  Raises:
    ValueError: as `check`.
  """
  folder = check(path, config, fields, job=job)
  folder.mkdir(parents=True, exist_ok=True)
  about = {**as_dict(config), _JOB: job}
  write_json(folder / CONFIG_FILE, about, sealed=True)
  return folder


def check_fields(
  config: config_dict.ConfigDict, fields: types.ModuleType
) -> None:
  """Raises ValueError unless the config has exactly the fields there are."""
  known, given = _flat(as_dict(fields.get_config())), _flat(as_dict(config))
  file = fields.__name__.replace(".", "/") + ".py"
  for field in given:
    if field not in known:
      raise ValueError(
        f"unknown config field {field!r}; {file} lists the fields there are."
      )
  for field in known:
    if field not in given:
      raise ValueError(f"config field {field!r} is missing; start from {file}.")


def _differences(theirs, ours):
  a, b = _flat(theirs), _flat(ours)
  absent = "(absent)"
  return [
    (field, a.get(field, absent), b.get(field, absent))
    for field in sorted(a.keys() | b.keys())
    if a.get(field, absent) != b.get(field, absent)
  ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
