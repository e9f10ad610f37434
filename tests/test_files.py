"""Reading within bounds, errors with a name, and files that are replaced."""

import errno
import os
import stat

import numpy as np
import pytest

from gradmimic_jax import _files


@pytest.mark.parametrize(
  ("error", "kind", "message"),
  [
    (
      KeyError("step"),
      ValueError,
      "a.x is damaged or no toy (KeyError: 'step')",
    ),
    (MemoryError(), ValueError, "a.x is damaged or no toy (MemoryError)"),
    (EOFError("x\ny"), ValueError, "a.x is damaged or no toy (EOFError: x y)"),
    (RecursionError("deep"), ValueError, "(RecursionError: deep)"),
    (
      ValueError("odd."),
      ValueError,
      "a.x is damaged or no toy (odd). Mend it.",
    ),
    (ValueError("in a.x: odd"), ValueError, "in a.x: odd"),
    (TypeError("in a.x: odd"), ValueError, "in a.x: odd"),
    (
      ValueError("in a.x:\nodd"),
      ValueError,
      "a.x is damaged or no toy (in a.x",
    ),
    (OSError("corrupt"), ValueError, "a.x is damaged or no toy (OSError: corr"),
    (ValueError("x" * 999), ValueError, "x" * 199 + "…)"),
    (ImportError("no module"), ImportError, "no module"),
    (KeyboardInterrupt(), KeyboardInterrupt, ""),
  ],
)
def test_errors_get_the_files_name(error, kind, message):
  with (
    pytest.raises(kind) as caught,
    _files.named("a.x", "toy", "Mend it."),
  ):
    raise error
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_what_the_system_refuses_keeps_its_kind(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"a\.json") as caught:
    _files.read_json(tmp_path / "a.json")
  assert caught.value.errno == errno.ENOENT
  full = OSError(errno.ENOSPC, "No space left on device")
  with (
    pytest.raises(OSError, match=r"No space left.*a\.x") as caught,
    _files.named("a.x"),
  ):
    raise full
  assert caught.value.errno == errno.ENOSPC
  with pytest.raises(ValueError, match="no file, but a folder"):
    _files.read_bytes(tmp_path)
  os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
  with pytest.raises(ValueError, match=r"pipe is no file"):
    _files.read_bytes(tmp_path / "pipe")


@pytest.mark.parametrize("seed", range(40))
def test_arrays_are_read_as_numpy_reads_them(tmp_path, seed):
  rng = np.random.default_rng(seed)
  shape = tuple(rng.integers(0, 4, rng.integers(0, 4)).tolist())
  dtype = rng.choice(["<i8", ">i4", "u1", "<f4", "?", "<U3", ">U2", "S2"])
  array = rng.integers(0, 99, shape).astype(dtype)
  if seed % 5 == 0:
    array = rng.integers(0, 99, (*shape, 2)).astype("<u8").view("<u8,<u8")
  if seed % 2:
    array = np.asfortranarray(array)
  path = tmp_path / "a.npy"
  np.save(path, array)
  got = _files.read_npy(path)
  assert (got.dtype, got.shape) == (array.dtype, array.shape)
  np.testing.assert_array_equal(got, np.load(path, allow_pickle=False))
  assert got.flags.writeable
  # What is too short or too long is no array, wherever it is cut.
  content = path.read_bytes()
  for wrong in (content[:-1], content + b"x", content[: len(content) // 2]):
    with pytest.raises(ValueError, match=r"a\.npy is damaged or no NumPy"):
      _files.parse_npy(wrong, path)


def test_a_file_is_replaced_whole(tmp_path):
  path = tmp_path / "a.bin"
  _files.write_bytes(path, b"before")
  assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
  with pytest.raises(TypeError), _files.replacing(path) as file:
    file.writelines([b"half", 5])
  assert path.read_bytes() == b"before"
  with _files.replacing(path) as file:
    file.write(b"after")
    file.flush()
    assert path.read_bytes() == b"before"
    # Another writer has a name of its own.
    _files.write_bytes(path, b"other")
    assert path.read_bytes() == b"other"
  assert path.read_bytes() == b"after"
  assert os.listdir(tmp_path) == ["a.bin"]


def test_a_link_is_replaced_not_followed(tmp_path):
  victim, path = tmp_path / "victim", tmp_path / "a.bin"
  victim.write_bytes(b"precious")
  path.symlink_to(victim)
  _files.write_bytes(path, b"new")
  assert victim.read_bytes() == b"precious"
  assert path.read_bytes() == b"new"
  assert not path.is_symlink()


def test_long_names(tmp_path):
  path = tmp_path / ("x" * 250 + ".npy")
  _files.write_bytes(path, b"new")
  assert path.read_bytes() == b"new"


def _umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask
