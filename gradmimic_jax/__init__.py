"""Grad-Mimic in JAX."""
