"""Makes vit_{huggingface,timm,torchvision}.npz: what public code computes.

python tests/data/make_vit_golden.py tests/data

Needs torch, transformers, timm, torchvision and safetensors, which the project
itself doesn't; the committed files came from torch 2.14.1, transformers 5.23.0,
timm 1.0.31, torchvision 0.29.2. Each file holds a tiny model with random
weights under the names that its library writes (`weights/<name>`), images
`[B, H, W, C]`, and what that library makes of them: `logits`, `features` (what
its head sees), the library's own interpolation of the position embeddings to
images of other sizes (`<size>_positions`), and for timm a second model that
pools by the mean (`mean_weights/<name>`, `mean_logits`, ...).
"""

import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import timm
import torch
import torchvision
import transformers
from timm.layers import resample_abs_pos_embed
from torchvision.models.vision_transformer import interpolate_embeddings

IMAGE, PATCH, WIDTH, DEPTH, HEADS, MLP, CLASSES = 16, 4, 24, 2, 3, 40, 5
SIZES = {"larger": (28, 20), "smaller": (12, 12)}


def randomise(model, seed):
  """Gives no parameter a special value: biases and scales matter too."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      scales = parameter.ndim == 1 and name.endswith("weight")
      fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 4
      parameter.copy_(noise * 0.2 + 1 if scales else noise * fan_in**-0.5)
  return model.eval()


def images():
  generator = torch.Generator().manual_seed(1)
  return torch.randn(3, 3, IMAGE, IMAGE, generator=generator)


def last(x):
  return x.permute(0, 2, 3, 1)


def huggingface():
  config = transformers.ViTConfig(
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    intermediate_size=MLP,
    image_size=IMAGE,
    patch_size=PATCH,
    num_labels=CLASSES,
  )
  model = randomise(transformers.ViTForImageClassification(config), 0)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    weights = safetensors.numpy.load_file(f"{folder}/model.safetensors")
  x = images()
  result = {
    "images": last(x),
    "logits": model(x).logits,
    "features": model.vit(x).last_hidden_state[:, 0],
  }
  for name, (rows, columns) in SIZES.items():
    tokens = torch.zeros(1, 1 + rows * columns // PATCH**2, WIDTH)
    result[f"{name}_positions"] = model.vit.embeddings.interpolate_pos_encoding(
      tokens, rows, columns
    )
  return result | prefixed("weights", weights)


def with_timm():
  def create(**options):
    return timm.create_model(
      "vit_tiny_patch16_224",
      img_size=IMAGE,
      patch_size=PATCH,
      embed_dim=WIDTH,
      depth=DEPTH,
      num_heads=HEADS,
      mlp_ratio=MLP / WIDTH,
      num_classes=CLASSES,
      **options,
    )

  mean = {"global_pool": "avg", "class_token": False, "fc_norm": False}
  x = images()
  result = {"images": last(x)}
  for prefix, options, seed in (("", {}, 3), ("mean_", mean, 4)):
    model = randomise(create(**options), seed)
    result[f"{prefix}logits"] = model(x)
    result[f"{prefix}features"] = model.forward_head(
      model.forward_features(x), pre_logits=True
    )
    weights = model.state_dict()
    result |= prefixed(f"{prefix}weights", weights)
    for name, size in SIZES.items():
      result[f"{prefix}{name}_positions"] = resample_abs_pos_embed(
        weights["pos_embed"],
        [side // PATCH for side in size],
        num_prefix_tokens=0 if options else 1,
      )
  return result


def with_torchvision():
  model = torchvision.models.VisionTransformer(
    IMAGE, PATCH, DEPTH, HEADS, WIDTH, MLP, num_classes=CLASSES
  )
  randomise(model, 5)
  weights = model.state_dict()
  x = images()
  result = {"images": last(x), "logits": model(x)}
  model.heads = torch.nn.Identity()
  result["features"] = model(x)
  for name, (size, _) in SIZES.items():  # it knows squares only
    resized = interpolate_embeddings(size, PATCH, dict(weights))
    result[f"{name}_positions"] = resized["encoder.pos_embedding"]
  return result | prefixed("weights", weights)


def prefixed(prefix, weights):
  return {f"{prefix}/{name}": value for name, value in weights.items()}


def main(folder):
  makers = {
    "huggingface": huggingface,
    "timm": with_timm,
    "torchvision": with_torchvision,
  }
  for name, make in makers.items():
    with torch.no_grad():
      arrays = {
        key: np.asarray(value, np.float32) for key, value in make().items()
      }
    np.savez_compressed(pathlib.Path(folder) / f"vit_{name}.npz", **arrays)


if __name__ == "__main__":
  main(sys.argv[1])
