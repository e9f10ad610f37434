"""Models that are no part of this project: `package.module:Class`.

The class is a Flax module of the user's own, in a file that Python finds by
PYTHONPATH, and nothing of it is known here but its name. One that is made by
NNX:

  class Net(nnx.Module):
    def __init__(self, *, num_classes, input_shape, rngs, width=64): ...
    def __call__(self, images): ...  # [B, H, W, C] -> logits [B, num_classes]

or by Linen:

  class Net(nn.Module):
    num_classes: int
    width: int = 64
    @nn.compact
    def __call__(self, images, train): ...

`num_classes` is always given, and `rngs` to NNX; `input_shape` (of one image)
and `dtype` (`config.model.dtype`) where the constructor takes them; everything
else comes from `config.model.options`. NNX modules are told their mode by
`train()` and `eval()`, as Flax has it, and Linen modules by `train`, if their
call has that parameter. Where weights are loaded, and for linear probing, the
last layer must be an attribute or submodule `head`; for probing a method
`features`, called like the module, gives its input.
"""

import ast
import hashlib
import importlib
import inspect
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from experiments.models import apply as apply_lib, transformer


def is_outside(name: str) -> bool:
  """True if `config.model.name` names a class of the user's own."""
  return ":" in name


def create(
  config: config_dict.ConfigDict,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  seed: int,
  method: str = "__call__",
) -> tuple[apply_lib.Apply, dict[str, Any]]:
  """Makes a user's model a pure function and a plain parameter tree.

  Args:
    config: `config.model`: `name`, `options` and `dtype`.
    input_shape: of one image.
    num_classes: width of the output.
    seed: of the initialisation.
    method: of the module, that maps images to the function's output.

  Returns:
    The function and its parameters.

  Raises:
    ImportError: the class can't be imported.
    TypeError: it is no Flax module, or its constructor has another signature.
    ValueError: it fails, or gives anything but logits `[B, num_classes]`.
  """
  name, cls = config.name, load_class(config.name)
  is_nnx = issubclass(cls, nnx.Module)
  given: dict[str, Any] = {"num_classes": num_classes}
  dtype = transformer.activations(config)
  takes = _parameters(cls)
  if is_nnx:
    given["rngs"] = nnx.Rngs(seed)
  if "input_shape" in takes:
    given["input_shape"] = tuple(input_shape)
  if "dtype" in takes:
    given["dtype"] = None if dtype is None else jnp.dtype(dtype)
  elif dtype is not None:
    raise TypeError(
      f"config.model.dtype is {dtype!r}, and the constructor of {name} has no"
      " parameter dtype; expected one, or config.model.dtype=None."
    )
  given |= parse_options(config.get("options", ""), taken=given)
  _check_signature(name, cls, given)
  images = jnp.zeros((2, *input_shape), jnp.float32)
  with _Explained(f"{name}, made with {_shown(given)},"):
    if not hasattr(cls, method):
      raise TypeError(
        f"it has no method {method}; expected one that gives the input of its"
        " layer head"
      )
    module = cls(**given)
    if is_nnx:
      apply, params = apply_lib.from_nnx(module, name, method)
    else:
      apply, params = _from_linen(name, module, images, seed, method)
  _check_params(name, params)
  if method == "__call__":
    _check_output(name, apply, params, images, num_classes)
  return apply, params


def load_class(name: str) -> type:
  """Imports the class that `config.model.name` names.

  Args:
    name: "package.module:Class".

  Returns:
    The class, of Flax NNX or Linen.

  Raises:
    ImportError: there is no such module or class, or importing it fails.
    TypeError: it is no class of Flax modules.
  """
  where, _, attribute = name.partition(":")
  shown = f"config.model.name is {name!r}"
  try:
    module = importlib.import_module(where)
  except Exception as error:
    if (
      isinstance(error, ModuleNotFoundError)
      and error.name
      and (where == error.name or where.startswith(f"{error.name}."))
    ):
      raise ImportError(
        f"{shown}, and Python finds no module {error.name!r}; expected its"
        " file in the working directory, or its folder in PYTHONPATH."
      ) from error
    raise ImportError(
      f"{shown}, and importing {where} fails: {_in_one_line(error)}"
    ) from error
  found = getattr(module, attribute, None)
  if found is None:
    classes = [key for key, value in vars(module).items() if _is_flax(value)]
    raise ImportError(
      f"{shown}, and {where} has no {attribute!r}; its Flax modules are"
      f" {', '.join(classes) or 'none'}."
    )
  if not _is_flax(found):
    raise TypeError(
      f"{shown}, which is {found!r:.80}; expected a class that derives from"
      " flax.nnx.Module or flax.linen.Module."
    )
  return found


