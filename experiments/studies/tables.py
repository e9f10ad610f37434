"""A study's tables, as text and Markdown."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from experiments.runtime import tables
from experiments.runtime.tables import mean_and_error, number, with_error
from experiments.studies.plan import BASELINE, REFERENCE


def text(summary: dict[str, Any]) -> str:
  """A study's results, and where they are."""
  seeds = len(summary["seeds"])
  lines = [
    f"{title(summary)}; {summary['samples_seen']:,} samples seen in batches of"
    f" {summary['batch_size']}; mean ± standard error of {seeds}"
    f" seed{'s' if seeds > 1 else ''}:",
    "",
    markdown(summary),
    *_headline(summary),
    "figures and results:",
    *(f"  {path}" for path in (*summary["figures"], *summary["results"])),
  ]
  if summary["report"]:
    lines += ["", "report:", f"  {summary['report']}"]
  return "\n".join(lines)


def title(summary: dict[str, Any]) -> str:
  """The data and their noise, in words."""
  return (
    f"{summary['dataset']}, {summary['noise']} noise"
    f" {summary['noise_rate']:.3g}"
  )


def markdown(summary: dict[str, Any]) -> str:
  """All runs, how well scores detect, what was checked, and overlaps."""
  return "\n".join(
    [
      *_runs(summary),
      *_detections(summary),
      *_checks(summary),
      *_overlaps(summary),
      "",
    ]
  )


def _runs(summary):
  rows, headline = summary["rows"], summary["headline"]
  compared = any(row["method"] == BASELINE for row in rows)
  if compared:
    yield (
      "Steps saved: the share of the baseline's steps that are left when its"
      " final loss (accuracy) on held-out samples is first reached."
    )
    yield ""
  against = summary.get("against")
  saved = ["steps saved to loss", "gain", "steps saved to accuracy"]
  yield from aligned(
    [
      *("method", _words(headline["loss"]), _words(headline["accuracy"])),
      *(saved if compared else []),
      *([f"less {against}"] if against else []),
      *(_words(summary["size"]), "right", "seconds"),
    ],
    [
      [
        row["method"],
        *(_number(row, headline[what]) for what in ("loss", "accuracy")),
        *(_saved_and_gained(row) if compared else []),
        *([_number(row, "ahead", 4)] if against else []),
        _number(row, summary["size"], 0),
        _number(row, "clean_share"),
        _number(row, "seconds", 1),
      ]
      for row in rows
    ],
  )


def _saved_and_gained(row):
  return _saved(row, "loss"), _number(row, "gain"), _saved(row, "accuracy")


def _detections(summary):
  if not summary["detection"]:
    return
  columns = {
    "AUROC": "auroc",
    **{f"of {kind}": f"auroc_{kind}" for kind in summary["kinds"]},
    "F1": "f1",
    "kept": "kept_fraction",
    "right": "clean_fraction",
  }
  yield from (
    "",
    "Wrong samples found by scores: AUROC of the mean score against right"
    " samples, of all and by kind; F1 of the selection and the share that it"
    " keeps; the share that is right.",
    "",
  )
  rows = []
  for name, entries in summary["detection"].items():
    cells = []
    for field in columns.values():
      values = [e[field] for e in entries if e.get(field) is not None]
      if values:
        mean, error = mean_and_error(values)
        cells.append(with_error(mean, error, 3))
      else:
        cells.append("-")
    rows.append([name, *cells])
  yield from aligned(["scores", *columns], rows)


def _checks(summary):
  if summary["reference_checks"]:
    yield from ("", "What `check_reference` said before the first step:", "")
  for name, verdicts in summary["reference_checks"].items():
    yield f"- {name}: {', '.join(verdicts)}"


def _overlaps(summary):
  if not summary["overlaps"]:
    return
  yield ""
  yield from aligned(
    ["filter", "other", "keeps", "keeps", "both", "Jaccard"],
    [
      [
        *(row["first"], row["second"]),
        *(f"{row[n]:,}" for n in ("n_first", "n_second", "n_both")),
        f"{row['jaccard']:.3f}",
      ]
      for row in summary["overlaps"]
    ],
  )


def _headline(summary):
  """The figures that a reader wants first."""
  rows = {row["method"]: row for row in summary["rows"]}
  if BASELINE not in rows or not summary["detection"]:
    return
  best = rows.get(summary["best"])
  if best is None:
    yield from ("No run reached the baseline's final loss.", "")
    return
  yield (
    f"{best['method']} reaches the baseline's final loss with"
    f" {_saved(best, 'loss')} fewer steps and ends {best['gain']:+.3f} in"
    f" {_words(summary['headline']['accuracy'])}."
  )
  yield (
    "Its mean score tells wrong samples from right ones with an AUROC of"
    f" {_number(best, 'auroc')}."
  )
  yield ""


def label(row: dict[str, Any]) -> str:
  """Names a row: its method, and the value of its weighting if it has one."""
  value = row.get("value")
  return row["method"] if value is None else f"{row['method']} {value:g}"


def beside_references(
  rows: Sequence[dict[str, Any]], field: str
) -> Iterator[tuple[Any, dict[str, Any]]]:
  """Yields rows and their values of a field, such as a rate of noise.

  A reference has clean labels: it stands beside every value of the others.
  """
  others = [row[field] for row in rows if row["method"] != REFERENCE]
  for row in rows:
    is_reference = row["method"] == REFERENCE
    for value in dict.fromkeys(others) if is_reference else [row[field]]:
      yield value, row


def pivot(
  names: Sequence[str],
  rows: Iterable[dict[str, Any]],
  key: Callable[[dict[str, Any]], tuple[str, ...]],
  column: str,
  columns: Sequence[Any],
  more: Callable[[dict[Any, Any]], Iterable[str]] = lambda found: (),
) -> Iterator[str]:
  """Yields a table of accuracies: a line for each key, a cell for each column.

  `more` makes the last cells of a line, of its rows by column.
  """
  lines: dict[Any, dict[Any, Any]] = {}
  for row in rows:
    lines.setdefault(key(row), {})[row[column]] = row
  yield from tables.markdown(
    names,
    [
      [*line, *(tables.accuracy(found.get(x)) for x in columns), *more(found)]
      for line, found in lines.items()
    ],
  )


def aligned(
  header: Sequence[str], rows: Sequence[Sequence[str]]
) -> Iterator[str]:
  """The lines of a Markdown table that is a table on a terminal as well."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  for row in (header, ["-" * width for width in widths], *rows):
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    yield f"| {' | '.join(cells)} |"


def _words(field):
  return field.partition("@")[0].replace("_", " ")


def _number(row, field, digits=3, scale=1):
  mean, error = row.get(field), row.get(f"{field}_error")
  if mean is None:
    return number(None)
  if digits == 0:
    return f"{mean:,.0f}"
  return with_error(
    scale * mean, None if error is None else scale * error, digits
  )


def _saved(row, what):
  """Percents; how many seeds got there, where it isn't all or none."""
  field, reached = f"saved_{what}", row[f"reached_{what}"]
  if not reached:
    return "never"
  shown = f"{_number(row, field, 1, scale=100)} %"
  return (
    shown if reached == row["runs"] else f"{shown} ({reached} of {row['runs']})"
  )
