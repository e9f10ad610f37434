"""The samples of one webdataset shard, and counts of the broken ones.

A sample is a run of members of one name: an image, a caption (`txt`) and `json`
that has its uid. A broken sample is counted by its reason, and never stops the
reading of the next.

Tools differ in where a name ends and the extension begins:
webdataset cuts at the first dot of a file's name ("000.seg.png" is of "000"),
others name samples with dots and cut at the last ("clip v1.3.jpg"). Each shard
is read by that rule of the two by which more of its samples are whole; only
names with several dots tell them apart, so only shards that have such names are
looked through first.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging

import gradmimic_jax as gm
from experiments.data.pairs import images, tar
from experiments.runtime import limits as limits_lib
from gradmimic_jax.selection.uids import parse_uids

FIRST, LAST = "first", "last"  # The dot at which a file's name is cut.
UID_SOURCES = ("json", "name")
_HEX = re.compile(r"[0-9a-f]{1,32}")
_ODDITIES = {
  # Bytes that were no UTF-8 are read as the sign for unknown characters.
  "unknown characters in the caption": re.compile("\ufffd"),
  "control characters in the caption": re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
  ),
}
_DRIVE = re.compile(r"[A-Za-z]:")
_LISTED = 5  # Samples that are listed for each reason.
_ROLES = ("image", "caption", "json")
_EXTENSION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
# Names that operating systems and archivers put beside files, and folders.
_LITTER = ("._", ".DS_Store", "Thumbs.db", "desktop.ini", "pax_global_header")
_LITTER_FOLDERS = re.compile(r"(^|/)(__MACOSX|PaxHeaders(\.\d+)?)(/|$)")
_SAID: set[tuple[str, str]] = set()  # Folders and rules that were logged.
# Remedies, by reason.
_REMEDIES = {
  **dict.fromkeys(
    ("no uid", "uid is not 32 hexadecimal digits"),
    f"Shards without uids, such as img2dataset's, are read with"
    f" uid_source='name', which makes uids of the names of shard and sample"
    f" (config.data.uid_source; one of {', '.join(UID_SOURCES)})",
  ),
  "no image": "`parts.image` (config.data.parts.image) lists the extensions of"
  " images",
  "no caption": "`parts.caption` (config.data.parts.caption) lists the"
  " extensions of captions; `parts.caption_key` names the field of the json"
  " that has them",
  "rest of a sample before": "The members of a sample must follow one another:"
  " write the shard anew, with its members sorted by name",
  "name fits no sample": "The members of a sample follow one another and differ"
  " in what comes after the name's first dot, or after its last, in all of a"
  " shard",
}


@dataclasses.dataclass(frozen=True)
class Parts:
  """The extensions of the files that make a sample.

  Attributes:
    image: Extensions of images, in lower case, without the dot; files may have
      them in capitals. "gif", "bmp", "tif" and "tiff" among them let images of
      these formats be read, the first frame of each, which are refused
      otherwise.
    caption: Extensions of captions.
    json: Extensions of a sample's metadata.
    caption_key: The field of the JSON that has the caption; None: the caption
      is a file of its own.

  Raises:
    ValueError: If an extension is none, or stands for two things.

  Example:
    >>> sorted(Parts(caption_key="text").required("name"))
    ['image', 'json']
  """

  image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
  caption: tuple[str, ...] = ("txt",)
  json: tuple[str, ...] = ("json",)
  caption_key: str | None = None

  def __post_init__(self):
    if self.caption_key is not None and not (
      isinstance(self.caption_key, str) and self.caption_key
    ):
      raise ValueError(
        "parts.caption_key must be the name of a field, or None; got"
        f" {self.caption_key!r}"
      )
    seen: dict[str, str] = {}
    for role in _ROLES:
      given = getattr(self, role)
      if isinstance(given, str) or not given:
        raise ValueError(
          f"parts.{role} must be a tuple of extensions, such as"
          f" {getattr(Parts, role)}; got {given!r}"
        )
      for extension in given:
        if not (isinstance(extension, str) and _EXTENSION.fullmatch(extension)):
          raise ValueError(
            f"parts.{role} has {extension!r}; expected extensions in lower"
            f" case without the dot before them, such as {getattr(Parts, role)}"
          )
        if seen.setdefault(extension, role) != role:
          raise ValueError(
            f"the extension {extension!r} is in parts.{seen[extension]} and in"
            f" parts.{role}; expected it in one of them"
          )
      object.__setattr__(self, role, tuple(given))

  @functools.cached_property
  def roles(self) -> dict[str, str]:
    """The role of each extension: "image", "caption" or "json"."""
    return {
      extension: role for role in _ROLES for extension in getattr(self, role)
    }

  @property
  def formats(self) -> tuple[str, ...]:
    """The formats that images may have, by Pillow's names."""
    return images.find_formats(self.image)

  def required(self, uid_source: str) -> frozenset[str]:
    """The parts that a whole sample has."""
    caption = "caption" if self.caption_key is None else "json"
    return frozenset({"image", caption, uid_source} - {"name"})

  def cut(self, name: str, rule: str) -> tuple[str, str]:
    """Cuts a file's name; also the rest of it, in lower case."""
    if rule == FIRST:
      stem, _, extension = name.partition(".")
      return stem, extension.lower()
    lower = name.lower()
    for extension in self._compound:
      if lower.endswith(f".{extension}"):
        return name[: -len(extension) - 1], extension
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")

  @functools.cached_property
  def _compound(self):
    return sorted((x for x in self.roles if "." in x), key=len, reverse=True)