def fingerprint(name: str) -> str:
  """Computes sixteen hex digits of the file that a user's class stands in.

  Args:
    name: as `load_class` takes it.

  Returns:
    Of the file's bytes: comments count, and modules that it imports don't.
  """
  file = pathlib.Path(inspect.getfile(load_class(name)))
  return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def parse_options(text: str, taken: Any = ()) -> dict[str, Any]:
  """Reads `config.model.options`.

  Args:
    text: arguments as they stand in a call, "width=64, activation='gelu'".
    taken: names that are given otherwise.

  Returns:
    The arguments by name.

  Raises:
    ValueError: that is no list of names and literal values.

  Example:
    >>> parse_options("width=64, stages=(2, 2), activation='gelu'")
    {'width': 64, 'stages': (2, 2), 'activation': 'gelu'}
  """
  try:
    call: Any = ast.parse(f"f({text})", mode="eval").body
    names = [keyword.arg for keyword in call.keywords]
    if call.args or None in names:
      raise ValueError("a value has no name")
    found = {
      keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
    }
  except (ValueError, SyntaxError, AttributeError) as error:
    raise ValueError(
      f"config.model.options is {text!r}, which can't be read"
      f" ({_in_one_line(error)}); expected names and plain values, such as"
      " \"width=64, activation='gelu'\"."
    ) from error
  twice = sorted(set(found) & set(taken))
  if twice:
    raise ValueError(
      f"config.model.options has {', '.join(twice)}, which the run gives; leave"
      " that out."
    )
  return found


def _is_flax(value):
  if not inspect.isclass(value):
    return False
  from flax import linen  # takes a second, and few need it

  return issubclass(value, nnx.Module | linen.Module)


def _parameters(cls):
  """The constructor's; the signature of NNX classes is their metaclass's."""
  found = dict(inspect.signature(cls.__init__).parameters)
  found.pop(next(iter(found)))  # self
  return found


def _check_signature(name, cls, given):
  """Raises TypeError unless the constructor takes these arguments."""
  takes = _parameters(cls)
  anything = any(p.kind == p.VAR_KEYWORD for p in takes.values())
  named = {
    name: p
    for name, p in takes.items()
    if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
  }
  missing = [
    name
    for name, p in named.items()
    if p.default is p.empty and name not in given
  ]
  unknown = [] if anything else [key for key in given if key not in named]
  problems = []
  if missing:
    problems.append(f"asks for {', '.join(missing)}, which nothing gives")
  if unknown:
    problems.append(f"doesn't take {', '.join(unknown)}")
  if not problems:
    return
  fixed = "num_classes" + (", rngs" if issubclass(cls, nnx.Module) else "")
  raise TypeError(
    f"the constructor of {name} {' and '.join(problems)}; expected {fixed} (and"
    " input_shape and dtype, if it has them), and the others from"
    ' config.model.options, such as "width=64".'
  )


def _from_linen(name, module, images, seed, method):
  def has_mode(method):
    return (
      "train" in inspect.signature(getattr(type(module), method)).parameters
    )

  mode = {"train": False} if has_mode("__call__") else {}
  variables = module.init({"params": jax.random.key(seed)}, images, **mode)
  apply, params = apply_lib.from_linen(
    module, variables, name, method, has_mode=has_mode(method)
  )
  if apply.statistics != () and not has_mode(method):
    raise TypeError(
      f"it has {apply.about}, and its call no parameter train; expected one,"
      " for use_running_average=not train"
    )
  return apply, params


def _check_params(name, params):
  odd = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if not jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  if odd or not jax.tree.leaves(params):
    what = f"parameter {odd[0][0]} has dtype {odd[0][1]}" if odd else "has none"
    raise ValueError(
      f"of the parameters of {name}: {what}; expected floating-point arrays."
      " Counters and the like belong into variables of another kind."
    )


def _check_output(name, apply, params, images, num_classes):
  """Raises ValueError unless both modes give logits, without computing."""
  keys = jax.random.split(jax.random.key(0), len(images))
  calls = [lambda: apply(params, images, apply.statistics)]
  if apply.trains:
    calls.append(lambda: apply.train(params, images, keys, apply.statistics)[0])
  for number, call in enumerate(calls):
    mode = "training" if number else "evaluation"
    with _Explained(f"{name}, called for {mode} on images {images.shape},"):
      found = jax.eval_shape(call)
    if getattr(found, "shape", None) != (len(images), num_classes):
      raise ValueError(
        f"{name} maps images {images.shape} to"
        f" {getattr(found, 'shape', type(found).__name__)} in {mode}; expected"
        f" logits {(len(images), num_classes)}, one row a sample and"
        " num_classes wide."
      )


class _Explained:
  """Rewords any error of a user's code as one line that names the class."""

  def __init__(self, what):
    self._what = what

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if isinstance(error, Exception):
      raise ValueError(f"{self._what} fails: {_in_one_line(error)}") from error


def _in_one_line(error):
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


def _shown(given):
  return ", ".join(
    f"{key}={'...' if key == 'rngs' else repr(value)}"
    for key, value in given.items()
  )
