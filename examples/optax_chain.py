"""Mimic weights as the first link of an optax chain."""

import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm


def main():
  """Trains a line through points of which some are far off."""
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (64,))
  y = jnp.where(jax.random.uniform(keys[1], (64,)) < 0.3, -9.0, 2 * x + 1)
  params = {"slope": jnp.zeros([]), "offset": jnp.zeros([])}
  reference = {"slope": jnp.asarray(2.0), "offset": jnp.asarray(1.0)}

  def loss_fn(params, sample):
    x, y = sample
    return (params["slope"] * x + params["offset"] - y) ** 2

  # Gradients of single samples come in; clipping sees the weighted sum.
  optimizer = optax.chain(
    gm.reweight_by_mimic_score(reference, weighting=gm.ess_softmax(0.5)),
    optax.clip_by_global_norm(1.0),
    optax.adam(3e-2),
  )
  state = optimizer.init(params)
  per_sample = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(per_sample(params, (x, y)), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(300):
    params, state = step(params, state)
  print({name: round(float(value), 2) for name, value in params.items()})


if __name__ == "__main__":
  main()
