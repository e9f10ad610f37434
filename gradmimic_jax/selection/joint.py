"""The joint model of all scores: each sample's kind, seen through all steps.

A sample is of one of two kinds, clean or not. Each step sees the kind through
scores with a location and a width of their own for either kind; what a sample's
steps share beyond its kind is their covariance. So all steps together are one
number a sample (the best linear combination of their scores), and whether there
are two kinds at all is decided once, on that number.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gradmimic_jax.selection import pooling, populations

# The model is fitted to no more samples than this.
FIT_SIZE = 20_000
ABOVE = 0.7  # share above the mark from which a lone population is kept
BELOW = 0.95  # share below it from which a lone population is dropped
_FEW = 20  # of fewer, with a mark, each is judged by its own side
_NEAR_MARK = 0.25  # how far the upper group may lie below the mark, relative
_OFF_MARK = 0.1  # how far the lower group must lie below it, likewise
_ROUNDS = 4  # of weighing steps by how well they tell the two kinds apart
_LEAST_STEP = 1.01  # a round goes on if it moves the two apart by so much
_TOLD_BELOW = 0.02  # share below it that the note on a kept one mentions
_FEW_FAR = 3  # samples off the scale below that may be a population
_DRAWS = 100  # bootstrap samples of the clean fraction
_BLOCK = 65_536  # samples that are compared at a time
_SURE = 1e-6  # no probability of the model is closer to 0 or 1
# Of a sample that is off the scale below in all steps, in one population.
_OFF_SCALE_PROBABILITY = 0.01
_EQUAL = "all scores are equal"


class Joint(NamedTuple):
  """The outcome of the joint model."""

  probability: np.ndarray  # of being clean [N]; nan where nothing can be said
  quality: np.ndarray  # [N] in [0, 1]; nan without a finite score
  pooled: np.ndarray  # [N], nan without a finite score
  cuts: np.ndarray  # [T], a step votes keep above; nan: it abstains
  notes: list[str]  # T
  fits: list[dict[str, float]]  # T
  population: str  # "" if there are two
  about: dict[str, Any]  # the model's own diagnostics


def fit(scores: np.ndarray, *, mark: float | None, seed: int) -> Joint:
  """Fits the joint model of all steps.

  With z_it a score in units of its step (`pooling.Unit`) and y_it = z_it or
  asinh(z_it), whichever makes the pooled numbers likelier,

    x_i = sum_t w_t (y_it - a_t) / sum_t w_t b_t     over the steps i has

    P(clean_i) = 1 - P(two) P(lower_i | x_i, two)

  x is one population or two, by `populations.compare`, with P(two) =
  1 / (1 + exp(-(BIC_1 - BIC_2 - 2) / 2)). In turn with the two populations, a_t
  is the middle of a step's two means, b_t their distance, and w >= 0 the
  direction in which the two are furthest apart, C w = b, with C the steps'
  covariance on samples of one kind (pooled over both, shrunk to one common
  correlation). So a step that tells nothing gets no weight, and copies of a
  step share the weight of one.

  With a mark, y_it = asinh((s_it - mark) / median |s - mark|): scores spread
  over orders of magnitude around it. Two populations are believed only if the
  mark parts them, and one is judged by the side it lies on.

  Args:
    scores: real numbers [N, T]; what isn't finite is missing.
    mark: the score that parts good from bad; None if there is none.
    seed: for the bootstrap alone.

  Returns:
    The outcome for the samples and for the steps.
  """
  units = tuple(pooling.fit_unit(column, mark) for column in scores.T)
  steps, of = _distinct_steps(scores, units)
  found = _fit_in_order(
    scores[:, steps], tuple(units[step] for step in steps), mark, seed
  )

  def moved(step: int, value: float) -> float:
    """Converts a score of the step that this one copies to this one's unit."""
    mine, theirs = units[step], units[steps[of[step]]]
    if mine is None or theirs is None or mine == theirs:
      return value
    return _unscaled((value - theirs.center) / theirs.scale, mine)

  about = dict(found.about)
  if "weights" in about:
    copies = np.bincount(of)
    about["weights"] = [about["weights"][k] / int(copies[k]) for k in of]
  return found._replace(
    cuts=np.array([moved(t, float(found.cuts[k])) for t, k in enumerate(of)]),
    notes=[found.notes[k] for k in of],
    fits=[
      {
        name: moved(t, value) if name.endswith("mean") else value
        for name, value in found.fits[k].items()
      }
      for t, k in enumerate(of)
    ],
    about=about,
  )


