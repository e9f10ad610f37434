"""Configs of `experiments.benchmark`, one for each benchmark."""
