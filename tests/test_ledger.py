"""The ledger keeps every row, once, and reads nothing that isn't its own."""

import concurrent.futures
import json
import os
import shutil
import threading
import uuid

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from gradmimic_jax import ledger as ledger_lib
from gradmimic_jax.ledger import ScoreLedger


def random_appends(seed, *, n_ids=40, n_epochs=3, steps_per_epoch=6, batch=8):
  """Appends of a made-up run, with samples seen twice or never in an epoch."""
  rng = np.random.default_rng(seed)
  return [
    dict(
      ids=rng.permutation(n_ids)[:batch] * 3,
      scores=rng.normal(size=batch).astype(np.float32),
      step=epoch * steps_per_epoch + i,
      epoch=epoch,
      weights=rng.random(batch).astype(np.float32),
      losses=rng.random(batch).astype(np.float32),
    )
    for epoch in range(n_epochs)
    for i in range(steps_per_epoch)
  ]


def brute_force_matrix(appends, field):
  """The rule of `matrix`, row by row: the latest step of an epoch counts."""
  latest = {}
  for rows in sorted(appends, key=lambda rows: rows["step"]):
    for sample, value in zip(rows["ids"], rows[field], strict=True):
      latest[sample, rows["epoch"]] = value
  ids = sorted({sample for sample, _ in latest})
  epochs = sorted({epoch for _, epoch in latest})
  values = [[latest.get((i, e), np.nan) for e in epochs] for i in ids]
  return np.array(ids), np.array(values, np.float32)


def write(path, appends, *, flush_every=5, **kwargs):
  with ScoreLedger(path, **kwargs) as ledger:
    for i, rows in enumerate(appends):
      ledger.append(**rows)
      if i % flush_every == flush_every - 1:
        ledger.flush()
  return ledger


FIELDS = {"score": "scores", "weight": "weights", "loss": "losses"}


def assert_same(got, want):
  """Two ledgers, in every number that they give."""
  assert got.table().equals(want.table())
  assert len(got) == len(want) == got.table().num_rows
  for field in FIELDS:
    for a, b in zip(got.matrix(field), want.matrix(field), strict=True):
      np.testing.assert_array_equal(a, b)


def text_in(path):
  """The text in the metadata of a Parquet file without rows."""
  return pq.read_schema(path).metadata[b"gradmimic_jax.ledger.text"].decode()


def row_files(path):
  return sorted(path.glob("rows-*.parquet"))


@pytest.mark.parametrize("flush_every", [1, 5, 100])
def test_matrix_is_the_brute_force_one(tmp_path, flush_every):
  appends = random_appends(0)
  write(tmp_path, appends, flush_every=flush_every)
  for field in FIELDS:
    ids, values = ScoreLedger(tmp_path).matrix(field)
    want_ids, want_values = brute_force_matrix(appends, FIELDS[field])
    assert ids.dtype == np.int64
    assert values.dtype == np.float32
    assert np.isnan(want_values).any()  # the made-up run has gaps
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(values, want_values)


def test_table_holds_every_row_sorted(tmp_path):
  appends = random_appends(1)
  ledger = write(tmp_path, appends)
  table = ledger.table()
  want = sorted(
    (rows["step"], int(i), rows["epoch"], float(s))
    for rows in appends
    for i, s in zip(rows["ids"], rows["scores"], strict=True)
  )
  got = zip(
    *(table[c].to_pylist() for c in ("step", "id", "epoch", "score")),
    strict=True,
  )
  assert list(got) == want
  assert len(ledger) == len(want)
  assert ledger.epochs == (0, 1, 2)
  assert table.schema.names == [
    "id",
    "step",
    "epoch",
    "score",
    "weight",
    "loss",
  ]


def test_out_of_order_steps_and_small_batches(tmp_path, monkeypatch):
  monkeypatch.setattr(ledger_lib, "_BATCH_ROWS", 4)
  appends = random_appends(2)
  shuffled = [
    appends[i] for i in np.random.default_rng(0).permutation(len(appends))
  ]
  write(tmp_path, shuffled, flush_every=2)
  ids, values = ScoreLedger(tmp_path).matrix()
  want_ids, want_values = brute_force_matrix(appends, "scores")
  np.testing.assert_array_equal(ids, want_ids)
  np.testing.assert_array_equal(values, want_values)


def test_one_scoring_step_in_many_appends(tmp_path):
  # A pass over a data set with fixed parameters: one step, disjoint ids.
  with ScoreLedger(tmp_path) as ledger:
    for start in range(0, 100, 10):
      ids = np.arange(start, start + 10)
      ledger.append(ids, ids / 10, step=7, epoch=0)
      if start % 30 == 0:
        ledger.flush()
  assert len(ledger) == 100
  ids, values = ledger.matrix()
  np.testing.assert_array_equal(ids, np.arange(100))
  np.testing.assert_allclose(values[:, 0], np.arange(100) / 10, rtol=1e-6)


