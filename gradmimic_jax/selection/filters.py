"""Filters: sets of sample ids to keep, how they combine and overlap.

Scores are always cut over the whole pool first; filters then combine as sets.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from gradmimic_jax.selection import _ids
from gradmimic_jax.selection.decisions import Decisions
from gradmimic_jax.selection.selection import Selection


class Applied(NamedTuple):
  """A filter on a pool of samples."""

  mask: np.ndarray  # booleans [N], True where the pool's sample is kept
  kept: int  # samples of the pool that are kept
  missing: int  # ids of the filter that aren't in the pool


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Filter:
  """A set of sample ids to keep, and where it comes from.

  `a & b`, `a | b`, `a - b` and `~a` are filters too; `~` needs the pool. Their
  `source` says how they were made.

  Args:
    ids: integers >= 0, strings, or pairs `u8,u8`; in any order, repeats count
      once.
    source: a word or two on where the ids come from.
    pool: the ids of all samples there are to choose from.
    fingerprints: what the ids belong to, as names and values. Filters that
      differ in one don't combine.

  Attributes:
    ids: the ids, ascending.

  Raises:
    TypeError: ids of another kind.
    ValueError: ids that aren't [n], are negative, or not in the pool; a mask of
      0 and 1; filters of unlike ids or fingerprints; `~` without a pool.

  Example:
    >>> clean = Filter([4, 2, 7], "clean", pool=range(8))
    >>> bright = Filter([2, 3, 4], "bright")
    >>> both = clean & ~(clean - bright)
    >>> both.ids, both.source
    (array([2, 4]), 'clean & (~(clean - bright))')
  """

  ids: np.ndarray
  source: str = "ids"
  pool: np.ndarray | None = None
  fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    name = f"the ids of {self.source!r}"
    ids = _ids.checked(self.ids, name)
    _ids.refuse_mask(ids, name)
    ids = _ids.unique(ids)
    object.__setattr__(self, "ids", ids)
    if self.pool is None:
      return
    pool = self.pool
    pool = _ids.checked(_listed(pool), f"the pool of {self.source!r}")
    if not _ids.is_ascending(pool, strictly=True):
      pool = _ids.unique(pool)
    object.__setattr__(self, "pool", pool)
    _check_kinds(ids, self.source, pool, "its pool")
    outside = ids[~_ids.contains(pool, ids)]
    if len(outside):
      raise ValueError(
        f"{len(outside)} ids of filter {self.source!r} are not in its pool, the"
        f" first is {outside[0]!r}. Give the pool of all samples, or apply the"
        " filter to it, which tolerates missing ids: filter.apply(pool)."
      )

  def __and__(self, other: Filter) -> Filter:
    """The ids in both."""
    found = _ids.contains(other.ids, self.ids)
    return self._with(other, "&", lambda: self.ids[found])

  def __or__(self, other: Filter) -> Filter:
    """The ids in either."""
    return self._with(
      other, "|", lambda: np.concatenate(_alike(self.ids, other.ids))
    )

  def __sub__(self, other: Filter) -> Filter:
    """The ids of the first that aren't in the second."""
    found = _ids.contains(other.ids, self.ids)
    return self._with(other, "-", lambda: self.ids[~found])

  def __invert__(self) -> Filter:
    """The pool's other ids."""
    if self.pool is None:
      raise ValueError(
        f"~ of filter {self.source!r} is everything else, but it has no pool to"
        " say what there is. Give pool=, the ids of all samples."
      )
    rest = self.pool[~_ids.contains(self.ids, self.pool)]
    return dataclasses.replace(self, ids=rest, source=f"~{_bound(self.source)}")

  def _with(
    self, other: Filter, sign: str, ids: Callable[[], np.ndarray]
  ) -> Filter:
    _check_kinds(self.ids, self.source, other.ids, other.source)
    check_fingerprints(
      f"filter {other.source!r}",
      other.fingerprints,
      f"filter {self.source!r}",
      self.fingerprints,
    )
    source = f"{_bound(self.source)} {sign} {_bound(other.source)}"
    pool = self.pool if self.pool is not None else other.pool
    if other.pool is not None and pool is not other.pool:
      assert pool is not None
      if not np.array_equal(pool, other.pool):
        raise ValueError(
          f"filters {self.source!r} and {other.source!r} have different pools,"
          f" of {len(pool)} and {len(other.pool)} samples. Choose one pool."
        )
    return Filter(
      ids(), source, pool, {**self.fingerprints, **other.fingerprints}
    )

  def apply(self, ids: Any) -> Applied:
    """Finds the samples to keep, of those that are there.

    Args:
      ids: the samples' ids [N], in any order.

    Returns:
      Applied(mask [N], kept, missing).

    Raises:
      TypeError, ValueError: ids that aren't of the filter's kind.

    Example:
      >>> Filter([3, 5, 9]).apply([5, 4, 3])
      Applied(mask=array([ True, False,  True]), kept=2, missing=1)
    """
    ids = _ids.checked(ids, "ids")
    _check_kinds(self.ids, self.source, ids, "the ids given")
    mask = _ids.contains(self.ids, ids)
    found = len(_ids.unique(ids[mask]))
    return Applied(mask, int(mask.sum()), len(self.ids) - found)

  def __len__(self) -> int:
    return len(self.ids)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.array(self.ids, dtype=dtype, copy=copy)

  def __repr__(self) -> str:
    of = "" if self.pool is None else f" of {len(self.pool):,}"
    return f"<Filter {self.source!r}: {len(self):,}{of} ids>"


