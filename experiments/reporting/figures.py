"""Figures of a run: learning curves, score histograms, contact sheets.

Each function draws one PNG file at `path`, with the words in `title`, `xlabel`
and `ylabel`, and returns its path. matplotlib is imported when a figure is
drawn: most jobs draw none.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradmimic_jax import _files, plots

_COLORS = plots.COLORS
_FEW = 7  # curves; more need room for their legend
_CLEAN, _MISLABELLED = _COLORS[0], _COLORS[1]
_CELL = (1.08, 1.4)  # of a contact sheet, in inches and sides of its images
_STYLE: Any = {
  "figure.dpi": 150,
  "font.size": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.25,
  "axes.titlesize": 10,
  "legend.frameon": False,
}


def learning_curves(
  curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
  path: str | os.PathLike,
  *,
  title: str,
  xlabel: str,
  ylabel: str,
) -> pathlib.Path:
  """Draws a line for each method, its mean over runs, and the runs behind it.

  As `gm.plots.learning_curves`, with the legend beside the axes.

  `curves` has for each name a list of runs, each `(x [K], y [K])`, all at the
  same x.

  Raises:
    ValueError: there are no curves, or runs of one name differ in x.

  Example:
    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = learning_curves(
    ...     {"sgd": [([0, 1], [0.1, 0.8])]}, os.path.join(folder, "a.png"),
    ...     title="Digits", xlabel="epoch", ylabel="accuracy")
    ...   path.exists()
    True
  """
  counts = {len(runs) for runs in curves.values()}
  size = (8, 4.2) if len(curves) > _FEW else (7.5, 3.6)
  with _figure(path, figsize=size) as (figure, file):
    axes = plots.learning_curves(curves, ax=figure.subplots())
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if inside := axes.get_legend():
      inside.remove()  # looking for room among the curves can take seconds
    same = len(counts) == 1 and counts != {1}
    legend = figure.legend(
      loc="outside right upper",
      title=f"mean of {max(counts)}" if same else None,
      fontsize=8,
    )
    for text in legend.get_texts():
      text.set_parse_math(False)
  return file


def score_histograms(
  scores: Any,
  is_mislabelled: Any,
  path: str | os.PathLike,
  *,
  title: str,
  most: int = 6,
) -> pathlib.Path:
  """Draws the scores of clean against mislabelled samples, epoch by epoch.

  `scores` are `[N, T]`, NaN where a sample was not scored, and `is_mislabelled`
  bool `[N]`. At most `most` of the epochs with scores are shown, spread evenly.

  Raises:
    ValueError: shapes that don't fit, or no score.
  """
  scores = np.asarray(scores, float)
  wrong = np.asarray(is_mislabelled, bool)
  if scores.ndim != 2 or wrong.shape != scores.shape[:1]:
    raise ValueError(
      f"scores have shape {scores.shape} and is_mislabelled {wrong.shape};"
      " expected [N, T] and [N]."
    )
  scored = np.flatnonzero(np.isfinite(scores).any(axis=0))
  if not len(scored):
    raise ValueError("no score is finite; expected some to draw.")
  places = np.linspace(0, len(scored) - 1, min(most, len(scored)))
  epochs = scored[np.unique(places.astype(int))]
  columns = min(3, len(epochs))
  rows = math.ceil(len(epochs) / columns)
  with _figure(path, figsize=(2.7 * columns, 2.1 * rows + 0.5)) as (
    figure,
    file,
  ):
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(epochs) :]:
      panel.set_axis_off()
    for panel, epoch in zip(panels.flat, epochs, strict=False):
      values = scores[:, epoch]
      seen = np.isfinite(values)
      # A few far-out scores would squeeze all others into one bar.
      low, high = np.percentile(values[seen], [0.5, 99.5])
      if high <= low:
        low, high = low - 0.5, high + 0.5
      bins = np.linspace(low, high, 41)
      for chosen, color, label in (
        (seen & ~wrong, _CLEAN, "clean"),
        (seen & wrong, _MISLABELLED, "mislabelled"),
      ):
        clipped = np.clip(values[chosen], low, high)
        panel.hist(clipped, bins, color=color, alpha=0.6, label=label)
      panel.axvline(0, color="black", linewidth=0.8, linestyle=":")
      panel.set_title(f"epoch {epoch + 1}")
      panel.set_yticks([])
      panel.grid(visible=False)
    panels.flat[0].legend(loc="upper right")
    figure.suptitle(title)
    figure.supxlabel("mimic score (outermost bars hold all beyond)", fontsize=9)
  return file


def contact_sheet(
  images: Any,
  captions: Sequence[str],
  path: str | os.PathLike,
  *,
  title: str,
  colored: Sequence[bool] | None = None,
  columns: int = 8,
) -> pathlib.Path:
  """Draws images in a grid, each with a caption.

  Images are uint8 `[H, W, C]`, C 1 or 3, of any sizes; `colored`, bool `[K]`,
  says which captions are orange.

  Raises:
    ValueError: no images, or as many captions as images are not there.
  """
  images = [np.asarray(image) for image in images]
  if {image.ndim for image in images} != {3} or len(images) != len(captions):
    shape = (len(images), *(images[0].shape if images else ()))
    raise ValueError(
      f"images have shape {shape} and there are {len(captions)}"
      " captions; expected [K, H, W, C] and K > 0 of them."
    )
  if colored is None:
    colored = [False] * len(images)
  columns = min(columns, len(images))
  rows = math.ceil(len(images) / columns)
  size = (_CELL[0] * columns, _CELL[1] * rows + 0.3)
  with _figure(path, figsize=size) as (figure, file):
    # One panel for all: to lay out one each takes most of the time.
    panel = figure.subplots()
    panel.set_axis_off()
    shown = zip(images, captions, colored, strict=False)
    for i, (image, caption, flag) in enumerate(shown):
      row, column = divmod(i, columns)
      gray = image.shape[-1] == 1
      height, width = (side / max(image.shape[:2]) for side in image.shape[:2])
      left = column * _CELL[0] + (1 - width) / 2
      top = row * _CELL[1] + 1 - height
      panel.imshow(
        image[..., 0] if gray else image,
        extent=(left, left + width, top + height, top),
        cmap="gray_r" if gray else None,
        vmin=0,
        vmax=255,
        interpolation="nearest",
      )
      panel.text(
        left + width / 2,
        top - 0.06,
        caption,
        ha="center",
        va="bottom",
        fontsize=7,
        color=_COLORS[1] if flag else "black",
        parse_math=False,  # captions come from data: a "$" is no formula
      )
    panel.set(
      xlim=(-0.05, columns * _CELL[0]), ylim=(1 + (rows - 1) * _CELL[1], -0.4)
    )
    figure.suptitle(title, parse_math=False)
  return file


def ratio_bars(
  ratios: Mapping[str, Mapping[str, float]],
  path: str | os.PathLike,
  *,
  title: str,
  ylabel: str,
) -> pathlib.Path:
  """Draws groups of bars, one bar a series, and a line at 1.

  `ratios` has for each group the ratio of each series; a series may be missing.

  Raises:
    ValueError: there are no ratios.
  """
  names = list(
    dict.fromkeys(name for group in ratios.values() for name in group)
  )
  if not names:
    raise ValueError("no ratios came; expected at least one group with a bar.")
  bar = 0.8 / len(names)
  size = (max(4.0, 1.1 * len(ratios) + 1.8), 3.6)
  with _figure(path, figsize=size) as (figure, file):
    axes = figure.subplots()
    for i, name in enumerate(names):
      groups = [k for k, group in enumerate(ratios.values()) if name in group]
      heights = [group[name] for group in ratios.values() if name in group]
      axes.bar(
        np.asarray(groups) + (i - (len(names) - 1) / 2) * bar,
        heights,
        width=bar,
        color=_COLORS[i % len(_COLORS)],
        label=name,
      )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ratios)), list(ratios))
    axes.grid(visible=False, axis="x")
    axes.set(title=title, ylabel=ylabel)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return file


def ratio_curves(
  curves: Mapping[
    str, Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
  ],
  path: str | os.PathLike,
  *,
  title: str,
) -> pathlib.Path:
  """Draws ratios against sizes: a row of panels a ratio, a column a size.

  `curves[ratio][size][name]` is a line `(x [K], y [K])`; every ratio has the
  same sizes.

  Raises:
    ValueError: there are no curves.
  """
  sizes = list(dict.fromkeys(size for row in curves.values() for size in row))
  if not sizes:
    raise ValueError("no curves came; expected at least one ratio and size.")
  shape = (len(curves), len(sizes))
  with _figure(path, figsize=(2.4 * shape[1] + 0.6, 1.9 * shape[0] + 0.9)) as (
    figure,
    file,
  ):
    panels = figure.subplots(*shape, squeeze=False, sharey="row", sharex="col")
    colors: dict[str, str] = {}
    for row, (ratio, by_size) in zip(panels, curves.items(), strict=True):
      for panel, size in zip(row, sizes, strict=True):
        for name, (x, y) in by_size[size].items():
          color = colors.setdefault(name, _COLORS[len(colors) % len(_COLORS)])
          panel.plot(x, y, marker="o", markersize=3, color=color, label=name)
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        ticks = sorted({t for x, _ in by_size[size].values() for t in x})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
      row[0].set_ylabel(ratio)
    for panel, size in zip(panels[-1], sizes, strict=True):
      panel.set_xlabel(size)
    for row in panels:  # the panels of a row share their limits
      row[0].set_ylim(bottom=0)
    lines = {
      line.get_label(): line
      for panel in panels.flat
      for line in panel.get_lines()
      if line.get_label() in colors
    }
    figure.legend(
      lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines)
    )
    figure.suptitle(title)
  return file


def accuracy_by_share(
  lines: Mapping[str, Sequence[tuple[float, float, float | None]]],
  path: str | os.PathLike,
  *,
  title: str,
  reference: str,
) -> pathlib.Path:
  """Draws accuracy against the share of labels that are known, one line a name.

  Lines that are level over all shares are methods that don't look at it.

  Args:
    lines: for each name its points, `(share, accuracy, its error or None)`.
    path: of the PNG file.
    title: of the figure.
    reference: the name whose line is drawn in black, behind the others.

  Returns:
    The path.
  """
  with _figure(path, figsize=(8, 4.4)) as (figure, file):
    axes = figure.subplots()
    others = [name for name in lines if name != reference]
    if reference in lines:
      x, y, _ = zip(*sorted(lines[reference]), strict=True)
      axes.plot(x, y, color="black", linewidth=3, alpha=0.35, label=reference)
    for i, name in enumerate(others):
      x, y, errors = zip(*sorted(lines[name]), strict=True)
      color = _COLORS[i % len(_COLORS)]
      if len(set(y)) == 1:
        axes.plot(x, y, color=color, linestyle="dotted", label=name)
        continue
      axes.errorbar(
        x,
        y,
        yerr=[error or 0 for error in errors],
        color=color,
        linestyle=("solid", "dashed")[i // len(_COLORS) % 2],
        marker="o",
        markersize=3.5,
        linewidth=1.6,
        capsize=2,
        label=name,
      )
    ticks = sorted({share for points in lines.values() for share, *_ in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(
      title=title,
      xlabel="training samples whose true labels the reference has",
      ylabel="test accuracy",
    )
    figure.legend(loc="outside right upper", fontsize=8)
  return file


def scatter(
  groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  path: str | os.PathLike,
  *,
  title: str,
  xlabel: str,
  ylabel: str,
  vertical: float | None = None,
  horizontal: float | None = None,
) -> pathlib.Path:
  """Draws points in groups, with dashed lines at decision thresholds.

  `groups` has for each name its points, `(x [K], y [K])`.

  Raises:
    ValueError: there are no groups.
  """
  if not groups:
    raise ValueError("no groups came; expected at least one name.")
  with _figure(path, figsize=(6, 3.6)) as (figure, file):
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(groups.items()):
      color = _COLORS[i % len(_COLORS)]
      axes.scatter(x, y, s=14, color=color, alpha=0.5, linewidths=0, label=name)
    dashed = {"color": "0.4", "linestyle": "--", "linewidth": 0.8}
    if vertical is not None:
      axes.axvline(vertical, **dashed)
    if horizontal is not None:
      axes.axhline(horizontal, **dashed)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside right upper")
  return file


@contextlib.contextmanager
def _figure(path: str | os.PathLike, **kwargs: Any) -> Iterator[Any]:
  """A figure in the house style, saved whole or not at all."""
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  path = pathlib.Path(path)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    yield figure, path
    with _files.replacing(path) as file:
      figure.savefig(file, format="png")