PARTS = Parts()


class Sample(NamedTuple):
  """One sample as it was stored."""

  shard: str  # The shard's file name.
  key: str  # Its name in the shard.
  uid: str  # 32 hexadecimal digits.
  caption: str
  image: bytes  # Encoded.


@dataclasses.dataclass
class Statistics:
  """Counts of what was read; they go on over epochs.

  Attributes:
    read: Samples that were looked at, the broken ones included.
    samples: Samples that came out in batches.
    filtered: Sound samples that the filter leaves out.
    shards: Shards that were opened.
    broken: Samples that could not be used, by reason. A shard that is damaged
      or can't be read counts as one, whatever it held.
    noted: Oddities that cost no sample, by kind; but of copies that meet in one
      batch only the first is used.
    listed: The first few of each reason: [reason, shard, name, detail], as
      `ascii` prints them, as strangers wrote them.
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
    """Counts oddities of a caption that is used all the same."""
    for what, is_odd in _ODDITIES.items():
      if is_odd.search(sample.caption):
        self.add_noted(what, sample.shard, sample.key)

  def _add(self, counts, reason, shard, key, detail):
    counts[reason] = counts.get(reason, 0) + 1
    texts = (shard, key, str(detail))
    self._list([reason, *(ascii(text)[1:-1][:200] for text in texts)])

  def _list(self, row):
    # Counts go on over epochs; the same sample is listed once.
    listed = [other for other in self.listed if other[0] == row[0]]
    if len(listed) < _LISTED and row not in listed:
      self.listed.append(list(row))

  def add(self, others: "Statistics") -> None:
    """Adds counts of what was read after, or elsewhere."""
    for name in ("read", "samples", "filtered", "shards"):
      setattr(self, name, getattr(self, name) + getattr(others, name))
    for mine, theirs in (
      (self.broken, others.broken),
      (self.noted, others.noted),
    ):
      for reason, count in theirs.items():
        mine[reason] = mine.get(reason, 0) + count
    for row in others.listed:
      self._list(row)

  def as_dict(self) -> dict[str, Any]:
    """Converts the counts to JSON; `Statistics(**as_dict)` makes them again."""
    return dataclasses.asdict(self)

  def advice(self) -> str:
    """Advice about broken samples, where an option may be the cause."""
    found = sorted(self.broken, key=lambda reason: -self.broken[reason])
    texts = (_REMEDIES[reason] for reason in found if reason in _REMEDIES)
    return "".join(f" {text}." for text in dict.fromkeys(texts))

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
  parts: Parts = PARTS,
  limits: limits_lib.Limits = limits_lib.DEFAULT,
) -> Iterator[Sample | None]:
  """Goes through the samples of a shard; seeks past content it doesn't need.

  Args:
    path: The shard, an uncompressed tar file.
    statistics: Counts everything but `samples`.
    skip: Samples to pass over unread, and uncounted.
    keep: `u8,u8` [K] ascending, the uids to keep; None keeps all. Images of
      others are not read.
    uid_source: "json", or "name": 32 digits made of the names of the shard and
      the sample, for shards that have no uids.
    parts: The files that make a sample.
    limits: Bounds on the file's claims.

  Yields:
    Each sample in its order, None for one that is broken or filtered out, so
    that counting what is yielded gives the place in the shard.
  """
  shard = os.path.basename(path)
  required = parts.required(uid_source)
  if not skip:
    statistics.shards += 1
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(open(path, "rb"))
      about = os.fstat(file.fileno())
      groups = _groups(
        tar.members(file, limits=limits),
        _Grouper(parts, limits),
        # The rule for a file holds until the file changes.
        lambda: _choose_rule(
          path, about.st_size, about.st_mtime_ns, parts, required, limits
        ),
      )
      lacking: set[str] = set()
      for number, group in enumerate(groups):
        is_rest = group.key in lacking
        if group.parts and not required <= group.parts.keys():
          lacking.add(group.key)
        if number < skip:
          continue
        lost = group.lost(required)
        for key in lost:
          statistics.read += 1
          statistics.add_broken("name fits no sample", shard, key)
        if not group.parts and group.problem is None:
          if not lost:
            statistics.add_noted(
              "file that is no part of a sample", shard, group.key
            )
          yield None
          continue
        statistics.read += 1
        try:
          sample = _sample(file, shard, group, keep, uid_source, parts, limits)
        except _BrokenError as error:
          reason = error.reason
          if is_rest and reason.startswith("no "):
            reason = "rest of a sample before"
          statistics.add_broken(reason, shard, group.key, error.detail)
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
      # A shard counts as one, whatever it held: the share may not tell of it.
      logging.warning("%s: %s (%a).", reason, path, str(error))


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
  members: int = 0
  # Members that are no parts, by their names up to the last dot: they would be
  # parts if names were cut there.
  others: dict[str, set[str]] = dataclasses.field(default_factory=dict)

  def lost(self, required: frozenset[str]) -> list[str]:
    """Names the samples that this rule of cutting names doesn't see.

    Beside a sample's own parts, these are whole samples by themselves; other
    members are webdataset's "000.seg.png" and the like.
    """
    if self.problem is not None:
      return []
    return [
      key
      for key, roles in self.others.items()
      if not self.parts or required <= roles
    ]


class _Grouper:
  """Puts members into groups: runs of one name."""

  def __init__(
    self, parts: Parts, limits: limits_lib.Limits, rule: str | None = None
  ):
    """Begins with no group, and without a rule until two would differ."""
    self.rule = rule
    self.group: _Group | None = None
    self._parts, self._limits = parts, limits

  def add(self, member: tar.Member) -> _Group | None:
    """Adds a member; returns the group before, if the member begins another."""
    folder, _, name = member.name.rpartition("/")
    stem, extension = self._parts.cut(name, self.rule or FIRST)
    if member.kind in (tar.DIRECTORY, tar.ARCHIVE) or (
      # Metadata of the shard, by webdataset's convention.
      stem.startswith("__") and stem.endswith("__")
    ):
      return None
    unsafe = _is_unsafe(member.name)
    if not unsafe and _is_litter(folder, name):
      return None
    key, before = f"{folder}/{stem}" if folder else stem, None
    if self.group is None or key != self.group.key:
      before, self.group = self.group, _Group(key)
    group = self.group
    group.members += 1
    if group.members > self._limits.sample_members:
      group.problem = ("too many files of one name", member.name)
      return before
    role = self._parts.roles.get(extension) if stem else None
    if unsafe:
      group.problem = ("unsafe name", "")
    elif member.kind != tar.FILE:
      group.problem = (f"{member.kind} in place of a file", member.name)
    elif role is not None:
      if role in group.parts:
        group.problem = ("more than one file of a kind", member.name)
      group.parts[role] = member
    elif self.rule == FIRST:
      other, extension = self._parts.cut(name, LAST)
      role = self._parts.roles.get(extension)
      if role is not None and other:
        whole = f"{folder}/{other}" if folder else other
        group.others.setdefault(whole, set()).add(role)
    return before


def _groups(
  members: Iterable[tar.Member],
  grouper: _Grouper,
  choose: Callable[[], str] | None = None,
) -> Iterator[_Group]:
  """Groups members by name; asks `choose` for a rule when it matters.

  Names with fewer than two dots are the same by both rules.
  """
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
    if grouper.rule is None and choose and member.name.count(".") > 1:
      folder, _, name = member.name.rpartition("/")
      if name.count(".") > 1 and not _is_litter(folder, name):
        grouper.rule = choose()
    done = grouper.add(member)
    if done is not None:
      yield done
  if grouper.group is not None:
    yield grouper.group
  if damaged is not None:
    raise damaged


@functools.lru_cache(maxsize=1 << 16)
def _choose_rule(
  path: str,
  size: int,
  changed: int,
  parts: Parts,
  required: frozenset[str],
  limits: limits_lib.Limits,
) -> str:
  """Chooses the rule by which more of a shard's samples are whole.

  Whole samples are counted less broken ones: "000.seg.png" beside each sample
  must not outweigh them. Where both rules come out alike, webdataset's own is
  taken.
  """
  del size, changed  # Keys of the cache.
  groupers = {rule: _Grouper(parts, limits, rule) for rule in (FIRST, LAST)}
  counts = {rule: [0, 0] for rule in groupers}  # Whole and broken.

  def count(rule, group):
    whole = group.problem is None and required <= group.parts.keys()
    counts[rule][0] += whole
    counts[rule][1] += (not whole and bool(group.parts or group.problem)) + len(
      group.lost(required)
    )

  with open(path, "rb") as file, contextlib.suppress(tar.DamagedError):
    for member in tar.members(file, limits=limits):
      for rule, grouper in groupers.items():
        done = grouper.add(member)
        if done is not None:
          count(rule, done)
  for rule, grouper in groupers.items():
    if grouper.group is not None:
      count(rule, grouper.group)
  chosen = max(groupers, key=lambda rule: counts[rule][0] - counts[rule][1])
  said = ", ".join(
    f"up to the {rule} {whole} are whole and {broken} broken"
    for rule, (whole, broken) in counts.items()
  )
  if _is_news(os.path.dirname(path), chosen):
    logging.warning(
      "%s has names with several dots. Its samples are named up to the %s dot"
      " (%s), and so are those of the other shards in this folder where no line"
      " like this one says otherwise.",
      path,
      chosen,
      said,
    )
  return chosen


def _is_news(folder: str, rule: str) -> bool:
  """True the first time: one line is enough for all shards."""
  found = (folder, rule)
  is_news = found not in _SAID
  _SAID.add(found)
  return is_news


def _is_litter(folder: str, name: str) -> bool:
  return name.startswith(_LITTER) or bool(
    folder and _LITTER_FOLDERS.search(folder)
  )


def _is_unsafe(name: str) -> bool:
  """True if unpacking would put a file outside of the folder, or confuse.

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
  parts: Parts,
  limits: limits_lib.Limits,
) -> Sample | None:
  if group.problem is not None:
    raise _BrokenError(*group.problem)
  wanted = ["json"] if uid_source == "json" else []
  wanted += ["caption" if parts.caption_key is None else "json", "image"]
  most = {
    "json": limits.json_bytes,
    "caption": limits.caption_bytes,
    "image": limits.image_bytes,
  }
  for role in wanted:
    if role not in group.parts:
      is_uid = role == "json" and uid_source == "json"
      missing = {"json": "uid" if is_uid else "caption"}.get(role, role)
      raise _BrokenError(f"no {missing}")
    size = group.parts[role].size
    if size > most[role]:
      raise _BrokenError(
        f"{role} too large", f"{size} bytes; the limit is {most[role]}"
      )

  def content(role):
    member = group.parts[role]
    file.seek(member.offset)
    found = file.read(member.size)
    if len(found) < member.size:  # It became shorter while it was read.
      raise tar.DamagedError(f"cut off at byte {member.offset + len(found)}")
    return found

  about = _about(content("json"), limits) if "json" in wanted else {}
  if uid_source == "json":
    uid = _uid(about)
  else:
    name = f"{shard}/{group.key}"
    uid = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
  if keep is not None and not _is_in(keep, uid):
    return None
  if parts.caption_key is None:
    caption = content("caption").decode("utf-8", "replace")
  else:
    caption = about.get(parts.caption_key)
    if not isinstance(caption, str):
      raise _BrokenError(
        "no caption", _field(about, parts.caption_key, "a text")
      )
  caption = caption.strip()
  if not caption:
    raise _BrokenError("no caption", "it is empty")
  return Sample(shard, group.key, uid, caption, content("image"))


