"""Makes clip_{huggingface,openclip}.npz: what public code computes.

python tests/data/make_clip_golden.py tests/data

Needs torch, transformers, open_clip_torch and safetensors, which the project
itself doesn't; the committed files came from torch 2.15.0, transformers 5.23.0,
open_clip_torch 3.3.0. Each file holds a tiny model with random weights under
the names that its library writes (`weights/<name>`), images `[B, H, W, C]`,
tokens `[B, T]` whose last id is the end token and stands at several places, and
what that library makes of them: `image_features` and `text_features` as they
leave the projections, and `logits` `[images, texts]`; and its interpolation of
the position embeddings to larger images where it has one
(`larger_positions`). Hugging Face's is computed twice from the same weights:
with QuickGELU, and with GELU (`gelu_logits`, ...).
"""

import pathlib
import sys
import tempfile

import numpy as np
import open_clip
import safetensors.numpy
import torch
import transformers
from make_vit_golden import last, prefixed, randomise

IMAGE, PATCH, CONTEXT, VOCABULARY, EMBED = 16, 4, 10, 30, 12
VISION = {"width": 24, "depth": 2, "heads": 3, "mlp_width": 40}
TEXT = {"width": 16, "depth": 3, "heads": 2, "mlp_width": 32}
LARGER = 24


def random_clip(model, seed):
  """With a logit scale at which logits say something."""
  randomise(model, seed).logit_scale.data.fill_(2.5)
  return model


def inputs():
  generator = torch.Generator().manual_seed(11)
  images = torch.randn(4, 3, IMAGE, IMAGE, generator=generator)
  tokens = torch.randint(1, VOCABULARY - 2, (4, CONTEXT), generator=generator)
  tokens[:, 0] = VOCABULARY - 2
  # Padding with zeros, with more end tokens, and none at all.
  for row, (end, padding) in enumerate(((4, 0), (7, VOCABULARY - 1), (9, 0))):
    tokens[row, end] = VOCABULARY - 1
    tokens[row, end + 1 :] = padding
  tokens[3, 1] = VOCABULARY - 1
  return images, tokens


def huggingface():
  def tower(sizes):
    return {
      "hidden_size": sizes["width"],
      "num_hidden_layers": sizes["depth"],
      "num_attention_heads": sizes["heads"],
      "intermediate_size": sizes["mlp_width"],
    }

  def create(activation):
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    text = (
      tower(TEXT)
      | ids
      | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "hidden_act": activation,
      }
    )
    vision = tower(VISION) | {
      "image_size": IMAGE,
      "patch_size": PATCH,
      "hidden_act": activation,
    }
    return transformers.CLIPModel(
      transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=EMBED
      )
    )

  model = random_clip(create("quick_gelu"), 6)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    weights = safetensors.numpy.load_file(f"{folder}/model.safetensors")
  gelu = create("gelu").eval()
  gelu.load_state_dict(model.state_dict())
  images, tokens = inputs()
  result = {"images": last(images), "tokens": tokens}
  for prefix, made in (("", model), ("gelu_", gelu)):
    vision = made.vision_model(pixel_values=images).pooler_output
    text = made.text_model(input_ids=tokens).pooler_output
    result |= {
      f"{prefix}image_features": made.visual_projection(vision),
      f"{prefix}text_features": made.text_projection(text),
      f"{prefix}logits": made(
        pixel_values=images, input_ids=tokens
      ).logits_per_image,
    }
  result["larger_positions"] = (
    model.vision_model.embeddings.interpolate_pos_encoding(
      torch.zeros(1, 1 + (LARGER // PATCH) ** 2, VISION["width"]),
      LARGER,
      LARGER,
    )[0]
  )
  return result | prefixed("weights", weights)


def openclip():
  def tower(sizes):
    return {
      "width": sizes["width"],
      "layers": sizes["depth"],
      "mlp_ratio": sizes["mlp_width"] / sizes["width"],
    }

  model = open_clip.CLIP(
    embed_dim=EMBED,
    vision_cfg=tower(VISION)
    | {
      "image_size": IMAGE,
      "patch_size": PATCH,
      "head_width": VISION["width"] // VISION["heads"],
    },
    text_cfg=tower(TEXT)
    | {
      "context_length": CONTEXT,
      "vocab_size": VOCABULARY,
      "heads": TEXT["heads"],
    },
    quick_gelu=False,
  )
  random_clip(model, 7)
  images, tokens = inputs()
  state = dict(model.state_dict())
  resized = {
    "visual.positional_embedding": state["visual.positional_embedding"]
  }
  side = LARGER // PATCH
  like = torch.nn.Module()
  like.visual = torch.nn.Module()
  like.visual.grid_size = (side, side)
  open_clip.model.resize_pos_embed(resized, like)
  return {
    "images": last(images),
    "tokens": tokens,
    "image_features": model.encode_image(images),
    "text_features": model.encode_text(tokens),
    "logits": model.get_logits(images, tokens)[0],
    "larger_positions": resized["visual.positional_embedding"],
  } | prefixed("weights", state)


def main(folder):
  for name, make in (("huggingface", huggingface), ("openclip", openclip)):
    with torch.no_grad():
      arrays = {
        key: np.asarray(value, None if key == "tokens" else np.float32)
        for key, value in make().items()
      }
    np.savez_compressed(pathlib.Path(folder) / f"clip_{name}.npz", **arrays)


if __name__ == "__main__":
  main(sys.argv[1])
