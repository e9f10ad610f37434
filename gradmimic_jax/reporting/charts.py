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
  unit: float | None = None,
) -> Histogram:
  """Makes a small histogram; heights grow with the square root of counts.

  Args:
    edges: of the bins [K + 1], ascending.
    kept: counts [K].
    dropped: counts [K].
    cut: the score between keep and drop votes; left out beyond the edges.
    unit: of the axis, as `bin_scores` gives it; None for an even one.

  Returns:
    The Histogram.
  """
  frame = Frame(260, 150, 8, 252, 10, 126)
  low, high = edges[0], edges[-1]
  ends = _warp(low, unit), _warp(high, unit)
  top = math.sqrt(max(1, *kept, *dropped))

  def x(value: float) -> float:
    return _x(frame, _warp(value, unit), *ends)

  def outline(counts: Sequence[int]) -> str:
    points = [(x(low), frame.bottom)]
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
      y = _y(frame, math.sqrt(count), 0, top)
      points += [(x(v), y) for v in (left, right)]
    points.append((x(high), frame.bottom))
    return _path(points) + "Z"

  inside = cut is not None and low < cut < high
  return Histogram(
    frame,
    outline(kept),
    outline(dropped),
    round(x(cut or 0.0), 1) if inside else None,
    _spread([Tick(x(v), _text(v)) for v in _marks(low, high, unit)], frame),
  )


def _warp(value: float, unit: float | None) -> float:
  """Even near zero, within a unit or so; beyond, a tenfold is a step."""
  return value if unit is None else math.asinh(value / unit)


def _marks(low: float, high: float, unit: float | None) -> list[float]:
  """Round numbers on an axis; those to leave out last come first."""
  if unit is None:
    return ticks(low, high, 3)
  powers = range(
    math.floor(math.log10(unit)), math.ceil(math.log10(max(-low, high))) + 1
  )
  sized = [10.0**power for power in reversed(powers)]
  marks = [0.0, *(s * v for v in sized for s in (1, -1))]
  marks += [s * m * v for v in sized for m in (5, 2) for s in (1, -1)]
  inside = [float(f"{v:.12g}") for v in marks if low <= v <= high]
  return inside or [low, high]


def _spread(marks: Sequence[Tick], frame: Frame) -> list[Tick]:
  """Leaves out what has no room, also in a phone's larger letters."""
  taken: list[Tick] = []
  for mark in marks:
    half = 4.5 * len(mark.text)
    fits = half <= mark.at <= frame.width - half or len(mark.text) == 1
    if fits and all(
      abs(mark.at - other.at) > 9 + half + 4.5 * len(other.text)
      for other in taken
    ):
      taken.append(mark)
  return sorted(taken)


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
) -> tuple[list[float], list[list[int]], float | None]:
  """Counts groups of scores in 40 bins that hold all but the outermost.

  Scores beyond the .5 and 99.5 % quantiles, and beyond 2.5 and 97.5 % of each
  group of some size, count in the outermost bins: a few far-out ones would
  squeeze all others into one bar. Where a group is squeezed
  nevertheless, as late in training, bins are narrow near zero and grow with
  the scores: even in asinh(score / unit).

  Args:
    scores: [N], some not finite, which are left out.
    *groups: booleans [N].

  Returns:
    Edges [41], ascending, a list [40] a group, and the unit, None for even
    bins; edges and lists are empty if no score is finite.

  Example:
    >>> edges, (counts,), unit = bin_scores([0.0, 1.0, np.nan], [True] * 3)
    >>> len(edges), sum(counts), unit
    (41, 2, None)
  """
  values = np.asarray(scores, np.float64)
  seen = np.isfinite(values)
  if not seen.any():
    return [], [[] for _ in groups], None
  masks = [seen & np.asarray(group) for group in groups]
  ends = [np.quantile(values[seen], [0.005, 0.995])]
  ends += [
    np.quantile(values[mask], [0.025, 0.975])
    for mask in masks
    if mask.sum() >= 40
  ]
  low, high = min(e[0] for e in ends), max(e[1] for e in ends)
  if high <= low:
    half = 0.5 * max(1.0, abs(low))
    low, high = low - half, high + half
  members = [np.clip(values[mask], low, high) for mask in masks]
  sizes = np.abs(values[seen & (values != 0)])
  units: list[float | None] = [None]
  if len(sizes):
    units += [float(np.quantile(sizes, q)) for q in (0.5, 0.25, 0.1, 0.05)]
  best: tuple[float, Any] = (2.0, None)
  for unit in units:
    edges = _bins(float(low), float(high), unit)
    if (np.diff(edges) <= 0).any():
      continue  # finer than floats are
    counts = [np.histogram(member, edges)[0] for member in members]
    crowd = max([c.max() / c.sum() for c in counts if c.sum()], default=0.0)
    if crowd < best[0] - 0.1:
      best = crowd, (edges.tolist(), [c.tolist() for c in counts], unit)
    if crowd <= 0.25:
      break
  return best[1]


def _bins(low: float, high: float, unit: float | None) -> np.ndarray:
  if unit is None:
    return np.linspace(low, high, 41)
  ends = math.asinh(low / unit), math.asinh(high / unit)
  edges = unit * np.sinh(np.linspace(*ends, 41))
  edges[0], edges[-1] = low, high  # rounding must not lose the outermost
  return edges