def _distinct_steps(
  scores: np.ndarray, units: tuple[pooling.Unit | None, ...]
) -> tuple[list[int], list[int]]:
  """Finds the steps that are no copies, and for each step [T] the one it is.

  They come in an order that doesn't depend on theirs, nor on their units:
  sums depend on the order of their terms in the last digits, and what is
  fitted round by round would depend on those.
  """
  keys: list[tuple[int, float, int]] = []
  for step, (unit, column) in enumerate(zip(units, scores.T, strict=True)):
    if unit is None or unit.constant:
      keys.append((0, 0.0, step))
      continue
    z = np.clip(unit.z(column), unit.low, unit.high)
    seen = ~np.isnan(z)
    keys.append(
      (int(seen.sum()), round(float(np.sort(z[seen]).mean()), 6), step)
    )
  steps: list[int] = []
  of = [0] * len(keys)
  for *_, step in sorted(keys):
    last = steps[-1] if steps else step
    if not steps or not _are_copies(scores, units, last, step):
      steps.append(step)
    of[step] = len(steps) - 1
  return steps, of


def _are_copies(
  scores: np.ndarray,
  units: tuple[pooling.Unit | None, ...],
  one: int,
  other: int,
) -> bool:
  """True if two steps have the same scores, each in its unit."""
  mine, theirs = units[one], units[other]
  if mine is None or theirs is None or mine.constant or theirs.constant:
    return False
  # Most steps differ among the first few samples already.
  for start in range(0, len(scores), _BLOCK):
    rows = scores[start : start + _BLOCK]
    a, b = mine.z(rows[:, one]), theirs.z(rows[:, other])
    if not np.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True):
      return False
  return True


def _fit_in_order(
  scores: np.ndarray,
  units: tuple[pooling.Unit | None, ...],
  mark: float | None,
  seed: int,
) -> Joint:
  """Fits the joint model; see `fit`."""
  notes = [
    "no finite score" if unit is None else _EQUAL if unit.constant else ""
    for unit in units
  ]
  if all(notes):
    return _nothing(scores, notes)
  found = _fitted(scores[_fitted_rows(scores, units, out=False)], units, mark)
  ever, far = _off_scale(scores, units)
  if ever.sum() >= _FEW_FAR:
    # Or they are the lower population, and all others are one.
    rows = _fitted_rows(scores, units, out=True)
    other = _fitted(scores[rows], units, mark)
    if other.pair and not (found.pair and found.gain >= other.gain):
      found = other
  pool, pair, gain, evidence = (
    found.pool,
    found.pair,
    found.gain,
    found.evidence,
  )
  x, noise = pool(scores)
  seen = ~np.isnan(x)
  two = 0.0
  if pair:
    two = populations.probability_of_two(gain, float(pair.share[0]))
  known = np.isfinite(scores).any(axis=1)
  probability = np.full(len(x), np.nan)
  probability[seen] = 1.0
  draws = np.ones(1)
  if pair:
    odds = pair.log_odds(x[seen], noise[seen])
    lower = np.clip(0.5 * (1 - np.tanh(0.5 * odds)), _SURE, 1 - _SURE)
    probability[seen] = 1 - two * lower
    del odds, lower  # of millions of samples, each array counts
    draws = populations.resampled_shares(
      found.points, pair, *found.unit, _DRAWS, seed
    )
  del noise
  population, cuts = "", np.full(scores.shape[1], np.nan)
  if pair and two > 0.5:
    cuts = _cuts(pool, pair)
    notes = [
      note or ("" if weight else "it doesn't tell the two populations apart")
      for note, weight in zip(notes, pool.weight, strict=True)
    ]
  else:
    population = "one population: all kept"
    if mark is not None and seen.sum() < _FEW:
      population = f"{seen.sum()} samples are too few to fit: cut at {mark:g}"
      probability[seen] = _by_votes(scores[seen], mark)
      cuts = np.where(pool.weight > 0, mark, np.nan)
    elif mark is not None:
      population = _by_the_mark(x[seen], mark, probability, seen)
    probability[far] = _OFF_SCALE_PROBABILITY
    notes = [note or population for note in notes]
    if np.isnan(cuts).all():
      cuts = _one_sided_cuts(scores, notes, population)
  # Steps that tell nothing are all that some samples were seen in.
  untold = known & ~seen
  if untold.any():
    probability[untold] = probability[seen].mean()
    x[untold] = np.median(x[seen])
  quality = pooling.ranked(probability, x)
  about = {
    "probability_of_two": two,
    "bic_gain": _finite(gain),
    "single": evidence.single,
    "pair": evidence.family,
    "separation": evidence.two.separation if evidence.two else None,
    "scale": "asinh" if pool.curved else "linear",
    "above_mark": None if mark is None else float((x[seen] > 0).mean()),
    "clean_fraction": float(np.nanmean(probability)),
    "clean_fraction_draws": [float(share) for share in np.sort(draws)],
    "weights": [float(w) for w in pool.weight / max(pool.weight.sum(), 1e-300)],
    **_dependence(pool),
    "note": "",
  }
  fits = _fits(pool, None if population else pair)
  return Joint(probability, quality, x, cuts, notes, fits, population, about)


