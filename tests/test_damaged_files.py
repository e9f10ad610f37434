"""Every damage of every exported file: what was in it, or its name in a line.

`python tests/test_damaged_files.py` prints how many cases there are and which
fail; 0 are expected to.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import damages as damages_lib

from gradmimic_jax.selection import Selection, export

TEXT = ["007", "", "NA", "=1+1", "'x", "é\n", "-2", "a,b", 'q"', "t\t", "1e5"]
PRINTS = {"data": "digits-v1", "reference": "mlp"}


def selection_of(ids, seed):
  """A selection of any ids, with what `select` may give."""
  rng = np.random.default_rng(seed)
  n = len(ids)
  probability = rng.random(n).round(3)
  probability[0] = np.nan
  return Selection(
    np.array(ids),
    ~(probability < 0.5),
    probability,
    rng.integers(-1, 2, (n, 3)).astype(np.int8),
    {"binarize": "auto", "notes": [""] * 3},
    rng.random(n),
  )


def kept(selection):
  return sorted(selection.kept_ids.tolist())


def whole(selection):
  """All of a selection, as plain values that can be compared."""
  return [
    selection.ids.tolist(),
    selection.keep.tolist(),
    np.nan_to_num(selection.keep_probability, nan=-1).tolist(),
    np.nan_to_num(selection.quality, nan=-1).tolist(),
    selection.votes.tolist(),
    selection.diagnostics.get("notes"),
  ]


class Kind(NamedTuple):
  """A kind of file: how it is written, and what is read from it."""

  name: str
  write: Callable[[pathlib.Path, int], Any]  # to a path, by a seed
  read: Callable[[pathlib.Path], Any]
  # A file without a checksum, whose values may be changed unseen: it is read
  # without a traceback, and that is all that can be asked.
  is_plain: bool = False


def uids(seed, n=12):
  """Pairs [n], ascending."""
  rng = np.random.default_rng(seed)
  pairs = np.empty(n, "u8,u8")
  pairs["f0"] = np.sort(rng.integers(0, 2**64, n, np.uint64))
  pairs["f1"] = rng.integers(0, 2**64, n, np.uint64)
  return pairs


def numbers(seed):
  return np.random.default_rng(seed).choice(1000, 20, replace=False)


def plain_parquet(path, seed):
  found = selection_of(TEXT, seed)
  table = {
    "id": pa.array(found.ids),
    "keep": found.keep.astype(np.int64),
    "keep_probability": found.keep_probability,
    "quality": found.quality,
    "votes": pa.array(found.votes.tolist()),
  }
  pq.write_table(pa.table(table), path)


def plain_csv(path, seed):
  """As the release before this one wrote it."""
  found = selection_of(TEXT, seed)
  table = {
    "id": pa.array(found.ids),
    "keep": found.keep,
    "keep_probability": pa.array(found.keep_probability, from_pandas=True),
    "quality": found.quality,
    **{f"vote_{t}": found.votes[:, t].copy() for t in range(3)},
  }
  pa_csv.write_csv(pa.table(table), path)


def checked(read):
  """Reads, and asks for the inputs that the file belongs to."""
  return lambda path: read(path, fingerprints=PRINTS)


def read_ids(path):
  return checked(export.read_npy)(path).tolist()


def read_uids(path):
  return checked(export.read_datacomp_subset)(path).tolist()


def read_csv(path):
  return whole(checked(export.read_csv)(path))


def read_parquet(path):
  return whole(checked(export.read_parquet)(path))


KINDS = (
  Kind(
    "ids.npy",
    lambda p, s: export.write_npy(p, numbers(s), fingerprints=PRINTS),
    read_ids,
  ),
  Kind(
    "names.npy",
    lambda p, s: export.write_npy(
      p, kept(selection_of(TEXT, s)), fingerprints=PRINTS
    ),
    read_ids,
  ),
  Kind(
    "subset.npy",
    lambda p, s: export.write_datacomp_subset(p, uids(s), fingerprints=PRINTS),
    read_uids,
  ),
  Kind(
    "selection.csv",
    lambda p, s: export.write_csv(
      p, selection_of(TEXT, s), fingerprints=PRINTS
    ),
    read_csv,
  ),
  Kind(
    "integers.csv",
    lambda p, s: export.write_csv(p, selection_of(numbers(s), s)),
    read_csv,
  ),
  Kind(
    "selection.parquet",
    lambda p, s: export.write_parquet(
      p, selection_of(TEXT, s), fingerprints=PRINTS
    ),
    read_parquet,
  ),
  Kind(
    "integers.parquet",
    lambda p, s: export.write_parquet(p, selection_of(numbers(s), s)),
    read_parquet,
  ),
  Kind("plain.npy", lambda p, s: np.save(p, numbers(s)), read_ids, True),
  Kind("text.npy", lambda p, s: np.save(p, np.array(TEXT)), read_ids, True),
  Kind("datacomp.npy", lambda p, s: np.save(p, uids(s)), read_uids, True),
  Kind("raw.npy", lambda p, s: uids(s).tofile(p), read_uids, True),
  Kind("earlier.csv", plain_csv, read_csv, True),
  Kind("pandas.parquet", plain_parquet, read_parquet, True),
  Kind(
    "metadata.parquet",
    lambda p, s: pq.write_table(
      pa.table({"uid": export.format_uids(uids(s))}), p
    ),
    lambda path: tuple(export.coverage(uids(0), path)),
    True,
  ),
)


def run(
  kinds=KINDS, *, seed: int = 0, **options: Any
) -> tuple[int, int, list[str]]:
  """Damages every file and the one beside it, and reads it.

  Args:
    kinds: of files.
    seed: of the damages.
    **options: for `damages`.

  Returns:
    How many cases there were, how many of them were read all the same, and a
    line for each that is wrong.
  """
  count, held, wrong = 0, 0, []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    contents = {}
    for kind in kinds:
      kind.write(folder / kind.name, 1)
      contents[kind.name] = (folder / kind.name).read_bytes()
    for kind in kinds:
      path = folder / kind.name
      files = path, path.with_name(path.name + ".json")
      kind.write(path, 2)
      siblings = [file.read_bytes() for file in files if file.exists()]
      kind.write(path, 0)
      right = kind.read(path)
      # Whole files of the same kind are no damage where nothing tells it: the
      # checksum of a Parquet file is its own.
      others = {
        name: content
        for name, content in contents.items()
        if pathlib.Path(name).suffix != path.suffix
      }
      for file, sibling in zip(files, siblings, strict=False):
        for case in damages_lib.damages(
          file.read_bytes(),
          sibling=sibling if len(siblings) > 1 else None,
          others=others,
          removed=True,
          seed=seed,
          **options,
        ):
          found: list[Any] = []

          def is_right(value, found=found, right=right, plain=kind.is_plain):
            found.append(value)
            return plain or value == right

          text = damages_lib.outcome(
            file,
            case,
            lambda kind=kind, path=path: kind.read(path),
            is_right,
            names=(path.name,),
          )
          count += 1
          held += bool(found)
          if text:
            wrong.append(f"{kind.name}: {file.name}: {text}")
  return count, held, wrong


def text_of(count: int, held: int, wrong: list[str]) -> str:
  """What `run` found, in lines."""
  return "\n".join(
    [
      *wrong,
      f"{count} damaged files: {count - held - len(wrong)} refused by name,"
      f" {held} read as they were or have nothing that tells, {len(wrong)}"
      " wrong",
    ]
  )


def test_every_damage_is_seen_or_does_no_harm():
  found = run(flips=8, cuts=3)
  print(text_of(*found))
  count, held, wrong = found
  assert not wrong, "\n".join(wrong)
  assert count > 250
  assert held < count / 3  # most damages are seen


@pytest.mark.slow
def test_many_more_damages():
  count, _, wrong = run(seed=1, flips=200, cuts=30)
  assert count > 2500
  assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
  results = run()
  print(text_of(*results))
  sys.exit(int(bool(results[2])))
