"""Collectives of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# What would also send something, and is not expected in a train step.
_OTHERS = ("collective-broadcast", "ragged-all-to-all", "send", "recv")
# Bits of an element, by the name that HLO has for its type.
_BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
  "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64,
  "u64": 64, "f64": 64, "c64": 64, "c128": 128, "token": 0,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_OPCODE = re.compile(r"[a-z][\w\-]*")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([^\]]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|branch_computations|called_computations"
  r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
  """One instruction that devices do together."""

  kind: str  # one of KINDS
  bytes: int  # of the whole that is reduced, gathered or sent
  group: int  # devices that do it together
  times: int  # how often a step runs it: in a loop, more than once

  @property
  def sent(self) -> float:
    """Bytes that each device sends in a step, around a ring of the group."""
    if self.kind == "collective-permute":
      return self.times * self.bytes
    rounds = 2 if self.kind == "all-reduce" else 1
    return rounds * self.times * self.bytes * (self.group - 1) / self.group


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  rest: str  # opcode, operands and attributes
  root: bool  # whether it is what its computation gives


def collectives(text: str) -> list[Collective]:
  """The collectives in `compiled.as_text()`, in the order of the text.

  A pair of start and done is one; what each device does alone is none; what a
  loop runs counts as often as the loop, and what a condition may run counts as
  if it did.

  Raises:
    ValueError: no program, or something in a collective that can't be read: its
      kind, a type, a group of devices, or how often a loop around it runs.
  """
  computations, entry = _read(text)
  partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
  found: list[Collective] = []
  _walk(computations, entry, 1, int(partitions[1] if partitions else 1), found)
  return found


def _read(text) -> tuple[dict[str, list[_Instruction]], str]:
  """Computations by name, and the entry's name."""
  computations: dict[str, list[_Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
      continue
    match = _INSTRUCTION.match(line)
    if match and current is not None:
      type_, rest = _split_type(_COMMENT.sub("", match[3]))
      opcode = _OPCODE.match(rest)
      if opcode is None:
        raise ValueError(f"no opcode in the line {line[:200]!r}.")
      current.append(
        _Instruction(match[2], type_, opcode[0], rest, bool(match[1]))
      )
  if not entry:
    raise ValueError(
      f"no ENTRY in a text of {len(text)} characters; expected what"
      " compiled.as_text() gives."
    )
  return computations, entry


def _split_type(text):
  """An instruction's type, and what follows."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    if letter == " " and not depth:
      return text[:i], text[i + 1 :]
  raise ValueError(f"no type in the instruction {text[:200]!r}.")


def _walk(computations, name, times, partitions, found):
  """Adds the collectives of a computation that runs so many times."""
  started = {}
  for at in computations[name]:
    kind = at.opcode.removesuffix("-start").removesuffix("-done")
    if kind in _OTHERS:
      raise ValueError(
        f"{at.name} is a {at.opcode}; expected of collectives only"
        f" {', '.join(KINDS)}."
      )
    if kind in KINDS:
      if at.opcode.endswith("-start"):
        started[at.name] = at
        continue
      # The type of what is done has no buffers of the start in it.
      source = at
      if at.opcode.endswith("-done"):
        operand = re.search(r"%([\w.\-]+)\)", at.rest)
        source = started[operand[1]] if operand else at
      group = _group(source.rest, partitions)
      if group > 1:
        size = _bytes(at.type) * (group if kind == "reduce-scatter" else 1)
        found.append(Collective(kind, size, group, times))
      continue
    if at.opcode in ("async-update", "async-done"):
      continue  # their start has called it already
    inner: list[Collective] = []
    for called in _CALLED.findall(at.rest):
      for each in re.findall(r"[\w.\-]+", called):
        _walk(computations, each, times, partitions, inner)
    if at.opcode == "while" and inner:
      trips = _trips(at, computations)
      inner = [x._replace(times=x.times * trips) for x in inner]
    found += inner


def _trips(at, computations):
  """Counts a loop's runs, by the compiler or by the loop's condition.

  JAX's loops count from 0; the condition is that the count is below a constant.
  """
  match = _TRIPS.search(at.rest)
  if match:
    return int(match[1])
  condition = computations[_named("condition", at.rest)]
  constants = {
    x.name: int(value[1])
    for x in condition
    if (value := re.match(r"constant\((\d+)\)", x.rest))
  }
  for x in condition:
    if x.root and x.opcode == "compare" and "direction=LT" in x.rest:
      limit = re.match(r"compare\(.*%([\w.\-]+)\)", x.rest)
      if limit and limit[1] in constants:
        return constants[limit[1]]
  raise ValueError(
    f"the loop {at.name} has a collective in it, and nothing says how often it"
    " runs; expected a known_trip_count, or a condition that compares with a"
    " constant."
  )


def _named(role, rest):
  """The computation that an instruction has in some role."""
  match = re.search(rf"\b{role}=%?([\w.\-]+)", rest)
  if not match:
    raise ValueError(f"no {role} in {rest[:300]!r}.")
  return match[1]


def _bytes(type_):
  """Counts the bytes of an array, or of all arrays of a tuple."""
  bare = type_
  while bare != (bare := _LAYOUT.sub("", bare)):
    pass
  arrays = _ARRAY.findall(bare)
  total = 0
  for name, shape in arrays:
    if name not in _BITS:
      raise ValueError(
        f"the type {type_[:200]!r} has elements {name!r}; expected"
        f" {', '.join(_BITS)}."
      )
    if not re.fullmatch(r"(\d+(,\d+)*)?", shape):
      raise ValueError(f"the shape in {type_[:200]!r} can't be read.")
    sizes = [int(n) for n in shape.split(",") if n]
    total += -(-math.prod(sizes) * _BITS[name] // 8)
  if not arrays:
    raise ValueError(f"the type {type_[:200]!r} can't be read.")
  return total


def _group(rest, partitions):
  """Counts the devices that take part in a collective."""
  if "source_target_pairs=" in rest:
    pairs = re.findall(r"\{(\d+),(\d+)\}", rest)
    return 2 if any(a != b for a, b in pairs) else 1
  match = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
  if match:
    return int(match[1])
  if "replica_groups={}" in rest:
    return partitions
  match = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  if match:
    return len(match[1].split(","))
  match = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest)
  if match:
    sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
    # An axis, or a part of one: 'name':(how often before)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  raise ValueError(f"the devices of {rest[:300]!r} can't be read.")
