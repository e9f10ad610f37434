"""What a job tells people: what it will do, how far it is, where to look.

All of it goes to standard error: standard output has the job's result alone.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tqdm

Note = Callable[[str], None]


def note(text: str) -> None:
  """Prints lines, above a bar if there is one; the first process alone does.

  Args:
    text: the lines.
  """
  # Asking which process this is would start the devices.
  if not jax.distributed.is_initialized() or jax.process_index() == 0:
    tqdm.tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def outline(title: str, facts: Mapping[str, Any]) -> str:
  """Lays out what a job will do.

  Args:
    title: the job.
    facts: texts by name; those that are empty or None are left out.

  Returns:
    Lines.

  Example:
    >>> print(outline("train", {"data": "digits", "noise": None, "steps": 10}))
    train
      data   digits
      steps  10
  """
  known = {name: text for name, text in facts.items() if text not in (None, "")}
  width = max(map(len, known), default=0)
  return "\n".join(
    [title, *(f"  {name:<{width}}  {text}" for name, text in known.items())]
  )


def describe_devices(count: int | None = None) -> str:
  """Describes the devices that a job computes on.

  Args:
    count: how many it takes; None: all there are.

  Returns:
    Such as "4 x NVIDIA H100 (gpu), in 2 processes".
  """
  device = jax.devices()[0]
  kind = device.device_kind
  if kind != device.platform:
    kind += f" ({device.platform})"
  text = f"{jax.device_count() if count is None else count} x {kind}"
  if jax.process_count() > 1:
    text += f", in {jax.process_count()} processes"
  return text


class Progress:
  """Shows how far a run is.

  A bar, where standard error is a terminal; and where it is a file, a line for
  each evaluation, if `note` is given.
  """

  def __init__(
    self,
    total: int | None,
    done: int,
    title: str,
    *,
    unit: str = "step",
    note: Note | None = None,
  ):
    """Opens the bar.

    Args:
      total: the number of steps; None: unknown.
      done: steps that were made before.
      title: of the run.
      unit: what a step is called.
      note: prints lines; None prints none.
    """
    self._title, self._total, self._unit = title, total, unit
    self._epoch = 0  # from 1; 0: unknown
    self._known: dict[str, float] = {}  # metrics in the bar
    self._bar = tqdm.tqdm(
      total=total,
      initial=done,
      desc=title,
      unit=unit,
      disable=not sys.stderr.isatty(),
      leave=False,
    )
    self._note = note if self._bar.disable else None

  @property
  def done(self) -> int:
    """The number of steps so far; where there is no bar, at the beginning."""
    return self._bar.n

  def begin(self) -> None:
    """Says that programs are compiled, until the first steps are made."""
    done = self._bar.n
    if done and self._note is not None:
      self._note(f"goes on at {self._unit} {done:,}")
    if done != self._total:
      self._bar.set_description(f"{self._title}: compiling")
      if self._note is not None:
        self._note("compiling")

  def update(self, count: int, epoch: int | None = None) -> None:
    """Counts steps.

    Args:
      count: how many more were made.
      epoch: of the last one, from 0; None: unknown.
    """
    if not self._bar.disable:
      self._bar.set_description(self._title, refresh=False)
      self._epoch = self._epoch if epoch is None else int(epoch) + 1
      self._bar.set_postfix_str(self._postfix(), refresh=False)
    self._bar.update(count)

  def show(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows losses and accuracies; a `metrics.Sink`.

    Args:
      step: that they are of.
      metrics: by the names that they are written under.
    """
    found = {k: v for k, v in metrics.items() if _is_shown(k)}
    self._known |= found
    if not self._bar.disable:
      self._bar.set_postfix_str(self._postfix(), refresh=False)
    is_evaluation = found and not any(k.startswith("train_") for k in found)
    if is_evaluation and self._note is not None:
      of = "" if self._total is None else f" of {self._total:,}"
      self._note(f"step {step:,}{of}: {_words(found)}")

  def _postfix(self):
    # Short, or there is no room for the bar: a training loss is the loss.
    short = {k.removeprefix("train_"): v for k, v in self._known.items()}
    epoch = f"epoch {self._epoch}, " if self._epoch else ""
    return f"{epoch}{_words(dict(sorted(short.items())), 3)}"

  def close(self) -> None:
    """Takes the bar away."""
    self._bar.close()


def _words(metrics, digits=4):
  return ", ".join(
    f"{name.replace('_', ' ')} {value:.{digits}g}"
    for name, value in metrics.items()
  )


def _is_shown(name):
  return name.endswith("_loss") or "_accuracy" in name