def of_selection(selection: Selection, source: str = "selection") -> Filter:
  """The filter that keeps what a selection keeps, of all of its samples.

  Args:
    selection: as `select` gave it.
    source: a word or two on where it comes from.

  Returns:
    The Filter; its fingerprints are those of the selection's ledger.

  Example:
    >>> from gradmimic_jax.selection import select
    >>> found = select([[1.0], [-1.0], [2.0]], binarize="threshold")
    >>> kept = of_selection(found, "mimic")
    >>> kept, (~kept).ids
    (<Filter 'mimic': 2 of 3 ids>, array([1]))
  """
  fingerprints = selection.diagnostics.get("fingerprints", {})
  keep = _ids.mask(selection.keep, len(selection), "the selection's keep")
  return Filter(selection.ids[keep], source, selection.ids, fingerprints)


def of_decisions(decisions: Decisions, pool: Any) -> Filter:
  """The filter that leaves out what a person or the selection removed.

  A filter can't change labels, and a relabelled sample's own label is wrong, so
  that it is left out, too.

  Args:
    decisions: as `read_decisions` gave them.
    pool: the ids of all samples there are to choose from.

  Returns:
    The Filter, with that pool.

  Raises:
    ValueError: decisions that are changes to a selection, and say nothing of
      other samples; ids of another kind, or that the pool lacks.
  """
  pool = _ids.checked(_listed(pool), "pool")
  return Filter(pool[decisions.mask(pool)], decisions.source, pool)


def compose(
  expression: str, filters: Mapping[str, Any], *, pool: Any = None
) -> np.ndarray:
  """The ids that an expression over named filters leaves.

  The signs are `&` (both), `|` (either), `-` (without) and `~` (not; needs the
  pool), and parentheses. As in Python, `~` binds the most, then `-`, `&`, `|`.
  Names are letters, digits, `_` and `.`; others stand in quotes: `"clip top"`.

  Args:
    expression: such as "mimic_gmm & clip_top30".
    filters: ids, a `Filter`, a `Selection` or `Decisions` by name.
    pool: the ids of all samples, for `~` and for `Decisions`.

  Returns:
    The ids, ascending.

  Raises:
    ValueError: an expression that doesn't read, an unknown name, filters that
      don't combine.

  Example:
    >>> named = {"clean": [1, 2, 3], "clip": [2, 3, 4], "faces": [3]}
    >>> compose("clean & clip - faces", named)
    array([2])
    >>> compose("~(clean | clip)", named, pool=range(7))
    array([0, 5, 6])
  """
  return combine(expression, filters, pool=pool).ids


