"""Mimic scores with an Equinox model: its arrays are the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm


def main():
  """Scores one batch, and takes one reweighted step."""
  keys = jax.random.split(jax.random.key(0), 3)
  model = eqx.nn.MLP(4, 3, width_size=16, depth=1, key=keys[0])
  # Arrays are trained; activations and sizes are not.
  params, static = eqx.partition(model, eqx.is_inexact_array)
  batch = {
    "x": jax.random.normal(keys[1], (32, 4)),
    "y": jax.random.randint(keys[2], (32,), 0, 3),
  }

  def losses_fn(params, batch):
    logits = jax.vmap(eqx.combine(params, static))(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

  # A stand-in for a better model: the learner after some steps.
  reference = params
  for _ in range(20):
    grads = jax.grad(lambda p: losses_fn(p, batch).mean())(reference)
    reference = jax.tree.map(lambda p, g: p - 0.5 * g, reference, grads)

  step = jax.jit(gm.mimic_value_and_grad(losses_fn, layers=r"layers/.*"))
  (loss, info), grads = step(params, reference, batch)
  optimizer = optax.sgd(0.1)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  model = eqx.combine(optax.apply_updates(params, updates), static)
  print(f"loss {loss:.3f}, best sample {jnp.argmax(info.scores)}")
  return model


if __name__ == "__main__":
  main()
