"""Noise with a known truth: sequences that are no prose."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import purposes
from experiments.tasks.language import texts as texts_lib

KINDS = ("shuffled", "code", "boilerplate")
CLEAN = ""

_NOTICES = (
  "We use cookies to give you the best experience on our site. By going on to"
  " browse you accept our use of cookies. Read our privacy policy. Accept all."
  " Manage settings.",
  "Copyright (c) {year} {name}. All rights reserved. This file may be used,"
  " copied and passed on under the terms of the licence that comes with it, as"
  " long as this notice stays in place. It comes without any warranty.",
  "Sign up for our newsletter and never miss a story. You can unsubscribe at"
  " any time. Share this page. Follow us. Terms of use. Contact. About {name}."
  " Copyright {year}.",
)
_NAMES = ("the authors", "Example Media", "The Example Project")
_YEARS = (2009, 2025)  # the first, and the one after the last


class NoisyTexts(NamedTuple):
  """Texts after noise, beside the truth."""

  texts: list[str]  # [N], as a learner is given them
  kind: np.ndarray  # str [N], one of KINDS, or CLEAN


def apply_noise(
  texts: Sequence[str],
  *,
  rate: float,
  seed: int,
  kinds: Sequence[str] = KINDS,
  characters: int,
) -> NoisyTexts:
  """Replaces a share of the texts by what is no prose.

  | kind          | what a text is replaced by                                |
  |---------------|-----------------------------------------------------------|
  | "shuffled"    | its own words in another order                            |
  | "code"        | Python code of the standard library, without docstrings   |
  |               | and comments                                              |
  | "boilerplate" | one of three notices of licences and cookies, over and    |
  |               | over, from any of its words on                            |

  Args:
    texts: the clean texts [N].
    rate: share of texts to replace, in [0, 1]; `round(rate * N)` are drawn, and
      each kind gets as many as any other, or one more.
    seed: not negative; the same seed gives the same noise.
    kinds: some of KINDS, each once.
    characters: length of a text that takes another's place.

  Returns:
    The texts with noise, and the kind of each. A text that has no two different
    words can't be shuffled: it stays, and counts as clean.

  Raises:
    ValueError: a value out of range, or not enough code.

  Example:
    >>> noisy = apply_noise(["one two", "three"], rate=1.0, seed=0,
    ...                     kinds=("shuffled",), characters=8)
    >>> noisy.texts, noisy.kind.tolist()
    (['two one', 'three'], ['shuffled', ''])
  """
  if not 0 <= rate <= 1:
    raise ValueError(f"config.noise.rate is {rate}; expected 0 to 1.")
  if not kinds or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
    raise ValueError(
      f"config.noise.kinds is {tuple(kinds)}; expected some of"
      f" {', '.join(KINDS)}, each once."
    )
  if seed < 0:
    raise ValueError(f"the seed of the noise is {seed}; expected 0 or more.")
  rng = np.random.default_rng((seed, purposes.TEXTS))
  rows = rng.permutation(len(texts))[: round(rate * len(texts))]
  noisy = list(texts)
  kind = np.full(len(texts), CLEAN, f"<U{max(map(len, KINDS))}")
  for number, name in enumerate(kinds):
    chosen = rows[number :: len(kinds)].tolist()
    if name == "shuffled":
      made = [_shuffled(texts[row], rng) for row in chosen]
    elif name == "code":
      made = texts_lib.code(len(chosen), characters, rng)
    else:
      made = [_boilerplate(characters, rng) for _ in chosen]
    for row, text in zip(chosen, made, strict=True):
      if text != texts[row]:
        noisy[row], kind[row] = text, name
  return NoisyTexts(noisy, kind)


def _shuffled(text, rng):
  """Puts the words in another order, if there is another."""
  words = text.split()
  if len(set(words)) < 2:
    return text
  order = list(range(len(words)))
  while [words[place] for place in order] == words:
    order = rng.permutation(len(words)).tolist()
  return " ".join([words[place] for place in order])


def _boilerplate(characters, rng):
  notice = _NOTICES[rng.integers(len(_NOTICES))].format(
    year=rng.integers(*_YEARS), name=_NAMES[rng.integers(len(_NAMES))]
  )
  words = notice.split()
  start = rng.integers(len(words))
  turned = " ".join(words[start:] + words[:start]) + " "
  return (turned * (characters // len(turned) + 1))[:characters]
