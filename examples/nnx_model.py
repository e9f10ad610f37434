"""Mimic scores with a Flax NNX module, BatchNorm and Dropout included."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradmimic_jax as gm


class MLP(nnx.Module):
  """Two layers, with statistics and random keys of their own."""

  def __init__(self, rngs: nnx.Rngs):
    """Makes the layers."""
    self.hidden = nnx.Linear(2, 32, rngs=rngs)
    self.norm = nnx.BatchNorm(32, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(32, 2, rngs=rngs)

  def __call__(self, x):
    """Maps `[B, 2]` to logits `[B, 2]`."""
    return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def losses_fn(model, batch):
  """Computes a loss for each sample, [B]."""
  return optax.softmax_cross_entropy_with_integer_labels(
    model(batch["x"]), batch["y"]
  )


mimic = gm.nnx.mimic_value_and_grad(losses_fn, weighting=gm.ess_softmax(0.5))
plain = nnx.value_and_grad(lambda model, batch: losses_fn(model, batch).mean())


@nnx.jit
def mimic_step(model, optimizer, reference, batch):
  """Trains on samples weighted by their scores, which it returns."""
  (_, info), grads = mimic(model, reference, batch)
  optimizer.update(model, grads)
  return info.scores


@nnx.jit
def plain_step(model, optimizer, batch):
  """Trains on all samples alike."""
  _, grads = plain(model, batch)
  optimizer.update(model, grads)


def make():
  """Makes a model and its optimizer; always from the same parameters."""
  model = MLP(nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def main():
  """Trains on labels of which 40 % are wrong; prints the accuracy."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(512, 2)), jnp.float32)
  truth = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
  wrong = rng.random(512) < 0.4
  noisy = {"x": x, "y": jnp.where(wrong, 1 - truth, truth)}
  clean = {"x": x[:64], "y": truth[:64]}

  reference, optimizer = make()
  for _ in range(150):
    plain_step(reference, optimizer, clean)
  trained = {"reference": reference}
  trained["SGD"], optimizer = make()
  for _ in range(150):
    plain_step(trained["SGD"], optimizer, noisy)
  trained["Grad-Mimic"], optimizer = make()
  for _ in range(150):
    scores = mimic_step(trained["Grad-Mimic"], optimizer, reference, noisy)

  for name, model in trained.items():
    model.eval()
    hits = model(x).argmax(-1) == truth
    print(f"{name:10} accuracy {hits.mean():.3f}")
  lowest = jnp.argsort(scores)[:100]
  print(f"of the 100 lowest scores, {wrong[lowest].sum()} are wrong labels")


if __name__ == "__main__":
  main()
