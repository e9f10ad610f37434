"""Strict settings for every test: what JAX would forgive, we don't."""

import jax

# Virtual devices, for the tests of sharding.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
