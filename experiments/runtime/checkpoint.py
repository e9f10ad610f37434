"""Checkpoints with orbax: state, data iterator and fingerprint in one.

Arrays are written by the processes that hold them, each its own part, and are
read into any shardings: the devices and processes that saved them need not be
here. Before a checkpoint is whole, processes leave checksums of its files in
it; they are compared before anything is read.
"""

import hashlib
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import multihost

from experiments.runtime import checksums, distributed, workdir as workdir_lib
from gradmimic_jax import _files

if TYPE_CHECKING:
  import grain  # slow to import, and most runs need nothing else of it

FOLDER = "checkpoints"


class Checkpointer:
  """Saves and restores a run; a save that was cut off is never seen again.

  A context manager: waits for saves that are under way. If one of several
  processes leaves with an error, it doesn't wait: the others may never come to
  its aid, and such a save is given up.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    keep: int,
    fingerprint: str,
    keep_every: int = 0,
  ):
    """Opens `workdir/checkpoints`, in all processes at once.

    Args:
      workdir: the run's folder.
      keep: number of the newest checkpoints to keep.
      fingerprint: of config and data. An iterator's state may be only an index,
        so a checkpoint of other data would be taken without an error.
      keep_every: also keep the checkpoints of steps that are multiples of it;
        0 keeps none of them.
    """
    self._fingerprint = fingerprint
    folder = pathlib.Path(workdir).absolute() / FOLDER
    self._manager = _Manager(
      folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          barrier_sync_fn=_make_barrier(folder),
          # In the first process, before the folder gets its name.
          post_finalization_callback=lambda: checksums.write_rest(folder),
        ),
      ),
      item_names=("state", "data", "run"),
    )

  def save(self, step: int, state: Any, iterator: "grain.DatasetIterator"):
    """Starts saving; goes on in the background."""
    if step in self._manager.all_steps():
      return
    places = distributed.gather_texts(json.dumps(iterator.get_state()))
    if len(set(places)) == 1:
      places = places[:1]
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({"places": places}),
        run=ocp.args.JsonSave(
          {
            "fingerprint": self._fingerprint,
            "processes": jax.process_count(),
            "devices": jax.device_count(),
          }
        ),
      ),
    )

  def wait(self) -> None:
    """Waits until all saves are on disk; raises their errors."""
    self._manager.wait_until_finished()

  def restore(
    self,
    state: Any,
    iterator: "grain.DatasetIterator",
    limit: int | None = None,
    reason: str = "",
  ) -> Any:
    """Loads the newest state, and sets the iterator; `state` if there is none.

    A checkpoint that is damaged gives way to the one before. Those after the
    one that is taken are removed: their steps are to be made again.

    Args:
      state: a state of the right structure, shapes and shardings.
      iterator: is set to the checkpoint's position.
      limit: the last step that may be taken; None: all may. The same in all
        processes.
      reason: for the limit, a sentence that names a file.

    Returns:
      The state, in the shardings of `state`.

    Raises:
      ValueError: the newest checkpoint belongs to other data or another config,
        or its position in the data is one of another number of processes; or
        there are checkpoints, and none that can be taken.
    """
    # A process may not see yet what another one sees in the folder.
    found = distributed.gather_texts(json.dumps([*self._manager.all_steps()]))
    there = sorted(json.loads(found[0]), reverse=True)
    usable = [step for step in there if limit is None or step <= limit]
    if reason and len(usable) < len(there):
      _say(reason)
    for step in usable:
      restored = self._restore(step, state, iterator, last=step == usable[-1])
      if restored is not None:
        for later in there[: there.index(step)]:
          self._manager.delete(later)
        if step != there[0]:
          _say(f"The run goes on from checkpoint {step}, not {there[0]}.")
        return restored
    if there:
      raise ValueError(
        f"{reason} The oldest checkpoint in {self._manager.directory} is of"
        f" step {there[-1]}. Restore the file from a copy; or delete that"
        " folder, and the same command trains from the start."
      )
    return state

  def _restore(self, step, state, iterator, *, last):
    """Reads the state; None if it is damaged and not the last one to try."""
    folder = pathlib.Path(self._manager.directory) / str(step)
    known = False
    try:
      known = _check(folder, share=True)
      return self._read(step, state, iterator)
    except _OtherRunError:
      raise
    except (ValueError, OSError, KeyError, TypeError) as error:
      # A checkpoint that is as it was saved has another fault. Without
      # checksums the others may have read theirs.
      if known or (
        jax.process_count() > 1 and not isinstance(error, _DamagedError)
      ):
        raise
      what = str(error)
      if not isinstance(error, _DamagedError):
        line = (what.strip().splitlines() or [""])[0]
        what = f"{folder} can't be read ({type(error).__name__}: {line[:200]})"
      if last:
        raise ValueError(
          f"{what}, and there is no checkpoint before it. Restore it from a"
          f" copy; or delete {folder.parent}, and the same command trains from"
          " the start."
        ) from error
      _say(f"{what}.")
      return None

  def _read(self, step, state, iterator):
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        run=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()
      ),
    )
    if found.run["fingerprint"] != self._fingerprint:
      raise _OtherRunError(
        f"checkpoint {step} in {self._manager.directory} was made with other"
        f" data or another config (fingerprint {found.run['fingerprint']},"
        f" expected {self._fingerprint}). Choose another --workdir."
      )
    place = json.loads(self._place(step, found.data["places"]))
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(
          jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        )
      ),
    ).state
    iterator.set_state(place)
    return restored

  def close(self) -> None:
    """Waits for saves that are under way."""
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, error: object, *_: object) -> None:
    if error is None or jax.process_count() == 1:
      self.close()

  def _place(self, step, places):
    """Returns this process's position in the data."""
    if len(places) == 1:
      return places[0]
    if len(places) != jax.process_count():
      raise _OtherRunError(
        f"checkpoint {step} in {self._manager.directory} was made by"
        f" {len(places)} processes, each with shards of its own, and there are"
        f" {jax.process_count()}; expected as many: only data in memory can be"
        " gone on with by another number."
      )
    return places[jax.process_index()]