def _nothing(scores: np.ndarray, notes: list[str]) -> Joint:
  """Makes the outcome for scores that are all the same in every step."""
  seen = np.isfinite(scores).any(axis=1)
  pooled = np.where(seen, 0.0, np.nan)
  level = np.where(seen, 0.5, np.nan)
  n_steps = scores.shape[1]
  return Joint(
    np.full(len(scores), np.nan),
    pooling.ranked(level, pooled),
    pooled,
    np.full(n_steps, np.nan),
    notes,
    [{} for _ in range(n_steps)],
    "",
    {"n_voters": 0, "effective_voters": 0.0, "note": ""},
  )


class _Fit(NamedTuple):
  """A pool of the steps, and the populations that it shows."""

  pool: pooling.Pool
  evidence: populations.Evidence
  pair: populations.Two | None  # if it is believed
  gain: float  # BIC of one population - BIC of two
  points: populations.Points
  unit: tuple[float, float]  # shift and scale of the points


def _fitted(
  scores: np.ndarray,
  units: tuple[pooling.Unit | None, ...],
  mark: float | None,
) -> _Fit:
  """Fits all steps alike; if that shows two populations, weighs the steps."""
  found = _choose_pool(scores, units, mark)
  for _ in range(_ROUNDS):
    if found.pair is None:
      break
    pool = _weighed(scores, found.pool, found.pair, mark)
    if pool is None:
      break
    again = _compared(scores, pool, mark)
    # The weights are there to tell the two apart; if they don't, they stay.
    further = (again.pair.separation if again.pair else 0) / (
      found.pair.separation
    )
    if further < 1 or not _on_its_side(scores, again, units, mark):
      break
    # Weights that were made to tell two apart are paid for, one by one.
    free = np.count_nonzero(pool.weight) - 1
    gain = max(found.gain, again.gain - free * math.log(len(scores)))
    found = again._replace(gain=gain)
    if further < _LEAST_STEP:
      break
  return found


def _fitted_rows(
  scores: np.ndarray, units: tuple[pooling.Unit | None, ...], *, out: bool
) -> np.ndarray:
  """Chooses rows to fit: on the scale in all steps; evenly by score if many.

  A few samples a million times as far out as all others would be a population
  of their own; with `out` those below are taken in.
  """
  whole = np.ones(len(scores), bool)
  for unit, column in zip(units, scores.T, strict=True):
    if unit is not None and not unit.constant:
      z = unit.z(column)
      whole &= ~(z > unit.high)
      if not out:
        whole &= ~(z < unit.low)
  some = np.isfinite(scores).any(axis=1)
  if whole[some].mean() < 0.9:
    whole[:] = True  # they aren't few
  rows = np.flatnonzero(whole & some)
  x, _ = pooling.even_pool(units, curved=True)(scores)
  rows = rows[np.argsort(x[rows], kind="stable")]
  if len(rows) > FIT_SIZE:
    rows = rows[np.linspace(0, len(rows) - 1, FIT_SIZE).astype(np.int64)]
  return rows


