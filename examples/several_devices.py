"""A batch over several devices: the step is an ordinary jitted function.

On a machine with one CPU, give it virtual devices:

XLA_FLAGS=--xla_force_host_platform_device_count=4 python several_devices.py
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradmimic_jax as gm


def main():
  """Takes a step on all devices there are; scores stay divided over them."""
  mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())

  keys = jax.random.split(jax.random.key(0), 3)
  size = 16 * jax.device_count()
  batch = jax.device_put(
    {
      "x": jax.random.normal(keys[0], (size, 8)),
      "y": jax.random.randint(keys[1], (size,), 0, 3),
    },
    rows,
  )
  params = jax.device_put(
    {"w": 0.1 * jax.random.normal(keys[2], (8, 3))}, whole
  )

  def losses_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      batch["x"] @ params["w"], batch["y"]
    )

  grads = jax.grad(lambda p: losses_fn(p, batch).mean())(params)
  reference = jax.tree.map(lambda p, g: p - g, params, grads)
  step = jax.jit(gm.mimic_value_and_grad(losses_fn))
  (loss, info), grads = step(params, reference, batch)
  print(f"loss {loss:.3f} on {jax.device_count()} devices")
  print("scores:", info.scores.shape, info.scores.sharding.spec)
  print("sum of weights:", float(jnp.sum(info.weights)))
  return grads


if __name__ == "__main__":
  main()
