"""Mimic scores with a Haiku model: `transform` gives pure functions."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import gradmimic_jax as gm


def main():
  """Scores one batch toward a reference of the same initialisation."""
  keys = jax.random.split(jax.random.key(0), 3)
  model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
  batch = {
    "x": jax.random.normal(keys[1], (32, 4)),
    "y": jax.random.randint(keys[2], (32,), 0, 3),
  }
  params = model.init(keys[0], batch["x"])

  def losses_fn(params, batch):
    logits = model.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

  reference = params
  for _ in range(20):
    grads = jax.grad(lambda p: losses_fn(p, batch).mean())(reference)
    reference = jax.tree.map(lambda p, g: p - 0.5 * g, reference, grads)

  scores = jax.jit(gm.mimic_scores(losses_fn))(params, reference, batch).scores
  print(f"best sample {jnp.argmax(scores)}, worst {jnp.argmin(scores)}")


if __name__ == "__main__":
  main()
