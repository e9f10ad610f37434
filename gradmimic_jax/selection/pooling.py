"""One number a sample: scores pooled over the steps, and its quality."""

from __future__ import annotations

import numpy as np

from gradmimic_jax.selection.binarize import subsample

# Points of the map from pooled score to quality. Quantiles lie close where the
# scores do, so that a thousand are enough however many samples there are.
_BINS = 1000
# What of a quality only ranks, so that better scores have a higher one also
# where the votes make no difference.
_RANK_SHARE = 1e-3


def pool(
  scores: np.ndarray, *, center: float | None = 0.0, seed: int = 0
) -> np.ndarray:
  """The mean over the steps of scores in comparable units.

  pooled_i = mean_t (s_it - c_t) / scale_t, over the steps in which i has a
  finite score, with scale_t the mean of |s_it - c_t| cut off at its 99 %
  quantile (over at most `FIT_SIZE` samples): scores shrink by orders of
  magnitude while a model learns, and a plain mean would be that of the first
  steps. A step whose scores are all c_t adds zeros.

  Args:
    scores: real numbers [N, T].
    center: c_t; None for every step's median.
    seed: for subsamples.

  Returns:
    float64 [N]; nan where a sample has no finite score.

  Example:
    >>> scores = np.array([[100.0, 1.0], [-100.0, 1.0], [100.0, np.nan]])
    >>> pool(scores)
    array([1., 0., 1.])
  """
  total = np.zeros(len(scores))
  count = np.zeros(len(scores), np.int32)
  for column in scores.T:  # one step at a time: N may be in the millions
    column = column.astype(np.float64)
    seen = np.isfinite(column)
    if not seen.any():
      continue
    sample = subsample(column[seen], seed)
    middle = float(np.median(sample)) if center is None else center
    distances = np.abs(sample - middle)
    scale = float(np.minimum(distances, np.quantile(distances, 0.99)).mean())
    column -= middle
    column /= scale or 1.0
    np.add(total, column, out=total, where=seen)
    count += seen
  pooled = np.full(len(scores), np.nan)
  return np.divide(total, count, out=pooled, where=count > 0)


def quality_of(pooled: np.ndarray, probability: np.ndarray) -> np.ndarray:
  """Maps pooled scores to [0, 1]: monotone, and calibrated on probabilities.

  Isotonic regression of the keep probabilities on the pooled scores, by up to
  1000 groups of samples of equal size and linear between them. A thousandth of
  the quality only ranks: strictly higher scores have a strictly higher quality
  even where the probability is 0 or 1 throughout.

  Args:
    pooled: float64 [N]; nan has no quality.
    probability: keep probabilities [N]; samples with nan are not fitted.

  Returns:
    float64 [N] in [0, 1]; nan where there is no pooled score, and everywhere if
    there is no probability to calibrate on.

  Example:
    >>> quality_of(np.array([-2.0, 1.0, 3.0]), np.array([0.0, 1.0, 0.9])).round(
    ...   2
    ... )
    array([0.  , 0.95, 0.95])
  """
  quality = np.full(len(pooled), np.nan)
  fitted = ~np.isnan(pooled) & ~np.isnan(probability)
  n = int(fitted.sum())
  if not n:
    return quality
  from sklearn.isotonic import IsotonicRegression  # slow to import

  x, y = pooled[fitted], probability[fitted]
  order = np.argsort(x, kind="stable")
  x, y = x[order], y[order]
  starts = np.unique(np.linspace(0, n, min(n, _BINS) + 1).astype(np.int64)[:-1])
  sizes = np.diff(np.r_[starts, n])
  x_bins = np.add.reduceat(x, starts) / sizes
  y_bins = np.add.reduceat(y, starts) / sizes
  # Groups within ties have one place.
  x_bins, place = np.unique(x_bins, return_inverse=True)
  weight = np.bincount(place, sizes)
  y_bins = np.bincount(place, y_bins * sizes) / weight
  level = IsotonicRegression().fit(x_bins, y_bins, sample_weight=weight)
  rank = (np.cumsum(weight) - 0.5 * weight) / n
  curve = (1 - _RANK_SHARE) * level.predict(x_bins) + _RANK_SHARE * rank
  seen = ~np.isnan(pooled)
  low, high = pooled[seen].min(), pooled[seen].max()
  # Up to the extremes there is the rank's share of the outermost groups left.
  knots, values = [x_bins], [curve]
  if low < x_bins[0]:
    knots.insert(0, np.array([low]))
    values.insert(0, curve[:1] - _RANK_SHARE * rank[0])
  if high > x_bins[-1]:
    knots.append(np.array([high]))
    values.append(curve[-1:] + _RANK_SHARE * (1 - rank[-1]))
  quality[seen] = np.interp(
    pooled[seen], np.concatenate(knots), np.concatenate(values)
  )
  return quality
