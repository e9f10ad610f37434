"""Grids of linear heads on stored features."""
