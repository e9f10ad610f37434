"""Decisions that a page's reader downloads, as `config.data.filter`."""

import numpy as np
import pytest

from experiments.data import filters

HEAD = '"id","decision","label","by"\n'


def write(tmp_path, rows, head=HEAD):
  path = tmp_path / "decisions.csv"
  path.write_text(head + rows)
  return str(path)


def test_what_is_removed_or_relabelled_is_not_trained_on(tmp_path):
  path = write(
    tmp_path, "1,keep,,person\n2,relabel,5,person\n3,remove,,selection\n"
  )
  # The ids are positions, whatever the data set's own are.
  for pool in (np.array(list("abcde")), np.array(["0", "1", "2", "3", "4"])):
    applied = filters.apply(path, pool)
    assert np.flatnonzero(applied.mask).tolist() == [0, 1, 4]
    assert applied.missing == 0


def test_own_ids_are_found(tmp_path):
  path = write(tmp_path, '"c",remove,,person\n')
  applied = filters.apply(path, np.array(list("abc")))
  assert applied.mask.tolist() == [True, True, False]


def test_doubtful_and_foreign_ones_are_refused(tmp_path):
  digits = np.array(["00", "02", "04"])
  bare = write(tmp_path, "2,remove,,person\n", HEAD.replace('"', ""))
  with pytest.raises(ValueError, match="may be positions"):
    filters.apply(bare, digits)
  path = write(tmp_path, "7,remove,,person\n")
  with pytest.raises(ValueError, match="first is 7"):
    filters.apply(path, digits)
  changes = write(tmp_path, "1,remove\n", "id,decision\n")
  with pytest.raises(ValueError, match="Apply it to the selection first"):
    filters.apply(changes, np.array(list("abc")))
