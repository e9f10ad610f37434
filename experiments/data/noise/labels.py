"""Label noise: samples get a wrong label, with known truth.

Everything is drawn from one seed and saved with the run, so that selection and
reports compare against the truth.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.noise.kinds import KINDS
from experiments.data.noise.tables import NO_LABEL
from experiments.runtime import workdir as workdir_lib


class NoisyLabels(NamedTuple):
  """Labels after noise, beside the truth."""

  labels: np.ndarray  # int32 [N], as a learner is given them.
  clean_labels: np.ndarray  # int32 [N], as they were before.
  is_noisy: np.ndarray  # bool [N], where the two differ.
  rate: float  # The exact share of noisy labels.
  missing: int = 0  # Samples that a file had no label for; theirs are clean.


def apply_noise(
  labels: np.ndarray,
  *,
  kind: str = "symmetric",
  rate: float | None = None,
  num_classes: int,
  seed: int,
  class_names: Sequence[str] | None = None,
  ids: np.ndarray | None = None,
  mapping: Mapping[Any, Any] | str | None = None,
  matrix: Any = None,
  path: str | os.PathLike | None = None,
  column: str | None = None,
  id_column: str | None = None,
  partial: bool = False,
) -> NoisyLabels:
  """Replaces a share of the labels by wrong ones.

  | kind         | who gets which label                                       |
  |--------------|------------------------------------------------------------|
  | "symmetric"  | `rate` of all: any other class, uniformly                  |
  | "pair"       | `rate` of all: the next class, y -> (y + 1) mod C          |
  | "asymmetric" | `rate` of the source classes: their look-alike in `mapping`|
  | "confusion"  | as the rows of `matrix` say; with `rate`, rescaled to it   |
  | "file"       | as the table at `path` says                                |

  Args:
    labels: The true labels, integers [N] in 0 .. num_classes - 1.
    kind: One of `KINDS`.
    rate: Share of labels to change, in [0, 1).
    num_classes: How many classes there are, C.
    seed: Not negative; the same seed gives the same noise.
    class_names: The classes' names [C], for "asymmetric" and "file"; the other
      kinds don't look at them.
    ids: The samples' ids [N], for "file"; the other kinds don't look at them.
    mapping: For "asymmetric": source class to target class, by names or
      numbers, as a mapping or as text "cat:dog,dog:cat". Not needed with the
      class names of CIFAR-10 or CIFAR-100.
    matrix: For "confusion": counts or rates [C, C], true class by given class,
      or the path of a .npy or .csv file of them.
    path: For "file": a .csv file with a header, or a .parquet file.
    column: For "file": its column of labels, numbers or class names; may be
      left out where there is just one besides the ids.
    id_column: For "file": its column of ids; "id" if left out.
    partial: For "file": samples that the file has no label for keep their own,
      and count in `missing`.

  Returns:
    The labels with and without noise.

  Raises:
    FileNotFoundError: If `path` or `matrix` names no file.
    ValueError: If the kind is unknown, a value is out of range, an option is
      missing or has no effect, or the file lacks samples.
    TypeError: If `labels` are not integers.

  Example:
    >>> noisy = apply_noise(
    ...   np.arange(10) % 5, kind="pair", rate=0.4, num_classes=5, seed=0
    ... )
    >>> int(noisy.is_noisy.sum()), noisy.rate
    (4, 0.4)
  """
  labels = np.asarray(labels)
  if labels.dtype.kind not in "iu":
    raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
  if labels.ndim != 1:
    raise ValueError(f"labels must have shape [N], got {labels.shape}")
  if kind not in KINDS:
    raise ValueError(f"no noise kind {kind!r}; there are {sorted(KINDS)}")
  if rate is not None and not 0 <= rate < 1:
    raise ValueError(f"the noise rate must lie in [0, 1), got {rate}")
  if num_classes < 2:
    raise ValueError(
      f"num_classes must be at least 2, got {num_classes}; of a folder of"
      " images, expected a folder for each class, or a table of files and"
      " labels, which config.data.labels names"
    )
  if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
    raise ValueError(
      f"labels must lie in 0 .. {num_classes - 1}, got "
      f"{labels.min()} .. {labels.max()}; check num_classes"
    )
  if seed < 0:
    raise ValueError(f"seed must not be negative, got {seed}")
  if class_names is not None and len(class_names) != num_classes:
    raise ValueError(
      f"{len(class_names)} class_names, but num_classes is {num_classes}"
    )
  if ids is not None and np.shape(ids) != labels.shape:
    raise ValueError(f"{labels.shape} labels, but {np.shape(ids)} ids")
  context = {"class_names": class_names, "ids": ids}
  options = {
    "mapping": mapping,
    "matrix": matrix,
    "path": path,
    "column": column,
    "id_column": id_column,
  }
  handed = _check_options(kind, rate, context, options)

  clean = labels.astype(np.int32)
  if kind != "file":
    handed["rng"] = np.random.default_rng(seed)
  noisy = KINDS[kind].draw(clean, num_classes=num_classes, **handed)
  missing = noisy == NO_LABEL
  if missing.any() and not partial:
    first = np.asarray(ids)[np.argmax(missing)]
    raise ValueError(
      f"{path} has no label for {missing.sum()} of {len(clean)} samples, such"
      f" as {str(first)!r}; complete it, or let these keep"
      " their labels with config.noise.partial=true"
    )
  noisy = np.where(missing, clean, noisy)
  return _compare(noisy, clean, int(missing.sum()))


def _check_options(kind, rate, context, options) -> dict[str, Any]:
  """Returns the options of `kind`; raises where one is missing or too many."""
  about = KINDS[kind]
  for name, value in options.items():
    if value is not None and name not in about.takes:
      user = next(user for user in KINDS if name in KINDS[user].takes)
      raise ValueError(
        f"{name} has no effect with noise kind {kind!r}; leave it out, or take "
        f"kind {user!r}"
      )
  given = {
    name: value
    for name, value in {**context, **options}.items()
    if value is not None and name in about.takes
  }
  for name in about.needs:
    if name not in given:
      raise ValueError(f"noise kind {kind!r} needs {name}; give it")
  if about.rate == "needed" and rate is None:
    raise ValueError(f"noise kind {kind!r} needs a rate in [0, 1); give it")
  if about.rate == "none":
    if rate is not None:
      raise ValueError(
        f"rate is {rate}, but noise kind {kind!r} has the rate that it has; "
        "leave it out"
      )
  else:
    given["rate"] = None if rate is None else float(rate)
  return given


def _compare(
  labels: np.ndarray, clean_labels: np.ndarray, missing: int
) -> NoisyLabels:
  is_noisy = labels != clean_labels
  rate = float(is_noisy.mean()) if is_noisy.size else 0.0
  return NoisyLabels(labels, clean_labels, is_noisy, rate, missing)


def save(path: str | os.PathLike, noisy: NoisyLabels, ids: np.ndarray) -> None:
  """Writes labels with and without noise to an `.npz` file, all or nothing.

  Args:
    path: The file; an existing one is replaced.
    noisy: The labels, as `apply_noise` gave them, [N].
    ids: The samples' ids [N].

  Raises:
    ValueError: If there are not as many ids as labels.
  """
  ids = np.asarray(ids)
  if ids.shape != noisy.labels.shape:
    raise ValueError(f"{noisy.labels.shape} labels, but {ids.shape} ids")
  if ids.dtype.kind == "O":
    ids = ids.astype(np.str_)  # An array of objects would need pickle.
  workdir_lib.write_arrays(
    pathlib.Path(path),
    ids=ids,
    labels=noisy.labels,
    clean_labels=noisy.clean_labels,
    missing=noisy.missing,
  )


def load(path: str | os.PathLike) -> tuple[NoisyLabels, np.ndarray]:
  """Reads the labels that `save` wrote.

  Args:
    path: The `.npz` file.

  Returns:
    The labels with and without noise, and the samples' ids [N].

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If the file is damaged or something else.
  """
  with open(path, "rb") as file:
    try:
      with np.load(file, allow_pickle=False) as arrays:
        ids, labels = arrays["ids"], arrays["labels"]
        # Files written before there was such a count have none missing.
        missing = int(arrays["missing"]) if "missing" in arrays else 0
        noisy = _compare(labels, arrays["clean_labels"], missing)
    except Exception as error:  # zipfile, zlib and numpy each raise their own.
      raise ValueError(
        f"{os.fspath(path)} is not a file of noisy labels, or is damaged "
        f"({type(error).__name__}: {error}); delete it to draw the noise again"
      ) from error
  if not ids.shape == labels.shape == noisy.clean_labels.shape:
    raise ValueError(
      f"{os.fspath(path)} holds {ids.shape} ids, {labels.shape} labels and "
      f"{noisy.clean_labels.shape} clean labels; expected as many of each: "
      "delete it to draw the noise again"
    )
  return noisy, ids
