"""Files of published weights: reading them, fitting them in."""

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from experiments.runtime import limits as limits_lib


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads arrays by name; raises ValueError if it is no safetensors file."""
  with _opened(file) as content:
    return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def shapes(file: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Reads shapes by name, without the arrays; raises ValueError as `read`."""
  with _opened(file) as content:
    return {
      name: tuple(content.get_slice(name).get_shape())
      for name in content.keys()  # noqa: SIM118
    }


@contextlib.contextmanager
def _opened(file):
  """Opens a safetensors file whose header is of a believable size."""
  with open(file, "rb") as start:
    length = int.from_bytes(start.read(8), "little")
  try:
    if length > limits_lib.DEFAULT.weights_header:
      raise ValueError(
        f"its header claims {length} bytes; the limit is"
        f" {limits_lib.DEFAULT.weights_header}"
      )
    with safetensors.safe_open(file, framework="numpy") as content:
      yield content
  # Dtypes that NumPy lacks raise other errors than the library's own.
  except (
    safetensors.SafetensorError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
  ) as error:
    raise ValueError(
      f"{file} can't be read as safetensors ({error}); pickled weights (.bin,"
      " .pth) are never read: convert them with safetensors.torch.save_file."
    ) from error


def beside(file: pathlib.Path, name: str) -> dict[str, Any] | None:
  """Reads a JSON file beside the weights; None if there is none."""
  path = file.with_name(name)
  if not path.is_file():
    return None
  most = limits_lib.DEFAULT.config_bytes
  try:
    with open(path, "rb") as content:
      found = limits_lib.parse_json(content.read(most + 1), most=most)
  except ValueError as error:
    raise ValueError(f"{path} is damaged: {error}.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds no fields but {type(found).__name__}.")
  return found


@contextlib.contextmanager
def about(file: pathlib.Path, what: str) -> Iterator[None]:
  """Names the weights in errors about fields that can't be understood."""
  try:
    yield
  except (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    ArithmeticError,
  ) as error:
    raise ValueError(
      f"what is said beside {file} about {what} can't be read:"
      f" {type(error).__name__}: {error}."
    ) from error


def list_leaves(like: Any) -> dict[str, Any]:
  """Lists a parameter tree's leaves by their "/"-joined paths."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(like)
  }


def fill(
  like: Any, arrays: Mapping[str, np.ndarray | jax.Array], file: pathlib.Path
) -> Any:
  """Makes a tree like `like`, with its dtypes and shardings, of arrays by path.

  Leaves of `like` among the arrays stay as they are. Raises ValueError where an
  array is not finite.
  """
  for name, array in arrays.items():
    if isinstance(array, jax.Array):
      continue
    if not np.isfinite(array.astype(np.float32)).all():
      raise ValueError(f"{name} in {file} is not finite: the file is damaged.")
  return jax.tree.unflatten(
    jax.tree.structure(like),
    [_placed(arrays[name], leaf) for name, leaf in list_leaves(like).items()],
  )


def _placed(array, leaf):
  """Puts the array on the devices of `leaf`, each of which gets its part."""
  if array is leaf:
    return leaf
  to = getattr(leaf, "sharding", None)
  if to is None or len(to.device_set) == 1:
    # To the default device, and free to go to others.
    return jnp.asarray(array, leaf.dtype)
  return jax.make_array_from_callback(
    leaf.shape,
    to,
    lambda at: np.asarray(array[at], leaf.dtype),
  )


def keep_head(
  arrays: dict[str, np.ndarray], expected: Mapping[str, Any]
) -> str | None:
  """Puts the model's own head in place of one that doesn't fit.

  Args:
    arrays: by path; gets the leaves of the head.
    expected: the model's leaves by path.

  Returns:
    A sentence about it, without its subject; None if the file's head fits.
  """
  head = {
    name: leaf for name, leaf in expected.items() if name.startswith("head/")
  }
  if all(
    name in arrays and arrays[name].shape == x.shape for name, x in head.items()
  ):
    return None
  theirs = "no head"
  if "head/bias" in arrays:
    theirs = f"a head for {len(arrays['head/bias'])} classes"
  arrays.update(head)
  return (
    f"has {theirs}: the head for {len(head['head/bias'])} classes stays at its"
    " initialisation."
  )


def check_names(
  arrays: Mapping[str, np.ndarray],
  unknown: Collection[str],
  expected: Mapping[str, Any],
  file: pathlib.Path,
  advice: str,
) -> None:
  """Raises ValueError unless the file has the model's leaves and no others."""
  missing = sorted(expected.keys() - arrays.keys())
  surplus = sorted([*(arrays.keys() - expected.keys()), *unknown])
  if missing or surplus:
    raise ValueError(
      f"{file} is of another architecture than the model:"
      f" it lacks {some(missing)}, and has {some(surplus)}, which the model"
      f" has no place for. {advice}"
    )


def check_shapes(
  arrays: Mapping[str, np.ndarray],
  expected: Mapping[str, Any],
  file: pathlib.Path,
  advice: str,
  *,
  but_tokens: Collection[str] = (),
) -> None:
  """Raises ValueError unless the file's arrays have the model's shapes.

  Those at `but_tokens` may differ in their last axis but one.
  """
  wrong = []
  for name, leaf in expected.items():
    theirs, ours = np.shape(arrays[name]), np.shape(leaf)
    if name in but_tokens and len(theirs) == len(ours):
      theirs, ours = (x[:-2] + x[-1:] for x in (theirs, ours))
    if theirs != ours:
      wrong.append(
        f"{name} has shape {arrays[name].shape}, expected {leaf.shape}"
      )
  if wrong:
    raise ValueError(
      f"{file} is of another architecture than the model: {some(wrong, '; ')}."
      f" {advice}"
    )


def some(names: Sequence[str], separator: str = ", ") -> str:
  """Lists the first few of many, for an error's text."""
  shown = separator.join(names[:6]) or "nothing"
  return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
