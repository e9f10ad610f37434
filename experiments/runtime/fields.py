"""The fields of a config, with the comments that stand beside them."""

import ast
import inspect
import io
import tokenize
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import config_dict


class Field(NamedTuple):
  """A field that a command line can set."""

  name: str  # dotted, as in --config.<name>
  default: Any
  comment: str  # "" where the config's file has none


def list_fields(
  config: config_dict.ConfigDict, modules: Iterable[types.ModuleType]
) -> list[Field]:
  """Lists a config's fields with the comments in the files that set them.

  A comment belongs to the field in its own line, and to the one below.

  Args:
    config: what `get_config` returned.
    modules: whose source sets the fields; of several comments on a field the
      last module's holds.

  Returns:
    The fields, in alphabetical order.
  """
  comments: dict[str, str] = {}
  for module in modules:
    comments |= _read_comments(inspect.getsource(module))
  found: list[Field] = []

  def visit(section, prefix):
    for key, value in section.items():
      name = f"{prefix}{key}"
      if isinstance(value, config_dict.ConfigDict):
        visit(value, f"{name}.")
      else:
        # What is said of a section holds for its fields without words.
        comment = comments.get(name) or comments.get(prefix.rstrip("."), "")
        found.append(Field(name, value, comment))

  visit(config, "")
  return found


def as_text(fields: Iterable[Field], *, width: int = 80) -> str:
  """Lays fields out for a terminal: one a line, comments below.

  Args:
    fields: to list.
    width: of the terminal, in characters.

  Returns:
    Several lines.
  """
  lines = []
  for field in fields:
    lines.append(f"  --config.{field.name}={field.default!r}")
    line = ""
    for word in field.comment.split():
      if line and len(line) + len(word) + 7 > width:
        lines.append(f"      {line}")
        line = ""
      line = f"{line} {word}".strip()
    if line:
      lines.append(f"      {line}")
  return "\n".join(lines)


def _read_comments(source: str) -> dict[str, str]:
  """Finds the comment of each dotted field that the source assigns."""
  above, beside = _find_comments(source)
  tree = ast.parse(source)
  found: dict[str, str] = {}

  def visit(body, prefixes):
    """Goes through a function's statements; prefixes are of its names."""
    for node in body:
      for inner in ("body", "orelse"):
        visit(getattr(node, inner, []), prefixes)
      if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        continue
      name = _dotted(node.targets[0], prefixes)
      if isinstance(node.targets[0], ast.Name):
        # `wanted = config.study.reference` gives a section another name.
        other = _dotted(node.value, prefixes)
        if other:
          prefixes[node.targets[0].id] = f"{other}."
        continue
      if not name:
        continue
      text = " ".join(
        filter(None, (above.get(node.lineno), beside.get(node.end_lineno)))
      )
      if text:
        found[name] = text
      made_by = getattr(getattr(node.value, "func", None), "id", None)
      if made_by in functions:  # `config.model.vit = vit()`
        visit(functions[made_by].body, {"config": f"{name}."})

  functions = {
    node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
  }
  for function in functions.values():
    visit(function.body, {"config": ""})
  return found


def _dotted(node, prefixes):
  """Returns the field's name, or None if the node is no field."""
  names = []
  while isinstance(node, ast.Attribute):
    names.append(node.attr)
    node = node.value
  if not names or getattr(node, "id", None) not in prefixes:
    return None
  return prefixes[node.id] + ".".join(reversed(names))


def _find_comments(source):
  """Finds comments by the line of code they stand above or beside."""
  above: dict[int, str] = {}
  beside: dict[int, str] = {}
  pending: list[str] = []
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    line = token.start[0]
    if token.type == tokenize.COMMENT:
      text = token.string.lstrip("# ").rstrip()
      if token.line.lstrip().startswith("#"):
        pending.append(text)
      else:
        beside[line] = text
    elif token.type == tokenize.NL and not token.line.strip():
      pending = []
    elif pending and token.type not in (
      tokenize.NL,
      tokenize.INDENT,
      tokenize.DEDENT,
    ):
      above[line] = " ".join(pending)
      pending = []
  return above, beside
