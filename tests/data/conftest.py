"""Keeps scripts that need more than the project's dependencies from pytest."""

collect_ignore = [
  "make_clip_golden.py",
  "make_vit_golden.py",
  "typed_script.py",
]
