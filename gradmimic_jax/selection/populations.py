"""One population of numbers, or two? And which does each number belong to?

Everything here works on weighted points in one dimension. A single population
may have any of `_single_costs`' shapes; two populations are two components of
one family. The Bayesian information criterion compares the best of either.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

# A fit looks at no more points than this; more are merged, the middle ones
# first, so that the tails keep their shape.
FIT_POINTS = 320
_TAIL_POINTS = 50  # on either side, never merged

# Degrees of freedom of the kernels: Gaussian, heavy, very heavy tails. The
# Gaussian's are as good as infinite.
_GAUSSIAN, _HEAVY, _HEAVIER = 1e8, 4.0, 1.5
# One pseudo-observation with a tenth of the scale, and half a sample on each
# side: without them a component shrinks onto a single point.
_PRIOR_VARIANCE = 0.01
_PRIOR_SAMPLES = 0.5
_LEAST_SAMPLES = 3.0  # a component with fewer is outliers, no population
_START_SHARES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99)
_START_GAPS = 4  # the widest gaps between points, further places to start at
_STARTS_KEPT = 3
_LEVELS_PER_NOISE = 20  # steps of the noise factor, per factor of e
_GRID = 1001


class Points(NamedTuple):
  """Weighted points, ascending, in units of their own scale."""

  x: np.ndarray  # [n]
  weight: np.ndarray  # [n], how many samples each stands for
  noise: np.ndarray  # [n], factor on the width of a population's kernel


class _Kernels(NamedTuple):
  """Modes and widths below and above, each [..., K, 1]."""

  mode: np.ndarray
  left: np.ndarray
  right: np.ndarray

  def distance(self, x, noise):
    """Measures the distance of x from the mode, in widths."""
    d = (x - self.mode) / noise
    if self.left is self.right:
      return d / self.left
    return d / np.where(d < 0, self.left, self.right)


class _Tails(NamedTuple):
  """Degrees of freedom of K kernels on either side of their modes, [K, 1]."""

  below: np.ndarray
  above: np.ndarray

  @property
  def gaussian(self) -> bool:
    """True if all tails are Gaussian."""
    return all(tail == _GAUSSIAN for side in self for tail in side.flat)

  def at(self, d: np.ndarray) -> np.ndarray:
    """The degrees of freedom that hold at distances [..., K, n]."""
    if self.below is self.above:
      return self.below
    return np.where(d < 0, self.below, self.above)

  def areas(self) -> tuple[np.ndarray, np.ndarray]:
    """Areas below and above kernels that are 1 at their modes and 1 wide."""
    below, above = (_half_areas(tuple(side.flat)) for side in self)
    return below, above


@functools.lru_cache(maxsize=16)
def _half_areas(tails: tuple[float, ...]) -> np.ndarray:
  """[K, 1]; see `_Tails.areas`."""
  return np.array([[_half_area(tail)] for tail in tails])


def _half_area(tail: float) -> float:
  if tail == _GAUSSIAN:
    return 0.5 * math.sqrt(2 * math.pi)
  log_t = math.lgamma((tail + 1) / 2) - math.lgamma(tail / 2)
  return 0.5 * math.sqrt(tail * math.pi) * math.exp(-log_t)


class Two(NamedTuple):
  """Two populations, the lower one first, in the units of the data."""

  mode: np.ndarray  # [2]
  left: np.ndarray  # [2], width below the mode
  right: np.ndarray  # [2], width above it
  share: np.ndarray  # [2]
  tails: _Tails  # degrees of freedom of the kernels

  @property
  def separation(self) -> float:
    """Ashman's D, by the widths on the sides that face each other."""
    between = float(self.mode[1] - self.mode[0])
    facing = math.hypot(float(self.right[0]), float(self.left[1]))
    return math.sqrt(2) * between / facing

  def log_odds(self, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Log odds of the upper population [n], never falling as x rises.

    With f_k the densities and c_k the shares it is log(c_1 f_1 / c_0 f_0)
    between the modes. Where the wider population would win again further out,
    the odds stay what they were: a higher number is never a worse one.

    Args:
      x: numbers [n].
      noise: factors on the widths [n].
    """
    odds = np.empty(len(x))
    level = np.round(_LEVELS_PER_NOISE * np.log(noise)).astype(np.int64)
    for one in np.unique(level):
      here = level == one
      factor = math.exp(one / _LEVELS_PER_NOISE)
      odds[here] = np.interp(x[here], *self._monotone(x[here], factor))
    return odds

  def _kernels(self) -> _Kernels:
    return _Kernels(self.mode[:, None], self.left[:, None], self.right[:, None])

  def _monotone(
    self, x: np.ndarray, factor: float
  ) -> tuple[np.ndarray, np.ndarray]:
    """A grid that spans x, and the log odds on it."""
    low, high = self.mode
    span = 12 * factor * np.maximum(self.left, self.right)
    # Far out the odds hardly change: close to the modes the grid is fine.
    fine = np.linspace(min(self.mode - span), max(self.mode + span), _GRID)
    between = np.linspace(low, high, _GRID)
    ends = np.array([x.min(), x.max()])
    grid = np.unique(np.concatenate([fine, between, ends]))
    noise = np.full(len(grid), factor)
    kernels = self._kernels()
    log_f = _log_density(
      kernels.distance(grid, noise), noise, kernels, self.tails
    )
    log_f += np.log(self.share[:, None])
    odds = log_f[1] - log_f[0]
    inside = np.flatnonzero((grid >= low) & (grid <= high))
    rises = inside[odds[inside] >= 0]
    # The first place from which the upper one is likelier.
    cut = int(rises[0]) if len(rises) else int(inside[-1])
    odds[cut:] = np.maximum.accumulate(odds[cut:])
    odds[: cut + 1] = np.minimum.accumulate(odds[cut::-1])[::-1]
    return grid, odds


class Evidence(NamedTuple):
  """The evidence for one population of numbers, or two."""

  two: Two | None  # the best pair of populations; None if there is no pair
  gain: float  # BIC of the best single population - BIC of the best pair
  cost: float  # BIC of the better of both; to compare scales of the numbers
  single: str  # shape of the best single population
  family: str  # of the best pair


def probability_of_two(gain: float, lower_share: float = 0.0) -> float:
  """Probability that there are two populations, 1 / (1 + exp(-(gain - 2) / 2)).

  That is Bayes' rule, as BIC approximates it, with odds of 1 to e for two
  beforehand: many pairs were tried, and to split what is one costs most of a
  clean data set. Two of which the lower one is the larger get 1 to e^2, that is
  4 in place of 2: mostly wrong labels are rarer, and to see them where there
  are none costs nearly all.

  Args:
    gain: BIC of one population - BIC of two.
    lower_share: of the samples, in the lower population of two.
  """
  least = LEAST_GAIN if lower_share <= 0.5 else 2 * LEAST_GAIN
  return 0.5 * (1 + math.tanh(0.25 * (gain - least)))


LEAST_GAIN = 2.0  # of BIC, from which two populations are the likelier
# Two equal Gaussians closer than this have one peak.
LEAST_SEPARATION = 2.0


def compare(
  x: np.ndarray, noise: np.ndarray
) -> tuple[Evidence, Points, tuple[float, float]]:
  """Compares the best single population with the best pair.

  A component of a pair is a two-piece Student-t: with d = (x - m) / l below
  the mode m and (x - m) / r above, and nu degrees of freedom on that side,

    f(x) ~ (1 + d^2 / nu)^(-(nu + 1) / 2),   p(x) = c_0 f_0(x) + c_1 f_1(x)

  with nu of infinity (Gaussian), 4 or 1.5, in eight combinations; l = r or
  free; the widths of both equal or free. A single population is one such
  component, a two-piece exponential power distribution (Laplace to nearly
  uniform), a uniform, a log-normal or a gamma one, either way round. All are
  fitted by maximum likelihood, with one pseudo-observation of a tenth of the
  scale for each width (Chen and Tan's penalty), and

    BIC = -2 log likelihood + k log(n) n / (n - k - 2)

  with k parameters, of which the shape is one unless it is Gaussian; the last
  factor corrects for small sets.

  The outcome depends on the set of numbers alone, not on their order, and
  follows a shift and a scale.

  Args:
    x: finite numbers [n].
    noise: factors on the widths [n], for numbers that are less sure.

  Returns:
    The evidence; the points that were fitted; and shift and scale, with which
    x = shift + scale * points.x.

  References:
    Schwarz, Estimating the Dimension of a Model, 1978.
    McQuarrie, A small-sample correction for the Schwarz SIC model selection
    criterion, 1999.
    Chen and Tan, Inference for multivariate normal mixtures, 2009.
    Fernandez and Steel, On Bayesian Modeling of Fat Tails and Skewness, 1998.
  """
  points, shift, scale = make_points(x, noise)
  singles = _single_costs(points)
  single = min(singles, key=singles.__getitem__)
  pairs = _pair_costs(points)
  if not pairs:
    return (
      Evidence(None, -math.inf, singles[single], single, ""),
      points,
      (shift, scale),
    )
  family = min(pairs, key=lambda name: pairs[name][0])
  cost, two = pairs[family]
  two = two._replace(
    mode=two.mode * scale + shift,
    left=two.left * scale,
    right=two.right * scale,
  )
  # Densities of x, not of the scaled points.
  jacobian = 2 * float(points.weight.sum()) * math.log(scale)
  best = min(cost, singles[single]) + jacobian
  gain = singles[single] - cost
  return Evidence(two, gain, best, single, family), points, (shift, scale)


def make_points(
  x: np.ndarray, noise: np.ndarray
) -> tuple[Points, float, float]:
  """Makes the points to fit, with shift and scale; see `compare`."""
  order = np.lexsort((noise, x))
  x, noise = x[order], noise[order]
  n = len(x)
  x = _untied(x)
  tail = _TAIL_POINTS
  if n > FIT_POINTS:
    inner = np.linspace(tail, n - tail, FIT_POINTS - 2 * tail + 1)
    starts = np.unique(
      np.r_[np.arange(tail), inner.astype(np.int64), np.arange(n - tail, n)]
    )[:-1]
    starts = np.unique(np.r_[starts, n - 1])
    weight = np.diff(np.r_[starts, n]).astype(np.float64)
    x = np.add.reduceat(x, starts) / weight
    noise = np.exp(np.add.reduceat(np.log(noise), starts) / weight)
  else:
    weight = np.ones(n)
  place = (np.cumsum(weight) - 0.5 * weight) / n
  ten, quarter, middle, three, ninety = np.interp(
    [0.1, 0.25, 0.5, 0.75, 0.9], place, x
  )
  # The middle half, unless it is much narrower than the rest.
  scale = max(
    (three - quarter) / 1.349,
    0.3 * (ninety - ten) / 2.563,
    1e-4 * (x[-1] - x[0]),
  )
  if not scale > 0:
    scale = 1.0
  return Points((x - middle) / scale, weight, noise), float(middle), scale


def resampled_shares(
  points: Points,
  two: Two,
  shift: float,
  scale: float,
  n_draws: int,
  seed: int,
) -> np.ndarray:
  """Draws the upper population's share in bootstrap samples [n_draws].

  Each draw weighs the points anew (Poisson, mean their weight) and fits the
  family of `two` from where it stands.

  Args:
    points: the points that were fitted.
    two: the fit.
    shift: of the points.
    scale: of the points.
    n_draws: their number.
    seed: for the draws.
  """
  rng = np.random.default_rng(seed)
  weight = rng.poisson(points.weight, (n_draws, len(points.x)))
  weight = np.maximum(weight, 1e-9)[:, None, :]

  def each(value):
    return np.broadcast_to(value[None, :, None], (n_draws, 2, 1))

  kernels = _Kernels(
    each((two.mode - shift) / scale),
    each(two.left / scale),
    each(two.right / scale),
  )
  state = _State(kernels, each(two.share))
  skewed = bool((two.left != two.right).any())
  even = not skewed and two.left[0] == two.left[1]
  _, state = _maximise(
    points,
    weight,
    state,
    two.tails,
    skewed=skewed,
    even=even,
    rounds=20,
  )
  return state.share[:, 1, 0]


def _untied(x: np.ndarray) -> np.ndarray:
  """Spreads numbers [n], ascending, that are the same over their surroundings.

  Rounded numbers would be so many spikes, each a population of its own. A
  value that came m times becomes m places between its neighbours' middles, as
  far as the usual gap goes; of only two values each is a population.
  """
  # Numbers that differ by rounding alone are the same.
  start = np.flatnonzero(np.r_[True, np.diff(x) > 1e-9 * (x[-1] - x[0])])
  if len(start) in (len(x), 1, 2):
    return x
  value, size = x[start], np.diff(np.r_[start, len(x)])
  gap = np.diff(value)
  most = 1.5 * float(np.median(gap))
  below = np.minimum(0.5 * np.r_[gap[0], gap], most)
  above = np.minimum(0.5 * np.r_[gap, gap[-1]], most)
  place = np.arange(len(x)) - np.repeat(start, size) + 0.5
  at = place / np.repeat(size, size)
  low, high = np.repeat(value - below, size), np.repeat(value + above, size)
  return np.where(np.repeat(size, size) > 1, low + at * (high - low), x)


class _State(NamedTuple):
  """Parameters of S pairs at once, each [S, 2, 1]."""

  kernels: _Kernels
  share: np.ndarray


_UPPER = np.array([[_GAUSSIAN], [_HEAVIER]])
_WILD_UPPER = _Tails(_UPPER, _UPPER)
_HARD_SAMPLES = _Tails(_UPPER, np.full((2, 1), _GAUSSIAN))


def _log_density(d, noise, kernels, tails):
  """Log of two-piece Student-t densities at distances d; noise is [n]."""
  if tails.gaussian:
    log_t = -0.5 * d * d
  else:
    tail = tails.at(d)
    log_t = -0.5 * (tail + 1) * np.log1p(d * d / tail)
  below, above = tails.areas()
  area = kernels.left * below + kernels.right * above
  return log_t - np.log(area) - np.log(noise)


def _downweights(d, tails):
  """Returns points' weights for the widths: less, the further they are out."""
  if tails.gaussian:
    return 1.0
  tail = tails.at(d)
  return (tail + 1) / (tail + d * d)


def _fitted_kernel(points, belongs, counts, tails, *, skewed, even=False):
  """Mode and widths [..., 1] that make the points likeliest.

  `belongs` [..., n] says how much of each point is the kernel's, `counts` is
  from `_downweights`. With the sums of squares S and the areas a of either
  side, a two-piece kernel's widths are to each other as (S / a)^(1/3); its
  mode is the point at which the sum of a (S / a)^(1/3) over both is least.
  """
  x = points.x
  factor = belongs * counts / points.noise**2
  size = belongs.sum(-1, keepdims=True)
  if not skewed:
    mode = (factor @ x)[..., None] / (factor.sum(-1, keepdims=True) + 1e-300)
    squares = (factor * (x - mode) ** 2).sum(-1, keepdims=True)
    if even:
      squares = squares.sum(-2, keepdims=True) / 2
      size = size.sum(-2, keepdims=True) / 2
    width = np.sqrt((squares + 2 * _PRIOR_VARIANCE) / (size + 2))
    width = np.broadcast_to(width, mode.shape)
    return _Kernels(mode, width, width)
  squares = x * x
  moments = [
    np.cumsum(times, axis=-1)
    for times in (factor, factor * x, factor * squares)
  ]
  all_of = [moment[..., -1:] for moment in moments]
  below = moments[2] - 2 * x * moments[1] + squares * moments[0]
  above = (
    (all_of[2] - moments[2])
    - 2 * x * (all_of[1] - moments[1])
    + squares * (all_of[0] - moments[0])
  )
  areas = tails.areas()
  below = np.cbrt((np.maximum(below, 0) + _PRIOR_VARIANCE) / areas[0])
  above = np.cbrt((np.maximum(above, 0) + _PRIOR_VARIANCE) / areas[1])
  both = areas[0] * below + areas[1] * above
  best = both.argmin(-1)[..., None]
  at = np.arange(0, both.size, both.shape[-1]) + best.ravel()
  below, above, both = (
    values.ravel()[at].reshape(best.shape) for values in (below, above, both)
  )
  common = np.sqrt(both / (size + 2))
  return _Kernels(x[best], common * below, common * above)


def _maximise(
  points, weight, state, tails, *, skewed=False, even=False, rounds
):
  """Expectation maximisation of S pairs at once, and their likelihoods [S].

  `weight` is [n], or [S, 1, n] for pairs with weights of their own.
  """
  n = weight.sum(-1, keepdims=True)
  before = None
  for _ in range(rounds):
    d = state.kernels.distance(points.x, points.noise)
    log_f = _log_density(d, points.noise, state.kernels, tails)
    log_f += np.log(state.share)
    top = log_f.max(1, keepdims=True)
    each = np.exp(log_f - top)
    total = each.sum(1, keepdims=True)
    likelihood = (weight * (top + np.log(total))).sum(-1)[:, 0]
    if (
      before is not None
      and (np.abs(likelihood - before) < 1e-6 * n.max()).all()
    ):
      break
    before = likelihood
    belongs = each / total * weight
    counts = _downweights(d, tails)
    kernels = _fitted_kernel(
      points, belongs, counts, tails, skewed=skewed, even=even
    )
    size = belongs.sum(-1, keepdims=True) + _PRIOR_SAMPLES
    state = _State(kernels, size / size.sum(1, keepdims=True))
  return likelihood, state


def _pair_costs(points: Points) -> dict[str, tuple[float, Two]]:
  """The BIC of the best pair of each family, by its name."""
  n = float(points.weight.sum())
  state = _starts(points)
  if state is None:
    return {}
  likelihood, state = _maximise(
    points, points.weight, state, _tails(_GAUSSIAN), rounds=25
  )
  kept = _distinct(likelihood, state)
  state = _State(
    _Kernels(*(value[kept] for value in state.kernels)), state.share[kept]
  )
  found: dict[str, tuple[float, Two]] = {}

  def fit(name, parameters, state, tails, **shape):
    likelihood, fitted = _maximise(
      points, points.weight, state, tails, rounds=120, **shape
    )
    least = fitted.share.min(axis=(1, 2)) * n
    likelihood = np.where(least < _LEAST_SAMPLES, -np.inf, likelihood)
    best = int(likelihood.argmax())
    if likelihood[best] > -np.inf:
      mode, left, right = (value[best, :, 0] for value in fitted.kernels)
      order = np.argsort(mode, kind="stable")
      share = fitted.share[best, :, 0][order]
      two = Two(mode[order], left[order], right[order], share, tails)
      cost = _bic(float(likelihood[best]), parameters, n)
      found[name] = cost, two
    return fitted

  plain, heavy = _tails(_GAUSSIAN), _tails(_HEAVY)
  fit("Gaussians of one width", 4, state, plain, even=True)
  gaussians = fit("Gaussians", 5, state, plain)
  skewed = fit("skewed Gaussians", 7, gaussians, plain, skewed=True)
  fit("t4", 6, gaussians, heavy)
  fit("t1.5", 6, gaussians, _tails(_HEAVIER))
  fit("skewed t4", 8, skewed, heavy, skewed=True)
  # Hard samples of the upper population reach far down.
  fit("skewed, upper t1.5", 8, skewed, _WILD_UPPER, skewed=True)
  fit("skewed, upper t1.5 below", 8, skewed, _HARD_SAMPLES, skewed=True)
  return found


def _tails(tail: float) -> _Tails:
  """Returns the same tail for all sides."""
  both = np.full((2, 1), tail)
  return _Tails(both, both)


def _kernel_name(tail: float) -> str:
  return "Gaussian" if tail == _GAUSSIAN else f"t{tail:g}"


def _starts(points: Points) -> _State | None:
  """Makes pairs cut at some quantiles and at the widest gaps."""
  x, weight = points.x, points.weight
  n = weight.sum()
  place = (np.cumsum(weight) - 0.5 * weight) / n
  widest = np.argsort(-np.diff(x), kind="stable")[:_START_GAPS]
  cuts = np.r_[
    np.interp(_START_SHARES, place, x), 0.5 * (x[widest] + x[widest + 1])
  ]
  low = x <= cuts[:, None]
  size = np.stack([(low * weight).sum(1), (~low * weight).sum(1)], 1)
  low = low[(size >= _LEAST_SAMPLES).all(1)]
  if not len(low):
    return None
  belongs = np.stack([low, ~low], 1) * weight
  kernels = _fitted_kernel(
    points, belongs, 1.0, _tails(_GAUSSIAN), skewed=False
  )
  return _State(kernels, belongs.sum(-1, keepdims=True) / n)


def _distinct(likelihood: np.ndarray, state: _State) -> np.ndarray:
  """Finds the indices of the likeliest pairs that differ."""
  kept: list[int] = []
  for one in np.argsort(-likelihood, kind="stable"):
    if all(
      np.abs(state.kernels.mode[one] - state.kernels.mode[other]).max() > 0.05
      or np.abs(state.share[one] - state.share[other]).max() > 0.02
      for other in kept
    ):
      kept.append(int(one))
    if len(kept) == _STARTS_KEPT:
      break
  return np.array(kept)


def _single_costs(points: Points) -> dict[str, float]:
  """The BIC of a single population, by its shape."""
  n = float(points.weight.sum())
  costs = {}
  for tail in (_GAUSSIAN, _HEAVY, _HEAVIER):
    for skewed in (False, True):
      parameters = 2 + skewed + (tail != _GAUSSIAN)
      name = ("skewed " if skewed else "") + _kernel_name(tail)
      likelihood = _single_likelihood(points, tail, skewed)
      costs[name] = _bic(likelihood, parameters, n)
  for power in (1.0, 4.0, 12.0):
    for skewed in (False, True):
      name = ("skewed " if skewed else "") + f"power {power:g}"
      likelihood = _power_likelihood(points, power, skewed)
      costs[name] = _bic(likelihood, 3 + skewed, n)
  for name, likelihood in _one_sided_likelihoods(points).items():
    costs[name] = _bic(likelihood, 3, n)
  width = float(np.ptp(points.x))
  if width > 0:
    costs["uniform"] = _bic(-n * math.log(width), 3, n)
  return costs


def _bic(log_likelihood: float, parameters: int, n: float) -> float:
  """See `compare`; infinite for more parameters than n can tell."""
  left = n - parameters - 2
  if left <= 0:
    return math.inf
  return -2 * log_likelihood + parameters * math.log(n) * n / left


def _single_likelihood(points: Points, tail: float, skewed: bool) -> float:
  kernels = _Kernels(np.zeros((1, 1)), np.ones((1, 1)), np.ones((1, 1)))
  both = np.full((1, 1), tail)
  tails = _Tails(both, both)
  d = kernels.distance(points.x, points.noise)
  before = -math.inf
  for _ in range(40):
    counts = _downweights(d, tails)
    kernels = _fitted_kernel(
      points, points.weight[None, :], counts, tails, skewed=skewed
    )
    d = kernels.distance(points.x, points.noise)
    log_f = _log_density(d, points.noise, kernels, tails)
    likelihood = float((log_f @ points.weight)[0])
    if tail == _GAUSSIAN or likelihood - before < 1e-6 * points.weight.sum():
      break
    before = likelihood
  return likelihood


def _power_likelihood(points: Points, power: float, skewed: bool) -> float:
  """Log likelihood of a density that falls as exp(-|d|^power / power).

  The widths have a closed form for each mode; the mode is one of the points.
  """
  x, weight = points.x, points.weight
  n = float(weight.sum())
  candidates = np.unique(np.linspace(0, len(x) - 1, 49).astype(np.int64))
  d = x - x[candidates][:, None]
  sums = np.abs(d) ** power * weight
  below = np.where(d < 0, sums, 0).sum(1) + 1e-300
  above = np.where(d >= 0, sums, 0).sum(1) + 1e-300
  log_norm = (1 / power - 1) * math.log(power) + math.lgamma(1 / power)
  if skewed:
    roots = below ** (1 / (power + 1)) + above ** (1 / (power + 1))
    log_width = (1 + 1 / power) * np.log(roots) - math.log(n) / power
  else:
    log_width = math.log(2) + (np.log(below + above) - math.log(n)) / power
  return float((-n * (log_width + 1 / power + log_norm)).max())


def _one_sided_likelihoods(points: Points) -> dict[str, float]:
  """Likelihoods of shifted log-normal and gamma ones, the better way round."""
  n = float(points.weight.sum())
  best = {"log-normal": -math.inf, "gamma": -math.inf}
  offsets = np.geomspace(1e-3, 30, 16)[:, None]
  for sign in (1, -1):
    x, weight = (sign * points.x)[::sign], points.weight[::sign]
    v = x - x[0] + offsets
    log_v = np.log(v)
    mean_log = log_v @ weight / n
    variance = (log_v - mean_log[:, None]) ** 2 @ weight / n
    log_normal = -n * (0.5 * np.log(2 * math.pi * variance) + 0.5 + mean_log)
    mean = v @ weight / n
    s = np.log(mean) - mean_log
    shape = (3 - s + np.sqrt((s - 3) ** 2 + 24 * s)) / (12 * s)
    log_gamma = np.array([math.lgamma(k) for k in shape])
    gamma = n * (
      (shape - 1) * mean_log - log_gamma - shape * np.log(mean / shape) - shape
    )
    best["log-normal"] = max(best["log-normal"], float(log_normal.max()))
    best["gamma"] = max(best["gamma"], float(gamma.max()))
  return best
