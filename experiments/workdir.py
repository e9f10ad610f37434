"""A run's folder: which config it belongs to, what is finished in it."""

import hashlib
import json
import os
import pathlib
from typing import Any

from ml_collections import config_dict

from configs import common

CONFIG_FILE = "config.json"


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, never a part."""
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w") as file:
    json.dump(value, file, indent=2, sort_keys=True)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def read_json(path: pathlib.Path) -> Any:
  """Reads what `write_json` wrote."""
  with open(path) as file:
    return json.load(file)


def fingerprint(*parts: Any) -> str:
  """Sixteen hex digits that tell JSON-like values apart."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_dict(config: config_dict.ConfigDict) -> dict[str, Any]:
  """The config as JSON reads it back."""
  return json.loads(config.to_json())


def claim(path: str | os.PathLike, config: config_dict.ConfigDict):
  """Makes `path` the workdir of this config.

  Args:
    path: the folder; made if it is missing.
    config: what is going to run in it.

  Returns:
    The folder's path.

  Raises:
    ValueError: the config has a field that doesn't exist or lacks one, or the
      folder belongs to another config; the field that differs is named.
  """
  check_fields(config)
  folder = pathlib.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  ours = as_dict(config)
  file = folder / CONFIG_FILE
  if file.exists():
    differences = _differences(read_json(file), ours)
    if differences:
      field, theirs, mine = differences[0]
      raise ValueError(
        f"workdir {folder} belongs to another config: {field} is {theirs!r}"
        f" there and {mine!r} here. Choose another --workdir, or delete that"
        " one to start over."
      )
  elif any(folder.iterdir()):
    raise ValueError(
      f"workdir {folder} is not empty and has no {CONFIG_FILE}; expected a new"
      " folder or one that an earlier run of this config made."
    )
  else:
    write_json(file, ours)
  return folder


def check_fields(config: config_dict.ConfigDict) -> None:
  """Raises ValueError unless the config has exactly the fields there are."""
  known, given = _flat(as_dict(common.get_config())), _flat(as_dict(config))
  for field in given:
    if field not in known:
      raise ValueError(
        f"unknown config field {field!r}; configs/common.py lists the fields"
        " there are."
      )
  for field in known:
    if field not in given:
      raise ValueError(
        f"config field {field!r} is missing; start from configs/common.py."
      )


def _differences(theirs, ours):
  a, b = _flat(theirs), _flat(ours)
  absent = "(absent)"
  return [
    (field, a.get(field, absent), b.get(field, absent))
    for field in sorted(a.keys() | b.keys())
    if a.get(field, absent) != b.get(field, absent)
  ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
