"""Configs of `experiments.benchmark`."""
