"""Real processes on the loopback address that do a job together."""

import os
import pathlib
import socket
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parents[2]
CACHE = ROOT / ".pytest_cache" / "jax"


def flags_of(config_file: str, workdir: object, **fields) -> list[str]:
  """A job's command line."""
  return [
    f"--config={config_file}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]


def start(
  command: list[str],
  *,
  count: int,
  devices: int = 1,
  bits: int = 32,
  **options,
) -> list[subprocess.Popen]:
  """Starts a command in several processes, which are told of each other.

  Args:
    command: after `python`, such as `["-m", "experiments.train", ...]`.
    count: of processes; a single one is told nothing.
    devices: virtual CPU devices of each.
    bits: of the widest numbers that JAX may use.
    **options: for `subprocess.Popen`.

  Returns:
    The processes, in order.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = {
    **os.environ,
    # As this process compiles, so do these.
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={devices}",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": os.environ.get(
      "JAX_DISABLE_MOST_OPTIMIZATIONS",
      str(int(jax.config.jax_disable_most_optimizations)),
    ),
    "OMP_NUM_THREADS": "1",
    "JAX_ENABLE_X64": str(int(bits == 64)),
    "PYTHONPATH": str(ROOT),
    # What one has compiled the others find.
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  options = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "text": True,
    **options,
  }
  return [
    subprocess.Popen(
      [
        sys.executable,
        *command,
        *(
          f"--{name}={value}"
          for name, value in (
            ("coordinator", address),
            ("num_processes", count),
            ("process_id", number),
          )
          if count > 1
        ),
      ],
      cwd=ROOT,
      env=environment,
      **options,
    )
    for number in range(count)
  ]


def finish(
  processes: list[subprocess.Popen], *, timeout: float = 300
) -> list[str]:
  """Waits for all to succeed; what each has written to standard output.

  JAX's transport writes there too, now and then into the middle of a line.
  """
  try:
    texts = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, texts, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return [out for out, _ in texts]