def _about(content: bytes, limits: limits_lib.Limits) -> dict[str, Any]:
  """Parses a sample's JSON; {} if it has no fields."""
  try:
    about = limits_lib.parse_json(
      content, most=limits.json_bytes, limits=limits
    )
  except ValueError as error:  # Too deep, or too many digits, too.
    raise _BrokenError("json not readable", str(error)[:200]) from error
  return about if isinstance(about, dict) else {}


def _field(about: dict[str, Any], name: str, expected: str) -> str:
  """Describes what is wrong with a field of a sample's JSON."""
  if about.get(name) is not None:
    return f"{name!r} is {str(about[name])[:40]!r}, not {expected}"
  return f"no {name!r} in the json, which has {', '.join(map(repr, about))}"


def _uid(about: dict[str, Any]) -> str:
  uid = about.get("uid")
  if uid is None:
    raise _BrokenError("no uid", _field(about, "uid", "a text"))
  if not isinstance(uid, str) or not _HEX.fullmatch(uid):
    raise _BrokenError("uid is not 32 hexadecimal digits", str(uid)[:80])
  return uid.zfill(32)


def _is_in(keep: np.ndarray, uid: str) -> bool:
  pair = np.array((int(uid[:16], 16), int(uid[16:], 16)), keep.dtype)
  place = int(np.searchsorted(keep, pair))
  return place < len(keep) and keep[place] == pair


def kept_uids(
  keep: Any, *, fingerprints: Mapping[str, str] | None = None
) -> np.ndarray:
  """Converts uids to keep for `read`: `u8,u8` ascending, each once.

  Args:
    keep: The path of a DataComp subset file or of a selection as `.parquet` or
      `.csv`, a `gm.filters.Filter`, or uids as strings or pairs.
    fingerprints: Those of the data that a file should be for.

  Returns:
    Pairs [K].

  Raises:
    ValueError: If uids don't read, are for other data, or there is none.
  """
  if isinstance(keep, (str, os.PathLike)):
    asked = {"fingerprints": fingerprints}
    suffix = pathlib.Path(keep).suffix
    if suffix == ".parquet":
      keep = gm.export.read_parquet(keep, **asked).kept_ids
    elif suffix == ".csv":
      keep = gm.export.read_csv(keep, **asked).kept_ids
    else:
      keep = gm.export.read_datacomp_subset(keep, multiplicity=True, **asked)
  if isinstance(keep, gm.filters.Filter):
    keep = keep.ids
  pairs = gm.filters.Filter(parse_uids(keep)).ids
  if not len(pairs):
    raise ValueError("the filter keeps no uid at all, so nothing can be read")
  return pairs
