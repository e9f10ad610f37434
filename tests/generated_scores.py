"""Generated score matrices with a known truth, and what is expected of them.

  python tests/generated_scores.py 2000 0

makes that many matrices from that seed, selects from each, and prints which
break an expectation, and how many are right, wrong, and undecidable: in which
one who knows the generating densities, but not that there are two populations,
would break an expectation too.
"""

import functools
import sys
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from gradmimic_jax.selection import populations

# Noise of mean 0 and variance 1, by its shape.
SHAPES = {
  "gaussian": stats.norm(),
  "laplace": stats.laplace(scale=0.5**0.5),
  "t4": stats.t(4, scale=0.5**0.5),
  "gamma": stats.gamma(3, loc=-(3**0.5), scale=3**-0.5),
  "lognormal": stats.lognorm(
    0.5,
    loc=-(np.exp(0.125) / np.sqrt(np.exp(0.5) - np.exp(0.25))),
    scale=1 / np.sqrt(np.exp(0.5) - np.exp(0.25)),
  ),
}


class Scores(NamedTuple):
  """A matrix and what it was made of."""

  scores: np.ndarray  # [N, T]
  wrong: np.ndarray  # [N]
  log_odds: np.ndarray  # [N], of being clean, by the generating distribution
  separation: float  # of the best linear rule over all steps, in deviations
  skewed: bool
  gain: float  # see `gain_of_truth`; nan if no label is wrong
  about: str


def make(seed: int) -> Scores:
  """One matrix, drawn from all kinds."""
  rng = np.random.default_rng(seed)
  n = round(np.exp(rng.uniform(np.log(10), np.log(3000))))
  t = int(rng.choice([1, 1, 2, 3, 5, 8, 20, 50]))
  shape = str(rng.choice(list(SHAPES)))
  below = bool(rng.random() < 0.5)  # skewed the other way
  wrong_share = float(
    rng.choice([0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 0.97])
  )
  apart = float(rng.choice([0, 0.5, 1, 2, 3, 4, 5, 6, 10, 30]))
  shared = float(rng.choice([0, 0, 0, 0.3, 0.7]))
  missing = float(rng.choice([0, 0, 0, 0.1, 0.4]))
  n_wrong = round(wrong_share * n) if apart else 0
  wrong = rng.permutation(n) < n_wrong
  noise = SHAPES[shape]
  sign = -1 if below else 1
  if shared:
    shape, noise, sign = "gaussian", SHAPES["gaussian"], 1
  own = rng.normal(size=(n, 1))
  e = sign * noise.rvs(size=(n, t), random_state=rng)
  e = np.sqrt(shared) * own + np.sqrt(1 - shared) * e
  x = e - apart * wrong[:, None]
  seen = rng.random((n, t)) >= missing
  # The evidence of each step, or of the mean where steps share noise.
  k = np.maximum(seen.sum(1), 1)
  if shared:
    mean = np.where(seen, x, 0).sum(1) / k
    variance = shared + (1 - shared) / k
    odds = (mean * apart + apart**2 / 2) / variance
    odds = np.where(seen.any(1), odds, 0)
  else:
    each = noise.logpdf(sign * x) - noise.logpdf(sign * (x + apart))
    odds = np.where(seen, np.clip(np.nan_to_num(each), -700, 700), 0).sum(1)
  prior = (n - n_wrong) / n
  with np.errstate(divide="ignore"):
    odds = odds + np.log(prior) - np.log(1 - prior)
  deviation = np.sqrt(shared + (1 - shared) / (t * (1 - missing)))
  scale = 10.0 ** rng.uniform(-3, 3, t)
  scores = np.where(seen, (x + rng.normal(0, 3, t)) * scale, np.nan)
  about = (
    f"seed {seed}: N {n} T {t} {shape}{'-' if below else ''} wrong"
    f" {wrong_share} apart {apart} shared {shared} missing {missing}"
  )
  skewed = shape in ("gamma", "lognormal")
  gain = np.nan
  if n_wrong:
    some = seen.any(1)
    pooled = (np.where(seen, x, 0).sum(1) / k)[some]
    wide = np.sqrt(shared + (1 - shared) / k)[some]
    log_f = np.stack(
      [
        _log_density(shape, sign, pooled - center, k[some], wide)
        for center in (0, -apart)
      ]
    )
    relative = wide / np.sqrt(shared + (1 - shared) / t)
    gain = gain_of_truth(shape, log_f, 1 - prior, pooled, relative)
  separation = apart / deviation
  return Scores(scores, wrong, odds, separation, skewed, gain, about)


