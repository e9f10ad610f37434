"""Small configs and a prepared digits set for the tests of experiments."""

import jax
import pytest
from jax._src.interpreters import partial_eval

from configs import digits

# Flax asks tracers for their shardings, and JAX writes a page each time about
# why they have none: most of the time that a model's shapes take.
partial_eval.DynamicJaxprTracer._origin_msg = lambda self: ""


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
