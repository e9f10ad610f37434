"""Filters: set algebra, its language, and overlaps."""

import numpy as np
import pytest

from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection import Selection, _ids, export, filters, select
from gradmimic_jax.selection.filters import Filter, combine, compose, overlap

KINDS = {
  "integer": lambda n: np.arange(n),
  "string": lambda n: np.array([f"id{i:03d}" for i in range(n)]),
  # Halves that only differ in the second, and above 2^63.
  "uid": lambda n: np.array(
    [(2**64 - 1 - i // 7, 2**63 + i % 7) for i in range(n)], "u8,u8"
  ),
}


def keys(ids):
  return {tuple(i) if isinstance(i, np.void) else i for i in ids}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_the_algebra_is_that_of_sets(kind, seed):
  rng = np.random.default_rng(seed)
  pool = KINDS[kind](60)
  picked = [rng.permutation(pool)[: rng.integers(0, 60)] for _ in range(3)]
  a, b, c = (Filter(p, n, pool) for p, n in zip(picked, "abc", strict=True))
  s, t, u = map(keys, picked)
  everything = keys(pool)
  for got, want in (
    (a & b, s & t),
    (a | b, s | t),
    (a - b, s - t),
    (~a, everything - s),
    ((a | ~b) & c, (s | (everything - t)) & u),
  ):
    assert keys(got.ids) == want
    assert len(got) == len(want)
    assert _ids.is_ascending(got.ids, strictly=True)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_tolerates_what_is_missing(kind):
  pool = KINDS[kind](20)
  one = Filter(np.concatenate([pool[[3, 5, 3]], pool[15:]]))
  there = np.random.default_rng(0).permutation(pool[:17])
  mask, kept, missing = one.apply(there)
  assert keys(there[mask]) == keys(pool[[3, 5, 15, 16]])
  assert (kept, missing) == (4, 3)
  assert one.apply(pool[:0]) == (pytest.approx(np.zeros(0)), 0, 7)


NAMED = {
  "a": [1, 2, 3, 4],
  "b": [3, 4, 5, 6],
  "c": [4, 6, 7],
  "clip top-30%": [2, 7],
  "x.y_1": [1],
}
POOL = range(9)


@pytest.mark.parametrize("seed", range(40))
def test_compose_reads_as_python_does(seed):
  rng = np.random.default_rng(seed)

  def expression(depth):
    sort = rng.integers(0, 6 if depth else 1)
    if sort == 0:
      return str(rng.choice(["a", "b", "c"]))
    if sort == 1:
      return "~" + expression(depth - 1)
    if sort == 2:
      return f"({expression(depth - 1)})"
    space = " " * rng.integers(0, 3)
    sign = space + "&|-"[sort - 3] + space
    return expression(depth - 1) + sign + expression(depth - 1)

  class Set(frozenset):
    def __invert__(self):
      return Set(frozenset(POOL) - self)

    def __and__(self, other):
      return Set(frozenset.__and__(self, other))

    def __or__(self, other):
      return Set(frozenset.__or__(self, other))

    def __sub__(self, other):
      return Set(frozenset.__sub__(self, other))

  text = expression(4)
  want = eval(text, {name: Set(NAMED[name]) for name in "abc"})
  assert compose(text, NAMED, pool=POOL).tolist() == sorted(want), text


def test_names():
  assert compose('"clip top-30%" & a', NAMED).tolist() == [2]
  assert compose("x.y_1|c", NAMED).tolist() == [1, 4, 6, 7]
  assert compose("  a ", NAMED).tolist() == [1, 2, 3, 4]


def test_depth_is_no_matter():
  deep = "(" * 5_000 + "a" + ")" * 5_000
  assert compose(deep, NAMED).tolist() == [1, 2, 3, 4]
  assert compose("~" * 5_000 + "a", NAMED, pool=POOL).tolist() == NAMED["a"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", r"expected a name, ~ or \("),
    ("a &", r"expected a name, ~ or \("),
    ("& a", r"expected a name, ~ or \(\n  & a\n  \^"),
    ("a b", r"expected one of & \| - \)\n  a b\n    \^"),
    ("a ~b", r"expected one of & \| - \)"),
    ("(a", r"expected a \)\n  \(a\n    \^"),
    ("a)", r"there is no \( to close"),
    ("()", r"expected a name, ~ or \("),
    ("a ^ b", "expected a name, or one of"),
    ('"a', "expected a name, or one of"),
    ("a.__class__", r"names 'a.__class__'; expected one of \['a', 'b'"),
    ("a & d", "names 'd'"),
    ("~a", "has no pool"),
  ],
)
def test_expressions_that_do_not_read(text, message):
  with pytest.raises(ValueError, match=message):
    compose(text, NAMED)


def test_sources():
  a, b = Filter([1, 2], "a", pool=[1, 2, 3]), Filter([2], "b")
  assert (a & b | ~a).source == "(a & b) | ~a"
  assert combine("q", {"q": a}).source == "q"
  assert repr(a - b) == "<Filter 'a - b': 1 of 3 ids>"
  np.testing.assert_array_equal(np.asarray(a - b), [1])


def test_overlap_is_that_of_sets():
  table = overlap({k: NAMED[k] for k in "abc"} | {"none": []}).to_pylist()
  assert len(table) == 6
  for row in table:
    one, two = (set(NAMED.get(row[name], [])) for name in ("first", "second"))
    assert row["n_first"] == len(one)
    assert row["n_second"] == len(two)
    assert row["n_both"] == len(one & two)
    assert row["n_either"] == len(one | two)
    assert row["jaccard"] == len(one & two) / len(one | two)
  empty = overlap({"p": [], "q": []}).to_pylist()[0]
  assert np.isnan(empty["jaccard"])


def test_overlap_by_class():
  ids = np.arange(9)[::-1]
  classes = np.where(ids % 2, "odd", "even")
  table = overlap(
    {"a": NAMED["a"], "b": [*NAMED["b"], 100]}, ids=ids, classes=classes
  )
  assert table.to_pylist() == [
    {
      "class": name,
      "first": "a",
      "second": "b",
      "n_first": 2,
      "n_second": 2,
      "n_both": 1,
      "n_either": 3,
      "jaccard": 1 / 3,
    }
    for name in ("even", "odd")
  ]


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: Filter([-1]), ValueError, "holds -1"),
    (lambda: Filter([0.5]), TypeError, "dtype float64"),
    (lambda: Filter(np.array([True])), TypeError, r"ids\[mask\]"),
    (lambda: Filter([[1]]), ValueError, r"expected \[n\]"),
    (lambda: Filter([0, 1, 1]), ValueError, "0 or 1: a mask, not ids"),
    (lambda: Filter(np.ones(3, np.int8)), ValueError, r"3 values, .* a mask"),
    (lambda: Filter([1.0, 0.0]), TypeError, "dtype float64"),
    (lambda: Filter([True, 5]), TypeError, "mixes values of bool, int"),
    (lambda: Filter(["a", 5]), TypeError, "mixes values of int, str"),
    (lambda: Filter(["a", None]), TypeError, "None may be missing"),
    (lambda: compose("a", {"a": [True, False]}), TypeError, r"ids\[mask\]"),
    (
      lambda: compose("a", {"a": np.array([1, 0, 1])}),
      ValueError,
      r"the ids of 'a' holds 3 values, .* a mask",
    ),
    (lambda: compose("a", {"a": ["b", 5]}), TypeError, "mixes values"),
    (lambda: compose("a", {"a": ["b"]}, pool={"b", 5}), TypeError, "mixes"),
    (
      lambda: compose("~a", {"a": [1]}, pool=[True, True]),
      TypeError,
      "pool has dtype bool",
    ),
    (lambda: Filter([5], "s", pool=[1]), ValueError, "first is .*5"),
    (lambda: Filter([5]) & Filter(["5"]), ValueError, "one kind of id"),
    (lambda: Filter([5]).apply(["5"]), ValueError, "one kind of id"),
    (
      lambda: Filter([1], pool=[1, 2]) & Filter([1], pool=[1, 3]),
      ValueError,
      "different pools",
    ),
    (
      lambda: (
        Filter([1], "mine", fingerprints={"data": "cifar"})
        | Filter([1], "yours", fingerprints={"data": "digits"})
      ),
      ValueError,
      "'yours' and filter 'mine'.*'digits' in the one and 'cifar' in",
    ),
    (lambda: overlap({"a": [1]}, ids=[1]), ValueError, "go together"),
    (
      lambda: overlap({"a": [1]}, ids=[1], classes=[1, 2]),
      ValueError,
      r"classes has shape \(2,\)",
    ),
  ],
)
def test_bad_input(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_a_selection_is_a_filter(tmp_path):
  ledger = ScoreLedger(tmp_path / "ledger", fingerprints={"data": "digits"})
  ledger.append([5, 9, 2, 7], [1.0, -1.0, 2.0, -2.0], step=0, epoch=0)
  selection = select(ledger, binarize="threshold")
  one = filters.of_selection(selection, "mimic")
  assert one.ids.tolist() == [2, 5]
  assert (~one).ids.tolist() == [7, 9]
  named = {"mimic": selection, "bright": [5, 7]}
  both = filters.combine("~mimic & bright", named)
  assert (both.ids.tolist(), both.source) == ([7], "~mimic & bright")
  assert both.fingerprints == {"data": "digits"}
  assert overlap(named)["n_both"].to_pylist() == [1]
  path = export.write_npy(tmp_path / "kept.npy", selection)
  assert export.read_npy(path).tolist() == [2, 5]
  with pytest.raises(ValueError, match="'digits' in the one and 'cifar' in"):
    export.read_npy(path, fingerprints={"data": "cifar"})


def test_few_ids_that_are_0_and_1_are_ids():
  for ids in ([], [0], [1], [0, 1], [1, 0]):
    assert Filter(ids).ids.tolist() == sorted(ids)
  assert Filter([0, 1, 2, 1, 0]).ids.tolist() == [0, 1, 2]
  assert Filter([2]).apply([0, 1, 1, 0]).kept == 0  # a pool may repeat


@pytest.mark.parametrize(
  "keep",
  [
    np.array([True, False, True]),
    np.array([1, 0, 1]),
    np.array([1, 0, 1], np.uint8),
    np.array([1.0, 0.0, 1.0]),
    np.array([True, False, True], object),
    ["TRUE", "FALSE", "TRUE"],
  ],
)
def test_keep_is_never_taken_for_positions(tmp_path, keep):
  selection = Selection(
    np.array([10, 11, 12]),
    keep,
    np.array([0.9, 0.1, 0.8]),
    np.array([[1], [0], [1]], np.int8),
    {},
  )
  assert filters.of_selection(selection).ids.tolist() == [10, 12]
  assert compose("a", {"a": selection}).tolist() == [10, 12]
  path = export.write_npy(tmp_path / "k.npy", selection)
  assert export.read_npy(path).tolist() == [10, 12]
  for name in ("csv", "parquet"):
    path = getattr(export, f"write_{name}")(tmp_path / f"s.{name}", selection)
    got = getattr(export, f"read_{name}")(path)
    assert got.kept_ids.tolist() == [10, 12]


@pytest.mark.parametrize(
  ("keep", "message"),
  [
    ([0, 2, 1], "keep holds 2"),
    ([0.0, np.nan, 1.0], "keep holds nan"),
    (["yes", "no", "?"], r"keep holds '\?'"),
    ([1, 0], r"keep has shape \(2,\); expected \[3\]"),
  ],
)
def test_keep_that_says_nothing_is_refused(keep, message):
  with pytest.raises(ValueError, match=message):
    Selection(
      np.array([10, 11, 12]),
      np.array(keep),
      np.zeros(3),
      np.zeros((3, 1), np.int8),
      {},
    )


def test_fingerprints_go_along():
  one = Filter([1, 2], fingerprints={"data": "digits"})
  two = Filter([2], fingerprints={"reference": "mlp"})
  assert (one & two).fingerprints == {"data": "digits", "reference": "mlp"}
  filters.check_fingerprints("a", {"x": "1"}, "b", {"y": "2"})