@pytest.mark.parametrize("kind", [int, str])
def test_several_steps_at_once_are_those_one_by_one(tmp_path, kind):
  rng = np.random.default_rng(3)
  ids = np.argsort(rng.random((5, 9)), axis=1).astype(kind)
  scores, weights = rng.normal(size=(2, 5, 9))
  mask = rng.random((5, 9)) < 0.7
  epochs = [0, 0, 1, 1, 2]
  with ScoreLedger(tmp_path / "one") as ledger:
    for k in range(5):
      real = mask[k]
      ledger.append(
        ids[k][real],
        scores[k][real],
        weights=weights[k][real],
        step=3 + k,
        epoch=epochs[k],
      )
  expected = ScoreLedger(tmp_path / "one").table()
  for name, steps in (("first", 3), ("all", np.arange(3, 8))):
    with ScoreLedger(tmp_path / name) as ledger:
      ledger.append(
        ids, scores, weights=weights, step=steps, epoch=epochs, mask=mask
      )
    assert ScoreLedger(tmp_path / name).table().equals(expected)


def test_an_id_may_come_once_in_each_of_several_steps(tmp_path):
  ledger = ScoreLedger(tmp_path)
  with pytest.raises(ValueError, match="one step: 4 came 2 times"):
    ledger.append([[4, 5], [4, 4]], np.zeros((2, 2)), step=0, epoch=0)
  with pytest.raises(ValueError, match=r"step is \[2, 2\]; expected ascending"):
    ledger.append([[4], [5]], [[1.0], [2.0]], step=[2, 2], epoch=0)
  ledger.append([[4, 5], [4, 5]], np.zeros((2, 2)), step=[2, 9], epoch=0)
  assert ledger.table()["step"].to_pylist() == [2, 2, 9, 9]


def test_string_ids(tmp_path):
  uids = np.array(["b" * 32, "a" * 32, "é"])
  with ScoreLedger(tmp_path) as ledger:
    ledger.append(uids, [1.0, 2.0, 3.0], step=0, epoch=0)
    ledger.append(uids[:2].astype(object), [4.0, 5.0], step=1, epoch=1)
    ledger.flush()
    ledger.append(list(uids[:1]), [6.0], step=1, epoch=1)
  reopened = ScoreLedger(tmp_path)
  assert reopened.id_kind == "string"
  assert len(reopened) == 5
  ids, values = reopened.matrix()
  assert ids.dtype.kind == "U"
  assert ids.tolist() == ["a" * 32, "b" * 32, "é"]
  np.testing.assert_array_equal(values, [[2, 5], [1, 6], [3, np.nan]])
  assert reopened.table()["id"].to_pylist()[:2] == ["a" * 32, "b" * 32]


def test_fields_not_given_and_not_finite(tmp_path):
  with ScoreLedger(tmp_path) as ledger:
    ledger.append([0, 1, 2], [np.nan, np.inf, 1e300], step=0, epoch=0)
    ledger.append([0, 1, 2], [1, 2, 3], step=1, epoch=1, losses=[4, 5, np.inf])
  table = ledger.table()
  assert table["weight"].null_count == 6
  assert table["loss"].null_count == 3
  assert table["score"].null_count == 0
  _, scores = ledger.matrix()
  np.testing.assert_array_equal(scores, [[np.nan, 1], [np.inf, 2], [np.inf, 3]])
  _, weights = ledger.matrix("weight")
  assert np.isnan(weights).all()
  _, losses = ledger.matrix("loss")
  np.testing.assert_array_equal(
    losses, [[np.nan, 4], [np.nan, 5], [np.nan, np.inf]]
  )


def test_takes_jax_arrays_and_copies_what_it_takes(tmp_path):
  ids, scores = np.array([1, 2]), np.array([1.0, 2.0], np.float32)
  with ScoreLedger(tmp_path) as ledger:
    ledger.append(ids, scores, step=0, epoch=0)
    ids[:], scores[:] = 9, 9.0
    ledger.append(
      jnp.array([3, 4]),
      jnp.array([3, 4], jnp.bfloat16),
      step=jnp.int32(1),
      epoch=np.int64(0),
    )
  got, values = ledger.matrix()
  np.testing.assert_array_equal(got, [1, 2, 3, 4])
  np.testing.assert_array_equal(values[:, 0], [1, 2, 3, 4])


def test_an_empty_append_records_nothing(tmp_path):
  with ScoreLedger(tmp_path / "new") as ledger:
    ledger.append([], [], step=0, epoch=0)
    assert ledger.flush() is None
  assert not (tmp_path / "new").exists()