def combine(
  expression: str, filters: Mapping[str, Any], *, pool: Any = None
) -> Filter:
  """Combines filters as `compose`, into a `Filter` that knows its source.

  Args:
    expression: such as "mimic_gmm & clip_top30".
    filters: ids, a `Filter`, a `Selection` or `Decisions` by name.
    pool: the ids of all samples, for `~` and for `Decisions`.

  Returns:
    The Filter.

  Raises:
    ValueError: as `compose`.

  Example:
    >>> combine("a | b", {"a": [1], "b": [5]})
    <Filter 'a | b': 2 ids>
  """
  if pool is not None:
    pool = _ids.unique(_ids.checked(_listed(pool), "pool"))
  made: dict[str, Filter] = {}

  def named(name: str) -> Filter:
    if name not in made:
      made[name] = _as_filter(name, filters[name], pool)
    return made[name]

  return _evaluate(expression, named, sorted(filters))


def overlap(
  filters: Mapping[str, Any], *, ids: Any = None, classes: Any = None
) -> pa.Table:
  """Tabulates the overlap of filters, two by two.

  Args:
    filters: ids, a `Filter` or a `Selection` by name.
    ids: the ids [N] that `classes` belong to.
    classes: classes [N], integers or strings, for a row a pair and class;
      ids of a filter that aren't among `ids` are left out then.

  Returns:
    A table of one row a pair: `first`, `second`, `n_first`, `n_second`,
    `n_both`, `n_either`, `jaccard` (n_both / n_either; nan if neither has any);
    with classes, `class` comes first.

  Raises:
    ValueError: filters of unlike ids, only one of ids and classes, or their
      lengths differ.

  Example:
    >>> table = overlap({"clean": [1, 2, 3], "clip": [2, 3, 4, 5]})
    >>> table.to_pylist()
    [{'first': 'clean', 'second': 'clip', 'n_first': 3, 'n_second': 4,
      'n_both': 2, 'n_either': 5, 'jaccard': 0.4}]
  """
  if (ids is None) != (classes is None):
    raise ValueError("ids and classes go together; give both, or neither.")
  named = {name: _as_filter(name, value) for name, value in filters.items()}
  groups = np.zeros(0, np.int64)
  values: np.ndarray | None = None
  if ids is not None:
    ids, classes = _ids.checked(ids, "ids"), np.asarray(classes)
    if classes.shape != ids.shape:
      raise ValueError(
        f"classes has shape {classes.shape}, ids {ids.shape}; expected [N]."
      )
    values, groups = np.unique(classes, return_inverse=True)

  def counts(members: np.ndarray | None, total: int) -> np.ndarray:
    if members is None or values is None:
      return np.array([total])
    return np.bincount(groups[members], minlength=len(values))

  masks = {
    name: None if ids is None else one.apply(ids).mask
    for name, one in named.items()
  }
  rows: dict[str, list[Any]] = {
    name: []
    for name in ("first", "second", "n_first", "n_second", "n_both", "n_either")
  }
  for a, b in itertools.combinations(named, 2):
    both = named[a] & named[b]
    n_a, n_b = (counts(masks[name], len(named[name])) for name in (a, b))
    in_both = None if ids is None else masks[a] & masks[b]  # type: ignore
    n_both = counts(in_both, len(both))
    rows["first"] += [a] * len(n_a)
    rows["second"] += [b] * len(n_a)
    rows["n_first"] += n_a.tolist()
    rows["n_second"] += n_b.tolist()
    rows["n_both"] += n_both.tolist()
    rows["n_either"] += (n_a + n_b - n_both).tolist()
  table: dict[str, Any] = {}
  if values is not None:
    n_pairs = len(named) * (len(named) - 1) // 2
    table["class"] = np.tile(values, n_pairs).tolist()  # NUL and all
  table |= rows
  either = np.array(rows["n_either"], np.float64)
  table["jaccard"] = np.divide(
    rows["n_both"], either, out=np.full(len(either), np.nan), where=either > 0
  )
  return pa.table(table)


