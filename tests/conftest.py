"""Strict settings for every test: what JAX would forgive, we don't."""

import gc
import os
import pathlib
import threading

import jax
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir

# Virtual devices, for the tests of sharding.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of small objects that stay: to look for garbage among
# them every 700 of those takes a twentieth of the time.
gc.set_threshold(50_000, 20, 100)

# Many tests run the same programs, and most of their time is compilation.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

_make_context, _contexts = mlir.make_ir_context, threading.local()


def _shared_context():
  """Returns this thread's context: a new one takes longer than to use it.

  A program that is written while another one is being written needs its own.
  """
  try:
    ir.InsertionPoint.current  # noqa: B018
  except ValueError:
    if not hasattr(_contexts, "context"):
      _contexts.context = _make_context()
    return _contexts.context
  return _make_context()


mlir.make_ir_context = _shared_context

# How XLA turns programs into machine code: in one piece each, and without the
# emitters that take four times as long for a faster loop. XLA stops at flags
# that it doesn't know; one that a later XLA lacks can go.
_FAST_COMPILATION = (
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
)


def pytest_configure(config):
  """Lets programs compile fast, not run fast.

  The tests' programs are small; compiling them is most of the time. Slow tests
  that take `optimized` compile with all optimizations, and
  JAX_DISABLE_MOST_OPTIMIZATIONS=0 makes all tests compile as users do.
  """
  if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of its processes, too
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([*_FAST_COMPILATION, given])


def pytest_sessionfinish():
  """Looks for garbage once; pytest does so five times, a second each."""
  gc.collect()
  gc.freeze()


@pytest.fixture
def optimized(request, monkeypatch):
  """A slow test's programs are optimized, as are those of its processes.

  For a test that computes for long, or whose rounding is to be that of users.
  """
  if request.node.get_closest_marker("slow") is None:
    yield
    return
  before = jax.config.read("jax_disable_most_optimizations")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
