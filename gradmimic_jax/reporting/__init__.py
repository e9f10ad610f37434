"""The report of a selection, for people to look at."""

from gradmimic_jax.reporting.page import report

__all__ = ["report"]
