"""Settings of the documentation; `make docs` builds it, offline."""

import importlib
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # configs and experiments are not installed
# The notebooks' kernels are processes of their own.
_known = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_known)

import gradmimic_jax  # noqa: E402
from configs import base  # noqa: E402
from experiments.runtime import fields  # noqa: E402

project = "gradmimic_jax"
author = "The gradmimic_jax authors"
copyright = f"2026, {author}"
release = gradmimic_jax.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "gradmimic_jax"
html_static_path = []
html_theme_options = {"show_navbar_depth": 2}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Notebooks are text, and are run in every build: what they show is true.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300  # seconds a cell; a busy machine takes its time
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Docstrings are Google's, whose single backticks mean code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# The configs whose fields are listed, under the names of their pages.
_CONFIGS = {
  "Image classification": "classification",
  "Image-text pairs": "contrastive",
  "Language": "language",
  "Scoring": "score",
  "Selecting": "select",
  "Reporting": "report",
}


def _write_fields(app):
  """Writes the page of all fields from the configs and their comments."""
  lines = [
    "# Configs and their fields",
    "",
    "Every job takes `--config=configs/<name>.py:<arguments>`, and any field as"
    " `--config.<field>=<value>`. A field that is not here is refused. The"
    " tables are made of the configs' own comments. `python -m experiments`"
    " lists the jobs, and `python -m experiments.<job> --config=... --help`"
    " shows the fields of one config, with the values that it gives them.",
    "",
  ]
  for title, name in _CONFIGS.items():
    module = importlib.import_module(f"configs.{name}")
    lines += [f"## {title}", "", f"`configs/{name}.py`", ""]
    lines += ["| field | default | meaning |", "|---|---|---|"]
    for field in fields.list_fields(module.get_config(), [base, module]):
      cells = (f"`{field.name}`", f"`{field.default!r}`", field.comment)
      lines.append(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
      )
    lines.append("")
  page = pathlib.Path(app.srcdir) / "configs.md"
  text = "\n".join(lines)
  if not page.exists() or page.read_text() != text:
    page.write_text(text)


def _set_off_tables(app, what, name, obj, options, lines):
  """Shows the tables of docstrings as they are drawn."""
  del app, what, name, obj, options
  found = []
  for number, line in enumerate(lines):
    in_table = line.startswith("|")
    if in_table and not (number and lines[number - 1].startswith("|")):
      found += ["::", ""]
    found.append(f"  {line}" if in_table else line)
  lines[:] = found


def setup(app):
  """Hooks what is made of the source into the build."""
  app.connect("builder-inited", _write_fields)
  app.connect("autodoc-process-docstring", _set_off_tables, priority=0)
