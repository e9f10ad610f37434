"""Generated score matrices with a known truth, and what is expected of them.

  python tests/generated_scores.py 2000 0

makes that many matrices from that seed, selects from each, and prints how many
break which expectation.
"""

import sys
from typing import NamedTuple

import numpy as np
from scipy import stats

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
  return Scores(scores, wrong, odds, apart / deviation, skewed, about)


def f1(found: np.ndarray, wrong: np.ndarray) -> float:
  """F1 of finding what is wrong; 1 if there is nothing and nothing is found."""
  total = found.sum() + wrong.sum()
  return 2 * float((found & wrong).sum()) / total if total else 1.0


def broken(made: Scores) -> list[str]:
  """The expectations that a selection breaks, of samples with a score.

  Everywhere: no quality that isn't a number, no text that says "nan"; if no
  label is wrong, at most 2 % flagged. In sets of 40 or more whose two groups
  have 5 or more and lie 4 deviations apart or more, and in sets of 500 or more
  with groups 3 apart (of one step's skewed scores the tail of one group and a
  second one can't be told apart there): F1 of .98 or within .04 of the best
  possible rule's, or one decision more that is wrong; the clean fraction within
  .03 or two standard errors; a calibration error of .05, and one sample.
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
  wrong, found = made.wrong[known], ~selection.keep[known]
  best = made.log_odds[known] < 0
  n, n_wrong = len(wrong), int(wrong.sum())
  if n_wrong == 0:
    if found.sum() > max(0.02 * n, 1):
      bad.append(f"none wrong: flagged {found.mean():.3f}")
    return bad
  apart = made.separation >= 4 and n >= 40
  plain = made.scores.shape[1] > 2 or not made.skewed
  near = made.separation >= 3 and n >= 500 and plain
  if min(n_wrong, n - n_wrong) < 5 or not (apart or near):
    return bad
  got, goal = f1(found, wrong), min(0.98, f1(best, wrong) - 0.04)
  if got < goal and (found != wrong).sum() > (best != wrong).sum() + 1:
    bad.append(f"F1 {got:.3f}, best {f1(best, wrong):.3f}")
  clean = 1 - n_wrong / n
  deviation = np.sqrt(clean * (1 - clean) / n)
  p = selection.keep_probability[known]
  if abs(p.mean() - clean) > max(0.03, 2 * deviation):
    bad.append(f"clean fraction {p.mean():.3f} for {clean:.3f}")
  ece = gm.metrics.calibration_error(p, ~wrong)
  if ece > 0.05 + 1 / n:
    bad.append(f"calibration error {ece:.3f}")
  return bad


def run(count: int, first: int) -> dict[str, list[str]]:
  """The matrices that break something, and what."""
  return {
    made.about: found
    for made in map(make, range(first, first + count))
    if (found := broken(made))
  }


if __name__ == "__main__":
  count, first = int(sys.argv[1]), int(sys.argv[2])
  failures = run(count, first)
  for about, found in failures.items():
    print(about, "|", "; ".join(found))
  print(f"{count} matrices, {len(failures)} with failures")
