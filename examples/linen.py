"""Mimic scores with a Flax Linen model: parameters are a tree already."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradmimic_jax as gm


class MLP(nn.Module):
  """Two layers."""

  @nn.compact
  def __call__(self, x):
    """Maps `[B, 2]` to logits `[B, 2]`."""
    return nn.Dense(2)(nn.relu(nn.Dense(32)(x)))


def main():
  """Trains on labels of which 40 % are wrong; prints the accuracy."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(512, 2)), jnp.float32)
  truth = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
  wrong = rng.random(512) < 0.4
  noisy = {"x": x, "y": jnp.where(wrong, 1 - truth, truth)}
  clean = {"x": x[:64], "y": truth[:64]}

  model = MLP()
  initial = model.init(jax.random.key(0), x[:1])

  def losses_fn(params, batch):
    logits = model.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

  optimizer = optax.adam(1e-2)

  def train(value_and_grad, steps=150):
    params, state = initial, optimizer.init(initial)
    for _ in range(steps):
      _, grads = value_and_grad(params)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  def plain(data):
    return jax.jit(
      jax.value_and_grad(lambda params: losses_fn(params, data).mean())
    )

  reference = train(plain(clean))
  print(gm.check_reference(losses_fn, initial, reference, noisy).verdict)
  mimic = jax.jit(
    gm.mimic_value_and_grad(losses_fn, weighting=gm.ess_softmax(0.5))
  )
  for name, params in {
    "reference": reference,
    "SGD": train(plain(noisy)),
    "Grad-Mimic": train(lambda params: mimic(params, reference, noisy)),
  }.items():
    hits = model.apply(params, x).argmax(-1) == truth
    print(f"{name:10} accuracy {hits.mean():.3f}")


if __name__ == "__main__":
  main()