def test_an_empty_ledger(tmp_path):
  ledger = ScoreLedger(tmp_path / "nowhere")
  assert len(ledger) == 0
  assert ledger.epochs == ()
  assert ledger.table().num_rows == 0
  with pytest.raises(ValueError, match="nowhere holds no rows"):
    ledger.matrix()


# Resume.


@pytest.mark.parametrize(
  "resume_from",
  [3, 17, *(pytest.param(x, marks=pytest.mark.slow) for x in (0, 7))],
)
def test_resume_is_idempotent(tmp_path, resume_from):
  appends = random_appends(3)
  write(tmp_path / "whole", appends)
  # Killed after step 12 with everything flushed; the checkpoint is older.
  write(tmp_path / "killed", appends[:13], flush_every=4)
  write(tmp_path / "killed", appends[min(resume_from, 13) :], flush_every=3)
  assert_same(ScoreLedger(tmp_path / "killed"), ScoreLedger(tmp_path / "whole"))


@pytest.mark.parametrize("flush_between", [True, False])
def test_the_row_written_last_wins(tmp_path, flush_between):
  ledger = ScoreLedger(tmp_path)
  ledger.append([1, 2], [1.0, 2.0], step=5, epoch=0)
  ledger.append([1, 2], [7.0, 8.0], step=6, epoch=0)
  if flush_between:
    ledger.flush()
  ledger.append([2], [3.0], step=5, epoch=0)
  assert ledger.table()["score"].to_pylist() == [1.0, 3.0, 7.0, 8.0]
  assert len(ledger) == 4
  np.testing.assert_array_equal(ledger.matrix()[1], [[7.0], [8.0]])


def test_a_kill_between_writing_and_renaming(tmp_path, monkeypatch):
  appends = random_appends(4)
  write(tmp_path, appends[:5])

  def killed(*_):
    raise KeyboardInterrupt

  ledger = ScoreLedger(tmp_path)
  for rows in appends[5:]:
    ledger.append(**rows)
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      ledger.flush()
  (leftover,) = tmp_path.glob(".rows-*.tmp")

  # A reader sees what was whole and touches nothing.
  reader = ScoreLedger(tmp_path)
  assert len(reader) == sum(len(rows["ids"]) for rows in appends[:5])
  assert leftover.exists()
  # The next writer starts where the last whole file ends.
  write(tmp_path, appends[5:])
  assert not leftover.exists()
  np.testing.assert_array_equal(
    ScoreLedger(tmp_path).matrix()[1], brute_force_matrix(appends, "scores")[1]
  )


def test_a_failed_flush_keeps_the_rows(tmp_path, monkeypatch):
  ledger = ScoreLedger(tmp_path)
  ledger.append([1], [1.0], step=0, epoch=0)
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
      ledger.flush()
  assert ledger.flush() is not None
  assert len(ScoreLedger(tmp_path)) == 1


def test_a_flush_at_exit_after_an_error(tmp_path):
  def fail(ledger):
    with ledger:
      ledger.append([1], [1.0], step=0, epoch=0)
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail(ScoreLedger(tmp_path))
  assert len(ScoreLedger(tmp_path)) == 1


# Several writers.


def write_shares(path, appends, rng, *, writers):
  """One life of a run: each writer has its share of every step's rows.

  Writers open, flush and stop in any order. What is appended after a writer's
  last flush is lost with it.
  """
  ledgers = [
    ScoreLedger(path, fingerprints={"data": "made up"}, writer=w)
    for w in rng.permutation(writers)
  ]
  for rows in appends:
    parts = np.array_split(np.arange(len(rows["ids"])), writers)
    for ledger in [ledgers[i] for i in rng.permutation(writers)]:
      share = parts[ledger.writer]
      ledger.append(
        **{
          name: value[share] if np.ndim(value) else value
          for name, value in rows.items()
        }
      )
      if rng.random() < 0.2:
        ledger.flush()
  return ledgers


@pytest.mark.parametrize(
  "seed",
  [
    seed if seed < 2 else pytest.param(seed, marks=pytest.mark.slow)
    for seed in range(12)
  ],
)
def test_writers_and_restarts_leave_no_trace(tmp_path, seed):
  """Any number of writers, killed anywhere, going on as any other number."""
  rng = np.random.default_rng(seed)
  appends = random_appends(seed, batch=9)
  whole = write(tmp_path / "whole", appends)
  done = 0  # steps that a checkpoint counts on
  while done < len(appends):
    killed_at = int(rng.integers(done, len(appends) + 4))
    saved_at = int(rng.integers(done, min(killed_at, len(appends)) + 1))
    ledgers = write_shares(
      tmp_path / "run", appends[done:saved_at], rng, writers=rng.integers(1, 5)
    )
    for ledger in ledgers:
      ledger.flush()
    if killed_at > saved_at:  # goes on, and is killed: some of it is on disk
      lost = [
        rows | {"scores": rows["scores"] + 100}  # to be written again
        for rows in appends[saved_at:killed_at]
      ]
      write_shares(tmp_path / "run", lost, rng, writers=len(ledgers))
    if killed_at >= len(appends):
      # The last life is a whole one.
      for ledger in write_shares(
        tmp_path / "run", appends[saved_at:], rng, writers=rng.integers(1, 5)
      ):
        ledger.flush()
      saved_at = len(appends)
    done = saved_at
  assert_same(ScoreLedger(tmp_path / "run"), whole)