def _log_density(shape, sign, x, count, wide) -> np.ndarray:
  """Of the means [n] of `count` [n] steps' noise; Gaussian ones are `wide`."""
  if shape == "gaussian":
    return stats.norm.logpdf(x, scale=wide)
  log_f = np.empty(len(x))
  for one in np.unique(count):
    here = count == one
    if one == 1:
      log_f[here] = SHAPES[shape].logpdf(sign * x[here])
    else:
      grid, values = _density_of_sum(shape, int(one))
      log_f[here] = np.interp(sign * x[here] * one, grid, values) + np.log(one)
  return log_f


@functools.lru_cache(300)
def _density_of_sum(shape: str, count: int) -> tuple[np.ndarray, np.ndarray]:
  """A grid, and on it the log density of a sum, by its Fourier transform."""
  size, step = 2**15, 0.01
  grid = (np.arange(size) - size // 2) * step
  mass = np.diff(SHAPES[shape].cdf(np.r_[grid, grid[-1] + step] - step / 2))
  of_sum = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(mass)) ** count, size)
  return grid, np.log(np.maximum(np.fft.fftshift(of_sum) / step, 1e-14))


def gain_of_truth(
  shape: str,
  log_f: np.ndarray,
  wrong_share: float,
  pooled: np.ndarray,
  noise: np.ndarray,
) -> float:
  """How much likelier the generating pair is than any single population.

  BIC of the likeliest single population that the library knows - BIC of the
  generating pair, both of the mean over a sample's steps. The pair pays for
  what nobody is told: two locations, a width, a share, and a shape unless it is
  Gaussian.

  Args:
    shape: of the noise.
    log_f: log densities of clean and of wrong samples [2, n].
    wrong_share: in (0, 1].
    pooled: means [n].
    noise: their relative widths [n].
  """
  n, parameters = len(pooled), 4 + (shape != "gaussian")
  points, _, scale = populations.points_of(pooled, noise)
  single = min(populations._single_costs(points).values())
  with np.errstate(divide="ignore"):
    shares = np.log([[1 - wrong_share], [wrong_share]])
  likelihood = special.logsumexp(log_f + shares, axis=0).sum()
  pair = populations._bic(likelihood, parameters, n)
  return single + 2 * n * np.log(scale) - pair


def f1(found: np.ndarray, wrong: np.ndarray) -> float:
  """F1 of finding what is wrong; 1 if there is nothing and nothing is found."""
  total = found.sum() + wrong.sum()
  return 2 * float((found & wrong).sum()) / total if total else 1.0


def judged(made: Scores) -> bool:
  """Whether so much is expected as `unmet` says.

  Of sets of 40 or more whose two groups have 5 or more and lie 4 deviations
  apart or more, and of sets of 500 or more with groups 3 apart (of one step's
  skewed scores the tail of one group and a second one can't be told apart
  there).
  """
  wrong = made.wrong[np.isfinite(made.scores).any(axis=1)]
  n, n_wrong = len(wrong), int(wrong.sum())
  apart = made.separation >= 4 and n >= 40
  plain = made.scores.shape[1] > 2 or not made.skewed
  near = made.separation >= 3 and n >= 500 and plain
  return min(n_wrong, n - n_wrong) >= 5 and (apart or near)


