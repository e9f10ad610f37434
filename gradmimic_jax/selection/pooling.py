"""One number a sample: scores of all steps in comparable units, pooled."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Where a score is off the scale: further out, on its side, than this and than
# three times all but the outermost 3 % (one sample at least).
_OFF_SCALE = 60.0
_OFF_SHARE = 0.03
# The largest magnitude of a score in units of its step.
_LARGEST = 1e15


class Unit(NamedTuple):
  """A step's unit: z = (s - center) / scale, pulled in to [low, high]."""

  center: float  # the step's median, or the mark
  scale: float  # the middle distance from it
  low: float  # what lies further out is off the scale
  high: float
  constant: bool  # whether all scores are the same

  def z(self, scores: np.ndarray) -> np.ndarray:
    """Scores [n] in units of the step, float64; not finite: nan."""
    # Halves, so that the difference of two finite numbers is one.
    with np.errstate(over="ignore", invalid="ignore"):
      half = 0.5 * scores.astype(np.float64) - 0.5 * self.center
      z = half / self.scale * 2
    z[~np.isfinite(scores)] = np.nan
    return np.clip(z, -_LARGEST, _LARGEST, out=z)


def unit_of(scores: np.ndarray, mark: float | None) -> Unit | None:
  """The unit of a step's scores [n]; None if none is finite.

  The center is the median, or the mark; the scale is the median distance from
  it, of the scores that aren't there, times 1.4826 (a standard deviation of a
  Gaussian) unless there is a mark.

  Args:
    scores: real numbers [n]; what isn't finite is missing.
    mark: the score that parts good from bad; None if there is none.
  """
  seen = scores[np.isfinite(scores)].astype(np.float64)
  if not len(seen):
    return None
  low, high = float(seen.min()), float(seen.max())
  center = float(np.median(seen)) if mark is None else mark
  if low == high:
    return Unit(center, 1.0, -_LARGEST, _LARGEST, True)
  halves = np.abs(0.5 * seen - 0.5 * center)
  apart = halves[halves > 0]
  scale = float(np.median(apart)) * 2 if len(apart) else 0.0
  # Half of a float64's range is out of reach of a ratio; a ratio of
  # subnormal numbers is no better.
  scale = max(scale, np.finfo(np.float64).tiny)
  if mark is None:
    scale = min(scale * 1.4826, np.finfo(np.float64).max)
  unit = Unit(center, scale, -_LARGEST, _LARGEST, False)
  z = unit.z(seen)
  out = max(1, int(_OFF_SHARE * len(z)))
  if out >= len(z):
    return unit
  inner = np.partition(z, (out, len(z) - 1 - out))
  return unit._replace(
    low=min(-_OFF_SCALE, 3 * float(inner[out])),
    high=max(_OFF_SCALE, 3 * float(inner[len(z) - 1 - out])),
  )