class _Manager(ocp.CheckpointManager):
  """orbax's manager, which doesn't ask JAX whether the job is to leave.

  JAX counts how often a process asks, and all stop at one more than the highest
  count. `preemption` counts calls. orbax would count steps: after a save at
  step 50,000 the job would leave at its 50,001st call.
  """

  def reached_preemption(self, step: int) -> bool:
    """False: the loop has asked."""
    return False


class _OtherRunError(ValueError):
  """A checkpoint that is whole, and not for this run."""


class _DamagedError(ValueError):
  """A checkpoint whose files are not as they were saved."""


def _say(line):
  if distributed.is_first():
    logging.warning("%s", line)


def _check(folder, *, share):
  """Compares a checkpoint's files with their checksums.

  Args:
    folder: the checkpoint's.
    share: whether all processes are here, each to look at a part.

  Returns:
    True if there are checksums.

  Raises:
    _DamagedError: a file has changed, as some process sees it.
  """
  failure, known = "", False
  try:
    count = jax.process_count() if share else 1
    known = checksums.check(folder, jax.process_index() % count, count)
    if not known:
      _say(f"{folder} has no checksums; it is taken as it is.")
  except (ValueError, OSError) as error:
    failure = str(error)
  texts = distributed.gather_texts(failure) if share else [failure]
  for text in filter(None, texts):
    raise _DamagedError(text)
  return known


def _make_barrier(folder):
  """Makes orbax's barrier, at which a process whose save failed doesn't wait.

  With orbax's own, that process waits for the others, which wait for it to
  write, for twenty minutes.
  """
  wait = multihost.get_barrier_sync_fn()

  def barrier(*, key, timeout_ms):
    failed = sys.exception()
    if failed is not None:
      raise failed
    # A process's own files are whole before it meets the others.
    if "async_write_complete" in key and not distributed.is_first():
      checksums.write_own(folder, jax.process_index())
    wait(key=key, timeout_ms=timeout_ms)

  return barrier


