"""Measures the way of images from their files to the devices.

Files are made up once for each size. Whatever has a peak of memory or a start
has a process to itself; its CPU seconds count from the end of its imports.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Any

import numpy as np
from ml_collections import config_dict

from configs.benchmark import data as data_config
from experiments.benchmarks import data_parts
from experiments.runtime import workdir as workdir_lib

RESULT_FILE = "data.json"
_ONE = "from experiments.benchmarks import data_parts; data_parts.answer()"
# What each number should be: at most, or at least.
_WANTED = (
  ("first_step_seconds", "CPU s to the first step, compiled before", "<= 5"),
  ("first_step_gb", "peak memory until then, GB", "<= 0.9"),
  ("epoch_gb", "peak memory of an epoch, streamed, GB", "<= 0.9"),
  ("growth", "its growth with four times the images", "<= 0.1"),
  ("select_seconds", "CPU s of select", "<= 3"),
  ("report_seconds", "CPU s of report", "<= 3"),
  ("select_decodes", "images that select decodes", "<= 0"),
  ("report_decodes", "images that report decodes", "<= thumbnails"),
  (
    "streamed_by_grain",
    "streamed images/s by a bare grain pipeline's",
    ">= .9",
  ),
  ("decoded_share", "share of the set that one of two decodes", "<= .52"),
  ("memory_images", "images a CPU s of batches in memory", ">= 40000"),
  ("pairs", "consuming thread for pairs, CPU ms an image", "<= .05"),
)


def measure(config: config_dict.ConfigDict, workdir: Any) -> dict[str, Any]:
  """Measures all parts; goes on where an interrupted run stopped.

  Args:
    config: as `configs/benchmark/data.py` describes it.
    workdir: gets the files, runs, and `data.json`, which grows by a part.

  Returns:
    What is in `data.json`: the machine, and what each part found.

  Raises:
    ValueError: an unknown field, or another config's workdir.
  """
  folder = workdir_lib.claim(workdir, config, data_config, job="data")
  file = folder / RESULT_FILE
  results: dict[str, Any] = {"machine": workdir_lib.machine(), "parts": {}}
  if file.exists():
    results = workdir_lib.read_json(file, {"parts": dict})
  small, large = config.samples
  settings = workdir_lib.as_dict(config)

  def part(name, **options):
    if name in results["parts"]:
      return
    print(name, flush=True)
    asked = {**settings, "folder": str(folder), "samples": small, **options}
    results["parts"][name] = _answers(asked)
    workdir_lib.write_json(file, results)

  for samples in (small, large):
    data_parts.make_files(folder, {**settings, "samples": samples})
  part("compile", part="first_step")
  _forget_indices(folder)
  part("first_step", part="first_step")
  part("epoch", part="epoch")
  part("large_epoch", part="epoch", samples=large)
  part("scored", part="scored")
  part("select", part="select")
  part("report", part="report")
  part("streamed", part="streamed")
  part("memory", part="memory")
  part("two", part="two", processes=2)
  part("pairs", part="pairs")
  return results


def _answers(asked: dict[str, Any]) -> Any:
  """Lets one process answer, or several that share a run."""
  count = asked.pop("processes", 1)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  cache = str(pathlib.Path(asked["folder"], "compiled"))
  started = []
  for number in range(count):
    inputs = {**asked, "process": [port, count, number]}
    started.append(
      subprocess.Popen(
        [sys.executable, "-c", _ONE, json.dumps(inputs)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={
          **os.environ,
          "JAX_COMPILATION_CACHE_DIR": cache,
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
          "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
      )
    )
  texts = [process.communicate()[0] for process in started]
  for process in started:
    if process.returncode:
      raise RuntimeError(
        f"part {asked['part']} ended with {process.returncode}"
      )
  found = [json.loads(text.splitlines()[-1]) for text in texts]
  return found[0] if count == 1 else found


def _forget_indices(folder):
  """Removes what is kept beside the files, so that it is found again."""
  for place in folder.rglob(".gradmimic_jax"):
    with contextlib.suppress(OSError):
      shutil.rmtree(place)


def summarize(parts: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of the table, by name."""
  epoch, large = parts["epoch"]["peak_gb"], parts["large_epoch"]["peak_gb"]
  return {
    "first_step_seconds": parts["first_step"]["seconds"],
    "first_step_gb": parts["first_step"]["peak_gb"],
    "epoch_gb": epoch,
    "growth": large / epoch - 1,
    "select_seconds": parts["select"]["seconds"],
    "report_seconds": parts["report"]["seconds"],
    "select_decodes": parts["select"]["decodes"],
    "report_decodes": parts["report"]["decodes"],
    "thumbnails": parts["report"]["thumbnails"],
    "streamed_by_grain": float(np.median(parts["streamed"]["ratios"])),
    "decoded_share": max(one["share"] for one in parts["two"]),
    "memory_images": parts["memory"]["images_a_second"],
    "pairs": parts["pairs"]["milliseconds"],
  }


def table(config: config_dict.ConfigDict, results: dict[str, Any]) -> str:
  """The rows of numbers, beside what they should be."""
  del config
  found = summarize(results["parts"])
  lines = []
  for name, text, wanted in _WANTED:
    wanted = wanted.replace("thumbnails", str(found["thumbnails"]))
    lines.append(f"{text:<48} {found[name]:>12.4g}   {wanted}")
  return "\n".join(lines)