class Pool(NamedTuple):
  """How steps are pooled: x = sum w (y - a) / sum w b, over a sample's steps.

  y is z pulled in to the unit's ends, or asinh of that.
  """

  units: tuple[Unit | None, ...]  # T
  curved: bool  # whether y = asinh(z)
  weight: np.ndarray  # w [T], >= 0; 0 for a step that is left out
  center: np.ndarray  # a [T]
  signal: np.ndarray  # b [T]
  covariance: np.ndarray  # [T, T], of y on samples of one kind

  def y(self, scores: np.ndarray, step: int) -> np.ndarray:
    """A step's column [n] of scores as y; nan where it is missing."""
    unit = self.units[step]
    if unit is None or unit.constant:
      return np.full(len(scores), np.nan)
    y = np.clip(unit.z(scores), unit.low, unit.high)
    return np.arcsinh(y, out=y) if self.curved else y

  def __call__(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pools scores [N, T].

    Returns:
      x [N], nan where no step is seen; and the noise [N]: the standard
      deviation of x on samples of one kind, relative to a sample with all
      steps.
    """
    n = len(scores)
    total, signal = np.zeros(n), np.zeros(n)
    used = np.flatnonzero(self.weight).tolist()
    seen = np.zeros((n, len(used)), bool)
    for place, step in enumerate(used):
      y = self.y(scores[:, step], step)
      seen[:, place] = here = ~np.isnan(y)
      y -= self.center[step]
      y *= self.weight[step]
      np.add(total, y, out=total, where=here)
      step_signal = self.weight[step] * self.signal[step]
      np.add(signal, step_signal, out=signal, where=here)
    x = np.full(n, np.nan)
    some = signal > 0
    np.divide(total, signal, out=x, where=some)
    noise = np.ones(n)
    if len(used) and not seen[some].all():
      w = self.weight[used]
      c = self.covariance[np.ix_(used, used)] * np.outer(w, w)
      whole = math.sqrt(max(c.sum(), 1e-300)) / (w @ self.signal[used])
      variance = np.zeros(n)
      for place in range(len(used)):
        row = seen @ c[place]
        np.add(variance, row, out=variance, where=seen[:, place])
      deviation = np.sqrt(np.maximum(variance, 1e-300))
      np.divide(deviation, signal * whole, out=noise, where=some)
      noise = np.clip(noise, 1.0, 1e3)
    return x, noise


def even_pool(units: tuple[Unit | None, ...], *, curved: bool) -> Pool:
  """The pool in which every step with different scores counts alike."""
  usable = np.array(
    [float(unit is not None and not unit.constant) for unit in units]
  )
  n = len(units)
  return Pool(units, curved, usable, np.zeros(n), np.ones(n), np.eye(n))


def quality_of(pooled: np.ndarray, probability: np.ndarray) -> np.ndarray:
  """Maps pooled scores to [0, 1]: monotone, and calibrated on probabilities.

  Isotonic regression of the keep probabilities on the pooled scores, by up to
  1000 groups of samples of equal size and linear between them; then `ranked`.

  Args:
    pooled: float64 [N]; nan has no quality.
    probability: keep probabilities [N]; samples with nan are not fitted.

  Returns:
    float64 [N] in [0, 1]; nan where there is no pooled score, 1/2 everywhere
    else if there is no probability to calibrate on.

  Example:
    >>> quality_of(np.array([-2.0, 1.0, 3.0]), np.array([0.0, 1.0, 0.9])).round(
    ...   2
    ... )
    array([0.  , 0.95, 0.95])
  """
  level = np.full(len(pooled), np.nan)
  seen = ~np.isnan(pooled)
  fitted = seen & ~np.isnan(probability)
  n = int(fitted.sum())
  if not n:
    level[seen] = 0.5
    return ranked(level, pooled)
  from sklearn.isotonic import IsotonicRegression  # slow to import

  x, y = pooled[fitted], probability[fitted]
  order = np.argsort(x, kind="stable")
  x, y = x[order], y[order]
  starts = np.unique(np.linspace(0, n, min(n, _BINS) + 1).astype(np.int64)[:-1])
  # Ties belong to one group.
  starts = np.unique(np.searchsorted(x, x[starts]))
  sizes = np.diff(np.r_[starts, n])
  middle = np.add.reduceat(x, starts) / sizes
  share = np.add.reduceat(y, starts) / sizes
  # By place, not by score: scores may differ by rounding alone.
  fit = IsotonicRegression().fit(
    np.arange(len(starts)), share, sample_weight=sizes
  )
  level[seen] = np.interp(
    pooled[seen], middle, fit.predict(np.arange(len(starts)))
  )
  return ranked(level, pooled)


# Points of the map from pooled score to quality. Quantiles lie close where the
# scores do, so that a thousand are enough however many samples there are.
_BINS = 1000
# What of a quality only ranks, so that better scores have a higher one also
# where the probability makes no difference.
_RANK_SHARE = 1e-3


def ranked(level: np.ndarray, pooled: np.ndarray) -> np.ndarray:
  """Makes a level that never falls with the pooled score one that rises.

  q_i = (1 - e) level_i + e (share of samples with a lower pooled score, and
  half of those with the same one), e = 0.001.

  Args:
    level: float64 [N] in [0, 1], nan where `pooled` is.
    pooled: float64 [N].

  Example:
    >>> ranked(np.array([1.0, 1.0]), np.array([3.0, 4.0]))
    array([0.99925, 0.99975])
  """
  quality = np.full(len(pooled), np.nan)
  seen = ~np.isnan(pooled)
  if not seen.any():
    return quality
  ascending = pooled[seen]
  order = np.argsort(ascending, kind="stable")
  ascending = ascending[order]
  starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
  del ascending  # of millions of samples, each array counts
  ends = np.r_[starts[1:], len(order)]
  middle = 0.5 * (starts + ends) / len(order)
  middle = np.repeat(middle, ends - starts)
  del starts, ends
  rank = np.empty(len(order))
  rank[order] = middle
  del order, middle
  rank *= _RANK_SHARE
  rank += (1 - _RANK_SHARE) * level[seen]
  quality[seen] = rank
  return quality