def test_writers_begin_a_ledger_at_the_same_time(tmp_path):
  count = 16
  barrier = threading.Barrier(count)

  def begin(writer):
    ledger = ScoreLedger(tmp_path, fingerprints={"a": "b"}, writer=writer)
    ledger.append([writer], [writer / 2], step=0, epoch=0)
    barrier.wait()
    for step in range(1, 4):
      ledger.flush()
      ledger.append([writer], [writer / 2], step=step, epoch=0)
    ledger.flush()

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    list(pool.map(begin, range(count)))
  ids, values = ScoreLedger(tmp_path, fingerprints={"a": "b"}).matrix()
  np.testing.assert_array_equal(ids, np.arange(count))
  np.testing.assert_array_equal(values[:, 0], np.arange(count) / 2)
  assert len(ScoreLedger(tmp_path)) == 4 * count
  assert not list(tmp_path.glob(".*"))


def test_a_ledger_begins_without_hard_links(tmp_path, monkeypatch):
  def refuse(*_):
    raise PermissionError("no links here")

  monkeypatch.setattr(os, "link", refuse)
  for writer in (1, 0):
    write(tmp_path, random_appends(16), writer=writer)
  assert len(ScoreLedger(tmp_path)) == 3 * 6 * 8


def test_a_writer_removes_its_own_leftovers_only(tmp_path):
  write(tmp_path, random_appends(17))
  name = ".rows-000000000-000000001-000001-w{:05d}-00000000.parquet.tmp"
  for writer in (1, 2):
    (tmp_path / name.format(writer)).write_bytes(b"PAR1")
  write(tmp_path, random_appends(17), writer=2)
  assert [p.name for p in tmp_path.glob(".*")] == [name.format(1)]


def test_a_writer_is_a_number(tmp_path):
  with pytest.raises(ValueError, match="writer is -1"):
    ScoreLedger(tmp_path, writer=-1)
  with pytest.raises(TypeError, match="writer is '1'; expected an integer"):
    ScoreLedger(tmp_path, writer="1")


def test_a_ledger_of_an_earlier_release_goes_on(tmp_path):
  appends = random_appends(18)
  write(tmp_path, appends[:10])
  for path in row_files(tmp_path):
    os.rename(path, path.with_name(path.name.replace("-w00000", "")))
  ledger = write(tmp_path, [a | {"scores": -a["scores"]} for a in appends[5:]])
  want = appends[:5] + [a | {"scores": -a["scores"]} for a in appends[5:]]
  np.testing.assert_array_equal(
    ledger.matrix()[1], brute_force_matrix(want, "scores")[1]
  )


# Files that are damaged, or not the ledger's.


def test_a_torn_file_is_refused_by_name(tmp_path):
  write(tmp_path, random_appends(5))
  torn = row_files(tmp_path)[1]
  whole = torn.read_bytes()
  for size in [0, 3, 4, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1]:
    torn.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f"{torn.name} is torn or garbled"):
      ScoreLedger(tmp_path)
  torn.write_bytes(whole)
  ScoreLedger(tmp_path).table()


def test_a_garbled_file_is_never_read(tmp_path):
  write(tmp_path, random_appends(6))
  garbled = row_files(tmp_path)[0]
  whole = garbled.read_bytes()
  for at in np.random.default_rng(0).integers(0, len(whole), 60):
    content = bytearray(whole)
    content[at] ^= 0x40
    garbled.write_bytes(bytes(content))
    for read in (ScoreLedger.table, ScoreLedger.matrix):
      with pytest.raises(ValueError, match=garbled.name):
        read(ScoreLedger(tmp_path))


def test_a_file_torn_after_opening_is_refused(tmp_path):
  ledger = write(tmp_path, random_appends(7))
  torn = row_files(tmp_path)[-1]
  torn.write_bytes(torn.read_bytes()[:-50])
  with pytest.raises(ValueError, match=f"{torn.name} is torn or garbled"):
    ledger.matrix()