def _compared(
  scores: np.ndarray, pool: pooling.Pool, mark: float | None
) -> _Fit:
  """Compares one population with two in a pool."""
  x, noise = pool(scores)
  seen = ~np.isnan(x)
  evidence, points, unit = populations.compare(x[seen], noise[seen])
  pair = _believed(evidence, mark)
  return _Fit(pool, evidence, pair, evidence.gain, points, unit)


def _choose_pool(
  scores: np.ndarray,
  units: tuple[pooling.Unit | None, ...],
  mark: float | None,
) -> _Fit:
  """Pools all steps alike, on the scale that makes the pooled scores likelier.

  Both are densities of the scores in units of their step: what asinh does to
  a density is its slope, the geometric mean over a sample's steps.

  If that shows one population, steps are also weighed by what they have in
  common (their first principal component): where few steps tell something,
  all alike would drown them.
  """
  found = _compared(scores, pooling.even_pool(units, curved=True), mark)
  if mark is None:
    linear = pooling.even_pool(units, curved=False)
    straight = _compared(scores, linear, mark)
    log_slope, count = np.zeros(len(scores)), np.zeros(len(scores))
    for step, column in enumerate(scores.T):
      z = linear.y(column, step)
      seen = ~np.isnan(z)
      np.add(log_slope, 0.5 * np.log1p(z * z), out=log_slope, where=seen)
      count += seen
    slope = float((log_slope / np.maximum(count, 1)).sum())
    if found.evidence.cost + 2 * slope >= straight.evidence.cost:
      found = straight
  if found.pair is None or found.gain <= populations.LEAST_GAIN:
    common = _in_common(scores, found.pool)
    if common is not None:
      again = _compared(scores, common, mark)
      # One more try is one more chance to see what isn't there.
      again = again._replace(gain=again.gain - math.log(len(scores)))
      if again.gain > populations.LEAST_GAIN and _on_its_side(
        scores, again, units, mark
      ):
        return again
  return found


def _on_its_side(
  scores: np.ndarray,
  found: _Fit,
  units: tuple[pooling.Unit | None, ...],
  mark: float | None,
) -> bool:
  """True if there is a pair whose lower one is below the mark in all steps.

  That is, by the median over all steps alike: some steps, weighed up, may show
  two groups of their own, such as early ones that know nothing.
  """
  if found.pair is None:
    return False
  if mark is None:
    return True
  x, noise = found.pool(scores)
  even, _ = pooling.even_pool(units, curved=True)(scores)
  seen = ~np.isnan(x)
  lower = found.pair.log_odds(x[seen], noise[seen]) < 0
  if lower.all() or not lower.any():
    return True
  low, high = np.median(even[seen][lower]), np.median(even[seen][~lower])
  return bool(low < min(0, -_OFF_MARK * high))


def _in_common(scores: np.ndarray, pool: pooling.Pool) -> pooling.Pool | None:
  """Weighs the pool by the first principal component, no weight below 0."""
  used = np.flatnonzero(pool.weight)
  if len(used) < 3:
    return None
  y = np.stack([pool.y(scores[:, step], step) for step in used.tolist()], 1)
  seen = ~np.isnan(y)
  count = np.maximum(seen.sum(0), 1)
  y = np.where(seen, y - np.where(seen, y, 0).sum(0) / count, 0)
  deviation = np.sqrt((y * y).sum(0) / count)
  y = y / np.where(deviation > 0, deviation, 1)
  both = np.maximum(seen.T.astype(np.float64) @ seen, 1)
  _, vectors = np.linalg.eigh((y.T @ y) / both)
  first = vectors[:, -1]
  first = np.maximum(first if first.sum() >= 0 else -first, 0)
  weight = np.zeros(len(pool.weight))
  weight[used] = first / np.where(deviation > 0, deviation, np.inf)
  return pool._replace(weight=weight) if weight.any() else None


