"""The README's code runs as printed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch):
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  assert len(blocks) == 7
  monkeypatch.chdir(tmp_path)
  params = {"w": jnp.zeros((4, 3))}
  optimizer = optax.adam(1e-3)
  rng = np.random.default_rng(0)
  names = {
    "jax": jax,
    "np": np,
    "optax": optax,
    "model": lambda params, images: images @ params["w"],
    "params": params,
    "reference": {"w": jnp.ones((4, 3)) * jnp.arange(3.0)[None]},
    "batch": {
      "image": rng.normal(size=(20, 4)).astype(np.float32),
      "label": rng.integers(0, 3, 20).astype(np.int32),
    },
    "ids": np.arange(20),
    "optimizer": optimizer,
    "opt_state": optimizer.init(params),
  }
  with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
    for block in blocks:
      exec(block, names)
  assert names["selection"].keep.shape == (20,)
  assert names["updates"]["w"].shape == (4, 3)