def test_a_foreign_parquet_file_is_refused(tmp_path):
  write(tmp_path, random_appends(8))
  table = pa.table({"id": [1], "score": [1.0]})
  pq.write_table(table, tmp_path / "mine.parquet")
  with pytest.raises(ValueError, match=r"mine.parquet is not a file that this"):
    ScoreLedger(tmp_path)
  named = "rows-000000000-000000001-000009-00000000.parquet"
  os.replace(tmp_path / "mine.parquet", tmp_path / named)
  with pytest.raises(ValueError, match=f"{named} is not a ledger's file"):
    ScoreLedger(tmp_path)


def test_a_twin_ledgers_file_is_refused(tmp_path):
  for name in "ab":
    write(tmp_path / name, random_appends(9), fingerprints={"data": "digits"})
  theirs = row_files(tmp_path / "b")[0]
  shutil.copy(
    theirs, tmp_path / "a" / theirs.name.replace("-000001-", "-9999-")
  )
  with pytest.raises(ValueError, match="not a file that this ledger wrote"):
    ScoreLedger(tmp_path / "a")
  os.remove(tmp_path / "a" / theirs.name.replace("-000001-", "-9999-"))
  name = theirs.name.replace("-000001-", "-000099-")
  shutil.copy(theirs, tmp_path / "a" / name)
  with pytest.raises(ValueError, match=f"{name} belongs to another ledger"):
    ScoreLedger(tmp_path / "a")


def test_a_file_that_appears_while_open_is_checked(tmp_path):
  ledger = write(tmp_path, random_appends(10))
  (tmp_path / "late.parquet").write_bytes(b"PAR1")
  with pytest.raises(ValueError, match=r"late.parquet is not a file"):
    ledger.table()


def test_other_files_in_the_folder_do_not_matter(tmp_path):
  write(tmp_path, random_appends(11))
  (tmp_path / "README").write_text("notes")
  (tmp_path / "figures").mkdir()
  ScoreLedger(tmp_path).matrix()


def test_a_missing_manifest_is_refused(tmp_path):
  write(tmp_path, random_appends(12))
  (tmp_path / "_manifest.parquet").unlink()
  with pytest.raises(ValueError, match=r"but no\s+_manifest.parquet"):
    ScoreLedger(tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "not JSON"),
    (b'{"format": "gradmimic', "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[1, 2]", "its format is not"),
    (b'{"format": "other"}', "its format is not"),
    (b'{"format": "gradmimic_jax.ledger", "version": 99}', "of version 99"),
    (b'{"format": "gradmimic_jax.ledger", "version": 1}', "is not right"),
  ],
)
def test_a_bad_manifest_is_refused(tmp_path, content, message):
  wrapped = pa.BufferOutputStream()
  about = {b"gradmimic_jax.ledger.text": content}
  pq.write_table(pa.table({"id": []}).replace_schema_metadata(about), wrapped)
  for name, written in (
    ("_manifest.json", content),  # as earlier releases have it
    ("_manifest.parquet", wrapped.getvalue()),
  ):
    (tmp_path / name).write_bytes(written)
    with pytest.raises(ValueError, match=name) as caught:
      ScoreLedger(tmp_path)
    assert message in str(caught.value)


def test_a_path_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "x").write_text("")
  with pytest.raises(ValueError, match="is a file; a ledger is a folder"):
    ScoreLedger(tmp_path / "x")


# Fingerprints and the kind of the ids.


def test_fingerprints_are_kept_and_compared(tmp_path):
  prints = {"data": "digits", "reference": "abc"}
  write(tmp_path, random_appends(13), fingerprints=prints)
  assert ScoreLedger(tmp_path).fingerprints == prints
  assert ScoreLedger(tmp_path, fingerprints=prints).fingerprints == prints
  for other, message in [
    ({"data": "digits", "reference": "xyz"}, "'reference' is 'abc'.*'xyz'"),
    ({"data": "digits"}, "'reference' is 'abc' there and None here"),
    ({**prints, "config": "c"}, "'config' is None there and 'c' here"),
    ({}, "'data' is 'digits' there and None here"),
  ]:
    with pytest.raises(ValueError, match=message):
      ScoreLedger(tmp_path, fingerprints=other)
  manifest = json.loads(text_in(tmp_path / "_manifest.parquet"))
  assert manifest["fingerprints"] == prints
  assert manifest["id_kind"] == "integer"


def test_a_ledger_begun_by_another_meanwhile(tmp_path):
  late = ScoreLedger(tmp_path, fingerprints={"data": "a"})
  write(tmp_path, random_appends(14), fingerprints={"data": "b"})
  late.append([1], [1.0], step=0, epoch=0)
  with pytest.raises(ValueError, match="fingerprint 'data' is 'b' there"):
    late.flush()


def test_fingerprints_must_be_strings(tmp_path):
  with pytest.raises(TypeError, match=r"fingerprints\['seed'\] is 3"):
    ScoreLedger(tmp_path, fingerprints={"seed": 3})
  with pytest.raises(TypeError, match="a mapping of names to strings"):
    ScoreLedger(tmp_path, fingerprints="digits")


