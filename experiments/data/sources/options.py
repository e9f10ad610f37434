"""What a config says about a data set, for the sources that read it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# Names that columns are looked for under where the config names none.
FILE_NAMES = ("file", "filename", "file_name", "image", "path", "image_path")
IMAGE_NAMES = ("image", "img", "images", "jpg", "png", "image_bytes")
LABEL_NAMES = ("label", "labels", "class", "class_name", "target", "category")
ID_NAMES = ("id", "uid", "image_id")
SPLIT_NAMES = ("split", "subset", "fold", "partition")


class Options(NamedTuple):
  """How a set is read.

  Attributes:
    path: Its file, folder or pattern.
    labels: A file with labels, where they are in one of their own; a relative
      path counts from here or, where that isn't there, from the set.
    image: The column of images, or of their files; "": by its usual names.
    label: The column of labels, likewise.
    id: The column of ids, likewise.
    split: The column of splits, likewise.
    channels: Of images: 1, 3 or 4; 0: found from the files' headers.
  """

  path: str
  labels: str | None = None
  image: str = ""
  label: str = ""
  id: str = ""
  split: str = ""
  channels: int = 0


def read_options(data: Any, path: str) -> Options:
  """Takes a set's options from `config.data`.

  Args:
    data: `config.data`; fields that it lacks are left at their defaults.
    path: The set's path, as its name has it.

  Returns:
    The Options.

  Raises:
    ValueError: If `channels` isn't a number of channels.
  """
  columns = data.get("columns") or {}
  channels = data.get("channels") or 0
  if channels not in (0, 1, 3, 4):
    raise ValueError(
      f"config.data.channels is {channels!r}; expected 1 (grey), 3 (RGB), 4"
      " (RGBA), or 0 to find it from the files"
    )
  return Options(
    path,
    data.get("labels") or None,
    **{name: columns.get(name) or "" for name in ("image", "label", "id")},
    split=columns.get("split") or "",
    channels=channels,
  )


def pick_column(
  names: Sequence[str],
  wanted: str,
  usual: Sequence[str],
  *,
  field: str,
  where: str,
  required: bool = True,
) -> str | None:
  """Picks a column of a table.

  Args:
    names: The columns that there are.
    wanted: The name that the config gives, or "".
    usual: Names to look for where it gives none; the first that is there.
    field: The field of `config.data.columns`.
    where: The table, for messages.
    required: Whether it has to be there.

  Returns:
    Its name; None if there is none and none is needed.

  Raises:
    ValueError: If it isn't there, or comes twice.
  """
  found = wanted if wanted in names else None
  if not wanted:
    found = next((name for name in usual if name in names), None)
  if found is None and (wanted or required):
    looked = repr(wanted) if wanted else f"one of {', '.join(usual)}"
    shown = ", ".join(map(repr, names[:20]))
    raise ValueError(
      f"{where} has the columns {shown}; expected {looked} for"
      f" {field}s: set config.data.columns.{field} to the name of that column"
    )
  if found is not None and list(names).count(found) > 1:
    raise ValueError(
      f"{where} has the column {found!r} twice; rename one of them"
    )
  return found
