"""The README's code runs as printed."""

import json
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PODS = ROOT / "docs" / "pods.md"


def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch):
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  assert len(blocks) == 2
  monkeypatch.chdir(tmp_path)
  params = {"w": jnp.zeros((4, 3))}
  optimizer = optax.adam(1e-3)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(20, 4)).astype(np.float32),
    "label": rng.integers(0, 3, 20).astype(np.int32),
  }
  names = {
    "jax": jax,
    "np": np,
    "optax": optax,
    "model": lambda params, images: images @ params["w"],
    "params": params,
    "reference": {"w": jnp.ones((4, 3)) * jnp.arange(3.0)[None]},
    "batches": [(np.arange(20), batch)],
    "optimizer": optimizer,
    "opt_state": optimizer.init(params),
  }
  with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
    for block in blocks:
      exec(block, names)
  assert names["selection"].keep.shape == (20,)
  assert names["updates"]["w"].shape == (4, 3)


def test_the_readme_is_short_and_its_links_lead_somewhere():
  text = README.read_text()
  assert len(text.splitlines()) <= 120
  for link in re.findall(r"\]\(([^)#]+)\)", text):
    if "://" in link:
      continue
    assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_several_processes_run_as_written(tmp_path):
  """Here, for an epoch; with this Python, a free port, the test's folders."""
  blocks = re.findall(r"```\w*\n(.*?)```", PODS.read_text(), re.DOTALL)
  (block,) = [text for text in blocks if "localhost:12321" in text]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  few = f"--config.num_epochs=1 --config.data.data_dir={tmp_path}"
  for written, here in (
    (".venv/bin/python", sys.executable),
    ("localhost:12321", f"localhost:{port}"),
    ("runs/two_processes", str(tmp_path / "run")),
    ("--config.method", f"{few} --config.method"),
  ):
    assert written in block
    block = block.replace(written, here)
  done = subprocess.run(
    ["bash", "-c", block],
    cwd=README.parent,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  results = sorted((tmp_path / "run").glob("result.json"))
  assert results, done.stderr[-3000:]
  steps = json.loads(results[0].read_text())["steps"]
  saved = tmp_path / "run" / "checkpoints" / str(steps) / "run" / "metadata"
  about = json.loads(saved.read_text())
  assert (about["processes"], about["devices"]) == (2, 4)