def test_the_first_append_fixes_the_kind_of_id(tmp_path):
  ledger = ScoreLedger(tmp_path)
  assert ledger.id_kind is None
  ledger.append([1], [1.0], step=0, epoch=0)
  with pytest.raises(TypeError, match="of kind string, but the ledger at"):
    ledger.append(["a"], [1.0], step=1, epoch=0)
  ledger.flush()
  with pytest.raises(TypeError, match="holds integer ids"):
    ScoreLedger(tmp_path).append(["a"], [1.0], step=1, epoch=0)


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"ids": [1, 2]}, ValueError, r"scores has shape \(3,\), but there are 2"),
    ({"ids": [[[1, 2, 3]]]}, ValueError, r"ids has shape \(1, 1, 3\)"),
    (
      {"ids": [[1, 2, 3]]},
      ValueError,
      r"scores has shape \(3,\), but ids have",
    ),
    ({"mask": [True]}, ValueError, r"mask has shape \(1,\); expected \(3,\)"),
    ({"mask": [1, 0, 1]}, TypeError, "mask has dtype int64; expected bool"),
    ({"step": [1, 2]}, ValueError, r"step has shape \(2,\), and ids are of 1"),
    ({"step": [1.0]}, TypeError, "step has dtype float64"),
    ({"epoch": [-1]}, ValueError, "epoch is -1"),
    ({"ids": 1}, ValueError, r"ids has shape \(\)"),
    ({"ids": [1, -1, 2]}, ValueError, r"ids holds -1.*Leave padding out"),
    ({"ids": [1, 5, 5]}, ValueError, "ids repeat within one step: 5 came 2"),
    ({"ids": ["a", "b", "a"]}, ValueError, "'a' came 2 times"),
    ({"ids": [1.0, 2.0, 3.0]}, TypeError, "ids has dtype float64"),
    ({"ids": [True, False, True]}, TypeError, "ids has dtype bool"),
    ({"ids": [b"a", b"b", b"c"]}, TypeError, "ids has dtype"),
    (
      {"ids": np.array(["a", 1, "b"], object)},
      TypeError,
      "ids are not all strings",
    ),
    (
      {"ids": np.array(["a", None, "b"], object)},
      TypeError,
      "ids holds None",
    ),
    (
      {"ids": np.array([1, 2, 2**63], np.uint64)},
      ValueError,
      "fit in int64",
    ),
    ({"scores": [[1.0], [2.0], [3.0]]}, ValueError, "scores has shape"),
    ({"scores": ["1", "2", "3"]}, TypeError, "scores has dtype <U1"),
    ({"scores": [1j, 2, 3]}, TypeError, "scores has dtype complex128"),
    ({"scores": None}, TypeError, "scores is None"),
    ({"weights": [1.0]}, ValueError, r"weights has shape \(1,\)"),
    ({"losses": 1.0}, ValueError, r"losses has shape \(\)"),
    ({"step": -1}, ValueError, "step is -1"),
    ({"step": 1.0}, TypeError, r"step is 1.0; expected an integer"),
    ({"step": True}, TypeError, "step is True"),
    ({"epoch": 2**31}, ValueError, "epoch is 2147483648"),
    ({"epoch": None}, TypeError, "epoch is None"),
  ],
)
def test_a_bad_append_is_refused_and_leaves_no_trace(
  tmp_path, change, error, message
):
  ledger = ScoreLedger(tmp_path)
  good = dict(ids=[1, 2, 3], scores=[1.0, 2.0, 3.0], step=0, epoch=0)
  with pytest.raises(error, match=message):
    ledger.append(**{**good, **change})
  assert len(ledger) == 0
  ledger.append(**good)
  assert len(ledger) == 3


def test_an_unknown_field_is_refused(tmp_path):
  with pytest.raises(ValueError, match="field is 'grad'; expected one of"):
    ScoreLedger(tmp_path).matrix("grad")


def test_no_file_holds_a_pickle(tmp_path):
  write(tmp_path, random_appends(15))
  ids, _ = ScoreLedger(tmp_path).matrix()
  np.save(tmp_path / "ids.npy", ids, allow_pickle=False)
  for path in row_files(tmp_path):
    assert b"pandas" not in path.read_bytes()


# Files that were lost.


