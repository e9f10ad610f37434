"""Published weights of a kind of model: read, understood, fitted in."""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments.models.pretrained import (
  architectures,
  files as weight_files,
  layouts,
  positions,
)
from experiments.models.pretrained.architectures import Told
from experiments.models.pretrained.preprocessing import Preprocessing
from experiments.runtime import hub

SIZE = "pretrained"  # `config.model.size` that takes all from the file


class Weights(NamedTuple):
  """A file's weights under this project's names, and what is said of them."""

  file: pathlib.Path
  library: str  # which named them
  arrays: dict[str, np.ndarray]
  unknown: list[str]  # names that have no place here
  shown: dict[str, Any]  # fields of the config that shapes show
  told: dict[str, Told]  # by the name of the file beside

  @property
  def said(self) -> dict[str, Any]:
    """All fields that files beside the weights state."""
    found: dict[str, Any] = {}
    for told in self.told.values():
      found |= {**dict(told.again), **told.fields}
    return found


class Family:
  """A kind of model with published weights; subclasses say which."""

  section: ClassVar[str]  # of `config.model`, with the model's fields
  noun: ClassVar[str]  # the model in an error's text
  layouts: ClassVar[Mapping[str, layouts.Layout]]  # by the names of libraries
  names: ClassVar[tuple[str, ...]] = (hub.WEIGHTS,)  # the likeliest first
  # By the name of a file beside weights: what reads the model's fields, and
  # what reads its images' preparation (None: it isn't told).
  readers: ClassVar[Mapping[str, Callable[[Any], Told]]]
  preparations: ClassVar[Mapping[str, Callable[[Any], Preprocessing | None]]]
  tower: ClassVar[str] = ""  # begins the paths of the image transformer
  tokens: ClassVar[tuple[str, ...]]  # paths whose number of rows may differ
  untold: ClassVar[Mapping[str, str]]  # fields not in shapes; and in words
  instead: ClassVar[str]  # what else to set where those aren't told
  taken: ClassVar[tuple[str, ...]]  # fields not in shapes that are filled in
  keeps_given: ClassVar[bool] = False  # fields that are set stay as they are

  def load(
    self,
    source: str | pathlib.Path,
    like: Any,
    *,
    input_shape: tuple[int, ...],
    options: Mapping[str, Any] | None = None,
  ) -> Any:
    """Loads published weights as the parameters of this project's model.

    Position embeddings of another grid are interpolated as the library that
    wrote the file does it; the file's grid is that of the images that a file
    beside it speaks of, else a square one, else the model's own if it has as
    many patches.

    Args:
      source: a safetensors file, a folder with one of `names`, or
        `"hf://owner/name"` (`"hf://owner/name@revision"`), which alone is
        fetched, or taken from the cache, with huggingface_hub.
      like: the new model's parameters.
      input_shape: of one image, `(H, W, C)`.
      options: the model's fields. Shapes don't tell the number of heads, the
        activation and the norms' epsilon: a file beside the weights decides,
        and a log line says where none does.

    Returns:
      A tree like `like`, with its dtypes and shardings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is of another layout or model, or not finite; every
        difference between the model and the files beside it is named.
      ImportError: a hub's name, without huggingface_hub.
      OSError: the hub can't give the file.
    """
    channels = input_shape[-1]
    weights = self._read(source, weight_files.read, channels)
    file, arrays = weights.file, weights.arrays
    expected = weight_files.list_leaves(like)
    self._check_told(weights, expected, options or {}, channels)
    note = self._adapt(arrays, expected)
    advice = self._advice(weights)
    weight_files.check_names(arrays, weights.unknown, expected, file, advice)
    weight_files.check_shapes(
      arrays, expected, file, advice, but_tokens=self.tokens
    )
    self._fit_tokens(weights, expected, input_shape)
    if note:
      logging.warning("%s %s", file, note)
    return weight_files.fill(like, arrays, file)

  def architecture(
    self, source: str | pathlib.Path, *, channels: int = 3
  ) -> dict[str, Any]:
    """Finds the fields of `config.model.<section>` for the weights in `source`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of another kind of model, or nothing beside it tells
        what shapes don't show.
    """

    def shapes(file):
      return architectures.placeholders(weight_files.shapes(file))

    weights = self._read(source, shapes, channels)
    for name, told in weights.told.items():
      self._check(told, weights, {}, {}, name)
    said = weights.said
    missing = [words for x, words in self.untold.items() if x not in said]
    if missing:
      raise ValueError(
        f"there is no {hub.CONFIG} beside {weights.file} that tells"
        f" {', '.join(missing)}; expected one, or {self.instead}."
        f" {self._advice(weights)}"
      )
    epsilon = self.layouts[weights.library].norm_epsilon
    found = {"norm_epsilon": epsilon, **said, **self._own(weights.arrays, said)}
    taken = {x: found[x] for x in self.taken if x in found}
    return {**weights.shown, **taken}

  def sized(
    self, model: config_dict.ConfigDict, *, channels: int = 3
  ) -> config_dict.ConfigDict:
    """Fills in the model's fields in `config.model` from the file, if asked to.

    `size` is `SIZE` to take them from the weights that `pretrained` names.
    Otherwise the same config comes back.

    Raises:
      FileNotFoundError, ValueError: as `architecture`.
    """
    if model.get("size") != SIZE or model.get("pretrained") is None:
      return model
    fields = self.architecture(model.pretrained, channels=channels)
    copy = model.copy_and_resolve_references().unlock()
    section = copy[self.section]
    with weight_files.about(model.pretrained, "the model"):
      for name, value in fields.items():
        if not self.keeps_given or section.get(name) is None:
          section.update({name: value})
    return copy.lock()

  def preprocessing(self, source: str | pathlib.Path) -> Preprocessing:
    """Finds the preparation of images that the weights in `source` expect.

    It is taken from a file beside the weights; without one it is the custom of
    the library that wrote them, and a log line says so.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the files beside the weights can't be read.
    """
    file = self._find(source)
    said = {name: weight_files.beside(file, name) for name in self.preparations}
    with weight_files.about(file, "images"):
      for name, read in self.preparations.items():
        found = None if said[name] is None else read(said[name])
        if found is not None:
          return found
    custom, found = self._custom(file)
    logging.warning(
      "There is no %s beside %s: images are prepared as %s.",
      hub.PREPROCESSOR,
      file,
      custom,
    )
    return found

  def _find(self, source):
    beside = dict.fromkeys((*self.readers, *self.preparations))
    return hub.find(source, self.names, tuple(beside))

  def _read(self, source, read, channels) -> Weights:
    file = self._find(source)
    stored = read(file)
    library = self._find_library(stored, file)
    arrays, unknown = layouts.rename(stored, self.layouts[library])
    told = {}
    for name, reader in self.readers.items():
      said = weight_files.beside(file, name)
      if said:
        with weight_files.about(file, "the model"):
          told[name] = reader(said)
    shown = self.infer(arrays, channels)
    return Weights(file, library, arrays, unknown, shown, told)

  def _find_library(self, stored, file):
    name = layouts.find_layout(stored, self.layouts)
    if name is None:
      raise ValueError(
        f"{file} holds {weight_files.some(sorted(stored))}; expected"
        f" {self.noun}, with the names of {', '.join(self.layouts)}."
      )
    return name

  def _check(self, told, weights, model, fixed, beside):
    architectures.check(
      told,
      weights.shown,
      model,
      fixed,
      weights.file,
      section=f"config.model.{self.section}",
      beside=beside,
    )

  def _fit_tokens(self, weights, expected, input_shape):
    """Fits the file's position embeddings to the model's grid."""
    rows, columns, channels = input_shape
    pixels = len(expected[f"{self.tower}patch_embed/kernel"])
    size = math.isqrt(pixels // channels)
    grid = (rows // size, columns // size)
    # The class token stands before the grid.
    others = 1 if f"{self.tower}class_token" in expected else 0
    path = f"{self.tower}position_embed"
    shape = np.shape(expected[path])
    if math.prod(grid) + others != shape[-2]:
      raise ValueError(
        f"input_shape is {tuple(input_shape)}, in patches {grid[0]}x{grid[1]},"
        f" and the model has {shape[-2]} position embeddings; expected the"
        " shape that the model was created with."
      )
    stored = weights.arrays[path].reshape(-1, shape[-1])
    tokens, patch_size = len(stored) - others, weights.shown.get("patch_size")
    grids = (
      architectures.grid(told, patch_size, tokens, weights.file)
      for told in weights.told.values()
    )
    layout = self.layouts[weights.library]
    fitted = positions.fit(
      stored,
      grid,
      stored_grid=next((found for found in grids if found is not None), None),
      others=others,
      antialias=layout.antialias,
      align_corners=layout.align_corners,
      name=weights.file,
    )
    weights.arrays[path] = fitted.reshape(shape)

  @staticmethod
  def infer(arrays: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Infers fields from shapes."""
    raise NotImplementedError

  def _adapt(self, arrays, expected) -> str | None:
    """Changes arrays that the model has otherwise; says what is to be told."""

  def _own(self, arrays, said) -> dict[str, Any]:
    """Finds fields that only this kind of model has."""
    raise NotImplementedError

  def _check_told(self, weights, expected, options, channels) -> None:
    """Compares statements with the model, and with the weights themselves."""
    raise NotImplementedError

  def _advice(self, weights) -> str:
    """Advises what to set, as far as the file and its neighbours tell."""
    raise NotImplementedError

  def _custom(self, file) -> tuple[str, Preprocessing]:
    """Finds how images are prepared where nothing says so, and in words."""
    raise NotImplementedError