def unmet(made: Scores, p: np.ndarray) -> list[str]:
  """What keep probabilities [N] of samples with a score don't fulfil.

  F1 of .98 or within .04 of the best possible rule's, or one decision more that
  is wrong; the clean fraction within .03 or two standard errors; a calibration
  error of .05, and one sample.
  """
  import gradmimic_jax as gm

  known = np.isfinite(made.scores).any(axis=1)
  wrong, best, p = made.wrong[known], made.log_odds[known] < 0, p[known]
  found, n, bad = p < 0.5, len(wrong), []
  got, goal = f1(found, wrong), min(0.98, f1(best, wrong) - 0.04)
  if got < goal and (found != wrong).sum() > (best != wrong).sum() + 1:
    bad.append(f"F1 {got:.3f}, best {f1(best, wrong):.3f}")
  clean = 1 - wrong.mean()
  deviation = np.sqrt(clean * (1 - clean) / n)
  if abs(p.mean() - clean) > max(0.03, 2 * deviation):
    bad.append(f"clean fraction {p.mean():.3f} for {clean:.3f}")
  ece = gm.metrics.calibration_error(p, ~wrong)
  if ece > 0.05 + 1 / n:
    bad.append(f"calibration error {ece:.3f}")
  return bad


def undecidable(made: Scores) -> bool:
  """Whether the answer of one who knows the densities wouldn't do either.

  One knows the densities of clean and wrong scores and their shares, but not
  that there are two populations and none that looks the same. That is as
  likely as Bayes' rule has it, 1 / (1 + exp(-(gain - 2) / 2)) with the gain of
  the truth (`gain_of_truth`), and the answer 1 - P(two) P(wrong | two). Nothing
  of this depends on what the library selects.
  """
  if not judged(made):
    return False
  two = special.expit((made.gain - 2) / 2)
  return bool(unmet(made, 1 - two * special.expit(-made.log_odds)))


def broken(made: Scores) -> list[str]:
  """The expectations that a selection breaks, of samples with a score.

  Everywhere: no quality that isn't a number, no text that says "nan"; if no
  label is wrong, at most 2 % flagged. What is `judged` and not `undecidable`:
  what `unmet` has.
  """
  import gradmimic_jax as gm

  selection = gm.select(made.scores)
  quality = gm.dataset_quality(selection)
  known = np.isfinite(made.scores).any(axis=1)
  bad = []
  if not np.isfinite(selection.quality[known]).all():
    bad.append("quality: not finite")
  texts = (selection, quality, gm.removal_curve(selection))
  if "nan" in " ".join(map(str, texts)).lower():
    bad.append("a text says nan")
  found = ~selection.keep[known]
  if not made.wrong[known].any() and found.sum() > max(0.02 * len(found), 1):
    bad.append(f"none wrong: flagged {found.mean():.3f}")
  if judged(made) and not undecidable(made):
    bad += unmet(made, selection.keep_probability)
  return bad


class Outcome(NamedTuple):
  """What came of a number of matrices."""

  right: int
  wrong: dict[str, list[str]]  # what it broke, by what the matrix was made of
  undecidable: list[str]  # what the matrices were made of

  def __str__(self) -> str:
    lines = [f"{about} | {'; '.join(bad)}" for about, bad in self.wrong.items()]
    lines += [f"{about} | undecidable" for about in self.undecidable]
    total = self.right + len(self.wrong) + len(self.undecidable)
    lines.append(
      f"{total} matrices: {self.right} right, {len(self.wrong)} wrong,"
      f" {len(self.undecidable)} undecidable"
    )
    return "\n".join(lines)


def run(count: int, first: int) -> Outcome:
  """Selects from matrices of `count` seeds from the first."""
  wrong: dict[str, list[str]] = {}
  open_: list[str] = []
  for made in map(make, range(first, first + count)):
    if bad := broken(made):
      wrong[made.about] = bad
    elif undecidable(made):
      open_.append(made.about)
  return Outcome(count - len(wrong) - len(open_), wrong, open_)


if __name__ == "__main__":
  print(run(int(sys.argv[1]), int(sys.argv[2])))
