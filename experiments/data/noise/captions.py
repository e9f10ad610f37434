"""Caption noise: pairs of image and text get a wrong text, with known truth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import purposes

KINDS = ("swapped", "truncated", "padded")
# Words that pages put around a picture instead of describing it.
_FILLER = (
  *("buy", "shop", "sale", "best", "price", "free", "shipping", "order"),
  *("online", "new", "offer", "deal", "click", "here", "view", "more"),
  *("details", "home", "page", "image", "item", "stock", "gift", "today"),
)


class NoisyCaptions(NamedTuple):
  """Captions after noise, beside the truth."""

  captions: np.ndarray  # str [N], as a learner is given them.
  clean_captions: np.ndarray  # str [N], as they were before.
  is_noisy: np.ndarray  # bool [N], where the two differ.
  kind: np.ndarray  # str [N], one of `KINDS`, or "" where the caption is clean.


def apply_noise(
  captions: Sequence[str],
  classes: np.ndarray,
  *,
  rate: float,
  seed: int,
  kinds: Sequence[str] = KINDS,
  context_length: int = 77,
) -> NoisyCaptions:
  """Replaces a share of the captions by wrong ones.

  | kind        | what the pair gets                                          |
  |-------------|-------------------------------------------------------------|
  | "swapped"   | the clean caption of another pair, of another class         |
  | "truncated" | the first word of its caption                               |
  | "padded"    | `context_length` filler words, and its caption after them,  |
  |             | where a tokenizer has cut the text off                      |

  Args:
    captions: The true captions [N].
    classes: The class of each image [N], integers: a swapped caption always
      belongs to another class.
    rate: Share of captions to change, in [0, 1]; `round(rate * N)` are drawn,
      and each kind gets as many as any other, or one more.
    seed: Not negative; the same seed gives the same noise.
    kinds: Some of `KINDS`.
    context_length: Of the tokenizer, or more: every filler word takes at least
      one of its tokens.

  Returns:
    The captions with and without noise. A caption that is one word long can't
    be truncated: it stays, and counts as clean.

  Raises:
    ValueError: If a value is out of range, shapes don't fit, or all images are
      of one class and captions are to be swapped.

  Example:
    >>> noisy = apply_noise(
    ...   ["a red star", "a blue ring"],
    ...   np.array([0, 1]),
    ...   rate=1.0,
    ...   seed=0,
    ...   kinds=("swapped",),
    ... )
    >>> noisy.captions.tolist()
    ['a blue ring', 'a red star']
  """
  clean = np.asarray(captions, np.str_)
  classes = np.asarray(classes)
  if clean.ndim != 1 or classes.shape != clean.shape:
    raise ValueError(
      f"captions and classes must be [N], got {clean.shape}, {classes.shape}"
    )
  if not 0 <= rate <= 1:
    raise ValueError(f"the noise rate must lie in [0, 1], got {rate}")
  if not kinds or not set(kinds) <= set(KINDS):
    raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)}")
  if context_length < 1:
    raise ValueError(f"context_length must be positive, got {context_length}")
  if seed < 0:
    raise ValueError(f"seed must not be negative, got {seed}")
  rng = np.random.default_rng((seed, purposes.CAPTIONS))
  rows = rng.permutation(len(clean))[: round(rate * len(clean))]
  texts = clean.tolist()
  kind = np.full(len(clean), "", f"<U{max(map(len, KINDS))}")
  for number, name in enumerate(kinds):
    chosen = rows[number :: len(kinds)]
    kind[chosen] = name
    if name == "swapped":
      donors = _draw_other_classes(chosen, classes, rng)
      for row, donor in zip(chosen, donors, strict=True):
        texts[row] = str(clean[donor])
    elif name == "truncated":
      for row in chosen:
        texts[row] = (texts[row].split() or [""])[0]
    else:
      words = rng.integers(len(_FILLER), size=(len(chosen), context_length))
      for row, numbers in zip(chosen, words.tolist(), strict=True):
        filler = " ".join([_FILLER[n] for n in numbers])
        texts[row] = f"{filler} {texts[row]}"
  noisy = np.array(texts, np.str_) if texts else clean
  is_noisy = noisy != clean
  return NoisyCaptions(noisy, clean, is_noisy, np.where(is_noisy, kind, ""))


def _draw_other_classes(
  rows: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Draws for each row one whose class differs, uniformly."""
  order = np.argsort(classes, kind="stable")
  groups = classes[order]
  first = np.searchsorted(groups, classes[rows], "left")
  own = np.searchsorted(groups, classes[rows], "right") - first
  others = len(classes) - own
  if len(rows) and not others.min():
    raise ValueError(
      f"all {len(classes)} images are of one class, so no caption of another"
      " can be swapped in; leave the kind 'swapped' out"
    )
  # The place among the samples of other classes, then past those of its own.
  place = rng.integers(others)
  return order[np.where(place < first, place, place + own)]
