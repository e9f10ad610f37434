"""Short runs of all kinds end where they ended when they were recorded."""

import json

import numpy as np
import pytest

from tests.experiments import pinned

# Compared by hand, around a refactoring. That interrupted runs, and those of
# two processes, end as others do is asked by `contract/test_tasks.py` and, of
# divided parameters, by `runtime/test_distributed.py`; what methods other than
# grad_mimic weigh with two towers, by the tests of contrastive losses.
BY_HAND = (
  *(f"{task}{pinned.INTERRUPTED}" for task in pinned.INTERRUPTED_AT),
  f"{pinned.CLASSIFICATION}/two_processes",
  *(f"{pinned.CONTRASTIVE}/{x}" for x in ("sgd", "rho", "output_agreement")),
)

ARRAYS = {
  "params/w": np.random.default_rng(0).normal(size=(8, 8)).astype("f4"),
  "ledger/id": np.arange(40),
  "selection/keep": np.arange(40) % 3 > 0,
  "selection/quality": np.where(np.arange(40) < 3, np.nan, 0.5),
  "result/loss": np.array([0.25]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Where runs are that several cases need."""
  return tmp_path_factory.mktemp("pinned")


@pytest.fixture(scope="module")
def expected():
  found = json.loads(pinned.FILE.read_text())
  for case in pinned.CASES:
    task, interrupted, _ = case.partition(pinned.INTERRUPTED)
    if interrupted:
      found[case] = found[f"{task}/grad_mimic"]
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  "case", [case for case in pinned.CASES if case not in BY_HAND]
)
def test_a_run_ends_where_it_did(case, root, expected):
  found = pinned.summarize(pinned.CASES[case](root))
  far = {
    name: by
    for name, by in pinned.deviations(found, expected[case]).items()
    if by > pinned.TOLERANCE
  }
  assert not far, f"{case}: deviations relative to the arrays' norms: {far}"


def test_every_case_is_recorded(expected):
  assert expected.keys() == pinned.CASES.keys()
  assert pinned.FILE.stat().st_size <= 40_000


def test_the_same_is_the_same():
  again = {name: array.copy() for name, array in ARRAYS.items()}
  assert not pinned.differences(again, ARRAYS)
  gaps = pinned.deviations(*map(pinned.summarize, (again, ARRAYS)))
  assert set(gaps.values()) == {0.0}


def test_one_bit_is_a_difference():
  other = ARRAYS["params/w"].copy()
  other[3, 4] = np.nextafter(other[3, 4], np.float32(9))
  found = pinned.differences({**ARRAYS, "params/w": other}, ARRAYS)
  assert list(found) == ["params/w"]


@pytest.mark.parametrize("name", list(ARRAYS))
def test_what_is_gone_or_of_another_shape_is_named(name):
  less = {key: array for key, array in ARRAYS.items() if key != name}
  cut = {**less, name: ARRAYS[name][:-1]}
  for found in (less, cut):
    assert list(pinned.differences(found, ARRAYS)) == [name]
    gaps = pinned.deviations(*map(pinned.summarize, (found, ARRAYS)))
    assert [key for key, gap in gaps.items() if gap] == [name]


def test_a_summary_sees_small_changes():
  for name, change in (
    ("params/w", lambda w: w * (1 + 2e-4)),
    ("params/w", lambda w: w.T),
    ("params/w", lambda w: np.where(np.arange(64).reshape(8, 8), w, 9e-3)),
    ("ledger/id", lambda ids: ids[::-1]),
    ("selection/keep", lambda keep: np.arange(40) > 0),
    ("result/loss", lambda loss: loss * (1 + 2e-4)),
  ):
    found = {**ARRAYS, name: change(ARRAYS[name])}
    gaps = pinned.deviations(*map(pinned.summarize, (found, ARRAYS)))
    far = [key for key, gap in gaps.items() if gap > pinned.TOLERANCE]
    assert far == [name]