def check_fingerprints(
  name: str,
  found: Mapping[str, str],
  asked_name: str,
  asked: Mapping[str, str],
) -> None:
  """Raises ValueError where two fingerprints of one name differ.

  Args:
    name: the carrier of the first fingerprints.
    found: names and values.
    asked_name: the carrier of the others.
    asked: names and values; those that only one of the two has don't count.

  Raises:
    ValueError: a fingerprint that differs; the text has both.
  """
  for key in sorted(found.keys() & asked.keys()):
    if found[key] != asked[key]:
      raise ValueError(
        f"{name} and {asked_name} belong to different inputs: fingerprint"
        f" {key!r} is {found[key]!r} in the one and {asked[key]!r} in the"
        " other. Use a filter that was made for this data."
      )


def _as_filter(name: str, value: Any, pool: Any = None) -> Filter:
  if isinstance(value, Selection):
    value = of_selection(value)
  if isinstance(value, Decisions):
    if pool is None:
      raise ValueError(
        f"{name!r} is {value!r}, which says what to leave out of a pool; give"
        " pool=, the ids of all samples."
      )
    value = of_decisions(value, pool)
  if not isinstance(value, Filter):
    return Filter(_listed(value), name, pool)
  if pool is None:
    return dataclasses.replace(value, source=name)
  return dataclasses.replace(value, source=name, pool=pool)


def _listed(ids: Any) -> Any:
  """Lists the ids of a set or a range; returns arrays as they are."""
  return ids if hasattr(ids, "__array__") else list(ids)


def _check_kinds(a: np.ndarray, a_name: str, b: np.ndarray, b_name: str):
  if not _ids.same_kind(a, b):
    raise ValueError(
      f"{a_name!r} has ids of dtype {a.dtype} and {b_name!r} of {b.dtype};"
      " they name samples in different ways. Use one kind of id."
    )


def _alike(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
  """Leaves out what is empty, whose dtype says nothing."""
  return [ids for ids in (a, b) if len(ids)] or [a]


def _bound(source: str) -> str:
  return source if re.fullmatch(r"~*[\w.]+", source) else f"({source})"


_TOKEN = re.compile(
  r"\s*(?:(?P<name>[\w.]+)|\"(?P<quoted>[^\"]*)\"|(?P<sign>[&|~()-]))"
)
_BINDS = {"|": 1, "&": 2, "-": 3, "~": 4}


def _evaluate(
  text: str, named: Callable[[str], Filter], names: list[str]
) -> Filter:
  """Evaluates by two stacks, so that no nesting is too deep."""
  signs: list[str] = []
  values: list[Filter] = []

  def error(place: int, expected: str) -> ValueError:
    return ValueError(
      f"the expression doesn't read: expected {expected}\n"
      f"  {text}\n  {' ' * place}^"
    )

  def reduce(least: int) -> None:
    while signs and signs[-1] != "(" and _BINDS[signs[-1]] >= least:
      sign = signs.pop()
      right = values.pop()
      if sign == "~":
        values.append(~right)
        continue
      left = values.pop()
      values.append(
        left & right
        if sign == "&"
        else left | right
        if sign == "|"
        else left - right
      )

  place, wants_value = 0, True
  while text[place:].strip():
    token = _TOKEN.match(text, place)
    start = place + len(text[place:]) - len(text[place:].lstrip())
    if token is None:
      raise error(start, 'a name, or one of & | - ~ ( ) "')
    place = token.end()
    sign = token["sign"]
    if sign is None:
      if not wants_value:
        raise error(start, "one of & | - )")
      name = token["name"] if token["quoted"] is None else token["quoted"]
      if name not in names:
        raise ValueError(
          f"the expression {text!r} names {name!r}; expected one of {names}."
        )
      values.append(named(name))
      wants_value = False
    elif wants_value:
      if sign not in "~(":
        raise error(start, "a name, ~ or (")
      signs.append(sign)
    elif sign in "~(":
      raise error(start, "one of & | - )")
    elif sign == ")":
      reduce(0)
      if not signs:
        raise error(start, "no ), for there is no ( to close")
      signs.pop()
    else:
      reduce(_BINDS[sign])
      signs.append(sign)
      wants_value = True
  if wants_value:
    raise error(len(text), "a name, ~ or (")
  reduce(0)
  if signs:
    raise error(len(text), "a )")
  return values[0]