def _believed(
  evidence: populations.Evidence, mark: float | None
) -> populations.Two | None:
  """Returns the pair if it lies apart and, with a mark, on both sides of it."""
  pair = evidence.two
  if pair is None or pair.separation < populations.LEAST_SEPARATION:
    return None
  low, high = pair.mode
  # Of samples that are learned scores are about zero, on either side of it;
  # but a lower group about zero is none of wrong labels.
  if mark is not None and not (
    low < min(0, -_OFF_MARK * high) and high > _NEAR_MARK * low
  ):
    return None
  return pair


def _weighed(
  scores: np.ndarray,
  pool: pooling.Pool,
  pair: populations.Two,
  mark: float | None,
) -> pooling.Pool | None:
  """Weighs the pool's steps by what they tell; None if none tells."""
  n, n_steps = scores.shape
  x, noise = pool(scores)
  seen = ~np.isnan(x)
  upper = np.full(n, 0.5)
  odds = pair.log_odds(x[seen], noise[seen])
  upper[seen] = 0.5 * (1 + np.tanh(0.5 * odds))
  kinds = (1 - upper, upper)
  residuals = np.zeros((2, n, n_steps))
  here = np.zeros((n, n_steps))
  means = np.zeros((2, n_steps))
  for step in range(n_steps):
    y = pool.y(scores[:, step], step)
    there = ~np.isnan(y)
    if not there.any():
      continue
    here[:, step] = there
    for kind, share in enumerate(kinds):
      mine = share * there
      size = mine.sum()
      mean = float(mine[there] @ y[there]) / size if size > 0 else 0.0
      means[kind, step] = mean
      residuals[kind, there, step] = y[there] - mean
  total = sum(
    r.T @ (r * share[:, None])
    for r, share in zip(residuals, kinds, strict=True)
  )
  both = here.T @ here
  covariance = np.divide(total, both, out=np.zeros_like(total), where=both > 0)
  deviation = np.sqrt(np.diag(covariance))
  distance = means[1] - means[0]
  usable = (deviation > 0) & (here.sum(0) > 0)
  if not usable.any():
    return None
  correlation = _correlation(covariance, deviation, usable, n)
  told = np.where(usable, distance / np.where(usable, deviation, 1), 0)
  weight = _nonnegative(correlation, told, usable)
  if not weight.any():
    return None
  covariance = correlation * np.outer(deviation, deviation)
  middle = means.mean(0) if mark is None else np.zeros(n_steps)
  signal = np.where(usable, distance, 1)
  weight = weight / np.where(usable, deviation, 1)
  return pool._replace(
    weight=weight, center=middle, signal=signal, covariance=covariance
  )


def _correlation(covariance, deviation, usable, n):
  """Estimates the steps' correlations, shrunk toward one common to all."""
  scale = np.where(usable, deviation, 1)
  correlation = np.clip(covariance / np.outer(scale, scale), -1, 1)
  np.fill_diagonal(correlation, 1.0)
  steps = int(usable.sum())
  if steps > 1:
    inner = correlation[np.ix_(usable, usable)]
    common = (inner.sum() - steps) / (steps * (steps - 1))
    shrink = steps / (steps + 0.1 * n)
    even = np.full(correlation.shape, max(common, 0.0))
    np.fill_diagonal(even, 1.0)
    correlation = (1 - shrink) * correlation + shrink * even
  return correlation


def _nonnegative(correlation, told, usable):
  """Finds weights w >= 0 with C w = told as far as that goes."""
  weight = np.zeros(len(told))
  active = np.flatnonzero(usable & (told > 0))
  while len(active):
    inner = correlation[np.ix_(active, active)]
    # The ridge shares a weight among copies.
    ridge = inner + 1e-3 * np.eye(len(active))
    found = np.linalg.solve(ridge, told[active])
    if (found > 0).all():
      weight[active] = found
      break
    active = active[found > 0]
  return weight


def _cuts(pool: pooling.Pool, two: populations.Two) -> np.ndarray:
  """Returns the cut of each step, in the scores' own units [T].

  A step votes keep above its cut. The cuts together are the pooled cut: a
  sample above all of them is above that, and one below all of them below.
  """
  low, high = (float(mode) for mode in two.mode)
  grid = np.linspace(low, high, 2001)
  odds = two.log_odds(grid, np.ones(len(grid)))
  rises = np.flatnonzero(odds >= 0)
  cut = grid[rises[0]] if len(rises) else high
  cuts = np.full(len(pool.units), np.nan)
  for step, unit in enumerate(pool.units):
    if unit is not None and pool.weight[step] > 0:
      cuts[step] = _score_at(
        pool, unit, pool.center[step] + cut * pool.signal[step]
      )
  return cuts