def fingerprint(params: Any) -> str:
  """Computes sixteen hex digits of the leaves' paths, shapes, dtypes and bytes.

  They are computed on the devices, each of which looks at its own part only:
  sums of integers that depend on every value and its position, and come out
  alike however the arrays are divided.
  """
  digest = hashlib.sha256()
  sums = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    digest.update(
      f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype};".encode()
    )
    sums.append(_sums(array))
  digest.update(np.array(jax.device_get(sums), "<u4").tobytes())
  return digest.hexdigest()[:16]


@jax.jit
def _sums(leaf):
  """Computes four sums of 32 bits, with wrap-around."""
  words = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
  size = min(words.dtype.itemsize, 4)
  words = jax.lax.bitcast_convert_type(words, f"uint{8 * size}")
  words = jnp.atleast_1d(words).astype(jnp.uint32)
  position = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position += along * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return tuple(
    jnp.sum(_stirred(words ^ _stirred(position + np.uint32(salt))))
    for salt in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)  # of pi
  )


def _stirred(words):
  """Maps 32 bits one to one, so that every bit depends on every other.

  The last mix of MurmurHash3, by A. Appleby.
  """
  words ^= words >> 16
  words *= np.uint32(0x85EBCA6B)
  words ^= words >> 13
  words *= np.uint32(0xC2B2AE35)
  return words ^ (words >> 16)


def steps(workdir: pathlib.Path) -> list[int]:
  """Lists the steps that a run has checkpoints of, ascending.

  Args:
    workdir: the run's folder.

  Returns:
    The steps; none if there is no checkpoint.
  """
  folder = pathlib.Path(workdir).absolute() / FOLDER
  if not folder.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(folder))


def load_params(
  workdir: pathlib.Path,
  like: Any,
  *,
  step: int | None = None,
  averaged: bool = True,
) -> Any:
  """Loads the parameters of a finished run.

  Args:
    workdir: the run's folder.
    like: a parameter tree of the structure, shapes and shardings that are
      expected. Every device reads its own part only.
    step: the step of the checkpoint; None is the newest.
    averaged: whether to take the average over the steps, which the run was
      evaluated by, where it kept one; False takes the step's own.

  Returns:
    The checkpoint's parameters.

  Raises:
    FileNotFoundError: there is no checkpoint in that folder, or not that one.
    ValueError: the checkpoint's parameters have other paths or shapes, or are
      not finite.
  """
  return _load(workdir, like, step, averaged, ("params",))


def load_statistics(
  workdir: pathlib.Path,
  like: Any,
  *,
  step: int | None = None,
  averaged: bool = True,
) -> Any:
  """Loads what a finished run's model carries besides its parameters.

  Args:
    workdir: the run's folder.
    like: as `load_params` takes it; `()`: there is nothing.
    step: the step of the checkpoint; None is the newest.
    averaged: as in `load_params`.

  Returns:
    The checkpoint's statistics.

  Raises:
    FileNotFoundError, ValueError: as `load_params`.
  """
  if like == ():
    return ()
  return _load(workdir, like, step, averaged, ("model_state", "statistics"))


def _load(workdir, like, step, averaged, names):
  """Loads the part of a run's state that these names lead to."""
  folder = pathlib.Path(workdir).absolute() / FOLDER
  if not folder.is_dir():
    raise FileNotFoundError(
      f"no {FOLDER} in {workdir}: the reference must be the workdir of a"
      " finished run (python -m experiments.train)."
    )
  there = steps(workdir)
  if not there:
    raise FileNotFoundError(f"no finished checkpoint in {folder}.")
  step = there[-1] if step is None else step
  if step not in there:
    raise FileNotFoundError(
      f"no checkpoint of step {step} in {folder}; there are those of steps"
      f" {there}."
    )
  everywhere = any(
    _is_shared(leaf)
    for leaf in jax.tree.leaves(like)
    if isinstance(leaf, jax.Array)
  )
  _check(folder / str(step), share=everywhere)
  _check_owner(pathlib.Path(workdir), folder / str(step))
  path = epath.Path(folder / str(step) / "state")
  try:
    return _read(path, like, workdir, averaged, names)
  except (ValueError, TypeError) as error:
    with _files.named(path):  # not all of orbax's errors say where
      raise error


