"""Small configs and a prepared digits set for the tests of experiments."""

import contextlib
import re
from unittest import mock

import jax
import pytest
from jax._src.interpreters import partial_eval

from configs import digits
from experiments.reporting import figures

# Flax asks tracers for their shardings, and JAX writes a page each time about
# why they have none: most of the time that a model's shapes take.
partial_eval.DynamicJaxprTracer._origin_msg = lambda self: ""

_figure, _drawn = figures._figure, set()


@contextlib.contextmanager
def _drawn_once(path, **options):
  """A figure is laid out and drawn once for each name, but for its numbers.

  The next one is plotted, too; its file is no more than a start.
  """
  kind = re.sub(r"[\d.]+", "", path.stem)
  drawn = contextlib.nullcontext()
  if kind in _drawn:
    drawn = mock.patch(
      "matplotlib.figure.Figure.savefig",
      lambda self, file, **_: file.write(b"\x89PNG\r\n\x1a\n"),
    )
  with drawn, _figure(path, **options) as given:
    yield given
  _drawn.add(kind)


def pytest_configure(config):
  """Lets the default suite lay out few figures: each takes a third of a second.

  The slow tests draw all.
  """
  if config.option.markexpr == "not slow":
    figures._figure = _drawn_once


@pytest.fixture(autouse=True)
def library_arithmetic():
  """Flax and optax mix dtypes in their own arithmetic."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
  """A data_dir of its own, so that no test writes to the user's."""
  return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_config(digits_dir):
  """`make_config(**{"dotted.field": value})`: three quick epochs."""

  def make(**overrides):
    config = digits.get_config("seeds=1").unlock()
    config.update_from_flattened_dict(
      {
        "data.data_dir": digits_dir,
        "mesh.data": 1,  # of the eight virtual devices
        "num_epochs": 3,
        "batch_size": 256,
        "model.widths": (16, 16),
        "optimizer.learning_rate": 1e-2,
        "checkpoint.every_epochs": 1,
        **overrides,
      }
    )
    return config.lock()

  return make
