"""Coordinates of a chart's lines, for a page's SVG to draw.

Colours, words and texts for screen readers are the page's; here are only
numbers, in the units of a view box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Tick(NamedTuple):
  """A mark on an axis."""

  at: float  # in the view box
  text: str


class Frame(NamedTuple):
  """A chart's view box and the rectangle in it that holds the data."""

  width: float
  height: float
  left: float
  right: float
  top: float
  bottom: float


class Histogram(NamedTuple):
  """Two groups of scores over the same bins."""

  frame: Frame
  kept: str  # path
  dropped: str  # path
  cut: float | None  # x of the line between keep and drop votes
  x_ticks: list[Tick]


class Curve(NamedTuple):
  """Precision and recall against the number of samples removed."""

  frame: Frame
  precision: str  # path
  recall: str  # path, empty where nothing is mislabelled
  recommended: float  # x
  uncertain: tuple[float, float]  # x
  x_ticks: list[Tick]
  y_ticks: list[Tick]


def histogram(
  edges: Sequence[float],
  kept: Sequence[int],
  dropped: Sequence[int],
  *,
  cut: float | None = None,
) -> Histogram:
  """Makes a small histogram.

  Args:
    edges: of the bins [K + 1], ascending.
    kept: counts [K].
    dropped: counts [K].
    cut: the score between keep and drop votes; left out beyond the edges.

  Returns:
    The Histogram.
  """
  frame = Frame(260, 150, 8, 252, 10, 126)
  low, high = edges[0], edges[-1]
  top = max(1, *kept, *dropped)

  def outline(counts: Sequence[int]) -> str:
    points = [(_x(frame, low, low, high), frame.bottom)]
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
      y = _y(frame, count, 0, top)
      points += [(_x(frame, v, low, high), y) for v in (left, right)]
    points.append((_x(frame, high, low, high), frame.bottom))
    return _path(points) + "Z"

  inside = cut is not None and low < cut < high
  return Histogram(
    frame,
    outline(kept),
    outline(dropped),
    round(_x(frame, cut or 0.0, low, high), 1) if inside else None,
    [Tick(_x(frame, v, low, high), _text(v)) for v in ticks(low, high, 3)],
  )


def removal(
  removed: Sequence[int],
  precision: Sequence[float],
  recall: Sequence[float | None],
  *,
  recommended: int,
  uncertain: Sequence[int],
) -> Curve:
  """Makes a removal curve.

  Args:
    removed: numbers of samples [K], ascending.
    precision: estimated shares [K].
    recall: estimated shares [K]; None where undefined.
    recommended: number of samples.
    uncertain: the band's two ends.

  Returns:
    The Curve.
  """
  frame = Frame(460, 250, 52, 424, 14, 210)  # room for half of "10,000,000"
  high = max(1, removed[-1])

  def line(values: Sequence[float | None]) -> str:
    return _path(
      [
        (_x(frame, x, 0, high), _y(frame, y, 0, 1))
        for x, y in zip(removed, values, strict=True)
        if y is not None
      ]
    )

  shares = (0, 0.25, 0.5, 0.75, 1)
  return Curve(
    frame,
    line(precision),
    line(recall),
    _x(frame, recommended, 0, high),
    (_x(frame, uncertain[0], 0, high), _x(frame, uncertain[1], 0, high)),
    [Tick(_x(frame, v, 0, high), f"{v:,.0f}") for v in ticks(0, high, 4)],
    [Tick(_y(frame, v, 0, 1), f"{v:.0%}") for v in shares],
  )


def ticks(low: float, high: float, about: int) -> list[float]:
  """Returns round numbers from low to high, some `about` of them.

  Args:
    low: of the axis.
    high: of the axis, above low.
    about: how many are wanted.

  Returns:
    The numbers, ascending.

  Example:
    >>> ticks(0, 1437, 4)
    [0.0, 500.0, 1000.0]
  """
  raw = (high - low) / max(about, 1)
  if not (raw > 0 and math.isfinite(raw)):
    return []
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _x(frame: Frame, value: float, low: float, high: float) -> float:
  span = frame.right - frame.left
  return round(frame.left + span * (value - low) / (high - low), 1)


def _y(frame: Frame, value: float, low: float, high: float) -> float:
  span = frame.bottom - frame.top
  return round(frame.bottom - span * (value - low) / (high - low), 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
  return "".join(
    f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points)
  )


def _text(value: float) -> str:
  return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def bin_scores(
  scores: Any, *groups: Any
) -> tuple[list[float], list[list[int]]]:
  """Counts groups of scores in 40 bins that hold all but the outermost.

  Scores beyond the .5 and 99.5 % quantiles count in the outermost bins: a few
  far-out ones would squeeze all others into one bar.

  Args:
    scores: [N], some not finite, which are left out.
    *groups: booleans [N].

  Returns:
    Edges [41], ascending, and a list [40] a group; both empty if no score is
    finite.

  Example:
    >>> edges, (counts,) = bin_scores([0.0, 1.0, np.nan], [True, True, True])
    >>> len(edges), sum(counts)
    (41, 2)
  """
  values = np.asarray(scores, np.float64)
  seen = np.isfinite(values)
  if not seen.any():
    return [], [[] for _ in groups]
  low, high = np.quantile(values[seen], [0.005, 0.995])
  if high <= low:
    half = 0.5 * max(1.0, abs(low))
    low, high = low - half, high + half
  edges = np.linspace(low, high, 41)
  counts = [
    np.histogram(np.clip(values[seen & group], low, high), edges)[0].tolist()
    for group in map(np.asarray, groups)
  ]
  return edges.tolist(), counts
