"""Compiled programs are kept, in the process and on disk."""

import jax
import numpy as np
import pytest

from experiments.runtime import programs

SETTINGS = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_min_entry_size_bytes",
  "jax_compilation_cache_max_size",
  "jax_disable_most_optimizations",
)


@pytest.fixture
def settings():
  """JAX's settings, which come back after the test."""
  before = {name: jax.config.values[name] for name in SETTINGS}
  yield before
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_cache_on_disk_keeps_every_program_up_to_a_size(settings, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  programs.keep_on_disk(tmp_path)
  assert [jax.config.values[name] for name in SETTINGS[:4]] == [
    str(tmp_path),
    0.0,
    -1,
    1 << 30,
  ]


def test_a_cache_that_is_there_already_stays(settings, tmp_path):
  jax.config.update("jax_compilation_cache_dir", "elsewhere")
  programs.keep_on_disk(tmp_path)
  assert jax.config.values["jax_compilation_cache_dir"] == "elsewhere"
  name = "jax_compilation_cache_max_size"
  assert jax.config.values[name] == settings[name]


def test_programs_that_run_once_are_compiled_quickly_and_no_others(settings):
  name = "jax_disable_most_optimizations"
  jax.config.update(name, False)
  with programs.run_once():
    assert jax.config.values[name] == (jax.default_backend() == "cpu")
  assert not jax.config.values[name]


def test_a_factory_makes_one_result_for_equal_arguments():
  made = programs.once(lambda *_: object())
  assert made(len) is made(len)
  assert made({"a": [1, 2]}) is made({"a": [1, 2]})
  for other in ({"a": [1, 2.0]}, {"a": [1, True]}, {"b": [1, 2]}, {"a": [1]}):
    assert made({"a": [1, 2]}) is not made(other)
  array = np.ones(3)  # which may change
  assert made(array) is not made(array)


def test_what_a_method_of_an_object_makes_is_not_kept():
  class Task:
    def expand(self, batch):
      return batch

  made, task = programs.once(lambda _: object()), Task()
  assert made(task.expand) is not made(task.expand)


def test_results_that_were_not_used_for_long_are_let_go():
  made = programs.once(lambda _: object())
  first, second = made(0), made(1)
  for number in range(2, 17):
    made(number)
    assert made(1) is second
  assert made(0) is not first
