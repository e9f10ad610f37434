"""Several steps in one call are the same steps, compiled once a process."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradmimic_jax as gm
from experiments.runtime import checkpoint, metrics
from experiments.training import calls, trainer

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("seed", range(20))
def test_calls_end_where_there_is_something_to_do(seed):
  rng = np.random.default_rng(seed)
  every = tuple(map(int, rng.integers(1, 12, 2)))
  at = tuple(map(int, rng.integers(0, 40, 2)))
  first, total, length = int(rng.integers(5)), 40, int(rng.integers(1, 9))
  spacing = calls.Spacing(every, at, total)
  ends = [first]
  for count in calls.cut(first, length, spacing):
    assert 1 <= count <= length
    ends.append(ends[-1] + count)
  wanted = {n for n in range(first, total) if any(n % e == 0 for e in every)}
  wanted |= {n for n in at if first < n < total} | {total}
  assert wanted <= set(ends)
  assert ends[-1] == total
  # No call ends early for nothing.
  for begin, end in itertools.pairwise(ends):
    assert end in wanted or end - begin == length


def length_of(fn, batch, *, asked=0, every=1000, params=None):
  return calls.choose_length(
    asked,
    calls.Spacing((every, 2 * every), total=10 * every),
    step=jax.jit(lambda state, reference, batch, resident: fn(state, batch)),
    given=lambda: (params, None, batch, None),
  )


def test_the_length_of_a_call_follows_the_rule():
  small, large = jnp.ones((8, 8)), jnp.ones((512, 512))
  assert length_of(lambda p, x: x @ x, small) == 63  # 16 calls, not 15.6
  assert length_of(lambda p, x: x @ x, small, every=12) == 12

  # 12 products of 2 * 512^3 operations take 64 ms at 50 GFLOP/s.
  def chain(_, x):
    return jax.lax.scan(lambda c, _: (c @ x, None), x, length=12)

  assert length_of(chain, large) == 1
  assert length_of(lambda p, x: x @ x, large) == 10  # of 5.4 ms each
  # 24 MiB of batches.
  assert length_of(lambda p, x: x, jnp.ones((4096, 512))) == 3
  kernel = jnp.ones((3, 3, 1, 1))

  def convolve(kernel, x):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=layout
    )

  image = jnp.ones((1, 8, 8, 1))
  assert length_of(convolve, image, params=kernel) == 1
  assert length_of(convolve, image, params=kernel, asked=9, every=30) == 8
  with pytest.raises(ValueError, match="steps_per_call is -1; expected"):
    length_of(convolve, image, params=kernel, asked=-1)


@pytest.fixture
def compilations():
  """A list that gets an entry for each program that is compiled."""
  found = []

  def note(event, *_, **__):
    if event == COMPILED:
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield found
  jax.monitoring.unregister_event_duration_listener(note)


def train(make_config, folder, **fields):
  config = make_config(
    num_epochs=1,
    method="random",
    **{
      "data.flip": True,
      "checkpoint.every_epochs": 0,
      "checkpoint.every_steps": 4,
      **fields,
    },
  )
  trainer.train_and_evaluate(config, folder)
  return folder


@pytest.fixture
def four(make_config, tmp_path_factory):
  """The folder of a run with four steps in a call, of the last two are live.

  Its program is compiled once for all tests.
  """
  return train(make_config, tmp_path_factory.mktemp("run") / "four")


def results(folder, like):
  return (
    checkpoint.load_params(folder, like),
    metrics.read_metrics(folder / metrics.METRICS_FILE),
    gm.ScoreLedger(folder / trainer.LEDGER_FOLDER).table(),
  )


def test_any_number_of_steps_in_a_call_trains_alike(
  make_config, four, tmp_path
):
  """Bit for bit, also where calls are cut and have steps that are not live."""
  one = train(make_config, tmp_path / "one", steps_per_call=1)
  like = trainer.Run(make_config(), tmp_path / "like").state.params
  expected = results(one, like)
  assert len(expected[1]) == 8  # six steps, an evaluation before and after
  params, rows, table = results(four, like)
  jax.tree.map(np.testing.assert_array_equal, params, expected[0])
  assert rows == expected[1]
  assert table.equals(expected[2])


def test_another_number_of_steps_in_a_call_is_another_run(
  make_config, tmp_path
):
  with pytest.raises(KeyboardInterrupt):
    trainer.train_and_evaluate(
      make_config(steps_per_call=2), tmp_path / "run", sink=interrupt
    )
  with pytest.raises(ValueError, match="steps_per_call is 2 there and 3 here"):
    trainer.train_and_evaluate(make_config(steps_per_call=3), tmp_path / "run")


def interrupt(*_):
  raise KeyboardInterrupt


def test_a_second_seed_compiles_nothing(
  make_config, four, tmp_path, compilations
):
  jax.jit(lambda x: 2 * x)(1.0)
  assert compilations  # are seen
  compilations.clear()
  train(make_config, tmp_path / "second", seed=1, **{"noise.seed": 1})
  assert not compilations