def test_a_lost_file_is_refused_by_name(tmp_path):
  write(tmp_path, random_appends(19))
  files = row_files(tmp_path)
  assert len(files) == 4
  for lost in files:  # the first and the last one, too
    content = lost.read_bytes()
    lost.unlink()
    for open_it in (
      ScoreLedger,
      lambda path: ScoreLedger(path, writer=1).matrix(),
    ):
      with pytest.raises(ValueError, match=f"{lost.name} is missing: .*lost r"):
        open_it(tmp_path)
    ledger = ScoreLedger(tmp_path, recover=True)
    assert ledger.lost_files == (lost.name,)
    assert ledger.first_lost_step == int(lost.name.split("-")[1])
    for read in (ScoreLedger.table, ScoreLedger.matrix, len):
      with pytest.raises(ValueError, match=lost.name):
        read(ledger)
    lost.write_bytes(content)
  files[1].unlink()
  files[3].unlink()
  with pytest.raises(ValueError, match=f"{files[1].name} is missing, and 1 mo"):
    ScoreLedger(tmp_path)


@pytest.mark.parametrize(
  "seed",
  [0, 1, *(pytest.param(x, marks=pytest.mark.slow) for x in range(2, 6))],
)
def test_lost_rows_are_recorded_again(tmp_path, seed):
  """Whoever wrote them, and however the run had come there."""
  rng = np.random.default_rng(seed)
  appends = random_appends(seed)
  whole = write(tmp_path / "whole", appends).table()
  run = tmp_path / "run"
  for start, end in ((0, 8), (5, len(appends))):  # killed after a checkpoint
    for ledger in write_shares(run, appends[start:end], rng, writers=3):
      ledger.flush()
  for path in rng.permutation(row_files(run))[: rng.integers(1, 4)]:
    path.unlink()
  ledger = ScoreLedger(run, recover=True)
  lost = ledger.first_lost_step
  if lost + 1 < len(appends):
    with pytest.raises(ValueError, match=f"lost rows from step {lost} on"):
      ledger.forget_from(lost + 1)
  saved = int(rng.integers(0, lost + 1))
  ledger.forget_from(saved)
  assert ledger.first_lost_step is None
  for ledger in write_shares(run, appends[saved:], rng, writers=2):
    ledger.flush()
  assert ScoreLedger(run).table().equals(whole)


def test_a_kill_before_a_file_is_listed(tmp_path, monkeypatch):
  appends = random_appends(20)
  write(tmp_path, appends[:10])
  listed = (tmp_path / "_files-w00000.parquet").read_bytes()
  write(tmp_path, appends[10:])
  (tmp_path / "_files-w00000.parquet").write_bytes(listed)
  want = brute_force_matrix(appends, "scores")[1]
  np.testing.assert_array_equal(ScoreLedger(tmp_path).matrix()[1], want)
  write(tmp_path, appends[-1:])  # takes over what is there
  row_files(tmp_path)[-2].unlink()
  with pytest.raises(ValueError, match="is missing"):
    ScoreLedger(tmp_path)


def read_or_told(read):
  """What came, or None and the error that came in its place."""
  try:
    return read(), ""
  except ValueError as error:
    return None, str(error)


def counts_of(path):
  ledger = ScoreLedger(path)
  return len(ledger), ledger.epochs


@pytest.mark.parametrize("name", ["_files-w00000.parquet", "_manifest.parquet"])
def test_a_garbled_list_or_manifest_is_never_believed(tmp_path, name):
  write(tmp_path, random_appends(21), fingerprints={"data": "digits"})
  want = ScoreLedger(tmp_path).table()
  file = tmp_path / name
  whole = file.read_bytes()
  rng = np.random.default_rng(0)
  contents = [b"", bytes(len(whole)), whole + whole, b"[" * 10**5]
  for at in rng.integers(0, len(whole), 60):
    content = bytearray(whole)
    content[at] ^= 1 << rng.integers(8)
    contents.append(bytes(content))
  for content in contents:
    file.write_bytes(content)
    found, text = read_or_told(lambda: ScoreLedger(tmp_path).table())
    assert name in text if found is None else found.equals(want)
    assert "\n" not in text


def test_a_garbled_footer_gives_no_other_counts(tmp_path):
  write(tmp_path, random_appends(22))
  garbled = row_files(tmp_path)[0]
  whole = garbled.read_bytes()
  want = counts_of(tmp_path)
  footer = int.from_bytes(whole[-8:-4], "little")
  for at in range(len(whole) - 8 - footer, len(whole), 13):
    content = bytearray(whole)
    content[at] ^= 1 << at % 8
    garbled.write_bytes(bytes(content))
    found, text = read_or_told(lambda: counts_of(tmp_path))
    assert garbled.name in text if found is None else found == want
  twin = row_files(tmp_path)[1]
  garbled.write_bytes(twin.read_bytes())
  with pytest.raises(ValueError, match=f"{garbled.name} is torn.*another file"):
    ScoreLedger(tmp_path)


def as_an_earlier_release(path):
  """Names of before there were lists, and a manifest that readers look at."""
  for file in path.glob("_files-*"):
    file.unlink()
  manifest = json.loads(text_in(path / "_manifest.parquet"))
  del manifest["check"]
  (path / "manifest.json").write_text(json.dumps(manifest))
  (path / "_manifest.parquet").unlink()


