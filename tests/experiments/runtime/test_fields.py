"""Fields of configs, with the comments that stand beside them."""

import types

from experiments.runtime import fields

SOURCE = """
from ml_collections import config_dict

def get_config():
  config = config_dict.ConfigDict()
  # Of the run.
  # Two lines.
  config.seed = 3  # and one more

  config.silent = 0
  # Over devices.
  config.mesh = config_dict.ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1  # parameters too
  config.mesh.deep = deep()
  wanted = config.mesh.deep
  wanted.added = ""  # by another name
  return config


def deep():
  config = config_dict.ConfigDict()
  config.depth = 6  # blocks
  return config
"""


def test_comments_above_and_beside_belong_to_their_fields(monkeypatch):
  module = types.ModuleType("made_up")
  exec(SOURCE, module.__dict__)
  monkeypatch.setattr(fields.inspect, "getsource", lambda module: SOURCE)
  found = fields.list_fields(module.get_config(), [module])
  assert {field.name: (field.default, field.comment) for field in found} == {
    "seed": (3, "Of the run. Two lines. and one more"),
    "silent": (0, ""),
    "mesh.data": (-1, "Over devices."),
    "mesh.fsdp": (1, "parameters too"),
    "mesh.deep.depth": (6, "blocks"),
    "mesh.deep.added": ("", "by another name"),
  }
  text = fields.as_text(found, width=24)
  assert "  --config.seed=3\n      Of the run. Two\n" in text
  assert max(len(line) for line in text.splitlines() if "=" not in line) <= 24