def _score_at(pool: pooling.Pool, unit: pooling.Unit, y: float) -> float:
  """Converts y to a score."""
  z = math.sinh(min(max(y, -700.0), 700.0)) if pool.curved else y
  return _unscaled(z, unit)


def _unscaled(z: float, unit: pooling.Unit) -> float:
  """Converts z to a score, as large as a number can be at most."""
  largest = np.finfo(np.float64).max
  with np.errstate(over="ignore"):
    return float(
      np.clip(np.float64(z) * unit.scale + unit.center, -largest, largest)
    )


def _fits(
  pool: pooling.Pool, two: populations.Two | None
) -> list[dict[str, float]]:
  """Returns each step's two locations, in the scores' own units, and weight."""
  if two is None:
    return [{} for _ in pool.units]
  total = float(pool.weight.sum())
  fits: list[dict[str, float]] = []
  for step, unit in enumerate(pool.units):
    if unit is None or unit.constant:
      fits.append({})
      continue
    low, high = (
      _score_at(pool, unit, pool.center[step] + mode * pool.signal[step])
      for mode in two.mode
    )
    share = float(pool.weight[step]) / total
    fits.append({"low_mean": low, "high_mean": high, "weight": share})
  return fits


def _by_the_mark(x, mark, probability, seen):
  """Judges a lone population by its side of the mark; returns a note on it."""
  above = float((x > 0).mean())
  if above >= ABOVE:
    note = f"one population above {mark:g}: all kept"
    if 1 - above < _TOLD_BELOW:
      return note
    # A small group of wrong samples may pass for the population's tail.
    return (
      f"{note}, and {1 - above:.1%} lie below: binarize='threshold',"
      f" threshold={mark:g} takes such out"
    )
  if above <= 1 - BELOW:
    probability[seen] = above
    return f"one population below {mark:g}: all dropped"
  probability[seen] = max(above, 0.5)
  return f"one population around {mark:g}: it says nothing"


def _by_votes(scores: np.ndarray, mark: float) -> np.ndarray:
  """Computes Laplace's rule [n]: (scores above the mark + 1) / (scores + 2)."""
  seen = np.isfinite(scores)
  above = (seen & (scores > mark)).sum(axis=1)
  return (above + 1) / (seen.sum(axis=1) + 2)


def _one_sided_cuts(scores, notes, population):
  """Makes cuts by which a lone population votes the same for all."""
  cuts = np.full(scores.shape[1], np.nan)
  for step, column in enumerate(scores.T):
    if notes[step] == population and "nothing" not in population:
      seen = column[np.isfinite(column)].astype(np.float64)
      cuts[step] = (
        seen.max()
        if "dropped" in population
        else np.nextafter(seen.min(), -math.inf)
      )
  return cuts


def _off_scale(
  scores: np.ndarray, units: tuple[pooling.Unit | None, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Finds samples [N] off the scale below in a step, and in all their steps."""
  always = np.isfinite(scores).any(axis=1)
  ever = np.zeros(len(scores), bool)
  for unit, column in zip(units, scores.T, strict=True):
    if unit is not None:
      z = unit.z(column)
      always &= np.isnan(z) | (z < unit.low)
      ever |= z < unit.low
  return ever, always


def _dependence(pool: pooling.Pool) -> dict[str, float | None]:
  """Counts the steps that count, and the independent ones they are worth."""
  used = np.flatnonzero(pool.weight)
  deviation = np.sqrt(np.diag(pool.covariance)[used])
  correlation = pool.covariance[np.ix_(used, used)] / np.outer(
    deviation, deviation
  )
  n = len(used)
  mean = (correlation.sum() - n) / (n * (n - 1)) if n > 1 else 0.0
  return {
    "n_voters": n,
    "effective_voters": float(n / (1 + (n - 1) * np.clip(mean, 0, 1))),
    "vote_correlation": float(mean) if n > 1 else None,
  }


def _finite(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None