def as_the_last_release(path):
  """The manifest and the lists as plain files."""
  for file in path.glob("_*.parquet"):
    suffix = ".json" if "manifest" in file.name else ".txt"
    file.with_suffix(suffix).write_text(text_in(file))
    file.unlink()


def test_a_ledger_of_the_last_release_opens_and_goes_on(tmp_path):
  appends = random_appends(26)
  write(tmp_path, appends[:10], flush_every=3)
  as_the_last_release(tmp_path)
  list_file = tmp_path / "_files-w00000.txt"
  listed = list_file.read_text()
  list_file.write_text(listed[:-20])  # as a kill may leave it
  assert len(ScoreLedger(tmp_path)) == sum(len(a["ids"]) for a in appends[:10])
  write(tmp_path, appends[10:])
  want = brute_force_matrix(appends, "scores")[1]
  np.testing.assert_array_equal(ScoreLedger(tmp_path).matrix()[1], want)
  assert not list_file.exists()  # its lines are in the new one
  row_files(tmp_path)[-2].unlink()
  with pytest.raises(ValueError, match="is missing"):
    ScoreLedger(tmp_path)


def test_a_ledger_without_lists_opens_and_goes_on(tmp_path):
  appends = random_appends(23)
  write(tmp_path, appends[:10], flush_every=3)
  as_an_earlier_release(tmp_path)
  write(tmp_path, appends[10:])
  want = brute_force_matrix(appends, "scores")[1]
  np.testing.assert_array_equal(ScoreLedger(tmp_path).matrix()[1], want)
  for lost in row_files(tmp_path):  # its own list has the earlier ones, too
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is missing"):
      ScoreLedger(tmp_path)
    lost.write_bytes(content)


def test_a_gap_in_a_ledger_without_lists_is_seen(tmp_path):
  write(tmp_path, random_appends(24))
  as_an_earlier_release(tmp_path)
  row_files(tmp_path)[1].unlink()
  with pytest.raises(ValueError, match="no file number 2, and later ones"):
    ScoreLedger(tmp_path)
  ledger = ScoreLedger(tmp_path, recover=True)
  assert ledger.first_lost_step == 0
  ledger.forget_from(0)
  assert len(ledger) == 0


def test_others_read_the_folder_as_it_is(tmp_path):
  appends = random_appends(25)
  ids = np.array([f"{i:03d}" for i in range(200)] + ["NA", ""])
  for rows in appends:
    rows["ids"] = ids[rows["ids"]]
  appends[0]["ids"][:2] = "NA", ""
  want = write(tmp_path, appends).table()
  pandas = pytest.importorskip("pandas")
  order = ["step", "id"]
  found = pandas.read_parquet(tmp_path).sort_values(order, ignore_index=True)
  table = pyarrow.dataset.dataset(tmp_path).to_table()
  for got in (found, table.to_pandas().sort_values(order, ignore_index=True)):
    assert got["id"].tolist() == want["id"].to_pylist()
    np.testing.assert_array_equal(got["score"], want["score"].to_numpy())


@pytest.mark.slow
def test_polars_and_duckdb_read_the_folder_as_it_is(tmp_path):
  polars = pytest.importorskip("polars")
  duckdb = pytest.importorskip("duckdb")
  for kind, change in (
    ("i", lambda ids: ids),
    ("s", lambda ids: ids.astype("U")),
  ):
    path = tmp_path / kind
    appends = random_appends(27)
    for rows in appends:
      rows["ids"] = change(rows["ids"])
    want = polars.DataFrame(write(path, appends, flush_every=3).table())
    order = ["step", "id"]
    for found in (
      polars.read_parquet(path),
      polars.scan_parquet(path).collect(),
      duckdb.sql(f"select * from read_parquet('{path}')").pl(),
      duckdb.sql(f"select * from '{path}/*.parquet'").pl(),
    ):
      assert found.sort(order).equals(want.sort(order))


def test_what_lies_in_a_temporary_files_place_is_not_written_to(
  tmp_path, monkeypatch
):
  victim = tmp_path / "victim"
  monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
  ledger = ScoreLedger(tmp_path / "ledger")
  ledger.append([1], [1.0], step=0, epoch=0)
  (tmp_path / "ledger").mkdir()
  name = f"._manifest.parquet.w00000.{uuid.UUID(int=7).hex}.tmp"
  (tmp_path / "ledger" / name).symlink_to(victim)
  monkeypatch.setattr(
    ledger_lib.row_files, "remove_temporary_files", lambda *_, **__: None
  )
  with pytest.raises(FileExistsError):
    ledger.flush()
  assert not victim.exists()
