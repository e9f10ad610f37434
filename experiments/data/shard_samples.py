"""The samples of one webdataset shard, and a count of what is wrong with them.

A sample is a run of members of one name: an image, a caption (`txt`) and `json`
that has its uid. Whatever is wrong with one is counted by reason, and never
stops the reading of the next.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import gradmimic_jax as gm
from experiments.data import limits as limits_lib, tar
from gradmimic_jax.selection.uids import parse_uids

_ROLES = {
  **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
  "txt": "caption",
  "json": "json",
}
UID_SOURCES = ("json", "name")
_HEX = re.compile(r"[0-9a-f]{1,32}")
_ODDITIES = {
  # What was no UTF-8 is read as the character that stands for unknown ones.
  "unknown characters in the caption": re.compile("\ufffd"),
  "control characters in the caption": re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
  ),
}
_DRIVE = re.compile(r"[A-Za-z]:")
_LISTED = 5  # Samples that are listed for each reason.


class Sample(NamedTuple):
  """One sample as it was stored."""

  shard: str  # The shard's file name.
  key: str  # Its name in the shard.
  uid: str  # 32 hexadecimal digits.
  caption: str
  image: bytes  # Encoded.


@dataclasses.dataclass
class Statistics:
  """What was found while reading; counts go on over epochs.

  Attributes:
    read: Samples that were looked at, the broken ones included.
    samples: Samples that came out in batches.
    filtered: Sound samples that the filter leaves out.
    shards: Shards that were opened.
    broken: Samples that could not be used, by reason. A shard that is damaged
      or can't be read counts as one, whatever it held.
    noted: What is odd and no sample is lost by, by what it is; but of copies
      that meet in one batch only the first is used.
    listed: The first few of each reason: [reason, shard, name, detail], as
      `ascii` prints them, for a stranger wrote them.
  """

  read: int = 0
  samples: int = 0
  filtered: int = 0
  shards: int = 0
  broken: dict[str, int] = dataclasses.field(default_factory=dict)
  noted: dict[str, int] = dataclasses.field(default_factory=dict)
  listed: list[list[str]] = dataclasses.field(default_factory=list)

  @property
  def broken_share(self) -> float:
    """Broken samples as a share of all that were looked at."""
    return sum(self.broken.values()) / max(self.read, 1)

  def add_broken(
    self, reason: str, shard: str, key: str, detail: Any = ""
  ) -> None:
    """Counts a sample that can't be used."""
    self._add(self.broken, reason, shard, key, detail)

  def add_noted(
    self, what: str, shard: str, key: str, detail: Any = ""
  ) -> None:
    """Counts a sample with something odd."""
    self._add(self.noted, what, shard, key, detail)

  def note_oddities(self, sample: Sample) -> None:
    """Counts what is odd about a caption that is used all the same."""
    for what, is_odd in _ODDITIES.items():
      if is_odd.search(sample.caption):
        self.add_noted(what, sample.shard, sample.key)

  def _add(self, counts, reason, shard, key, detail):
    counts[reason] = counts.get(reason, 0) + 1
    texts = (shard, key, str(detail))
    row = [reason, *(ascii(text)[1:-1][:200] for text in texts)]
    # Counts go on over epochs; the same sample is listed once.
    listed = [other for other in self.listed if other[0] == reason]
    if len(listed) < _LISTED and row not in listed:
      self.listed.append(row)

  def as_dict(self) -> dict[str, Any]:
    """As JSON holds it; `Statistics(**as_dict)` is its like."""
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    lines = [
      f"{self.samples:,} samples from {self.shards:,} shards;"
      f" {self.read:,} looked at, {self.filtered:,} left out by the filter,"
      f" {sum(self.broken.values()):,} broken"
    ]
    for title, counts in (("broken", self.broken), ("noted", self.noted)):
      for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f"  {title}: {reason}: {count:,}")
        for listed, shard, key, detail in self.listed:
          if listed == reason:
            lines.append(f"    {shard} {key} {detail}".rstrip())
    return "\n".join(lines)


def read(
  path: str,
  statistics: Statistics,
  *,
  skip: int = 0,
  keep: np.ndarray | None = None,
  uid_source: str = "json",
  with_content: bool = True,
  limits: limits_lib.Limits = limits_lib.DEFAULT,
) -> Iterator[Sample | None]:
  """Goes through the samples of a shard; only seeks past what isn't needed.

  Args:
    path: The shard, an uncompressed tar file.
    statistics: Where everything is counted, but `samples`.
    skip: Samples to pass over unread, and uncounted.
    keep: `u8,u8` [K] ascending, the uids to keep; None keeps all. Images of
      others are not read.
    uid_source: "json", or "name": 32 digits made of the names of the shard and
      the sample, for shards that have no uids.
    with_content: Whether to read captions and images; without, a sample's are
      empty, and not missed.
    limits: What is believed of the file.

  Yields:
    Each sample in its order, None for one that is broken or filtered out, so
    that counting what is yielded gives the place in the shard.
  """
  shard = os.path.basename(path)
  if not skip:
    statistics.shards += 1
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(path, "rb"))
      groups = _groups(tar.members(file, limits=limits))
      for number, group in enumerate(groups):
        if number < skip:
          continue
        if not group.parts and group.problem is None:
          statistics.add_noted(
            "file that is no part of a sample", shard, group.key
          )
          yield None
          continue
        statistics.read += 1
        try:
          sample = _sample(
            file, shard, group, keep, uid_source, with_content, limits
          )
        except _BrokenError as error:
          statistics.add_broken(error.reason, shard, group.key, error.detail)
          sample = None
        else:
          if sample is None:
            statistics.filtered += 1
          else:
            statistics.note_oddities(sample)
        yield sample
    except (tar.DamagedError, OSError) as error:
      statistics.read += 1
      damaged = isinstance(error, tar.DamagedError)
      reason = "shard damaged" if damaged else "shard not readable"
      statistics.add_broken(reason, shard, "", error)


