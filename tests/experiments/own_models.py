"""Models as a user writes them, in a file of one's own."""

import math

import jax
from flax import linen as nn, nnx


class Net(nnx.Module):
  """A layer, a norm, dropout and a head."""

  def __init__(
    self, *, num_classes, input_shape, rngs, width=8, norm="batch", rate=0.0
  ):
    self.layer = nnx.Linear(math.prod(input_shape), width, rngs=rngs)
    if norm == "batch":
      self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
    else:
      self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def features(self, images):
    hidden = self.layer(images.reshape(len(images), -1))
    return self.dropout(jax.nn.relu(self.norm(hidden)))

  def __call__(self, images):
    return self.head(self.features(images))


class LinenNet(nn.Module):
  """The same by Linen."""

  num_classes: int
  width: int = 8
  norm: str = "batch"
  rate: float = 0.0

  @nn.compact
  def __call__(self, images, train):
    hidden = nn.Dense(self.width)(images.reshape(len(images), -1))
    if self.norm == "batch":
      hidden = nn.BatchNorm(not train, momentum=0.9)(hidden)
    else:
      hidden = nn.LayerNorm()(hidden)
    hidden = nn.Dropout(self.rate, deterministic=not train)(jax.nn.relu(hidden))
    return nn.Dense(self.num_classes, name="head")(hidden)


class Asking(nnx.Module):
  """A constructor that asks for more than it is given."""

  def __init__(self, *, classes, rngs, depth):
    self.head = nnx.Linear(depth, classes, rngs=rngs)


class Wide(nnx.Module):
  """Another output than logits: one column too many."""

  def __init__(self, *, num_classes, rngs):
    self.head = nnx.Linear(16, num_classes + 1, rngs=rngs)

  def __call__(self, images):
    return self.head(images.reshape(len(images), -1))


class Failing(Wide):
  """A call that fails."""

  def __call__(self, images):
    return self.head(images)


class WithoutMode(nn.Module):
  """Statistics, and no way to be told whether it is trained."""

  num_classes: int

  @nn.compact
  def __call__(self, images):
    hidden = nn.BatchNorm(False)(images.reshape(len(images), -1))
    return nn.Dense(self.num_classes)(hidden)


def make_net():
  """No class."""