def _check_owner(workdir, folder):
  """Raises ValueError if a checkpoint is not that of the finished run."""
  result, about = workdir / workdir_lib.RESULT_FILE, folder / "run" / "metadata"
  if not (result.is_file() and about.is_file()):
    return
  theirs = workdir_lib.read_json(result, {}).get("fingerprint")
  found = workdir_lib.read_json(about, {}).get("fingerprint")
  if theirs is not None and found != theirs:
    raise ValueError(
      f"{folder} is of another run: its fingerprint is {found!r}, and that in"
      f" {result} is {theirs!r}. Restore the one that doesn't belong there."
    )


def _read(path, like, workdir, averaged, names):
  """Reads a part of a checkpoint in containers and shardings like `like`.

  orbax turns integer keys to text.
  """
  handler = ocp.PyTreeCheckpointHandler()
  stored = handler.metadata(path).tree
  if averaged and stored.get("average"):
    names = ("average", names[-1])
  for name in names:
    # A model of another kind has none of that.
    stored = stored.get(name, {}) if isinstance(stored, dict) else {}
  flat, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {_name(place): leaf for place, leaf in flat}
  theirs, their_structure = jax.tree_util.tree_flatten_with_path(stored)
  paths = [_name(place) for place, _ in theirs]
  odd = sorted(wanted.keys() ^ set(paths))
  if odd:
    raise ValueError(
      f"the checkpoint in {workdir} is of another architecture: parameters"
      f" {', '.join(odd[:8])} are in one of the two only."
    )
  for name, (_, leaf) in zip(paths, theirs, strict=True):
    if tuple(leaf.shape) != np.shape(wanted[name]):
      raise ValueError(
        f"the checkpoint in {workdir} is of another architecture: {name} has"
        f" shape {tuple(leaf.shape)} there, expected"
        f" {np.shape(wanted[name])}."
      )
  hows = jax.tree.unflatten(
    their_structure, [_how(wanted[name]) for name in paths]
  )
  for name in reversed(names):
    stored, hows = {name: stored}, {name: hows}
  found = handler.restore(
    path,
    args=ocp.args.PyTreeRestore(
      item=stored, restore_args=hows, partial_restore=True
    ),
  )
  for name in names:
    found = found[name]
  leaves = dict(
    zip(paths, map(jnp.asarray, jax.tree.leaves(found)), strict=True)
  )
  sound = jax.device_get({name: _is_finite(x) for name, x in leaves.items()})
  for place, _ in flat:
    if not sound[_name(place)]:
      raise ValueError(
        f"parameter {_name(place)} in {workdir} is not finite: that run has"
        " diverged."
      )
  return jax.tree.unflatten(
    structure, [leaves[_name(place)] for place, _ in flat]
  )


def _is_shared(leaf):
  """True if several processes have a part of an array."""
  return len({device.process_index for device in leaf.sharding.device_set}) > 1


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _how(leaf):
  """Tells orbax how to read an array that goes where this one is."""
  to = getattr(leaf, "sharding", None)
  if to is None or len(to.device_set) == 1:
    # To the default device, and free to go to others.
    return ocp.RestoreArgs(restore_type=np.ndarray)
  return ocp.ArrayRestoreArgs(sharding=to, global_shape=leaf.shape)


@jax.jit
def _is_finite(leaf):
  return jnp.all(jnp.isfinite(leaf))
