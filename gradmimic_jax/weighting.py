"""Weightings: scores `[B]` to weights `[B]` that sum to 1 over real samples.

(One may skip a step by weights that are all 0: `positive(otherwise="skip")`.)

A weighting is any callable `(scores [B], mask [B] or None, step [] or None) ->
weights [B]`. One that is a softmax can say so by a method `temperature_at(step)
-> []`: the streaming engine then needs one pass. Samples outside the mask get
weight 0 and influence nothing; when the mask is empty all weights are 0.
Weights are constants of the step: no gradient flows through them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gradmimic_jax import _mesh, _tree, _validate

# Bisection steps and the range of log(temperature / score spread) they search.
# exp(-87) is the smallest of float32: beside one far outlier, the temperature
# that tells the others apart is a tiny part of the spread. 40 halvings leave
# 99 / 2**40, far below float32 resolution.
_BISECTIONS = 40
_LOG_TEMPERATURES = (-87.0, 12.0)


class Weighting(Protocol):
  """`(scores [B], mask [B] or None, step [] or None) -> weights [B]`."""

  def __call__(
    self,
    scores: jax.Array,
    mask: jax.Array | None = None,
    step: jax.Array | None = None,
  ) -> jax.Array:
    """The weights `[B]`."""


@dataclasses.dataclass(frozen=True)
class _Softmax:
  temperature: Any

  def __call__(self, scores, mask=None, step=None):
    scores, mask = _taken(scores, mask)
    return _softmax(scores, mask, self.temperature_at(step))

  def temperature_at(self, step):
    if not callable(self.temperature):
      return jnp.asarray(self.temperature)
    if step is None:
      raise ValueError(
        "softmax has a temperature schedule but no step came; pass step= with"
        " the number of updates done so far."
      )
    return jnp.asarray(self.temperature(step))


def softmax(temperature: float | jax.Array | Callable[[Any], Any]) -> Weighting:
  """Softmax over the batch, the paper's weighting.

  `w_i = exp(m_i / tau) / sum_j exp(m_j / tau)`

  Args:
    temperature: `tau` > 0, in units of the score; or an optax schedule, a
      function of the number of updates done so far. Lower concentrates the
      weight on high scores.

  Returns:
    A weighting.

  Raises:
    ValueError: temperature is not above 0; or, when called, a schedule without
      a step.

  Example:
    >>> import jax.numpy as jnp
    >>> softmax(1.0)(jnp.log(jnp.array([1.0, 1.0, 2.0]))).round(2)
    Array([0.25, 0.25, 0.5 ], dtype=float32)

  References:
    Huang et al., `arXiv:2501.06708 <https://arxiv.org/abs/2501.06708>`_,
    section 3, stage 1.
  """
  if not callable(temperature):
    _validate.positive_scalar("temperature", temperature)
  return _Softmax(temperature)


@dataclasses.dataclass(frozen=True)
class _EssSoftmax:
  fraction: Any

  def __call__(self, scores, mask=None, step=None):
    del step
    scores, mask = _taken(scores, mask)
    # The search needs no order, but sorting scores that are divided over
    # devices brings all of them to each device: one exchange, where every sum
    # of the search would be another.
    ordered = jnp.sort(_mesh.whole(jnp.where(mask, scores, -jnp.inf)))
    count = jnp.sum(mask, dtype=jnp.int32)
    there = jnp.arange(ordered.size) >= ordered.size - count
    low = jnp.min(jnp.where(there, ordered, jnp.inf))
    high = jnp.max(jnp.where(there, ordered, -jnp.inf))
    # In halves: the spread of huge scores may be out of range. Equal scores
    # (or none at all) have none; any temperature does.
    spread = jnp.where(high > low, high / 2 - low / 2, 1)

    def unit(scores, mask):
      scaled = jnp.where(mask, (scores / 2 - high / 2) / spread, 0)
      return jnp.where(jnp.isfinite(scaled), scaled, 0)

    units = unit(ordered, there)
    fraction = jnp.asarray(self.fraction, units.dtype)
    target = fraction * count.astype(units.dtype)

    def halve(_, bracket):
      cold, hot = bracket
      middle = (cold + hot) / 2
      size = effective_sample_size(_softmax(units, there, jnp.exp(middle)))
      # The effective sample size grows with the temperature.
      too_hot = size > target
      return jnp.where(too_hot, cold, middle), jnp.where(too_hot, middle, hot)

    bracket = tuple(
      _mesh.together(jnp.asarray(x, units.dtype), units, fraction)
      for x in _LOG_TEMPERATURES
    )
    _, hot = jax.lax.fori_loop(0, _BISECTIONS, halve, bracket)
    return _softmax(unit(scores, mask), mask, jnp.exp(hot))


def ess_softmax(fraction: float) -> Weighting:
  """Softmax at the temperature whose effective sample size is a given share.

  `w = softmax(m / tau)` with `tau` such that `(1 / sum_i w_i^2) / B = fraction`

  Scores scale with the gradient norm, so a temperature tuned for one model is
  useless for the next; a fraction carries over. The temperature is found by
  bisection inside jit, for each batch anew.

  Args:
    fraction: in (0, 1], of the real samples. 1 weights all alike. When more
      samples than that tie for the highest score, they share the weight.

  Returns:
    A weighting.

  Raises:
    ValueError: fraction outside (0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> weights = ess_softmax(0.5)(jnp.arange(8.0))
    >>> round(float(effective_sample_size(weights)), 3)
    4.0
  """
  _validate.fraction("fraction", fraction)
  return _EssSoftmax(fraction)


@dataclasses.dataclass(frozen=True)
class _TopFraction:
  fraction: Any

  def __call__(self, scores, mask=None, step=None):
    del step
    scores, mask = _taken(scores, mask)
    wanted = jnp.asarray(self.fraction, jnp.float32) * _count(mask, jnp.float32)
    count = jnp.maximum(jnp.round(wanted).astype(jnp.int32), 1)
    # Ranks by a stable sort: ties go to the earlier sample, never to more
    # samples than were asked for.
    keys = _mesh.whole(jnp.where(mask, -scores, jnp.inf))
    order = jnp.argsort(keys, stable=True)
    ranks = jnp.zeros(order.shape, jnp.int32)
    ranks = ranks.at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    ranks = _mesh.rows_like(ranks, scores)
    return _share_alike(mask & (ranks < count), scores.dtype)


def top_fraction(f: float) -> Weighting:
  """Equal weights on the highest scores, none elsewhere.

  `w_i = 1/k` for the `k = max(1, round(f n))` highest of n real samples

  Args:
    f: in (0, 1].

  Returns:
    A weighting. Ties go to the earlier sample.

  Raises:
    ValueError: f outside (0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> top_fraction(0.5)(jnp.array([3.0, 1.0, 2.0, 0.0]))
    Array([0.5, 0. , 0.5, 0. ], dtype=float32)
  """
  _validate.fraction("f", f)
  return _TopFraction(f)


_OTHERWISE = ("uniform", "skip")


@dataclasses.dataclass(frozen=True)
class _Positive:
  otherwise: str

  def __call__(self, scores, mask=None, step=None):
    del step
    scores, mask = _taken(scores, mask)
    chosen = mask & (scores > 0)
    if self.otherwise == "uniform":
      chosen = jnp.where(jnp.any(chosen), chosen, mask)
    return _share_alike(chosen, scores.dtype)


def positive(*, otherwise: str = "uniform") -> Weighting:
  """Equal weights on positive scores.

  `w_i = [m_i > 0] / sum_j [m_j > 0]`

  Args:
    otherwise: the weights of a batch without a positive score: `"uniform"`
      weights all alike, `"skip"` gives weight 0 to all, so that the gradient is
      0 (momentum and weight decay of an optimizer still move the parameters).

  Returns:
    A weighting.

  Raises:
    ValueError: otherwise is neither of the two.

  Example:
    >>> import jax.numpy as jnp
    >>> positive()(jnp.array([1.0, -1.0, 2.0, -3.0]))
    Array([0.5, 0. , 0.5, 0. ], dtype=float32)

  References:
    Sedova et al., `arXiv:2306.04502 <https://arxiv.org/abs/2306.04502>`_
    (AGRA), where such a step is skipped.
  """
  _validate.choice("otherwise", otherwise, _OTHERWISE)
  return _Positive(otherwise)


@dataclasses.dataclass(frozen=True)
class _Proportional:
  def __call__(self, scores, mask=None, step=None):
    del step
    scores, mask = _taken(scores, mask)
    largest = jnp.max(jnp.where(mask, scores, 0), initial=0)
    # The sum of huge scores may be out of range, and so may its inverse, which
    # XLA multiplies by. A barrier, or it may take the factor out of the sum.
    small = 1 / (8 * scores.size)
    factor = jnp.where(largest > 1, small, 1).astype(scores.dtype)
    parts = jnp.where(mask, jnp.maximum(scores, 0), 0) * factor
    parts = jax.lax.optimization_barrier(parts)
    # Devices may take the smallest numbers of all for 0.
    some = largest >= jnp.finfo(largest.dtype).tiny
    parts = jnp.where(some, parts, mask.astype(scores.dtype))
    total = jnp.sum(parts)
    return parts / jnp.where(total > 0, total, 1)


def proportional() -> Weighting:
  """Weights in proportion to the positive scores; uniform if there are none.

  `w_i = max(m_i, 0) / sum_j max(m_j, 0)`

  For scores that are weights already, up to a factor, as those of
  `gradmimic_jax.matching` are.

  Returns:
    A weighting.

  Example:
    >>> import jax.numpy as jnp
    >>> proportional()(jnp.array([1.0, -1.0, 3.0]))
    Array([0.25, 0.  , 0.75], dtype=float32)
  """
  return _Proportional()


@dataclasses.dataclass(frozen=True)
class _Uniform:
  def __call__(self, scores, mask=None, step=None):
    del step
    scores, mask = _taken(scores, mask)
    return _share_alike(mask, scores.dtype)

  def temperature_at(self, step):
    del step
    return jnp.asarray(jnp.inf)


def uniform() -> Weighting:
  """The plain mean: `w_i = 1/n` for n real samples.

  Returns:
    A weighting.

  Example:
    >>> import jax.numpy as jnp
    >>> uniform()(jnp.zeros(4))
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
  """
  return _Uniform()


@dataclasses.dataclass(frozen=True)
class _Warmup:
  weighting: Weighting
  steps: int

  def __call__(self, scores, mask=None, step=None):
    scores, mask = _taken(scores, mask)
    if step is None:
      raise ValueError(
        "warmup has to know when it is over but no step came; pass step= with"
        " the number of updates done so far."
      )
    return jnp.where(
      jnp.asarray(step) < self.steps,
      uniform()(scores, mask, step),
      self.weighting(scores, mask, step),
    )


def warmup(weighting: Weighting, *, steps: int) -> Weighting:
  """Plain steps first: uniform weights until `steps` updates are done.

  `w_i = 1/n` for n real samples while step < steps, then those of `weighting`.
  Scores are found all the same. Streaming takes two passes for it.

  Args:
    weighting: the weighting after that.
    steps: updates to wait for, 0 or more.

  Returns:
    A weighting; it must be called with a step.

  Raises:
    ValueError: steps is negative; or, when called, there is no step.
    TypeError: `weighting` is no weighting.

  Example:
    >>> import jax.numpy as jnp
    >>> late = warmup(top_fraction(0.25), steps=100)
    >>> scores = jnp.array([3.0, 1.0, 2.0, 0.0])
    >>> late(scores, step=99)
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    >>> late(scores, step=100)
    Array([1., 0., 0., 0.], dtype=float32)
  """
  check(weighting)
  if steps < 0:
    raise ValueError(f"steps is {steps}; expected 0 or more.")
  return _Warmup(weighting, steps)


def named(
  weighting: str | Weighting,
  *,
  temperature: Any = None,
  fraction: Any = None,
) -> Weighting:
  """Returns a weighting by its name and its number, or the one that came.

  `optax.inject_hyperparams` hands over names and numbers as they are, and
  numbers as arrays; it takes a callable for a schedule.

  Args:
    weighting: `"softmax"`, `"ess_softmax"`, `"top_fraction"`, `"positive"`,
      `"proportional"` or `"uniform"`; or a weighting.
    temperature: of `"softmax"`, as `softmax` takes it; None is 1.
    fraction: of `"ess_softmax"` or `"top_fraction"`, which need one.

  Returns:
    A weighting.

  Raises:
    ValueError: an unknown name, or a number that is out of range, missing, or
      not of this weighting.
    TypeError: neither a name nor a weighting.

  Example:
    >>> import jax.numpy as jnp
    >>> named("top_fraction", fraction=0.5)(jnp.array([1.0, 2.0]))
    Array([0., 1.], dtype=float32)
  """
  numbers = {"temperature": temperature, "fraction": fraction}
  given = {name: x for name, x in numbers.items() if x is not None}
  if not isinstance(weighting, str):
    check(weighting)
    _only(given, None, "made already")
    return weighting
  _validate.choice("weighting", weighting, _NAMED)
  factory, number = _NAMED[weighting]
  if number == "temperature":
    given.setdefault(number, 1.0)
  _only(given, number, repr(weighting))
  return factory(*given.values())


def _only(given, number, shown):
  """Raises unless exactly the number that the weighting takes is given."""
  if set(given) != ({number} if number else set()):
    takes = f"{number}=" if number else "neither temperature= nor fraction="
    raise ValueError(
      f"weighting is {shown} with {', '.join(given) or 'no number'}; expected"
      f" {takes}."
    )


_NAMED: dict[str, tuple[Callable[..., Weighting], str | None]] = {
  "softmax": (softmax, "temperature"),
  "ess_softmax": (ess_softmax, "fraction"),
  "top_fraction": (top_fraction, "fraction"),
  "positive": (positive, None),
  "proportional": (proportional, None),
  "uniform": (uniform, None),
}


def effective_sample_size(weights: jax.Array) -> jax.Array:
  """The number of samples that the weights amount to, after Kish.

  `(sum_i w_i)^2 / sum_i w_i^2`, which is `1 / sum_i w_i^2` for weights that sum
  to 1: n for n equal weights, 1 for a single one, 0 when all are zero.

  Args:
    weights: `[B]`.

  Returns:
    The effective sample size, `[]`.

  Example:
    >>> import jax.numpy as jnp
    >>> float(effective_sample_size(jnp.array([0.5, 0.5, 0.0])))
    2.0
  """
  squares = jnp.sum(jnp.square(weights))
  total = jnp.square(jnp.sum(weights))
  return jnp.where(squares > 0, total / jnp.where(squares > 0, squares, 1), 0)


def check(weighting: Any) -> None:
  """Raises TypeError unless this may be a weighting."""
  factories = (
    softmax,
    ess_softmax,
    top_fraction,
    positive,
    proportional,
    uniform,
    warmup,
  )
  _validate.made(
    "weighting", weighting, factories, "gm.softmax(0.5) or gm.uniform()"
  )


def guarded(
  weighting: Weighting,
  scores: jax.Array,
  mask: jax.Array,
  step: jax.Array | None,
) -> jax.Array:
  """Computes weights over the finite real samples, 0 elsewhere; no gradient.

  Args:
    weighting: any weighting.
    scores: `[B]`, NaN or infinite where a sample is broken.
    mask: bool `[B]`, the samples that may count.
    step: number of updates done so far, or None.

  Returns:
    Weights `[B]`.
  """
  scores = jnp.where(mask, jax.lax.stop_gradient(scores), 0)
  weights = jnp.asarray(weighting(scores, mask, step))
  if weights.shape != scores.shape:
    raise ValueError(
      f"weighting returned shape {weights.shape}; expected {scores.shape}, one"
      " weight for each sample."
    )
  return jax.lax.stop_gradient(jnp.where(mask, weights.astype(scores.dtype), 0))


def in_range(temperature: jax.Array, dtype: Any) -> jax.Array:
  """Raises a temperature to what `dtype` can divide by; inf stays so."""
  return jnp.maximum(temperature.astype(dtype), jnp.finfo(dtype).tiny)


def relative(
  scores: jax.Array, highest: jax.Array, temperature: jax.Array
) -> jax.Array:
  """Computes `exp((scores - highest) / temperature)`, for any finite scores.

  Args:
    scores: finite, or -inf.
    highest: finite, at least as high.
    temperature: as of `in_range`.

  Returns:
    Numbers in [0, 1].
  """
  # Subtract before dividing: a tiny temperature then gives exp(-inf) = 0, not
  # inf - inf. A schedule may end at 0; the limit there is the maximum. A
  # difference that is out of range is the double of that of the halves.
  gaps = scores - highest
  halves = (scores / 2 - highest / 2) / temperature
  within = jnp.isfinite(gaps) | ~jnp.isfinite(scores)
  return jnp.exp(jnp.where(within, gaps / temperature, 2 * halves))


def _softmax(scores, mask, temperature):
  highest = jnp.max(jnp.where(mask, scores, -jnp.inf))
  temperature = in_range(temperature, scores.dtype)
  scores = jnp.where(mask, scores, highest)
  weights = jnp.where(mask, relative(scores, highest, temperature), 0)
  total = jnp.sum(weights)
  return weights / jnp.where(total > 0, total, 1)


def _taken(scores, mask):
  """Returns scores `[B]`, float32 or wider, and the mask."""
  scores = jnp.asarray(scores)
  if scores.ndim != 1:
    raise ValueError(
      f"a weighting got scores of shape {scores.shape}; expected [B]. If"
      " optax.inject_hyperparams took it for a schedule, name it instead"
      " (weighting='softmax', temperature=0.5), or add"
      " static_args=('weighting',)."
    )
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    scores = scores.astype(jnp.float32)
  return _tree.to_accumulate(scores), _validate.padding_mask(
    mask, scores.size, scores
  )


def _count(mask, dtype):
  return jnp.sum(mask.astype(dtype))


def _share_alike(chosen, dtype):
  chosen = chosen.astype(dtype)
  return chosen / jnp.maximum(jnp.sum(chosen), 1)
