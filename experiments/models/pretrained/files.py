"""Files of published weights: finding and reading them, fitting them in."""

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from experiments.data.pairs import limits as limits_lib

HUB = "hf://"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"


def find(
  source: str | pathlib.Path,
  names: Sequence[str] = (WEIGHTS,),
  beside: Sequence[str] = (CONFIG, PREPROCESSOR),
) -> pathlib.Path:
  """The file that `source` means.

  Args:
    source: a safetensors file, a folder with one of the names, or
      `"hf://owner/name"` (`"hf://owner/name@revision"`), which alone is
      fetched, or taken from the cache, with huggingface_hub.
    names: what such a file is called, the likeliest first.
    beside: small files to fetch with it where there are any.

  Returns:
    The path of the `.safetensors` file; one of the hub's is fetched first.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.
  """
  if str(source).startswith(HUB):
    return _fetch(str(source).removeprefix(HUB), names, beside)
  path = pathlib.Path(source)
  for file in [path / name for name in names] if path.is_dir() else [path]:
    if file.is_file():
      return file
  if path.is_dir():
    there = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
      f"no {' or '.join(names)} in {path} (there is {there}); name a"
      " .safetensors file, or a folder with a file of that name."
    )
  raise FileNotFoundError(
    f"no file or folder {path}; to fetch weights from the Hugging Face Hub,"
    f' write "{HUB}owner/name".'
  )


def _fetch(name, names, beside):
  """The weights in the hub's cache, with the small files beside them."""
  try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
  except ImportError as error:
    raise ImportError(
      f"{HUB}{name} needs huggingface_hub: `pip install huggingface_hub`, or"
      f" download {names[0]} yourself and name the file."
    ) from error
  name, _, revision = name.partition("@")
  options = {"repo_id": name, "revision": revision or None}
  try:
    for other in names[:-1]:
      with contextlib.suppress(EntryNotFoundError):
        file = hf_hub_download(filename=other, **options)
        break
    else:
      file = hf_hub_download(filename=names[-1], **options)
    for optional in beside:
      with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(filename=optional, **options)
  except Exception as error:  # whatever its versions and their clients raise
    raise OSError(
      f"{' or '.join(names)} of {HUB}{name} can't be fetched: {error} Check the"
      " name and the connection, or download the file yourself and name it."
    ) from error
  return pathlib.Path(file)


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Name to array; raises ValueError where it is no safetensors file."""
  with _opened(file) as content:
    return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def shapes(file: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Name to shape, without reading more; raises ValueError as `read`."""
  with _opened(file) as content:
    return {
      name: tuple(content.get_slice(name).get_shape())
      for name in content.keys()  # noqa: SIM118
    }


@contextlib.contextmanager
def _opened(file):
  """A safetensors file whose header is of a size that can be believed."""
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
  # What NumPy has no dtype for raises others than the library's own.
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
  """What a JSON file beside the weights says; None if there is none."""
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
  """Says of which weights the fields are that can't be understood."""
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


def leaves_of(like: Any) -> dict[str, Any]:
  """A parameter tree's leaves by their "/"-joined paths."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(like)
  }


def fill(
  like: Any, arrays: Mapping[str, np.ndarray | jax.Array], file: pathlib.Path
) -> Any:
  """A tree like `like`, with its dtypes and shardings, of arrays by path.

  A leaf of `like` itself stays as it is. Raises ValueError where an array is
  not finite.
  """
  for name, array in arrays.items():
    if isinstance(array, jax.Array):
      continue
    if not np.isfinite(array.astype(np.float32)).all():
      raise ValueError(f"{name} in {file} is not finite: the file is damaged.")
  return jax.tree.unflatten(
    jax.tree.structure(like),
    [_placed(arrays[name], leaf) for name, leaf in leaves_of(like).items()],
  )


def _placed(array, leaf):
  """The array on the devices of `leaf`, each of which gets its own part."""
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

  Args:
    arrays: by path.
    expected: the model's leaves by path.
    file: whose they are.
    advice: what to do about others.
    but_tokens: paths whose last axis but one may differ.
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
  """The first few of many, for an error's text."""
  shown = separator.join(names[:6]) or "nothing"
  return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
