"""The microbatch size that is fastest in the memory there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradmimic_jax as gm
from gradmimic_jax import microbatches

B, D = 16, 64
PARAMS = {"w": jnp.ones((D, D))}
REFERENCE = {"w": jnp.zeros((D, D))}
BATCH = {"x": jnp.ones((B, D)), "y": jnp.zeros((B, D))}


def losses_fn(params, batch):
  gaps = jnp.tanh(batch["x"] @ params["w"]) - batch["y"]
  return jnp.sum(jnp.square(gaps), axis=-1)


def make(size):
  return gm.mimic_value_and_grad(
    losses_fn, engine="per_sample", microbatch_size=size
  )


def make_slow(size):
  """As many products as the size says; of the whole batch, none."""

  def repeat(x):
    return jax.lax.fori_loop(0, size or 0, lambda _, x: jnp.tanh(x @ x), x)

  return repeat


def choose(**kwargs):
  return gm.choose_microbatch_size(make, PARAMS, REFERENCE, BATCH, **kwargs)


def test_the_fastest_is_chosen():
  x = np.eye(100, dtype=np.float32)
  found = gm.choose_microbatch_size(make_slow, x, sizes=(400, 1), rounds=3)
  assert found.chosen == 1
  assert found.seconds[1] < found.seconds[400]
  assert "1 " in str(found).splitlines()[2]
  assert str(found).count("<- chosen") == 1


@pytest.mark.slow
def test_what_does_not_fit_is_not_run():
  every = choose(rounds=1, sizes=(None, 4, 2))
  # A sample's gradient is a matrix; the more at a time, the more memory.
  assert sorted(every.bytes.values(), reverse=True) == list(
    every.bytes.values()
  )
  found = choose(rounds=1, sizes=(None, 4), memory=every.bytes[4])
  assert set(found.seconds) == {4}
  assert found.chosen == 4
  assert str(found).count("too large") == 1
  assert found.bytes == {size: every.bytes[size] for size in (None, 4)}


def test_sizes_are_parts_of_the_batch():
  assert microbatches._candidates(None, (PARAMS, REFERENCE, BATCH)) == (
    None,
    8,
    4,
    2,
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"memory": 10, "sizes": (2,)},
      r"fits into 10 bytes; their needs are 2: [\d,]+",
    ),
    ({"sizes": ()}, "at least one"),
    ({"sizes": (4, 0)}, "from 1 on"),
    ({"rounds": 0}, "expected at least 1"),
  ],
)
def test_bad_input(options, message):
  with pytest.raises(ValueError, match=message):
    choose(**options)


def test_sizes_need_a_batch():
  with pytest.raises(ValueError, match="no batch to take them from"):
    gm.choose_microbatch_size(make_slow, np.eye(3, dtype=np.float32))