class _BrokenError(Exception):
  def __init__(self, reason: str, detail: Any = ""):
    super().__init__(reason)
    self.reason, self.detail = reason, detail


@dataclasses.dataclass
class _Group:
  """The members of one name."""

  key: str
  parts: dict[str, tar.Member] = dataclasses.field(default_factory=dict)
  problem: tuple[str, str] | None = None


def _groups(members: Iterable[tar.Member]) -> Iterator[_Group]:
  """Runs of members of one name, up to its first dot."""
  group: _Group | None = None
  damaged = None
  members = iter(members)
  while True:
    try:
      member = next(members)
    except StopIteration:
      break
    except tar.DamagedError as error:
      damaged = error  # Told once the group before it is out.
      break
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if member.kind == tar.DIRECTORY or (
      stem.startswith("__") and stem.endswith("__")
    ):
      continue  # Metadata of the shard, by webdataset's convention.
    key = f"{folder}/{stem}" if folder else stem
    if group is None or key != group.key:
      if group is not None:
        yield group
      group = _Group(key)
    role = _ROLES.get(suffix.lower())
    if _is_unsafe(member.name):
      group.problem = ("unsafe name", "")
    elif member.kind != tar.FILE:
      group.problem = (f"{member.kind} in place of a file", member.name)
    elif role is not None and stem:
      if role in group.parts:
        group.problem = ("more than one file of a kind", member.name)
      group.parts[role] = member
  if group is not None:
    yield group
  if damaged is not None:
    raise damaged


def _is_unsafe(name: str) -> bool:
  """Whether unpacking would put a file outside of the folder, or confuse.

  Nothing is unpacked here, but others may unpack what this lets pass.
  """
  parts = name.replace("\\", "/").split("/")
  return ".." in parts or parts[0] == "" or bool(_DRIVE.match(name))


def _sample(
  file: BinaryIO,
  shard: str,
  group: _Group,
  keep: np.ndarray | None,
  uid_source: str,
  with_content: bool,
  limits: limits_lib.Limits,
) -> Sample | None:
  if group.problem is not None:
    raise _BrokenError(*group.problem)
  wanted = ["json"] if uid_source == "json" else []
  if with_content:
    wanted += ["caption", "image"]
  most = {
    "json": limits.json_bytes,
    "caption": limits.caption_bytes,
    "image": limits.image_bytes,
  }
  for role in wanted:
    if role not in group.parts:
      raise _BrokenError("no uid" if role == "json" else f"no {role}")
    size = group.parts[role].size
    if size > most[role]:
      raise _BrokenError(
        f"{role} too large", f"{size} bytes; the limit is {most[role]}"
      )

  def content(role):
    member = group.parts[role]
    file.seek(member.offset)
    return file.read(member.size)

  if uid_source == "json":
    uid = _uid(content("json"))
  else:
    name = f"{shard}/{group.key}"
    uid = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
  if keep is not None and not _is_in(keep, uid):
    return None
  if not with_content:
    return Sample(shard, group.key, uid, "", b"")
  caption = content("caption").decode("utf-8", "replace").strip()
  if not caption:
    raise _BrokenError("no caption", "it is empty")
  return Sample(shard, group.key, uid, caption, content("image"))


def _uid(content: bytes) -> str:
  try:
    about = json.loads(content)
  except (ValueError, RecursionError) as error:  # Too deep, or too many digits.
    raise _BrokenError("json not readable", str(error)[:200]) from error
  uid = about.get("uid") if isinstance(about, dict) else None
  if uid is None:
    raise _BrokenError("no uid")
  if not isinstance(uid, str) or not _HEX.fullmatch(uid):
    raise _BrokenError("uid is not 32 hexadecimal digits", str(uid)[:80])
  return uid.zfill(32)


def _is_in(keep: np.ndarray, uid: str) -> bool:
  pair = np.array((int(uid[:16], 16), int(uid[16:], 16)), keep.dtype)
  place = int(np.searchsorted(keep, pair))
  return place < len(keep) and keep[place] == pair


def kept_uids(keep: Any) -> np.ndarray | None:
  """Uids to keep as `read` wants them: `u8,u8` ascending, each once.

  Args:
    keep: The path of a DataComp subset file, a `gm.filters.Filter`, uids as
      strings or pairs, or None.

  Returns:
    Pairs [K], or None.

  Raises:
    ValueError: If uids don't read, or there is none.
  """
  if keep is None:
    return None
  if isinstance(keep, (str, os.PathLike)):
    keep = gm.export.read_datacomp_subset(keep, multiplicity=True)
  if isinstance(keep, gm.filters.Filter):
    keep = keep.ids
  pairs = gm.filters.Filter(parse_uids(keep)).ids
  if not len(pairs):
    raise ValueError("the filter keeps no uid at all, so nothing can be read")
  return pairs
