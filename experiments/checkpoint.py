"""Checkpoints with orbax: state, data iterator and fingerprint in one."""

import hashlib
import pathlib
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

FOLDER = "checkpoints"


class Checkpointer:
  """Saves and restores a run; a save that was cut off is never seen again."""

  def __init__(self, workdir: pathlib.Path, *, keep: int, fingerprint: str):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints to keep.
      fingerprint: of config and data. grain's iterator state is only an index,
        so a checkpoint of other data would be taken without an error.
    """
    self._fingerprint = fingerprint
    self._manager = ocp.CheckpointManager(
      pathlib.Path(workdir).absolute() / FOLDER,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      ),
      item_names=("state", "data", "run"),
    )

  def save(self, step: int, state: Any, iterator: grain.DatasetIterator):
    """Starts saving; goes on in the background."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(iterator),
        run=ocp.args.JsonSave({"fingerprint": self._fingerprint}),
      ),
    )

  def restore(self, state: Any, iterator: grain.DatasetIterator) -> Any:
    """The newest state, with the iterator set to it; `state` if there is none.

    Args:
      state: a state of the right structure and shapes.
      iterator: is set to the checkpoint's position.

    Returns:
      The state.

    Raises:
      ValueError: the newest checkpoint belongs to other data or another config.
    """
    step = self._manager.latest_step()
    if step is None:
      return state
    run = self._manager.restore(
      step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
    ).run
    if run["fingerprint"] != self._fingerprint:
      raise ValueError(
        f"checkpoint {step} in {self._manager.directory} was made with other"
        f" data or another config (fingerprint {run['fingerprint']}, expected"
        f" {self._fingerprint}). Choose another --workdir."
      )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(
          jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        ),
        data=grain.checkpoint.CheckpointRestore(iterator),
      ),
    )
    return restored.state

  def close(self) -> None:
    """Waits for saves that are under way."""
    self._manager.close()


def fingerprint(params: Any) -> str:
  """Sixteen hex digits of the leaves' bytes."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps that a run has checkpoints of, ascending.

  Args:
    workdir: the run's folder.

  Returns:
    The steps; none if there is no checkpoint.
  """
  folder = pathlib.Path(workdir).absolute() / FOLDER
  if not folder.is_dir():
    return []
  with ocp.CheckpointManager(folder, item_names=("state",)) as manager:
    return sorted(manager.all_steps())


def load_params(
  workdir: pathlib.Path, like: Any, *, step: int | None = None
) -> Any:
  """The parameters of a finished run.

  Args:
    workdir: the run's folder.
    like: a parameter tree of the structure and shapes that are expected.
    step: whose checkpoint; None is the newest.

  Returns:
    The checkpoint's parameters.

  Raises:
    FileNotFoundError: there is no checkpoint in that folder, or not that one.
    ValueError: the checkpoint's parameters have other paths or shapes, or are
      not finite.
  """
  folder = pathlib.Path(workdir).absolute() / FOLDER
  if not folder.is_dir():
    raise FileNotFoundError(
      f"no {FOLDER} in {workdir}: the reference must be the workdir of a"
      " finished run (python -m experiments.train)."
    )
  with ocp.CheckpointManager(folder, item_names=("state",)) as manager:
    steps = manager.all_steps()
    if not steps:
      raise FileNotFoundError(f"no finished checkpoint in {folder}.")
    step = max(steps) if step is None else step
    if step not in steps:
      raise FileNotFoundError(
        f"no checkpoint of step {step} in {folder}; there are those of steps"
        f" {sorted(steps)}."
      )
  return jax.device_put(_as_tree_of(like, _read(folder, step), workdir))


def _read(folder, step):
  """A checkpoint's parameters as NumPy arrays.

  The devices that they were saved from need not be here.
  """
  handler = ocp.PyTreeCheckpointHandler()
  path = epath.Path(folder / str(step) / "state")
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  wanted = jax.tree.map(lambda _: as_numpy, handler.metadata(path).tree)
  args = ocp.args.PyTreeRestore(restore_args=wanted)
  return handler.restore(path, args=args)["params"]


def _as_tree_of(like, stored, workdir):
  """`stored` in the containers of `like`: orbax turns integer keys to text."""
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(stored)
  }
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
  ]
  odd = sorted(set(names) ^ set(flat))
  if odd:
    raise ValueError(
      f"the checkpoint in {workdir} is of another architecture: parameters"
      f" {', '.join(odd[:8])} are in one of the two only."
    )
  for name, (_, leaf) in zip(names, paths, strict=True):
    if np.shape(flat[name]) != np.shape(leaf):
      raise ValueError(
        f"the checkpoint in {workdir} is of another architecture: {name} has"
        f" shape {np.shape(flat[name])} there, expected {np.shape(leaf)}."
      )
  for name in names:
    if not np.all(np.isfinite(flat[name])):
      raise ValueError(
        f"parameter {name} in {workdir} is not finite: that run has diverged."
      )
  return structure.unflatten([flat[name] for name in names])
