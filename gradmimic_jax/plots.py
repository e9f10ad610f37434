"""Plots of scores, selections and runs, on matplotlib axes.

Every function draws on the axes that it is given, or on new ones, and returns
them: titles, limits and files are the caller's. matplotlib is imported when
something is drawn: `pip install 'gradmimic_jax[plots]'`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmimic_jax import metrics
from gradmimic_jax.ledger import ScoreLedger
from gradmimic_jax.selection.quality import (
  DatasetQuality,
  RemovalCurve,
  removal_curve as find_removal_curve,
)
from gradmimic_jax.selection.selection import Selection

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Okabe and Ito's colours, which people with colour-blindness tell apart.
COLORS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#000000",
)
_LINES = ("solid", "dashed", "dotted", "dashdot")
_FEW = 7  # curves whose runs can be told apart


def scores_by_group(
  scores: Any,
  groups: Any,
  *,
  names: Mapping[Any, str] | None = None,
  share: float = 0.8,
  ax: Axes | None = None,
) -> Axes:
  """Draws each group's scores over the steps: median, and a band around it.

  Args:
    scores: raw scores [N, T] or [N], high = good, NaN where a sample was not
      scored; or the ledger that holds them.
    groups: each sample's group [N], such as whether its label is wrong, or its
      class; a ledger's samples are those of `matrix`, in order of id.
    names: the groups' names; `str` of a group that has none.
    share: of a group's samples that the band holds, in (0, 1).
    ax: to draw on.

  Returns:
    The axes.

  Raises:
    ModuleNotFoundError: matplotlib is not installed.
    ValueError: shapes that don't fit, or a share out of range.

  Example:
    >>> scores = np.array([[1.0, 2.0], [0.5, 1.5], [-1.0, -2.0]])
    >>> names = {True: "mislabelled", False: "clean"}
    >>> ax = scores_by_group(scores, [False, False, True], names=names)
    >>> [line.get_label() for line in ax.get_lines()][:2]
    ['clean', 'mislabelled']
  """
  steps: Sequence[int] | None = None
  if isinstance(scores, ScoreLedger):
    steps, scores = scores.epochs, scores.matrix("score")[1]
  values = np.asarray(scores, np.float64)
  values = values[:, None] if values.ndim == 1 else values
  labels = np.asarray(groups)
  if values.ndim != 2 or labels.shape != values.shape[:1]:
    raise ValueError(
      f"scores has shape {values.shape} and groups {labels.shape}; expected"
      " [N, T] and [N]."
    )
  if not 0 < share < 1:
    raise ValueError(f"share is {share}; expected 0 < share < 1.")
  ax = _axes(ax)
  x = np.arange(values.shape[1]) if steps is None else np.asarray(steps)
  for i, group in enumerate(np.unique(labels)):
    rows = np.where(np.isfinite(values), values, np.nan)[labels == group]
    seen = ~np.isnan(rows).all(axis=0)
    quantiles = [0.5 - share / 2, 0.5, 0.5 + share / 2]
    low, middle, high = np.nanquantile(rows[:, seen], quantiles, axis=0)
    color = COLORS[i % len(COLORS)]
    key = group.item() if isinstance(group, np.generic) else group
    ax.plot(
      x[seen],
      middle,
      color=color,
      linestyle=_LINES[i // len(COLORS) % len(_LINES)],
      marker="o" if len(x) == 1 else None,
      label=str((names or {}).get(key, key)),
    )
    if len(x) == 1:
      ax.vlines(x[seen], low, high, color=color, alpha=0.5)
    else:
      ax.fill_between(x[seen], low, high, color=color, alpha=0.15, linewidth=0)
  ax.axhline(0, color="black", linewidth=0.8, linestyle=":")
  ax.set(xlabel="step" if steps is None else "epoch", ylabel="score")
  _legend(ax)
  return ax


def removal_curve(
  curve: RemovalCurve | Selection, *, ax: Axes | None = None
) -> Axes:
  """Draws precision and recall of removing the worst samples, by their number.

  The line is at the number that is recommended; the band is where it is
  uncertain whether a sample is mislabelled.

  Args:
    curve: as `gm.removal_curve` gave it; or a selection, whose it is.
    ax: to draw on.

  Returns:
    The axes.

  Raises:
    ModuleNotFoundError: matplotlib is not installed.

  Example:
    >>> from gradmimic_jax.selection import select
    >>> found = select([[-2.0], [1.0], [-1.0]], binarize="threshold")
    >>> ax = removal_curve(found)
    >>> ax.get_xlabel()
    'samples removed, the worst first'
  """
  if isinstance(curve, Selection):
    curve = find_removal_curve(curve)
  ax = _axes(ax)
  for values, name, color in (
    (curve.precision, "precision", COLORS[0]),
    (curve.recall, "recall", COLORS[1]),
  ):
    ax.plot(curve.removed, values, color=color, label=name)
  ax.axvspan(*curve.uncertain, color="0.5", alpha=0.15, label="uncertain")
  ax.axvline(
    curve.recommended,
    color="black",
    linewidth=0.8,
    linestyle=":",
    label=f"recommended: {curve.recommended:,}",
  )
  ax.set(
    xlabel="samples removed, the worst first",
    ylabel="estimated share",
    ylim=(-0.02, 1.02),
  )
  _legend(ax)
  return ax


def quality_interval(
  quality: DatasetQuality | Mapping[str, DatasetQuality],
  *,
  truth: float | Mapping[str, float] | None = None,
  ax: Axes | None = None,
) -> Axes:
  """Draws estimated clean fractions with their intervals, a row each.

  Args:
    quality: as `gm.dataset_quality` gave it; or several, by name.
    truth: the true clean fraction, where it is known, or several by name.
    ax: to draw on.

  Returns:
    The axes.

  Raises:
    ModuleNotFoundError: matplotlib is not installed.
    ValueError: nothing to draw.

  Example:
    >>> quality = DatasetQuality(0.7, 0.6, 0.8, 0.95, 0.7, 100, 0)
    >>> ax = quality_interval({"digits": quality}, truth=0.72)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['digits']
  """
  single = isinstance(quality, DatasetQuality)
  named = {"": quality} if isinstance(quality, DatasetQuality) else quality
  if not named:
    raise ValueError("no quality came; expected at least one.")
  ax = _axes(ax)
  for row, (name, one) in enumerate(named.items()):
    ax.hlines(row, one.low, one.high, color=COLORS[0], linewidth=2)
    ax.plot(one.clean_fraction, row, "o", color=COLORS[0])
    true = truth.get(name) if isinstance(truth, Mapping) else truth
    if true is not None:
      ax.plot(true, row, "|", color=COLORS[1], markersize=14, markeredgewidth=2)
  level = next(iter(named.values())).level
  ax.set_yticks([] if single else range(len(named)))
  if not single:
    ax.set_yticklabels(list(named))
  marks = "" if truth is None else "; upright line: the truth"
  ax.set(
    xlabel=f"clean fraction, with its {level:.0%} interval{marks}",
    ylim=(len(named) - 0.5, -0.5),
  )
  return ax


def learning_curves(
  curves: Mapping[str, Sequence[tuple[Any, Any]]],
  *,
  baseline: str | None = None,
  higher_is_better: bool = False,
  ax: Axes | None = None,
) -> Axes:
  """Draws a line a method, its mean over runs, with the runs behind it.

  More than seven lines come without the runs, and thinner.

  With a baseline, a dashed line is at its final value, and each other method's
  legend says how many of the baseline's steps it saves: the share that is left
  when its mean first reaches that value (`gm.metrics.steps_to`).

  Args:
    curves: for each name its runs, each `(x [K], y [K])`, all at the same x.
    baseline: the name of the one to compare with.
    higher_is_better: whether y is an accuracy, say, and not a loss.
    ax: to draw on.

  Returns:
    The axes.

  Raises:
    ModuleNotFoundError: matplotlib is not installed.
    ValueError: no curves, runs of one name at different x, an unknown baseline.

  Example:
    >>> curves = {
    ...   "sgd": [([0, 50, 100], [2.0, 1.5, 1.0])],
    ...   "mimic": [([0, 50, 100], [2.0, 1.0, 0.5])],
    ... }
    >>> ax = learning_curves(curves, baseline="sgd")
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['sgd', 'mimic (saves 50% of the steps)']
  """
  if not curves:
    raise ValueError("no curves came; expected at least one name.")
  if baseline is not None and baseline not in curves:
    raise ValueError(
      f"baseline is {baseline!r}; expected one of {sorted(curves)}."
    )
  means = {name: _mean_curve(name, runs) for name, runs in curves.items()}
  counts = {len(runs) for runs in curves.values()}
  crowded = len(curves) > _FEW
  ax = _axes(ax)
  for i, (name, (x, y)) in enumerate(means.items()):
    color = COLORS[i % len(COLORS)]
    runs = curves[name]
    for _, one in runs if len(runs) > 1 and not crowded else ():
      ax.plot(x, np.asarray(one, float), color=color, alpha=0.25, linewidth=0.8)
    label = name
    if len(counts) > 1 and len(runs) > 1:
      label += f" (mean of {len(runs)})"
    if baseline is not None and name != baseline:
      sign = -1 if higher_is_better else 1
      end, target = means[baseline][0][-1], means[baseline][1][-1]
      reached = metrics.steps_to(x, sign * y, sign * target)
      label += (
        " (never as good)"
        if reached is None
        else f" (saves {1 - reached / end:.0%} of the steps)"
      )
    ax.plot(
      x,
      y,
      color=color,
      linestyle=_LINES[i // len(COLORS) % len(_LINES)],
      linewidth=1.4 if crowded else 1.8,
      label=label,
    )
  if baseline is not None:
    ax.axhline(
      means[baseline][1][-1], color="black", linewidth=0.8, linestyle=":"
    )
  ax.set(xlabel="step", ylabel="accuracy" if higher_is_better else "loss")
  _legend(ax)
  return ax


def _mean_curve(
  name: str, runs: Sequence[tuple[Any, Any]]
) -> tuple[np.ndarray, np.ndarray]:
  xs = [np.asarray(x, float) for x, _ in runs]
  if not xs or any(not np.array_equal(x, xs[0]) for x in xs):
    raise ValueError(
      f"the {len(xs)} runs of {name!r} were recorded at different x, or there"
      " are none; expected (x [K], y [K]) at the same x."
    )
  return xs[0], np.mean([np.asarray(y, float) for _, y in runs], axis=0)


def _axes(ax: Axes | None) -> Axes:
  if ax is not None:
    return ax
  try:
    import matplotlib.pyplot as plt
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "a plot needs matplotlib: pip install 'gradmimic_jax[plots]'"
    ) from error
  return plt.subplots(layout="constrained")[1]


def _legend(ax: Axes) -> None:
  """Adds the legend; names come from data: a "$" in them is no formula."""
  legend = ax.legend(loc="upper right", frameon=False)
  for text in legend.get_texts():
    text.set_parse_math(False)
